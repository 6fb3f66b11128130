#!/usr/bin/env bash
# check.sh [CONFIG [BIN]]: PASS when the configuration has one rank's bits on two ranks that share
# its experts, without races, in explored schedules.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
config=${1:-configs/tiny.toml} bin=${2:-build/cpu}
if "$bin/cambium" check "$config" --seeds 2 --set parallel.dp=2 --set parallel.ep=2; then
  echo "PASS: $config"
else
  code=$?
  echo "FAIL: exit $code; the REPRO line repeats it with as little as possible"
  exit "$code"
fi
