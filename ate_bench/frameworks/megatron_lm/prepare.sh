# megatron-core alone: Transformer Engine is not built here.
. "$(dirname "${BASH_SOURCE[0]}")/../python_environment.sh"
python_environment uv pip install -q --python .venv torch .
