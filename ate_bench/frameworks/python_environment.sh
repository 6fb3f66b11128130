# Sourced by a framework's prepare.sh: `python_environment COMMAND...`. Questions need the sources
# alone, so nothing is installed unless ATE_INSTALL=yes; then COMMAND runs in a virtual environment
# `.venv` that git ignores, so that it is no part of an attempt's diff. Ends with 31 where the network
# or uv is missing: such an attempt is recorded as prepare_failed.
python_environment() {
  if [ "${ATE_INSTALL:-no}" != yes ]; then return 0; fi
  echo '/.venv/' >>.git/info/exclude 2>/dev/null || true
  if ! command -v uv >/dev/null; then
    echo "no uv, which installs this framework; next: https://docs.astral.sh/uv, or ATE_INSTALL=no" >&2
    exit 31
  fi
  if ! { uv venv -q .venv && "$@"; } >.ate/install.log 2>&1; then
    tail -5 .ate/install.log >&2
    echo "cannot install: is there a network? next: ATE_INSTALL=no runs what needs the sources alone" >&2
    exit 31
  fi
}
