#!/usr/bin/env bash
# .ate/run COMMAND...: runs a training command and logs its stamps under .ate/runs, for the measures
# Active GPU Time, GPU busy time and CPU-simulated time. ATE_DEVICE=gpu|cpu; else gpu where
# nvidia-smi lists one. Utilization is NVML's, as nvidia-smi prints it once a second; the mean over
# samples and GPUs times the run's seconds is its busy time. A stopped run (SIGTERM) has its stamps too.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
device=${ATE_DEVICE:-cpu}
if [ -z "${ATE_DEVICE:-}" ] && nvidia-smi -L >/dev/null 2>&1; then device=gpu; fi
log=$(mktemp "$root/runs/run-XXXXXX.log")
sampler=
if [ "$device" = gpu ]; then
  nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -l 1 >"$log.busy" &
  sampler=$!
fi
start=$(date +%s.%N)
echo "start $start $device" >>"$log"
"$@" <&0 &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
end=$(date +%s.%N)
if [ -n "$sampler" ]; then
  kill "$sampler"
  awk -v seconds="$(echo "$start $end" | awk '{print $2 - $1}')" \
    '{sum += $1 / 100} END {if (NR > 0) print "busy", sum / NR * seconds}' "$log.busy" >>"$log"
  rm -f "$log.busy"
fi
echo "exit $end $code" >>"$log"
exit "$code"
