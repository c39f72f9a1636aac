"""What `progidiff adapt` does: a few labelled volumes of another modality or site become a version of an adapter.

1. split       labelled volumes -> training and held-back ones, by patient
2. evidence    low-rank updates of the image encoder and the text-query head; Dice on the held-back volumes picks the step
3. proposals   on request: low-rank updates of the layers that feed the denoiser; kept only if the consensus gains by them
4. gate        what is served now, the model itself and the new version on the same held-back slices
5. version     always written; published only if it beats both

Training always starts from the model itself, never from the version that is served: all labels are trained on together, and
a bad version leaves no trace in the next one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from progidiff.adapters import AdapterCard, AdapterStore, build_networks, check_name, compute_base_digest
from progidiff.backbone import Backbone
from progidiff.errors import CancelledError, ImageError, ModelError, NotFoundError, PromptError, RequestError
from progidiff.lora import LoraSettings, collect_tensors, inject_lora, load_tensors
from progidiff.model_files import ModelCard, load_pipeline
from progidiff.pipeline import ProposalPipeline
from progidiff.prompts import parse_prompt
from progidiff.training.data import Case, SliceCache, augment, list_cases
from progidiff.training.evidence import PhraseTable
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.losses import compute_evidence_loss
from progidiff.training.proposals import train_proposals
from progidiff.training.recipes import describe_run
from progidiff.training.scores import DiceTally, one_hot
from progidiff.volume import load_label, load_volume

logger = logging.getLogger(__name__)

HELD_BACK_SHARE = 0.25
"""Of the labelled slices, where there is one labelled volume only."""

MAX_VALIDATION_SLICES = 96


@dataclass(frozen=True)
class AdaptConfig:
    """How an adapter is trained; the defaults are meant for 1 to 10 volumes.

    Attributes:
        lora: Rank, alpha, targets.
        steps: Largest number of steps; validation stops earlier.
        learning_rate: Peak.
        batch_size: Slices per step.
        validate_every: Steps between validations.
        patience: Validations without a gain after which training stops.
        augmentation: Strength of affine and intensity augmentation; 1 is the recipe of the base.
        bias_field: Standard deviation of the logarithm of a smooth random shading (coil sensitivity); None: 0.3 for MR, 0 for CT.
        proposal_steps: Steps of stage 3; 0 leaves it out.
        proposal_rate: Its learning rate.
        num_proposals: K of the consensus that the gate compares.
        seed: Run seed.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    steps: int = 200
    learning_rate: float = 2e-3
    batch_size: int = 12
    validate_every: int = 25
    patience: int = 4
    augmentation: float = 1.0
    bias_field: float | None = None
    proposal_steps: int = 0
    proposal_rate: float = 1e-3
    num_proposals: int = 4
    seed: int = 0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            RequestError: naming the setting and its range.
        """
        self.lora.check()
        ranges: dict[str, tuple[float, float]] = {
            "steps": (1, 100_000), "learning_rate": (1e-7, 1.0), "batch_size": (1, 256), "validate_every": (1, 10_000), "patience": (1, 1000),
            "augmentation": (0, 3), "proposal_steps": (0, 100_000), "proposal_rate": (1e-7, 1.0), "num_proposals": (1, 16), "seed": (0, 2**62),
        }  # fmt: skip
        if self.bias_field is not None:
            ranges["bias_field"] = (0, 2)
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"Setting {name} must lie in {low:g}..{high:g}, got {value}.")
        if self.proposal_steps and not {"injection", "denoiser"} & set(self.lora.target_modules):
            raise RequestError("proposal_steps train 'injection' or 'denoiser', but neither is a target; add one, or set proposal_steps to 0.")
        if not self.proposal_steps and not {"encoder", "query_head"} & set(self.lora.target_modules):
            raise RequestError("Nothing would be trained: 'injection' and 'denoiser' learn from proposals only; set proposal_steps, for example 200.")


@dataclass
class AdaptData:
    """What a run trains on and is judged by.

    Attributes:
        training, validation: Slices of different patients, unless `same_patient`.
        modality: "CT" or "MR".
        held_out: Names of the held-back volumes.
        unused: Labelled volumes that were neither trained on nor held back.
        same_patient: One volume only: some of its slices are held back.
    """

    training: SliceCache
    validation: SliceCache
    modality: str
    held_out: list[str]
    unused: list[str]
    same_patient: bool


@dataclass
class AdaptResult:
    """What came out.

    Attributes:
        card: The version that was written.
        published: Whether it is served now.
        message: The verdict in a sentence.
        figures: Held-back Dice of "base", "current" (if one was served) and "adapted".
    """

    card: AdapterCard
    published: bool
    message: str
    figures: dict[str, dict[str, float]]


def run_adapt(
    studies: Path,
    model_dir: Path,
    name: str,
    work: Path,
    config: AdaptConfig | None = None,
    *,
    adapters: Path | None = None,
    cases: Sequence[str] = (),
    held_out: Sequence[str] = (),
    shots: int | None = None,
    slices: int | None = None,
    structures: Sequence[str] = (),
    annotated: Mapping[str, Sequence[int]] | None = None,
    backbone_source: str | None = None,
    device: str | None = None,
    publish: bool = True,
    is_cancelled: Callable[[], bool] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> AdaptResult:
    """Train a version of an adapter and publish it if it is better than what is served.

    The same call continues a run that was stopped or killed: checkpoints lie in `work` under a name made of everything that the
    result depends on. A training that is done is not repeated.

    Args:
        studies: Local datastore: images, ``labels/final/``, ``labels.json``.
        model_dir: The base: ``backbone/`` and ``conditioning/``.
        name: Of the adapter.
        work: Checkpoints and cached slices.
        adapters: Folder of adapters; None for ``adapters/`` in `model_dir`.
        cases: Train on these volumes; empty for all that are not held back.
        held_out: Hold these back; empty to have 1 or 2 picked.
        shots: Train on so many volumes.
        slices: Train on so many labelled slices, evenly spaced over all training volumes.
        structures: Only these; empty for all that are labelled.
        annotated: case -> axial slices that somebody labelled; other slices of the case are not used. None: whole volumes are labelled.
        publish: False to keep the version unpublished whatever the gate says.
        is_cancelled: Asked before every step; a clean checkpoint is written first.
        report: Receives log entries with "stage".

    Raises:
        RequestError, ImageError: if the labels cannot be trained on; the message says which and why.
        ModelError: if the base is not usable.
        StoreError: if the version could not be written; the training is kept and the same call continues there.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or AdaptConfig()
    config.check()
    check_name(name)
    store = AdapterStore(adapters or model_dir / "adapters")
    backbone = Backbone(backbone_source or model_dir / "backbone", device)
    autocast = torch.bfloat16 if _has_fast_bf16(backbone.device) else None
    card, base = load_pipeline(model_dir, backbone, autocast)
    data = prepare_data(studies, card, work / "cache", cases, held_out, shots, slices, structures, annotated, config.seed)
    if config.bias_field is None:
        config = replace(config, bias_field=0.3 if data.modality == "MR" else 0.0)
    base_digest = compute_base_digest(model_dir)
    fingerprint = _fingerprint(config, base_digest, data)
    folder = work / f"{name}-{fingerprint[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    phrases = PhraseTable(backbone, data.training.structures)
    logger.info(
        "Training on %d slices of %s; held back: %s", len(data.training), ", ".join(data.training.names), ", ".join(data.held_out) or "slices of it"
    )

    def tell(entry: dict[str, Any]) -> None:
        if report is not None:
            report(entry)

    earlier = _find_finished(store, name, fingerprint)
    if earlier is not None:
        return _finish(store, earlier, store.run(earlier), publish, repeated=True)

    tensors, settings, choice = _train(base, data, phrases, card, config, folder, is_cancelled, tell)
    figures = {"base": measure_dice(base, data.validation, phrases, card, config.num_proposals)}
    current = store.current(name)
    if current is not None:
        served = store.card(name, current)
        if served.base == base_digest:
            networks = build_networks(served, store.load(served, base_digest), base.branch, base.unet, store.folder(served))
            figures["current"] = measure_dice(_with(base, *networks), data.validation, phrases, card, config.num_proposals)
    draft = AdapterCard(name, 1, "lora", data.modality, data.training.structures, base_digest, card.full_name, "", "", settings)
    networks = build_networks(draft, tensors, base.branch, base.unet, folder)
    figures["adapted"] = measure_dice(_with(base, *networks), data.validation, phrases, card, config.num_proposals)
    tell({"stage": "gate", **{k: v["consensus"] for k, v in figures.items()}})

    accepted, verdict = judge(figures, None if current is None else f"{name}@{current}", card.full_name)
    run = {
        **describe_run(),
        "command": shlex.join(sys.argv),
        "fingerprint": fingerprint,
        "config": asdict(config),
        "base": card.full_name,
        "parent": None if current is None else f"{name}@{current}",
        "training_cases": data.training.names,
        "training_slices": {n: [z for v, z in data.training.index if v == i] for i, n in enumerate(data.training.names)},
        "held_out_cases": data.held_out,
        "same_patient": data.same_patient,
        "data_sha256": {**data.training.digests, **data.validation.digests},
        "choice": choice,
        "validation": figures,
        "accepted": accepted,
        "verdict": verdict,
    }
    written = store.add(
        name,
        "lora",
        tensors,
        modality=data.modality,
        structures=data.training.structures,
        base=base_digest,
        base_name=card.full_name,
        run=run,
        readme=lambda new: write_adapter_card(new, run, data),
        lora=settings,
    )
    return _finish(store, written, run, publish)


def _find_finished(store: AdapterStore, name: str, fingerprint: str) -> AdapterCard | None:
    """The version that the very same training made, if it was done before."""
    for version in reversed(store.entry(name).versions):
        try:
            card = store.card(name, version)
            if store.run(card).get("fingerprint") == fingerprint:
                return card
        except (ModelError, NotFoundError) as err:
            logger.warning("%s", err)
    return None


def _finish(store: AdapterStore, card: AdapterCard, run: Mapping[str, Any], publish: bool, repeated: bool = False) -> AdaptResult:
    """Publish a version if the gate accepted it; once, so that a rollback is not undone by repeating the command."""
    name, verdict = card.full_name, run["verdict"]
    before = "This very training was done before. " if repeated else ""
    if not run["accepted"]:
        return AdaptResult(card, False, f"{before}{name} is kept but not published: {verdict}", run["validation"])
    once = any(e["event"] == "published" and e["version"] == card.version for e in store.history(card.name))
    if publish and not once:
        store.publish(card.name, card.version)
    served = store.current(card.name) == card.version
    if served:
        message = f"{before}{name} is published: {verdict}"
    else:
        message = f"{before}{name} is kept and not published, as asked; `progidiff adapters use {name}` publishes it. {verdict}"
    return AdaptResult(card, served, message, run["validation"])


def prepare_data(
    studies: Path,
    card: ModelCard,
    cache: Path,
    cases: Sequence[str] = (),
    held_out: Sequence[str] = (),
    shots: int | None = None,
    slices: int | None = None,
    structures: Sequence[str] = (),
    annotated: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> AdaptData:
    """Choose and check the labelled volumes; see `run_adapt` for the arguments.

    Raises:
        RequestError: if a case, structure or number makes no sense.
        ImageError: if a label holds unknown ids or nothing, or the volumes are of several modalities.
    """
    for option, value in (("shots", shots), ("slices", slices)):
        if value is not None and value < 1:
            raise RequestError(f"Option {option} must be at least 1, got {value}.")
    everything = list_cases(studies)
    kept_back = list_cases(studies, held_out) if held_out else []
    chosen = list_cases(studies, cases) if cases else []
    both = {c.name for c in kept_back} & {c.name for c in chosen}
    if both:
        raise RequestError(f"{', '.join(sorted(both))} cannot be trained on and held back at once; name each volume once.")
    # An order that depends on the names and the seed alone: the same volumes are picked on every machine.
    shuffled = sorted(everything, key=lambda c: hashlib.sha256(f"{seed}:{c.name}".encode()).digest())
    if not kept_back:
        free = [c for c in shuffled if c.name not in {t.name for t in chosen}]
        spare = len(free) if chosen else len(free) - 1
        kept_back = free[-min(2 if len(everything) >= 5 else 1, spare) :] if spare > 0 else []
    training = chosen or [c for c in shuffled if c.name not in {k.name for k in kept_back}]
    if not training:
        raise RequestError("All labelled volumes are held back; leave at least one for training.")
    if shots is not None:
        if shots > len(training):
            raise RequestError(f"{shots} volumes were asked for, but {len(training)} are labelled and not held back: {_names(training)}.")
        training = training[:shots]
    used = [*training, *kept_back]
    names = [parse_structure(s, card) for s in structures] or None
    used, modality = check_cases(used, card, names)
    training, kept_back = used[: len(training)], used[len(training) :]
    known = {s for c in training for s in c.structures.values()}
    order = [s for s in card.structures if s in known and (names is None or s in names)]

    first = SliceCache(training, order, card.conditioning, cache)
    present = [s for s, positions in zip(order, first.by_structure, strict=True) if len(positions)]
    if not present:
        raise ImageError(f"The training labels hold none of {', '.join(order)}; accept at least one label that is not empty.")
    train = SliceCache(training, present, card.conditioning, cache)
    valid = SliceCache(kept_back, present, card.conditioning, cache) if kept_back else None
    if annotated is not None:
        train = restrict_cache(train, _positions(train, annotated))
        valid = None if valid is None else restrict_cache(valid, _positions(valid, annotated))
    same_patient = valid is None
    if valid is None:
        train, valid = split_slices(train)
    if slices is not None:
        train = restrict_cache(train, pick_evenly(train, slices))
    if not any(len(p) for p in train.by_structure):
        raise ImageError("None of the slices to train on holds a structure; label more slices.")
    if not any(len(p) for p in valid.by_structure):
        raise ImageError(f"The held-back volumes ({_names(kept_back)}) hold none of {', '.join(present)}; hold back others with --hold-out.")
    unused = [c.name for c in everything if c.name not in {u.name for u in used}]
    return AdaptData(train, valid, modality, [c.name for c in kept_back], unused, same_patient)


def parse_structure(text: str, card: ModelCard) -> str:
    """The model's structure that a label's name means.

    Raises:
        PromptError: if it is none or several; the message names the nearest.
    """
    queries = parse_prompt(text, card.structures, model=card.full_name)
    if len(queries) != 1:
        raise PromptError(f"'{text}' means {len(queries)} structures ({', '.join(q.name for q in queries)}); a label can be one only.")
    return queries[0].name


def check_cases(cases: Sequence[Case], card: ModelCard, only: Sequence[str] | None = None) -> tuple[list[Case], str]:
    """Read every label and image once, before anything is trained.

    Args:
        only: Structures to train; the others may have any name and count as background.

    Returns:
        The cases with the model's own names for their structures, and their modality.

    Raises:
        ImageError: for a label that cannot be read, lies on another grid, has unknown ids, no foreground or numbers that are no
            ids; for volumes of several modalities.
        RequestError: if a label has a name that the model does not know.
    """
    checked = []
    modalities: dict[str, str] = {}
    for case in cases:
        volume = load_volume(case.image)
        modalities[case.name] = volume.modality
        values = [int(v) for v in np.unique(load_label(case.label, volume)) if v != 0]
        if not values:
            raise ImageError(f"The label of '{case.name}' is empty; label a structure, or remove '{case.label}'.")
        strange = [v for v in values if v not in case.structures]
        if strange:
            raise ImageError(
                f"The label of '{case.name}' holds ids {', '.join(map(str, strange[:5]))}, which labels.json does not name. "
                "Add them there, or remove them from the label."
            )
        names: dict[int, str] = {}
        for value in values:
            try:
                found = parse_structure(case.structures[value], card)
            except PromptError as err:
                if only is not None:
                    continue
                raise RequestError(
                    f"labels.json gives id {value} the name '{case.structures[value]}', which '{card.full_name}' does not know"
                    f"{f' (did you mean {err.suggestions[0]!r}?)' if err.suggestions else ''}. Rename it there to one of "
                    f"{', '.join(card.structures)}, "
                    "or choose what to train with --structures; an adapter cannot teach new structures, `progidiff train` can."
                ) from err
            if only is None or found in only:
                names[value] = found
        if not names:
            raise ImageError(f"The label of '{case.name}' holds none of {', '.join(only or ())}; leave this volume out or choose other structures.")
        # What is not asked for, or absent from this volume, keeps its place in the table as background.
        checked.append(replace(case, structures={**dict.fromkeys(values, ""), **names, **_absent(case, card, only, names)}))
    if len(set(modalities.values())) > 1:
        told = "; ".join(f"{m}: {', '.join(n for n, k in modalities.items() if k == m)}" for m in sorted(set(modalities.values())))
        raise ImageError(
            f"One adapter is for one modality, but the volumes are {told}. Choose some with --case, or, if the guess is wrong, write "
            '{"modality": "MR"} into a file <name>.json beside the image.'
        )
    return checked, next(iter(modalities.values()))


def _absent(case: Case, card: ModelCard, only: Sequence[str] | None, present: Mapping[int, str]) -> dict[int, str]:
    """Names in the table that do not occur in this label: whoever labelled it says that they are absent."""
    found = {}
    for value, text in case.structures.items():
        try:
            name = parse_structure(text, card)
        except PromptError:
            continue
        if name not in present.values() and (only is None or name in only):
            found[value] = name
    return found


def restrict_cache(cache: SliceCache, kept: Sequence[int]) -> SliceCache:
    """The same slices with their neighbours, but only some of them to draw from.

    Args:
        kept: Positions in `cache.index`.
    """
    part = copy.copy(cache)
    part.index = [cache.index[i] for i in sorted(kept)]
    part.pixels = [np.zeros_like(p) for p in cache.pixels]
    for v, z in part.index:
        part.pixels[v][z] = cache.pixels[v][z]
    part.by_structure = [
        np.array([i for i, (v, z) in enumerate(part.index) if part.pixels[v][z, s] > 0], dtype=np.int64) for s in range(len(part.structures))
    ]
    return part


def split_slices(cache: SliceCache, share: float = HELD_BACK_SHARE) -> tuple[SliceCache, SliceCache]:
    """Hold back short runs of neighbouring slices, evenly spread over the labelled part of a volume.

    Runs and not single slices: a slice between two that were trained on is no test.

    Raises:
        ImageError: if fewer than 4 slices are labelled.
    """
    labelled = [i for i, (v, z) in enumerate(cache.index) if cache.pixels[v][z].any()]
    if len(labelled) < 4:
        raise ImageError(
            f"Only one volume is labelled, with {len(labelled)} slices that hold a structure. Label at least 4 slices, so that some can be held "
            "back, or a second volume."
        )
    count = max(1, round(share * len(labelled)))
    runs = max(1, count // 3)
    length = max(1, count // runs)
    held: set[int] = set()
    for r in range(runs):
        start = round((r + 0.5) * len(labelled) / runs - length / 2)
        held |= set(labelled[max(0, start) : start + length])
    return restrict_cache(cache, [i for i in range(len(cache)) if i not in held]), restrict_cache(cache, sorted(held))


def pick_evenly(cache: SliceCache, count: int) -> list[int]:
    """So many of the slices that hold a structure, evenly spaced.

    Raises:
        RequestError: if there are fewer.
    """
    labelled = [i for i, (v, z) in enumerate(cache.index) if cache.pixels[v][z].any()]
    if count > len(labelled):
        raise RequestError(f"{count} slices were asked for, but only {len(labelled)} of the training slices hold a structure; lower --slices.")
    return [labelled[int(i)] for i in np.floor((np.arange(count) + 0.5) * len(labelled) / count)]


def simulate_bias_field(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Smooth multiplicative shading, as receive coils and field inhomogeneity cause in MR.

    Args:
        images: (N, C, H, W) in [-1, 1]; the channels of a sample share one field.
        strength: Standard deviation of the field's logarithm at its strongest; 0 changes nothing.
    """
    if strength == 0:
        return images
    n, _, height, width = images.shape
    field = F.interpolate(torch.randn(n, 1, 3, 4, generator=generator), size=(height, width), mode="bicubic", align_corners=True)
    amount = torch.rand(n, 1, 1, 1, generator=generator) * strength
    return (((images + 1) / 2 * torch.exp(field * amount)).clamp(0, 1)) * 2 - 1


@torch.no_grad()
def measure_dice(
    pipeline: ProposalPipeline, cache: SliceCache, phrases: PhraseTable, card: ModelCard, num_proposals: int = 0, limit: int = MAX_VALIDATION_SLICES
) -> dict[str, float]:
    """Dice per structure, pooled over the slices of a volume, averaged over the volumes that have it.

    Args:
        num_proposals: K of the consensus; 0 measures the evidence alone, which is many times faster.
        limit: At most about so many slices, evenly spaced.

    Returns:
        "evidence" and, if K > 0, "consensus": means over the structures; "evidence <structure>", "consensus <structure>".
    """
    pipeline.branch.eval()
    count = len(cache.structures)
    prompts = phrases.pick_canonical()
    noise = pipeline.draw_noise(num_proposals, seed=0) if num_proposals else None
    kinds = ("evidence", "consensus") if num_proposals else ("evidence",)
    tally = DiceTally(cache)
    chosen = list(range(0, len(cache), max(1, -(-len(cache) // limit))))
    for start in range(0, len(chosen), 8):
        batch = chosen[start : start + 8]
        images, labels = cache.read(batch)
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        masks = {"evidence": (evidence >= 0.5).cpu()}
        if noise is not None:
            masks["consensus"] = torch.zeros(len(batch), count, *labels.shape[-2:], dtype=torch.bool)
            pairs = [(n, p) for n in range(len(batch)) for p in range(count) if float(evidence[n, p].max()) >= card.gate]
            for at in range(0, len(pairs), 16):
                part = pairs[at : at + 16]
                drawn = pipeline.propose(features, evidence, prompts, part, noise, card.num_inference_steps, card.guidance_scale) >= 0.5
                for (n, p), proposals in zip(part, drawn, strict=True):
                    masks["consensus"][n, p] = proposals.float().mean(0) >= 0.5
        tally.add(batch, labels, masks)
    figures: dict[str, float] = {}
    seen = (tally.truth > 0).any(axis=0)
    for kind in kinds:
        dice = tally.compute_dice(kind)
        per = {s: float(np.nanmean(dice[:, i])) for i, s in enumerate(cache.structures) if seen[i]}
        figures[kind] = float(np.mean(list(per.values()))) if per else 0.0
        figures.update({f"{kind} {s}": d for s, d in per.items()})
    return figures


def judge(figures: Mapping[str, Mapping[str, float]], current: str | None, base: str) -> tuple[bool, str]:
    """The quality gate: a version must beat what is served and the model itself on the held-back slices.

    Args:
        figures: From `measure_dice`, by "base", "current" and "adapted".

    Returns:
        Whether it may be published, and why in a sentence.

    Example:
        >>> judge({"base": {"consensus": 0.5}, "adapted": {"consensus": 0.7}}, None, "ct-base@1")
        (True, 'Dice 0.700 on the held-back slices, ct-base@1 has 0.500.')
    """
    new = figures["adapted"]["consensus"]
    rivals = {base: figures["base"]["consensus"]}
    if current is not None and "current" in figures:
        rivals = {current: figures["current"]["consensus"], **rivals}
    told = f"Dice {new:.3f} on the held-back slices, {' and '.join(f'{n} has {d:.3f}' for n, d in rivals.items())}."
    return all(new > d for d in rivals.values()), told


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
    assert lora is not None
    proposals = "trained too" if run["choice"]["proposals"] else "as in the base"
    warning = "Only one volume was labelled: the held-back slices are of the same patient, so these figures flatter.\n\n" if data.same_patient else ""
    return f"""# {card.full_name}

Low-rank adapter (rank {lora.rank}, alpha {lora.alpha:g}, on {", ".join(lora.target_modules)}{", with group norms" if lora.norms else ""})
of {card.base_name} for {card.modality} images. Structures: {", ".join(card.structures)}.

* Trained on {len(data.training)} slices of {len(data.training.names)} volumes: {", ".join(data.training.names)}.
* Held back, to pick the number of steps and to decide about publishing: {", ".join(data.held_out) or "slices of the same volume"}.
* {run["choice"]["steps"]} steps, chosen among {len(run["choice"]["history"])} validations. Proposals: {proposals}.
* Made by `{run["command"]}` at commit {run["commit"][:12]} on {run["date"]}.
* Verdict: {run["verdict"]} {"Accepted." if run["accepted"] else "Not published."}

Dice of the consensus on the held-back slices, at working resolution. They were used for choices, so they are no test result:

| structure | {" | ".join(titles[k] for k in kinds)} |
|---|{"---|" * len(kinds)}
{rows}

{warning}For research, not for diagnosis. Weights inherit the terms of the images that they and {card.base_name} were trained on.
"""


class _BestWeights:
    """Keeps the weights of the best validation and says when to stop; both survive a kill."""

    def __init__(self, folder: Path, patience: int) -> None:
        self._patience = patience
        self._file = folder / "best.safetensors"
        self._log = folder / "choice.json"
        folder.mkdir(parents=True, exist_ok=True)
        known = (_read_json(self._log) or {}).get("history", [])
        self.history: list[dict[str, float]] = [{"step": int(e["step"]), "score": float(e["score"])} for e in known]

    @property
    def best(self) -> dict[str, float] | None:
        """The earliest of the best validations."""
        return max(self.history, key=lambda e: (e["score"], -e["step"])) if self.history else None

    def note(self, step: int, score: float, collect: Callable[[], dict[str, Tensor]]) -> None:
        """Take a validation into account; after a resumed run it may be one that was seen before."""
        self.history = sorted([e for e in self.history if e["step"] != step] + [{"step": step, "score": score}], key=lambda e: e["step"])
        if self.best is not None and self.best["step"] == step:
            scratch = self._file.with_name(".best.safetensors.tmp")
            save_file(collect(), scratch)
            os.replace(scratch, self._file)
        _write_json(self._log, {"history": self.history})

    def should_stop(self) -> bool:
        """Whether the last `patience` validations brought no gain; not before there is something to gain on."""
        return self.best is not None and self.best["score"] > 0 and sum(e["step"] > self.best["step"] for e in self.history) >= self._patience

    def load(self) -> dict[str, Tensor]:
        """The best weights."""
        try:
            return load_file(self._file)
        except Exception as err:  # safetensors raises its own untyped error for a truncated file
            raise ModelError(f"'{self._file}' cannot be read ({err}); remove the folder '{self._file.parent}' to train again.") from err


def _train(
    base: ProposalPipeline,
    data: AdaptData,
    phrases: PhraseTable,
    card: ModelCard,
    config: AdaptConfig,
    folder: Path,
    is_cancelled: Callable[[], bool] | None,
    tell: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Tensor], LoraSettings, dict[str, Any]]:
    """Stages 2 and 3. Returns the tensors, the settings that they follow, and how they were chosen."""
    early = tuple(t for t in config.lora.target_modules if t in ("encoder", "query_head"))
    late = tuple(t for t in config.lora.target_modules if t in ("injection", "denoiser"))
    # Without stage 3 nothing would train the late targets: they would be zeros on disk.
    settings = replace(config.lora, target_modules=(*early, *(late if config.proposal_steps else ())))
    settings.check()
    branch = copy.deepcopy(base.branch)
    unet = copy.deepcopy(base.unet) if "denoiser" in settings.target_modules else base.unet
    inject_lora(branch, unet, settings, config.seed)
    pipeline = _with(base, branch, unet)
    trainable = {n: p for m in (branch, unet) for n, p in m.named_parameters() if p.requires_grad}
    choice: dict[str, Any] = {"steps": 0, "history": [], "proposals": False}
    if early:
        best = _train_evidence(pipeline, data, phrases, card, config, settings, folder / "evidence", is_cancelled, tell)
        assert best.best is not None
        choice.update(steps=int(best.best["step"]), history=best.history)
        load_tensors(best.load(), branch, unet, settings, folder / "evidence" / "best.safetensors")
    before = collect_tensors(branch, unet, settings)
    if config.proposal_steps and late:
        for parameter in trainable.values():
            parameter.requires_grad_(False)
        roots = ("evidence_in", "image_in", "evidence_down", "mix", "zero")
        for name, parameter in branch.named_parameters():
            parameter.requires_grad_(".lora_" in name and name.split(".")[0] in roots)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        without = measure_dice(pipeline, data.validation, phrases, card, config.num_proposals)["consensus"]
        train_proposals(
            pipeline,
            data.training,
            None,
            _loop_config(config, pipeline, config.proposal_steps, config.proposal_rate),
            folder / "proposals",
            trained={"branch": branch, "unet": unet},
        )
        gained = measure_dice(pipeline, data.validation, phrases, card, config.num_proposals)["consensus"]
        tell({"stage": "proposals", "consensus_without": without, "consensus": gained})
        choice.update(proposals=gained > without, consensus_without_proposals=without, consensus_with_proposals=gained)
        if gained > without or not early:
            return collect_tensors(branch, unet, settings), settings, choice
        settings = replace(settings, target_modules=early)
        before = {n: t for n, t in before.items() if n.startswith(("branch.encoder.", "branch.query_head."))}
    return before, settings, choice


def _train_evidence(
    pipeline: ProposalPipeline,
    data: AdaptData,
    phrases: PhraseTable,
    card: ModelCard,
    config: AdaptConfig,
    settings: LoraSettings,
    folder: Path,
    is_cancelled: Callable[[], bool] | None,
    tell: Callable[[dict[str, Any]], None],
) -> _BestWeights:
    branch, training = pipeline.branch, data.training
    device = pipeline.device
    count = len(training.structures)
    best = _BestWeights(folder, config.patience)
    position = 0

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        nonlocal position
        position = step + 1
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        chosen = training.draw_balanced(config.batch_size, rng)
        images, labels = training.read(chosen)
        images, labels = augment(images, labels, generator, config.augmentation)
        images = simulate_bias_field(images, generator, config.bias_field or 0.0)
        annotated = training.weigh(chosen)
        features = branch.encode_slices(images.to(device))
        logits = branch.predict_evidence(features, phrases.pooled[phrases.draw(generator)])
        return compute_evidence_loss(logits, one_hot(labels, count).to(device), annotated.to(device))

    def validate() -> dict[str, float]:
        figures = measure_dice(pipeline, data.validation, phrases, card)
        best.note(position, figures["evidence"], lambda: collect_tensors(branch, pipeline.unet, settings))
        tell({"stage": "validation", "step": position, **figures})
        return figures

    def stop() -> bool:
        return best.should_stop() or (is_cancelled is not None and is_cancelled())

    late = [p for n, p in branch.named_parameters() if p.requires_grad and not n.startswith(("encoder.", "query_head."))]
    for parameter in late:
        parameter.requires_grad_(False)
    loop = _loop_config(config, pipeline, config.steps, config.learning_rate)
    try:
        run_loop({"branch": branch}, compute_loss, loop, folder, validate, stop, lambda e: tell({"stage": "evidence", **e}))
    except CancelledError:
        if not best.should_stop():
            raise
        logger.info("Stopped early: no gain in %d validations", config.patience)
    if best.best is None:  # killed between the last checkpoint and its validation
        position = config.steps
        validate()
    return best


def _loop_config(config: AdaptConfig, pipeline: ProposalPipeline, steps: int, rate: float) -> LoopConfig:
    return LoopConfig(
        steps,
        rate,
        warmup=max(1, min(20, steps // 5)),
        ema_decay=0.98,
        seed=config.seed,
        precision="bf16" if _has_fast_bf16(pipeline.device) else "fp32",
        checkpoint_every=min(50, config.validate_every),
        validate_every=config.validate_every,
    )


def _with(base: ProposalPipeline, branch: Any, unet: Any) -> ProposalPipeline:
    """The base's pipeline with other networks."""
    pipeline = copy.copy(base)
    pipeline.branch, pipeline.unet = branch, unet
    return pipeline


def _has_fast_bf16(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def _fingerprint(config: AdaptConfig, base: str, data: AdaptData) -> str:
    """Of everything that the result depends on."""
    parts = [
        asdict(config), base, data.modality, data.training.structures, sorted(data.training.digests.items()), sorted(data.validation.digests.items()),
        data.training.index, data.validation.index,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _positions(cache: SliceCache, annotated: Mapping[str, Sequence[int]]) -> list[int]:
    wanted = {name: set(map(int, zs)) for name, zs in annotated.items()}
    return [i for i, (v, z) in enumerate(cache.index) if z in wanted.get(cache.names[v], set())]


def _names(cases: Sequence[Case]) -> str:
    return ", ".join(c.name for c in cases)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _write_json(path: Path, values: Any) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(scratch, path)
