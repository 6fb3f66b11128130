# No maximum taken off: overflows for large logits.
. "$(dirname "$0")/right.sh"
cp reference/smoothed_cross_entropy.cc .ate/before
sed -i 's/const float most = .*/const float most = 0.0f;/' reference/smoothed_cross_entropy.cc
! cmp -s reference/smoothed_cross_entropy.cc .ate/before
