# sqrt(1 - x) for 1 - sqrt(x).
. "$(dirname "$0")/right.sh"
cp src/optim/sqrt_cooldown.cc .ate/before
sed -i 's/(1.0 - std::sqrt(std::min(1.0, x)))/std::sqrt(1.0 - std::min(1.0, x))/' src/optim/sqrt_cooldown.cc
! cmp -s src/optim/sqrt_cooldown.cc .ate/before
