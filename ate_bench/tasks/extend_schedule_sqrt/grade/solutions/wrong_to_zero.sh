# Falls to zero instead of the floor.
. "$(dirname "$0")/right.sh"
cp src/optim/sqrt_cooldown.cc .ate/before
sed -i 's/s.floor + (s.peak - s.floor)/s.peak/' src/optim/sqrt_cooldown.cc
! cmp -s src/optim/sqrt_cooldown.cc .ate/before
