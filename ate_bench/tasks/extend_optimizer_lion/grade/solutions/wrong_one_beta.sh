# Momentum with beta1: signSGD with momentum, not Lion.
. "$(dirname "$0")/right.sh"
cp reference/lion.cc .ate/before
sed -i 's/m = a.beta2 \* m + (1.0f - a.beta2)/m = a.beta1 * m + (1.0f - a.beta1)/' reference/lion.cc
! cmp -s reference/lion.cc .ate/before
