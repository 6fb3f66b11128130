. "$(dirname "$0")/../../../../solution_tools.sh"
"$CAMBIUM" plan job.toml --machine ${MACHINE:-dgx-h200} --json ${FLAGS:-} >.ate/plan.json
KEY=${KEY:-time_ns} python3 - <<'P'
import json, os
ops = json.loads(open(".ate/plan.json").read().splitlines()[-1])["ops"]
total = sum(op["time_ns"] for op in ops)
ops.sort(key=lambda op: -op[os.environ["KEY"]])
json.dump([{"op": op["op"], "calls": op["calls"], "percent": 100 * op["time_ns"] / total}
           for op in ops[:3]], open(".ate/answer/ops.json", "w"))
P
