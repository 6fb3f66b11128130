#!/usr/bin/env bash
# demo.sh: from a clean clone to a trained model, a text sample and a report, in one command.
#
# Installs what is missing and prepares the corpus (setup.sh), builds the `cambium` binary, trains
# configs/quickstart.toml on 8 simulated ranks, and says what to look at and what to try next.
set -euo pipefail
export LC_ALL=C.UTF-8
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1  # clones of the same sources share compilations

if [ $# -gt 0 ]; then
  echo "usage: scripts/demo.sh   (no options; see README.md)"
  [ "$1" = "--help" ] && exit 0 || exit 2
fi

bash scripts/setup.sh </dev/null
if [ ! -f build/cpu/build.ninja ]; then
  cmake --preset cpu </dev/null
fi
cmake --build --preset cpu --target cambium </dev/null

run="runs/demo-$(date -u +%Y%m%d-%H%M%S)"
build/cpu/cambium train configs/quickstart.toml --out "$run" </dev/null

cat <<TEXT

The run is in $run:
  $run/samples.txt     text that the model wrote
  $run/report.html     loss, learning rate, expert load: open it in a browser

Try next:
  build/cpu/cambium generate $run --prompt "It is a truth"
  build/cpu/cambium check configs/quickstart.toml
  build/cpu/cambium train configs/quickstart.toml --set parallel.dp=4 --set parallel.ep=2
TEXT
