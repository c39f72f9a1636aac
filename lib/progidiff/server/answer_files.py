"""Files that an answer leaves behind."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from progidiff.images.formats import Use, list_suffixes
from progidiff.images.geometry import Grid
from progidiff.images.writing import save_mask
from progidiff.labels.segments import Look
from progidiff.labels.slicer import save_segmentation
from progidiff.storage.atomic import make_scratch_name

_lock = threading.Lock()
_folder: Path | None = None


def write_temporary(
    labels: NDArray[Any],
    like: Grid,
    extension: str,
    names: Mapping[str, int],
    looks: Mapping[str, Look] | None = None,
) -> Path:
    """Write labels in file order (I, J, K) to a new temporary file on the grid of an image; the caller removes it.

    Args:
        names: Name -> id of what is drawn; a segmentation of 3D Slicer (.seg.nrrd) holds them, other formats do not.
        looks: Structure -> colour and code, of those that are a folder's own; for the same.
    """
    handle, name = tempfile.mkstemp(prefix="progidiff-", suffix=extension, dir=_find_folder())
    os.close(handle)
    try:
        if extension in list_suffixes(Use.SEGMENTS):
            return save_segmentation(labels, like, Path(name), names, looks)
        return save_mask(labels, like, name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _find_folder() -> Path:
    """A folder of this process.

    Not the temporary folder itself: there MONAILabelClient saves an answer under the name of the server's file. On the
    same host that is the same file, and when the server removes its own, the client's is gone.
    """
    global _folder
    with _lock:
        if _folder is None or not _folder.is_dir():  # some systems clear what is old
            _folder = Path(tempfile.gettempdir()) / make_scratch_name(prefix=".progidiff-answers-")
            _folder.mkdir(mode=0o700)
            atexit.register(shutil.rmtree, _folder, ignore_errors=True)
        return _folder
