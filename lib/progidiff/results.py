"""The proposals of one volume: kept small on the working grid, brought to the input's grid when somebody looks.

What is stored are the probabilities of every structure and proposal on the working grid, 8 bits each. Everything else
(masks, consensus, agreement, label maps, scores) is derived, so that showing another proposal costs a resampling and never
a network. Resampling touches only the box around a structure and works on a few slices at a time: a volume of
512 x 512 x 300 voxels needs its output and some 100 MB.

On the input's grid, proposal k is where its resampled probability is at least 0.5; the agreement is the share of proposals
that draw a voxel; the consensus is an agreement of at least 0.5. Disagreement, ranking and millilitres come from the working
grid. z is the axial index from inferior to superior, whatever the order of the file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.grid import WorkingGrid
from progidiff.proposals import compute_disagreement_per_slice, compute_pairwise_dice
from progidiff.volume import Volume

FORMAT = 1
"""Version of the files that `VolumeProposals.to_files` writes."""

MAX_PROPOSALS = 64

_DRAWN = 128
_THRESHOLD = 127.475
"""0.5 on the scale 0..255, a little lower: resampled 8-bit values that tie at exactly 127.5 must not depend on rounding."""

_CHUNK_BYTES = 48 << 20
"""Size of the resampled maps held at once."""


@dataclass(frozen=True, eq=False)
class VolumeProposals:
    """K proposals for each of P structures.

    Attributes:
        structures: The P names asked for, in order.
        probabilities: uint8 of shape (P, K, Z, h, w) on the working grid; 255 is probability 1. Slices of zeros are where the
            structure was found absent.
        grid: Where the working grid lies in the axial stack.
        seed: Of the noise; proposal k is the same whatever K.
        num_inference_steps: Denoising steps.
        guidance_scale: 1 means no guidance.
        model_version: Name and version of the model.
        adapter: Name and version of the adapter, "" for none.
        modality: "CT" or "MR".
        modality_source: Where the modality came from, see `Volume`.
        seconds: Wall time of the computation.
    """

    structures: tuple[str, ...]
    probabilities: np.ndarray
    grid: WorkingGrid
    seed: int
    num_inference_steps: int
    guidance_scale: float
    model_version: str
    adapter: str
    modality: str
    modality_source: str
    seconds: float

    def __post_init__(self) -> None:
        expected = (len(self.structures), self.grid.shape[0], self.grid.height, self.grid.width)
        shape = self.probabilities.shape
        if len(shape) != 5 or (shape[0], *shape[2:]) != expected or shape[1] < 1 or self.probabilities.dtype != np.uint8:
            raise GeometryError(
                f"Probabilities must be uint8 of shape (P, K, Z, h, w) = ({expected[0]}, K, {expected[1]}, {expected[2]}, {expected[3]}), "
                f"got {self.probabilities.dtype} of {shape}."
            )

    @property
    def num_proposals(self) -> int:
        """K."""
        return int(self.probabilities.shape[1])

    @cached_property
    def disagreement(self) -> np.ndarray:
        """1 - mean pairwise Dice of the proposals, float32 of shape (P, Z); 0 where nothing is drawn, and everywhere if K = 1."""
        result = np.zeros((len(self.structures), self.grid.shape[0]), dtype=np.float32)
        for index, box in enumerate(self._boxes):
            if box is not None and self.num_proposals > 1:
                drawn = torch.from_numpy(_inside(self.probabilities[index], box) >= _DRAWN)
                result[index, box[0]] = compute_disagreement_per_slice(drawn).numpy()
        return result

    @cached_property
    def mean_disagreement(self) -> np.ndarray:
        """Mean of `disagreement` over the slices on which any proposal draws the structure, float32 of shape (P,); 0 if none."""
        drawn = self._drawn_slices
        return (self.disagreement * drawn).sum(1) / np.maximum(drawn.sum(1), 1)

    @cached_property
    def pairwise_dice(self) -> np.ndarray:
        """3-D Dice of every proposal with every other, float32 of shape (P, K, K)."""
        count = self.num_proposals
        result = np.ones((len(self.structures), count, count), dtype=np.float32)
        for index, box in enumerate(self._boxes):
            if box is not None:
                drawn = torch.from_numpy(_inside(self.probabilities[index], box) >= _DRAWN)
                result[index] = compute_pairwise_dice(drawn).numpy()
        return result

    @cached_property
    def ranking(self) -> tuple[tuple[int, ...], ...]:
        """Per structure the proposals 0..K-1 by mean Dice to the others, the medoid first (`proposals.rank_proposals`)."""
        orders = []
        for dice in self.pairwise_dice.astype(np.float64):
            mean = (dice.sum(1) - 1) / max(1, len(dice) - 1)
            orders.append(tuple(sorted(range(len(dice)), key=lambda k, mean=mean: (-round(float(mean[k]), 6), k))))  # type: ignore[misc]
        return tuple(orders)

    @cached_property
    def volumes_ml(self) -> np.ndarray:
        """Volume of every proposal in millilitres, measured on the working grid, float64 of shape (P, K)."""
        voxel_ml = self.grid.spacing**2 * self.grid.stack_spacing[0] / 1000
        counts = np.zeros(self.probabilities.shape[:2])
        for index, box in enumerate(self._boxes):
            if box is not None:
                counts[index] = (_inside(self.probabilities[index], box) >= _DRAWN).sum(axis=(1, 2, 3))
        return counts * voxel_ml

    def volume_ml(self, structure: str, shown: str | int = "consensus") -> float:
        """Volume in millilitres of what is shown, measured on the working grid."""
        index = self._index(structure)
        shown = check_shown(shown, self.num_proposals)
        if shown != "consensus":
            return float(self.volumes_ml[index, self._proposal(index, shown)])
        return float(self._consensus(index).sum()) * self.grid.spacing**2 * self.grid.stack_spacing[0] / 1000

    def present(self, shown: str | int = "consensus") -> tuple[str, ...]:
        """The structures of which anything is shown, in the order asked."""
        return tuple(name for name in self.structures if self.volume_ml(name, shown) > 0)

    def mask(self, volume: Volume, structure: str, shown: str | int = "consensus") -> np.ndarray:
        """One structure on the input's grid.

        Args:
            volume: The image that the proposals were made for.
            structure: One of `structures`.
            shown: "consensus", "best" (the medoid) or the number of a proposal, 1..K.

        Returns:
            uint8 0 or 1, shape (I, J, K) in file order.

        Raises:
            RequestError: if there is no such structure or proposal.
            GeometryError: if the volume has another grid.
        """
        self._check_volume(volume)
        index = self._index(structure)
        shown = check_shown(shown, self.num_proposals)
        stack = np.zeros(self.grid.shape, dtype=np.uint8)
        for chosen, rows, cols, drawn, _ in self._restored(index, None if shown == "consensus" else (self._proposal(index, shown),)):
            stack[chosen, rows, cols] = drawn.sum(1) * 2 >= drawn.shape[1]
        return volume.from_stack(stack)

    def label_map(self, volume: Volume, shown: str | int = "consensus", label_ids: dict[str, int] | None = None) -> np.ndarray:
        """All structures on the input's grid, one per voxel.

        Where several are shown on a voxel, the one with the higher agreement wins, then the one with the higher mean
        probability, then the one asked first (`proposals.resolve_overlaps`).

        Args:
            volume: The image that the proposals were made for.
            shown: See `mask`. "best" picks the medoid of each structure.
            label_ids: Label id 1..255 of each structure; by default 1..P in the order asked. Structures without an id are left out.

        Returns:
            uint8, shape (I, J, K) in file order.

        Raises:
            RequestError: if there is no such proposal or an id does not fit.
            GeometryError: if the volume has another grid.
        """
        self._check_volume(volume)
        shown = check_shown(shown, self.num_proposals)
        ids = label_ids if label_ids is not None else {name: position + 1 for position, name in enumerate(self.structures)}
        wrong = {name: value for name, value in ids.items() if not 1 <= value <= 255}
        if wrong:
            raise RequestError(f"Label ids must be 1 to 255 to fit 8 bits, got {wrong}.")
        stack = np.zeros(self.grid.shape, dtype=np.uint8)
        chosen_structures = [index for index, name in enumerate(self.structures) if name in ids]
        if len(chosen_structures) == 1:
            mask = self.mask(volume, self.structures[chosen_structures[0]], shown)
            return mask * np.uint8(ids[self.structures[chosen_structures[0]]])
        step = 16
        for start in range(0, len(stack), step):
            # Agreement in whole proposals plus the mean probability below 1: one number that sorts by both.
            best = np.zeros((min(step, len(stack) - start), *stack.shape[1:]), dtype=np.float32)
            for index in chosen_structures:
                shown_index = None if shown == "consensus" else self._proposal(index, shown)
                for z, rows, cols, drawn, mean in self._restored(index, None, slice(start, start + step)):
                    count = drawn.sum(1)
                    shown_here = count * 2 >= drawn.shape[1] if shown_index is None else drawn[:, shown_index]
                    score = count + mean / 256
                    area = (z - start, rows, cols)
                    wins = shown_here & (score > best[area])
                    best[area] = np.where(wins, score, best[area])
                    stack[z, rows, cols] = np.where(wins, np.uint8(ids[self.structures[index]]), stack[z, rows, cols])
        return volume.from_stack(stack)

    def agreement(self, volume: Volume, structure: str | None = None) -> np.ndarray:
        """Share of proposals that draw each voxel; not a calibrated probability.

        Args:
            volume: The image that the proposals were made for.
            structure: One of `structures`; None for the maximum over all.

        Returns:
            float32 in [0, 1], shape (I, J, K) in file order.
        """
        self._check_volume(volume)
        stack = np.zeros(self.grid.shape, dtype=np.float32)
        for index in range(len(self.structures)) if structure is None else [self._index(structure)]:
            for z, rows, cols, drawn, _ in self._restored(index, None):
                share = drawn.sum(1).astype(np.float32) / drawn.shape[1]
                stack[z, rows, cols] = np.maximum(stack[z, rows, cols], share)
        return volume.from_stack(stack)

    def disagreement_map(self, volume: Volume, structure: str | None = None) -> np.ndarray:
        """Where the proposals differ: 4 a (1 - a) of the agreement a, in percent.

        Args:
            volume: The image that the proposals were made for.
            structure: One of `structures`; None for the maximum over all.

        Returns:
            uint8 from 0 (all or none draw the voxel) to 100 (half of them do), shape (I, J, K) in file order.
        """
        self._check_volume(volume)
        stack = np.zeros(self.grid.shape, dtype=np.uint8)
        for index in range(len(self.structures)) if structure is None else [self._index(structure)]:
            for z, rows, cols, drawn, _ in self._restored(index, None):
                share = drawn.sum(1).astype(np.float32) / drawn.shape[1]
                percent = np.rint(400 * share * (1 - share)).astype(np.uint8)
                stack[z, rows, cols] = np.maximum(stack[z, rows, cols], percent)
        return volume.from_stack(stack)

    def summary(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values for JSON: settings, and per structure volumes, ranking and disagreement."""
        structures = {}
        for index, name in enumerate(self.structures):
            structures[name] = {
                "present": name in self.present(),
                "consensus_ml": round(self.volume_ml(name), 3),
                "proposals_ml": [round(float(value), 3) for value in self.volumes_ml[index]],
                "best": self.ranking[index][0] + 1,
                "ranking": [k + 1 for k in self.ranking[index]],
                "mean_disagreement": round(float(self.mean_disagreement[index]), 4),
                "disagreement_per_slice": [round(float(value), 4) for value in self.disagreement[index]],
            }
        return {**self._settings(), "structures": structures}

    def _settings(self) -> dict[str, Any]:
        return {
            "num_proposals": self.num_proposals,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "model_version": self.model_version,
            "adapter": self.adapter,
            "modality": self.modality,
            "modality_source": self.modality_source,
            "seconds": round(self.seconds, 3),
        }

    def to_files(self, folder: str | os.PathLike[str]) -> None:
        """Write `probabilities.npz` (the box around each structure, lightly compressed) and `proposals.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        boxes = []
        with zipfile.ZipFile(folder / "probabilities.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for index, box in enumerate(self._boxes):
                boxes.append(None if box is None else [[part.start, part.stop] for part in box])
                if box is not None:
                    with archive.open(f"structure_{index}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, np.ascontiguousarray(_inside(self.probabilities[index], box)), allow_pickle=False)
        card = {
            "format": FORMAT,
            "structures": list(self.structures),
            **self._settings(),
            "seconds": self.seconds,
            "grid": self.grid.to_dict(),
            "boxes": boxes,
        }
        (folder / "proposals.json").write_text(json.dumps(card, indent=1), encoding="utf-8")

    @classmethod
    def from_files(cls, folder: str | os.PathLike[str]) -> VolumeProposals:
        """The inverse of `to_files`.

        Raises:
            ImageError: if the files are missing, damaged or of another format.
        """
        folder = Path(folder)
        try:
            card = json.loads((folder / "proposals.json").read_text(encoding="utf-8"))
            if card["format"] != FORMAT:
                raise ImageError(f"'{folder}' holds proposals in format {card['format']}, this version reads {FORMAT}; compute them again.")
            grid = WorkingGrid.from_dict(card["grid"])
            structures = tuple(str(name) for name in card["structures"])
            count = int(card["num_proposals"])
            if not 1 <= count <= MAX_PROPOSALS or len(card["boxes"]) != len(structures):
                raise ImageError(f"'{folder}' is inconsistent: {count} proposals, {len(card['boxes'])} boxes for {len(structures)} structures.")
            # Zero pages cost nothing until they are written, so an absent structure stays free.
            probabilities = np.zeros((len(structures), count, grid.shape[0], grid.height, grid.width), dtype=np.uint8)
            with np.load(folder / "probabilities.npz", allow_pickle=False) as archive:
                for index, box in enumerate(card["boxes"]):
                    if box is not None:
                        z, rows, cols = (slice(int(first), int(last)) for first, last in box)
                        target = _inside(probabilities[index], (z, rows, cols))
                        stored = archive[f"structure_{index}"]
                        if stored.shape != target.shape or stored.dtype != np.uint8:
                            raise ImageError(
                                f"'{folder}' is inconsistent: '{structures[index]}' is {stored.dtype} of {stored.shape}, not {target.shape}."
                            )
                        target[...] = stored
            return cls(
                structures=structures,
                probabilities=probabilities,
                grid=grid,
                seed=int(card["seed"]),
                num_inference_steps=int(card["num_inference_steps"]),
                guidance_scale=float(card["guidance_scale"]),
                model_version=str(card["model_version"]),
                adapter=str(card["adapter"]),
                modality=str(card["modality"]),
                modality_source=str(card["modality_source"]),
                seconds=float(card["seconds"]),
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, zipfile.BadZipFile) as err:
            raise ImageError(f"The proposals in '{folder}' cannot be read ({err}); compute them again.") from err

    @cached_property
    def _boxes(self) -> tuple[tuple[slice, slice, slice] | None, ...]:
        """Per structure the half-open box (z, row, column) of the working grid that holds everything but zeros; None if all are zero."""
        boxes: list[tuple[slice, slice, slice] | None] = []
        for structure in self.probabilities:
            footprint = np.zeros(structure.shape[1:], dtype=np.uint8)
            for proposal in structure:
                np.bitwise_or(footprint, proposal, out=footprint)
            depth = np.flatnonzero(footprint.any(axis=(1, 2)))
            if len(depth) == 0:
                boxes.append(None)
                continue
            plane = footprint[depth[0] : depth[-1] + 1].any(axis=0)
            rows, cols = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
            boxes.append((_span(depth), _span(rows), _span(cols)))
        return tuple(boxes)

    @cached_property
    def _drawn_slices(self) -> np.ndarray:
        """bool (P, Z): any proposal draws the structure on the slice."""
        result = np.zeros((len(self.structures), self.grid.shape[0]), dtype=bool)
        for index, box in enumerate(self._boxes):
            if box is not None:
                result[index, box[0]] = _inside(self.probabilities[index], box).max(axis=(0, 2, 3)) >= _DRAWN
        return result

    def _consensus(self, index: int) -> np.ndarray:
        """bool consensus on the working grid inside the structure's box; empty if the structure is absent."""
        box = self._boxes[index]
        if box is None:
            return np.zeros((0, 0, 0), dtype=bool)
        drawn = _inside(self.probabilities[index], box) >= _DRAWN
        return drawn.sum(axis=0) * 2 >= len(drawn)

    def _restored(
        self, index: int, proposals: Sequence[int] | None, slices: slice | None = None
    ) -> Iterator[tuple[np.ndarray, slice, slice, np.ndarray, np.ndarray]]:
        """The non-empty part of a structure on the axial stack, some slices at a time.

        Yields:
            (z, rows, cols, drawn, mean): axial indices (n,), the rows and columns of the stack that the maps cover, bool masks
            (n, K, y, x) of the proposals, and their mean probability (n, y, x) on the scale 0..255.
        """
        box = self._boxes[index]
        if box is None:
            return
        placed = _place_box(self.grid, box[1], box[2])
        if placed is None:
            return
        part, rows, cols, window_rows, window_cols = placed
        chosen = list(range(self.num_proposals)) if proposals is None else list(proposals)
        source = self.probabilities[index]
        first, last = box[0].start, box[0].stop
        if slices is not None:
            first, last = max(first, slices.start), min(last, slices.stop)
        present = [z for z in range(first, last) if source[chosen, z, window_rows, window_cols].any()]
        per_slice = len(chosen) * (rows.stop - rows.start) * (cols.stop - cols.start) * 4
        step = max(1, _CHUNK_BYTES // max(1, per_slice))
        for start in range(0, len(present), step):
            z = np.asarray(present[start : start + step])
            maps = np.stack([source[k, z, window_rows, window_cols] for k in chosen], axis=1)  # (n, K, h, w)
            flat = torch.from_numpy(maps.reshape(-1, *maps.shape[2:])).float()
            restored = part.restore_slices(flat).reshape(len(z), len(chosen), rows.stop - rows.start, cols.stop - cols.start)
            yield z, rows, cols, (restored >= _THRESHOLD).numpy(), restored.mean(1).numpy()

    def _index(self, structure: str) -> int:
        if structure not in self.structures:
            raise RequestError(f"These proposals hold no '{structure}'; they hold {', '.join(self.structures)}. Send a prompt that asks for it.")
        return self.structures.index(structure)

    def _proposal(self, index: int, shown: str | int) -> int:
        return self.ranking[index][0] if shown == "best" else int(shown) - 1

    def _check_volume(self, volume: Volume) -> None:
        shape = volume.to_stack()[0].shape
        if tuple(shape) != self.grid.shape:
            raise GeometryError(f"These proposals were made for an axial stack of {self.grid.shape}, the image '{volume.name}' has {tuple(shape)}.")


def check_shown(shown: str | int, num_proposals: int) -> str | int:
    """What to show: "consensus", "best" or the number of a proposal.

    Args:
        shown: As a client sends it: any case, "3", 3 or "proposal 3".
        num_proposals: K.

    Returns:
        "consensus", "best" or an int in 1..K.

    Raises:
        RequestError: if it is none of these.

    Example:
        >>> check_shown("Proposal 3", 4)
        3
    """
    text = str(shown).strip().lower()
    if text in {"consensus", "best"} and not isinstance(shown, bool):
        return text
    number = text.removeprefix("proposal").strip()
    if number.isascii() and number.isdigit() and 1 <= int(number) <= num_proposals:
        return int(number)
    raise RequestError(f"Cannot show {shown!r}; choose consensus, best, or a proposal from 1 to {num_proposals}.")


def _span(positions: np.ndarray) -> slice:
    return slice(int(positions[0]), int(positions[-1]) + 1)


def _inside(maps: np.ndarray, box: tuple[slice, slice, slice]) -> np.ndarray:
    """The view of (K, Z, h, w) inside a box."""
    return maps[:, box[0], box[1], box[2]]


def _place_box(grid: WorkingGrid, rows: slice, cols: slice) -> tuple[WorkingGrid, slice, slice, slice, slice] | None:
    """The part of the working grid around a box, as a working grid of its own over the part of the stack that it covers.

    Returns:
        (part, stack rows, stack columns, window rows, window columns), or None if the box covers no pixel of the stack. One
        pixel of zeros is kept on each side, so that a bilinear lookup sees the same as on the whole grid.
    """
    window_rows = slice(max(0, rows.start - 1), min(grid.height, rows.stop + 1))
    window_cols = slice(max(0, cols.start - 1), min(grid.width, cols.stop + 1))
    stack_rows, center_y = _cover(window_rows, grid.height, grid.center[0], grid.spacing, grid.stack_spacing[1], grid.shape[1])
    stack_cols, center_x = _cover(window_cols, grid.width, grid.center[1], grid.spacing, grid.stack_spacing[2], grid.shape[2])
    size = (stack_rows.stop - stack_rows.start, stack_cols.stop - stack_cols.start)
    if min(size) < 1:
        return None
    part = replace(
        grid,
        shape=(grid.shape[0], *size),
        center=(center_y, center_x),
        height=window_rows.stop - window_rows.start,
        width=window_cols.stop - window_cols.start,
    )
    return part, stack_rows, stack_cols, window_rows, window_cols


def _cover(window: slice, window_count: int, center: float, spacing: float, stack_spacing: float, stack_count: int) -> tuple[slice, float]:
    """Stack pixels whose middles lie in the window pixels, and the window's middle in mm from the first of them."""
    origin = center - window_count * spacing / 2
    low, high = origin + window.start * spacing, origin + window.stop * spacing
    first = max(0, int(np.ceil(low / stack_spacing - 0.5)))
    last = min(stack_count, int(np.floor(high / stack_spacing - 0.5)) + 1)
    return slice(first, max(first, last)), (low + high) / 2 - first * stack_spacing
