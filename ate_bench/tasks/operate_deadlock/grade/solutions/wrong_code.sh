# Takes the mismatch for a deadlock.
export WRONG=code
. "$(dirname "$0")/right.sh"
