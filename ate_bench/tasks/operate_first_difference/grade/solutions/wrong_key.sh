# Takes another clip norm for another learning rate.
export WRONG=key
. "$(dirname "$0")/right.sh"
