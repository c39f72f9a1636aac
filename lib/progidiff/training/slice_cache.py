"""Slices for training: resampled once to the working grid, kept as uint8 files, read when they are drawn.

Memory does not grow with the number of volumes, but for a few bytes per slice that say what it shows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from progidiff.errors import ImageError
from progidiff.images.formats import strip_suffix
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.reading import load_volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.cases import LabelledCase, list_labelled, load_label_names
from progidiff.labels.segments import load_label_map
from progidiff.model.conditioning import ConditioningConfig
from progidiff.storage.atomic import atomic_folder
from progidiff.training.processes import Team

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case(LabelledCase):
    """One labelled volume and what its labels mean.

    Attributes:
        structures: label id -> structure name.
        annotated: structure name -> axial slices on which somebody said where it is or that it is not there, None for
            all of them; under "" the slices that count for every structure of the table. None: every structure on every
            slice.
        info: What a datastore knows about the image, for its modality.
        names_all: Whether a name of the table that the label does not show is absent; otherwise nothing is known about
            it.
    """

    structures: dict[int, str]
    annotated: Mapping[str, frozenset[int] | None] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    names_all: bool = True

    def is_annotated(self, structure: str, count: int) -> NDArray[Any]:
        """On which of `count` axial slices the label speaks about a structure, bool (Z,)."""
        in_table = structure in self.structures.values()
        if self.annotated is None:
            return np.full(count, in_table)
        spoken = np.zeros(count, bool)
        for name in {structure, *([""] if in_table else [])} & set(self.annotated):
            slices = self.annotated[name]
            spoken |= True if slices is None else np.isin(np.arange(count), sorted(slices))
        return spoken


def list_cases(studies: Path, names: Iterable[str] | None = None) -> list[Case]:
    """The volumes of a local datastore that have a final label.

    Args:
        studies: Folder with images, ``labels/final/`` and ``labels.json`` (label id -> structure name).
        names: Only these cases, with or without file suffix, in this order.

    Raises:
        RequestError: if the folder, its labels.json or a named case is missing.
    """
    structures = load_label_names(studies)
    wanted = None if names is None else [strip_suffix(name) for name in names]
    found = {c.name: Case(c.name, c.image, c.label, structures) for c in list_labelled(studies, wanted)}
    return [found[name] for name in wanted or found]


class SliceFile:
    """A uint8 array (Z, H, W) on disk, in NumPy's format.

    It is mapped for the moment of a read only: pages of a lasting map stay resident once they were touched, and after
    an epoch that is the whole pool.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        self.shape: tuple[int, ...] = mapped.shape
        self._path, self._offset = path, mapped.offset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, slices: Any) -> NDArray[Any]:
        return np.array(np.memmap(self._path, np.uint8, "r", self._offset, self.shape)[slices])


class SliceCache:
    """Working-grid slices of some cases, with labels renumbered to 1..len(structures) by name.

    Args:
        cases: The labelled volumes.
        structures: Names in the order of the label ids used here; others are background.
        config: Decides the working grid.
        folder: Where the uint8 files are kept; a case is prepared once per content and configuration.
        supersampling: Labels have so many pixels per pixel of the image, along both axes, so that `compute_area_shares`
            knows how much of a pixel a structure covers: as whole pixels of about 2 mm an adrenal gland has a ceiling
            of 0.85 Dice, as shares 0.95.
        team: The processes that share the preparation, all of which call this; None for this one alone.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        structures: Sequence[str],
        config: ConditioningConfig,
        folder: Path,
        supersampling: int = 1,
        team: Team | None = None,
    ) -> None:
        self.structures = tuple(structures)
        self.config = config
        self.supersampling = supersampling
        self.images: list[SliceFile] = []
        self.labels: list[SliceFile] = []
        self.names: list[str] = []
        self.digests: dict[str, str] = {}
        steps: list[int] = []
        present: list[NDArray[Any]] = []
        spoken: list[NDArray[Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        team = team or Team()
        own = {case.name: self._prepare(case, folder) for case in team.share(cases)}
        prepared = {name: place for part in team.gather(own) for name, place in part.items()}
        for case in cases:
            path, digest = prepared[case.name]
            self.images.append(SliceFile(path / "image.npy"))
            self.labels.append(SliceFile(path / "label.npy"))
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            steps.append(max(1, round(config.neighbour_mm / meta["dz"])))
            spoken.append(np.stack([case.is_annotated(s, len(meta["pixels"])) for s in self.structures], axis=1))
            # What nobody vouched for is neither drawn for nor counted.
            present.append(np.array(meta["pixels"], dtype=np.int64) * spoken[-1])
            self.names.append(case.name)
            self.digests[case.name] = digest
        self.steps = steps
        # pixels[v][z, s]: how much of structure s slice z of volume v holds; what balanced drawing needs.
        self.pixels = present
        # annotated[v][z, s]: whether the label of volume v speaks about structure s on slice z.
        self.annotated = spoken
        self.index = [(v, z) for v, p in enumerate(spoken) for z in range(len(p)) if p[z].any()]
        self.by_structure = [
            np.array([i for i, (v, z) in enumerate(self.index) if present[v][z, s] > 0], dtype=np.int64)
            for s in range(len(self.structures))
        ]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read slices with their neighbours.

        Args:
            chosen: N positions in `index`.

        Returns:
            float32 images (N, C, H, W) in [-1, 1] and int64 labels (N, s H, s W), s = `supersampling`.
        """
        images, labels = self.read_bytes(chosen)
        return images.float().div_(127.5).sub_(1), labels.long()

    def read_bytes(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read slices with their neighbours as they are kept, a quarter of the size.

        Args:
            chosen: N positions in `index`.

        Returns:
            uint8 images (N, C, H, W) in 0..255 and uint8 labels (N, s H, s W), s = `supersampling`.
        """
        channels = 2 * self.config.num_neighbours + 1
        height, width = self.config.height, self.config.width
        images = np.empty((len(chosen), channels, height, width), np.uint8)
        labels = np.empty((len(chosen), height * self.supersampling, width * self.supersampling), np.uint8)
        for n, i in enumerate(chosen):
            v, z = self.index[i]
            offsets = self.steps[v] * np.arange(-self.config.num_neighbours, self.config.num_neighbours + 1)
            images[n] = self.images[v][np.clip(z + offsets, 0, len(self.images[v]) - 1)]
            labels[n] = self.labels[v][z]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def weigh(self, chosen: Sequence[int]) -> Tensor:
        """1 where a label speaks about a structure of a slice, else 0: float32 (N, len(structures))."""
        return torch.from_numpy(np.stack([self.annotated[v][z] for v, z in (self.index[i] for i in chosen)])).float()

    def draw_balanced(self, count: int, rng: np.random.Generator, random_share: float = 0.15) -> list[int]:
        """Draw slices so that small structures are seen as often as large ones.

        A structure is drawn uniformly, then one of its slices; `random_share` of the slices are drawn from everything,
        so that slices without any structure are seen too.
        """
        usable = [s for s, slices in enumerate(self.by_structure) if len(slices)]
        if not usable:
            raise ImageError(
                "None of the training labels holds a structure; accept at least one label that is not empty."
            )
        chosen = []
        for _ in range(count):
            if rng.random() < random_share:
                chosen.append(int(rng.integers(len(self.index))))
            else:
                chosen.append(int(rng.choice(self.by_structure[usable[rng.integers(len(usable))]])))
        return chosen

    def _prepare(self, case: Case, folder: Path) -> tuple[Path, str]:
        config = self.config
        digest = hashlib.sha256()
        for path in (case.image, case.label):
            digest.update(_hash_content(path))
        content = digest.hexdigest()
        parts = (
            self.structures,
            sorted(case.structures.items()),
            sorted(case.info.items()),
            config.height,
            config.width,
            config.spacing_range,
            2,
        )
        # Settings that came later must not make what was prepared before them stale.
        later: dict[str, float] = {}
        if config.mr_headroom != 1:
            later["mr_headroom"] = config.mr_headroom
        if self.supersampling != 1:
            later["supersampling"] = self.supersampling
        described = (*parts, config.mr_headroom) if list(later) == ["mr_headroom"] else (*parts, *sorted(later.items()))
        digest.update(repr(described).encode())
        target = folder / f"{case.name}-{digest.hexdigest()[:16]}"
        if (target / "meta.json").is_file():
            os.utime(target / "meta.json")  # Says when it was used last.
            return target, content
        volume = load_volume(case.image, info=case.info)
        stack, spacing = volume.to_stack()
        grid = plan_working_grid(
            stack, spacing, compute_body_threshold(volume), config.height, config.width, config.spacing_range
        )
        raw = load_label_map(case.label, volume.grid).array
        table = np.zeros(max(int(raw.max()), *case.structures) + 1, np.uint8)
        for value, name in case.structures.items():
            if name in self.structures:
                table[value] = self.structures.index(name) + 1
        label_stack = volume.arrange(table[raw])
        window = compute_window(volume, config.mr_headroom)
        finer = grid.refine(self.supersampling)
        indices = np.arange(len(stack))
        images, labels = [], []
        for start in range(0, len(stack), 32):
            part = indices[start : start + 32]
            pixels = grid.extract_slices(stack, part, window, 0, config.neighbour_mm)[:, 0]
            images.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
            labels.append(finer.extract_labels(label_stack, part, len(self.structures)).numpy())
        image, label = np.concatenate(images), np.concatenate(labels)
        pixels_per_slice = np.stack([(label == s + 1).sum(axis=(1, 2)) for s in range(len(self.structures))], axis=1)
        # Rounded up: a structure of a single fine pixel is there.
        pixels_per_slice = -(-pixels_per_slice // self.supersampling**2)
        # Kept if it is there: another process prepared the same case first.
        with atomic_folder(target, existing="keep", durable=False) as scratch:
            np.save(scratch / "image.npy", image)
            np.save(scratch / "label.npy", label)
            (scratch / "meta.json").write_text(
                json.dumps({"dz": spacing[0], "pixels": pixels_per_slice.tolist(), "grid": grid.to_dict()}),
                encoding="utf-8",
            )
        return target, content


def _hash_content(path: Path) -> bytes:
    """SHA-256 of a file, or of the files of a folder that holds one DICOM series."""
    if path.is_dir():
        return hashlib.sha256(
            b"".join(_hash_content(file) for file in sorted(path.iterdir()) if file.is_file())
        ).digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
