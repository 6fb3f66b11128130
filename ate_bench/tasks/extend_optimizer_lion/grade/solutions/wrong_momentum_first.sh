# The sign of the new momentum instead of the interpolation.
. "$(dirname "$0")/right.sh"
cp reference/lion.cc .ate/before
sed -i 's/const float c = a.beta1 \* m + (1.0f - a.beta1)/const float c = a.beta2 * m + (1.0f - a.beta2)/' reference/lion.cc
! cmp -s reference/lion.cc .ate/before
