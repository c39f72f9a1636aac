"""Saved labels: checks, history, audit."""
