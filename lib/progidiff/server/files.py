"""Files that an answer leaves behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from progidiff.volume import Volume, save_mask


def write_temporary(labels: np.ndarray, volume: Volume, extension: str) -> Path:
    """Write labels in file order (I, J, K) to a new temporary file on the grid of an image; the caller removes it."""
    handle, name = tempfile.mkstemp(prefix="progidiff-", suffix=extension)
    os.close(handle)
    try:
        return save_mask(labels, volume, name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
