. "$(dirname "$0")/../../../../solution_tools.sh"
SETS=${SETS:-"--set optimizer.lr=0.002 --set run.seed=4242"}
.ate/run "$CAMBIUM" train configs/tiny.toml --set train.steps=12 $SETS --out .ate/answer/run
grep '"step":12,' .ate/answer/run/metrics.jsonl | jq .${FIELD:-validation_loss} >.ate/answer/loss
