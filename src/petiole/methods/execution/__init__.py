"""Methods that change which blocks run, in which order, or backwards."""
