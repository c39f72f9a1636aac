"""Measuring proposals against labels, and labelling ahead."""
