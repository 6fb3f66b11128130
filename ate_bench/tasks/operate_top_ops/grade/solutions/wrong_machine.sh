# Another machine's times.
MACHINE=dgx-b200
. "$(dirname "$0")/right.sh"
