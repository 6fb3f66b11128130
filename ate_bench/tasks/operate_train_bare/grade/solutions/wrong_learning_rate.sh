# The learning rate is left as it was.
SETS="--set run.seed=4242"
. "$(dirname "$0")/right.sh"
