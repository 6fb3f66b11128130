# Sourced by graders (`. .ate/grade_tools.sh`), in the grading copy. A grader prints one line
# `CHECK name PASS|FAIL detail` for each check and exits 0 when it ran to its end.
export LC_ALL=C.UTF-8

# check NAME DETAIL COMMAND...: runs the command; its exit status is the verdict.
check() {
  local name=$1 detail=$2
  shift 2
  if "$@" >.ate/check.log 2>&1; then
    echo "CHECK $name PASS $detail"
  else
    sed 's/^/  /' .ate/check.log | tail -20
    echo "CHECK $name FAIL $detail"
  fi
}

# cambium_binary: the path of a `cambium` built from this tree. Tasks whose read-only paths cover
# all sources may use one built before (ATE_CAMBIUM): it is the same program.
cambium_binary() {
  if [ -x "${ATE_CAMBIUM:-}" ]; then
    echo "$ATE_CAMBIUM"
  else
    cmake --preset cpu >.ate/build.log 2>&1 &&
      cmake --build --preset cpu --target cambium >>.ate/build.log 2>&1 &&
      echo "$PWD/build/cpu/cambium"
  fi
}

# hidden_test SOURCE|LIBRARY...: builds .ate/grade/hidden_test.cpp with these files of the tree, or
# its libraries, and cambium_base, and runs it: it prints CHECK lines. What does not compile fails
# them all.
hidden_test() {
  local part
  {
    echo 'add_executable(ate_hidden .ate/grade/hidden_test.cpp)'
    echo 'target_link_libraries(ate_hidden PRIVATE cambium_base)'
    for part in "$@"; do
      case "$part" in
        *.cc) if [ -f "$part" ]; then echo "target_sources(ate_hidden PRIVATE $part)"; fi ;;
        *) echo "target_link_libraries(ate_hidden PRIVATE $part)" ;;
      esac
    done
  } >>CMakeLists.txt
  if cmake --preset cpu >.ate/build.log 2>&1 &&
    cmake --build --preset cpu --target ate_hidden >>.ate/build.log 2>&1; then
    timeout 120 build/cpu/ate_hidden
  else
    tail -30 .ate/build.log
    return 0
  fi
}

# trainer_binary: a `cambium` built from this tree in build/cpu; unchanged files come from ccache.
trainer_binary() {
  cmake --preset cpu >.ate/trainer.log 2>&1 &&
    cmake --build --preset cpu --target cambium >>.ate/trainer.log 2>&1 || tail -30 .ate/trainer.log >&2
}

# train_tiny OUT SET...: 30 steps of configs/tiny.toml, or what the keys say, with the built binary.
# A SET that begins with -- is an option; with --resume the run directory stays.
train_tiny() {
  local out=$1 set sets=()
  shift
  for set in "$@"; do
    case "$set" in
      --*=*) sets+=("${set%%=*}" "${set#*=}") ;;
      --*) sets+=("$set") ;;
      *) sets+=(--set "$set") ;;
    esac
  done
  case " $* " in *" --resume "*) ;; *) rm -rf "$out" ;; esac
  build/cpu/cambium train configs/tiny.toml --out "$out" --set train.steps=30 \
    --set train.sample_tokens=0 --set schedule.kind=constant --set schedule.warmup_steps=0 \
    "${sets[@]}" >"$out.log" 2>&1 || { echo "exit $?" >>"$out.log"; tail -3 "$out.log"; return 1; }
}

# same_digests A B: every step of two runs ends with the same bits, and there are steps.
same_digests() { [ "$(wc -l <"$1/digests.jsonl")" -gt 1 ] && cmp "$1/digests.jsonl" "$2/digests.jsonl"; }

# refuses KEY SET...: the trainer ends with 2 before it writes anything, and its message names KEY.
refuses() {
  local key=$1
  shift
  if train_tiny .ate/refused "$@"; then return 1; fi
  [ ! -e .ate/refused ] && grep -qx 'exit 2' .ate/refused.log && grep -qF "$key" .ate/refused.log
}

# refuses_export KEY: so does the export of .ate/one to Hugging Face.
refuses_export() {
  local status=0
  build/cpu/cambium checkpoint export-hf .ate/one .ate/hf >.ate/export.log 2>&1 || status=$?
  [ "$status" = 2 ] && [ ! -e .ate/hf/model.safetensors ] && grep -qF "$1" .ate/export.log
}

# The loss of .ate/one falls over its 30 steps, by the mean of the last five.
loss_falls() {
  python3 - <<'P'
import json
rows = [json.loads(line) for line in open(".ate/one/metrics.jsonl")]
loss = [row["loss"] for row in rows if "loss" in row]
assert len(loss) == 30 and sum(loss[-5:]) / 5 < 0.97 * loss[0], loss
P
}

# trainer SET...: checks `trainer` (one rank takes the keys, and learns) and `layout` (ranks that
# share the experts, then stages and sequences, end every step with its bits).
trainer() {
  trainer_binary
  check trainer "30 steps" bash -c '. .ate/grade_tools.sh && train_tiny .ate/one "$@" &&
    loss_falls' trainer "$@"
  check layout "dp 2, ep 2; pp 2, cp 2" bash -c '. .ate/grade_tools.sh &&
    train_tiny .ate/two parallel.dp=2 parallel.ep=2 "$@" && same_digests .ate/one .ate/two &&
    train_tiny .ate/four parallel.pp=2 parallel.cp=2 "$@" && same_digests .ate/one .ate/four' \
    trainer "$@"
}

# slope SET...: check `slope`, finite differences through the trainer. AdamW with epsilon 1 and a
# clip of 0.001 is a step of lr / 1000 along the gradient: over two steps with one batch the loss
# falls by that times the reported norm (measured: to 5e-4), and every tensor moves. All experts are
# chosen, since a token that changes its experts is a jump; weights are large, so that router and
# attention have their part of the gradient.
slope() {
  head -c 513 data/quickstart.txt >.ate/batch.txt
  check slope "loss against grad_norm" bash -c '. .ate/grade_tools.sh &&
    train_tiny .ate/slope data.train="[\".ate/batch.txt\"]" data.document_mask=false \
      data.validation="[\".ate/batch.txt\"]" train.steps=2 optimizer.lr=0.3 optimizer.epsilon=1 \
      optimizer.clip=0.001 optimizer.weight_decay=0 balance.loss=none model.init_std=0.3 \
      model.top_k=4 "$@" && slope_is_norm' slope "$@"
}
slope_is_norm() {
  python3 - <<'P'
import json
rows = [json.loads(line) for line in open(".ate/slope/metrics.jsonl")]
first, second = [row for row in rows if "loss" in row]
ratio = (first["loss"] - second["loss"]) / 3e-4 / first["grad_norm"]
digests = [json.loads(line) for line in open(".ate/slope/digests.jsonl")]
before, after = [next(v for v in row.values() if isinstance(v, dict)) for row in digests[:2]]
still = [name for name in before if before[name] == after[name]]
assert abs(ratio - 1) < 0.002 and before and not still, (ratio, still)
P
}
