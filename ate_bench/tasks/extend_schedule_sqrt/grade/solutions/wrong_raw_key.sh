# The key as given: 0 is no cooldown, and a long one is not cut.
. "$(dirname "$0")/right.sh"
cp src/optim/lr_schedule.cc .ate/before
sed -i 's/cooldown = derived.decay_steps/cooldown = config.schedule.decay_steps/' src/optim/lr_schedule.cc
! cmp -s src/optim/lr_schedule.cc .ate/before
