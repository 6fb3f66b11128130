# Facts without citations.
. "$(dirname "$0")/right.sh"
sed -i -E 's/"cite": "[^"]*"/"cite": "README.md:1"/' .ate/answer/answers.json
