# Takes the loss of a step for one after its update.
export WRONG=loss
. "$(dirname "$0")/right.sh"
