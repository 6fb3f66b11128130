. .ate/grade_tools.sh
cambium=$(cambium_binary)
"$cambium" train configs/tiny.toml --set train.steps=16 --set run.seed=7 --out .ate/own \
  >.ate/own.log 2>&1
"$cambium" checkpoint export-hf .ate/own .ate/own_hf --storage bf16 >>.ate/own.log 2>&1
evaluate() { "$cambium" eval "$1" --tokenizer bytes --data data/quickstart.txt --sequences 8 \
  --sequence-length 64 --json; }
evaluate .ate/own_hf >.ate/own.json 2>>.ate/own.log
check weights "safetensors equal" cmp .ate/own_hf/model.safetensors "$ATE_ANSWER/hf/model.safetensors"
check names "config.json equal" cmp .ate/own_hf/config.json "$ATE_ANSWER/hf/config.json"
check eval "loss of the exported weights" python3 - <<'P'
import json, os
want = json.load(open(".ate/own.json"))["loss"]
assert abs(float(open(os.environ["ATE_ANSWER"] + "/loss").read()) - want) < 1e-7 * want
P
