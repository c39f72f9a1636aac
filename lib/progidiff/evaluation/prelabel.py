"""Proposals for a whole folder ahead of time: every image opens with a first mask, and a first look at its proposals
computes nothing.

Each image gets its consensus as a label (tag `original` by default) and its proposals in the store that the server of
this folder reads. An image is done when its label was made by exactly these settings, which a note beside the store
says; so the same command continues where it was stopped, redoes what a changed image or another model version asks for,
and never replaces what a person or another tool made. An image that fails is reported and does not end the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from progidiff.errors import ModelError, ProGiDiffError, RequestError, StoreError
from progidiff.evaluation.evaluate import save_report
from progidiff.images.folders import list_volumes
from progidiff.images.formats import Use, list_suffixes, strip_suffix
from progidiff.images.reading import load_volume
from progidiff.images.writing import save_mask
from progidiff.prompts.parser import Query, compute_label_ids, parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.keeper import Alone, DiskShelf, Keeper, Question
from progidiff.proposals.request import DEFAULT_CLEAN_UP, ProposalRequest
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.work import Work
from progidiff.storage.atomic import atomic_file, replace_text
from progidiff.storage.state import default_store

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
class ImageOutcome:
    """What became of one image.

    Attributes:
        image: Id.
        state: One of `STATES`.
        reason: Why it failed or was kept.
        seconds: Wall time.
    """

    image: str
    state: str
    reason: str = ""
    seconds: float = 0.0


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


def pick_share(images: Sequence[Path], index: int, count: int) -> list[Path]:
    """What one of several processes does: every `count`-th image.

    Example:
        >>> [path.name for path in pick_share([Path("a"), Path("b"), Path("c")], 1, 2)]
        ['b']
    """
    return list(images[index::count])


class Prelabeller:
    """Labels images one at a time.

    Args:
        engine: The model.
        studies: Local datastore.
        settings: What is asked.
        store: Folder of the server's state; None for the default one of `studies`.

    Raises:
        RequestError: if the prompt or a setting makes no sense.
        ModelError: if there is no model.
    """

    def __init__(self, engine: Engine, studies: Path, settings: PrelabelSettings, store: Path | None = None) -> None:
        settings.check()
        self._engine = engine
        self._settings = settings
        self._queries: tuple[Query, ...] = parse_prompt(settings.prompt, engine.structures, False, engine.model_version)
        self._request = ProposalRequest(
            queries=self._queries,
            num_proposals=settings.num_proposals,
            num_inference_steps=settings.steps,
            seed=settings.seed,
            clean_up=settings.clean_up,
        )
        root = store or default_store(str(studies))
        self._labels = studies / "labels" / settings.tag
        self._notes = root / "prelabel" / settings.tag
        self._keeper = Keeper(DiskShelf(ProposalStore(root), must_keep=True))

    def label(self, path: Path) -> ImageOutcome:
        """Label one image.

        Raises:
            ModelError: if the model cannot be used: the next image would fail too.
            StoreError: if the disk is full: so would the next.
        """
        image = strip_suffix(path)
        started = time.monotonic()
        try:
            state, reason = self._label(image, path)
        except (ModelError, StoreError):
            raise
        except ProGiDiffError as err:
            state, reason = "failed", str(err)
        except Exception as err:  # one image's surprise must not end a night's run
            logger.exception("'%s' failed unexpectedly", image)
            state, reason = "failed", f"Unexpected {type(err).__name__}: {err}. The log has the details."
        return ImageOutcome(image, state, reason, round(time.monotonic() - started, 3))

    def _label(self, image: str, path: Path) -> tuple[str, str]:
        target = self._labels / f"{image}.nii.gz"
        present = next(
            (
                file
                for suffix in list_suffixes(Use.UPLOAD, "volume")
                if (file := self._labels / f"{image}{suffix}").is_file()
            ),
            None,
        )
        stamp = [path.stat().st_mtime_ns, path.stat().st_size]
        note = self._read_note(image) if present == target else None
        ours = note is not None and note.get("sha256") == _hash(target)
        # If the image is what it was, whether the model is too can be told without opening it.
        if ours and note is not None and note.get("stamp") == stamp:
            question = self._ask(image, str(note["digest"]), str(note["modality"]))
            if note.get("key") == question.key:
                return "there", ""
        if present is not None and not ours and not self._settings.overwrite:
            return (
                "kept",
                f"Its label '{self._settings.tag}' was not made by this command, or was "
                "changed since; --overwrite replaces it.",
            )
        volume = load_volume(path, self._settings.modality, detached=True)
        question = self._ask(image, volume.digest, volume.modality)
        compute = partial(self._engine.propose, question.request, volume)
        answer = self._keeper.find_or_compute(question, compute, partial(Alone.take, image), Work(remember=False))
        result, key = answer.proposals, answer.key
        labels = result.label_map(volume.grid, "consensus", compute_label_ids(self._queries))
        try:
            self._labels.mkdir(parents=True, exist_ok=True)
            with atomic_file(target, suffix=".nii.gz") as scratch:
                save_mask(labels, volume.grid, scratch)
                made = {
                    "key": key,
                    "sha256": _hash(scratch),
                    "stamp": stamp,
                    "digest": volume.digest,
                    "modality": volume.modality,
                    "image": image,
                }
                # First the note, then the label: after a crash between them the label is missing or does not match,
                # and is made again.
                self._write_note(image, json.dumps(made))
        except OSError as err:
            raise StoreError(
                f"The label of '{image}' could not be written into '{self._labels}' ({err}). Free some disk space."
            ) from err
        if present is not None and present != target:
            present.unlink(missing_ok=True)
        return "made", ""

    def _ask(self, image: str, digest: str, modality: str) -> Question:
        card = self._engine.card
        adapter = self._engine.pick_adapter(self._settings.adapter, modality)
        name = adapter.full_name if adapter else ""
        request = self._request.settle(card.num_inference_steps, card.guidance_scale, name)
        return Question(request, image, digest, card.full_name)

    def _note_file(self, image: str) -> Path:
        return self._notes / f"{hashlib.sha256(image.encode()).hexdigest()}.json"

    def _read_note(self, image: str) -> dict[str, Any] | None:
        try:
            values = json.loads(self._note_file(image).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return (
            values
            if isinstance(values, dict) and {"key", "sha256", "stamp", "digest", "modality"} <= values.keys()
            else None
        )

    def _write_note(self, image: str, text: str) -> None:
        self._notes.mkdir(parents=True, exist_ok=True)
        replace_text(self._note_file(image), text)


def run_here(
    images: Sequence[Path], make: Callable[[], Prelabeller], index: int = 0, count: int = 1
) -> Iterator[ImageOutcome]:
    """Label this process's share, one image after the other."""
    prelabeller = make()
    for path in pick_share(images, index, count):
        yield prelabeller.label(path)


def run_on_ray(
    images: Sequence[Path], make: Callable[[], Prelabeller], workers: int, gpus_per_worker: float = 0.0
) -> Iterator[ImageOutcome]:
    """Label through Ray Data: `workers` actors with a model each, wherever the cluster has room.

    Every machine must see the same folders under the same paths. `ray.init` must have been called, or it starts a
    cluster here.

    Raises:
        RequestError: if ray is not installed.
    """
    try:
        import ray.data
    except ImportError as err:
        raise RequestError(
            "Ray is not installed. `pip install 'progidiff[ray]'` brings it, or leave --ray out."
        ) from err

    class Worker:
        """One model in one process of the cluster."""

        def __init__(self) -> None:
            self._prelabeller = make()

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return asdict(self._prelabeller.label(Path(row["path"])))

    # One block per image: a row that waits behind another one in the same block cannot go to a worker that is free.
    rows = ray.data.from_items([{"path": str(path)} for path in images], override_num_blocks=len(images))
    for row in rows.map(Worker, concurrency=workers, num_gpus=gpus_per_worker or None).iter_rows():
        yield ImageOutcome(**row)


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
