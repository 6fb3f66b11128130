. .ate/grade_tools.sh
cambium=$(cambium_binary)
"$cambium" train configs/tiny.toml --set train.steps=6 --set run.seed=11 --out .ate/own \
  --trace-routing .ate/own.h5 --trace-steps 2 >.ate/own.log 2>&1
check steps "as many values as two steps have" bash -c \
  '[ "$(stat -c %s .ate/own.h5)" = "$(stat -c %s "$ATE_ANSWER/trace.h5")" ]'
# Every layout writes the same bytes.
check trace "same experts and weights" cmp .ate/own.h5 "$ATE_ANSWER/trace.h5"
check busiest "expert and its tokens" python3 - <<'P'
import json, os
rows = [json.loads(line) for line in open(".ate/own/metrics.jsonl")]
load = [row["expert_load"][-1] for row in rows if row.get("step") == 6][0]
answer = json.load(open(os.environ["ATE_ANSWER"] + "/busiest.json"))
assert answer["tokens"] == max(load) == load[answer["expert"]], load
P
