"""The proposals of one volume: kept small on the working grid, brought to the input's grid when somebody looks.

What is stored are the probabilities of every structure and proposal on the working grid, 8 bits each. Everything else
(masks, consensus, agreement, label maps, scores) is derived, so that showing another proposal costs a resampling and
never a network. Resampling touches only the box around a structure and works slice by slice (whose maps stay in the
processor's cache): a volume of 512 x 512 x 300 voxels needs its output and a few MB.

On the input's grid, proposal k is where its resampled probability is at least 0.5; the agreement is the share of
proposals that draw a voxel; the consensus is an agreement of at least 0.5. Disagreement, ranking and millilitres come
from the part of the working grid that lies in the image. z is the axial index from inferior to superior, whatever the
order of the file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.images.geometry import Grid
from progidiff.images.working_grid import WorkingGrid
from progidiff.model.calibration import Calibration
from progidiff.proposals.agreement import compute_disagreement_per_slice, compute_pairwise_dice
from progidiff.proposals.islands import DRAWN, OFF, drop_islands
from progidiff.proposals.request import FORMAT, MAX_PROPOSALS

THRESHOLD = 127.475
"""0.5 on the scale 0..255, a little lower: resampled 8-bit values that tie at exactly 127.5 must not depend on
rounding.
"""


Pin = tuple[int, int, int, bool]
"""A voxel (z, y, x) of the axial stack, and whether it is inside."""


@dataclass(frozen=True, eq=False)
class VolumeProposals:
    """K proposals for each of P structures.

    Attributes:
        structures: The P names asked for, in order.
        probabilities: uint8 of shape (P, K, Z, h, w) on the working grid; 255 is probability 1. Slices of zeros are
            where the structure was found absent.
        grid: Where the working grid lies in the axial stack.
        seed: Of the noise; proposal k is the same whatever K.
        num_inference_steps: Denoising steps.
        guidance_scale: 1 means no guidance.
        model_version: Name and version of the model.
        adapter: Name and version of the adapter, "" for none.
        modality: "CT" or "MR".
        modality_source: Where the modality came from, see `Volume`.
        seconds: Wall time of the computation.
        clean_up: How islands were dropped from the proposals, see `progidiff.proposals.islands`.
        pins: Structure -> voxels (z, y, x, inside) of the axial stack that a person clicked: every mask on the input's
            grid keeps them.
        calibration: What turns their agreement into a probability; None if nobody measured it.
        steering: What a person drew that they were drawn given, counted in words; "" for nothing.
    """

    structures: tuple[str, ...]
    probabilities: NDArray[Any]
    grid: WorkingGrid
    seed: int
    num_inference_steps: int
    guidance_scale: float
    model_version: str
    adapter: str
    modality: str
    modality_source: str
    seconds: float
    clean_up: str = OFF
    pins: Mapping[str, Sequence[Pin]] = field(default_factory=dict)
    calibration: Calibration | None = None
    steering: str = ""

    def __post_init__(self) -> None:
        expected = (len(self.structures), self.grid.shape[0], self.grid.height, self.grid.width)
        shape = self.probabilities.shape
        if (
            len(shape) != 5
            or (shape[0], *shape[2:]) != expected
            or shape[1] < 1
            or self.probabilities.dtype != np.uint8
        ):
            raise GeometryError(
                f"Probabilities must be uint8 of shape (P, K, Z, h, w) = ({expected[0]}, "
                f"K, {expected[1]}, {expected[2]}, {expected[3]}), got {self.probabilities.dtype} of {shape}."
            )

    @property
    def num_proposals(self) -> int:
        """K."""
        return int(self.probabilities.shape[1])

    @cached_property
    def disagreement(self) -> NDArray[Any]:
        """1 - mean pairwise Dice of the proposals, float32 of shape (P, Z); 0 where nothing is drawn, and everywhere if
        K = 1.
        """
        result = np.zeros((len(self.structures), self.grid.shape[0]), dtype=np.float32)
        for index, box in enumerate(self._boxes):
            if box is not None and self.num_proposals > 1:
                drawn = torch.from_numpy(self._drawn(index, box))
                result[index, box[0]] = compute_disagreement_per_slice(drawn).numpy()
        return result

    @cached_property
    def mean_disagreement(self) -> NDArray[Any]:
        """Mean of `disagreement` over the slices on which any proposal draws the structure, float32 of shape (P,); 0 if
        none.
        """
        drawn = self._drawn_slices
        found: NDArray[Any] = (self.disagreement * drawn).sum(1) / np.maximum(drawn.sum(1), 1)
        return found

    @cached_property
    def nearby_disagreement(self) -> NDArray[Any]:
        """Mean of `disagreement` over the slice and its two neighbours, float32 of shape (P, Z), from 0 to 1.

        It ranks slices by the error of the consensus better than the slice alone does (benchmarks/proposal_quality.py):
        all proposals may miss where a structure ends, and then it is the neighbour that they disagree about.
        """
        depth = self.grid.shape[0]
        around = np.ones(3, dtype=np.float32)
        neighbours = np.convolve(np.ones(depth, dtype=np.float32), around)[1:-1]
        return np.stack([np.convolve(values, around)[1:-1] / neighbours for values in self.disagreement])

    @cached_property
    def pairwise_dice(self) -> NDArray[Any]:
        """3-D Dice of every proposal with every other, float32 of shape (P, K, K)."""
        count = self.num_proposals
        result = np.ones((len(self.structures), count, count), dtype=np.float32)
        for index, box in enumerate(self._boxes):
            if box is not None:
                drawn = torch.from_numpy(self._drawn(index, box))
                result[index] = compute_pairwise_dice(drawn).numpy()
        return result

    @cached_property
    def ranking(self) -> tuple[tuple[int, ...], ...]:
        """Per structure the proposals 0..K-1 by mean Dice to the others, the medoid first
        (`proposals.rank_proposals`).
        """
        orders = []
        for dice in self.pairwise_dice.astype(np.float64):
            mean = (dice.sum(1) - 1) / max(1, len(dice) - 1)
            orders.append(tuple(sorted(range(len(dice)), key=lambda k, mean=mean: (-round(float(mean[k]), 6), k))))  # type: ignore[misc]
        return tuple(orders)

    @cached_property
    def volumes_ml(self) -> NDArray[Any]:
        """Volume of every proposal in millilitres, measured on the working grid, float64 of shape (P, K)."""
        voxel_ml = self.grid.spacing**2 * self.grid.stack_spacing[0] / 1000
        counts = np.zeros(self.probabilities.shape[:2])
        for index, box in enumerate(self._boxes):
            if box is not None:
                counts[index] = self._drawn(index, box).sum(axis=(1, 2, 3))
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

    def take(self, structures: Sequence[str]) -> VolumeProposals:
        """The same proposals of some of the structures, in this order. Only what holds anything is copied: on fine
        pixels the rest of a volume is gigabytes of zeros that nobody has written.
        """
        kept = np.zeros((len(structures), *self.probabilities.shape[1:]), np.uint8)
        for row, name in enumerate(structures):
            index = self._index(name)
            if (box := self._boxes[index]) is not None:
                _inside(kept[row], box)[...] = _inside(self.probabilities[index], box)
        pins = {name: pins for name, pins in self.pins.items() if name in structures}
        return replace(self, structures=tuple(structures), probabilities=kept, pins=pins)

    def drop_islands(self, clean_up: str) -> VolumeProposals:
        """The same proposals without their islands, see `progidiff.proposals.islands`; `probabilities` are changed in
        place. All slices must be there.

        Raises:
            RequestError: if there is no such clean-up.
        """
        spacing = (self.grid.stack_spacing[0], self.grid.spacing, self.grid.spacing)
        drop_islands(self.probabilities, clean_up, spacing, self.grid.covered)
        return replace(self, clean_up=clean_up)

    def mask(self, grid: Grid, structure: str, shown: str | int = "consensus") -> NDArray[Any]:
        """One structure on the input's grid.

        Args:
            grid: Of the image that the proposals were made for.
            structure: One of `structures`.
            shown: "consensus", "best" (the medoid) or the number of a proposal, 1..K.

        Returns:
            uint8 0 or 1, shape (I, J, K) in file order.

        Raises:
            RequestError: if there is no such structure or proposal.
            GeometryError: if the image has another grid.
        """
        self._check_grid(grid)
        index = self._index(structure)
        shown = check_shown(shown, self.num_proposals)
        stack = np.zeros(self.grid.shape, dtype=np.uint8)
        shown_index = None if shown == "consensus" else self._proposal(index, shown)
        for z, (rows, cols), maps in self._restored(index, None if shown_index is None else [shown_index]):
            drawn = maps >= THRESHOLD
            stack[z, rows, cols] = _count(drawn) * 2 >= len(drawn)
        return grid.from_stack(stack)

    def slice_masks(self, structure: str, z: int) -> NDArray[Any]:
        """All proposals of one structure on one axial slice of the input.

        Args:
            structure: One of `structures`.
            z: Axial index, from inferior to superior.

        Returns:
            bool of shape (K, Y, X), the same voxels as `mask` on that slice.

        Raises:
            RequestError: if there is no such structure or slice.
        """
        return self.slice_probabilities(structure, z) >= THRESHOLD

    def slice_probabilities(self, structure: str, z: int) -> NDArray[Any]:
        """What `slice_masks` cuts at one half: float32 of shape (K, Y, X) on the scale 0..255."""
        index = self._index(structure)
        depth, height, width = self.grid.shape
        if not 0 <= z < depth:
            raise RequestError(f"There is no slice {z}; the image has the axial slices 0 to {depth - 1}.")
        maps = np.zeros((self.num_proposals, height, width), dtype=np.float32)
        if self._occupied[index, z]:
            for _, (rows, cols), restored in self._restored(index, None, [z]):
                maps[:, rows, cols] = restored
        return maps

    def label_map(
        self, grid: Grid, shown: str | int = "consensus", label_ids: dict[str, int] | None = None
    ) -> NDArray[Any]:
        """All structures on the input's grid, one per voxel.

        Where several are shown on a voxel, the one with the higher agreement wins, then the one with the higher mean
        probability, then the one asked first (`proposals.resolve_overlaps`).

        Args:
            grid: Of the image that the proposals were made for.
            shown: See `mask`. "best" picks the medoid of each structure.
            label_ids: Label id 1..255 of each structure; by default 1..P in the order asked. Structures without an id
                are left out.

        Returns:
            uint8, shape (I, J, K) in file order.

        Raises:
            RequestError: if there is no such proposal or an id does not fit.
            GeometryError: if the image has another grid.
        """
        self._check_grid(grid)
        shown = check_shown(shown, self.num_proposals)
        ids = (
            label_ids
            if label_ids is not None
            else {name: position + 1 for position, name in enumerate(self.structures)}
        )
        wrong = {name: value for name, value in ids.items() if not 1 <= value <= 255}
        if wrong:
            raise RequestError(f"Label ids must be 1 to 255 to fit 8 bits, got {wrong}.")
        stack = np.zeros(self.grid.shape, dtype=np.uint8)
        chosen_structures = [index for index, name in enumerate(self.structures) if name in ids]
        if len(chosen_structures) == 1:
            mask = self.mask(grid, self.structures[chosen_structures[0]], shown)
            return mask * np.uint8(ids[self.structures[chosen_structures[0]]])
        best = np.zeros(stack.shape[1:], dtype=np.float32)
        by_slice: dict[int, list[int]] = {}
        for index in chosen_structures:
            for z in map(int, np.flatnonzero(self._occupied[index])):
                by_slice.setdefault(z, []).append(index)
        for z, present in by_slice.items():
            best[:] = 0
            for index in present:
                for _, (rows, cols), maps in self._restored(index, None, [z]):
                    drawn = maps >= THRESHOLD
                    count = _count(drawn)
                    eligible = count * 2 >= len(drawn) if shown == "consensus" else drawn[self._proposal(index, shown)]
                    # Agreement in whole proposals plus the mean probability below 1: one number that sorts by both.
                    score = count + maps.mean(0) / 256
                    wins = eligible & (score > best[rows, cols])
                    best[rows, cols][wins] = score[wins]
                    stack[z, rows, cols][wins] = ids[self.structures[index]]
        return grid.from_stack(stack)

    def agreement(self, grid: Grid, structure: str | None = None) -> NDArray[Any]:
        """Share of proposals that draw each voxel; not a calibrated probability.

        Args:
            grid: Of the image that the proposals were made for.
            structure: One of `structures`; None for the maximum over all.

        Returns:
            float32 in [0, 1], shape (I, J, K) in file order.
        """
        self._check_grid(grid)
        stack = np.zeros(self.grid.shape, dtype=np.float32)
        for index in range(len(self.structures)) if structure is None else [self._index(structure)]:
            for z, (rows, cols), maps in self._restored(index):
                share = _count(maps >= THRESHOLD).astype(np.float32) / self.num_proposals
                stack[z, rows, cols] = np.maximum(stack[z, rows, cols], share)
        return grid.from_stack(stack)

    def probability(self, grid: Grid, structure: str | None = None) -> NDArray[Any]:
        """How likely each voxel belongs to the structure, by how often such voxels did on cases that no network saw.
        Voxels that no proposal draws are 0.

        Args:
            grid: Of the image that the proposals were made for.
            structure: One of `structures`; None for the maximum over all.

        Returns:
            float32 in [0, 1], shape (I, J, K) in file order.

        Raises:
            RequestError: if the model's agreement was never compared with the truth.
        """
        if self.calibration is None:
            raise RequestError(
                f"The agreement of '{self.model_version}' was never compared with the truth, so that it is no "
                "probability; show agreement instead."
            )
        agreement = self.agreement(grid, structure)
        return np.where(agreement > 0, self.calibration.apply(agreement), np.float32(0))

    def disagreement_map(self, grid: Grid, structure: str | None = None) -> NDArray[Any]:
        """Where the proposals differ: 4 a (1 - a) of the agreement a, in percent.

        Args:
            grid: Of the image that the proposals were made for.
            structure: One of `structures`; None for the maximum over all.

        Returns:
            uint8 from 0 (all or none draw the voxel) to 100 (half of them do), shape (I, J, K) in file order.
        """
        self._check_grid(grid)
        stack = np.zeros(self.grid.shape, dtype=np.uint8)
        for index in range(len(self.structures)) if structure is None else [self._index(structure)]:
            for z, (rows, cols), maps in self._restored(index):
                share = _count(maps >= THRESHOLD).astype(np.float32) / self.num_proposals
                percent = np.rint(400 * share * (1 - share)).astype(np.uint8)
                stack[z, rows, cols] = np.maximum(stack[z, rows, cols], percent)
        return grid.from_stack(stack)

    def summary(self) -> dict[str, Any]:
        """Everything but the pictures, as plain values for JSON: settings, and per structure volumes, ranking and
        disagreement.
        """
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
                "nearby_disagreement_per_slice": [round(float(value), 4) for value in self.nearby_disagreement[index]],
            }
        found = {**self._settings(), "structures": structures}
        return found if self.calibration is None else {**found, "calibration": self.calibration.to_dict()}

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
            "clean_up": self.clean_up,
            "seconds": round(self.seconds, 3),
        }

    def to_files(self, folder: str | os.PathLike[str]) -> None:
        """Write `probabilities.npz` (the box around each structure, lightly compressed) and `proposals.json` into a
        folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        boxes = []
        with zipfile.ZipFile(folder / "probabilities.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for index, box in enumerate(self._boxes):
                boxes.append(None if box is None else [[part.start, part.stop] for part in box])
                if box is not None:
                    with archive.open(f"structure_{index}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(
                            file, np.ascontiguousarray(_inside(self.probabilities[index], box)), allow_pickle=False
                        )
        card = {
            "format": FORMAT,
            "structures": list(self.structures),
            **self._settings(),
            "seconds": self.seconds,
            "grid": self.grid.to_dict(),
            "boxes": boxes,
            **({"pins": {name: [list(pin) for pin in pins] for name, pins in self.pins.items()}} if self.pins else {}),
            **({} if self.calibration is None else {"calibration": self.calibration.to_dict()}),
            **({"steering": self.steering} if self.steering else {}),
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
                raise ImageError(
                    f"'{folder}' holds proposals in format {card['format']}, this version "
                    f"reads {FORMAT}; compute them again."
                )
            grid = WorkingGrid.from_dict(card["grid"])
            structures = tuple(str(name) for name in card["structures"])
            count = int(card["num_proposals"])
            if not 1 <= count <= MAX_PROPOSALS or len(card["boxes"]) != len(structures):
                raise ImageError(
                    f"'{folder}' is inconsistent: {count} proposals, {len(card['boxes'])} "
                    f"boxes for {len(structures)} structures."
                )
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
                                f"'{folder}' is inconsistent: '{structures[index]}' is "
                                f"{stored.dtype} of {stored.shape}, not {target.shape}."
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
                clean_up=str(card.get("clean_up", OFF)),  # proposals kept by earlier versions were not cleaned
                pins={
                    str(name): tuple((int(z), int(y), int(x), bool(inside)) for z, y, x, inside in pins)
                    for name, pins in card.get("pins", {}).items()
                },
                calibration=Calibration.from_dict(card["calibration"]) if "calibration" in card else None,
                steering=str(card.get("steering", "")),
            )
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            zipfile.BadZipFile,
        ) as err:
            raise ImageError(f"The proposals in '{folder}' cannot be read ({err}); compute them again.") from err

    @cached_property
    def _boxes(self) -> tuple[tuple[slice, slice, slice] | None, ...]:
        """Per structure the half-open box (z, row, column) of the working grid that holds everything but zeros; None if
        all are zero.
        """
        boxes: list[tuple[slice, slice, slice] | None] = []
        for structure in self.probabilities:
            footprint = np.zeros(structure.shape[1:], dtype=np.uint8)
            for proposal in structure:
                np.bitwise_or(footprint, proposal, out=footprint)
            depth = np.flatnonzero(footprint.any(axis=(1, 2)))
            if len(depth) == 0:
                boxes.append(None)
                continue
            plane = np.asarray(footprint[depth[0] : depth[-1] + 1].any(axis=0))
            rows, cols = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
            boxes.append((_span(depth), _span(rows), _span(cols)))
        return tuple(boxes)

    def _drawn(self, index: int, box: tuple[slice, slice, slice]) -> NDArray[Any]:
        """The masks inside a box of the working grid, bool (K, z, h, w). What lies beyond the edge of the image is
        nobody's organ.
        """
        found: NDArray[Any] = (_inside(self.probabilities[index], box) >= DRAWN) & self.grid.covered[box[1], box[2]]
        return found

    @cached_property
    def _drawn_slices(self) -> NDArray[Any]:
        """bool (P, Z): any proposal draws the structure on the slice."""
        result = np.zeros((len(self.structures), self.grid.shape[0]), dtype=bool)
        for index, box in enumerate(self._boxes):
            if box is not None:
                result[index, box[0]] = self._drawn(index, box).any(axis=(0, 2, 3))
        return result

    def _consensus(self, index: int) -> NDArray[Any]:
        """bool consensus on the working grid inside the structure's box; empty if the structure is absent."""
        box = self._boxes[index]
        if box is None:
            return np.zeros((0, 0, 0), dtype=bool)
        drawn = self._drawn(index, box)
        found: NDArray[Any] = drawn.sum(axis=0) * 2 >= len(drawn)
        return found

    @cached_property
    def _occupied(self) -> NDArray[Any]:
        """bool (P, Z): the structure has any probability on the slice."""
        result = np.zeros((len(self.structures), self.grid.shape[0]), dtype=bool)
        for index, box in enumerate(self._boxes):
            if box is not None:
                result[index, box[0]] = _inside(self.probabilities[index], box).any(axis=(0, 2, 3))
        return result

    @cached_property
    def _places(self) -> tuple[_Place | None, ...]:
        return tuple(None if box is None else _place_box(self.grid, box[1], box[2]) for box in self._boxes)

    def _restored(
        self, index: int, proposals: Sequence[int] | None = None, slices: Sequence[int] | None = None
    ) -> Iterator[tuple[int, tuple[slice, slice], NDArray[Any]]]:
        """A structure on the axial stack, slice by slice where it has any probability.

        Yields:
            (z, (rows, cols), maps): the axial index, the part of the slice that the maps cover, and the proposals'
            probabilities there, float32 on the scale 0..255, shape (K, y, x).
        """
        place = self._places[index]
        if place is None:
            return
        source = self.probabilities[index]
        chosen = slice(None) if proposals is None else list(proposals)
        pins = self._pins_by_slice.get(self.structures[index], {})
        for z in np.flatnonzero(self._occupied[index]) if slices is None else slices:
            rows, cols = place.rows.covered, place.cols.covered
            maps = place.resample(source[chosen, z, place.rows.window, place.cols.window])
            for y, x, inside in pins.get(int(z), ()):
                if rows.start <= y < rows.stop and cols.start <= x < cols.stop:
                    maps[:, y - rows.start, x - cols.start] = 255.0 if inside else 0.0
            yield int(z), (rows, cols), maps

    @cached_property
    def _pins_by_slice(self) -> dict[str, dict[int, list[tuple[int, int, bool]]]]:
        found: dict[str, dict[int, list[tuple[int, int, bool]]]] = {}
        for name, pins in self.pins.items():
            for z, y, x, inside in pins:
                found.setdefault(name, {}).setdefault(z, []).append((y, x, inside))
        return found

    def keep_pins(self) -> None:
        """Have every proposal draw what a person clicked as inside, in place: a voxel far from the rest too."""
        for name, pins in self.pins.items():
            index = self.structures.index(name)
            for z, y, x, inside in pins:
                row, column = self.grid.find_pixel(y, x)
                if inside and 0 <= row < self.grid.height and 0 <= column < self.grid.width:
                    self.probabilities[index, :, z, row, column] = 255

    def _index(self, structure: str) -> int:
        if structure not in self.structures:
            raise RequestError(
                f"These proposals hold no '{structure}'; they hold "
                f"{', '.join(self.structures)}. Send a prompt that asks for it."
            )
        return self.structures.index(structure)

    def _proposal(self, index: int, shown: str | int) -> int:
        return self.ranking[index][0] if shown == "best" else int(shown) - 1

    def _check_grid(self, grid: Grid) -> None:
        shape = grid.stack_shape
        if tuple(shape) != self.grid.shape:
            raise GeometryError(
                f"These proposals were made for an axial stack of {self.grid.shape}, the "
                f"image '{grid.name}' has {tuple(shape)}."
            )


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


def _span(positions: NDArray[Any]) -> slice:
    return slice(int(positions[0]), int(positions[-1]) + 1)


def _inside(maps: NDArray[Any], box: tuple[slice, slice, slice]) -> NDArray[Any]:
    """The view of (K, Z, h, w) inside a box."""
    return maps[:, box[0], box[1], box[2]]


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along one axis: stack pixel `covered.start + n` lies between two window pixels."""

    window: slice
    covered: slice
    lower: NDArray[Any]
    upper: NDArray[Any]
    weight: NDArray[Any]


@dataclass(frozen=True)
class _Place:
    """Where a box of the working grid lies in the axial stack."""

    rows: _Axis
    cols: _Axis

    def resample(self, maps: NDArray[Any]) -> NDArray[Any]:
        """The same bilinear lookup as `WorkingGrid.restore_slices`, one axis after the other: (K, h, w) -> float32 (K,
        y, x).
        """
        # In NumPy and slice by slice: the arrays fit the cache, and nothing waits for threads on a busy machine.
        rows = _interpolate(maps.astype(np.float32), self.rows)
        # Columns as rows: gathering whole rows is several times faster than single elements.
        return _interpolate(np.ascontiguousarray(rows.transpose(0, 2, 1)), self.cols).transpose(0, 2, 1)


def _interpolate(maps: NDArray[Any], axis: _Axis) -> NDArray[Any]:
    """(K, window, m) -> (K, covered, m)."""
    lower = maps.take(axis.lower, axis=1)
    difference = maps.take(axis.upper, axis=1)
    difference -= lower
    difference *= axis.weight
    lower += difference
    return lower


def _count(drawn: NDArray[Any]) -> NDArray[Any]:
    """How many proposals draw each pixel: bool (K, y, x) -> uint8 (y, x)."""
    count: NDArray[Any] = drawn[0].astype(np.uint8)
    for proposal in drawn[1:]:
        count += proposal
    return count


def _place_box(grid: WorkingGrid, rows: slice, cols: slice) -> _Place | None:
    """Place the rows and columns of a box, with one pixel of zeros on each side; None if it covers no pixel of the
    stack.
    """
    along_rows = _place_axis(rows, grid.height, grid.center[0], grid.spacing, grid.stack_spacing[1], grid.shape[1])
    along_cols = _place_axis(cols, grid.width, grid.center[1], grid.spacing, grid.stack_spacing[2], grid.shape[2])
    return None if along_rows is None or along_cols is None else _Place(along_rows, along_cols)


def _place_axis(
    part: slice, window_count: int, center: float, spacing: float, stack_spacing: float, stack_count: int
) -> _Axis | None:
    """Stack pixels whose middles lie in the part of the window, and the window pixels between which they lie."""
    window = slice(max(0, part.start - 1), min(window_count, part.stop + 1))
    low = center - window_count * spacing / 2 + window.start * spacing
    high = low + (window.stop - window.start) * spacing
    first = max(0, int(np.ceil(low / stack_spacing - 0.5)))
    last = min(stack_count, int(np.floor(high / stack_spacing - 0.5)) + 1)
    if last <= first:
        return None
    position = ((np.arange(first, last) + 0.5) * stack_spacing - low) / spacing - 0.5
    position = position.clip(0, window.stop - window.start - 1)
    lower = np.floor(position).astype(np.int64)
    return _Axis(
        window=window,
        covered=slice(first, last),
        lower=lower,
        upper=np.minimum(lower + 1, window.stop - window.start - 1),
        weight=(position - lower).astype(np.float32)[:, None],
    )
