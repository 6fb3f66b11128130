. .ate/grade_tools.sh
cambium=$(cambium_binary)
run=$ATE_ANSWER/run
"$cambium" train configs/tiny.toml --set train.steps=12 --set run.seed=31 --out .ate/own \
  >.ate/own.log 2>&1
check finished "exit event" grep -q '"event":"exit","code":0' "$run/metrics.jsonl"
check layout "dp 4, ep 2" bash -c "grep -qx 'dp = 4' '$run/config.resolved.toml' &&
  grep -qx 'ep = 2' '$run/config.resolved.toml'"
check stopped "a checkpoint of step 5" test -d "$run/checkpoints/step-00000005"
check bits "same digests" bash -c "test -s '$run/digests.jsonl' &&
  cmp .ate/own/digests.jsonl '$run/digests.jsonl'"
