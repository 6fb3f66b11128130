# Names the rank that waits.
export WRONG=rank
. "$(dirname "$0")/right.sh"
