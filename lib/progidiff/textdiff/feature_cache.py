"""Features on disk: fp16 safetensors by content hash, written by rename, the oldest dropped beyond a limit."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from progidiff.errors import StoreError
from progidiff.storage.atomic import atomic_file
from progidiff.textdiff.features import FeatureExtractor
from progidiff.textdiff.pictures import pad

logger = logging.getLogger(__name__)

HALF_MAX = 60000.0
"""Features are clipped to it: fp16 ends at 65504."""


class FeatureCache:
    """A folder of features; safe for several processes.

    Args:
        folder: Made when needed; None keeps nothing.
        limit_gb: Beyond it the entries that were not used for longest are removed. Those just asked for stay readable:
            on POSIX a removed file lives on while it is mapped.
    """

    def __init__(self, folder: Path | None, limit_gb: float = 20.0) -> None:
        self.folder = folder
        self.limit_gb = limit_gb

    def get(self, extractor: FeatureExtractor, picture: Tensor, draw: int = 0) -> list[Tensor]:
        """Features of one working picture.

        Args:
            extractor: What computes them where they are not there.
            picture: (3, H, W) floats in -1..1; padded to a multiple of the largest stride, see `pictures.pad`.
            draw: Which noise.

        Returns:
            (C_b, H' / s_b, W' / s_b) fp16 each, coarse first, H' and W' the padded size; memory-mapped where they come
            from the disk. All features of a pixel lie side by side: a crop then touches few pages, and convolutions are
                faster.

        Raises:
            StoreError: if the disk refuses.
        """
        padded = pad(picture, max(extractor.strides)).contiguous()
        if self.folder is None:
            return _compute(extractor, padded, draw)
        state = hashlib.sha256(f"{extractor.key} {draw} {tuple(padded.shape)} ".encode())
        state.update(padded.to(torch.float32).cpu().numpy().tobytes())
        path = self.folder / f"{state.hexdigest()[:40]}.safetensors"
        found = _read(path)
        if found is not None:
            with contextlib.suppress(
                OSError
            ):  # removed meanwhile, or a read-only folder: the age is only for tidying up
                os.utime(path)
            return found
        features = _compute(extractor, padded, draw)
        self._write(path, features)
        return _read(path) or features

    def _write(self, path: Path, features: list[Tensor]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, durable=False) as scratch:
                save_file({f"{i:02d}": f.permute(1, 2, 0).contiguous() for i, f in enumerate(features)}, scratch)
            self._tidy(keep=path)
        except (OSError, SafetensorError) as err:
            raise StoreError(
                f"Features could not be kept in '{path.parent}' ({err}). Free some disk "
                "space there, or name another folder."
            ) from err

    def _tidy(self, keep: Path) -> None:
        """Remove the entries that were not used for longest, until the rest fits."""
        entries = []
        for path in keep.parent.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                entries.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_gb * 1e9:
                break
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size


class CachedFeatures:
    """An extractor that looks into a cache first; for pictures that are asked for again and again, as in a benchmark.

    Attributes:
        channels, strides, options, key: Of the extractor, see `FeatureExtractor`.
        source, digest: Of a denoiser; of another extractor "" and its key.
    """

    def __init__(self, extractor: FeatureExtractor, cache: FeatureCache) -> None:
        self._extractor, self._cache = extractor, cache
        self.source: str = getattr(extractor, "source", "")
        self.digest: str = getattr(extractor, "digest", extractor.key)
        self.channels, self.strides, self.options, self.key = (
            extractor.channels,
            extractor.strides,
            extractor.options,
            extractor.key,
        )

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`; rounded to fp16."""
        found = [self._cache.get(self._extractor, picture, draw) for picture in pictures]
        return [torch.stack(maps).float() for maps in zip(*found, strict=True)]


def _compute(extractor: FeatureExtractor, padded: Tensor, draw: int) -> list[Tensor]:
    return [
        f[0].clamp(-HALF_MAX, HALF_MAX).half().permute(1, 2, 0).contiguous().permute(2, 0, 1).cpu()
        for f in extractor(padded[None], draw)
    ]


def _read(path: Path) -> list[Tensor] | None:
    """What is in a file; None if it is not there or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(name).permute(2, 0, 1) for name in sorted(file.keys())]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as err:
        logger.warning("'%s' is damaged (%s) and is computed again", path, err)
        return None
