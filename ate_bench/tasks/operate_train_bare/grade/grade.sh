. .ate/grade_tools.sh
cambium=$(cambium_binary)
"$cambium" train configs/tiny.toml --set train.steps=12 --set run.seed=4242 \
  --set optimizer.lr=0.002 --out .ate/own >.ate/own.log 2>&1
run=$ATE_ANSWER/run
check run "exit event" grep -q '"event":"exit","code":0' "$run/metrics.jsonl"
check config "seed and steps" bash -c "grep -qx 'seed = 4242' '$run/config.resolved.toml' &&
  grep -qx 'steps = 12' '$run/config.resolved.toml'"
check bits "same digests" bash -c "test -s '$run/digests.jsonl' &&
  cmp .ate/own/digests.jsonl '$run/digests.jsonl'"
check loss "validation loss" python3 - <<'P'
import json, os
rows = [json.loads(line) for line in open(".ate/own/metrics.jsonl")]
want = [row["validation_loss"] for row in rows if row.get("step") == 12][0]
assert abs(float(open(os.environ["ATE_ANSWER"] + "/loss").read()) - want) < 1e-6 * want
P
