. "$(dirname "$0")/../../../../solution_tools.sh"
.ate/run "$CAMBIUM" train configs/tiny.toml --set train.steps=16 --set run.seed=7 \
  --set checkpoint.every_steps=8 --out .ate/run7
"$CAMBIUM" checkpoint export-hf "${FROM:-.ate/run7}" .ate/answer/hf --storage bf16
"$CAMBIUM" eval "${EVALUATED:-.ate/answer/hf}" --tokenizer bytes --data data/quickstart.txt \
  --sequences 8 --sequence-length 64 --json | jq .loss >.ate/answer/loss
