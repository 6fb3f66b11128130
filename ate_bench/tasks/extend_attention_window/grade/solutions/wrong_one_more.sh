# The window one position too wide.
. "$(dirname "$0")/right.sh"
cp reference/window_attention.cc .ate/before
sed -i 's/t - a.window + 1/t - a.window/' reference/window_attention.cc
! cmp -s reference/window_attention.cc .ate/before
