# One line per op; the order is that of the forward pass.
