# Exports the checkpoint of step 8.
FROM=.ate/run7/checkpoints/step-00000008
. "$(dirname "$0")/right.sh"
