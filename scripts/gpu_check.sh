#!/usr/bin/env bash
# gpu_check.sh [BIN [GOLDEN_DIR...]]: every property that needs a GPU, from built binaries alone.
#
# BIN holds `cambium` and, for parity, `test_ops` and `test_train` (default: build/cuda). It checks
# that the kernels and whole models agree with their references, that 3 runs of 50 steps have the
# same bits, that CUDA graphs have those of launches, that exact mode has the bits of one rank in
# layouts of 2 to 8 virtual ranks, that layouts that share sequences repeat theirs and stay near one
# rank, that losses follow the CPU's in bf16, and each golden directory in bf16. CHECK_SANITIZER=1
# adds small shapes under compute-sanitizer, minutes. It ends in a table, and with 1 when a row
# failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${1:-build/cuda}
[ $# -gt 0 ] && shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table=()
failed=0

# row NAME COMMAND...: a row of the table; the command's output is shown when it fails. CHECK_ROWS, a
# regular expression, picks rows.
row() {
  local name=$1 begin=$EPOCHREALTIME status=0 verdict=ok
  shift
  [[ $name =~ ${CHECK_ROWS:-.} ]] || return 0
  "$@" >"$work/log" 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then
    verdict="FAIL (exit $status)"
    failed=1
    echo "== $name: exit $status"
    tail -n 40 "$work/log"
  elif grep -q 'skipped: no GPU' "$work/log"; then
    verdict='skipped: no GPU'
  fi
  table+=("$(printf '%-44s %-16s %7.1f s  %s' "$name" "$verdict" \
    "$(awk "BEGIN{print $EPOCHREALTIME - $begin}")" "$(tail -n 1 "$work/log" | cut -c1-90)")")
}

# A corpus of its own: words drawn by a fixed rule, so that nothing has to be prepared.
awk 'function draw() { seed = seed * 16807 % 2147483647; return seed / 2147483647 }
  BEGIN { seed = 7; for (i = 0; i < 60000; i++) {
  word = ""; n = 2 + int(5 * draw());
  for (j = 0; j < n; j++) word = word substr("etaoinshrdlu", 1 + int(12 * draw() * draw()), 1);
  printf "%s%s", word, i % 12 == 11 ? ".\n" : " " } }' >"$work/corpus.txt"

train() {  # train NAME CONFIG STEPS [SET...]
  local name=$1 config=$2 steps=$3 sets=()
  shift 3
  for assignment in "$@"; do sets+=(--set "$assignment"); done
  "$bin/cambium" train "$config" --out "$work/$name" --set "data.train=[\"$work/corpus.txt\"]" \
    --set data.tokenizer=bytes --set data.tokenizer_vocab=0 --set "train.steps=$steps" \
    --set train.sample_tokens=0 --set numerics.compute=bf16 "${sets[@]}"
}

repeats() {
  for run in a b c; do
    train "repeat-$run" configs/tiny.toml 50 run.device=cuda numerics.reduction=fast || return
  done
  "$bin/cambium" compare "$work/repeat-a" "$work/repeat-b" &&
    "$bin/cambium" compare "$work/repeat-a" "$work/repeat-c"
}

# CUDA graphs of launches that repeat, against launches one by one, in both modes.
graphs() {
  for reduction in fast exact; do
    for graph in true false; do
      train "graphs-$graph" configs/quickstart.toml 30 run.device=cuda parallel.dp=1 parallel.ep=1 \
        numerics.reduction=$reduction run.cuda_graphs=$graph || return
    done
    "$bin/cambium" compare "$work/graphs-true" "$work/graphs-false" || return
    rm -rf "$work"/graphs-*
  done
}

# pp dp ep sharding schedule
layouts="1 2 1 none 1f1b;1 2 2 zero1 1f1b;1 4 2 zero1 1f1b;1 4 4 none 1f1b;1 8 4 zero1 1f1b
  1 8 1 zero1 1f1b;1 8 8 none 1f1b;1 2 1 zero2 1f1b;1 4 2 zero2 1f1b;1 8 4 zero2 1f1b
  1 2 2 full 1f1b;1 4 1 full 1f1b;1 8 4 full 1f1b;2 1 1 zero1 gpipe;2 1 1 none 1f1b
  2 2 2 zero1 1f1b;4 1 1 zero1 1f1b;4 2 1 full 1f1b;2 2 1 zero2 zb_h1;2 1 1 zero1 zb_v
  2 2 2 full dualpipev;2 4 2 zero1 interleaved_1f1b;4 1 1 zero1 zb_h1;4 2 2 zero1 gpipe"

layout() {  # layout NAME PP DP EP SHARDING SCHEDULE [SET...]
  train "$1" configs/tiny.toml 8 run.device=cuda numerics.reduction=exact model.layers=4 \
    model.experts=8 parallel.pp="$2" parallel.dp="$3" parallel.ep="$4" \
    parallel.sharding="$5" parallel.schedule="$6" "${@:7}"
}

layouts() {
  layout one 1 1 1 none 1f1b || return
  local count=0
  while read -r pp dp ep sharding schedule; do
    layout many "$pp" "$dp" "$ep" "$sharding" "$schedule" &&
      "$bin/cambium" compare "$work/one" "$work/many" ||
      { echo "layout: pp $pp dp $dp ep $ep $sharding $schedule" && return 1; }
    rm -rf "$work/many"
    count=$((count + 1))
  done < <(tr ';' '\n' <<<"$layouts")
  echo "$count layouts of 2 to 8 virtual ranks have the bits of one"
}

# A gated shared expert, with parts of the layer computed again or not.
shared_expert() {
  local shared=(model.shared_expert_hidden=48 model.shared_expert_gate=true)
  layout shared-one 1 1 1 none 1f1b "${shared[@]}" || return
  for recompute in recompute.norms=true recompute.attention=true recompute.mode=full_layer; do
    layout shared-many 2 2 2 zero1 dualpipev "${shared[@]}" "$recompute" &&
      "$bin/cambium" compare "$work/shared-one" "$work/shared-many" || { echo "$recompute"; return 1; }
    rm -rf "$work/shared-many"
  done
}

# pp dp cp ep sharding schedule
contexts="1 1 2 1 none 1f1b;1 2 2 1 zero1 1f1b;1 1 4 1 full 1f1b;1 1 2 2 zero2 1f1b
  2 1 2 1 zero1 gpipe;2 2 2 4 full dualpipev"

# Every expert chosen, as in the last row of losses that follow the CPU's.
context() {  # context NAME DEVICE PP DP CP EP SHARDING SCHEDULE [SET...]
  train "$1" configs/tiny.toml 6 run.device="$2" numerics.reduction=fast model.layers=4 \
    model.experts=8 model.top_k=8 model.max_positions=1024 train.sequence_length=1024 \
    numerics.block_tokens=128 train.eval_every_steps=0 parallel.pp="$3" parallel.dp="$4" \
    parallel.cp="$5" parallel.ep="$6" parallel.sharding="$7" parallel.schedule="$8" "${@:9}"
}

exact_contexts() {
  local exact=(numerics.reduction=exact model.top_k=2 data.document_mask=true) count=0
  context exact-one cuda 1 1 1 1 none 1f1b "${exact[@]}" || return
  while read -r pp dp cp ep sharding schedule; do
    for exchange in all_gather ring; do
      context many cuda "$pp" "$dp" "$cp" "$ep" "$sharding" "$schedule" "${exact[@]}" \
        parallel.context=$exchange && "$bin/cambium" compare "$work/exact-one" "$work/many" ||
        { echo "pp $pp dp $dp cp $cp ep $ep $sharding $schedule $exchange" && return 1; }
      rm -rf "$work/many"
      count=$((count + 1))
    done
  done < <(tr ';' '\n' <<<"$contexts")
  echo "$count layouts have the bits of one rank"
}

contexts() {
  context whole cuda 1 1 1 1 none 1f1b && context whole-cpu cpu 1 1 1 1 none 1f1b || return
  local count=0 worst=0 layout exchange
  while read -r layout; do
    for exchange in all_gather ring; do
      one_context "$exchange" $layout || { echo "pp dp cp ep: $layout $exchange"; return 1; }
      count=$((count + 1))
    done
  done < <(tr ';' '\n' <<<"$contexts")
  echo "$count layouts repeat their bits; losses differ by at most $worst from one rank and the CPU"
}

one_context() {  # one_context EXCHANGE LAYOUT...: run twice, and near one rank; raises `worst`
  local exchange=$1 other found
  shift
  for run in shared again; do context $run cuda "$@" parallel.context="$exchange" || return; done
  "$bin/cambium" compare "$work/shared" "$work/again" || return
  for other in whole whole-cpu; do
    found=$(paste <(losses $other) <(losses shared) | awk '{ gap = ($1 - $2) / $1
      if (gap < 0) gap = -gap; if (gap > worst) worst = gap }
      END { printf "%.1e", NR == 6 ? worst : 1 }')
    awk "BEGIN{exit !($found < 5e-4)}" || { echo "$found from $other"; return 1; }
    worst=$(awk "BEGIN{print ($found > $worst) ? $found : $worst}")
  done
  rm -rf "$work/shared" "$work/again"
}

losses() { grep -o '"loss":[0-9.e+-]*' "$work/$1/metrics.jsonl" | cut -d: -f2; }

# Losses of the GPU against the CPU's in bf16 after equal initial weights, the CPU's blocks as long
# as the GPU's tiles. Every expert chosen: the first 5 steps one by one; the CPU alone, its blocks
# cut otherwise, moves by 1e-4. With routing as configured the first step, before other roundings
# send tokens to other experts (then the CPU alone moves by 2e-3 within 3 steps), and later steps
# in the mean.
follows_cpu() {  # follows_cpu CONFIG STEPS_ONE_BY_ONE BAR [SET...]
  local config=$1 steps=$2 bar=$3
  shift 3
  set -- numerics.reduction=fast parallel.dp=1 parallel.ep=1 numerics.block_tokens=128 \
    train.sequence_length=128 model.max_positions=128 "$@"
  train cpu "$config" 30 run.device=cpu "$@" && train gpu "$config" 30 run.device=cuda "$@" ||
    return
  paste <(losses cpu) <(losses gpu) | awk -v steps="$steps" -v bar="$bar" '
    { gap = ($1 - $2) / $1; if (gap < 0) gap = -gap; n++
      if (n <= steps && gap > first) first = gap
      if (n > 20) { cpu += $1; gpu += $2 } }
    END { mean = gpu / cpu - 1; printf "relative difference: first %d at most %.1e, mean of the " \
            "last 10 %.1e (%.4f, %.4f)\n", steps, first, mean, cpu / 10, gpu / 10;
          exit !(n == 30 && first < bar && mean < 2e-2 && mean > -2e-2) }'
  local status=$?
  rm -rf "$work/cpu" "$work/gpu"
  return $status
}

row doctor "$bin/cambium" doctor
[ -x "$bin/test_ops" ] && row "kernels against their references" \
  "$bin/test_ops" --gtest_brief=1 "--gtest_filter=*Cuda*"
[ -x "$bin/test_train" ] && row "gradients of whole models" \
  "$bin/test_train" --gtest_brief=1 "--gtest_filter=*Cuda*"
row "3 runs of 50 steps, same bits" repeats
row "CUDA graphs have the bits of launches" graphs
row "exact: layouts of 2 to 8 virtual ranks" layouts
row "exact: shared expert, recomputation" shared_expert
row "exact: shared sequences on 2 to 8 virtual ranks" exact_contexts
row "fast: shared sequences on 2 to 8 virtual ranks" contexts
row "tiny: losses follow the CPU's in bf16" follows_cpu configs/tiny.toml 1 1e-4
row "quickstart: losses follow the CPU's in bf16" follows_cpu configs/quickstart.toml 1 1e-4
row "quickstart with every expert chosen" follows_cpu configs/quickstart.toml 5 5e-4 model.top_k=8
row "check, schedules explored" "$bin/cambium" check configs/tiny.toml --seeds 2 \
  --set run.device=cuda --set numerics.compute=bf16 --set parallel.dp=4 --set parallel.ep=2
small='Combine.Cuda*:RoutingSort.Cuda*:RouterTopk.Cuda*:LeafFold.Cuda*:RmsNorm.Cuda*:QkNormRope.Cuda*:Embedding.Cuda*'
small+=':BalanceLoss.Cuda*:Swiglu.Cuda*:GradNorm.Cuda*:GroupedGemm.CudaRunsHaveTheSameBits:LaunchGraphs.Cuda*'
if [ -n "${CHECK_SANITIZER:-}" ]; then
  for tool in memcheck racecheck initcheck; do
    row "compute-sanitizer $tool" compute-sanitizer --tool $tool --error-exitcode 1 \
      "$bin/test_ops" --gtest_brief=1 "--gtest_filter=$small"
  done
fi
for golden in "$@"; do
  row "parity $(basename "$golden")" "$bin/cambium" parity "$golden" --device cuda
done
echo
printf '%s\n' "${table[@]}"
exit $failed
