"""The slices of served volumes, kept on disk as they go over the wire and mapped into memory.

A volume is read and converted once. After that a slice is a copy out of the operating system's file cache, however many
volumes are open and also after a restart; `max_bytes` bounds the disk, the volumes not looked at for longest go first.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from progidiff.dicomweb import headers
from progidiff.dicomweb.geometry import ServedGrid
from progidiff.dicomweb.headers import Identity
from progidiff.dicomweb.pixels import Rescale, to_gray
from progidiff.errors import NotFoundError, StoreError
from progidiff.images.intensities import compute_window
from progidiff.images.volume import Volume
from progidiff.storage.atomic import WRITING, atomic_folder, remove_leftovers

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the files."""

_PIXELS = "pixels.raw"
_CARD = "series.json"
_KEPT_OPEN = 32


class Series:
    """One image as a DICOM series.

    Args:
        identity: Who it is.
        grid: Where its slices lie.
        rescale: How its intensities are stored.
        window: The intensities shown as black and white.
        stored: Stored numbers as an axial stack, shape (Z, Y, X).
    """

    def __init__(
        self, identity: Identity, grid: ServedGrid, rescale: Rescale, window: tuple[float, float], stored: NDArray[Any]
    ) -> None:
        self.identity = identity
        self.grid = grid
        self.rescale = rescale
        self.window = window
        self.stored = stored

    @classmethod
    def of(cls, identity: Identity, volume: Volume) -> Series:
        """The series of a volume, in memory.

        Raises:
            GeometryError: if it cannot be shown as rectangular slices.
        """
        grid = ServedGrid.of(volume.grid)
        rescale = Rescale.of(volume.array)
        return cls(identity, grid, rescale, compute_window(volume), rescale.store(volume.arrange(volume.array)))

    @cached_property
    def common(self) -> Dataset:
        """What all slices say."""
        return headers.build_common(self.identity, self.grid, self.rescale, self.window)

    @cached_property
    def metadata(self) -> list[dict[str, Any]]:
        """DICOM JSON of every slice, without pixels."""
        common = headers.to_json(self.common)
        count = self.grid.shape[0]
        return [
            headers.join_json(common, headers.to_json(headers.build_own(self.identity, self.grid, index)))
            for index in range(count)
        ]

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {self.identity.instance_uid(index): index for index in range(self.grid.shape[0])}

    def find(self, instance_uid: str) -> int:
        """The index of a slice.

        Raises:
            NotFoundError: if the series has no such instance.
        """
        index = self._index_of.get(instance_uid)
        if index is None:
            raise NotFoundError(
                f"Series {self.identity.series_uid} ('{self.identity.image}') has no instance {instance_uid[:64]}."
            )
        return index

    def frame(self, index: int) -> bytes:
        """The stored numbers of one slice, row by row, little endian."""
        return np.ascontiguousarray(self.stored[index]).tobytes()

    def dataset(self, index: int) -> Dataset:
        """One slice as a whole DICOM file."""
        return headers.build_file(self.common, headers.build_own(self.identity, self.grid, index), self.frame(index))

    def picture(self, index: int, kind: str = "JPEG", longest: int | None = None) -> bytes:
        """One slice through the window, pixels made square.

        Args:
            index: Of the slice.
            kind: "JPEG" or "PNG".
            longest: Pixels of the longer side; None for the slice's own.
        """
        gray = to_gray(self.stored[index], self.rescale, sum(self.window) / 2, self.window[1] - self.window[0])
        dx, dy, _ = self.grid.spacing
        height, width = gray.shape[0] * dy / min(dx, dy), gray.shape[1] * dx / min(dx, dy)
        factor = 1.0 if longest is None else longest / max(height, width)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        target = io.BytesIO()
        Image.fromarray(gray).resize(size, Image.Resampling.BILINEAR).save(target, kind)
        return target.getvalue()


class FrameStore:
    """Series by UID, on disk.

    Args:
        root: Folder; made when the first series is kept.
        max_bytes: Size beyond which the series not used for longest are removed.
    """

    def __init__(self, root: Path, max_bytes: int = 4_000_000_000) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._open: OrderedDict[str, Series] = OrderedDict()
        self._lock = threading.Lock()
        self._building = threading.Lock()

    def open(self, identity: Identity, load: Callable[[], Volume]) -> Series:
        """The series of an image.

        Args:
            identity: Who it is.
            load: Reads the volume; called only if the series is not kept.

        Raises:
            StoreError: if the disk refuses.
            ProGiDiffError: whatever `load` finds wrong, or `ServedGrid.of`.
        """
        uid = identity.series_uid
        with self._lock:
            series = self._open.get(uid)
            if series is not None:
                self._open.move_to_end(uid)
                return series
        with self._building:  # One at a time: a volume in the making takes several times its size in memory.
            series = self._map(identity)
            if series is None:
                self._write(Series.of(identity, load()))
                series = self._map(identity)
                self._prune(uid)
        if series is None:
            raise StoreError(
                f"The slices of '{identity.image}' were written to '{self.root}' and "
                "cannot be read back. Check the disk."
            )
        with self._lock:
            self._open[uid] = series
            while len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
        return series

    def _map(self, identity: Identity) -> Series | None:
        folder = self.root / identity.series_uid
        try:
            card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            if card["format"] != FORMAT:
                return None
            grid = ServedGrid(tuple(card["shape"]), np.array(card["affine"], dtype=np.float64))
            rescale = Rescale(card["slope"], card["intercept"], card["signed"])
            stored = np.memmap(folder / _PIXELS, dtype=rescale.dtype, mode="r", shape=grid.shape)
            with contextlib.suppress(OSError):
                os.utime(folder)  # last use, for pruning
            return Series(identity, grid, rescale, (card["window"][0], card["window"][1]), stored)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as err:
            logger.warning("The kept slices of '%s' are damaged and are made again: %s", identity.image, err)
            return None

    def _write(self, series: Series) -> None:
        card = {
            "format": FORMAT,
            "image": series.identity.image,
            "shape": list(series.grid.shape),
            "affine": series.grid.affine.tolist(),
            "slope": series.rescale.slope,
            "intercept": series.rescale.intercept,
            "signed": series.rescale.signed,
            "window": list(series.window),
        }
        target = self.root / series.identity.series_uid
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # What is there is damaged, or of an older version.
            with atomic_folder(target, existing="replace", durable=False) as scratch:
                with (scratch / _PIXELS).open("wb") as file:
                    for index in range(series.grid.shape[0]):
                        file.write(series.frame(index))
                (scratch / _CARD).write_text(json.dumps(card), encoding="utf-8")
        except OSError as err:
            if not (target / _CARD).is_file():  # else another process was faster
                raise StoreError(
                    f"The slices of '{series.identity.image}' could not be written to "
                    f"'{self.root}' ({err}). Free some disk space."
                ) from err

    def _prune(self, keep: str) -> None:
        remove_leftovers(self.root)
        folders = []
        for folder in self.root.iterdir():
            with contextlib.suppress(OSError):
                if folder.is_dir() and not folder.name.startswith(WRITING):
                    folders.append((folder.stat().st_mtime, (folder / _PIXELS).stat().st_size, folder))
        total = sum(size for _, size, _ in folders)
        for _, size, folder in sorted(folders):
            if total <= self.max_bytes:
                break
            if folder.name != keep:
                shutil.rmtree(folder, ignore_errors=True)
                with self._lock:
                    self._open.pop(folder.name, None)
                total -= size
