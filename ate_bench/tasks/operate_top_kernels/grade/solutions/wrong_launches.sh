# The kernels that are launched most.
KEY=launches
. "$(dirname "$0")/right.sh"
