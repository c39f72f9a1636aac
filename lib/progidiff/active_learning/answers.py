"""What is told of the work: images and slices that are suggested, and the report on what annotating has brought."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from progidiff.active_learning.advice import Advice
from progidiff.active_learning.strategies import Pick
from progidiff.storage.json_text import Text


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuggestedSlice(_Answer):
    """A slice that is worth annotating.

    Attributes:
        index: Axial, from inferior to superior.
        score: What it was chosen by, before noise; 0 where the strategy has no score.
        structures: The structures it was chosen for, the strongest first.
        reason: A sentence for people, without a full stop.
    """

    index: int
    score: float
    structures: list[Text]
    reason: Text

    @classmethod
    def of(cls, pick: Pick, reason: str | None = None) -> SuggestedSlice:
        """A pick, with its own reason unless another one is given."""
        return cls(
            index=pick.index,
            score=round(pick.score, 4),
            structures=list(pick.structures),
            reason=pick.reason if reason is None else reason,
        )


class SuggestedImage(_Answer):
    """An image with slices that are worth annotating.

    Attributes:
        image: Its id.
        slices: Best first.
        reason: Why this image, as a sentence.
        scores_from: The model version whose scores were used; "" if none were.
    """

    image: Text
    slices: list[SuggestedSlice]
    reason: Text
    scores_from: Text


class SuggestedWork(SuggestedImage):
    """An image that a server suggests.

    Attributes:
        state: "new", "started" or, when nothing is left to annotate, "review".
        modality: "CT", "MR", "picture"; "" if not known.
    """

    state: str
    modality: Text


class QueueEntry(SuggestedWork):
    """An image of a server's queue.

    Attributes:
        reserved_by: The client that has it; None if nobody does.
    """

    reserved_by: Text | None


class WorklistEntry(QueueEntry):
    """An image of the worklist.

    Attributes:
        state: "todo", "started" or "done".
        annotated: Structure -> number of slices on which it is annotated; None for the whole volume.
    """

    annotated: dict[Text, int | None]


class OrganProgress(_Answer):
    """How far a structure is, over all images.

    Attributes:
        structure: Its name.
        images: On which it is annotated, on some slices at least.
    """

    structure: Text
    images: int


class Worklist(_Answer):
    """The images as a list of work.

    Attributes:
        images: Of the datastore.
        counts: "todo", "started", "done" -> number of images.
        found: Images that fit what was asked for.
        entries: Some of these, in the order of the strategy; those that are done follow by name.
        strategy: What orders them.
        heading: The same in words.
        organs: How far each structure is, the one with the most images first.
        folder: Where the images lie, as who asks may know it.
        formats: Suffixes of files that are served from there.
    """

    images: int
    counts: dict[str, int]
    found: int
    entries: list[WorklistEntry]
    strategy: str
    heading: str
    organs: list[OrganProgress]
    folder: Text
    formats: list[str]


class AnnotatedSoFar(_Answer):
    """How much is annotated.

    Attributes:
        images: With any annotation.
        whole_images: Wholly annotated.
        slices: Annotated slices of all images.
    """

    images: int
    whole_images: int
    slices: int


class SaveFigures(_Answer):
    """What saves say of the proposals they were made from.

    Attributes:
        saves: How many.
        known: Of how many it is known whether the mask was changed.
        unchanged: Share of these that were accepted as they were, 0..1; None if there are none.
        minutes_per_slice: Time that annotating took; None if nobody said.
    """

    saves: int
    known: int
    unchanged: float | None
    minutes_per_slice: float | None


class VersionSaves(SaveFigures):
    """The saves that were made from proposals of one version.

    Attributes:
        version: Of model and adapter; "no proposal" for masks that were drawn.
    """

    version: Text


class AllSaves(SaveFigures):
    """All saves.

    Attributes:
        by_version: The same for each version.
    """

    by_version: list[VersionSaves]


class VersionFigures(_Answer):
    """How good a version is on the slices that were held back.

    Attributes:
        slices: Annotated slices that it was trained on; of pictures, images.
        dice: Structure -> Dice; empty for pictures.
        mean: Dice, over the structures or the pictures; None if it was not measured.
        base_mean: The same before the training.
    """

    slices: int
    dice: dict[Text, float | None]
    mean: float | None
    base_mean: float | None


class TrainedVersion(VersionFigures):
    """A trained version.

    Attributes:
        version: ``name@number``.
        name: Of the adapter or the model for pictures.
        modality: "CT", "MR" or "picture".
        created: ISO time, UTC.
        served: Whether it is the one that answers.
        accepted: Whether it was better than the one before.
        verdict: A sentence about that.
        cases: Names of the images that it was trained on.
    """

    version: str
    name: str
    modality: Text
    created: Text
    served: bool
    accepted: bool
    verdict: Text
    cases: list[Text]


class ListedVersion(TrainedVersion):
    """A trained version in a report.

    Attributes:
        here: Whether it was trained on images that are labelled here.
    """

    here: bool


class StructureEffort(_Answer):
    """What people spent on a structure on the review page, where it was measured.

    Attributes:
        structure: Its name.
        slices: Annotated by the saves that were measured.
        seconds: In which somebody used the page for it; time when nobody was there is not in it.
        clicks: Clicks and keys.
        seconds_per_slice, clicks_per_slice: The same by slice.
    """

    structure: Text
    slices: int
    seconds: float
    clicks: int
    seconds_per_slice: float
    clicks_per_slice: float


class Report(_Answer):
    """What annotating has brought.

    Attributes:
        annotated: How much there is.
        saves: What people did with the proposals.
        versions: All trained versions, adapters first, in the order in which they were trained.
        advice: Whether to go on, of the model trained last; about all saves if none was trained here.
        advice_about: Name of that model; "" if there is none.
        advice_by_model: The same for every model that was trained here.
        queue: What is next, best first; a server knows more of it than the files of its scores.
        problems: What is damaged, as sentences.
        set_aside: What crashes left, see `AnnotationStore.list_torn`.
        effort: What people spent on each structure, the one with the most seconds first.
    """

    annotated: AnnotatedSoFar
    saves: AllSaves
    versions: list[ListedVersion]
    advice: Advice
    advice_about: str
    advice_by_model: dict[str, Advice]
    queue: list[QueueEntry | SuggestedImage]
    problems: list[Text]
    set_aside: list[Text]
    effort: list[StructureEffort]
