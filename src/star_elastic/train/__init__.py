"""Joint training of all sizes, in place in the parent's weights."""
