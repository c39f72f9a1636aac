"""Features on disk: fp16 safetensors by content hash, written by rename, the oldest dropped beyond a limit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from progidiff.textdiff.features import FeatureExtractor


class FeatureCache:
    """A folder of features; safe for several processes.

    Args:
        folder: Made when needed; None keeps nothing.
        limit_gb: Beyond it the entries that were not used for longest are removed.
    """

    def __init__(self, folder: Path | None, limit_gb: float = 20.0) -> None:
        self.folder = folder
        self.limit_gb = limit_gb

    def get(self, extractor: FeatureExtractor, picture: Tensor, draw: int = 0) -> list[Tensor]:
        """Features of one working picture.

        Args:
            extractor: What computes them where they are not there.
            picture: (3, H, W) floats in -1..1; it is padded to the extractor's stride by mirroring.
            draw: Which noise.

        Returns:
            (C_b, ceil(H / s_b), ceil(W / s_b)) fp16 each, coarse first; memory-mapped where they come from the disk.
        """
        raise NotImplementedError
