#!/bin/bash
# The communicator conformance suite on NCCL, one process per GPU, for 1, 2, 4 and 8 GPUs of a host.
#
#   scripts/gpu_comm_check.sh [BIN [LARGEST_BYTES]]
#
# BIN holds `test_comm` (default: build/cuda). Every case of tests/comm/conformance.cc runs: all
# seven calls, fp32, bf16 and integers, counts from 0 on, ranks without tokens, subgroups, several
# streams; then large ones up to LARGEST_BYTES per rank (default 1 GiB). Ends with a table and exit
# 0, 1, or 77 where there is no GPU. NCCL_NVLS_ENABLE is left as it is set.
set -u
bin=${1:-build/cuda}
largest=${2:-$((1 << 30))}

gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | grep -c .)
if [ "$gpus" -eq 0 ]; then
  echo "skipped: no GPU"
  exit 77
fi
nvidia-smi --query-gpu=index,name,driver_version --format=csv,noheader

rows=()
status=0
for ranks in 1 2 4 8; do
  if [ "$ranks" -gt "$gpus" ]; then
    rows+=("$ranks ranks: not run, $gpus GPUs")
    continue
  fi
  begin=$(date +%s)
  if CAMBIUM_COMM_RANKS=$ranks CAMBIUM_COMM_BYTES=$largest "$bin/test_comm" \
    --gtest_filter='NcclConformance.*' --gtest_brief=1; then
    verdict=pass
  else
    verdict=FAIL
    status=1
  fi
  rows+=("$ranks ranks: $verdict in $(($(date +%s) - begin)) s")
done

printf '\n'
printf '%s\n' "${rows[@]}"
exit "$status"
