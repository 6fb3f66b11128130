#!/usr/bin/env bash
# compare_builds.sh OLD NEW CONFIG [STEPS]: trains CONFIG for STEPS (3) with both binaries and
# compares. PASS, or FAIL with the first differing step and tensor (exit 51). Fit for `git bisect run`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
old=$(realpath "$1") new=$(realpath "$2") config=$3 steps=${4:-3}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# A corpus of its own, so that nothing has to be prepared.
for i in $(seq 400); do echo "Line $i of a small corpus, $((i % 7)) words long."; done >"$out/text.txt"
for side in old new; do
  "${!side}" train "$config" --out "$out/$side" --set "data.train=$out/text.txt" \
    --set "train.steps=$steps" --set train.sample_tokens=0 >"$out/$side.log" 2>&1 || {
    code=$?
    tail -5 "$out/$side.log"
    echo "FAIL: the $side build does not train, exit $code"
    exit "$code"
  }
done
"$new" compare "$out/old" "$out/new" || {
  code=$?
  echo "FAIL: exit $code"
  exit "$code"
}
echo "PASS: same bits in $steps steps"
