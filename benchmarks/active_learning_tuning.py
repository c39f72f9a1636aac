"""Which slices next: strategies against each other, with an annotator who always knows the truth.

    python benchmarks/active_learning_tuning.py --task mr --studies ../shared/data/mr --out
    benchmarks/results/active_learning_mr.json python benchmarks/active_learning_tuning.py --task contrast --studies
    ../shared/data/ct --out benchmarks/results/active_learning_contrast.json python benchmarks/active_learning_tuning.py
    --summarise benchmarks/results/active_learning_mr.json benchmarks/results/active_learning_contrast.json
    --picture docs/images/active_learning_tuning.png

This trains the real model in every round, which costs minutes and has noise; `active_learning.py` compares strategies
where the comparison has the power to decide.

Volumes are split by patient. Every seed has one start set, the same for all strategies, as large as a query and with a
slice of every structure. Then five rounds: a strategy chooses slices from the pool by what the present model proposes,
their true labels are added, and a new model is trained from the same initial weights with the same fixed number of
steps, and measured on the same slices of the test volumes. Reported: Dice against slices, the area under that curve,
final Dice per structure, slices and contour length (pixels of the working grid, 1.8 to 3.2 mm, along the outlines that
somebody would have drawn), and a paired test over tasks and seeds. Read its p with
care: the seeds of `contrast` share their test volumes, and those of `mr` have a test volume of another seed in their
pool, so the pairs are not independent.

What makes a round cost seconds instead of minutes, and what that means for the figures:

* Low-rank updates are folded into the weights before every step instead of running beside them: the same function at
  half the cost.
* Only so many slices of the pool (`Setup.candidates`), drawn anew in every round and the same for all strategies, are
  looked at. What nobody looked at has no score; strategies that choose by chance may still draw it. Proposals for
  scores take one step.
* Curves are Dice of the evidence, which is what is trained here, on many test slices. Dice of the consensus, which a
  person is served, is measured for the first and the last model of a curve, and the evidence on the same slices beside
  it.

Task `mr`: the CT model, which has seen no MR, is adapted to MR slices by low-rank updates of its evidence path.
Task `heart`: three structures that the model never saw, the check of `active_learning.py`. Task `contrast`: the same
with CT whose contrast is turned around (`invert_contrast`): fat bright and vessels dark, as no CT is. The model has
to be adapted to it like to another scanner. It stands beside `mr` because it has eight structures and true CT
volumes. The CT model was trained on the volumes of the pool (as they are, not inverted); the test volumes were held
out of that training. Task `ct`: CT structures from very few slices. The text-query head is reset, so that no
structure is known, and learned anew on the frozen image encoder, without augmentation, so that a slice is encoded
once for all rounds. The encoder was trained with these structures on the volumes of the pool; the test volumes were
held out of that training. It finds them again from a handful of slices, whichever they are: there is next to nothing
left to choose.

A run that is stopped goes on where it was: every round is kept in the work folder when it is done. `--out` is written
again after every strategy, with everything that the work folder holds for these sizes, whichever call made it;
`--collect` does only that. Strategies or seeds can so be split over several calls. Tables compare two strategies where
both are complete.
"""

import argparse
import copy
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from progidiff.active_learning.settings import AcquisitionConfig
from progidiff.active_learning.strategies import ImageScores, build_pool, compute_scores, pick_slices
from progidiff.images.reading import read_grid
from progidiff.model.adapters import compute_base_digest
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningBranch, SliceFeatures
from progidiff.model.folder import ModelCard, load_pipeline
from progidiff.model.lora import LoraSettings, inject_lora
from progidiff.model.pipeline import ProposalPipeline
from progidiff.training.augment import augment
from progidiff.training.dice_tally import one_hot
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.gate import measure_dice
from progidiff.training.losses import compute_evidence_loss
from progidiff.training.slice_cache import SliceCache, list_cases
from progidiff.training.split import restrict_cache

ROOT = Path(__file__).resolve().parents[1]

OURS = "proposal_disagreement"
FORMER = {"cover": False}
"""Ours as it was when this was measured."""

STRATEGIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "coverage": (OURS, {}),
    "ours": (OURS, FORMER),
    "ours, no disagreement": (OURS, {**FORMER, "score_power": 0.0}),
    "ours, not spread over images": (OURS, {**FORMER, "spread_over_images": False}),
    "ours, no foreground weight": (OURS, {**FORMER, "foreground_weight": False}),
    "ours, not stratified": (OURS, {**FORMER, "stratified_share": 0.0}),
    "ours, no distance": (OURS, {**FORMER, "min_distance_mm": 0.0}),
    "ours, no noise": (OURS, {**FORMER, "noise": False}),
    "uniform random": ("uniform_random", {}),
    "foreground random 33 %": ("foreground_random", {"foreground_share": 0.33}),
    "foreground random 66 %": ("foreground_random", {"foreground_share": 0.66}),
    "evenly spaced": ("evenly_spaced", {}),
    "entropy": ("entropy", {}),
}
"""Name in the tables -> strategy and settings of `progidiff.active_learning.strategies`."""

FORMAT = 3
"""Of the work folder; raised when a change of this script changes the figures."""

CT_TEST = ("img0024", "img0033", "img0039")
"""Held out of the training of the shipped CT model."""


@dataclass(frozen=True)
class Setup:
    """Sizes of a run; everything that a result depends on beside code and data.

    Attributes:
        task: "heart", "mr", "contrast" or "ct".
        structures: What is annotated.
        pool_volumes: Volumes to choose slices from; the others (of CT: those held out) are for the test.
        query: Slices per round, and in the start set.
        rounds: Queries after the start set.
        steps: Training steps per round.
        batch_size: Slices per step.
        learning_rate: Peak; it falls to zero as a cosine.
        num_proposals: K of scores and consensus.
        score_steps: Denoising steps of the proposals that slices are scored by; 0 for the model's. The test always has
            the model's.
        candidates: Slices of the pool that are looked at in a round, drawn at random; 0 for all.
        pool_mm: Only slices at least so far apart can be chosen: neighbours at 3 mm are the same picture, and cost
            time.
        test_slices: The evidence is measured on at most about so many, evenly spaced.
        consensus_slices: The same for the consensus.
        bias_field: Simulated shading while training; see `augment`.
        inverted: Slices reach the model with their contrast turned around.
        frozen_encoder: A text-query head is learned from nothing on an encoder that stays, instead of low-rank updates
            of both.
    """

    task: str
    structures: tuple[str, ...]
    pool_volumes: int
    query: int
    rounds: int = 5
    steps: int = 60
    batch_size: int = 4
    learning_rate: float = 1e-3
    num_proposals: int = 4
    score_steps: int = 1
    candidates: int = 48
    pool_mm: float = 7.5
    test_slices: int = 120
    consensus_slices: int = 32
    bias_field: float = 0.0
    frozen_encoder: bool = False
    inverted: bool = False


CT_STRUCTURES = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")

SETUPS = {
    "heart": Setup(
        "heart",
        ("right ventricle", "left ventricular myocardium", "left ventricle"),
        pool_volumes=16,
        query=5,
        rounds=3,
        candidates=0,
        bias_field=0.3,
    ),
    "mr": Setup("mr", ("liver", "spleen", "right kidney", "left kidney"), pool_volumes=6, query=6, bias_field=0.3),
    "contrast": Setup(
        "contrast", CT_STRUCTURES, pool_volumes=8, query=6, steps=80, learning_rate=2e-3, candidates=32, inverted=True
    ),
    "ct": Setup(
        "ct",
        CT_STRUCTURES,
        pool_volumes=8,
        query=4,
        steps=120,
        batch_size=6,
        learning_rate=4e-3,
        frozen_encoder=True,
    ),
}


class InvertedCache(SliceCache):
    """Slices whose contrast is turned around when they are read."""

    def read(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `SliceCache.read`."""
        images, labels = super().read(chosen)
        return invert_contrast(images), labels


def invert_contrast(images: Tensor) -> Tensor:
    """Bright becomes dark within the body; air, and what is as dark as air, stays as it is.

    Args:
        images: In [-1, 1], any shape.

    Example:
        >>> [round(float(x), 2) for x in invert_contrast(torch.tensor([-1.0, -0.98, -0.6, 0.6, 1.0]))]
        [-1.0, -0.98, 0.6, -0.6, -1.0]
    """
    return torch.where(images > -0.96, -images, images)


class World:
    """The slices of one seed: pool, test, start set, and the model before anybody labelled anything."""

    def __init__(self, setup: Setup, studies: Path, model_dir: Path, work: Path, seed: int) -> None:
        self.setup = setup
        self.seed = seed
        backbone = Backbone(model_dir / "backbone", "cpu")
        autocast = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
        self.card: ModelCard
        self.card, self.base = load_pipeline(model_dir, backbone, autocast)
        if setup.frozen_encoder:
            forget_structures(self.base, seed)
        cases = {case.name: case for case in list_cases(studies)}
        shuffled = sorted(cases, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        fixed = [name for name in CT_TEST if setup.task in ("contrast", "ct") and name in cases]
        self.pool_names = [name for name in shuffled if name not in fixed][: setup.pool_volumes]
        self.test_names = fixed or shuffled[setup.pool_volumes :]
        if not self.test_names:
            sys.exit(
                f"{len(cases)} labelled volumes are too few for a pool of "
                f"{setup.pool_volumes} and a test; lower --pool-volumes."
            )
        cache = work / "cache"
        kind = InvertedCache if setup.inverted else SliceCache
        self.pool = kind([cases[name] for name in self.pool_names], setup.structures, self.card.conditioning, cache)
        self.test = kind([cases[name] for name in self.test_names], setup.structures, self.card.conditioning, cache)
        self.phrases = PhraseTable(backbone, setup.structures)
        self.position = {entry: i for i, entry in enumerate(self.pool.index)}
        self.slice_mm = [find_slice_mm(cases[name].image) for name in self.pool_names]
        self.candidates = {name: self._thin(v) for v, name in enumerate(self.pool.names)}
        self.start = self._pick_start()
        self._encoded: dict[tuple[int, int], SliceFeatures] = {}

    def encode(self, pipeline: ProposalPipeline, chosen: Sequence[tuple[int, int]]) -> SliceFeatures:
        """Features of (volume, slice) pairs of the pool; of an encoder that stays they are computed once."""
        frozen = self.setup.frozen_encoder
        missing = [entry for entry in dict.fromkeys(chosen) if not (frozen and entry in self._encoded)]
        fresh: dict[tuple[int, int], SliceFeatures] = {}
        for start in range(0, len(missing), 8):
            part = missing[start : start + 8]
            features = pipeline.encode_slices(self.pool.read([self.position[entry] for entry in part])[0])
            fresh.update({entry: features[n : n + 1] for n, entry in enumerate(part)})
        if frozen:
            dtype = self.base.autocast_dtype or torch.float32  # half the memory where the networks round to it anyway
            self._encoded.update({entry: features.to(dtype) for entry, features in fresh.items()})
            fresh = self._encoded
        return SliceFeatures.concatenate([fresh[entry] for entry in chosen])

    def draw_candidates(self, annotated: Mapping[str, set[int]], round_index: int) -> set[tuple[int, int]]:
        """The (volume, slice) pairs that are looked at in a round: of the same order for all strategies, the first that
        are free.
        """
        everything = [(v, z) for v, name in enumerate(self.pool.names) for z in self.candidates[name]]
        order = np.random.default_rng([self.seed, round_index, 1]).permutation(len(everything))
        free = [everything[i] for i in order if everything[i][1] not in annotated[self.pool.names[everything[i][0]]]]
        return set(free[: self.setup.candidates or None])

    def _thin(self, volume: int) -> list[int]:
        """The slices of a volume that may be chosen."""
        step = max(1, round(self.setup.pool_mm / self.slice_mm[volume]))
        return list(range(step // 2, len(self.pool.images[volume]), step))

    def _pick_start(self) -> dict[str, set[int]]:
        """One slice of every structure, the rest at random: the same for all strategies."""
        rng = np.random.default_rng(self.seed)
        everything = [(v, z) for v, name in enumerate(self.pool.names) for z in self.candidates[name]]
        chosen: list[tuple[int, int]] = []
        for s in range(len(self.setup.structures)):
            showing = [(v, z) for v, z in everything if self.pool.pixels[v][z, s] > 0 and (v, z) not in chosen]
            if showing and not any(self.pool.pixels[v][z, s] > 0 for v, z in chosen):
                chosen.append(showing[rng.integers(len(showing))])
        rest = [entry for entry in everything if entry not in chosen]
        missing = max(0, self.setup.query - len(chosen))
        chosen += [rest[i] for i in rng.permutation(len(rest))[:missing]]
        found: dict[str, set[int]] = {name: set() for name in self.pool.names}
        for v, z in chosen:
            found[self.pool.names[v]].add(z)
        return found


def find_slice_mm(image: Path) -> float:
    """Distance of the axial slices of an image, from its header."""
    affine = read_grid(image).affine
    axial = int(np.argmax(np.abs(affine[2, :3])))
    return float(np.linalg.norm(affine[:3, axial]))


def forget_structures(pipeline: ProposalPipeline, seed: int) -> None:
    """Give the text-query head fresh weights, in place."""
    old = pipeline.branch.query_head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.branch.query_head = type(old)(pipeline.branch.config.text_features, old.fine, old.coarse).to(
            next(old.parameters())
        )


class EvidencePath(nn.Module):
    """Slices, or their features, and texts in, evidence logits out, as one module whose weights can be replaced for a
    call.
    """

    def __init__(self, branch: ConditioningBranch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, slices: Tensor | SliceFeatures, pooled: Tensor) -> Tensor:
        """(N, C, H, W) or features of N slices, (P, T) -> (N, P, H, W)."""
        features = self.branch.encode_slices(slices) if isinstance(slices, Tensor) else slices
        return self.branch.predict_evidence(features, pooled)


def fold_weights(branch: nn.Module) -> dict[str, Tensor]:
    """Weights of the branch that low-rank updates or training change, updates added, by their names without peft;
    gradients flow through.
    """
    found: dict[str, Tensor] = {
        name: p for name, p in branch.named_parameters() if p.requires_grad and ".lora_" not in name
    }
    for name, module in branch.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[f"{name}.weight"] = module.get_base_layer().weight + module.get_delta_weight(
                module.active_adapters[0]
            )
    return found


def train(world: World, annotated: Mapping[str, set[int]], round_index: int) -> ProposalPipeline:
    """From the initial weights, a fixed number of steps on the annotated slices; the same arguments give the same
    model.
    """
    setup, base = world.setup, world.base
    updates = copy.deepcopy(base.branch).requires_grad_(False)
    if setup.frozen_encoder:
        updates.query_head.requires_grad_(True)
    else:
        inject_lora(updates, None, LoraSettings(8, 16.0, ("encoder", "query_head"), True), world.seed)
    parameters = [p for p in updates.parameters() if p.requires_grad]
    path = EvidencePath(copy.deepcopy(base.branch).requires_grad_(False)).train()
    names = {name: v for v, name in enumerate(world.pool.names)}
    training = restrict_cache(
        world.pool, [world.position[names[name], z] for name, slices in annotated.items() for z in sorted(slices)]
    )
    optimiser = torch.optim.AdamW(parameters, lr=setup.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, setup.learning_rate, total_steps=setup.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(world.seed * 1000 + round_index)
    rng = np.random.default_rng([world.seed, round_index])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed * 1000 + round_index)  # dropout
        for _ in range(setup.steps):
            chosen = training.draw_balanced(setup.batch_size, rng)
            images, labels = training.read(chosen)
            inputs: Tensor | SliceFeatures
            if setup.frozen_encoder:
                inputs = world.encode(base, [training.index[i] for i in chosen])
            else:
                inputs, labels = augment(images, labels, generator, bias_field=setup.bias_field)
            weights = {f"branch.{name}": weight for name, weight in fold_weights(updates).items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=base.autocast_dtype is not None):
                logits = functional_call(path, weights, (inputs, world.phrases.pooled[world.phrases.draw(generator)]))
            loss, _ = compute_evidence_loss(logits, one_hot(labels, len(setup.structures)), training.weigh(chosen))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        for name, weight in fold_weights(updates).items():
            path.branch.get_parameter(name).copy_(weight)
    pipeline = copy.copy(base)
    pipeline.branch = path.branch.eval()
    return pipeline


@torch.no_grad()
def score_pool(
    world: World, pipeline: ProposalPipeline | None, kind: str, annotated: Mapping[str, set[int]], round_index: int
) -> list[ImageScores]:
    """What a strategy may look at: nothing, where the evidence is, or proposals, on the candidates of a round.

    The images of the pool are thinned: slice i of the scores is `world.candidates[name][i]`. Slices that are annotated
    hold what was annotated, on which all proposals agree; slices that nobody looked at hold nothing.

    Args:
        pipeline: May be None for kind "nothing".
    """
    setup, card = world.setup, world.card
    count = len(setup.structures)
    looked_at = set() if kind == "nothing" else world.draw_candidates(annotated, round_index)
    found = []
    for v, name in enumerate(world.pool.names):
        slices = world.candidates[name]
        spacing = world.slice_mm[v] * (slices[1] - slices[0] if len(slices) > 1 else 1)
        shape = (count, setup.num_proposals, len(slices), card.conditioning.height, card.conditioning.width)
        drawn = np.zeros(shape, np.uint8)
        if kind != "nothing":
            for z in annotated[name]:
                truth = np.asarray(world.pool.labels[v][z])[None] == np.arange(1, count + 1)[:, None, None]
                drawn[:, :, slices.index(z)] = truth[:, None] * np.uint8(255)
        chosen = [i for i, z in enumerate(slices) if (v, z) in looked_at]
        if pipeline is not None:
            for start in range(0, len(chosen), 8):
                part = chosen[start : start + 8]
                drawn[:, :, part] = draw_slices(
                    world, pipeline, kind, world.encode(pipeline, [(v, slices[i]) for i in part])
                )
        found.append(compute_scores(name, setup.structures, drawn, spacing))
    return found


def draw_slices(world: World, pipeline: ProposalPipeline, kind: str, features: SliceFeatures) -> np.ndarray:
    """What the model makes of N slices, uint8 (P, K, N, H, W): proposals, or K times the thresholded evidence."""
    setup, card = world.setup, world.card
    prompts = world.phrases.pick_canonical()
    evidence = pipeline.predict_evidence(features, prompts)
    if kind == "evidence":
        found = (evidence >= 0.5).cpu().numpy().transpose(1, 0, 2, 3)[:, None] * np.uint8(255)
        return np.repeat(found, setup.num_proposals, axis=1)
    noise, offsets = pipeline.draw_noise(setup.num_proposals, 0), pipeline.draw_offsets(setup.num_proposals, 0)
    drawn = np.zeros((evidence.shape[1], setup.num_proposals, *evidence.shape[:1], *evidence.shape[2:]), np.uint8)
    pairs = [
        (n, p)
        for n in range(evidence.shape[0])
        for p in range(evidence.shape[1])
        if float(evidence[n, p].max()) >= card.gate
    ]
    for at in range(0, len(pairs), 16):
        some = pairs[at : at + 16]
        steps = setup.score_steps or card.num_inference_steps
        masks = pipeline.propose(features, evidence, prompts, some, noise, steps, card.guidance_scale, offsets)
        for (n, p), probabilities in zip(some, (masks * 255).round().to(torch.uint8).numpy(), strict=True):
            drawn[p, :, n] = probabilities * (probabilities >= 128).any(axis=(1, 2), keepdims=True)
    return drawn


def choose(
    world: World, scores: list[ImageScores], annotated: Mapping[str, set[int]], strategy: str, round_index: int
) -> dict[str, set[int]]:
    """The annotated slices with those of one query."""
    name, settings = STRATEGIES[strategy]
    config = replace(AcquisitionConfig(rounds=world.setup.rounds), **settings)
    thin = {image: [world.candidates[image].index(z) for z in slices] for image, slices in annotated.items()}
    picks = pick_slices(
        build_pool(scores), world.setup.query, name, config, annotated=thin, round_index=round_index, seed=world.seed
    )
    grown = {image: set(slices) for image, slices in annotated.items()}
    for pick in picks:
        grown[pick.image].add(world.candidates[pick.image][pick.index])
    return grown


def measure_contour(world: World, annotated: Mapping[str, set[int]]) -> float:
    """Length of all outlines on the annotated slices, in pixels of the working grid: edges between a structure and what
    it is not.
    """
    edges = 0
    for v, name in enumerate(world.pool.names):
        for z in annotated[name]:
            label = np.pad(np.asarray(world.pool.labels[v][z]).astype(np.int16), 1)
            for s in range(1, len(world.setup.structures) + 1):
                mask = label == s
                edges += int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
    return float(edges)


def evaluate(
    world: World, pipeline: ProposalPipeline, annotated: Mapping[str, set[int]], consensus: bool
) -> dict[str, Any]:
    """One point of a curve."""
    setup = world.setup
    figures = measure_dice(pipeline, world.test, world.phrases, world.card, 0, setup.test_slices)
    point = {
        "slices": sum(map(len, annotated.values())),
        "contour": measure_contour(world, annotated),
        "dice": figures["evidence"],
        "structures": {name: figures[f"evidence {name}"] for name in setup.structures if f"evidence {name}" in figures},
    }
    if consensus:
        served = measure_dice(
            pipeline, world.test, world.phrases, world.card, setup.num_proposals, setup.consensus_slices
        )
        point["consensus"] = {
            "dice": served["consensus"],
            "evidence_there": served["evidence"],
            "structures": {
                name: served[f"consensus {name}"] for name in setup.structures if f"consensus {name}" in served
            },
        }
    return point


def look(strategy: str) -> str:
    """What a strategy needs to see of the pool."""
    return {OURS: "proposals", "entropy": "proposals", "foreground_random": "evidence"}.get(
        STRATEGIES[strategy][0], "nothing"
    )


class Record:
    """A file that holds a curve as far as it is, with the slices behind every point; written after every point."""

    def __init__(self, file: Path) -> None:
        self.file = file
        content: dict[str, Any] = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"points": [], "annotated": []}
        )
        self.points: list[dict[str, Any]] = content["points"]
        self.annotated: list[dict[str, set[int]]] = [
            {name: set(slices) for name, slices in entry.items()} for entry in content["annotated"]
        ]

    def add(self, name: str, point: dict[str, Any], annotated: Mapping[str, set[int]]) -> None:
        """Append a point and keep it."""
        self.points.append(point)
        self.annotated.append({image: set(slices) for image, slices in annotated.items()})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        slices = [{image: sorted(entry[image]) for image in entry} for entry in self.annotated]
        write_text(self.file, json.dumps({"name": name, "points": self.points, "annotated": slices}))


def find_record(folder: Path, strategy: str) -> Path:
    """Where the curve of a strategy lies: named by it and all its settings, so that other settings do not continue an
    old curve.
    """
    name, settings = STRATEGIES[strategy]
    config = asdict(replace(AcquisitionConfig(), **settings)) if name == OURS else settings
    parts = json.dumps([strategy, name, config], sort_keys=True)
    return folder / f"{hashlib.sha256(parts.encode()).hexdigest()[:12]}.json"


def write_text(file: Path, text: str) -> None:
    """All of it or nothing."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


def run_seed(
    world: World, strategies: Sequence[str], folder: Path, tell: Callable[[str], None], done: Callable[[], None]
) -> None:
    """Complete the curves of some strategies for one seed; what is on disk is not computed again.

    Args:
        tell: Receives a line per round.
        done: Called after every strategy.
    """
    start = Record(folder / "start.json")
    models: dict[str, ProposalPipeline] = {}
    first_scores: dict[str, list[ImageScores]] = {}

    def train_first() -> ProposalPipeline:
        if "first" not in models:
            models["first"] = train(world, world.start, 0)
        return models["first"]

    if not start.points:
        start.add("start", evaluate(world, train_first(), world.start, consensus=True), world.start)
    for strategy in strategies:
        record = Record(find_record(folder, strategy))
        kind = look(strategy)
        pipeline: ProposalPipeline | None = None
        for round_index in range(world.setup.rounds):
            if len(record.points) > round_index:
                continue
            started = time.process_time()
            annotated = record.annotated[-1] if record.annotated else world.start
            if kind != "nothing" and pipeline is None:  # the first round, or the run was stopped here
                pipeline = train(world, annotated, round_index) if record.points else train_first()
            if round_index == 0:
                if kind not in first_scores:
                    first_scores[kind] = score_pool(world, pipeline, kind, annotated, 0)
                scores = first_scores[kind]
            else:
                scores = score_pool(world, pipeline, kind, annotated, round_index)
            scored = time.process_time()
            annotated = choose(world, scores, annotated, strategy, round_index)
            pipeline = train(world, annotated, round_index + 1)
            trained = time.process_time()
            point = evaluate(world, pipeline, annotated, consensus=round_index + 1 == world.setup.rounds)
            seconds = {"score": scored - started, "train": trained - scored, "evaluate": time.process_time() - trained}
            point["processor_seconds"] = {name: round(value, 1) for name, value in seconds.items()}
            record.add(strategy, point, annotated)
            tell(
                f"{world.setup.task}, seed {world.seed}, {strategy}, round "
                f"{round_index + 1}: {point['slices']} slices, Dice {point['dice']:.3f}, "
                f"{point['processor_seconds']} s of processor time"
            )
        done()


def collect(setup: Setup, folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Seed -> strategy -> complete curve, of everything in a work folder."""
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for place in sorted(folder.glob("seed*"), key=lambda path: int(path.name[4:])):
        start = Record(place / "start.json")
        for strategy in STRATEGIES:
            record = Record(find_record(place, strategy))
            if start.points and len(record.points) == setup.rounds:
                curves.setdefault(place.name[4:], {})[strategy] = [*start.points, *record.points]
    return curves


def compute_area(curve: Sequence[Mapping[str, Any]]) -> float:
    """Mean Dice over the budget: the area under Dice against slices, divided by the range of slices."""
    x, y = [float(p["slices"]) for p in curve], [float(p["dice"]) for p in curve]
    return float(np.trapezoid(y, x)) / max(1e-9, x[-1] - x[0])


def find_slices_for(curve: Sequence[Mapping[str, Any]], dice: float) -> float | None:
    """Slices at which a curve first reaches a Dice, between its points by a straight line; None if it never does."""
    for before, after in pairwise(curve):
        if before["dice"] >= dice:
            return float(before["slices"])
        if after["dice"] >= dice:
            share = (dice - before["dice"]) / (after["dice"] - before["dice"])
            return float(before["slices"] + share * (after["slices"] - before["slices"]))
    return float(curve[-1]["slices"]) if curve[-1]["dice"] >= dice else None


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds and tasks, and `ours` against every other strategy, paired over the (task, seed) that both
    have.
    """
    from scipy.stats import ttest_rel, wilcoxon

    runs = [(result["setup"]["task"], seed, curves) for result in results for seed, curves in result["curves"].items()]
    rows: dict[str, Any] = {}
    for name in STRATEGIES:
        own = [(task, curves) for task, _, curves in runs if name in curves]
        if not own:
            continue
        ends = [curves[name][-1] for _, curves in own]
        row: dict[str, Any] = {
            "runs": len(own),
            "area": float(np.mean([compute_area(curves[name]) for _, curves in own])),
            "final_dice": float(np.mean([end["dice"] for end in ends])),
            "slices": float(np.mean([end["slices"] for end in ends])),
            "contour": float(np.mean([end["contour"] for end in ends])),
            "structures": {},
        }
        served = [end["consensus"]["dice"] for end in ends if "consensus" in end]
        if served:
            row["final_consensus"] = float(np.mean(served))
        for task in dict.fromkeys(task for task, _ in own):
            of_task = [curves[name] for t, curves in own if t == task]
            row[f"area {task}"] = float(np.mean([compute_area(curve) for curve in of_task]))
            finals = [curve[-1]["structures"] for curve in of_task]
            row["structures"][task] = {
                s: float(np.mean([f[s] for f in finals if s in f])) for s in dict.fromkeys(s for f in finals for s in f)
            }
        both = [curves for _, curves in own if "ours" in curves]
        if name != "ours" and both:
            ours, areas = ([compute_area(curves[n]) for curves in both] for n in ("ours", name))
            gaps = np.subtract(ours, areas)
            row["ours_minus_this"] = float(gaps.mean())
            row["ours_wins"] = f"{int((gaps > 0).sum())} of {len(gaps)}"
            if len(gaps) > 1 and np.ptp(gaps) > 0:
                row["p_paired_t"] = float(ttest_rel(ours, areas).pvalue)
                row["p_wilcoxon"] = float(wilcoxon(ours, areas).pvalue)
        # Slices for the Dice that uniform random ends with, as a share of its slices; what never reaches it counts as
        # the whole budget or more, so the median says "at least" there.
        rivals = [(curves[name], curves["uniform random"]) for _, curves in own if "uniform random" in curves]
        if rivals:
            needed = [(find_slices_for(curve, rival[-1]["dice"]), rival[-1]["slices"]) for curve, rival in rivals]
            shares = [1.0 if slices is None else slices / of for slices, of in needed]
            reached = sum(slices is not None for slices, _ in needed)
            row["slices_for_dice_of_uniform"] = {
                "reached": f"{reached} of {len(needed)}",
                "median_share": float(np.median(shares)),
            }
        rows[name] = row
    return {"runs": [f"{task}, seed {seed}" for task, seed, _ in runs], "strategies": rows}


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    titles = (
        "strategy",
        "runs",
        "area",
        "final Dice",
        "consensus",
        "contour",
        "slices for uniform's Dice",
        "ours minus this",
        "wins",
        "p (t)",
        "p (Wilcoxon)",
    )
    lines = [f"Runs: {'; '.join(summary['runs'])}.", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in summary["strategies"].items():
        served = f"{row['final_consensus']:.3f}" if "final_consensus" in row else ""
        needed = row.get("slices_for_dice_of_uniform")
        share = "" if needed is None else f"{100 * needed['median_share']:.0f} % ({needed['reached']})"
        gap = f"{row['ours_minus_this']:+.3f}" if "ours_minus_this" in row else ""
        chances = [f"{row[key]:.3f}" if key in row else "" for key in ("p_paired_t", "p_wilcoxon")]
        figures = [str(row["runs"]), f"{row['area']:.3f}", f"{row['final_dice']:.3f}", served, f"{row['contour']:.0f}"]
        lines.append(f"| {' | '.join([name, *figures, share, gap, row.get('ours_wins', ''), *chances])} |")
    return "\n".join(lines)


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean Dice over the seeds against slices, one panel per task: the seeds that ours has, and the strategies that
    have all of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False)
    # A strategy has one colour in all panels, whichever others are there: plain ones first, parts of ours after them.
    ordered = sorted(STRATEGIES, key=lambda name: name.startswith("ours,"))
    colors = dict(zip(ordered, [f"C{n}" for n in range(10)] + ["black", "gold", "brown"], strict=True))
    lines: dict[str, Any] = {}
    for axis, result in zip(axes[0], results, strict=True):
        seeds = [curves for curves in result["curves"].values() if "ours" in curves]
        for name in STRATEGIES:
            curves = [curves[name] for curves in seeds if name in curves]
            if curves and len(curves) == len(seeds):
                x = np.mean([[point["slices"] for point in curve] for curve in curves], axis=0)
                y = np.mean([[point["dice"] for point in curve] for curve in curves], axis=0)
                ours = name == "ours"
                style = ":" if name.startswith("ours,") else "-"
                (lines[name],) = axis.plot(
                    x, y, color=colors[name], linewidth=2.5 if ours else 1.2, linestyle=style, zorder=3 if ours else 2
                )
        title = f"{result['setup']['task'].upper()}, mean of {len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
        axis.set(xlabel="annotated slices", ylabel="Dice of the evidence on test volumes", title=title)
        axis.grid(alpha=0.3)
    shown = [name for name in ordered if name in lines]
    axes[0][-1].legend([lines[name] for name in shown], shown, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def name_experiment(setup: Setup, model_dir: Path, studies: Path) -> str:
    """A folder's name from what the numbers depend on, so that another size or other weights do not continue an old
    run.
    """
    digests = {
        case.name: hashlib.sha256(case.image.read_bytes() + case.label.read_bytes()).hexdigest()
        for case in list_cases(studies)
    }
    parts = json.dumps([FORMAT, asdict(setup), compute_base_digest(model_dir), sorted(digests.items())])
    return f"{setup.task}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(SETUPS))
    parser.add_argument("--studies", type=Path, help="local datastore with labels/final and labels.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--strategies", nargs="*", default=list(STRATEGIES), help="names as in the tables (default: all)"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "active_learning")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--query", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pool-volumes", type=int)
    parser.add_argument("--test-slices", type=int)
    parser.add_argument("--score-steps", type=int, help="fewer steps where slices are scored, to save most of the time")
    parser.add_argument("--candidates", type=int, help="slices of the pool that are looked at in a round; 0 for all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--collect", action="store_true", help="compute nothing, only gather what the work folder holds"
    )
    parser.add_argument("--smoke", action="store_true", help="a size for tests: 1 round, 2 steps, 1 pool volume")
    parser.add_argument("--summarise", type=Path, nargs="*", help="only tables (and --picture) from these JSON files")
    options = parser.parse_args(arguments)

    if options.summarise:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in options.summarise]
    else:
        if options.task is None or options.studies is None:
            parser.error("--task and --studies are needed, or --summarise")
        unknown = set(options.strategies) - STRATEGIES.keys()
        if unknown:
            parser.error(f"no such strategy: {', '.join(sorted(unknown))}; there are {', '.join(STRATEGIES)}")
        torch.set_num_threads(options.threads)
        setup = SETUPS[options.task]
        if options.smoke:
            setup = replace(
                setup,
                pool_volumes=1,
                query=4,
                rounds=1,
                steps=2,
                batch_size=2,
                num_proposals=2,
                candidates=6,
                test_slices=4,
                consensus_slices=2,
            )
        sizes = {
            name: getattr(options, name)
            for name in ("rounds", "query", "steps", "pool_volumes", "test_slices", "score_steps", "candidates")
        }
        setup = replace(setup, **{name: value for name, value in sizes.items() if value is not None})
        result: dict[str, Any] = {}
        for seed in options.seeds:
            world = World(setup, options.studies, options.model, options.work, seed)
            folder = options.work / name_experiment(setup, options.model, options.studies)

            def gather(world: World = world, folder: Path = folder) -> None:
                found = {
                    "command": shlex.join(sys.argv),
                    "model": world.card.full_name,
                    "setup": asdict(setup),
                    "curves": collect(setup, folder),
                }
                result.update(found)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    write_text(options.out, json.dumps({**result, "summary": summarise([result])}, indent=1) + "\n")

            if not options.collect:
                tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
                run_seed(world, options.strategies, folder / f"seed{seed}", tell, gather)
            gather()
        results = [result]
    print(format_table(summarise(results)))
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
