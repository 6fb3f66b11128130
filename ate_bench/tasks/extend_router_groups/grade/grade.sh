. .ate/grade_tools.sh
hidden_test reference/group_topk.cc
groups="model.router_groups=4 model.router_kept_groups=2 model.router_scaling=2.5 model.experts=8
  balance.loss=none"
trainer $groups balance.bias_update_rate=0.01
slope $groups model.router_kept_groups=4 model.top_k=8 model.router_scaling=1
check trained_bias "another rate, another loss after step 1" bash -c '. .ate/grade_tools.sh &&
  train_tiny .ate/plain train.steps=4 "$@" &&
  train_tiny .ate/biased train.steps=4 balance.bias_update_rate=0.5 "$@" && python3 - <<P
import json
of = lambda run: [json.loads(line)["loss"] for line in open(f".ate/{run}/metrics.jsonl") if "loss" in line]
plain, biased = of("plain"), of("biased")
assert len(plain) == 4 and plain[0] == biased[0] and plain[1:] != biased[1:], (plain, biased)
P' trained_bias $groups
check refused "what the router does not support" bash -c '. .ate/grade_tools.sh
  for key in model.router_groups=3 model.router_groups=8 model.router_kept_groups=5 \
    "model.router_kept_groups=1 model.top_k=3" balance.loss=sequence balance.z_loss_weight=0.001 \
    balance.routing=even; do
    refuses model.router_groups "$@" $key || { echo "$key"; exit 1; }
  done
  refuses_export model.router_groups' refused $groups
