. .ate/grade_tools.sh
cambium=$(cambium_binary)
"$cambium" plan job.toml --machine dgx-h200 --json >.ate/own.json 2>.ate/own.log
cat >.ate/grade.py <<'P'
import json, os, sys
ops = json.loads(open(".ate/own.json").read().splitlines()[-1])["ops"]
total = sum(op["time_ns"] for op in ops)
answer = json.load(open(os.environ["ATE_ANSWER"] + "/ops.json"))
for want, got in zip(ops[:3], answer[:3], strict=True):
    if sys.argv[1] == "ops":
        assert got["op"] == want["op"], ops[:3]
    elif sys.argv[1] == "calls":
        mine = [op for op in ops if op["op"] == got["op"]][0]
        assert got["calls"] == mine["calls"], mine
    else:
        assert abs(got["percent"] - 100 * want["time_ns"] / total) < 0.2, ops[:3]
P
check ops "ids and order" python3 .ate/grade.py ops
check calls "calls of all ranks" python3 .ate/grade.py calls
check shares "shares of the ops' time" python3 .ate/grade.py shares
