here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python3 "$here/../../corpus.py"
. "$here/../../solution_tools.sh" >/dev/null 2>&1
set -- --set train.steps=8 --set run.seed=5
"$CAMBIUM" train configs/tiny.toml "$@" --out runs/old >/dev/null 2>&1
"$CAMBIUM" train configs/tiny.toml "$@" --set optimizer.clip=1.5 --out runs/new >/dev/null 2>&1
rm -f runs/*/config.resolved.toml runs/*/run.json runs/*/report.html
rm -rf runs/*/checkpoints
