"""Which slices next, and when to stop."""
