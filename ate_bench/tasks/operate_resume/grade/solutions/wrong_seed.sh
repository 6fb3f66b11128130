# Another seed.
SEED=13
. "$(dirname "$0")/right.sh"
