# Stops one step late.
STOP=6
. "$(dirname "$0")/right.sh"
