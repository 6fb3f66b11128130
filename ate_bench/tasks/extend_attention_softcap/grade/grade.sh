. .ate/grade_tools.sh
hidden_test cambium_reference
cap="model.attention_logit_cap=0.5"
trainer $cap
slope $cap
cat >.ate/evaluation.py <<'P'
import json
def of(run):
    rows = [json.loads(line) for line in open(f".ate/{run}/metrics.jsonl")]
    return [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
none, huge, small = of("c0"), of("c1000"), of("c0.1")
assert abs(huge - none) < 1e-5 and abs(small - none) > 1e-4, (none, huge, small)
P
check evaluation "validation_loss at rate 0" bash -c '. .ate/grade_tools.sh &&
  for cap in 0 1000 0.1; do
    train_tiny .ate/c$cap train.steps=1 optimizer.lr=0 model.init_std=0.3 model.attention_logit_cap=$cap || exit 1
  done; python3 .ate/evaluation.py'
check refused "export to Hugging Face" refuses_export model.attention_logit_cap
