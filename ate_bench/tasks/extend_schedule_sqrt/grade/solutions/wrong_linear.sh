# The linear cooldown of wsd.
. "$(dirname "$0")/right.sh"
cp src/optim/lr_schedule.cc .ate/before
sed -i 's/std::sqrt(std::min(1.0, x))/std::min(1.0, x)/' src/optim/lr_schedule.cc
! cmp -s src/optim/lr_schedule.cc .ate/before
