"""What the infer tasks answer beside the mask: the fields that volumes, slices and pictures share, and each kind's own.

MONAI Label sends them as the `params` of its answer; the routes describe them by these models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from progidiff.errors import RequestError
from progidiff.images.geometry import Grid
from progidiff.proposals.keeper import Answer
from progidiff.proposals.request import AGREEMENT, DISAGREEMENT, PROBABILITY, AnswerOptions
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.answer_files import write_temporary
from progidiff.server.datastores.proposal_labels import save_as_labels

BANDS = ("up to 25 %", "25 to 50 %", "50 to 75 %", "over 75 %")
"""Labels 1..4 of the maps that `show=disagreement` and `show=agreement` give: viewers draw label maps, and four shades
say more than a hundred segments.
"""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latencies(_Model):
    """Seconds.

    Attributes:
        total: From the request to the answer, without its sending.
        compute: Of the model; 0 for what was kept.
    """

    total: float
    compute: float


class Geometry(_Model):
    """Where the image lies, see `Grid.describe`.

    Attributes:
        reading: What of the header was taken; "file" where there is no choice.
        warnings: What is ambiguous about it, as sentences.
    """

    reading: str
    warnings: list[str]


class ShownAnswer(_Model):
    """What every answer with proposals says.

    Attributes:
        label_names: Name -> label id of what the mask holds, ascending by id.
        show: What the mask shows: "consensus", "best", "1".."K", "disagreement", "agreement" or "probability".
        num_proposals: K.
        model_version: ``name@version``.
        modality: Of the image.
        proposals: The key of the result; None if it is not kept on disk.
        cached: Whether it was kept.
        job: Id of the job that computed it; None if it was kept.
        saved_original: The image whose label `original` was saved; None for none.
        saved_tags: The tags that were saved.
        ignored: Parameters of the request that mean nothing here.
        geometry: Where the image lies.
        warnings: What to know before trusting the answer, as sentences.
        seconds: What the computation took, also if it was long ago.
        latencies: What this request took.
    """

    label_names: dict[str, int]
    show: str
    num_proposals: int
    model_version: str
    modality: str
    proposals: str | None
    cached: bool
    job: str | None
    saved_original: str | None
    saved_tags: list[str]
    ignored: list[str]
    geometry: Geometry
    warnings: list[str]
    seconds: float
    latencies: Latencies


class StructureNumbers(_Model):
    """One structure of a volume.

    Attributes:
        present: Whether the consensus draws it.
        consensus_ml, proposals_ml: Volumes in millilitres.
        best: Number of the medoid, from 1.
        ranking: Numbers of the proposals, the most central first.
        mean_disagreement: Over the slices on which anything is drawn, 0 to 1.
        disagreement_per_slice, nearby_disagreement_per_slice: Per axial slice from inferior to superior, 0 to 1.
    """

    present: bool
    consensus_ml: float
    proposals_ml: list[float]
    best: int
    ranking: list[int]
    mean_disagreement: float
    disagreement_per_slice: list[float]
    nearby_disagreement_per_slice: list[float]


class CalibrationCurve(_Model):
    """What turns an agreement into a probability: straight lines between these points."""

    agreements: list[float]
    probabilities: list[float]


class Summary(_Model):
    """What `VolumeProposals.summary` says: settings, numbers per structure, and what turns agreement into a
    probability; null where nobody compared it with the truth.
    """

    num_proposals: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    model_version: str
    adapter: str
    modality: str
    modality_source: str
    clean_up: str
    seconds: float
    structures: dict[str, StructureNumbers]
    calibration: CalibrationCurve | None = None


class VolumeAnswer(ShownAnswer, Summary):
    """Parameters of an answer of the task `progidiff`.

    Attributes:
        shown_ml: Name -> millilitres in the mask.
        prompt: As it was understood.
        slice_axis: How slices are counted.
    """

    shown_ml: dict[str, float]
    prompt: str
    slice_axis: str


class DrawNumbers(_Model):
    """One class of a picture.

    Attributes:
        consensus_pixels, proposals_pixels: Areas.
        best: Number of the medoid, from 1.
        ranking: Numbers of the draws, the most central first.
        agreement: Mean share of draws over the pixels that any draw marks; 1 if none does.
        disagreement: 1 - mean pairwise Dice of the draws.
    """

    consensus_pixels: int
    proposals_pixels: list[int]
    best: int
    ranking: list[int]
    agreement: float
    disagreement: float


class PictureAnswer(ShownAnswer):
    """Parameters of an answer of the task `textdiff`.

    Attributes:
        shown_pixels: Name -> pixels in the mask.
        model: ``name@version`` of the head.
        sentence: That was read; "" for none.
        sentence_from: "request", "text.csv" or "none".
        slice: Axial index; None for a picture.
        slices: The axial indices that the mask covers.
        timesteps: How many the features come from.
        disagreement: The largest of all classes.
        structures: Per class.
    """

    shown_pixels: dict[str, int]
    model: str
    sentence: str
    sentence_from: str
    slice: int | None
    slices: list[int]
    timesteps: int
    disagreement: float
    structures: dict[str, DrawNumbers]


class SliceAnswer(_Model):
    """Parameters of an answer of the task `progidiff_slice`.

    Attributes:
        label_names: Name -> label id of the segment; empty if nothing is drawn.
        prompt, structures: What was asked for.
        slice, axial_slice: Index along the file's third axis, and from inferior to superior.
        fits, missed_clicks: Whether the mask agrees with all clicks; how many it contradicts.
        kept_proposals, num_proposals: From how many of how many the mask was made.
        message: The same as a sentence.
        area_cm2: Of the mask.
        seed, model_version, modality, ignored, geometry, latencies: See `ShownAnswer`.
    """

    label_names: dict[str, int]
    prompt: str
    structures: list[str]
    slice: int
    axial_slice: int
    fits: bool
    missed_clicks: int
    kept_proposals: int
    num_proposals: int
    message: str
    area_cm2: float
    seed: int
    model_version: str
    modality: str
    ignored: list[str]
    geometry: Geometry
    latencies: Latencies


class KeptResult(_Model):
    """A result in the store.

    Attributes:
        proposals: Its key.
        created: Seconds since 1970.
        structures: In the order asked.
        bytes: On disk.
    """

    proposals: str
    created: float
    structures: list[str]
    bytes: int


class KeptProposals(_Model):
    """What is kept of an image.

    Attributes:
        image: Its id.
        kept: Every result, newest first.
        proposals: Key of the one described.
        summary: Its settings and numbers.
    """

    image: str
    kept: list[KeptResult]
    proposals: str
    summary: Summary


class PromptEntry(_Model):
    """A structure that the model was trained on.

    Attributes:
        label: Its id.
        structure: Its name.
        synonyms: What else is understood.
        color: "#rrggbb", as the pages draw it.
    """

    label: int
    structure: str
    synonyms: list[str]
    color: str


def draw_shown(
    result: VolumeProposals, grid: Grid, names: Mapping[str, int], show: str
) -> tuple[NDArray[np.uint8], dict[str, int], NDArray[np.int64]]:
    """What a mask shows.

    Args:
        result: The proposals.
        grid: Of the image.
        names: Label id of every structure.
        show: "consensus", "best", "1".."K", "disagreement", "agreement" or "probability".

    Returns:
        Labels in file order, shape (I, J, K); name -> id of what they hold, ascending by id; voxels of every id 0..255.
    """
    if show in (AGREEMENT, DISAGREEMENT, PROBABILITY):
        percent = draw_percent(result, grid, show)
        labels = ((percent.astype(np.uint16) + 24) // 25).astype(np.uint8)
        names = {f"{show} {band}": index + 1 for index, band in enumerate(BANDS)}
    else:
        labels = result.label_map(grid, show, dict(names))
    counts = np.bincount(labels.ravel(), minlength=256)
    present = sorted((name for name in names if counts[names[name]]), key=names.__getitem__)
    return labels, {name: names[name] for name in present}, counts


def draw_percent(result: VolumeProposals, grid: Grid, show: str) -> NDArray[np.uint8]:
    """Agreement, disagreement or probability of every voxel, 0 to 100, shape (I, J, K) in file order.

    Raises:
        RequestError: if the probability is asked for and the model has none.
    """
    if show == DISAGREEMENT:
        return np.asarray(result.disagreement_map(grid), np.uint8)
    shares = result.agreement(grid) if show == AGREEMENT else result.probability(grid)
    return np.asarray(np.rint(shares * 100), np.uint8)


def write_and_save(
    labels: NDArray[np.uint8], grid: Grid, extension: str, names: Mapping[str, int], save: Callable[[], list[str]]
) -> tuple[Path, list[str]]:
    """The mask in a new temporary file, and the tags that `save` saved; nothing is left behind if that fails."""
    file = write_temporary(labels, grid, extension, names)
    try:
        return file, save()
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def save_if_asked(
    options: AnswerOptions,
    datastore: Datastore,
    image_id: str,
    result: VolumeProposals,
    grid: Grid,
    names: Mapping[str, int],
    key: str,
) -> list[str]:
    """Save proposals as labels of the image, if the request asks for it; the tags.

    Raises:
        RequestError: if the image is none of the datastore.
    """
    if not options.save_original and not options.save_proposals:
        return []
    if not image_id:
        raise RequestError(
            "save_original needs an image of the datastore, not a session or upload. "
            "Leave it off, or add the image first."
        )
    return save_as_labels(datastore, image_id, result, grid, dict(names), key, options.save_proposals)


def describe_answer(
    found: Answer,
    options: AnswerOptions,
    image_id: str,
    saved: list[str],
    grid: Grid,
    warnings: list[str],
    total: float,
) -> dict[str, Any]:
    """The fields that answers about volumes and pictures share, beside what is shown and the numbers of the result."""
    return {
        "show": options.show,
        "proposals": found.key,
        "cached": found.job is None,
        "job": found.job,
        "saved_original": image_id if saved else None,
        "saved_tags": saved,
        "ignored": list(options.ignored),
        "geometry": grid.describe(),
        "warnings": [*grid.warnings, *warnings],
        "latencies": {
            "total": round(total, 3),
            "compute": round(found.proposals.seconds, 3) if found.job is not None else 0.0,
        },
    }
