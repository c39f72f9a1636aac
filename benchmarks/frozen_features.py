"""Pixels of labelled slices as the frozen image encoder of a model sees them, computed once and kept: what
`active_learning.py` learns from.

A slice is scaled to the canvas of its task and runs through the encoder with its neighbours at 4 mm. Every level of
the encoder is brought back to the canvas, standardised, weighted so that all levels count alike, and projected to
`COMPONENTS` principal components; their basis comes from the images of the pilot patients, without labels. The grey
value and the place on the canvas are appended.

Three kinds of pixels are kept of every slice:

* *train*: some of every structure and of the background, near it and far from it, each with the number of pixels
  that it stands for;
* *grid*: a regular grid, whatever the truth is: what a strategy may look at;
* *test*: a share of the pixels in and around the structures and a smaller one of the rest, with weights: a Dice of
  these estimates the Dice of all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from progidiff.model.adapters import compute_base_digest
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ImageEncoder
from progidiff.model.folder import load_pipeline

FORMAT = 1
"""Of the kept files; raised when a change of this script changes them."""

COMPONENTS = 96
PER_STRUCTURE = 32
"""Training pixels of a structure on a slice."""

BACKGROUND = 80
"""Training pixels of the background of a slice: half of them near structures, where there are any."""

NEAR = 6
"""Pixels around a structure that count as near."""

NEIGHBOUR_MM = 4.0


@dataclass(frozen=True)
class Task:
    """What is learned, and how patients are shared out.

    Attributes:
        name: "heart", "hippocampus", "lidc" or "mr".
        structures: Names, in the order of the labels 1, 2, ...
        canvas: Height and width in pixels that a slice is scaled to; multiples of 32.
        view: Share of height and width that is looked at, around the middle.
        grid_step: Distance of the pixels of the grid.
        near_share, far_share: Of so many test pixels, in and around structures and far from them, one is kept.
        slice_step: Of so many slices of a volume one is there.
        patients: In one pool.
        groups: Pools of one repetition; they have no patient in common.
        repetitions: Shares of the patients, drawn anew.
        test_patients: Outside the pool, at most so many.
        measured_patients: Whom pools and tests are drawn from.
        pilot_patients: Set aside; settings are chosen on them and on nobody else.
        pictures: Every slice is an image by itself, without neighbours.
    """

    name: str
    structures: tuple[str, ...]
    canvas: tuple[int, int]
    view: float
    grid_step: int
    near_share: int
    far_share: int
    slice_step: int
    patients: int
    groups: int
    repetitions: int
    test_patients: int
    measured_patients: int
    pilot_patients: int
    pictures: bool = False

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


TASKS = {
    "heart": Task(
        "heart",
        ("right ventricle", "left ventricular myocardium", "left ventricle"),
        canvas=(128, 160),
        view=0.7,
        grid_step=5,
        near_share=4,
        far_share=48,
        slice_step=1,
        patients=16,
        groups=3,
        repetitions=10,
        test_patients=32,
        measured_patients=48,
        pilot_patients=12,
    ),
    "hippocampus": Task(
        "hippocampus",
        ("anterior hippocampus", "posterior hippocampus"),
        canvas=(64, 96),
        view=1.0,
        grid_step=3,
        near_share=2,
        far_share=8,
        slice_step=2,
        patients=12,
        groups=3,
        repetitions=10,
        test_patients=24,
        measured_patients=60,
        pilot_patients=12,
    ),
    "lidc": Task(
        "lidc",
        ("lung nodule",),
        canvas=(96, 96),
        view=1.0,
        grid_step=4,
        near_share=2,
        far_share=12,
        slice_step=1,
        patients=16,
        groups=3,
        repetitions=10,
        test_patients=30,
        measured_patients=80,
        pilot_patients=16,
        pictures=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Patient:
    """One patient's slices as arrays; M test pixels, Z slices, D features.

    Attributes:
        name: Of the image.
        slice_mm: Distance of the slices that are there.
        train: float16 (Z, T, D), with `train_labels` uint8 (Z, T) and `train_weights` float32 (Z, T); weight 0 where a
            slice has fewer pixels to give.
        grid: float16 (Z, h * w, D) and its `grid_shape`.
        test: float16 (M, D), with `test_labels` uint8 (M,) and `test_weights` float32 (M,).
        test_slices: int16 (M,): the slice of every test pixel.
        areas: float32 (Z, P): pixels of every structure.
        contours: float32 (Z,): length of all outlines, in pixels.
    """

    name: str
    slice_mm: float
    train: NDArray[np.float16]
    train_labels: NDArray[np.uint8]
    train_weights: NDArray[np.float32]
    grid: NDArray[np.float16]
    grid_shape: tuple[int, int]
    test: NDArray[np.float16]
    test_labels: NDArray[np.uint8]
    test_weights: NDArray[np.float32]
    test_slices: NDArray[np.int16]
    areas: NDArray[np.float32]
    contours: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Volume:
    """Slices on the canvas.

    Attributes:
        name: Of the image.
        images: float32 (Z, C, H, W) in [-1, 1], with neighbours.
        labels: uint8 (Z, H, W).
        slice_mm: Distance of the slices.
    """

    name: str
    images: NDArray[np.float32]
    labels: NDArray[np.uint8]
    slice_mm: float


def list_patients(task: Task, data: Path) -> list[str]:
    """Names of the patients of a task, in an order that says nothing about them."""
    if task.name == "lidc":
        with np.load(data / "lidc" / "lidc.npz") as table:
            names = [f"{number:04d}" for number in np.unique(table["key"][:, 0])]
    else:
        names = [path.name for path in sorted((data / task.name).glob("*.nii.gz"))]
    return sorted(names, key=lambda name: hashlib.sha256(f"{task.name}:{name}".encode()).digest())


def read_volumes(task: Task, data: Path, names: Sequence[str], neighbours: int) -> Iterator[Volume]:
    """The patients of a task, one after the other."""
    if task.name == "lidc":
        yield from _read_nodules(task, data, names, neighbours)
        return
    for name in names:
        image = nib.load(data / task.name / name)
        grey = np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)
        label = np.asarray(nib.load(data / task.name / "labels" / "final" / name).dataobj).astype(np.uint8)
        low, high = np.percentile(grey, [1, 99])
        grey = np.clip((grey - low) / max(high - low, 1e-6), 0, 1) * 2 - 1
        distance = float(image.header.get_zooms()[2])
        slices = np.arange(task.slice_step // 2, len(grey), task.slice_step)
        channels = [
            _between(grey, slices + step * NEIGHBOUR_MM / distance) for step in range(-neighbours, neighbours + 1)
        ]
        stacked, labels = _fit(np.stack(channels, 1), label.transpose(2, 1, 0)[slices], task)
        yield Volume(name, stacked, labels, distance * task.slice_step)


def _read_nodules(task: Task, data: Path, names: Sequence[str], neighbours: int) -> Iterator[Volume]:
    with np.load(data / "lidc" / "lidc.npz") as table:
        key, images, packed = table["key"], table["images"], table["masks_packed"]
    for name in names:
        rows = np.flatnonzero(key[:, 0] == int(name))
        readers = np.unpackbits(packed[rows], axis=-1).sum(axis=1)
        grey = images[rows].astype(np.float32) / 127.5 - 1
        stacked = np.repeat(grey[:, None], 2 * neighbours + 1, axis=1)
        yield Volume(name, *_fit(stacked, (readers >= 2).astype(np.uint8), task), slice_mm=1.0)  # what two of four drew


def _between(grey: NDArray[np.float32], places: NDArray[np.float64]) -> NDArray[np.float32]:
    """Slices at places between slices, by straight lines."""
    inside = np.clip(places, 0, len(grey) - 1)
    low = np.floor(inside).astype(int)
    high = np.minimum(low + 1, len(grey) - 1)
    share = (inside - low).astype(np.float32)[:, None, None]
    return grey[low] * (1 - share) + grey[high] * share


def _fit(
    images: NDArray[np.float32], labels: NDArray[np.uint8], task: Task
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """What is in view, scaled to the canvas by one factor for both axes, in the middle of it; black around it."""
    canvas = task.canvas
    cuts = [round(length * (1 - task.view) / 2) for length in labels.shape[1:]]
    inside = (..., *(slice(cut, length - cut) for cut, length in zip(cuts, labels.shape[1:], strict=True)))
    images, labels = np.ascontiguousarray(images[inside]), np.ascontiguousarray(labels[inside])
    factor = min(canvas[0] / labels.shape[1], canvas[1] / labels.shape[2])
    size = [min(canvas[axis], round(labels.shape[axis + 1] * factor)) for axis in (0, 1)]
    top, left = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    grown = np.full((*images.shape[:2], *canvas), -1, np.float32)
    area = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    grown[area] = F.interpolate(torch.from_numpy(images), size, mode="bilinear", antialias=factor < 1).numpy()
    drawn = np.zeros((len(labels), *canvas), np.uint8)
    drawn[area] = F.interpolate(torch.from_numpy(labels)[:, None].float(), size, mode="nearest-exact")[:, 0].numpy()
    return grown, drawn


class Projection:
    """From the levels of the encoder to D features of a pixel.

    Args:
        encoder: Stays as it is.
        images: Of the pilot patients, (N, C, H, W): what the basis is from.
    """

    def __init__(self, encoder: ImageEncoder, images: NDArray[np.float32]) -> None:
        self._encoder = encoder.eval()
        rng = np.random.default_rng(0)
        chosen = images[rng.permutation(len(images))[:48]]
        rows = []
        for part in np.array_split(chosen, max(1, len(chosen) // 8)):
            levels = self._encode(part)
            full = torch.cat([_grow(level, part.shape[-2:]) for level in levels], 1).flatten(2).transpose(1, 2)
            pixels = rng.permutation(full.shape[1])[:400]
            rows.append(full[:, pixels].flatten(0, 1))
        sample = torch.cat(rows)
        widths = [level.shape[1] for level in levels]
        self._mean, deviation = sample.mean(0), sample.std(0) + 1e-6
        scale = 1 / deviation / torch.cat([torch.full((w,), w**0.5) for w in widths])
        centred = (sample - self._mean) * scale
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        best = torch.argsort(values, descending=True)[:COMPONENTS]
        # Half whitened: strong components stay stronger, but not as strong as they are.
        self._basis = (scale[:, None] * vectors[:, best] / (values[best] ** 0.25 + 1e-6)).split(widths)
        self._offset = (self._mean @ torch.cat(self._basis)).reshape(1, -1, 1, 1)

    def _encode(self, images: NDArray[np.float32]) -> list[torch.Tensor]:
        fast = torch.cpu._is_avx512_bf16_supported()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            levels = self._encoder(torch.from_numpy(images))
        return [level.float() for level in levels]

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, H, W) -> (N, D, H, W)."""
        size = images.shape[-2:]
        rows, columns = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij")
        place = np.stack([rows, columns, rows**2, columns**2, rows * columns]).astype(np.float32)
        found = []
        for start in range(0, len(images), 4):
            part = images[start : start + 4]
            total: torch.Tensor | None = None
            for level, basis in reversed(list(zip(self._encode(part), self._basis, strict=True))):
                thin = F.conv2d(level, basis.T[..., None, None].contiguous())
                total = thin if total is None else thin.add_(_grow(total, level.shape[-2:]))
            assert total is not None
            spread = np.broadcast_to(place, (len(part), *place.shape))
            found.append(np.concatenate([total.sub_(self._offset).numpy(), part[:, [part.shape[1] // 2]], spread], 1))
        return np.concatenate(found)


def _grow(level: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(level, tuple(size), mode="bilinear", align_corners=False)


def sample_pixels(volume: Volume, features: NDArray[np.float32], task: Task) -> Patient:
    """The three kinds of pixels of a volume."""
    rng = np.random.default_rng(list(volume.name.encode()))
    depth, count = len(volume.labels), PER_STRUCTURE * len(task.structures) + BACKGROUND
    width = features.shape[1]
    train = np.zeros((depth, count, width), np.float16)
    train_labels, train_weights = np.zeros((depth, count), np.uint8), np.zeros((depth, count), np.float32)
    areas, contours = np.zeros((depth, len(task.structures)), np.float32), np.zeros(depth, np.float32)
    tests: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    for z, label in enumerate(volume.labels):
        flat = label.ravel()
        near = ndimage.binary_dilation(label > 0, iterations=NEAR).ravel() & (flat == 0)
        far = ~near & (flat == 0)
        parts = [(np.flatnonzero(flat == s + 1), PER_STRUCTURE) for s in range(len(task.structures))]
        parts += [(np.flatnonzero(near), BACKGROUND // 2), (np.flatnonzero(far), BACKGROUND // 2)]
        at = 0
        for pixels, most in parts:
            chosen = rng.permutation(pixels)[:most]
            here = slice(at, at + len(chosen))
            train[z, here], train_labels[z, here] = features[z].reshape(width, -1)[:, chosen].T, flat[chosen]
            train_weights[z, here] = len(pixels) / max(1, len(chosen))
            at += len(chosen)
        areas[z] = [len(pixels) for pixels, _ in parts[: len(task.structures)]]
        for s in range(1, len(task.structures) + 1):
            mask = np.pad(label == s, 1)
            contours[z] += (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
        groups = [
            (pixels, rng.permutation(pixels)[: max(1, len(pixels) // share)])
            for pixels, share in ((np.flatnonzero(~far), task.near_share), (np.flatnonzero(far), task.far_share))
            if len(pixels)
        ]
        weights = np.concatenate([np.full(len(some), len(pixels) / len(some), np.float32) for pixels, some in groups])
        tests.append((np.concatenate([some for _, some in groups]), weights))
    step = task.grid_step
    grid = features[:, :, step // 2 :: step, step // 2 :: step]
    flat_features = features.reshape(depth, width, -1)
    return Patient(
        volume.name,
        volume.slice_mm,
        train,
        train_labels,
        train_weights,
        grid.reshape(depth, width, -1).transpose(0, 2, 1).astype(np.float16),
        (grid.shape[2], grid.shape[3]),
        np.concatenate([flat_features[z][:, pixels].T for z, (pixels, _) in enumerate(tests)]).astype(np.float16),
        np.concatenate([volume.labels[z].ravel()[pixels] for z, (pixels, _) in enumerate(tests)]),
        np.concatenate([weights for _, weights in tests]),
        np.concatenate([np.full(len(pixels), z, np.int16) for z, (pixels, _) in enumerate(tests)]),
        areas,
        contours,
    )


class Patients:
    """The patients of a task, computed when they are not kept yet.

    Args:
        task: Which.
        data: Folder with the data sets.
        model_dir: Whose encoder it is.
        work: Where they are kept.
    """

    def __init__(self, task: Task, data: Path, model_dir: Path, work: Path) -> None:
        self.task = task
        self.names = list_patients(task, data)
        settings = [
            FORMAT,
            task.name,
            task.canvas,
            task.view,
            task.grid_step,
            task.near_share,
            task.far_share,
            task.slice_step,
            COMPONENTS,
            PER_STRUCTURE,
            BACKGROUND,
        ]
        self.digest = compute_base_digest(model_dir)
        parts = json.dumps([settings, self.digest, task.pilot_patients])
        self.key = hashlib.sha256(parts.encode()).hexdigest()[:12]
        self._folder = work / f"features-{task.name}-{self.key}"
        self._data, self._model_dir = data, model_dir
        self._loaded: dict[str, Patient] = {}

    @property
    def pilot(self) -> list[str]:
        """Patients that no measured pair has."""
        return self.names[: self.task.pilot_patients]

    @property
    def measured(self) -> list[str]:
        """Those that pools and tests are drawn from."""
        task = self.task
        return self.names[task.pilot_patients : task.pilot_patients + task.measured_patients]

    def prepare(self, names: Sequence[str]) -> None:
        """Compute what is missing of these."""
        missing = [name for name in names if not self._file(name).is_file()]
        if not missing:
            return
        _, pipeline = load_pipeline(self._model_dir, Backbone(self._model_dir / "backbone", "cpu"), None)
        neighbours = pipeline.branch.config.num_neighbours
        basis = list(read_volumes(self.task, self._data, self.pilot[:24], neighbours))
        project = Projection(pipeline.branch.encoder, np.concatenate([volume.images for volume in basis]))
        self._folder.mkdir(parents=True, exist_ok=True)
        for volume in read_volumes(self.task, self._data, missing, neighbours):
            patient = sample_pixels(volume, project(volume.images), self.task)
            scratch = self._folder / f".{volume.name}.npz"
            np.savez(scratch, **_as_arrays(patient))
            scratch.replace(self._file(volume.name))

    def load(self, name: str) -> Patient:
        """One of them, from memory if it was asked for before."""
        if name not in self._loaded:
            self.prepare([name])
            with np.load(self._file(name)) as arrays:
                self._loaded[name] = _from_arrays(name, arrays)
        return self._loaded[name]

    def forget(self) -> None:
        """Free the memory."""
        self._loaded.clear()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.npz"


def _as_arrays(patient: Patient) -> dict[str, NDArray[np.generic]]:
    values = {name: value for name, value in vars(patient).items() if name != "name"}
    return {name: np.asarray(value) for name, value in values.items()}


def _from_arrays(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> Patient:
    values = {key: arrays[key] for key in Patient.__dataclass_fields__ if key != "name"}
    values["slice_mm"], values["grid_shape"] = float(values["slice_mm"]), tuple(int(n) for n in values["grid_shape"])
    return Patient(name, **values)
