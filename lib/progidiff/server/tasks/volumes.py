"""The infer task `progidiff` of the MONAI Label app: a prompt and an image in, a label map and its numbers out.

A request goes: options -> prompt -> volume -> kept proposals, or the engine under the device's queue -> what to show ->
file. Proposals are kept in a `ProposalStore`, so showing another one touches no network and no queue, also after a
restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from progidiff.errors import ModelError, NotFoundError, PromptError, RequestError
from progidiff.images.formats import strip_suffix
from progidiff.images.geometry import Grid
from progidiff.images.modality import list_modalities
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.labels.folder_structures import FolderStructures
from progidiff.model.adapters import AdapterCard
from progidiff.prompts.parser import Query, describe, parse_prompt
from progidiff.prompts.structures import STRUCTURES, fixed_ids, number_structures
from progidiff.proposals.device_queue import NOBODY, DeviceQueue
from progidiff.proposals.edits import Edit
from progidiff.proposals.engine import Engine
from progidiff.proposals.islands import CLEAN_UPS
from progidiff.proposals.keeper import Answer, DiskShelf, Keeper, Question, TakeTurn
from progidiff.proposals.placed_edits import place_edits
from progidiff.proposals.request import (
    AUTO,
    BEST,
    CONSENSUS,
    DISAGREEMENT,
    NONE,
    PROBABILITY,
    InferOptions,
    ProposalRequest,
)
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import UnfinishedProposals, Work
from progidiff.server.options import ServerOptions
from progidiff.server.tasks.answers import (
    KeptProposals,
    KeptResult,
    PromptEntry,
    Summary,
    VolumeAnswer,
    describe_answer,
    draw_shown,
    save_if_asked,
    write_and_save,
)
from progidiff.training.split import NEEDED_SLICES

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT_VOLUMES = 2

UNNAMED = "unnamed structure"
"""What is answered where edits came without a prompt."""


class ProposalInferTask(InferTask):
    """K proposals per prompt, one of them (or their consensus, or where they differ) as a label map on the image's
    grid.

    Args:
        engine: The model; loaded at the first request.
        others: The same model on further devices, in the order of `ServerOptions.list_devices`.
        own: The own structures of the folder that is served; None if there is no folder.
        store: Where proposals are kept.
        options: Of the server.
        datastore: Gives the app's datastore, to save tag `original` into.
    """

    def __init__(
        self,
        engine: Engine,
        store: ProposalStore,
        options: ServerOptions,
        datastore: Callable[[], Datastore],
        others: Sequence[Engine] = (),
        own: FolderStructures | None = None,
    ) -> None:
        self.own = own
        self.engine = engine
        names = list(options.list_devices())
        self._others = dict(zip(names[1:], others, strict=True))
        self.store = store
        self.keeper = Keeper(DiskShelf(store))
        self.options = options
        self.queue = DeviceQueue(names, max_waiting=options.max_waiting)
        self._datastore = datastore
        self._volumes: Recent[Volume] = Recent(_KEPT_VOLUMES)
        self._base_structures = _known_structures(engine)
        super().__init__(
            type=InferType.SEGMENTATION,
            labels={name: number for name, number in fixed_ids().items() if name in self._base_structures},
            dimension=3,
            description=(
                "Type a prompt ('left kidney', 'liver and spleen', 'all'): K diffusion proposals, their consensus and "
                "where they disagree"
            ),
        )

    def config(self) -> dict[str, Any]:
        """The options with their defaults, as viewers draw them: text and numbers as cells, booleans as boxes, lists as
        menus.
        """
        defaults = self.engine.info()
        numbers = [str(k + 1) for k in range(self.options.max_proposals)]
        probability = [PROBABILITY] if defaults.get("is_calibrated") else []
        return {
            "prompt": "liver",
            "num_proposals": min(4, self.options.max_proposals),
            "show": [CONSENSUS, BEST, *numbers, DISAGREEMENT, *probability],
            "steps": int(defaults.get("num_inference_steps") or 4),
            "seed": 0,
            "adapter": self._adapters(),
            "modality": [AUTO, *list_modalities()],
            "allow_free_text": False,
            "clean_up": [self.options.clean_up, *(choice for choice in CLEAN_UPS if choice != self.options.clean_up)],
            "save_original": False,
            "save_proposals": False,
        }

    @property
    def structures(self) -> tuple[str, ...]:
        """What can be asked for: what the model was trained on, and what served versions learned beside it."""
        return (*self._base_structures, *self.engine.find_taught())

    def number(self, names: Iterable[str]) -> dict[str, int]:
        """Label ids in answers: the fixed ones, and for the folder's own structures those of the folder."""
        own = {} if self.own is None else self.own.answer_ids()
        return number_structures(names, own)

    def is_valid(self) -> bool:
        """Always offered: if weights are missing, the request says so."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Answer one request.

        Args:
            request: "image" (path), "image_id" (id in the datastore, "" for an upload), "image_info" (what the
                datastore knows about it), "params" (see `InferOptions`) and "asker" (an `Asker`, if there is a client).

        Returns:
            Path of a new temporary file with the mask, which the caller removes, and the result parameters.

        Raises:
            ProGiDiffError: whatever is wrong with the request, the image or the model.
        """
        started = time.monotonic()
        image_id = str(request.get("image_id", ""))
        options, queries = self.read_request(request.get("params", {}))
        volume = self.open_volume(str(request["image"]), options.modality, request.get("image_info") or {})
        # Decided once per request, so that a version published meanwhile cannot mix with this one's name.
        adapter = self.pick_adapter(options.adapter, volume, queries)
        question = self.ask(options.to_request(queries), volume, image_id, adapter)
        asker = request.get("asker", NOBODY)
        found = self.answer(
            question,
            volume,
            lambda: self.queue.job("infer", image_id or volume.name, options.job_id, asker),
            Work(first=options.first_slice),
        )
        grid, names = volume.grid, self.number(query.name for query in queries)
        labels, present, counts = draw_shown(found.proposals, grid, names, options.show)
        file, saved = write_and_save(
            labels,
            grid,
            options.result_extension,
            present,
            lambda: save_if_asked(options, self._datastore(), image_id, found.proposals, grid, names, found.key),
        )
        warnings = self.engine.find_warnings(volume, queries, adapter) + find_contradictions(
            options.edits, [query.name for query in queries], grid
        )
        answer = VolumeAnswer(
            **{
                **found.proposals.summary(),
                **describe_answer(found, options, image_id, saved, grid, warnings, time.monotonic() - started),
            },
            label_names=present,
            shown_ml={name: round(float(counts[value]) * volume.voxel_ml, 3) for name, value in present.items()},
            prompt=options.prompt,
            slice_axis="disagreement_per_slice counts axial slices from inferior to superior",
        )
        return str(file), answer.model_dump()

    @property
    def listens_to_edits(self) -> bool:
        """Whether proposals are drawn given what a person drew."""
        return bool(self.engine.info().get("listens_to_edits"))

    def read_request(
        self, params: Mapping[str, Any], is_steered: bool = False
    ) -> tuple[InferOptions, tuple[Query, ...]]:
        """Check what a request asks for, before any image is read.

        Args:
            params: As sent.
            is_steered: Whether somebody drew in another way than by the option `edits`.

        Raises:
            RequestError: if an option is wrong or the prompt names nothing known.
            ModelError: if there are no weights to answer with.
        """
        adapters = [
            AUTO,
            NONE,
            *(entry.name for entry in self.engine.adapters.entries()),
        ]  # unpublished versions may be asked for by number
        options = InferOptions.from_params(params, self.config(), self.options.max_proposals, adapters)
        info = self.engine.info()
        if info.get("error"):
            raise ModelError(str(info["error"]))
        is_steered = is_steered or bool(options.edits)
        if is_steered and not info.get("listens_to_edits"):
            raise RequestError(
                f"{info['model_version']} chooses among proposals and does not draw by edits. Serve a model that has a "
                "close-up, or choose by clicks with SmartEdit."
            )
        if options.show == PROBABILITY and not info.get("is_calibrated"):
            raise RequestError(
                f"The agreement of {info['model_version']} was never compared with the truth, so that it is no "
                "probability; show consensus or disagreement, or look at the agreement on the review page."
            )
        queries = self._read_prompt(options, str(info["model_version"]), is_steered)
        # What was drawn of other structures decides nothing about these, and is in no key of theirs.
        meant = {"", *(query.name for query in queries)}
        return replace(options, edits=tuple(edit for edit in options.edits if edit.structure in meant)), queries

    def _read_prompt(self, options: InferOptions, model_version: str, is_steered: bool) -> tuple[Query, ...]:
        """The structures that a prompt names. What the model does not know, or what has no name, is what edits say."""
        if is_steered and not options.prompt.strip():
            return (Query(UNNAMED, "", known=False),)
        known, words = self.structures, {} if self.own is None else self.own.words()
        try:
            return parse_prompt(options.prompt, known, options.allow_free_text, model_version, words)
        except PromptError as err:
            own = None if self.own is None else self.own.find(options.prompt)
            if not is_steered and own is not None and own.is_own and own.name not in known:
                raise PromptError(self._tell_missing(own.name)) from err
            if not is_steered or err.suggestions:  # "livr" is asked back
                raise
            named = parse_prompt(options.prompt, known, True, model_version, words)
            return tuple(query if query.known else replace(query, text="") for query in named)

    def _tell_missing(self, structure: str) -> str:
        """Why a structure of the folder cannot be asked for yet."""
        count = 0 if self.own is None else self.own.count_labelled_slices(structure)
        told = f"No model knows '{structure}' yet: it has {count} labelled slice{'' if count == 1 else 's'}"
        if count < NEEDED_SLICES:
            return f"{told}; label {NEEDED_SLICES - count} more and train with at least {NEEDED_SLICES}."
        return f"{told}, which is enough to train; start a training (Train in the viewer, or POST /train/progidiff)."

    def pick_adapter(self, adapter: str | None, volume: Volume, queries: Sequence[Query]) -> AdapterCard | None:
        """The version that answers a request, see `Engine.pick_adapter`."""
        return self.engine.pick_adapter(adapter, volume.modality, [query.name for query in queries])

    def describe_proposals(self, image_id: str, key: str | None = None) -> KeptProposals:
        """What is kept of an image.

        Args:
            image_id: Of the datastore.
            key: Of one result ("proposals" in the answer to a request); None for the newest.

        Raises:
            NotFoundError: if nothing is kept, or not this result.
        """
        entries = {entry.key: entry for entry in self.store.list(image_id)}
        if not entries:
            raise NotFoundError(
                f"No proposals of image '{image_id}' are kept. POST /infer/progidiff?image={image_id} makes some."
            )
        chosen = key or next(iter(entries))
        result = self.store.load(chosen) if chosen in entries else None
        if result is None:
            raise NotFoundError(
                f"No proposals {chosen[:64]} of image '{image_id}' are kept. Leave the key out to get the newest."
            )
        kept = [
            KeptResult(
                proposals=entry.key,
                created=round(entry.created, 3),
                structures=list(entry.structures),
                bytes=entry.num_bytes,
            )
            for entry in entries.values()
        ]
        return KeptProposals(image=image_id, kept=kept, proposals=chosen, summary=Summary(**result.summary()))

    def list_prompts(self) -> list[PromptEntry]:
        """The structures the model was trained on, with label id and synonyms."""
        known = self.structures
        own = {} if self.own is None else {row.name: row for row in self.own.own()}
        ids, entries = self.number(known), []
        for entry in describe(known):
            row = own.get(entry["structure"])
            if row is not None:
                entry = {**entry, "color": row.color, "synonyms": list(row.words)}
            entries.append(PromptEntry(label=ids[entry["structure"]], **entry))
        return entries

    def _adapters(self) -> list[str]:
        return [AUTO, NONE, *map(str, self.engine.info().get("adapters") or [])]

    def open_volume(self, path: str, modality: str | None = None, info: Mapping[str, Any] | None = None) -> Volume:
        """`load_volume`, with the last few images kept open."""
        info = info or {}
        key = repr((path, modality, info.get("modality"), info.get("Modality"), fingerprint(Path(path))))
        volume = self._volumes.get(key)
        if volume is None:
            volume = load_volume(path, modality, info)
            self._volumes.put(key, volume)
        return volume

    def ask(self, request: ProposalRequest, volume: Volume, image_id: str, adapter: AdapterCard | None) -> Question:
        """A request about an image, with the model's defaults filled in.

        Args:
            request: What is asked.
            volume: The image.
            image_id: Its id in the datastore, "" for an upload.
            adapter: The version that answers, see `Engine.pick_adapter`; None for the model itself.
        """
        card = self.engine.card
        settled = request.settle(card.num_inference_steps, card.guidance_scale, adapter.full_name if adapter else "")
        return Question(settled, image_id, volume.digest, card.full_name)

    def answer(self, question: Question, volume: Volume, take_turn: TakeTurn, work: Work | None = None) -> Answer:
        """The proposals, kept or computed; see `Keeper.find_or_compute`."""
        return self.keeper.find_or_compute(question, partial(self.propose, question.request, volume), take_turn, work)

    def propose(self, request: ProposalRequest, volume: Volume, work: Work) -> VolumeProposals:
        """Compute on the device that has the turn (`Work.device`); whoever calls holds it. See `Engine.propose`."""
        return self.find_engine(work.device).propose(request, volume, work)

    @property
    def engines(self) -> dict[str, Engine]:
        """The engine of every device, by the name that the queue calls it."""
        return {self.queue.devices[0]: self.engine, **self._others}

    def find_engine(self, device: str) -> Engine:
        """The engine of a device."""
        return self._others.get(device, self.engine)

    def find_unfinished(self, job_id: str) -> UnfinishedProposals | None:
        """What a running job has proposed so far; None before its first slices and after its end."""
        return self.keeper.find_unfinished(job_id)


def build_task(
    options: ServerOptions,
    embedded_model: Path,
    datastore: Callable[[], Datastore],
    own: FolderStructures | None = None,
) -> ProposalInferTask:
    """The task as the app serves it; loads no weights.

    Args:
        options: From `--conf`.
        embedded_model: The model folder used when `options.model_dir` is None.
        datastore: Gives the app's datastore.
        own: See `ProposalInferTask`.
    """
    engines = [
        Engine(
            model_dir=options.model_dir or embedded_model,
            backbone=options.backbone,
            device=device,
            adapters=options.adapters,
            cpu_fallback=options.cpu_fallback,
            at_once=options.at_once,
        )
        for device in options.list_devices().values()
    ]
    store = ProposalStore(options.store, max_bytes=int(options.store_gb * 1e9))
    return ProposalInferTask(engines[0], store, options, datastore, engines[1:], own)


def find_contradictions(edits: Sequence[Edit], structures: Sequence[str], grid: Grid) -> list[str]:
    """What to say of voxels that somebody called inside and outside of the same structure."""
    counts = ((name, place_edits(edits, name, grid).count_contradictions()) for name in structures) if edits else ()
    return [
        f"{'One voxel was' if count == 1 else f'{count} voxels were'} said to be inside and outside of {name}; outside "
        "counts. Take one of the two back if that is not what you mean."
        for name, count in counts
        if count
    ]


class Recent(Generic[T]):
    """The last few values by key, for several threads."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> T | None:
        """The value; None if it is not among the last ones."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: str, value: T) -> None:
        """Keep a value, and forget the one that was not asked for the longest if there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._count:
                self._values.popitem(last=False)


def _known_structures(engine: Engine) -> tuple[str, ...]:
    try:
        return tuple(name for name in engine.structures if name in STRUCTURES) or STRUCTURES
    except ModelError as err:
        logger.warning("The server starts without a usable model: %s", err)
        return STRUCTURES


def fingerprint(path: Path) -> tuple[Any, ...]:
    """Changes when the file, or any file of the folder, changes."""
    if not path.exists():
        return ()
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_name(strip_suffix(path) + ".json")]
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())
