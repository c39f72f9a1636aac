"""The segmentation tables: the shipped model against a plain U-Net, MC dropout of it, and a latent-to-latent CNN
without diffusion.

    python benchmarks/segmentation.py unet --minutes 30      # train the rivals on the volumes that are not held out
    python benchmarks/segmentation.py gms --minutes 13
    python benchmarks/segmentation.py slices                 # every third slice of the held-out volumes, on the working
    grid python benchmarks/segmentation.py volumes                # whole held-out volumes on their own grid, with and
    without clean-up python benchmarks/segmentation.py tables                 # print what the JSON file holds

Every command adds its part to the same JSON file (--out); what a stopped command had done is kept in the work folder
(--work) and not done again. The main row comes from `progidiff evaluate`; `volumes` scores the rivals
with the same functions on the same grid.

Dice of `slices` pools the slices of a volume; figures are means over volumes. Of K answers, "single" is the mean of
their scores, "consensus" what at least half of them draw, "best" the one with the highest Dice per volume and
structure. The answers of a smaller K are the first of the larger. "drawn where absent" is the share of (slice,
structure) pairs without the structure on which the consensus draws it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from baselines import Budget, LatentModel, UNet, compute_unet_loss, draw_slices, train_for
from progidiff.evaluation.evaluate import (
    RULES,
    TRANSUNET_STRUCTURES,
    match_structures,
    save_report,
    score_case,
    summarise,
)
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.cases import load_label_names
from progidiff.model.backbone import Backbone
from progidiff.model.folder import (
    ModelCard,
    compute_backbone_digest,
    compute_conditioning_digest,
    load_card,
    load_pipeline,
)
from progidiff.model.pipeline import ProposalPipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import NONE, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.storage.provenance import describe_versions
from progidiff.training.dice_tally import DiceTally, average_volumes, one_hot
from progidiff.training.slice_cache import Case, SliceCache, list_cases

ROOT = Path(__file__).resolve().parents[1]

HELD_OUT = ("img0024", "img0033", "img0039")
"""The volumes that neither the shipped model nor its rivals were trained on."""

GUIDANCE = 2.0
"""Strength of the text where guidance is on; see `ProposalPipeline.propose`."""


@dataclass
class Data:
    """Slices on the working grid, split by patient."""

    card: ModelCard
    cases: list[Case]
    training: SliceCache
    validation: SliceCache


def load_data(options: argparse.Namespace) -> Data:
    """Cut all volumes into slices once, and split them as the shipped model's training did."""
    card = load_card(options.model)
    cases = list_cases(options.studies)
    held_out = [c for c in cases if c.name in options.cases]
    rest = [c for c in cases if c.name not in options.cases]
    if not held_out or not rest:
        sys.exit(
            f"Of {', '.join(c.name for c in cases)} some must be held out and some left; "
            f"--cases names {', '.join(options.cases)}."
        )
    caches = [SliceCache(part, card.structures, card.conditioning, options.work / "cache") for part in (rest, held_out)]
    return Data(card, held_out, *caches)


def load_shipped(options: argparse.Namespace) -> ProposalPipeline:
    """The shipped model as the server runs it on this processor."""
    autocast = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    return load_pipeline(options.model, Backbone(options.model / "backbone", "cpu"), autocast)[1]


def average_groups(per: Mapping[str, float]) -> dict[str, float]:
    """Means over the eight structures of TransUNet and over all, of those that are there."""
    eight = [per[s] for s in TRANSUNET_STRUCTURES if s in per]
    return {
        "transunet_8": float(np.mean(eight)) if eight else math.nan,
        "all": float(np.mean(list(per.values()))) if per else math.nan,
    }


# Training of the rivals


@torch.no_grad()
def measure_slices(predict: Callable[[Tensor], Tensor], cache: SliceCache, every: int) -> dict[str, Any]:
    """Dice on every n-th slice of the working grid, pooled per volume, of what is at least one half."""
    tally = DiceTally(cache)
    chosen = list(range(0, len(cache), every))
    for start in range(0, len(chosen), 16):
        batch = chosen[start : start + 16]
        images, labels = cache.read(batch)
        tally.add(batch, labels, {"mask": predict(images) >= 0.5})
    per = average_volumes(tally.compute_dice("mask"), cache.structures)
    return {
        **{k: round(v, 4) for k, v in average_groups(per).items()},
        "structures": {s: round(v, 4) for s, v in per.items()},
    }


def train_unet(options: argparse.Namespace) -> None:
    """Train the U-Net, or continue its training; weights go to the work folder."""
    data = load_data(options)
    budget = make_budget(options, 8)
    torch.manual_seed(budget.seed)
    settings = {
        "in_channels": 2 * data.card.conditioning.num_neighbours + 1,
        "structures": len(data.card.structures),
        "dropout": options.dropout,
    }
    network = UNet(**settings)

    def compute_loss(step: int, generator: torch.Generator) -> Tensor:
        images, labels, _ = draw_slices(data.training, budget.slices, generator)
        return compute_unet_loss(network(images), labels, options.cross_entropy, options.smooth)

    def validate() -> dict[str, Any]:
        return {
            "cross_entropy": options.cross_entropy,
            "smooth": options.smooth,
            **measure_slices(network.predict, data.validation, options.every),
        }

    folder = options.work / "unet"
    curve = train_for(network, compute_loss, validate, budget, folder, tell)
    keep_rival(network, folder, settings, data, budget, curve, options)


def train_gms(options: argparse.Namespace) -> None:
    """Train the latent-to-latent CNN, or continue its training."""
    data = load_data(options)
    budget = make_budget(options, 6)
    torch.manual_seed(budget.seed)
    model = LatentModel(load_shipped(options), data.card.structures)

    def compute_loss(step: int, generator: torch.Generator) -> Tensor:
        return model.compute_loss(*draw_slices(data.training, budget.slices, generator), generator)

    folder = options.work / "gms"
    curve = train_for(
        model.mapper,
        compute_loss,
        lambda: measure_slices(model.predict, data.validation, options.every),
        budget,
        folder,
        tell,
    )
    keep_rival(model.mapper, folder, {}, data, budget, curve, options)


def make_budget(options: argparse.Namespace, slices: int) -> Budget:
    if options.smoke:
        return Budget(minutes=0.002, validate_minutes=0.001, slices=2)
    return Budget(
        minutes=options.minutes,
        validate_minutes=options.validate_minutes,
        slices=slices,
        anneal_minutes=options.anneal_minutes,
    )


def keep_rival(
    network: torch.nn.Module,
    folder: Path,
    settings: dict[str, Any],
    data: Data,
    budget: Budget,
    curve: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """Write weights and card of a trained rival, and its curve into the JSON file."""
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / f"{options.what}.safetensors")
    file = folder / f"{options.what}.json"
    commands = json.loads(file.read_text(encoding="utf-8")).get("commands", []) if file.is_file() else []
    if (
        find_command() not in commands
    ):  # Training that goes on may have other settings: all its commands are needed to repeat it.
        commands.append(find_command())
    card = {
        "commands": commands,
        "settings": settings,
        "parameters": sum(p.numel() for p in network.parameters()),
        "training": data.training.names,
        "held_out": data.validation.names,
        "budget": asdict(budget),
        "validated on every n-th slice": options.every,
        "curve": curve,
    }
    file.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    add_part(options.out, options.what, card)


def load_unet(folder: Path) -> UNet:
    """The U-Net that `unet` trained."""
    card = json.loads((folder / "unet.json").read_text(encoding="utf-8"))
    network = UNet(**card["settings"])
    network.load_state_dict(load_file(folder / "unet.safetensors"))
    return network.eval()


def load_gms(folder: Path, pipeline: ProposalPipeline, structures: Sequence[str]) -> LatentModel:
    """The latent-to-latent CNN that `gms` trained."""
    model = LatentModel(pipeline, structures)
    model.mapper.load_state_dict(load_file(folder / "gms.safetensors"))
    model.mapper.eval()
    return model


# Slices: every n-th, on the working grid

Propose = Callable[[Tensor], Tensor]
"""Slices (N, C, H, W) -> masks of K answers (N, P, K, H, W), bool on the CPU."""


@dataclass(frozen=True)
class Counts:
    """Pixels of some slices: everything that the tables of `slices` need.

    Attributes:
        volume: (S,) to which volume a slice belongs.
        truth: (S, P) pixels of a structure.
        sizes: (S, P, K) pixels that an answer draws.
        overlaps: (S, P, K) of those that are right.
        agreed_sizes, agreed_overlaps: K -> (S, P), the same of the consensus of the first K.
    """

    volume: np.ndarray
    truth: np.ndarray
    sizes: np.ndarray
    overlaps: np.ndarray
    agreed_sizes: dict[int, np.ndarray]
    agreed_overlaps: dict[int, np.ndarray]


def count_slices(
    propose: Propose, cache: SliceCache, chosen: Sequence[int], counts: Sequence[int], file: Path
) -> Counts:
    """Run a network on slices and count pixels; what `file` holds is not computed again.

    Args:
        chosen: S positions in `cache.index`.
        counts: The K of the consensus, at most as many as there are answers.
        file: NumPy archive, written after the last slice.
    """
    if not file.is_file():
        found: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(chosen), 8):
            batch = list(chosen[start : start + 8])
            images, labels = cache.read(batch)
            truth = one_hot(labels, len(cache.structures)).bool()
            masks = propose(images)
            parts = {
                "truth": truth.sum((2, 3)),
                "sizes": masks.sum((3, 4)),
                "overlaps": (masks & truth[:, :, None]).sum((3, 4)),
            }
            for k in counts:
                agreed = masks[:, :, :k].sum(2) * 2 >= k
                parts |= {f"agreed_sizes {k}": agreed.sum((2, 3)), f"agreed_overlaps {k}": (agreed & truth).sum((2, 3))}
            for name, part in parts.items():
                found.setdefault(name, []).append(part.numpy())
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".tmp").open("wb") as stream:
            np.savez(
                stream,
                volume=[cache.index[i][0] for i in chosen],
                **{name: np.concatenate(parts) for name, parts in found.items()},
            )  # type: ignore[arg-type]
        file.with_suffix(".tmp").replace(file)
    with np.load(file) as kept:
        return Counts(
            *(kept[name] for name in ("volume", "truth", "sizes", "overlaps")),
            *({k: kept[f"{name} {k}"] for k in counts} for name in ("agreed_sizes", "agreed_overlaps")),
        )


def pool_dice(counts: Counts, sizes: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """Dice per volume and structure, (V, P, ...) for counts of (S, P, ...); NaN where no slice shows the structure."""
    volumes = range(int(counts.volume.max()) + 1)
    truth, size, overlap = (
        np.stack([part[counts.volume == v].sum(0) for v in volumes]) for part in (counts.truth, sizes, overlaps)
    )
    truth = truth.reshape(truth.shape + (1,) * (size.ndim - truth.ndim))
    return np.where(truth > 0, 2 * overlap / np.maximum(truth + size, 1), np.nan)


def score_counts(counts: Counts, structures: Sequence[str], k: int) -> dict[str, Any]:
    """Figures of the first K answers.

    Returns:
        Dice of "single", "consensus", "best" (of K, per volume) and "best per slice" (another answer may be picked on
        every slice), each the means of `average_groups` and per structure; and where something is drawn that is not
        there, for a single answer and the consensus.
    """
    dice = pool_dice(counts, counts.sizes[..., :k], counts.overlaps[..., :k])
    sizes, overlaps = counts.sizes[..., :k], counts.overlaps[..., :k]
    # On a slice without the structure the best answer is the one that draws least.
    each = np.where(
        counts.truth[..., None] > 0, 2 * overlaps / np.maximum(counts.truth[..., None] + sizes, 1), -sizes.astype(float)
    )
    picked = each.argmax(axis=-1)[..., None]
    kinds = {
        "single": dice.mean(axis=-1),
        "consensus": pool_dice(counts, counts.agreed_sizes[k], counts.agreed_overlaps[k]),
        "best": dice.max(axis=-1),
        "best per slice": pool_dice(
            counts, *(np.take_along_axis(part, picked, -1)[..., 0] for part in (sizes, overlaps))
        ),
    }
    absent = counts.truth == 0
    result: dict[str, Any] = {}
    for kind, values in kinds.items():
        per = average_volumes(values, structures)
        result[kind] = {**average_groups(per), "structures": per}
    drawn = {"single": (sizes > 0).mean(axis=-1), "consensus": counts.agreed_sizes[k] > 0}
    result["drawn where absent"] = {
        kind: {
            "all": float(d[absent].mean()),
            "structures": {
                s: float(d[:, p][absent[:, p]].mean()) for p, s in enumerate(structures) if absent[:, p].any()
            },
        }
        for kind, d in drawn.items()
    }
    return result


def propose_shipped(
    pipeline: ProposalPipeline,
    structures: Sequence[str],
    gate: float,
    count: int,
    steps: int,
    guidance: float,
    seed: int = 0,
) -> Propose:
    """The shipped model's K proposals, as `Engine.propose` draws them."""
    prompts = pipeline.encode_prompts(structures)
    noise, offsets = pipeline.draw_noise(count, seed), pipeline.draw_offsets(count, seed)

    def propose(images: Tensor) -> Tensor:
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        masks = torch.zeros(len(images), len(structures), count, *images.shape[-2:], dtype=torch.bool)
        pairs = [(n, p) for n, p in np.ndindex(*evidence.shape[:2]) if float(evidence[n, p].max()) >= gate]
        for at in range(0, len(pairs), max(1, 64 // count)):
            part = pairs[at : at + max(1, 64 // count)]
            drawn = pipeline.propose(features, evidence, prompts, part, noise, steps, guidance, offsets)
            for (n, p), probabilities in zip(part, drawn, strict=True):
                masks[n, p] = probabilities >= 0.5
        return masks

    return propose


def list_methods(options: argparse.Namespace, data: Data) -> dict[str, tuple[Callable[[], Propose], tuple[int, ...]]]:
    """Name -> (what makes its answers, the K to report), in the order of their worth to the tables."""
    structures, gate = data.card.structures, data.card.gate
    many: tuple[int, ...] = (1, 2) if options.smoke else (1, 4, 8)
    shipped: list[ProposalPipeline] = []

    def get_shipped() -> ProposalPipeline:
        if not shipped:
            shipped.append(load_shipped(options))
        return shipped[0]

    def draw_evidence() -> Propose:
        pipeline = get_shipped()
        prompts = pipeline.encode_prompts(structures)
        return lambda images: pipeline.predict_evidence(pipeline.encode_slices(images), prompts)[:, :, None] >= 0.5

    def draw_gms() -> Propose:
        model = load_gms(options.work / "gms", get_shipped(), structures)
        return lambda images: model.predict(images)[:, :, None] >= 0.5

    def draw_unet() -> Propose:
        network = load_unet(options.work / "unet")
        return lambda images: network.predict(images)[:, :, None] >= 0.5

    def draw_dropout(share: float | None) -> Propose:
        network = load_unet(options.work / "unet")
        return lambda images: torch.stack([network.sample(images, k, share=share) >= 0.5 for k in range(many[-1])], 2)

    def draw_shipped(steps: int, guidance: float) -> Propose:
        return propose_shipped(get_shipped(), structures, gate, many[-1], steps, guidance)

    methods: dict[str, tuple[Callable[[], Propose], tuple[int, ...]]] = {
        "evidence alone": (draw_evidence, (1,)),
        "2 steps": (partial(draw_shipped, 2, 1.0), many),
    }
    if (options.work / "unet" / "unet.json").is_file():
        methods["U-Net"] = (draw_unet, (1,))
        methods["U-Net, MC dropout"] = (partial(draw_dropout, None), many)
        methods["U-Net, MC dropout 0.5"] = (partial(draw_dropout, 0.5), many)
    if (options.work / "gms" / "gms.json").is_file():
        methods["GMS"] = (draw_gms, (1,))
    for steps in (1, 4, 8):
        methods[f"{steps} step{'s' if steps > 1 else ''}"] = (partial(draw_shipped, steps, 1.0), many)
    for steps in (2, 1, 4, 8):
        methods[f"{steps} step{'s' if steps > 1 else ''}, guidance {GUIDANCE:g}"] = (
            partial(draw_shipped, steps, GUIDANCE),
            many,
        )
    return methods


def measure_methods(options: argparse.Namespace) -> None:
    """Every method on every n-th held-out slice, volume by volume; the JSON file grows with every method."""
    data = load_data(options)
    cache = data.validation
    every = 3 if options.every is None else options.every
    methods = list_methods(options, data)
    wanted = options.methods or list(methods)
    unknown = [name for name in wanted if name not in methods]
    if unknown:
        sys.exit(
            f"There is no method {', '.join(unknown)}; there are {', '.join(methods)} "
            "(the rivals after `unet` and `gms`)."
        )
    rows: dict[str, Any] = {}
    for name in wanted:
        start, ks = methods[name]
        folder = options.work / "slices" / find_key(options, data, name, every)
        propose: Propose | None = None
        parts = []
        for v, case in enumerate(cache.names):
            chosen = [i for i, (w, _) in enumerate(cache.index) if w == v][::every]
            if propose is None and not (folder / f"{case}.npz").is_file():
                propose = start()
            started = time.process_time()
            parts.append(count_slices(propose or _refuse, cache, chosen, ks, folder / f"{case}.npz"))
            tell(f"{name}, {case}: {len(chosen)} slices, {time.process_time() - started:.0f} s")
        counts = join_counts(parts)
        rows[name] = {str(k): score_counts(counts, cache.structures, k) for k in ks}
        setting = {"every": every, "slices": len(counts.volume), "cases": cache.names, "model": data.card.full_name}
        add_part(options.out, "slices", {"command": find_command(), **setting, "methods": rows})


def find_key(options: argparse.Namespace, data: Data, name: str, *settings: Any) -> str:
    """What the results of a method depend on, in 16 letters: settings, held-out volumes, the shipped weights and those
    of the rival.
    """
    rival = {"U-Net": "unet", "GMS": "gms"}.get(name.split(",")[0])
    weights = [] if rival is None else [(options.work / rival / f"{rival}.safetensors").read_bytes()]
    shipped = compute_conditioning_digest(options.model), compute_backbone_digest(options.model / "backbone")
    known = [
        name,
        options.smoke,
        *settings,
        sorted(data.validation.digests.items()),
        shipped,
        [hashlib.sha256(w).hexdigest() for w in weights],
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _refuse(images: Tensor) -> Tensor:
    raise AssertionError("All volumes were counted before.")


def join_counts(parts: Sequence[Counts]) -> Counts:
    """The slices of several volumes together."""

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    agreed = (
        {k: np.concatenate([getattr(part, name)[k] for part in parts]) for k in parts[0].agreed_sizes}
        for name in AGREED
    )
    return Counts(join("volume"), join("truth"), join("sizes"), join("overlaps"), *agreed)


# Volumes: all slices, on the grid of the input


def measure_volumes(options: argparse.Namespace) -> None:
    """Whole volumes by the rules of `progidiff evaluate`, as drawn and with the largest connected part only."""
    data = load_data(options)
    matched, _ = match_structures(load_label_names(options.studies), data.card.structures)
    networks: dict[str, Callable[[Volume], VolumeProposals]] = {
        "shipped": lambda volume: propose_volume(options, data, volume)
    }
    if (options.work / "unet" / "unet.json").is_file():
        networks["U-Net"] = lambda volume: draw_volume(
            load_unet(options.work / "unet").predict, data.card, volume, "U-Net"
        )
    if (options.work / "gms" / "gms.json").is_file():
        networks["GMS"] = lambda volume: draw_volume(
            load_gms(options.work / "gms", load_shipped(options), data.card.structures).predict,
            data.card,
            volume,
            "GMS",
        )
    result: dict[str, Any] = {}
    for name in options.methods or list(networks):
        file = options.work / "volumes" / f"{find_key(options, data, name, options.num_proposals)}.json"
        entries: dict[str, list[dict[str, Any]]] = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {kind: [] for kind in CLEANING}
        )
        for case in data.cases[len(entries["as drawn"]) :]:
            started = time.process_time()
            volume = load_volume(case.image, "CT")
            labels, proposals = load_label(case.label, like=volume.grid), networks[name](volume)
            drawn = time.process_time()
            for kind, largest in CLEANING.items():
                scores = score_case(volume, labels, proposals, matched, True, largest)
                entries[kind].append({"case": case.name, "seconds": round(drawn - started, 1), "structures": scores})
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".tmp").write_text(json.dumps(entries), encoding="utf-8")
            file.with_suffix(".tmp").replace(file)
            tell(
                f"{name}, {case.name}: drawn in {drawn - started:.0f} s, scored in {time.process_time() - drawn:.0f} s"
            )
        result[name] = {
            kind: {"summary": summarise(cases, list(matched)), "cases": cases} for kind, cases in entries.items()
        }
        settings = {
            "model": data.card.full_name,
            "num_proposals": 2 if options.smoke else options.num_proposals,
            "rules": RULES,
        }
        add_part(options.out, "volumes", {"command": find_command(), **settings, "networks": result})


CLEANING = {"as drawn": False, "largest component": True}
"""Kind of a score -> whether only the largest connected part of a mask counts."""

AGREED = ("agreed_sizes", "agreed_overlaps")


def propose_volume(options: argparse.Namespace, data: Data, volume: Volume) -> VolumeProposals:
    """What the server answers, without an adapter; kept and taken from `--keep` (as by islands.py), where they may be
    more.
    """
    count = 2 if options.smoke else options.num_proposals
    folder = options.keep / volume.name if options.keep else None
    if folder is not None and (folder / "proposals.json").is_file():
        kept = VolumeProposals.from_files(folder)
        wanted = (data.card.full_name, "", data.card.num_inference_steps, data.card.structures)
        if (
            kept.model_version,
            kept.adapter,
            kept.num_inference_steps,
            kept.structures,
        ) != wanted or kept.num_proposals < count:
            sys.exit(
                f"'{folder}' holds {kept.num_proposals} proposals of {kept.model_version} "
                f"in {kept.num_inference_steps} steps; name another --keep."
            )
        return replace(kept, probabilities=kept.probabilities[:, :count].copy())
    queries = [Query(name, name) for name in data.card.structures]
    request = ProposalRequest(queries=queries, num_proposals=count, adapter=NONE)
    proposals = Engine(options.model).propose(request, volume, Work(remember=False))
    if folder is not None:
        proposals.to_files(folder)
    return proposals


def draw_volume(predict: Callable[[Tensor], Tensor], card: ModelCard, volume: Volume, name: str) -> VolumeProposals:
    """One answer of a rival for a whole volume, in the shape of proposals, so that it goes the same way back to the
    grid of the input.

    Args:
        predict: Slices (N, C, H, W) -> membership (N, P, H, W) in [0, 1].
    """
    config = card.conditioning
    stack, spacing = volume.to_stack()
    grid = plan_working_grid(
        stack, spacing, compute_body_threshold(volume), config.height, config.width, config.spacing_range
    )
    drawn = np.zeros((len(card.structures), 1, len(stack), config.height, config.width), np.uint8)
    started = time.monotonic()
    for start in range(0, len(stack), 16):
        part = np.arange(start, min(start + 16, len(stack)))
        images = grid.extract_slices(stack, part, compute_window(volume), config.num_neighbours, config.neighbour_mm)
        masks = (predict(images) * 255).round().to(torch.uint8).numpy().transpose(1, 0, 2, 3)
        drawn[:, 0, part] = masks * (masks >= 128).any(axis=(2, 3), keepdims=True)
    settings = {"seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0, "model_version": name, "adapter": ""}
    source = {
        "modality": volume.modality,
        "modality_source": volume.modality_source,
        "seconds": time.monotonic() - started,
    }
    return VolumeProposals(structures=card.structures, probabilities=drawn, grid=grid, **settings, **source)  # type: ignore[arg-type]


# JSON and tables


def find_command() -> str:
    return shlex.join(["python", *sys.argv]) if sys.argv[0].endswith("segmentation.py") else ""


def add_part(out: Path | None, name: str, part: Mapping[str, Any]) -> None:
    """Put the results of a command into the JSON file; those of others stay, and so do other methods and networks of
    the same command.
    """
    if out is None:
        return
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    merged = dict(part)
    for key in ("methods", "networks"):
        if key in part:
            merged[key] = {**report.get(name, {}).get(key, {}), **part[key]}
    save_report(without_nan({**report, name: merged, "versions": describe_versions()}), out)


def without_nan(value: Any) -> Any:
    """Plain values rounded to four digits; null for what is not defined."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def format_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def format_head(*cells: str) -> str:
    return f"{format_row(*cells)}\n|{'---|' * len(cells)}"


def format_curves(report: Mapping[str, Any]) -> str:
    """Dice of the rivals against the time they were trained."""
    lines = [format_head("rival", "minutes of a core", "steps", "slices seen", "mean of 8", "mean of all")]
    for what, name in (("unet", "U-Net"), ("gms", "GMS")):
        for point in report.get(what, {}).get("curve", ()):
            figures = (show(point["transunet_8"]), show(point["all"]))
            lines.append(
                format_row(name, f"{point['minutes']:.0f}", str(point["step"]), str(point["slices"]), *figures)
            )
    return "\n".join(lines)


def format_methods(report: Mapping[str, Any]) -> str:
    """Single, consensus and best of K; means of 8 (of all) structures."""
    part = report["slices"]
    lines = [
        format_head(
            "method", "K", "single", "consensus", "best of K", "best of K, picked per slice", "drawn where absent"
        )
    ]
    for name, by_k in part["methods"].items():
        for k, row in by_k.items():
            kinds = ("single", "consensus", "best", "best per slice")
            cells = [f"{show(row[kind]['transunet_8'])} ({show(row[kind]['all'])})" for kind in kinds]
            if k == "1":
                cells = ["", cells[1], "", ""]
            lines.append(format_row(name, k, *cells, f"{100 * row['drawn where absent']['consensus']['all']:.1f} %"))
    return "\n".join(lines)


def format_structures(report: Mapping[str, Any]) -> str:
    """Consensus Dice per structure of all methods, of their largest K."""
    methods = {name: by_k[max(by_k, key=int)] for name, by_k in report["slices"]["methods"].items()}
    lines = [format_head("structure", *(f"{name}" for name in methods))]
    structures = next(iter(methods.values()))["consensus"]["structures"]
    lines += [
        format_row(s, *(show(row["consensus"]["structures"].get(s)) for row in methods.values())) for s in structures
    ]
    for group, title in (("transunet_8", "mean of 8"), ("all", "mean of all")):
        lines.append(format_row(title, *(show(row["consensus"][group]) for row in methods.values())))
    return "\n".join(lines)


def format_volumes(report: Mapping[str, Any]) -> str:
    """Dice and HD95 of whole volumes, as drawn and cleaned up."""
    networks = report["volumes"]["networks"]
    head = ["structure"]
    for name in networks:
        head += [f"{name}: Dice", "HD95, mm", "Dice, largest part", "HD95, mm"]
    lines = [format_head(*head)]
    columns = [networks[name][kind]["summary"] for name in networks for kind in CLEANING]
    for structure in columns[0]["consensus"]["dice"]:
        cells = [
            show(c["consensus"][metric].get(structure), d) for c in columns for metric, d in (("dice", 3), ("hd95", 1))
        ]
        lines.append(format_row(structure, *cells))
    for group, title in (("transunet_8", "mean of 8"), ("all", "mean of all")):
        cells = [
            show(c["mean"]["consensus"][metric][group], d) for c in columns for metric, d in (("dice", 3), ("hd95", 1))
        ]
        lines.append(format_row(title, *cells))
    cells = [text for c in columns for text in (f"{100 * c['false_positives']['consensus']['all_slices']:.1f} %", "")]
    lines.append(format_row("drawn on slices without it", *cells))
    return "\n".join(lines)


def print_tables(options: argparse.Namespace) -> None:
    """Everything that the JSON file holds, in Markdown."""
    report = json.loads(options.out.read_text(encoding="utf-8"))
    tables = {
        ("unet", "gms"): format_curves,
        ("slices",): format_methods,
        ("slices", ""): format_structures,
        ("volumes",): format_volumes,
    }
    for needs, draw in tables.items():
        if any(name in report for name in needs):
            print(draw(report) + "\n")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--studies",
        type=Path,
        default=ROOT / ".." / "shared" / "data" / "ct",
        help="local datastore with labels/final, labels.json",
    )
    common.add_argument("--cases", nargs="*", default=list(HELD_OUT), help="held out and measured")
    common.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    common.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "segmentation", help="caches, checkpoints and what is done already"
    )
    common.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "segmentation.json")
    common.add_argument("--threads", type=int, default=1)
    common.add_argument("--smoke", action="store_true", help="a size for tests")
    commands = parser.add_subparsers(dest="what", required=True)
    for what, run, minutes, every in (("unet", train_unet, 30.0, 2), ("gms", train_gms, 13.0, 6)):
        part = commands.add_parser(what, parents=[common], help=run.__doc__)
        part.add_argument(
            "--minutes", type=float, default=minutes, help="of processor time of one core; more than before continues"
        )
        part.add_argument("--validate-minutes", type=float, default=3.0)
        part.add_argument(
            "--anneal-minutes", type=float, default=4.0, help="over which the learning rate falls at the end"
        )
        part.add_argument("--every", type=int, default=every, help="validate on every n-th slice")
        if what == "unet":
            part.add_argument(
                "--cross-entropy",
                type=float,
                default=1.0,
                help="its weight beside the Dice loss; may change when training goes on",
            )
            part.add_argument(
                "--smooth",
                type=float,
                default=1e-5,
                help="pixels added to both parts of the Dice loss; may change as well",
            )
            part.add_argument(
                "--dropout", type=float, default=0.2, help="share of the channels dropped after the two coarsest levels"
            )
        part.set_defaults(run=run)
    part = commands.add_parser("slices", parents=[common], help=measure_methods.__doc__)
    part.add_argument("--every", type=int, help="every n-th slice (default: 3)")
    part.add_argument("--methods", nargs="*", help="as in the table (default: all)")
    part.set_defaults(run=measure_methods)
    part = commands.add_parser("volumes", parents=[common], help=measure_volumes.__doc__)
    part.add_argument("--methods", nargs="*", help="shipped, U-Net, GMS (default: all that are trained)")
    part.add_argument("--num-proposals", type=int, default=4)
    part.add_argument(
        "--keep", type=Path, help="folder to keep the shipped model's proposals in, and to take them from"
    )
    part.set_defaults(run=measure_volumes)
    commands.add_parser("tables", parents=[common], help=print_tables.__doc__).set_defaults(run=print_tables)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
