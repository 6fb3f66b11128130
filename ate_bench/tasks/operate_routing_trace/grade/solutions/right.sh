. "$(dirname "$0")/../../../../solution_tools.sh"
.ate/run "$CAMBIUM" train configs/tiny.toml --set train.steps=6 --set run.seed=${SEED:-11} \
  --set parallel.dp=2 --set parallel.ep=2 --out runs/traced \
  --trace-routing .ate/answer/trace.h5 --trace-steps ${STEPS:-2}
STEP=${STEP:-6} LAYER=${LAYER:--1} python3 - <<'P'
import json, os
rows = [json.loads(line) for line in open("runs/traced/metrics.jsonl")]
load = [r["expert_load"] for r in rows if r.get("step") == int(os.environ["STEP"])][0]
load = load[int(os.environ["LAYER"])]
json.dump({"expert": load.index(max(load)), "tokens": max(load)},
          open(".ate/answer/busiest.json", "w"))
P
