"""Many volumes: which there are, who takes the next one, and reading, computing and writing at the same time, on this
machine or on a Ray cluster.
"""
