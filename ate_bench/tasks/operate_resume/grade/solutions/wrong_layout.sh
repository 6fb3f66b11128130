# Goes on without expert parallelism.
LAYOUT="--set parallel.dp=4"
. "$(dirname "$0")/right.sh"
