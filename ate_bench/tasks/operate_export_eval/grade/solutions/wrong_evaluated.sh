# Evaluates the fp32 run instead of the exported bf16 weights.
EVALUATED=.ate/run7
. "$(dirname "$0")/right.sh"
