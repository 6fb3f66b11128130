here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python3 "$here/../../../../questions.py" "$here/../$ATE_FRAMEWORK.json" solve >.ate/answer/answers.json
