. "$(dirname "$0")/../../../../solution_tools.sh"
sets="--set train.steps=12 --set run.seed=${SEED:-31}"
.ate/run "$CAMBIUM" train configs/tiny.toml $sets --stop-after-step ${STOP:-5} --out .ate/answer/run
.ate/run "$CAMBIUM" train configs/tiny.toml $sets ${LAYOUT:---set parallel.dp=4 --set parallel.ep=2} \
  --resume --out .ate/answer/run
