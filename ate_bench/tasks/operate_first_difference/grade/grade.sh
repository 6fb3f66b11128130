. .ate/grade_tools.sh
cat >.ate/grade.py <<'P'
import json, os, sys
answer = json.load(open(os.environ["ATE_ANSWER"] + "/answer.json"))
rows = lambda run, name: [json.loads(line) for line in open(f"runs/{run}/{name}")]
pairs = list(zip(rows("old", "digests.jsonl"), rows("new", "digests.jsonl")))
digests = lambda row: next(value for value in row.values() if isinstance(value, dict))
first = next((a, b) for a, b in pairs if digests(a) != digests(b))
differing = [n for n in digests(first[0]) if digests(first[0])[n] != digests(first[1])[n]]
if sys.argv[1] == "step":
    assert answer["step"] == first[0]["step"]
elif sys.argv[1] == "tensor":
    assert answer["tensor"] in differing, differing
else:
    losses = [(a["step"], a["loss"], b["loss"])
              for a, b in zip(rows("old", "metrics.jsonl"), rows("new", "metrics.jsonl"))
              if "loss" in a]
    want = next(step for step, a, b in losses if a != b)
    assert answer["key"] == "optimizer.clip" and answer["loss_differs_at"] == want, want
P
for name in step tensor cause; do check $name "$name" python3 .ate/grade.py $name; done
