# sign(0) = 1: parameters without gradient drift.
. "$(dirname "$0")/right.sh"
cp reference/lion.cc .ate/before
sed -i 's/(c > 0) - (c < 0)/c >= 0 ? 1 : -1/' reference/lion.cc
! cmp -s reference/lion.cc .ate/before
