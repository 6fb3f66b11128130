# The kernels whose single launch takes longest.
KEY=mean
. "$(dirname "$0")/right.sh"
