"""What the routes of labels and of the review page take and answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from progidiff.labels.history import Annotation
from progidiff.storage.json_text import Text


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)


class NothingAnswer(_Answer):
    """Done, and nothing to say about it."""


class AddedImage(_Answer):
    """An image that was added.

    Attributes:
        image: Its id.
    """

    image: str


class SavedLabelAnswer(_Answer):
    """A saved label.

    Attributes:
        sequence: Of the save.
        slices: Axial slices that it annotates, ascending; null for the whole volume.
        structures: What it speaks about.
        edited: Whether it differs from the proposal it was made from; null if not known.
        label_ids: Structure -> id in its file.
    """

    sequence: int
    slices: list[int] | None
    structures: list[Text]
    edited: bool | None
    label_ids: dict[Text, int]

    @classmethod
    def of(cls, label: Annotation, **more: Any) -> Self:
        """What the history knows of a save."""
        return cls(
            sequence=label.sequence,
            slices=list_slices(label.slices),
            structures=list(label.structures),
            edited=label.edited,
            label_ids=dict(label.label_ids),
            **more,
        )


class NewLabelAnswer(SavedLabelAnswer):
    """A label that was just saved.

    Attributes:
        repeated: Whether exactly this was in force already, so that nothing new was kept.
        warnings: Sentences for the person who saved.
        new_structures: What is a structure of the folder from now on.
    """

    repeated: bool
    warnings: list[str]
    new_structures: list[Text] = []


class SaveAnswer(_Answer):
    """The answer to a save; other parts of the server add theirs beside these.

    Attributes:
        annotation: The label.
        image: Id of its image.
        label: As the host names the label.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    annotation: NewLabelAnswer
    image: str
    label: str


class SubmissionAnswer(SaveAnswer):
    """The answer to what was decided on the review page.

    Attributes:
        saves: One for all structures that were decided on the same slices of the same proposals, oldest first; the
            last one is `annotation`.
    """

    saves: list[NewLabelAnswer]


class LabelStateAnswer(_Answer):
    """What is in force of an image.

    Attributes:
        image: Its id.
        annotation: The newest save in force; null if none is.
        annotated_slices: Of all saves in force, ascending; null for the whole volume.
    """

    image: str
    annotation: SavedLabelAnswer | None
    annotated_slices: list[int] | None


class SkipAnswer(_Answer):
    """An image that was looked at and left.

    Attributes:
        image: Its id.
        sequence: Of the note in the history.
    """

    image: str
    sequence: int


class FinishAnswer(SkipAnswer):
    """An image that somebody said to be done, or not to be done any more.

    Attributes:
        is_done: Which of them.
    """

    is_done: bool


class SourceAnswer(_Answer):
    """The proposal that a label was made from, see `labels.history.Source`."""

    proposals: Text
    shown: Text
    model: Text
    adapter: Text
    seed: int
    steering: Text = ""


class AnnotationAnswer(_Answer):
    """One save of the history, see `labels.history.Annotation`.

    Attributes:
        in_force: Whether it counts now.
    """

    sequence: int
    time: Text
    image: Text
    tag: Text
    user: Text
    client: Text
    slices: list[int] | None
    structures: list[Text]
    source: SourceAnswer | None
    edited: bool | None
    seconds: float | None
    sha256: Text
    file: Text
    num_slices: int | None
    label_ids: list[tuple[Text, int]]
    effort: list[tuple[Text, float, int]]
    edits: int | None
    in_force: bool


class AnnotationsAnswer(_Answer):
    """The history.

    Attributes:
        total: Saves, of all images or of the one that was asked for.
        annotations: The newest of them, newest first.
        annotated_slices: Image -> axial slices, ascending; null for the whole volume.
    """

    total: int
    annotations: list[AnnotationAnswer]
    annotated_slices: dict[Text, list[int] | None]


class RenameRequest(BaseModel):
    """Another name for a structure of the label in force.

    Attributes:
        old: As the label has it, for example "Segment_1".
        new: What is drawn, for example "liver".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    old: str
    new: str


class KeptProposals(_Answer):
    """Proposals of an image that are kept.

    Attributes:
        proposals: Their key.
        created: Seconds since 1970.
        structures: What they draw.
    """

    proposals: str
    created: float
    structures: list[str]


class CurrentLabel(_Answer):
    """Who saved the label in force, and when (UTC, ISO 8601)."""

    sequence: int
    user: Text
    time: str


class GeometryAnswer(_Answer):
    """What of an image's header was taken for its place, and what is to be known about it."""

    reading: str
    warnings: list[str]


class WindowPreset(_Answer):
    """A named window of the review page, see `images.modality.Preset`.

    Attributes:
        name: For people.
        window: The intensities shown as black and white.
    """

    name: str
    window: tuple[float, float]


class VoxelPlaces(_Answer):
    """Where voxels of the axial stack lie in the file: the voxel (i, j, k) of (z, y, x) is
    origin + z * steps[0] + y * steps[1] + x * steps[2].
    """

    origin: tuple[int, int, int]
    steps: tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]


class ReviewedImage(_Answer):
    """What the review page needs to know of an image.

    Attributes:
        image: Its id.
        shape: (Z, Y, X) of the axial stack.
        spacing: (dz, dy, dx) in mm.
        modality: "CT" or "MR"; "picture" of a picture, which has one slice.
        modality_source: Where that comes from.
        geometry: How the header was read, see `images.geometry.Grid.describe`.
        scale: (slope, intercept): intensity = slope * pixel + intercept.
        window: Intensities that are shown as black and as white.
        presets: Named windows of its modality.
        range: Smallest and largest intensity.
        voxel_ml: Volume of one voxel in ml.
        kept: Kept proposals, newest first.
        label: The label in force; null if there is none.
        label_ids: Structure -> id in its file.
        colors: Structure -> "#rrggbb", of all that have one of their own.
        other_colors: Of all others, in turn.
        annotated_slices: Axial, ascending; null for the whole volume.
        annotated: Structure -> the same for it; what a label made elsewhere draws is not in it.
        sequence: Of the newest save; 0 if there is none.
        is_done: Whether somebody said last that nothing is left to do on it.
        voxels: How voxels of the file are counted, as edits count them.
        listens_to_edits: Whether the model draws by edits; others choose among their proposals.
    """

    image: str
    shape: list[int]
    spacing: list[float]
    modality: str
    modality_source: str
    geometry: GeometryAnswer
    scale: tuple[float, float]
    window: tuple[float, float]
    presets: list[WindowPreset]
    range: tuple[float, float]
    voxel_ml: float
    kept: list[KeptProposals]
    label: CurrentLabel | None
    label_ids: dict[Text, int]
    colors: dict[str, str]
    other_colors: list[str]
    annotated_slices: list[int] | None
    annotated: dict[Text, list[int] | None]
    sequence: int
    is_done: bool
    voxels: VoxelPlaces
    listens_to_edits: bool


def list_slices(slices: Iterable[int] | None) -> list[int] | None:
    """Ascending; None stays None."""
    return None if slices is None else sorted(slices)
