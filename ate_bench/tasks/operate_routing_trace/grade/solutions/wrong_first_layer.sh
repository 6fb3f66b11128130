# Layers counted from the wrong end.
LAYER=0
. "$(dirname "$0")/right.sh"
