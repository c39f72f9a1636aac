"""Prompt-conditioned diffusion proposals for labelling CT and MR volumes.

Nothing heavy is imported here: ``import progidiff`` costs milliseconds, and each module imports what it needs.
"""

__version__ = "0.2.0"
