#!/usr/bin/env bash
# multi_gpu_check.sh [BIN [RANKS]]: what the simulator proves, held against NCCL on RANKS GPUs.
#
# BIN holds `cambium` and `test_comm` (default: build/cuda); RANKS is 2 unless told. It runs the
# conformance suite, then trains each layout twice, over NCCL with one process per GPU and with
# virtual ranks on one GPU: exact mode must give the same bits, fast mode losses within its bound.
# Then faults: a process killed in a step and in a save, a process stopped; `plan`'s predictions,
# written down before their layouts run (the machine file MACHINE, default h200, with the links that
# were measured here); and a step's timeline. Ends in a table, with 1 when a row failed and 77 where
# there are too few GPUs. NCCL_NVLS_ENABLE is left as it is set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${1:-build/cuda}
ranks=${2:-2}
limit_s=${CHECK_LIMIT_S:-120}  # of one training run
steps=${CHECK_STEPS:-50}
machine=${MACHINE:-h200}
fast_bound=2e-2  # of the mean of the last ten losses: bf16 routing parts the runs' tokens
work=$(mktemp -d)
trap 'kill -9 $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
table=()
failed=0
port=29600

gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | grep -c .)
if [ "$gpus" -lt "$ranks" ]; then
  echo "skipped: $gpus GPUs of $ranks"
  exit 77
fi

# row NAME COMMAND...: a row of the table; the command's output is shown when it fails. CHECK_ROWS, a
# regular expression, picks rows.
row() {
  local name=$1 begin=$EPOCHREALTIME status=0 verdict=ok
  shift
  [[ $name =~ ${CHECK_ROWS:-.} ]] || return 0
  "$@" >"$work/log" 2>&1 || status=$?
  if [ "$status" -eq 2 ]; then  # what the configuration refuses was not checked, and did not fail
    verdict='refused'
  elif [ "$status" -ne 0 ]; then
    verdict="FAIL (exit $status)"
    failed=1
    echo "== $name: exit $status"
    tail -n 30 "$work/log"
  fi
  table+=("$(printf '%-60s %-14s %6.1f s  %s' "$name" "$verdict" \
    "$(awk "BEGIN{print $EPOCHREALTIME - $begin}")" "$(tail -n 1 "$work/log" | cut -c1-160)")")
  echo "${table[-1]}"
}

# Words drawn by a fixed rule, so that nothing has to be prepared.
awk 'function draw() { seed = seed * 16807 % 2147483647; return seed / 2147483647 }
  BEGIN { seed = 7; for (i = 0; i < 60000; i++) {
  word = ""; n = 2 + int(5 * draw());
  for (j = 0; j < n; j++) word = word substr("etaoinshrdlu", 1 + int(12 * draw() * draw()), 1);
  printf "%s%s", word, i % 12 == 11 ? ".\n" : " " } }' >"$work/corpus.txt"

# arguments NAME CONFIG STEPS [SET...]: the command line of one run, into the array `line`.
arguments() {
  local name=$1 config=$2 count=$3
  shift 3
  line=(train "$config" --out "$work/$name" --set "data.train=[\"$work/corpus.txt\"]"
    --set data.tokenizer=bytes --set data.tokenizer_vocab=0 --set "train.steps=$count"
    --set train.sample_tokens=0 --set numerics.compute=bf16 --set run.device=cuda
    --set run.watchdog_s=20 --set schedule.kind=constant)  # the rate of a step is any length's
  for assignment in "$@"; do line+=(--set "$assignment"); done
}

sim() {  # sim NAME CONFIG STEPS [SET...]: virtual ranks on one GPU
  local line
  arguments "$@" run.transport=sim
  CUDA_VISIBLE_DEVICES=0 timeout -k 5 "$limit_s" "$bin/cambium" "${line[@]}"
}

# start NAME CONFIG STEPS [SET...]: one process per GPU in the background, their ids in `processes`.
start() {
  local line rank
  arguments "$@" run.transport=nccl
  port=$((port + 1))
  processes=()
  for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank WORLD_SIZE=$ranks LOCAL_RANK=$rank MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      ${injection:+env "CUDA_INJECTION64_PATH=$injection"} \
      timeout -k 5 "$limit_s" "$bin/cambium" "${line[@]}" ${more:-} >"$work/rank$rank" 2>&1 &
    processes+=($!)
  done
}

finish() {  # waits for all processes, prints their last words, returns the worst status
  local worst=0 status rank
  for ((rank = 0; rank < ranks; rank++)); do
    status=0
    wait "${processes[$rank]}" || status=$?
    statuses[rank]=$status
    [ "$status" -ne 0 ] && { worst=$status; echo "rank $rank: exit $status"; }
    tail -n 12 "$work/rank$rank"
  done
  return "$worst"
}

nccl() { start "$@" && finish; }

losses() { grep -o '"loss":[0-9.e+-]*' "$work/$1/metrics.jsonl" | cut -d: -f2; }
tokens_per_s() {  # median of the last twenty steps
  grep -o '"tokens_per_s":[0-9.e+-]*' "$work/$1/metrics.jsonl" | cut -d: -f2 | tail -n 20 |
    sort -g | awk '{ v[NR] = $1 } END { printf "%.0f", v[int((NR + 1) / 2)] }'
}

exact() {  # exact NAME CONFIG [SET...]
  local name=$1 config=$2
  shift 2
  nccl "$name-nccl" "$config" "$steps" numerics.reduction=exact "$@" &&
    sim "$name-sim" "$config" "$steps" numerics.reduction=exact "$@" || return
  "$bin/cambium" compare "$work/$name-sim" "$work/$name-nccl"
  local status=$?
  rm -rf "$work/$name-nccl" "$work/$name-sim"
  return $status
}

fast() {
  local name=$1 config=$2
  shift 2
  nccl "$name-nccl" "$config" "$steps" numerics.reduction=fast "$@" &&
    sim "$name-sim" "$config" "$steps" numerics.reduction=fast numerics.fast_order=ring "$@" ||
    return
  local bits=other
  "$bin/cambium" compare "$work/$name-sim" "$work/$name-nccl" && bits=same
  paste <(losses "$name-sim") <(losses "$name-nccl") | awk -v bound=$fast_bound -v bits=$bits \
    -v speed="$(tokens_per_s "$name-nccl")" -v ranks="$ranks" '
    { n++; if (NR == 1) first = $2 / $1 - 1; a[n] = $1; b[n] = $2 }
    END { for (i = n - 9; i <= n; i++) { x += a[i]; y += b[i] }
      gap = y / x - 1; printf "%s bits, first loss %.1e, last ten %.1e; %.0f tokens/s a GPU\n",
        bits, first, gap, speed / ranks
      exit !(n > 10 && gap < bound && gap > -bound) }'
  local status=$?
  rm -rf "$work/$name-nccl" "$work/$name-sim"
  return $status
}

# scaling NAME CONFIG SEQUENCES [SET...]: tokens/s a GPU, alone and with all ranks, at one load a GPU.
scaling() {
  local name=$1 config=$2 sequences=$3 one all
  shift 3
  sim "$name-one" "$config" "$steps" numerics.reduction=fast parallel.dp=1 parallel.ep=1 \
    "train.global_batch_sequences=$sequences" "$@" || return
  nccl "$name-all" "$config" "$steps" numerics.reduction=fast "parallel.dp=$ranks" \
    "parallel.ep=$ranks" "train.global_batch_sequences=$((ranks * sequences))" "$@" || return
  one=$(tokens_per_s "$name-one")
  all=$(($(tokens_per_s "$name-all") / ranks))
  rm -rf "$work/$name-one" "$work/$name-all"
  echo "tokens/s a GPU: $one alone, $all on $ranks ranks: $(awk "BEGIN{printf \"%.2f\", $all / $one}")"
}

wait_for_step() {  # wait_for_step NAME STEP: until its metrics line is there
  for ((i = 0; i < 600; i++)); do
    grep -q "\"step\":$2," "$work/$1/metrics.jsonl" 2>/dev/null && return 0
    sleep 0.1
  done
  echo "step $2 never came"
  return 1
}

child_of() { pgrep -P "$1" | head -n 1; }  # the process under `timeout`

# struck SIGNAL WANTED_STATUS: rank 1 gets the signal at a step; rank 0 must end with the status.
struck() {
  local signal=$1 wanted=$2 name=struck-$1 begin
  start "$name" configs/tiny.toml 100000 numerics.reduction=exact "parallel.dp=$ranks" \
    checkpoint.every_steps=20
  wait_for_step "$name" 30 || { finish; return 1; }
  begin=$EPOCHREALTIME
  kill "-$signal" "$(child_of "${processes[1]}")"
  statuses[0]=0
  wait "${processes[0]}" || statuses[0]=$?
  local after
  after=$(awk "BEGIN{print $EPOCHREALTIME - $begin}")
  kill -KILL "$(child_of "${processes[1]}")" 2>/dev/null
  wait "${processes[@]}" 2>/dev/null
  tail -n 12 "$work/rank0"
  echo "rank 0 ended with ${statuses[0]} after $after s"
  [ "${statuses[0]}" -eq "$wanted" ] || return 1
  resumed "$name"
}

# A run that was struck goes on from its newest checkpoint with the bits of one never struck.
resumed() {
  local name=$1 stop
  stop=$(($(ls "$work/$name/checkpoints" | sed -n 's/^step-0*\([0-9]*\)$/\1/p' | sort -n | tail -n 1) + 20))
  more=--resume nccl "$name" configs/tiny.toml 100000 numerics.reduction=exact \
    "parallel.dp=$ranks" checkpoint.every_steps=20 "train.steps=$stop" || return
  nccl "$name-whole" configs/tiny.toml "$stop" numerics.reduction=exact "parallel.dp=$ranks" \
    checkpoint.every_steps=20 || return
  "$bin/cambium" compare "$work/$name" "$work/$name-whole"
}

struck_in_save() {  # SIGKILL while a checkpoint's temporary directory or file stands
  local name=struck-save struck='' end=$((SECONDS + 30))
  start "$name" configs/tiny.toml 100000 numerics.reduction=exact "parallel.dp=$ranks" \
    checkpoint.every_steps=1
  wait_for_step "$name" 10 || { finish; return 1; }
  local victim
  victim=$(child_of "${processes[1]}")
  while [ -z "$struck" ] && [ $SECONDS -lt $end ]; do
    compgen -G "$work/$name/checkpoints/*.tmp*" >/dev/null && kill -KILL "$victim" && struck=yes
  done
  [ -n "$struck" ] || { kill -KILL "$victim"; echo "no save was met in 30 s"; }
  statuses[0]=0
  wait "${processes[0]}" || statuses[0]=$?
  wait "${processes[@]}" 2>/dev/null
  tail -n 6 "$work/rank0"
  echo "rank 0 ended with ${statuses[0]}; left: $(ls "$work/$name/checkpoints" | tail -n 3 | tr '\n' ' ')"
  [ -n "$struck" ] && [ "${statuses[0]}" -eq 20 ] || return 1
  resumed "$name"
}

# The times of collectives between the GPUs, into a machine file that `plan` then goes by.
links() {
  local rank
  port=$((port + 1))
  processes=()
  for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank WORLD_SIZE=$ranks LOCAL_RANK=$rank MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      timeout -k 5 "$limit_s" "$bin/cambium" calibrate --links "$machine" --out "$work/links.toml" \
      >"$work/rank$rank" 2>&1 &
    processes+=($!)
  done
  finish || return
  cp "$work/rank0" "$bin/links.txt" && cp "$work/links.toml" "$bin/links.toml"
  "$bin/cambium" plan $quick --machine "$work/links.toml" --set run.device=cuda \
    --set numerics.compute=bf16 --set "parallel.dp=$ranks" --set "parallel.ep=$ranks"
}

step_ms() {  # median of a run's steps after the first five
  grep -o '"step_ms":[0-9.e+-]*' "$work/$1/metrics.jsonl" | cut -d: -f2 | tail -n +6 | sort -g |
    awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

# The layouts whose steps are predicted: name and settings, beside `large`.
predicted=("dp-ep parallel.dp=$ranks parallel.ep=$ranks"
  "dp-replicated parallel.dp=$ranks parallel.ep=1"
  "dp-ep-zero1 parallel.dp=$ranks parallel.ep=$ranks parallel.sharding=zero1"
  "dp-zero2 parallel.dp=$ranks parallel.ep=1 parallel.sharding=zero2"
  "dp-ep-full parallel.dp=$ranks parallel.ep=$ranks parallel.sharding=full"
  "dp-ep-2048 parallel.dp=$ranks parallel.ep=$ranks train.sequence_length=2048"
  "pp-1f1b parallel.pp=$ranks parallel.dp=1 parallel.ep=1 train.micro_batch_sequences=1"
  "pp-dualpipev parallel.pp=$ranks parallel.dp=1 parallel.ep=1 train.micro_batch_sequences=1
    parallel.schedule=dualpipev")
large=(model.preset=qwen3-30b-a3b model.layers=4 model.vocab=512 train.sequence_length=4096
  "train.global_batch_sequences=$((4 * ranks))" train.micro_batch_sequences=4
  train.eval_every_steps=0 checkpoint.every_steps=0 numerics.reduction=fast balance.routing=even
  parallel.sharding=none)

plan_json() {  # plan_json SET...: of `large` with the links measured here, else those of the machine
  local file=$work/links.toml assignment line=()
  [ -e "$file" ] || file=$machine
  for assignment in "${large[@]}" "$@"; do line+=(--set "$assignment"); done
  "$bin/cambium" plan $quick --machine "$file" --json --set run.device=cuda \
    --set numerics.compute=bf16 --set plan.routing=uniform "${line[@]}"
}

# All predictions first, into a file that nothing rewrites; then the runs.
predictions() {
  local entry name settings planned measured
  for entry in "${predicted[@]}"; do
    read -r -d '' name settings <<<"$entry"
    planned=$(plan_json $settings | grep -o '"step_ms":[0-9.e+-]*' | cut -d: -f2) || return
    echo "$name $planned" >>"$work/predictions"
  done
  for entry in "${predicted[@]}"; do
    read -r -d '' name settings <<<"$entry"
    nccl "p-$name" $quick "$steps" "${large[@]}" $settings >"$work/p-log" 2>&1 ||
      { cat "$work/p-log"; return 1; }
    measured=$(step_ms "p-$name")
    rm -rf "$work/p-$name"
    awk -v name="$name" -v is="$measured" '$1 == name {
      printf "%-16s planned %.1f ms, measured %.1f ms, error %+.1f %%\n", name, $2, is,
        100 * ($2 / is - 1) }' "$work/predictions" | tee -a "$bin/predictions.txt"
  done
  awk '{ e = $(NF - 1); e = e < 0 ? -e : e; sum += e; if (e > most) most = e }
    END { printf "%d layouts, mean error %.1f %%, largest %.1f %%\n", NR, sum / NR, most
      exit !(NR >= 6 && sum / NR <= 15) }' "$bin/predictions.txt"
}

# What of a step's communication nothing hides, waits for peers included (a kernel of NCCL that waits
# runs): from CUPTI on rank 0, beside what is planned for it.
timeline() {
  local plan
  plan=$(plan_json "parallel.dp=$ranks" "parallel.ep=$ranks") || return
  injection=$bin/libcupti_timeline.so more='--profile 12' nccl w-timeline $quick "$steps" \
    "${large[@]}" "parallel.dp=$ranks" "parallel.ep=$ranks" || return
  mv timeline-*.json "$bin/timeline.json"
  echo "planned: span $(planned_ms step_ns) ms, communication $(planned_ms transfer_ns) ms," \
    "exposed $(planned_ms exposed_ns) + $(planned_ms peers_ns) ms of waiting;" \
    "$(grep '^timeline:' "$work/rank0" | cut -d, -f1,3,4)"
}
planned_ms() { grep -o "\"$1\":[0-9]*" <<<"$plan" | head -n 1 | awk -F: '{ printf "%.2f", $2 / 1e6 }'; }

slice=(model.preset=qwen3-30b-a3b model.layers=2 model.vocab=512 train.sequence_length=256
  train.global_batch_sequences=4 numerics.block_tokens=64 train.eval_every_steps=0)
quick=configs/quickstart.toml
r=$ranks

nvidia-smi --query-gpu=index,name,driver_version --format=csv,noheader
row "conformance on $r ranks" env CAMBIUM_COMM_RANKS="$r" "$bin/test_comm" \
  --gtest_filter='NcclConformance.*' --gtest_brief=1
row "links of $r GPUs measured ($bin/links.toml)" links
row "quickstart, exact, dp $r ep 1" exact q1 $quick "parallel.dp=$r" parallel.ep=1
row "quickstart, exact, dp $r ep $r" exact q2 $quick "parallel.dp=$r" "parallel.ep=$r"
row "quickstart, exact, dp $r ep 1, no accumulation" exact q6 $quick "parallel.dp=$r" \
  parallel.ep=1 "train.micro_batch_sequences=$((8 / r))"
row "quickstart, exact, dp $r ep $r, no accumulation" exact q3 $quick "parallel.dp=$r" \
  "parallel.ep=$r" "train.micro_batch_sequences=$((8 / r))"
row "quickstart, exact, pp $r" exact q4 $quick "parallel.pp=$r" parallel.dp=1 parallel.ep=1
shared=("parallel.cp=$r" parallel.dp=1 "parallel.ep=$r" "train.sequence_length=$((256 * r))"
  "model.max_positions=$((256 * r))")
row "quickstart, exact, cp $r" exact q5 $quick "${shared[@]}"
row "quickstart, fast, cp $r" fast f2 $quick "${shared[@]}"
row "quickstart, exact, cp $r, ring" exact q7 $quick "${shared[@]}" parallel.context=ring
row "quickstart, fast, cp $r, ring" fast f3 $quick "${shared[@]}" parallel.context=ring
row "quickstart, fast, dp $r ep $r" fast f1 $quick "parallel.dp=$r" "parallel.ep=$r"
row "killed in a step: exit 20, resumed bits" struck KILL 20
row "stopped: exit 21, resumed bits" struck STOP 21
row "killed in a save: exit 20, resumed bits" struck_in_save
steps=${CHECK_SLICE_STEPS:-50}
row "2-layer Qwen3-30B-A3B, exact, dp $r ep 1" exact s1 $quick "${slice[@]}" "parallel.dp=$r" \
  parallel.ep=1
row "2-layer Qwen3-30B-A3B, exact, dp $r ep $r" exact s2 $quick "${slice[@]}" "parallel.dp=$r" \
  "parallel.ep=$r"
row "2-layer Qwen3-30B-A3B, exact, dp $r ep 1, no accumulation" exact s7 $quick "${slice[@]}" \
  "parallel.dp=$r" parallel.ep=1 "train.micro_batch_sequences=$((4 / r))"
row "2-layer Qwen3-30B-A3B, exact, dp $r ep $r, no accumulation" exact s8 $quick "${slice[@]}" \
  "parallel.dp=$r" "parallel.ep=$r" "train.micro_batch_sequences=$((4 / r))"
row "2-layer Qwen3-30B-A3B, exact, pp $r" exact s3 $quick "${slice[@]}" "parallel.pp=$r" \
  parallel.dp=1 parallel.ep=1
row "2-layer Qwen3-30B-A3B, exact, cp $r ep $r" exact s6 $quick "${slice[@]}" "parallel.cp=$r" \
  parallel.dp=1 "parallel.ep=$r" "train.sequence_length=$((256 * r))"
row "2-layer Qwen3-30B-A3B, fast, dp $r ep $r" fast s4 $quick "${slice[@]}" "parallel.dp=$r" \
  "parallel.ep=$r"
row "2-layer Qwen3-30B-A3B, fast, cp $r ep $r" fast s5 $quick "${slice[@]}" "parallel.cp=$r" \
  parallel.dp=1 "parallel.ep=$r" "train.sequence_length=$((256 * r))"
steps=${CHECK_SCALING_STEPS:-15}
row "scaling: 4-layer slice, 4 x 4096 tokens a GPU" scaling w1 $quick 4 model.preset=qwen3-30b-a3b \
  model.layers=4 model.vocab=512 train.sequence_length=4096 train.micro_batch_sequences=4 \
  train.eval_every_steps=0 checkpoint.every_steps=0
rm -f "$bin/predictions.txt"
row "8 steps predicted, then run" predictions
row "timeline of a step, dp $r ep $r" timeline
echo
printf '%s\n' "${table[@]}"
exit $failed
