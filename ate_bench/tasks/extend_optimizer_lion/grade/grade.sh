. .ate/grade_tools.sh
hidden_test reference/lion.cc
lion="optimizer.name=lion optimizer.lr=0.001 optimizer.beta2=0.98 optimizer.weight_decay=0.1"
trainer $lion
cat >.ate/decay.py <<'P'
import json
last = lambda run: [json.loads(line) for line in open(f".ate/{run}/digests.jsonl")][-1]
digests = lambda row: next(value for value in row.values() if isinstance(value, dict))
decayed, kept = digests(last("decayed")), digests(last("kept"))
for name in kept:
    assert (decayed[name] == kept[name]) == name.endswith("norm"), name
P
check update "another epsilon, same bits" bash -c '. .ate/grade_tools.sh &&
  train_tiny .ate/epsilon "$@" optimizer.epsilon=0.01 train.steps=3 &&
  cmp <(head -4 .ate/one/digests.jsonl) .ate/epsilon/digests.jsonl' update $lion
check decay "matrices alone" bash -c '. .ate/grade_tools.sh &&
  train_tiny .ate/decayed "$@" train.steps=1 optimizer.weight_decay=50 &&
  train_tiny .ate/kept "$@" train.steps=1 optimizer.weight_decay=0 && python3 .ate/decay.py' decay $lion
