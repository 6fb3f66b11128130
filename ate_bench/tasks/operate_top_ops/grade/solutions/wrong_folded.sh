# Calls of one rank of each stage instead of all ranks.
FLAGS=--fold
. "$(dirname "$0")/right.sh"
