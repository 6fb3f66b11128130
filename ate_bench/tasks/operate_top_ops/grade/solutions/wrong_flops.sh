# The ops with the most FLOPs.
KEY=flops
. "$(dirname "$0")/right.sh"
