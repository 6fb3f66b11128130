# The default: the last step alone.
STEPS=1
. "$(dirname "$0")/right.sh"
