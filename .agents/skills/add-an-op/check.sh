#!/usr/bin/env bash
# check.sh OP [BIN]: PASS when the op has every companion and its parity tests pass. BIN holds
# test_ops (default: build/cpu).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
op=${1:?check.sh OP [BIN]} bin=${2:-build/cpu}
fail() {
  echo "FAIL: $1"
  exit 1
}
for file in "kernels/$op.h" "reference/$op.cc" "tests/ops/${op}_cases.h" "tests/ops/${op}_parity.cc" \
  "bench/ops/${op}_bench.cc"; do
  [ -f "$file" ] || fail "$file is missing"
done
grep -q "cambium_op($op[ )]" kernels/ops.cmake || fail "kernels/ops.cmake has no line for $op"
[ -f "kernels/$op.cu" ] || grep -q "op($op .*CPU_ONLY" kernels/ops.cmake ||
  fail "kernels/$op.cu is missing and kernels/ops.cmake does not say CPU_ONLY"
grep -q "MustFail" "tests/ops/${op}_parity.cc" || fail "no case that must fail"
[ -x "$bin/test_ops" ] || fail "no $bin/test_ops; next: cmake --build --preset cpu --target test_ops"
suite=$(sed -n 's/^TEST(\([A-Za-z]*\),.*/\1/p' "tests/ops/${op}_parity.cc" | sort -u | paste -sd: |
  sed 's/:/.*:/g;s/$/.*/')
"$bin/test_ops" --gtest_brief=1 --gtest_filter="$suite" || fail "the tests of $suite"
echo "PASS: $op"
