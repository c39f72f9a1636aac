"""A training as a process of its own."""
