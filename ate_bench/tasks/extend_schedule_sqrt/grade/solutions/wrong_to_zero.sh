# Falls to zero instead of the floor.
. "$(dirname "$0")/right.sh"
cp src/optim/lr_schedule.cc .ate/before
sed -i 's/floor + (peak - floor) \* (1.0 - std::sqrt/peak * (1.0 - std::sqrt/' src/optim/lr_schedule.cc
! cmp -s src/optim/lr_schedule.cc .ate/before
