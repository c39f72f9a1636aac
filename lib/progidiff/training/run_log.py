"""What a training run says while it runs: ``log.jsonl`` for programs, TensorBoard's files for people."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from progidiff.errors import StoreError

logger = logging.getLogger(__name__)

BOARD = "tensorboard"
"""Where TensorBoard's files lie in a run's folder: ``tensorboard --logdir <work folder>`` finds them."""


class RunLog:
    """Appends to the log of a run.

    Args:
        folder: Of the run.
        first: Step that the run starts or resumes at; what a killed run wrote beyond it is hidden from the curves.
        tensorboard: Whether to write curves and pictures too.
    """

    def __init__(self, folder: Path, first: int, tensorboard: bool = True) -> None:
        self._file = folder / "log.jsonl"
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("There will be no curves and pictures of this training: pip install 'progidiff[train]'.")
                return
            self._draw(
                lambda: SummaryWriter(str(folder / BOARD), purge_step=first + 1 if first else None, flush_secs=30),
                keep=True,
            )

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note the figures of a training step; ``step`` must be among them."""
        self._append(entry)
        step = entry["step"]
        for name, value in entry.items():
            if name not in ("step", "total", "seconds", "eta_seconds"):
                self._draw(lambda name=name, value=value: self._board.add_scalar(f"training/{name}", value, step))

    def add_validation(self, figures: Mapping[str, float], pictures: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Note a validation and what it looks like.

        Args:
            figures: ``step`` and what was measured.
            pictures: name -> (H, W, 3) uint8.
        """
        self._append({"validation": dict(figures)})
        step = figures["step"]
        for name, value in figures.items():
            if name != "step":
                self._draw(lambda name=name, value=value: self._board.add_scalar(f"validation/{name}", value, step))
        for name, picture in (pictures or {}).items():
            self._draw(lambda name=name, picture=picture: self._board.add_image(name, picture, step, dataformats="HWC"))

    def close(self) -> None:
        """Write out what is still buffered."""
        self._draw(lambda: self._board.close())
        self._board = None

    def _append(self, entry: Mapping[str, Any]) -> None:
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as err:
            raise StoreError(
                f"'{self._file}' cannot be written ({err}). Free some disk space and start the training again: it "
                "continues at its last checkpoint."
            ) from err

    def _draw(self, act: Any, keep: bool = False) -> None:
        """Curves are a comfort: a run does not end because they could not be written."""
        if self._board is None and not keep:
            return
        try:
            made = act()
        except OSError as err:
            logger.warning("TensorBoard's files cannot be written (%s); the training goes on without them", err)
            made, keep = None, True
        if keep:
            self._board = made
