#!/usr/bin/env bash
# corpus.sh [BUILD]: fifteen bugs of distributed trainers, each found within its seeds (at most 1,000;
# four for mutants of the trainer), and what is correct clean in all 1,000. BUILD is build/cpu. Ten
# minutes on two cores are a failure. The commit tier runs a sample (Corpus.* of the same tests).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --help ]; then
  echo "usage: scripts/corpus.sh [BUILD]"
  exit 0
fi
build=${1:-build/cpu}
started=$SECONDS
for tests in test_sim test_cli; do
  "$build/$tests" --gtest_also_run_disabled_tests --gtest_filter='Corpus.*' --gtest_brief=1
done
echo "corpus.sh: $((SECONDS - started)) s"
[ $((SECONDS - started)) -lt 600 ]
