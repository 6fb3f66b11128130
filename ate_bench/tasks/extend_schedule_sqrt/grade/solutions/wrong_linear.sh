# The linear cooldown of wsd.
. "$(dirname "$0")/right.sh"
cp src/optim/sqrt_cooldown.cc .ate/before
sed -i 's/std::sqrt(std::min(1.0, x))/std::min(1.0, x)/' src/optim/sqrt_cooldown.cc
! cmp -s src/optim/sqrt_cooldown.cc .ate/before
