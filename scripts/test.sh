#!/usr/bin/env bash
# test.sh [--full]: set-up and tests. Exit 0 only when everything that ran passed.
#
# Without options: the commit tier. The cpu preset, its tests and tidy, and the source format.
# --full: also the cuda preset with its GPU tests, the sanitizer presets, ATE-Bench and the small
# twins of all examples; what .ci/run calls.
# Whatever is left out is printed as `skipped: why`; with CI=true a missing toolkit is a failure.
set -euo pipefail
export LC_ALL=C.UTF-8
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1  # clones of the same sources share compilations
exec </dev/null

full=no
for argument in "$@"; do
  case "$argument" in
    --full) full=yes ;;
    --help) echo "usage: scripts/test.sh [--full]"; exit 0 ;;
    *) echo "scripts/test.sh: unknown option '$argument' (there is --full)" >&2; exit 2 ;;
  esac
done

jobs=$(nproc)
failures=()
skips=()
started=$SECONDS

# stage NAME COMMAND...: runs it, prints how long it took, and notes a failure without stopping.
stage() {
  local name=$1 begin=$SECONDS status=0
  shift
  echo "== $name"
  "$@" || status=$?
  echo "== $name: exit $status after $((SECONDS - begin)) s"
  if [ "$status" -ne 0 ]; then failures+=("$name"); fi
}

skip() {
  echo "skipped: $1"
  skips+=("$1")
}

build() {  # build PRESET [TARGET...]
  local preset=$1
  shift
  if [ ! -f "build/$preset/build.ninja" ]; then cmake --preset "$preset" || return 1; fi
  cmake --build --preset "$preset" ${1:+--target "$@"}
}

check_format() {
  find src kernels reference sim tests bench ate_bench -name '*.cc' -o -name '*.h' -o -name '*.cu' |
    xargs clang-format --dry-run -Werror
}

cpu_tests() { build cpu && ctest --preset cpu -j "$jobs"; }

# Versions of clang-format differ in what they call formatted: 14 (Debian 12) is this tree's.
format_version() { clang-format --version 2>/dev/null | sed -n 's/.* version \([0-9]*\)\..*/\1/p'; }

cuda_release() {  # 13 for CUDA 13.0; nothing without nvcc
  nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p'
}

cuda_tests() { build cuda cambium test_ops test_comm && ctest --preset cuda -R '^gpu' -V; }

cuda_stage() {
  local release
  if [ -d /usr/local/cuda/bin ]; then export PATH="$PATH:/usr/local/cuda/bin"; fi
  release=$(cuda_release || true)
  if [ "${release:-0}" -ge 13 ]; then
    stage "cuda" cuda_tests
    if ! nvidia-smi -L >/dev/null 2>&1; then skip "no GPU"; fi
  elif [ "${CI:-}" = true ]; then
    echo "no CUDA toolkit (nvcc >= 13), which CI=true requires"
    failures+=("cuda toolkit")
  else
    skip "no CUDA toolkit"
  fi
}

# Every grader of ATE-Bench against its solutions; the copies compile through ccache.
ate_proofs() {
  local out status=0
  out=$(mktemp -d)
  ATE_CAMBIUM=$PWD/build/cpu/cambium build/cpu/ate prove --out "$out" || status=$?
  rm -rf "$out"
  return "$status"
}

# The small twin of every example for several hosts (tests/cli/examples_test.cc does the others).
example_twins() {
  local config
  for config in configs/*-2x8.toml configs/*-8x8.toml; do
    build/cpu/cambium check "$config" || return 1
  done
}

sanitizer_tests() { build "$1" "small_$1" && ctest --preset "$1"; }

bash scripts/setup.sh
format_found=$(format_version || true)
if [ "$format_found" = 14 ]; then
  stage "format" check_format
else
  skip "format: clang-format 14 is needed, found ${format_found:-none}"
fi
if [ "$full" = yes ]; then
  cuda_stage
  stage "asan" sanitizer_tests asan
  stage "tsan" sanitizer_tests tsan
fi
stage "cpu" cpu_tests
if [ "$full" = yes ]; then
  stage "examples" example_twins
  stage "ate" ate_proofs
fi

for reason in ${skips[@]+"${skips[@]}"}; do echo "skipped: $reason"; done
for name in ${failures[@]+"${failures[@]}"}; do echo "failed: $name"; done
echo "test.sh: $((SECONDS - started)) s, ${#failures[@]} stages failed"
[ ${#failures[@]} -eq 0 ]
