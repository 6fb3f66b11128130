#!/usr/bin/env bash
# .ate/run COMMAND...: runs a training command and logs its stamps under .ate/runs, for the measures
# Active GPU Time, GPU busy time and CPU-simulated time. ATE_DEVICE=gpu|cpu; else gpu where
# nvidia-smi lists one. Utilization is NVML's, as nvidia-smi prints it once a second.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
device=${ATE_DEVICE:-cpu}
if [ -z "${ATE_DEVICE:-}" ] && nvidia-smi -L >/dev/null 2>&1; then device=gpu; fi
log=$(mktemp "$root/runs/run-XXXXXX.log")
echo "start $(date +%s.%N) $device" >>"$log"
sampler=
if [ "$device" = gpu ]; then
  nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -l 1 >"$log.busy" &
  sampler=$!
fi
"$@"
code=$?
if [ -n "$sampler" ]; then
  kill "$sampler"
  gpus=$(nvidia-smi -L | wc -l)
  awk -v gpus="$gpus" '{sum += $1 / 100} END {print "busy", sum / gpus}' "$log.busy" >>"$log"
  rm -f "$log.busy"
fi
echo "exit $(date +%s.%N) $code" >>"$log"
exit "$code"
