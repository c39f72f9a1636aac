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

import copy
import hashlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.errors import CancelledError, ModelError, RequestError, StoreError
from progidiff.images.reading import load_volume
from progidiff.model.adapters import AdapterCard, AdapterStore, build_networks, check_name, compute_base_digest
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningBranch
from progidiff.model.folder import ModelCard, load_pipeline
from progidiff.model.lora import (
    INJECTION,
    LoraSettings,
    collect_full,
    collect_tensors,
    copy_full,
    inject_lora,
    load_tensors,
)
from progidiff.model.pipeline import ProposalPipeline
from progidiff.storage.atomic import atomic_file, replace_text
from progidiff.training.dice_tally import DiceTally, one_hot
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.loop import LoopConfig, Precision, find_autocast_dtype, run_loop
from progidiff.training.losses import compute_evidence_loss
from progidiff.training.proposal_stage import train_proposals
from progidiff.training.recipes import describe_run
from progidiff.training.slice_cache import Case, SliceCache, augment
from progidiff.training.split import AdaptData, find_cases, keep_modality, pick_named, prepare_data

logger = logging.getLogger(__name__)

KEPT_PER_STEP = 4
"""Structures that nobody labelled, of which a training step holds the answers to the base's."""

CACHE = "cache"
"""Folder of the cached slices among the checkpoints."""

MAX_VALIDATION_SLICES = 96

Kind = Literal["lora", "full"]


@dataclass(frozen=True)
class AdaptConfig:
    """How a version is trained; the defaults are meant for 1 to 10 volumes.

    Attributes:
        kind: "lora": low-rank updates of the targets; "full": all weights of the targets.
        lora: Targets, and for kind "lora" rank and alpha.
        steps: Largest number of steps; validation stops earlier.
        learning_rate: Peak; None: 2e-3 for kind "lora", 3e-4 for kind "full".
        batch_size: Slices per step.
        validate_every: Steps between validations.
        patience: Validations without a gain after which training stops.
        augmentation: Strength of affine and intensity augmentation; 1 is the recipe of the base.
        bias_field: Standard deviation of the logarithm of a smooth random shading (coil sensitivity); None: 0.3 for MR,
            0 for CT.
        proposal_steps: Steps of stage 3; 0 leaves it out.
        proposal_rate: Its learning rate.
        num_proposals: K of the consensus that the gate compares.
        random_share: Share of the slices that are drawn from all annotated ones; the others show a structure that is
            drawn first. More of them teach where nothing is.
        seed: Run seed.
        precision, accumulate: See `progidiff.training.loop.RunConfig`.
        ema_decay: Of the averaged weights.
        keep: Weight of the loss that holds the answers for structures that nobody labelled to the base's, on images of
            the base's modality; 0 switches it off. On another modality the base's answers are not worth keeping.
    """

    kind: Kind = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    steps: int = 200
    learning_rate: float | None = None
    batch_size: int = 12
    validate_every: int = 25
    patience: int = 4
    augmentation: float = 1.0
    bias_field: float | None = None
    proposal_steps: int = 0
    proposal_rate: float = 1e-3
    num_proposals: int = 4
    random_share: float = 0.15
    seed: int = 0
    precision: Precision = "auto"
    accumulate: int = 1
    ema_decay: float = 0.98
    keep: float = 1.0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            RequestError: naming the setting and its range.
        """
        self.lora.check()
        if self.kind not in ("lora", "full"):
            raise RequestError(f"Setting kind must be lora or full, got {self.kind!r}.")
        ranges: dict[str, tuple[float, float]] = {
            "steps": (1, 100_000), "learning_rate": (1e-7, 1.0), "batch_size": (1, 256), "validate_every": (1,
            10_000), "patience": (1, 1000),
            "augmentation": (0, 3), "bias_field": (0, 2), "proposal_steps": (0, 100_000), "proposal_rate": (1e-7,
            1.0), "num_proposals": (1, 16),
            "keep": (0, 100), "random_share": (0, 1), "seed": (0, 2**62), "accumulate": (1, 1024), "ema_decay": (0,
            0.999999),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"Setting {name} must lie in {low:g}..{high:g}, got {value}.")
        targets = set(self.lora.target_modules)
        if self.kind == "full" and "denoiser" in targets:
            raise RequestError(
                "A version of kind full holds the conditioning branch, not the denoiser; "
                "leave the target denoiser out, or use kind lora."
            )
        if self.proposal_steps and not {"injection", "denoiser"} & targets:
            raise RequestError(
                "proposal_steps train 'injection' or 'denoiser', but neither is a target; "
                "add one, or set proposal_steps to 0."
            )
        if not self.proposal_steps and not {"encoder", "query_head"} & targets:
            raise RequestError(
                "Nothing would be trained: 'injection' and 'denoiser' learn from "
                "proposals only; set proposal_steps, for example 200."
            )

    def complete(self, modality: str) -> AdaptConfig:
        """The same with every None replaced by what it stands for."""
        return replace(
            self,
            learning_rate=self.learning_rate or (2e-3 if self.kind == "lora" else 3e-4),
            bias_field=(0.3 if modality == "MR" else 0.0) if self.bias_field is None else self.bias_field,
        )


@dataclass
class AdaptResult:
    """What came out.

    Attributes:
        card: The version that was written.
        published: Whether it is served now.
        message: The verdict in a sentence.
        figures: Held-back Dice of "base", "current" (if one was served) and "adapted".
        folder: Checkpoints of the run, which nothing needs any more.
    """

    card: AdapterCard
    published: bool
    message: str
    figures: dict[str, dict[str, float]]
    folder: Path


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
    command: str | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> AdaptResult:
    """Train a version of an adapter and publish it if it is better than what is served.

    The same call continues a run that was stopped or killed: checkpoints lie in `work` under a name made of everything
    that the result depends on. A training that is done is not repeated.

    Args:
        studies: Folder of a local datastore (images, ``labels/final/``, names of the label ids in ``labels.json`` or in
            the labels' records), or cases collected elsewhere.
        model_dir: The base: ``backbone/`` and ``conditioning/``.
        name: Of the adapter; None for the modality in lower case.
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

    def tell(entry: dict[str, Any]) -> None:
        if report is not None:
            report(entry)

    tell({"stage": "prepare"})
    store = AdapterStore(adapters or model_dir / "adapters")
    backbone = Backbone(backbone_source or model_dir / "backbone", device)
    card, base = load_pipeline(model_dir, backbone, find_autocast_dtype("auto", backbone.device))
    base_digest = compute_base_digest(model_dir)
    labelled = find_cases(studies, annotated)
    if modality is not None:
        labelled = keep_modality(labelled, modality)
    first = (pick_named(labelled, [*cases, *held_out]) or labelled)[0]
    served = store.pick_for(load_volume(first.image, info=first.info).modality, base_digest)
    data = prepare_data(
        labelled,
        card,
        work / CACHE,
        cases,
        held_out,
        shots,
        slices,
        structures,
        None,
        config.seed,
        parent=None if served is None else store.run(served),
    )
    config = config.complete(data.modality)
    name = name or data.modality.lower()
    _check_modality_of_name(store, name, data.modality)
    fingerprint = _fingerprint(config, base_digest, data)
    folder = work / f"{name}-{fingerprint[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    logger.info(
        "Training on %d slices of %s; held back: %s",
        len(data.training),
        ", ".join(data.training.names),
        ", ".join(data.held_out) or "slices of it",
    )
    tell({"stage": "prepare", "name": name, "modality": data.modality, **_describe_data(data)})
    earlier = store.find_run(name, fingerprint)
    if earlier is not None:
        return _finish(store, earlier, store.run(earlier), publish, folder, repeated=True)

    run = _Run(
        base,
        data,
        PhraseTable(backbone, data.training.structures),
        card,
        config,
        folder,
        is_cancelled or (lambda: False),
        tell,
    )
    tensors, settings, choice = run.train()
    tell({"stage": "gate"})
    figures = {"base": run.measure(base)}
    served = store.pick_for(data.modality, base_digest)
    if served is not None:
        figures["current"] = run.measure(
            base.with_networks(*build_networks(served, store.load(served, base_digest), base.branch, base.unet, folder))
        )
    draft = AdapterCard(
        name, 1, config.kind, data.modality, data.training.structures, base_digest, card.full_name, "", "", settings
    )
    figures["adapted"] = run.measure(
        base.with_networks(*build_networks(draft, tensors, base.branch, base.unet, folder))
    )
    tell({"stage": "version", **{k: v["consensus"] for k, v in figures.items()}})

    accepted, verdict = judge(figures, None if served is None else served.full_name, card.full_name)
    if "kept" in figures["adapted"]:
        kept = figures["adapted"]["kept"]
        verdict += f" For the structures without labels it agrees with {card.full_name} to {kept:.3f} (Dice)."
    if data.same_patient:
        verdict += " Only one volume is labelled: some of its slices were held back, so the figures flatter."
    record = {
        **describe_run(),
        "command": command or shlex.join(sys.argv),
        "fingerprint": fingerprint,
        "config": asdict(config),
        "base": card.full_name,
        "parent": None if served is None else served.full_name,
        "training_cases": data.training.names,
        "training_slices": {
            n: [z for v, z in data.training.index if v == i] for i, n in enumerate(data.training.names)
        },
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
        config.kind,
        tensors,
        modality=data.modality,
        structures=data.training.structures,
        base=base_digest,
        base_name=card.full_name,
        run=record,
        readme=lambda new: write_adapter_card(new, record, data),
        lora=settings,
    )
    return _finish(store, written, record, publish, folder)


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
    }


def _finish(
    store: AdapterStore, card: AdapterCard, run: Mapping[str, Any], publish: bool, folder: Path, repeated: bool = False
) -> AdaptResult:
    """Publish a version if the gate accepted it; once, so that a rollback is not undone by repeating the command."""
    name, verdict = card.full_name, run["verdict"]
    before = "This very training was done before. " if repeated else ""
    if not run["accepted"]:
        return AdaptResult(
            card, False, f"{before}{name} is kept but not published: {verdict}", run["validation"], folder
        )
    if publish:
        store.publish_once(card)
    served = store.current(card.name) == card.version
    if served:
        message = f"{before}{name} is published: {verdict}"
    else:
        message = (
            f"{before}{name} is kept and not published, as asked; `progidiff adapters use "
            f"{name}` publishes it. {verdict}"
        )
    return AdaptResult(card, served, message, run["validation"], folder)


@torch.no_grad()
def measure_dice(
    pipeline: ProposalPipeline,
    cache: SliceCache,
    phrases: PhraseTable,
    card: ModelCard,
    num_proposals: int = 0,
    limit: int = MAX_VALIDATION_SLICES,
    between: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Dice per structure, pooled over the slices of a volume, averaged over the volumes that have it.

    Args:
        num_proposals: K of the consensus; 0 measures the evidence alone, which is many times faster.
        limit: At most about so many slices, evenly spaced.
        between: Called between batches; may raise to end it.

    Returns:
        "evidence" and, if K > 0, "consensus": means over the structures; "evidence <structure>", "consensus
        <structure>".
    """
    pipeline.branch.eval()
    count = len(cache.structures)
    prompts = phrases.pick_canonical()
    noise, offsets = (
        (pipeline.draw_noise(num_proposals, seed=0), pipeline.draw_offsets(num_proposals, seed=0))
        if num_proposals
        else (None, None)
    )
    kinds = ("evidence", "consensus") if num_proposals else ("evidence",)
    tally = DiceTally(cache)
    chosen = list(range(0, len(cache), max(1, -(-len(cache) // limit))))
    for start in range(0, len(chosen), 8):
        between()
        batch = chosen[start : start + 8]
        images, labels = cache.read(batch)
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        masks = {"evidence": (evidence >= 0.5).cpu()}
        if noise is not None:
            masks["consensus"] = torch.zeros(len(batch), count, *labels.shape[-2:], dtype=torch.bool)
            pairs = [
                (n, p) for n in range(len(batch)) for p in range(count) if float(evidence[n, p].max()) >= card.gate
            ]
            for at in range(0, len(pairs), 16):
                part = pairs[at : at + 16]
                drawn = (
                    pipeline.propose(
                        features, evidence, prompts, part, noise, card.num_inference_steps, card.guidance_scale, offsets
                    )
                    >= 0.5
                )
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


@torch.no_grad()
def measure_agreement(
    base: ProposalPipeline,
    adapted: ProposalPipeline,
    cache: SliceCache,
    structures: Sequence[str],
    between: Callable[[], object] = lambda: None,
) -> float | None:
    """How far the evidence for structures without labels is still the base's, on the slices of a cache.

    Args:
        structures: Names that the base was trained on.
        between: Called between batches; may raise to end it.

    Returns:
        Dice between the two, pooled over the slices, averaged over the structures that the base sees; None if it sees
        none.
    """
    prompts = base.encode_prompts(structures)
    overlap, total, seen = (torch.zeros(len(structures)) for _ in range(3))
    chosen = list(range(0, len(cache), max(1, -(-len(cache) // MAX_VALIDATION_SLICES))))
    for start in range(0, len(chosen), 8):
        between()
        images = cache.read(chosen[start : start + 8])[0]
        one, two = (p.predict_evidence(p.encode_slices(images), prompts).cpu() >= 0.5 for p in (base, adapted))
        overlap += (one & two).sum((0, 2, 3))
        total += one.sum((0, 2, 3)) + two.sum((0, 2, 3))
        seen += one.sum((0, 2, 3))
    there = seen > 0
    return float((2 * overlap[there] / total[there]).mean()) if there.any() else None


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
    return f"""# {card.full_name}

{what}
of {card.base_name} for {card.modality} images. Structures: {", ".join(card.structures)}.

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


class _BestWeights:
    """Keeps the weights of the best validation and says when to stop; both survive a kill.

    Attributes:
        file: The weights.
        history: "step" and "score" of every validation.
    """

    def __init__(self, folder: Path, patience: int) -> None:
        self._patience = patience
        self.file = folder / "best.safetensors"
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
        self.history = sorted(
            [e for e in self.history if e["step"] != step] + [{"step": step, "score": score}], key=lambda e: e["step"]
        )
        if self.best is not None and self.best["step"] == step:
            try:
                with atomic_file(self.file) as scratch:
                    save_file(collect(), scratch)
            except Exception as err:  # safetensors raises its own untyped error for a full disk
                raise StoreError(
                    f"The weights of step {step} cannot be written to '{self.file.parent}' ({err}). Free some disk "
                    "space there; the same command continues from the last checkpoint."
                ) from err
        _write_json(self._log, {"history": self.history})

    def should_stop(self) -> bool:
        """Whether the last `patience` validations brought no gain; not before there is something to gain on."""
        return (
            self.best is not None
            and self.best["score"] > 0
            and sum(e["step"] > self.best["step"] for e in self.history) >= self._patience
        )

    def load(self) -> dict[str, Tensor]:
        """The best weights."""
        try:
            return load_file(self.file)
        except Exception as err:  # safetensors raises its own untyped error for a truncated file
            raise ModelError(
                f"'{self.file}' cannot be read ({err}); remove the folder '{self.file.parent}' to train again."
            ) from err


class _Trainee:
    """What a version consists of, in networks that are being trained.

    Attributes:
        settings: Of its low-rank updates; None for kind "full".
    """

    def __init__(
        self, config: AdaptConfig, targets: tuple[str, ...], branch: ConditioningBranch, unet: nn.Module
    ) -> None:
        self.branch, self.unet = branch, unet
        self.settings = replace(config.lora, target_modules=targets) if config.kind == "lora" else None
        if self.settings is not None:
            inject_lora(branch, unet, self.settings, config.seed)
            own = [(n, p) for n, p in branch.named_parameters() if p.requires_grad]
            self._of_unet = [p for p in unet.parameters() if p.requires_grad] if "denoiser" in targets else []
        else:
            own, self._of_unet = list(branch.named_parameters()), []
        roots = {"encoder": "encoder", "query_head": "query_head", **dict.fromkeys(INJECTION, "injection")}
        self._parameters = {
            t: [p for n, p in own if roots.get(n.split(".")[0]) == t] for t in targets if t != "denoiser"
        }
        self._parameters["denoiser"] = self._of_unet

    def select(self, targets: Collection[str]) -> None:
        """Let these parts learn and freeze all else."""
        self.branch.requires_grad_(False)
        self.unet.requires_grad_(False)
        for target in targets:
            for parameter in self._parameters.get(target, ()):
                parameter.requires_grad_(True)

    def collect(self) -> dict[str, Tensor]:
        """Its tensors, as they are kept on disk."""
        return (
            collect_full(self.branch)
            if self.settings is None
            else collect_tensors(self.branch, self.unet, self.settings)
        )

    def load(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Put tensors of `collect` back."""
        if self.settings is None:
            copy_full(tensors, self.branch, None, path)
        else:
            load_tensors(tensors, self.branch, self.unet, self.settings, path)


@dataclass
class _Run:
    """One training: stages 2 and 3, and the measurements of the gate."""

    base: ProposalPipeline
    data: AdaptData
    phrases: PhraseTable
    card: ModelCard
    config: AdaptConfig
    folder: Path
    is_cancelled: Callable[[], bool]
    tell: Callable[[dict[str, Any]], None]

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Structures that the base can do and that are not trained; none on images of another modality."""
        return (
            tuple(s for s in self.card.structures if s not in self.data.training.structures)
            if self.data.modality == self.card.modality
            else ()
        )

    def measure(self, pipeline: ProposalPipeline) -> dict[str, float]:
        """Dice of evidence and consensus on the held-back slices, and "kept", see `measure_agreement`.

        Raises:
            CancelledError: if somebody asks to stop meanwhile.
        """

        def check() -> None:
            if self.is_cancelled():
                raise CancelledError(
                    "Training stopped on request while its result was measured; start it again to continue there."
                )

        figures = measure_dice(
            pipeline, self.data.validation, self.phrases, self.card, self.config.num_proposals, between=check
        )
        if self.unlabelled and pipeline is not self.base:
            kept = measure_agreement(self.base, pipeline, self.data.validation, self.unlabelled, check)
            figures.update({} if kept is None else {"kept": kept})
        return figures

    def train(self) -> tuple[dict[str, Tensor], LoraSettings | None, dict[str, Any]]:
        """Stages 2 and 3. Returns the tensors, the settings that they follow, and how they were chosen."""
        config = self.config
        early = tuple(t for t in config.lora.target_modules if t in ("encoder", "query_head"))
        late = tuple(t for t in config.lora.target_modules if t in ("injection", "denoiser") and config.proposal_steps)
        branch = copy.deepcopy(self.base.branch)
        unet = copy.deepcopy(self.base.unet) if "denoiser" in late else self.base.unet
        # Without stage 3 nothing would train the late targets: they would be zeros on disk.
        trainee = _Trainee(config, (*early, *late), branch, unet)
        pipeline = self.base.with_networks(branch, unet)
        choice: dict[str, Any] = {"steps": 0, "history": [], "proposals": False, "targets": list(early)}
        if early:
            best = self._train_evidence(pipeline, trainee, early)
            assert best.best is not None
            choice.update(steps=int(best.best["step"]), history=best.history)
            trainee.load(best.load(), best.file)
        tensors, settings = trainee.collect(), trainee.settings
        if not late:
            return tensors, settings, choice
        without, gained = self._train_proposals(pipeline, trainee, late)
        choice.update(proposals=gained > without, consensus_without_proposals=without, consensus_with_proposals=gained)
        if gained > without or not early:
            choice["targets"] = [*early, *late]
            return trainee.collect(), settings, choice
        if settings is not None:  # The updates that did not pay are left out.
            settings = replace(settings, target_modules=early)
            tensors = {n: t for n, t in tensors.items() if n.startswith(("branch.encoder.", "branch.query_head."))}
        return tensors, settings, choice

    def _train_evidence(self, pipeline: ProposalPipeline, trainee: _Trainee, targets: tuple[str, ...]) -> _BestWeights:
        config, branch, training, device = self.config, pipeline.branch, self.data.training, pipeline.device
        count = len(training.structures)
        folder = self.folder / "evidence"
        best = _BestWeights(folder, config.patience)
        others = self.base.encode_prompts(self.unlabelled).pooled if self.unlabelled and config.keep else None
        position = 0

        def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            nonlocal position
            position = step + 1
            rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
            chosen = training.draw_balanced(config.batch_size, rng, config.random_share)
            images, labels = training.read(chosen)
            images, labels = augment(images, labels, generator, config.augmentation, config.bias_field or 0.0)
            features = branch.encode_slices(images.to(device))
            logits = branch.predict_evidence(features, self.phrases.pooled[self.phrases.draw(generator)])
            loss, figures = compute_evidence_loss(
                logits, one_hot(labels, count).to(device), training.weigh(chosen).to(device)
            )
            if others is None:
                return loss, figures
            some = others[torch.from_numpy(rng.permutation(len(others))[:KEPT_PER_STEP])]
            with torch.no_grad():
                before = (
                    self.base.branch.predict_evidence(self.base.branch.encode_slices(images.to(device)), some)
                    .float()
                    .sigmoid()
                )
            kept = F.binary_cross_entropy_with_logits(branch.predict_evidence(features, some).float(), before)
            # The factor is that of the cross-entropy beside it in `compute_evidence_loss`.
            return loss + 10 * config.keep * kept, {**figures, "kept": float(kept.detach())}

        def validate() -> dict[str, float]:
            # A stop request waits for the end of a validation: ending it here would lose the steps since the last
            # checkpoint.
            figures = measure_dice(pipeline, self.data.validation, self.phrases, self.card, between=self.is_cancelled)
            best.note(position, figures["evidence"], trainee.collect)
            self.tell({"stage": "validation", "step": position, "total": config.steps, **figures})
            return figures

        def stop() -> bool:
            self.tell({"stage": "evidence", "step": position, "total": config.steps})
            return best.should_stop() or self.is_cancelled()

        trainee.select(targets)
        loop = self._loop_config(config.steps, config.learning_rate or 0.0)
        try:
            run_loop(
                {"branch": branch},
                compute_loss,
                loop,
                folder,
                validate,
                stop,
                lambda e: self.tell({"stage": "evidence", **e}),
            )
        except CancelledError:
            if not best.should_stop():
                raise
            logger.info("Stopped early: no gain in %d validations", config.patience)
        if best.best is None:  # killed between the last checkpoint and its validation
            position = config.steps
            validate()
        return best

    def _train_proposals(
        self, pipeline: ProposalPipeline, trainee: _Trainee, targets: tuple[str, ...]
    ) -> tuple[float, float]:
        """Dice of the consensus before and after."""
        config = self.config
        without = self.measure(pipeline)["consensus"]
        trainee.select(targets)
        step = 0

        def stop() -> bool:
            self.tell({"stage": "proposals", "step": step, "total": config.proposal_steps})
            return self.is_cancelled()

        def note(entry: dict[str, Any]) -> None:
            nonlocal step
            step = int(entry["step"])
            self.tell({"stage": "proposals", **entry})

        train_proposals(
            pipeline,
            self.data.training,
            None,
            self._loop_config(config.proposal_steps, config.proposal_rate),
            self.folder / "proposals",
            trained={"branch": trainee.branch, "unet": trainee.unet},
            is_cancelled=stop,
            report=note,
        )
        gained = self.measure(pipeline)["consensus"]
        self.tell(
            {
                "stage": "proposals",
                "step": config.proposal_steps,
                "total": config.proposal_steps,
                "consensus_without": without,
                "consensus": gained,
            }
        )
        return without, gained

    def _loop_config(self, steps: int, rate: float) -> LoopConfig:
        return LoopConfig(
            steps=steps,
            learning_rate=rate,
            warmup=max(1, min(20, steps // 5)),
            ema_decay=self.config.ema_decay,
            seed=self.config.seed,
            precision=self.config.precision,
            accumulate=self.config.accumulate,
            checkpoint_every=min(50, self.config.validate_every),
            validate_every=self.config.validate_every,
        )


def _fingerprint(config: AdaptConfig, base: str, data: AdaptData) -> str:
    """Of everything that the result depends on."""
    parts = [
        asdict(config), base, data.modality, data.training.structures, sorted(data.training.digests.items()),
        sorted(data.validation.digests.items()),
        data.training.index, data.validation.index,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _write_json(path: Path, values: Any) -> None:
    replace_text(path, json.dumps(values, indent=1) + "\n")
