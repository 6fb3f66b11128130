. .ate/grade_tools.sh
hidden_test reference/smoothed_cross_entropy.cc
trainer train.label_smoothing=0.1
slope train.label_smoothing=0.4
cat >.ate/reported.py <<'P'
import json
def of(run, key):
    rows = [json.loads(line) for line in open(f".ate/{run}/metrics.jsonl")]
    return [row[key] for row in rows if key in row][-1]
plain, some, more = [of(run, "loss") for run in ("e0", "e2", "e4")]
assert abs(some - plain) > 1e-4 and abs((more - plain) - 2 * (some - plain)) < 1e-5, (plain, some, more)
assert of("e0", "validation_loss") == of("e4", "validation_loss")
P
check reported "loss and validation_loss at rate 0" bash -c '. .ate/grade_tools.sh &&
  for e in 0 2 4; do
    train_tiny .ate/e$e train.steps=1 optimizer.lr=0 model.init_std=0.3 train.label_smoothing=0.$e || exit 1
  done; python3 .ate/reported.py'
check refused "bf16" refuses train.label_smoothing numerics.compute=bf16 train.label_smoothing=0.1
