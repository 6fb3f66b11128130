#!/usr/bin/env bash
# plan_check.sh [BIN [FILE]]: calibrates this machine (a GPU where there is one) into FILE, then
# compares its predictions with a dozen steps that it was not fitted to.
#
# BIN holds `cambium` (default: build/cuda), FILE is the machine file (default: machine.toml). It
# takes a few minutes, and ends with 51 when the mean error of the step times is above 5 %, or when
# a byte of memory differs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${1:-build/cuda}
file=${2:-machine.toml}
time "$bin/cambium" calibrate --out "$file"
"$bin/cambium" calibrate --check "$file"
