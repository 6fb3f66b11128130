#!/usr/bin/env bash
# check.sh [CONFIG [MACHINE [BIN]]]: PASS when the plan names three ops with their time, and the
# table of a profile is read.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
config=${1:-configs/quickstart.toml} machine=${2:-laptop} bin=${3:-build/cpu}
plan=$("$bin/cambium" plan "$config" --machine "$machine" --json) || {
  echo "FAIL: cambium plan, exit $?"
  exit 1
}
python3 - "$plan" <<'P' || { echo "FAIL: the plan names no ops"; exit 1; }
import json, sys
ops = json.loads(sys.argv[1].splitlines()[-1])["ops"]
total = sum(op["time_ns"] for op in ops)
assert len(ops) >= 3 and ops[2]["time_ns"] > 0
for op in ops[:3]:
    print(f"{100 * op['time_ns'] / total:5.1f} %  {op['calls']:6} calls  {op['op']}")
P
table=$(mktemp)
trap 'rm -f "$table"' EXIT
printf '%s\n' 'Time (%),Total Time (ns),Instances,Avg (ns),Name' '10.0,100,4,25,"b<1, 2>"' \
  '90.0,900,3,300,a' >"$table"
top=$(python3 .agents/skills/profile-a-step/top_kernels.py "$table" 1)
[ "$top" = " 90.0 %       3 calls  a" ] || { echo "FAIL: top_kernels.py says '$top'"; exit 1; }
echo "PASS: $config on $machine"
