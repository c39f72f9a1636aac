"""The infer tasks that the host lists."""
