"""Proposals for many images ahead of time: every image opens with a first mask, and a first look at its proposals
computes nothing.

Each image gets its consensus as a label (tag `original` by default) and, in a folder that a server serves, its
proposals in the store that the server reads. An image is done when its label was made by exactly these settings, which
a note beside the store says; so the same command continues where it was stopped, redoes what a changed image or another
model version asks for, and never replaces what a person or another tool made. An image that fails is reported and does
not end the run.

Reading, computing and writing are three steps of one `Prelabeller`, which threads, processes or machines may take one
each; `progidiff.prelabelling` puts them together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from progidiff.errors import BusyError, ModelError, NotFoundError, ProGiDiffError, RequestError, StoreError
from progidiff.evaluation.evaluate import save_report
from progidiff.images.dicom import list_series
from progidiff.images.folders import list_volumes
from progidiff.images.formats import Use, list_suffixes, strip_suffix
from progidiff.images.geometry import Grid
from progidiff.images.reading import load_series, load_volume
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.prompts.parser import Query, compute_label_ids, parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.keeper import DiskShelf, Question
from progidiff.proposals.request import DEFAULT_CLEAN_UP, ProposalRequest
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.storage import addresses
from progidiff.storage.atomic import atomic_file, scratch_folder
from progidiff.storage.state import default_store

T = TypeVar("T")

logger = logging.getLogger(__name__)

FINAL = "final"
STATES = ("made", "there", "kept", "failed")
"""What became of an image: labelled now; was labelled by the same settings; has a label that somebody else made; not
labelled.
"""


@dataclass(frozen=True)
class PrelabelSettings:
    """What every image is asked.

    Attributes:
        prompt: Structures, as a request names them.
        tag: Of the labels; not `final`, which is for people.
        num_proposals: K.
        steps: Denoising steps; None for the model's default.
        seed: Of the noise.
        adapter: A name, ``name@version``, "none"; None to have it chosen by the image's modality.
        modality: "CT", "MR"; None to find out.
        overwrite: Replace labels of this tag that somebody else made.
        clean_up: How islands are dropped from every proposal, see `progidiff.proposals.islands`.
    """

    prompt: str = "all"
    tag: str = "original"
    num_proposals: int = 4
    steps: int | None = None
    seed: int = 0
    adapter: str | None = None
    modality: str | None = None
    overwrite: bool = False
    clean_up: str = DEFAULT_CLEAN_UP

    def check(self) -> None:
        """Refuse a tag that cannot be used.

        Raises:
            RequestError: saying which can.
        """
        if self.tag == FINAL:
            raise RequestError(
                "Tag 'final' is for labels that a person accepted. Choose another one; "
                "viewers open 'original' by themselves."
            )
        if (
            not self.tag
            or len(self.tag) > 64
            or self.tag.startswith(".")
            or not all(c.isascii() and (c.isalnum() or c in "._-") for c in self.tag)
        ):
            raise RequestError(f"Tag '{self.tag[:64]}' must be letters, digits, '.', '_' or '-', for example original.")


@dataclass(frozen=True)
class Item:
    """One image that is to be labelled.

    Attributes:
        image: Id.
        address: Of a file, or of a folder with one DICOM series: a path, or what `progidiff.storage.addresses` reaches.
        modality: "CT" or "MR"; "" to find out.
        series: SeriesInstanceUID, if the folder holds several.
        sidecar: Address of the file `<name>.json` that lies beside it; "" for none, or beside a path.
    """

    image: str
    address: str
    modality: str = ""
    series: str = ""
    sidecar: str = ""


@dataclass(frozen=True)
class ImageOutcome:
    """What became of one image.

    Attributes:
        image: Id.
        state: One of `STATES`.
        reason: Why it failed or was kept.
        seconds: Wall time, from the first byte read to the label in its place.
        address: Where the image is.
        label: Where its label is; "" if there is none of this run.
        key: Of its proposals, see `ProposalRequest.key`; "" if they were not asked for.
        modality: "CT", "MR"; "" if the image was not opened.
        slices: Axial slices; 0 if the image was not opened.
        attempts: How often a step was tried that needed several; 1 if all went well.
        read_seconds, compute_seconds, write_seconds: What each step took.
        bytes_read, bytes_written: Of the image's files and of the label.
    """

    image: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    address: str = ""
    label: str = ""
    key: str = ""
    modality: str = ""
    slices: int = 0
    attempts: int = 1
    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    write_seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, eq=False)
class Opened:
    """An image that was read and waits for the model.

    Attributes:
        item: Which.
        began: `time.time` when reading began.
        volume: Its voxels.
        question: What is asked of it.
        stamp: Of the file or files, as they were read.
        present: Address of a label of this tag that will be replaced; "" for none.
        found: Proposals that were kept earlier; None if they must be computed.
        outcome: What is known so far.
    """

    item: Item
    began: float
    volume: Volume
    question: Question
    stamp: list[str | int]
    present: str
    found: VolumeProposals | None
    outcome: ImageOutcome


@dataclass(frozen=True, eq=False)
class Answered:
    """An image whose proposals are there and whose label is to be written.

    Attributes:
        item, began, question, stamp, present: As in `Opened`.
        grid: Of the image.
        digest: Of its voxels.
        proposals: The answer.
        is_new: Whether they were computed now.
        outcome: What is known so far.
    """

    item: Item
    began: float
    grid: Grid
    digest: str
    question: Question
    stamp: list[str | int]
    present: str
    proposals: VolumeProposals
    is_new: bool
    outcome: ImageOutcome


def list_images(studies: Path) -> list[Path]:
    """The images of a local datastore, by id.

    Raises:
        RequestError: if the folder is missing or holds none.
    """
    if not studies.is_dir():
        raise RequestError(f"There is no folder '{studies}'. Name one with --studies.")
    images = list(list_volumes(studies).values())
    if not images:
        suffixes = ", ".join(list_suffixes(Use.UPLOAD, "volume"))
        raise RequestError(f"'{studies}' holds no images; {suffixes} files directly in it are read.")
    return images


class LabelFolder:
    """Labels of one tag, and the notes that say which of them this command made.

    Args:
        labels: Address of the folder of labels.
        notes: Address of the folder of notes.
    """

    def __init__(self, labels: str, notes: str) -> None:
        self.labels = labels
        self._notes = notes

    def target(self, image: str) -> str:
        """Where the label of an image goes."""
        return addresses.join(self.labels, f"{image}.nii.gz")

    def find(self, image: str) -> str:
        """The label that an image has, in any format where people put labels by hand; "" for none."""
        suffixes = (".nii.gz",) if addresses.is_remote(self.labels) else list_suffixes(Use.UPLOAD, "volume")
        files = (addresses.join(self.labels, f"{image}{suffix}") for suffix in suffixes)
        return next((file for file in files if addresses.exists(file)), "")

    def is_ours(self, label: str, note: dict[str, Any]) -> bool:
        """Whether a label is what the note speaks of. In an object store its size has to do: to fetch all labels again
        would take as long as to make them.
        """
        if not addresses.is_remote(label):
            return note.get("sha256") == _hash(addresses.to_path(label))
        return note.get("bytes") == addresses.find_size(label)

    def read_note(self, image: str) -> dict[str, Any] | None:
        """What was noted when the label was made; None if nothing that can be read was."""
        try:
            values = json.loads(addresses.read_bytes(self._note(image)))
        except (NotFoundError, ValueError):
            return None
        return (
            values
            if isinstance(values, dict) and {"key", "sha256", "stamp", "digest", "modality"} <= values.keys()
            else None
        )

    def write(self, image: str, labels: Any, grid: Grid, made: dict[str, Any]) -> int:
        """Write the note, then the label: after a crash between them the label is missing or does not match, and is
        made again.

        Returns:
            Bytes of the label.

        Raises:
            StoreError: if the place refuses.
        """
        target = self.target(image)
        if addresses.is_remote(target):
            with scratch_folder("label") as folder:
                content = save_mask(labels, grid, folder / f"{image}.nii.gz").read_bytes()
            made |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            self._write_note(image, made)
            addresses.put_bytes(target, content)
            return len(content)
        path = addresses.to_path(target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, suffix=".nii.gz") as scratch:
                save_mask(labels, grid, scratch)
                size = scratch.stat().st_size
                made |= {"sha256": _hash(scratch), "bytes": size}
                self._write_note(image, made)
            return size
        except OSError as err:
            raise StoreError(
                f"The label of '{image}' could not be written into '{path.parent}' ({err}). Free some disk space, or "
                "check who may write there."
            ) from err

    def remove(self, label: str) -> None:
        """Remove a label that stands in the way of ours; only folders of this machine hold any."""
        addresses.to_path(label).unlink(missing_ok=True)

    def check(self) -> None:
        """Find out now whether anything can be written.

        Raises:
            StoreError: if not.
        """
        addresses.put_bytes(addresses.join(self._notes, "README.txt"), _ABOUT_NOTES)

    def _write_note(self, image: str, made: dict[str, Any]) -> None:
        addresses.put_bytes(self._note(image), json.dumps(made).encode())

    def _note(self, image: str) -> str:
        return addresses.join(self._notes, f"{hashlib.sha256(image.encode()).hexdigest()}.json")


_ABOUT_NOTES = b"""One file per image that `progidiff prelabel` labelled: by which settings.
Without them it takes the labels for somebody else's.
"""


class Prelabeller:
    """Labels images: reads, computes, writes. Each step may be taken by another thread, or by a `Prelabeller` of
    another process; only `compute` needs the networks, and must be called by one thread at a time.

    Args:
        engine: The model.
        studies: Local datastore; None with `out`.
        settings: What is asked.
        store: Folder of the server's state; None for the default one of `studies`.
        out: Address that labels and notes are written to, in place of a datastore; proposals are not kept then.
        retries: How often a step is tried again whose failure may pass: a network, a device that is busy.
        pause: Seconds before the first of these, doubled for each next one.

    Raises:
        RequestError: if the prompt or a setting makes no sense.
        ModelError: if there is no model.
        StoreError: if labels cannot be written.
    """

    def __init__(
        self,
        engine: Engine,
        studies: Path | None,
        settings: PrelabelSettings,
        store: Path | None = None,
        out: str | None = None,
        retries: int = 2,
        pause: float = 1.0,
    ) -> None:
        settings.check()
        self._engine = engine
        self._settings = settings
        self._retries = retries
        self._pause = pause
        known = engine.find_known()
        self._queries: tuple[Query, ...] = parse_prompt(settings.prompt, known, False, engine.model_version)
        self._request = ProposalRequest(
            queries=self._queries,
            num_proposals=settings.num_proposals,
            num_inference_steps=settings.steps,
            seed=settings.seed,
            clean_up=settings.clean_up,
        )
        self._shelf: DiskShelf | None = None
        if out is not None:
            notes = addresses.join(out, ".progidiff", "prelabel", settings.tag)
            self._labels = LabelFolder(addresses.join(out, "labels", settings.tag), notes)
            self._labels.check()
        elif studies is not None:
            root = store or default_store(str(studies))
            notes = str(root / "prelabel" / settings.tag)
            self._labels = LabelFolder(str(studies / "labels" / settings.tag), notes)
            self._shelf = DiskShelf(ProposalStore(root), must_keep=True)
        else:
            raise RequestError("Labels need a place: name a folder of images, or an address to write to.")

    def label(self, item: Item | Path) -> ImageOutcome:
        """Label one image, step by step.

        Raises:
            ModelError: if the model cannot be used: the next image would fail too.
            StoreError: if the disk is full: so would the next.
        """
        item = Item(strip_suffix(item), str(item)) if isinstance(item, Path) else item
        opened = self.read(item)
        answered = self.compute(opened) if isinstance(opened, Opened) else opened
        return self.write(answered) if isinstance(answered, Answered) else answered

    def read(self, item: Item) -> Opened | ImageOutcome:
        """Fetch and decode an image, unless nothing is left to do for it.

        Raises:
            ModelError, StoreError: as `label`.
        """
        outcome = ImageOutcome(item.image, "failed", address=item.address)
        began = time.time()
        opened, seconds = self._try(partial(self._read, item, began), outcome, began)
        if isinstance(opened, ImageOutcome):
            return replace(opened, read_seconds=seconds)
        return replace(opened, outcome=replace(opened.outcome, read_seconds=seconds))

    def compute(self, opened: Opened) -> Answered | ImageOutcome:
        """Ask the model.

        Raises:
            ModelError, StoreError: as `label`.
        """

        def ask(attempts: int) -> Answered:
            proposals = opened.found
            if proposals is None:
                proposals = self._engine.propose(opened.question.request, opened.volume, Work(remember=False))
            return Answered(
                opened.item,
                opened.began,
                opened.volume.grid,
                opened.volume.digest,
                opened.question,
                opened.stamp,
                opened.present,
                proposals,
                opened.found is None,
                replace(opened.outcome, attempts=max(attempts, opened.outcome.attempts)),
            )

        answered, seconds = self._try(ask, opened.outcome, opened.began)
        if isinstance(answered, ImageOutcome):
            return replace(answered, compute_seconds=seconds)
        return replace(answered, outcome=replace(answered.outcome, compute_seconds=seconds))

    def write(self, answered: Answered) -> ImageOutcome:
        """Keep proposals and label.

        Raises:
            ModelError, StoreError: as `label`.
        """
        outcome, seconds = self._try(partial(self._write, answered), answered.outcome, answered.began)
        return replace(outcome, write_seconds=seconds)

    def _try(
        self, step: Callable[[int], T | ImageOutcome], outcome: ImageOutcome, began: float
    ) -> tuple[T | ImageOutcome, float]:
        """What a step gives, or why it failed; and the seconds it took, pauses left out."""
        spent = 0.0
        for attempt in range(1, self._retries + 2):
            started = time.monotonic()
            try:
                result = step(attempt)
                return result, round(spent + time.monotonic() - started, 4)
            except (ModelError, StoreError):
                raise
            except (OSError, BusyError) as err:
                spent += time.monotonic() - started
                reason = f"{err} ({attempt} attempts)" if attempt > 1 else str(err)
                if isinstance(err, PermissionError | IsADirectoryError | NotADirectoryError):
                    break
                if attempt <= self._retries:
                    logger.warning("'%s' is tried again: %s", outcome.image, err)
                    time.sleep(self._pause * 2 ** (attempt - 1))
            except ProGiDiffError as err:
                spent += time.monotonic() - started
                reason = str(err)
                break
            except Exception as err:  # one image's surprise must not end a night's run
                spent += time.monotonic() - started
                logger.exception("'%s' failed unexpectedly", outcome.image)
                reason = f"Unexpected {type(err).__name__}: {err}. The log has the details."
                break
        failed = replace(outcome, state="failed", reason=reason, attempts=max(outcome.attempts, attempt))
        return replace(failed, seconds=round(time.time() - began, 3)), round(spent, 4)

    def _read(self, item: Item, began: float, attempts: int) -> Opened | ImageOutcome:
        outcome = ImageOutcome(item.image, "failed", address=item.address, attempts=attempts)
        is_folder, stamp = _stamp(item.address)
        target = self._labels.target(item.image)
        present = self._labels.find(item.image)
        note = self._labels.read_note(item.image) if present == target else None
        ours = note is not None and self._labels.is_ours(target, note)
        # If the image is what it was, whether the model is too can be told without opening it.
        if ours and note is not None and note.get("stamp") == stamp:
            question = self._ask(item.image, str(note["digest"]), str(note["modality"]))
            if note.get("key") == question.key:
                seconds, modality = round(time.time() - began, 3), str(note["modality"])
                return replace(
                    outcome, state="there", label=target, key=question.key, modality=modality, seconds=seconds
                )
        if present and not ours and not self._settings.overwrite:
            reason = (
                f"Its label '{self._settings.tag}' was not made by this command, or was changed since; --overwrite "
                "replaces it."
            )
            return replace(outcome, state="kept", reason=reason, seconds=round(time.time() - began, 3))
        volume, num_bytes = self._open(item, is_folder)
        question = self._ask(item.image, volume.digest, volume.modality)
        found = None if self._shelf is None else self._shelf.find(question)
        slices = volume.grid.stack_shape[0]
        outcome = replace(outcome, key=question.key, modality=volume.modality, slices=slices, bytes_read=num_bytes)
        return Opened(item, began, volume, question, stamp, present, found, outcome)

    def _open(self, item: Item, is_folder: bool) -> tuple[Volume, int]:
        """The voxels, and how many bytes of files they came from."""
        modality = item.modality or self._settings.modality
        if not addresses.is_remote(item.address):
            path = addresses.to_path(item.address)
            files = [file for file in path.iterdir() if file.is_file()] if is_folder else [path]
            return _load(path, modality, item.series), sum(file.stat().st_size for file in files)
        with scratch_folder("fetched") as folder:
            path, num_bytes = addresses.fetch(item.address, folder)
            if item.sidecar:
                (folder / f"{strip_suffix(path)}.json").write_bytes(addresses.read_bytes(item.sidecar))
            return _load(path, modality, item.series), num_bytes

    def _write(self, answered: Answered, attempts: int) -> ImageOutcome:
        if self._shelf is not None and answered.is_new:
            self._shelf.keep(answered.question, answered.proposals)
        item = answered.item
        labels = answered.proposals.label_map(answered.grid, "consensus", compute_label_ids(self._queries))
        made = {
            "key": answered.question.key,
            "stamp": answered.stamp,
            "digest": answered.digest,
            "modality": answered.outcome.modality,
            "image": item.image,
        }
        target = self._labels.target(item.image)
        size = self._labels.write(item.image, labels, answered.grid, made)
        if answered.present and answered.present != target:
            self._labels.remove(answered.present)
        return replace(
            answered.outcome,
            state="made",
            attempts=max(attempts, answered.outcome.attempts),
            label=target,
            bytes_written=size,
            seconds=round(time.time() - answered.began, 3),
        )

    def _ask(self, image: str, digest: str, modality: str) -> Question:
        card = self._engine.card
        adapter = self._engine.pick_adapter(self._settings.adapter, modality, [q.name for q in self._queries])
        name = adapter.full_name if adapter else ""
        request = self._request.settle(card.num_inference_steps, card.guidance_scale, name)
        return Question(request, image, digest, card.full_name)


def _stamp(address: str) -> tuple[bool, list[str | int]]:
    """Whether an image is a folder, and what changes when it does; of a file here, its time and size."""
    path = None if addresses.is_remote(address) else addresses.to_path(address)
    if path is not None and path.is_file():
        state = path.stat()
        return False, [state.st_mtime_ns, state.st_size]
    return addresses.describe(address)


def _load(path: Path, modality: str | None, series: str) -> Volume:
    """An image of this machine; of several series in a folder, the one that is named.

    Raises:
        ImageError: if it cannot be read.
        NotFoundError: if there is no such series.
    """
    if not series:
        return load_volume(path, modality, detached=True)
    found = [one for one in list_series(path) if one.uid == series or one.uid.startswith(f"{series}.")]
    if len(found) != 1:
        raise NotFoundError(
            f"'{path.name}' holds {len(found)} series '{series}'. Name one of: "
            f"{'; '.join(map(str, list_series(path)[:8])) or 'none'}."
        )
    return load_series([Path(file) for file in found[0].files], path.name, modality)


def run_here(images: Sequence[Path], make: Callable[[], Prelabeller]) -> Iterator[ImageOutcome]:
    """Label one image after the other."""
    prelabeller = make()
    for path in images:
        yield prelabeller.label(path)


def build_report(
    outcomes: Sequence[ImageOutcome], settings: PrelabelSettings, model: str, seconds: float
) -> dict[str, Any]:
    """What happened, for JSON: counts per state, why images failed or were kept, settings and times."""
    counts = Counter(outcome.state for outcome in outcomes)
    return {
        "model": model,
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        "counts": {state: counts[state] for state in STATES},
        "failed": {outcome.image: outcome.reason for outcome in outcomes if outcome.state == "failed"},
        "kept": {outcome.image: outcome.reason for outcome in outcomes if outcome.state == "kept"},
        "images": {outcome.image: {"state": outcome.state, "seconds": outcome.seconds} for outcome in outcomes},
    }


def write_report(report: dict[str, Any], path: Path, index: int = 0, count: int = 1) -> Path:
    """Write the report; of several processes each writes its own, `report.0-of-2.json`.

    Raises:
        StoreError: if the disk refuses.
    """
    target = path if count == 1 else path.with_name(f"{path.stem}.{index}-of-{count}{path.suffix}")
    return save_report(report, target)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
