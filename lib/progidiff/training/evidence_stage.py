"""Recipe 1 of `progidiff train`: image encoder and text-query head, every structure of a slice at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from progidiff.model.backbone import PROMPT_TEMPLATE, Backbone
from progidiff.model.conditioning import ConditioningBranch, SliceFeatures
from progidiff.model.pipeline import EncodedPrompts
from progidiff.prompts.parser import training_phrases
from progidiff.prompts.words import spell_out
from progidiff.training.augment import Augmentation
from progidiff.training.device_batches import move
from progidiff.training.dice_tally import DiceTally, average_volumes, compute_area_shares
from progidiff.training.logged_pictures import draw_answers
from progidiff.training.loop import LoopConfig, Report, find_autocast_dtype, run_loop
from progidiff.training.losses import EvidenceLosses, compute_evidence_loss
from progidiff.training.objective import Figures, Objective
from progidiff.training.processes import Team, find_team
from progidiff.training.settings import Range
from progidiff.training.slice_cache import SliceCache


class PhraseTable:
    """Text vectors of every phrase that training may use, computed once.

    Attributes:
        texts: All texts; ``owner[i]`` is the structure index of text i.
    """

    def __init__(self, backbone: Backbone, structures: Sequence[str]) -> None:
        self.texts: list[str] = []
        self.rows: list[list[int]] = []
        for structure in structures:
            phrases = training_phrases(structure)
            self.rows.append(list(range(len(self.texts), len(self.texts) + len(phrases))))
            self.texts += [PROMPT_TEMPLATE.format(spell_out(p)) for p in phrases]
        self.tokens, self.mask, self.pooled = backbone.encode_text(self.texts)
        self.empty_tokens, self.empty_mask, _ = backbone.encode_text([""])

    def draw(self, generator: torch.Generator, canonical_share: float = 0.5) -> Tensor:
        """One text per structure: its own name, or one of its synonyms. Returns indices (P,)."""
        picked = []
        for rows in self.rows:
            pick = int(torch.randint(len(rows), (1,), generator=generator))
            picked.append(rows[0] if torch.rand(1, generator=generator) < canonical_share else rows[pick])
        return torch.tensor(picked)

    def canonical(self) -> Tensor:
        """The structures' own names. Returns indices (P,)."""
        return torch.tensor([rows[0] for rows in self.rows])

    def pick_canonical(self) -> EncodedPrompts:
        """The structures' own names as the pipeline reads prompts."""
        rows = self.canonical()
        mask = None if self.mask is None else self.mask[rows]
        return EncodedPrompts(self.tokens[rows], mask, self.pooled[rows], self.empty_tokens, self.empty_mask)


@dataclass(frozen=True)
class EvidenceOptions:
    """What a step of this recipe sees.

    Attributes:
        slices_per_step: Slices of a micro-batch; every structure of them is asked for.
        canonical_share: Share of the prompts that are the structure's own name; the others are synonyms.
        augmentation: Strength of affine and intensity augmentation.
        bias_field: Strength of simulated shading.
        supersampling: Labels have so many pixels per pixel of the image and axis, so that targets are area shares; 1
            for whole pixels.
        losses: Their weights.
    """

    slices_per_step: Annotated[int, Range(1, 1024)] = 16
    canonical_share: Annotated[float, Range(0, 1)] = 0.5
    augmentation: Annotated[float, Range(0, 3)] = 1.0
    bias_field: Annotated[float, Range(0, 2)] = 0.0
    supersampling: Annotated[int, Range(1, 4)] = 2
    losses: EvidenceLosses = field(default_factory=EvidenceLosses)


@dataclass(frozen=True)
class EvidenceDraw:
    """N slices as they are kept, on the CPU, and what will be done to them.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: uint8 (N, s H, s W) label ids, s pixels per pixel of the image.
        spoken: (N, P), 1 where the label speaks about a structure.
        augmentation: Its parameters.
        rng: Goes on where drawing stopped.
    """

    images: Tensor
    labels: Tensor
    spoken: Tensor
    augmentation: Augmentation
    rng: np.random.Generator


@dataclass(frozen=True)
class EvidenceBatch:
    """N augmented slices where the networks are.

    Attributes:
        images: (N, C, H, W) in [-1, 1].
        targets: (N, P, H, W) area shares.
        spoken: (N, P), 1 where the label speaks about a structure.
        rng: Goes on where drawing the batch stopped.
    """

    images: Tensor
    targets: Tensor
    spoken: Tensor
    rng: np.random.Generator


class EvidenceObjective(Objective):
    """Loss of the image encoder and the text-query head on a batch of slices.

    Args:
        branch: Whose encoder and query head are trained.
        phrases: Of the structures of `training`.
        training: Slices to draw from.
        options: What a step sees.
        random_share: See `SliceCache.draw_balanced`.
    """

    def __init__(
        self,
        branch: ConditioningBranch,
        phrases: PhraseTable,
        training: SliceCache,
        options: EvidenceOptions,
        random_share: float = 0.15,
    ) -> None:
        self.branch, self.phrases, self.training, self.options = branch, phrases, training, options
        self._random_share = random_share

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.phrases.pooled.device

    def draw(self, generator: torch.Generator) -> EvidenceDraw:
        """Draw and read slices, and draw how they are augmented."""
        options, config = self.options, self.training.config
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        chosen = self.training.draw_balanced(options.slices_per_step, rng, self._random_share)
        images, labels = self.training.read_bytes(chosen)
        augmentation = Augmentation.draw(
            generator, len(chosen), config.width / config.height, options.augmentation, options.bias_field
        )
        return EvidenceDraw(images, labels, self.training.weigh(chosen), augmentation, rng)

    def prepare(self, drawn: EvidenceDraw) -> EvidenceBatch:
        """Augment slices on the device, and find how much of its pixels each structure covers."""
        drawn, training = move(drawn, self.device), self.training
        labels = drawn.augmentation.warp.move_labels(drawn.labels, training.config.height, training.config.width)
        targets = compute_area_shares(labels, len(training.structures), training.supersampling)
        images = drawn.augmentation.apply_to_images(drawn.images)
        return EvidenceBatch(images, targets, drawn.spoken, drawn.rng)

    def draw_batch(self, generator: torch.Generator) -> EvidenceBatch:
        """Draw, read and augment slices."""
        return self.prepare(self.draw(generator))

    def compute(self, drawn: EvidenceDraw, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Loss and figures of slices that were drawn, for `run_loop`."""
        return self.compute_loss(self.prepare(drawn), generator)

    def compute_loss(self, batch: EvidenceBatch, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Run the networks on a batch: a slice is encoded once for all its prompts."""
        return self.compare(self.branch.encode_slices(batch.images), batch, generator)

    def compare(
        self, features: SliceFeatures, batch: EvidenceBatch, generator: torch.Generator
    ) -> tuple[Tensor, Figures]:
        """Answer for every structure, in words that are drawn, and compare with the labels."""
        words = move(self.phrases.draw(generator, self.options.canonical_share), self.device)
        logits = self.branch.predict_evidence(features, self.phrases.pooled[words])
        return compute_evidence_loss(logits, batch.targets, batch.spoken, self.options.losses)


@torch.no_grad()
def validate_evidence(
    branch: ConditioningBranch,
    cache: SliceCache,
    phrases: PhraseTable,
    every: int = 2,
    autocast: torch.dtype | None = torch.bfloat16,
    team: Team | None = None,
) -> dict[str, float]:
    """Dice of the thresholded evidence per structure, pooled over the slices of a volume and averaged over volumes.

    Args:
        team: The processes that share the slices, all of which call this; None for this one alone.
    """
    branch.eval()
    team = team or Team()
    tally = DiceTally(cache)
    chosen = list(range(0, len(cache), every))
    for start in team.share(range(0, len(chosen), 16)):
        batch = chosen[start : start + 16]
        images, labels = cache.read(batch)
        tally.add(batch, labels, {"evidence": _find_masks(branch, images, phrases, autocast)})
    tally.sum_over(team)
    per = average_volumes(tally.compute_dice("evidence"), cache.structures)
    return {"dice_all": float(np.mean(list(per.values()))) if per else 0.0, **per}


@torch.no_grad()
def _find_masks(
    branch: ConditioningBranch, images: Tensor, phrases: PhraseTable, autocast: torch.dtype | None
) -> Tensor:
    """Where the evidence is above one half: (N, P, H, W) bool on the CPU."""
    pooled = phrases.pooled[phrases.canonical()]
    with torch.autocast(pooled.device.type, autocast, enabled=autocast is not None):
        logits = branch.predict_evidence(branch.encode_slices(images.to(pooled.device)), pooled)
    return logits.float().cpu() > 0


def train_evidence(
    branch: ConditioningBranch,
    backbone: Backbone,
    training: SliceCache,
    validation: SliceCache | None,
    config: LoopConfig,
    folder: Path,
    options: EvidenceOptions | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train the encoder and the query head; the rest of the branch is not touched.

    Args:
        options: What a step sees.
        is_cancelled, report, settings: See `run_loop`.

    Returns:
        The validation history; on return the branch holds the averaged weights.
    """
    phrases = PhraseTable(backbone, training.structures)
    objective = EvidenceObjective(branch, phrases, training, options or EvidenceOptions())
    modules = {"encoder": branch.encoder.requires_grad_(True), "query_head": branch.query_head.requires_grad_(True)}
    if validation is None:
        return run_loop(modules, objective, config, folder, None, is_cancelled, report, settings=settings)
    held_out, dtype = validation, find_autocast_dtype(config.precision, backbone.device)
    return run_loop(
        modules,
        objective,
        config,
        folder,
        lambda: validate_evidence(branch, held_out, phrases, autocast=dtype, team=find_team()),
        is_cancelled,
        report,
        lambda: draw_answers(held_out, lambda images: [_find_masks(branch, images, phrases, dtype)]),
        settings,
    )
