# The configuration's own seed.
SEED=1
. "$(dirname "$0")/right.sh"
