# Swaps the two call sites.
export WRONG=site
. "$(dirname "$0")/right.sh"
