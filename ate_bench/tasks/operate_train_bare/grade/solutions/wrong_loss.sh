# Tells the training loss for the validation loss.
FIELD=loss
. "$(dirname "$0")/right.sh"
