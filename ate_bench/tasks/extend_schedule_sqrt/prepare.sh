python3 "$(dirname "${BASH_SOURCE[0]}")/../../corpus.py"
