# Norm gains decay too: the op is right, the trainer is not.
. "$(dirname "$0")/right.sh"
cp src/train/train_step.cc .ate/before
sed -i 's/weight_decay = decays ? static_cast<float>(optimizer.weight_decay) : 0.0f/weight_decay = decays || true ? static_cast<float>(optimizer.weight_decay) : 0.0f/' src/train/train_step.cc
! cmp -s src/train/train_step.cc .ate/before
