# Only the log is left: the configuration that fails is not shown.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python3 "$here/../../corpus.py"
. "$here/../../solution_tools.sh" >/dev/null 2>&1
mkdir -p .ate/hide
sed 's/^steps = .*/steps = 4/' configs/tiny.toml >.ate/hide/job.toml
cat >>.ate/hide/job.toml <<'C'

[parallel]
dp = 4
ep = 2

[[faults]]
kind = "skipped_collective"
rank = 2
step = 2
C
(cd .ate/hide && ln -sf ../../data data && ! "$CAMBIUM" check job.toml >../../failing_check.log 2>&1)
rm -rf .ate/hide
sed -i '/^REPRO/d' failing_check.log
grep -q '^FAIL' failing_check.log
