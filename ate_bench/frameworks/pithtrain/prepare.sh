# Needs CUDA 13 and Python 3.12 where it is installed (its README).
. "$(dirname "${BASH_SOURCE[0]}")/../python_environment.sh"
python_environment uv pip install -q --python .venv .
