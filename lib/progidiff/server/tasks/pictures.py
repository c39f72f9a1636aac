"""The infer task `textdiff` of the MONAI Label app: a picture, or one axial slice of a volume, and a sentence in; K
draws, their consensus and where they differ out.

A draw is the same model with another noise on the picture (and, if the model says so, other timesteps). What a picture
gave is kept in the `ProposalStore` as the proposals of a volume of one slice: showing another draw, saving it as a
label, asking whether a label was edited and choosing what comes next go the same ways as for volumes. What a slice of a
volume gave is kept in memory only: proposals of whole volumes are what the store's other readers look for.

The sentence comes from the option `sentence` or `prompt`, else from ``text.csv`` beside the images; an image without
one is answered without, and the answer says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from progidiff.errors import GeometryError, RequestError
from progidiff.images.formats import Use, find_kind, is_picture, list_suffixes
from progidiff.images.geometry import Grid
from progidiff.images.modality import list_modalities
from progidiff.images.pictures import PICTURE
from progidiff.images.reading import read_grid
from progidiff.images.volume import Volume
from progidiff.images.working_grid import WorkingGrid
from progidiff.labels.history import hash_file
from progidiff.params import read_bool, read_choice, read_int
from progidiff.prompts.parser import Query
from progidiff.proposals.device_queue import NOBODY
from progidiff.proposals.keeper import Answer, Keeper, MemoryShelf, Question, TakeTurn
from progidiff.proposals.request import (
    AGREEMENT,
    AUTO,
    BEST,
    CONSENSUS,
    DEFAULT_NUM_PROPOSALS,
    DISAGREEMENT,
    MAX_SLICE,
    AnswerOptions,
    ProposalRequest,
    read_answer_options,
)
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.server.options import ServerOptions
from progidiff.server.tasks.answers import PictureAnswer, describe_answer, draw_shown, save_if_asked, write_and_save
from progidiff.server.tasks.picture_engine import SentenceTable, TextDiffEngine, number_classes
from progidiff.server.tasks.picture_views import PictureView, open_view
from progidiff.server.tasks.volumes import ProposalInferTask, Recent, fingerprint

if TYPE_CHECKING:
    from progidiff.textdiff.model import TextDiffCard, TextDiffResult

logger = logging.getLogger(__name__)

NAME = "textdiff"
"""Of the task and of the trainer."""


OPTION_NAMES = (
    "prompt",
    "sentence",
    "without_sentence",
    "slice",
    "version",
    "num_proposals",
    "show",
    "modality",
    "save_original",
    "save_proposals",
    "result_extension",
    "job_id",
)
"""Every option that a request may carry in `params`."""

_MAX_LETTERS = 20_000
_KEPT_SLICES = 8
_KEPT_VIEWS = 2
_NO_SENTENCE = "none"


@dataclass(frozen=True, kw_only=True)
class TextDiffOptions(AnswerOptions):
    """What one request asks for, beside `AnswerOptions`; `show` may be "agreement" too.

    Attributes:
        sentence: What the report says; None to look into text.csv.
        without_sentence: Whether none is read, whatever text.csv says.
        slice: Axial index from inferior to superior, of a volume; None if not said.
        version: ``name`` or ``name@version``; None for the one that is served.
        result_extension: ".png" (pictures), ".nii.gz", ".nii", ".nrrd", ".seg.nrrd"; None for what suits the image.
    """

    sentence: str | None
    without_sentence: bool
    slice: int | None
    version: str | None
    result_extension: str | None

    @classmethod
    def from_params(cls, params: Mapping[str, Any], max_proposals: int) -> TextDiffOptions:
        """Read the parameters of a request.

        Raises:
            RequestError: if one is reserved, malformed or out of range.

        Example:
            >>> options = TextDiffOptions.from_params({"prompt": " Dense on the left. ", "show": 2, "slice": "-1"}, 16)
            >>> options.sentence, options.show, options.slice
            ('Dense on the left.', '2', None)
        """
        given = {name: value for name, value in params.items() if value is not None and value != ""}
        shared = read_answer_options(given, params, OPTION_NAMES, max_proposals)
        z = read_int(given.get("slice", -1), "slice", -1, MAX_SLICE)
        extension = given.get("result_extension")
        sentence = _read_sentence(given.get("sentence", given.get("prompt")))
        without = read_bool(given.get("without_sentence", False), "without_sentence")
        if without and sentence is not None:
            raise RequestError("Option without_sentence and a sentence were sent together. Send one of them.")
        return cls(
            **shared,
            sentence=sentence,
            without_sentence=without,
            slice=None if z < 0 else z,
            version=_read_version(given.get("version", AUTO)),
            show=_read_show(given.get("show", CONSENSUS), shared["num_proposals"]),
            result_extension=None
            if extension is None
            else read_choice(extension, "result_extension", (*list_suffixes(Use.ANSWER), *list_suffixes(Use.SEGMENTS))),
        )


@dataclass(frozen=True)
class Subject:
    """What a request is about.

    Attributes:
        grid: Of the picture, or of the whole volume.
        volume: The whole volume; None for a picture.
        z: Axial slice.
        path: The image's file.
        digest: Changes when the pixels do.
    """

    grid: Grid
    volume: Volume | None
    z: int
    path: Path
    digest: str

    @property
    def is_picture(self) -> bool:
        """Whether it is a file with a picture."""
        return is_picture(self.path)


class TextDiffInferTask(InferTask):
    """A sentence and a picture in, draws out.

    Args:
        engine: The models; loaded at the first request.
        proposals: The task for whole volumes, whose queue, store and open images are shared.
        sentences: Of the studies folder.
        datastore: Gives the app's datastore, to save labels into.
    """

    def __init__(
        self,
        engine: TextDiffEngine,
        proposals: ProposalInferTask,
        sentences: SentenceTable,
        datastore: Callable[[], Datastore],
    ) -> None:
        self.engine = engine
        self.sentences = sentences
        self._proposals = proposals
        self._datastore = datastore
        self._slices = Keeper(MemoryShelf(_KEPT_SLICES))
        self._views: Recent[PictureView] = Recent(_KEPT_VIEWS)
        super().__init__(
            type=InferType.SEGMENTATION,
            labels=None,
            dimension=2,
            description=(
                "A sentence of the report and a picture (or one axial slice): draws of frozen diffusion features, and "
                "where they differ"
            ),
        )

    def info(self) -> dict[str, Any]:
        """As the host lists it; the labels are those of the version that is served now."""
        return {**super().info(), "labels": self.engine.label_ids()}

    def config(self) -> dict[str, Any]:
        """The options with their defaults, as viewers draw them. An empty prompt stands for the sentence in
        text.csv.
        """
        largest = self._proposals.options.max_proposals
        return {
            "prompt": "",
            "slice": -1,
            "num_proposals": min(DEFAULT_NUM_PROPOSALS, largest),
            "show": [CONSENSUS, BEST, *(str(k + 1) for k in range(largest)), AGREEMENT, DISAGREEMENT],
            "version": [AUTO, *self.engine.names()],
            "modality": [AUTO, *list_modalities()],
            "save_original": False,
            "save_proposals": False,
        }

    def is_valid(self) -> bool:
        """Always offered: if weights are missing, the request says so."""
        return True

    def read_request(self, params: Mapping[str, Any]) -> tuple[TextDiffOptions, TextDiffCard]:
        """Check what a request asks for, before any image is read.

        Raises:
            RequestError: if an option is wrong.
            NotFoundError: if there is no such version.
            ModelError: if there are no weights to answer with.
        """
        options = TextDiffOptions.from_params(params, self._proposals.options.max_proposals)
        return options, self.engine.pick(options.version)

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Answer one request.

        Args:
            request: "image" (path), "image_id" (id in the datastore, "" for an upload), "image_info" and "params" (see
                `TextDiffOptions`).

        Returns:
            Path of a new temporary file with the mask, which the caller removes, and the result parameters.

        Raises:
            ProGiDiffError: whatever is wrong with the request, the image or the model.
        """
        started = time.monotonic()
        image_id = str(request.get("image_id", ""))
        options, card = self.read_request(request.get("params", {}))
        subject = self._open(Path(str(request["image"])), options, request.get("image_info") or {})
        extension = _pick_extension(options.result_extension, subject)
        if options.version is None:
            card = self.pick_fitting(subject)
        sentence, source = (
            (None, _NO_SENTENCE) if options.without_sentence else self.find_sentence(subject.path, options.sentence)
        )
        asker = request.get("asker", NOBODY)
        found = self.answer(
            subject,
            sentence,
            options.num_proposals,
            card,
            image_id,
            lambda: self._proposals.queue.job(NAME, image_id or subject.grid.name, options.job_id, asker),
        )
        names = number_classes(card.classes)
        labels, present, counts = draw_shown(found.proposals, subject.grid, names, options.show)
        file, saved = write_and_save(
            labels, subject.grid, extension, present, lambda: self._save(options, image_id, found, subject, names)
        )
        drawn = bool(found.proposals.probabilities.any())
        warnings = [*find_notes_about(subject, sentence, card), *find_silence_about(card, sentence, drawn)]
        shared = describe_answer(found, options, image_id, saved, subject.grid, warnings, time.monotonic() - started)
        if not subject.is_picture:
            shared["proposals"] = None  # It is kept in memory only, where nobody else finds it.
        answer = PictureAnswer(
            **shared,
            **_summarise(found.proposals, subject),
            label_names=present,
            shown_pixels={name: int(counts[value]) for name, value in present.items()},
            model=card.full_name,
            sentence=sentence or "",
            sentence_from=source,
            slice=None if subject.is_picture else subject.z,
            slices=[subject.z],
        )
        return str(file), answer.model_dump()

    def open_view(self, path: Path) -> PictureView:
        """A picture as people see it, with the last few kept open.

        Raises:
            NotFoundError, ImageError: if it is none.
        """
        key = repr((str(path), fingerprint(path)))
        view = self._views.get(key)
        if view is None:
            view = open_view(path)
            self._views.put(key, view)
        return view

    def list_answering(self) -> list[TextDiffCard]:
        """The versions that answer if none is asked for: the served one that was published last; if models for grey
        pictures and for pictures in colour are served, the last one of each.

        Raises:
            ModelError: if there are no weights.
        """
        last: dict[bool, TextDiffCard] = {}
        for card in self.engine.list_served():
            last.setdefault(card.gray, card)
        return list(last.values()) if len(last) > 1 else [self.engine.pick()]

    def pick_fitting(self, subject: Subject) -> TextDiffCard:
        """The version of `list_answering` for a picture or slice.

        Raises:
            ModelError: if there are no weights.
        """
        answering = self.list_answering()
        if len(answering) == 1:  # Pixels are read only where there is a choice.
            return answering[0]
        gray = not _read_pixels(subject).is_coloured
        return next(card for card in answering if card.gray == gray)

    def find_sentence(self, path: Path, given: str | None) -> tuple[str | None, str]:
        """The sentence of an image, and where it comes from: "request", "text.csv" or "none".

        Raises:
            RequestError: if text.csv cannot be read.
        """
        if given is not None:
            return given, "request"
        found = self.sentences.find(path.name)
        return (found, "text.csv") if found else (None, _NO_SENTENCE)

    def answer(
        self, subject: Subject, sentence: str | None, draws: int, card: TextDiffCard, image_id: str, take_turn: TakeTurn
    ) -> Answer:
        """K draws, kept or computed; see `Keeper.find_or_compute`.

        Args:
            subject: The picture, or the slice of a volume.
            sentence: What the report says of it; None for nothing.
            draws: K.
            card: The version that answers.
            image_id: In the datastore; "" for an upload.
            take_turn: Waits for the device.

        Raises:
            ProGiDiffError: whatever is wrong with picture, sentence or model.
        """
        request = ProposalRequest(
            queries=tuple(Query(name, sentence or "", False) for name in card.classes),
            num_proposals=draws,
            seed=card.features.seed,
        ).settle(len(card.features.timesteps), 1.0, "")
        model = f"{NAME} {card.full_name} {card.sha256}"
        question = Question(request, image_id, f"{subject.digest}:{subject.z}", model)

        def compute(work: Work) -> VolumeProposals:
            result = self.engine.predict(
                _read_pixels(subject), sentence, draws, card, work.on_progress, work.is_cancelled, work.device
            )
            return to_proposals(result, subject, card)

        # Proposals of whole volumes are what the store's other readers look for: a slice's are kept in memory only.
        keeper = self._proposals.keeper if subject.is_picture else self._slices
        return keeper.find_or_compute(question, compute, take_turn)

    def _open(self, path: Path, options: TextDiffOptions, info: Mapping[str, Any]) -> Subject:
        if is_picture(path):
            if options.slice:
                raise RequestError(
                    f"'{path.name}' is a picture of one slice, and slice {options.slice} "
                    "was asked for. Leave option slice out."
                )
            return open_picture(path)
        volume = self._proposals.open_volume(str(path), options.modality, info)
        depth = len(volume.to_stack()[0])
        if options.slice is None:
            raise RequestError(
                f"'{volume.name}' is a volume of {depth} axial slices, and {NAME} answers "
                f"one of them. Send option slice, 0 (inferior) to {depth - 1}."
            )
        if options.slice >= depth:
            raise RequestError(
                f"There is no slice {options.slice}: '{volume.name}' has the axial slices 0 (inferior) to {depth - 1}."
            )
        return Subject(volume.grid, volume, options.slice, path, volume.digest)

    def _save(
        self, options: TextDiffOptions, image_id: str, found: Answer, subject: Subject, names: dict[str, int]
    ) -> list[str]:
        if (options.save_original or options.save_proposals) and image_id and not subject.is_picture:
            raise RequestError(
                "save_original is for pictures: one slice is no label of a volume. Save "
                "the answer with option slices instead."
            )
        return save_if_asked(options, self._datastore(), image_id, found.proposals, subject.grid, names, found.key)


def build_textdiff(
    options: ServerOptions,
    model_dir: Path,
    proposals: ProposalInferTask,
    studies: str,
    datastore: Callable[[], Datastore],
) -> TextDiffInferTask:
    """The task as the app serves it; loads no weights and needs none.

    Args:
        options: From `--conf`.
        model_dir: The model folder, whose ``textdiff/`` is used unless `options.textdiff` names another.
        proposals: The task for whole volumes.
        studies: Folder or address of the images.
        datastore: Gives the app's datastore.
    """
    engine = TextDiffEngine(options.textdiff or model_dir / "textdiff", options.list_devices())
    is_local = not studies.startswith(("http://", "https://"))
    return TextDiffInferTask(engine, proposals, SentenceTable(Path(studies) if is_local else None), datastore)


def open_picture(path: Path) -> Subject:
    """The grid of a picture, without its pixels.

    Raises:
        NotFoundError, ImageError: if it is none.
    """
    return Subject(read_grid(path), None, 0, path, hash_file(path))


def to_proposals(result: TextDiffResult, subject: Subject, card: TextDiffCard) -> VolumeProposals:
    """Draws of a picture as proposals of a volume of one slice, or of one slice of a volume."""
    dz, dy, dx = subject.grid.stack_spacing
    depth, height, width = subject.grid.stack_shape
    if result.masks.shape[1:] != (height, width):
        raise GeometryError(
            f"'{subject.path.name}' was read with another size than its header says; save "
            "it again without the camera's turn."
        )
    # The proposals lie on the image's own pixels; a working grid has square ones, so they count with the mean of their
    # edges.
    edge = float(np.sqrt(dy * dx))
    grid = WorkingGrid(
        (depth, height, width), (float(dz), edge, edge), (height * edge / 2, width * edge / 2), edge, height, width
    )
    probabilities = np.zeros((len(card.classes), len(result.masks), depth, height, width), dtype=np.uint8)
    for index in range(len(card.classes)):
        probabilities[index, :, subject.z] = (result.masks == index + 1) * np.uint8(255)
    return VolumeProposals(
        structures=tuple(card.classes),
        probabilities=probabilities,
        grid=grid,
        seed=card.features.seed,
        num_inference_steps=len(card.features.timesteps),
        guidance_scale=1.0,
        model_version=card.full_name,
        adapter="",
        modality=PICTURE if subject.volume is None else subject.volume.modality,
        modality_source="option" if subject.volume is None else subject.volume.modality_source,
        seconds=result.seconds,
    )


def _read_pixels(subject: Subject) -> Any:
    from progidiff.textdiff.pictures import read_picture, to_picture
    from progidiff.textdiff.slices import render_slice

    if subject.volume is None:
        return read_picture(subject.path)
    picture = to_picture(render_slice(subject.volume, subject.z), subject.volume.name)
    return replace(picture, notes=())  # That a slice is gray needs no telling.


def find_notes_about(subject: Subject, sentence: str | None, card: TextDiffCard) -> list[str]:
    """What the user should know, one sentence each: about the picture and the sentence, without the network."""
    from progidiff.textdiff.model import find_notes

    picture = _read_pixels(subject)
    return list(dict.fromkeys((*picture.notes, *find_notes(card, picture, sentence or None))))


def find_silence_about(card: TextDiffCard, sentence: str | None, drawn: bool) -> list[str]:
    """See `progidiff.textdiff.model.find_silence`."""
    from progidiff.textdiff.model import find_silence

    return find_silence(card, sentence or None, drawn)


def _summarise(result: VolumeProposals, subject: Subject) -> dict[str, Any]:
    """Numbers of the slice, per class; agreement is the mean share of draws over the pixels that any draw marks."""
    structures: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(result.structures):
        drawn = result.probabilities[index, :, subject.z] >= 128
        share = drawn.mean(axis=0)
        marked = share > 0
        structures[name] = {
            "consensus_pixels": int((share >= 0.5).sum()),
            "proposals_pixels": [int(mask.sum()) for mask in drawn],
            "best": result.ranking[index][0] + 1,
            "ranking": [k + 1 for k in result.ranking[index]],
            "agreement": round(float(share[marked].mean()), 4) if marked.any() else 1.0,
            "disagreement": round(float(result.disagreement[index, subject.z]), 4),
        }
    return {
        "num_proposals": result.num_proposals,
        "timesteps": result.num_inference_steps,
        "model_version": result.model_version,
        "modality": result.modality,
        "disagreement": round(max(entry["disagreement"] for entry in structures.values()), 4),
        "structures": structures,
        "seconds": round(result.seconds, 3),
    }


def _pick_extension(wanted: str | None, subject: Subject) -> str:
    *most, last = list_suffixes(Use.ANSWER, "volume")
    if subject.is_picture:
        return wanted or list_suffixes(Use.ANSWER, "picture")[0]
    if wanted is not None and find_kind(wanted, Use.ANSWER) != "volume":
        raise RequestError(
            f"result_extension {wanted} is for pictures; the mask of a volume's slice comes as "
            f"{', '.join(most)} or {last}. Leave it out."
        )
    return wanted or [*most, last][0]


def _read_sentence(value: object) -> str | None:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = " ".join(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(
            f"Option sentence is {str(value)[:60]!r}; it must be text, for example 'The "
            "nuclei density in the upper right is high.'"
        )
    if len(value) > _MAX_LETTERS:
        raise RequestError(
            f"Option sentence has {len(value)} letters, more than any encoder takes. Send "
            "the sentence about this picture only."
        )
    return " ".join(value.split()) or None


def _read_version(value: object) -> str | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else AUTO
    if not isinstance(value, str):
        raise RequestError(
            f"Option version is {str(value)[:60]!r}; it must be auto, a name, or name@version, for example nuclei@1."
        )
    return None if value.strip().lower() in ("", AUTO) else value.strip()


def _read_show(value: object, num_proposals: int) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else CONSENSUS
    text = str(value).strip()
    if (
        text.isascii()
        and text.isdigit()
        and not isinstance(value, bool)
        and len(text) < 10
        and int(text) > num_proposals
    ):
        raise RequestError(
            f"Draw {text} cannot be shown, only {num_proposals} are asked for. Raise num_proposals or show a lower one."
        )
    return read_choice(
        value, "show", (CONSENSUS, BEST, AGREEMENT, DISAGREEMENT, *(str(k + 1) for k in range(num_proposals)))
    )
