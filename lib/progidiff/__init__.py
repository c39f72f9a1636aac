"""Prompt-conditioned diffusion proposals for labelling CT and MR volumes.

Nothing heavy is imported here: ``import progidiff`` costs milliseconds, and each module imports what it needs.
`ProGiDiffPipeline` is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from progidiff.proposals.diffusers_pipeline import ProGiDiffPipeline

__version__ = "0.2.0"
__all__ = ["ProGiDiffPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """What is imported late."""
    if name == "ProGiDiffPipeline":
        from progidiff.proposals.diffusers_pipeline import ProGiDiffPipeline

        return ProGiDiffPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
