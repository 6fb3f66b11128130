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

# hidden_test SOURCES...: builds .ate/grade/hidden_test.cpp with these files of the tree and
# cambium_base alone, and runs it: it prints the CHECK lines. What does not compile fails them all.
hidden_test() {
  local source
  {
    echo 'add_executable(ate_hidden .ate/grade/hidden_test.cpp)'
    echo 'target_link_libraries(ate_hidden PRIVATE cambium_base)'
    for source in "$@"; do
      if [ -f "$source" ]; then echo "target_sources(ate_hidden PRIVATE $source)"; fi
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
train_tiny() {
  local out=$1 set sets=()
  shift
  for set in "$@"; do sets+=(--set "$set"); done
  rm -rf "$out"
  build/cpu/cambium train configs/tiny.toml --out "$out" --set train.steps=30 \
    --set train.sample_tokens=0 --set schedule.kind=constant --set schedule.warmup_steps=0 \
    "${sets[@]}" >"$out.log" 2>&1 || { tail -3 "$out.log"; return 1; }
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

# trainer SET...: checks `trainer` (one rank takes the keys, and learns) and `layout` (two ranks that
# share the experts end every step with its bits).
trainer() {
  trainer_binary
  check trainer "30 steps" bash -c '. .ate/grade_tools.sh && train_tiny .ate/one "$@" &&
    loss_falls' trainer "$@"
  check layout "dp 2, ep 2" bash -c '. .ate/grade_tools.sh &&
    train_tiny .ate/two parallel.dp=2 parallel.ep=2 "$@" &&
    cmp .ate/one/digests.jsonl .ate/two/digests.jsonl' trainer "$@"
}
