"""What `progidiff adapt` and the server's trainers do: a few labelled volumes become a version of an adapter.

1. split       labelled volumes -> training and held-back ones, by patient
2. evidence    the image encoder and the text-query head learn; Dice on the held-back volumes picks the step
3. proposals   on request: the layers that feed the denoiser learn; kept only if the consensus gains by them
4. gate        what is served now, the model itself and the new version on the same held-back slices
5. version     always written; published only if it beats both

A version of kind "lora" holds low-rank updates, one of kind "full" all weights of the conditioning branch. Training
always starts from the model itself, never from the version that is served: all labels are trained on together, and a
bad version leaves no trace in the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from progidiff.errors import RequestError
from progidiff.images.reading import load_volume
from progidiff.model.adapters import AdapterCard, AdapterStore, build_networks, check_name, compute_base_digest
from progidiff.model.backbone import Backbone
from progidiff.model.folder import ModelCard, find_backbone, load_pipeline
from progidiff.model.hub_card import HubFacts, write_front_matter
from progidiff.model.pipeline import ProposalPipeline
from progidiff.training.accepted_labels import find_folder_structures
from progidiff.training.adapt_stages import AdaptStages
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.gate import TrainedVersion, conclude, judge_dice
from progidiff.training.loop import Report, find_autocast_dtype
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training.recipes import describe_run
from progidiff.training.slice_cache import Case
from progidiff.training.split import AdaptData, find_cases, keep_modality, pick_named, prepare_data

logger = logging.getLogger(__name__)

CACHE = "cache"
"""Folder of the cached slices among the checkpoints."""

AdaptResult = TrainedVersion[AdapterCard]


def run_adapt(
    studies: Path | Sequence[Case],
    model_dir: Path,
    name: str | None,
    work: Path,
    config: AdaptConfig | None = None,
    *,
    adapters: Path | None = None,
    cases: Sequence[str] = (),
    held_out: Sequence[str] = (),
    shots: int | None = None,
    slices: int | None = None,
    structures: Sequence[str] = (),
    annotated: Mapping[str, Collection[int] | None] | None = None,
    modality: str | None = None,
    backbone_source: str | None = None,
    device: str | None = None,
    publish: bool = True,
    declared: Collection[str] | None = None,
    command: str | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> AdaptResult:
    """Train a version of an adapter and publish it if it is better than what is served.

    The same call continues a run that was stopped or killed: checkpoints lie in `work` under a name made of everything
    that the result depends on. A training that is done is not repeated.

    Args:
        studies: Folder of a local datastore (images, ``labels/final/``, names of the label ids in ``labels.json`` or in
            the labels' records), or cases collected elsewhere.
        model_dir: The base: ``backbone/`` and ``conditioning/``.
        name: Of the adapter; None for the modality in lower case, and where something new is learned for that with the
            name of the new, so that it takes the place of nothing else.
        work: Checkpoints and cached slices.
        adapters: Folder of adapters; None for ``adapters/`` in `model_dir`.
        cases: Train on these volumes; empty for all that are not held back.
        held_out: Hold these back; empty to have 1 or 2 picked.
        shots: Train on so many volumes.
        slices: Train on so many labelled slices, evenly spaced over all training volumes.
        structures: Only these; empty for all that are labelled.
        annotated: case -> axial slices that count (None for all of them), instead of what the datastore says; other
            slices and other cases are not used.
        modality: Only images of this one, "CT" or "MR"; "newest": that of the label saved last; None: there must be
            only one.
        publish: False to keep the version unpublished whatever the gate says.
        declared: Names of new structures that somebody meant as they stand; None for those of the folder.
        command: How the run was started, for its record; None for this process's command line.
        is_cancelled: Asked before every step and between validation batches; a clean checkpoint is written first.
        report: Receives log entries with "stage".

    Raises:
        RequestError, ImageError: if the labels cannot be trained on; the message says which and why.
        ModelError: if the base is not usable, or the served version is damaged.
        StoreError: if the disk refuses; what was trained is kept and the same call continues there.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or AdaptConfig()
    config.check()
    if name is not None:
        check_name(name)
    tell: Report = report or (lambda entry: None)
    tell({"stage": "prepare"})
    base = _Base.open(model_dir, adapters, backbone_source, device)
    labelled = find_cases(studies, annotated)
    if modality is not None:
        labelled = keep_modality(labelled, modality)
    parent = base.find_parent((pick_named(labelled, [*cases, *held_out]) or labelled)[0])
    if declared is None:
        declared = find_folder_structures(studies).declared() if isinstance(studies, Path) else ()
    choice = (cases, held_out, shots, slices, structures)
    data = prepare_data(labelled, base.card, work / CACHE, *choice, seed=config.seed, parent=parent, declared=declared)
    origin = command or shlex.join(sys.argv)
    return _train_and_conclude(base, name, data, config, work, publish, origin, is_cancelled or (lambda: False), tell)


def _train_and_conclude(
    base: _Base,
    name: str | None,
    data: AdaptData,
    config: AdaptConfig,
    work: Path,
    publish: bool,
    command: str,
    is_cancelled: Callable[[], bool],
    tell: Report,
) -> AdaptResult:
    """The version of these data and settings, trained now or earlier, published if it may be; see `run_adapt`."""
    config = config.complete(data.modality, bool(data.new), len(data.training))
    name = name or base.pick_name(data.modality, data.new)
    _check_modality_of_name(base.store, name, data.modality)
    tell({"stage": "prepare", "name": name, "modality": data.modality, **_describe_data(data)})
    fingerprint = _fingerprint(config, base.digest, data)
    folder = work / f"{name}-{fingerprint[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    written = earlier = base.store.find_run(name, fingerprint)
    if written is None:
        origin = {"command": command, "fingerprint": fingerprint}
        written = _write_version(base, name, data, config, folder, origin, is_cancelled, tell)
    how = f"`progidiff adapters use {written.full_name}` publishes"
    return conclude(base.store, written, base.store.run(written), publish, folder, how, earlier is not None)


@dataclass(frozen=True)
class _Base:
    """What versions adapt, and where they are kept.

    Attributes:
        card, pipeline: The model itself.
        digest: Of its weights; a version fits no other.
        store: Of the versions.
    """

    card: ModelCard
    pipeline: ProposalPipeline
    digest: str
    store: AdapterStore

    @classmethod
    def open(cls, model_dir: Path, adapters: Path | None, backbone_source: str | None, device: str | None) -> _Base:
        """Load the model."""
        backbone = Backbone(backbone_source or find_backbone(model_dir), device)
        card, pipeline = load_pipeline(model_dir, backbone, find_autocast_dtype("auto", backbone.device))
        return cls(card, pipeline, compute_base_digest(model_dir), AdapterStore(adapters or model_dir / "adapters"))

    def pick_name(self, modality: str, new: Collection[str]) -> str:
        """A name for a version: the modality's; of one that learned something new that of the version before it that
        knows nothing else new, or one made of what it learned.

        Example:
            The first version that knows a hippocampus in MR is "mr-hippocampus@1", the next one, which knows a fornix
            too, "mr-hippocampus@2".
        """
        name = modality.lower()
        if not new:
            return name
        for entry in self.store.entries():
            if entry.versions and not entry.problem:
                card = self.store.card(entry.name, entry.versions[-1])
                before = set(card.find_new(self.card.structures))
                if card.modality == modality and card.base == self.digest and before and before <= set(new):
                    return entry.name
        plain = unicodedata.normalize("NFKD", min(new)).encode("ascii", "ignore").decode().lower()
        return f"{name}-{'-'.join(re.findall(r'[a-z0-9]+', plain))[:40].strip('-') or 'own'}"

    def find_parent(self, case: Case) -> dict[str, Any] | None:
        """run.json of the version that answers for images like that of a case."""
        served = self.store.pick_for(load_volume(case.image, info=case.info).modality, self.digest)
        return None if served is None else self.store.run(served)

    def apply(self, card: AdapterCard, tensors: Mapping[str, Tensor], folder: Path) -> ProposalPipeline:
        """The model with the tensors of a version."""
        return self.pipeline.with_networks(
            *build_networks(card, tensors, self.pipeline.branch, self.pipeline.unet, folder)
        )


def _write_version(
    base: _Base,
    name: str,
    data: AdaptData,
    config: AdaptConfig,
    folder: Path,
    origin: Mapping[str, str],
    is_cancelled: Callable[[], bool],
    tell: Report,
) -> AdapterCard:
    """Train (2, 3), measure what is served, the model itself and the result (4), and write the version (5)."""
    logger.info(
        "Training on %d slices of %s; held back: %s",
        len(data.training),
        ", ".join(data.training.names),
        ", ".join(data.held_out) or "slices of it",
    )
    for note in data.notes:
        logger.warning("%s", note)
    phrases = PhraseTable(base.pipeline.backbone, data.training.structures)
    stages = AdaptStages(base.pipeline, data, phrases, base.card, config, folder, is_cancelled, tell)
    tensors, settings, choice = stages.train()
    tell({"stage": "gate"})
    figures = {"base": stages.measure(base.pipeline)}
    served = base.store.pick_for(data.modality, base.digest, data.training.structures, base.card.structures)
    if served is not None:
        figures["current"] = _measure_served(base, served, data, stages, folder)
    draft = AdapterCard(
        name,
        1,
        config.kind,
        data.modality,
        data.training.structures,
        base.digest,
        base.card.full_name,
        "",
        "",
        settings,
        grid=data.grid,
    )
    figures["adapted"] = stages.measure(base.apply(draft, tensors, folder))
    tell({"stage": "version", **{k: v["consensus"] for k, v in figures.items()}})
    record = _describe_version(base, served, data, figures, {**origin, "config": asdict(config), "choice": choice})
    is_alone = bool(data.new and find_lost(figures, record["parent"], record["base"], data.new))
    return base.store.add(
        name,
        config.kind,
        tensors,
        modality=data.modality,
        structures=data.new if is_alone else data.training.structures,
        base=base.digest,
        base_name=base.card.full_name,
        run=record,
        readme=lambda new: write_adapter_card(new, record, data),
        lora=settings,
        shapes=base.card.conditioning,
        grid=data.grid,
    )


def _measure_served(
    base: _Base, served: AdapterCard, data: AdaptData, stages: AdaptStages, folder: Path
) -> dict[str, float]:
    """Figures of a served version; of what it is not asked for, those of who answers."""
    figures = stages.measure(base.apply(served, base.store.load(served, base.digest), folder))
    others = [name for name in data.training.structures if name not in {*served.structures, *data.new}]
    if not others:
        return figures
    answers = base.store.pick_for(data.modality, base.digest, others, base.card.structures)
    pipeline = base.pipeline
    if answers is not None:
        pipeline = base.apply(answers, base.store.load(answers, base.digest), folder)
    theirs = stages.measure(pipeline)
    return {**figures, **{key: value for key, value in theirs.items() if key.partition(" ")[2] in others}}


def _describe_version(
    base: _Base,
    served: AdapterCard | None,
    data: AdaptData,
    figures: dict[str, dict[str, float]],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """run.json: what made a version, what it learned from, and the verdict."""
    parent, model = None if served is None else served.full_name, base.card.full_name
    accepted, verdict = judge(figures, parent, model, data.new)
    if data.new and not set(data.training.structures) & set(base.card.structures):
        verdict += f" All else is answered as before: for {', '.join(base.card.structures)} it is never asked."
    if "kept" in figures["adapted"]:
        kept = figures["adapted"]["kept"]
        verdict += f" For the structures without labels it agrees with {model} to {kept:.3f} (Dice)."
    if data.notes:
        verdict += f" {' '.join(data.notes)}"
    if data.same_patient:
        verdict += (
            " Only one volume is labelled: some of its slices were held back, so the figures flatter."
            if len(data.training.names) == 1
            else " Something new is labelled in one volume only: slices of what was trained on were held back, so the "
            "figures flatter."
        )
    training = data.training
    return {
        **describe_run(),
        **{name: origin[name] for name in ("command", "fingerprint", "config")},
        "base": model,
        "parent": parent,
        "training_cases": training.names,
        "training_slices": {n: [z for v, z in training.index if v == i] for i, n in enumerate(training.names)},
        "held_out_cases": data.held_out,
        "same_patient": data.same_patient,
        "new_structures": list(data.new),
        "grid": data.grid,
        "notes": list(data.notes),
        "data_sha256": {**training.digests, **data.validation.digests},
        "choice": origin["choice"],
        "validation": figures,
        "accepted": accepted,
        "verdict": verdict,
    }


MAX_LOSS = 0.005
"""Dice that a version may lose on what was known, where it learns something new, and still be asked for it."""


def judge(
    figures: Mapping[str, Mapping[str, float]], current: str | None, base: str, new: Collection[str] = ()
) -> tuple[bool, str]:
    """The quality gate: a version must beat what is served and the model itself on the held-back slices.

    Where it learns something new, it must beat them there. If it lost more than `MAX_LOSS` on what was known, it is not
    asked for that (`find_lost`): what nobody else can do need not wait for it.

    Args:
        figures: From `measure_dice`, by "base", "current" and "adapted".
        new: Structures that the model itself does not know.

    Returns:
        Whether it may be published, and why in a sentence.

    Example:
        >>> judge({"base": {"consensus": 0.5}, "adapted": {"consensus": 0.7}}, None, "ct-base@1")
        (True, 'Dice 0.700 on the held-back slices, ct-base@1 has 0.500.')
    """
    rivals = _name_rivals(figures, current, base)
    if not new:
        own = figures["adapted"]["consensus"]
        return judge_dice(own, {name: found["consensus"] for name, found in rivals.items()}, "slices")
    learned, known = _split_figures(figures["adapted"], new)
    gains = {name: _average(found, learned) for name, found in rivals.items()}
    told = f"Dice {_average(figures['adapted'], learned):.3f} for {', '.join(learned)} on the held-back slices"
    told += f", {' and '.join(f'{name} has {dice:.3f}' for name, dice in gains.items())}."
    accepted = bool(learned) and all(_average(figures["adapted"], learned) > dice for dice in gains.values())
    lost = find_lost(figures, current, base, new)
    if lost:
        told += f" {lost}"
    elif known:
        kept = _average(figures["adapted"], known)
        told += f" For {', '.join(known)} it has {kept:.3f}, at most {MAX_LOSS} less than before."
    return accepted, told


def find_lost(figures: Mapping[str, Mapping[str, float]], current: str | None, base: str, new: Collection[str]) -> str:
    """What a version that learned something new lost of what was known, as a sentence; "" if that is at most
    `MAX_LOSS`.

    Example:
        >>> figures = {"base": {"consensus liver": 0.9, "consensus cyst": 0.0},
        ...     "adapted": {"consensus liver": 0.8, "consensus cyst": 0.7}}
        >>> find_lost(figures, None, "ct-base@1", ["cyst"])
        'For liver it has 0.800 where ct-base@1 has 0.900: it answers for cyst alone, all else is answered as before.'
    """
    learned, known = _split_figures(figures["adapted"], new)
    kept = _average(figures["adapted"], known)
    for name, found in _name_rivals(figures, current, base).items():
        before = _average(found, known)
        if kept < before - MAX_LOSS:
            alone = f"it answers for {', '.join(learned)} alone, all else is answered as before"
            return f"For {', '.join(known)} it has {kept:.3f} where {name} has {before:.3f}: {alone}."
    return ""


def _name_rivals(
    figures: Mapping[str, Mapping[str, float]], current: str | None, base: str
) -> dict[str, Mapping[str, float]]:
    served = {} if current is None or "current" not in figures else {current: figures["current"]}
    return {**served, base: figures["base"]}


def _split_figures(figures: Mapping[str, float], new: Collection[str]) -> tuple[list[str], list[str]]:
    """New and known structures of which the held-back slices show any."""
    measured = [key.removeprefix("consensus ") for key in figures if key.startswith("consensus ")]
    return [name for name in measured if name in new], [name for name in measured if name not in new]


def _average(figures: Mapping[str, float], structures: Sequence[str]) -> float:
    return sum(figures[f"consensus {name}"] for name in structures) / len(structures) if structures else 0.0


def _check_modality_of_name(store: AdapterStore, name: str, modality: str) -> None:
    """A name stands for one modality: publishing an MR version of a CT adapter would take the adapter from all CT
    images.
    """
    for version in store.entry(name).versions[-1:]:
        card = store.card(name, version)
        if card.modality != modality:
            raise RequestError(
                f"Adapter '{name}' is for {card.modality} images ({card.full_name}), but the labelled images are "
                f"{modality}; choose another name, for example '{modality.lower()}'."
            )


def _describe_data(data: AdaptData) -> dict[str, Any]:
    """How much there is to learn from, for whoever watches."""
    return {
        "training_cases": data.training.names,
        "training_slices": len(data.training),
        "held_out_cases": data.held_out,
        "held_out_slices": len(data.validation),
        "unused_cases": data.unused,
        "structures": list(data.training.structures),
        "same_patient": data.same_patient,
        "notes": list(data.notes),
    }


def write_adapter_card(card: AdapterCard, run: Mapping[str, Any], data: AdaptData) -> str:
    """The card for people, in Markdown."""
    figures = run["validation"]
    kinds = [k for k in ("base", "current", "adapted") if k in figures]
    titles = {"base": card.base_name, "current": str(run["parent"]), "adapted": card.full_name}
    rows = "\n".join(
        f"| {s} | {' | '.join(f'{figures[k][key]:.3f}' for k in kinds)} |"
        for s, key in [("mean", "consensus"), *((s, f"consensus {s}") for s in card.structures)]
        if key in figures["adapted"]
    )
    lora = card.lora
    if lora is None:
        what = (
            f"All weights of the conditioning branch ({', '.join(run['choice']['targets'])} trained), in place of those"
        )
    else:
        norms = ", with group norms" if lora.norms else ""
        what = f"Low-rank adapter (rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}{norms})"
    proposals = "trained too" if run["choice"]["proposals"] else "as in the base"
    warning = (
        "Only one volume was labelled: the held-back slices are of the same patient, so these figures flatter.\n\n"
        if data.same_patient
        else ""
    )
    held_back = ", ".join(data.held_out) or "slices of the same volume"
    facts = HubFacts(
        name=card.full_name,
        library="peft" if lora is not None else "diffusers",
        tags=("medical", card.modality.lower(), *card.structures),
        base_model=card.base_name,
        measured_on="Held-back slices of the labels it was trained on",
        dice={
            key.removeprefix("consensus").strip(): value
            for key, value in figures["adapted"].items()
            if key.startswith("consensus")
        },
    )
    return f"""{write_front_matter(facts)}# {card.full_name}

{what}
of {card.base_name} for {card.modality} images. Structures: {", ".join(card.structures)}.{_tell_new(data)}

* Trained on {len(data.training)} slices of {len(data.training.names)} volumes: {", ".join(data.training.names)}.
* Held back, to pick the number of steps and to decide about publishing: {held_back}.
* {run["choice"]["steps"]} steps, chosen among {len(run["choice"]["history"])} validations. Proposals: {proposals}.
* Made by `{run["command"]}` at commit {run["commit"][:12] or "unknown"} on {run["date"]}.
* Verdict: {run["verdict"]} {"Accepted." if run["accepted"] else "Not published."}

Dice of the consensus on the held-back slices, at working resolution. They were used for choices, so they are no test
result:

| structure | {" | ".join(titles[k] for k in kinds)} |
|---|{"---|" * len(kinds)}
{rows}

{warning}For research, not for diagnosis. Weights inherit the terms of the images that they and {card.base_name}
were trained on.
"""


def _tell_new(data: AdaptData) -> str:
    """What a version can do that the model itself cannot."""
    if not data.new:
        return ""
    grid = "" if data.grid is None else f" Pixels of its working grid: {data.grid['spacing_range'][0]:g} mm and more."
    return f"\nNew, unknown to the model itself: {', '.join(data.new)}.{grid}"


def _fingerprint(config: AdaptConfig, base: str, data: AdaptData) -> str:
    """Of everything that the result depends on."""
    parts = [
        asdict(config), base, data.modality, data.training.structures, sorted(data.training.digests.items()),
        sorted(data.validation.digests.items()),
        data.training.index, data.validation.index, *([] if data.grid is None else [data.grid]),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
