# The kernels of the tree alone: the library one is left out.
OWN=yes
. "$(dirname "$0")/right.sh"
