"""Recipe 1 of `progidiff train`: image encoder and text-query head, every structure of a slice at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from progidiff.backbone import PROMPT_TEMPLATE, Backbone
from progidiff.conditioning import ConditioningBranch
from progidiff.pipeline import EncodedPrompts
from progidiff.prompts import training_phrases
from progidiff.training.data import SliceCache, augment
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.losses import compute_evidence_loss
from progidiff.training.scores import DiceTally, one_hot


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
            self.texts += [PROMPT_TEMPLATE.format(p) for p in phrases]
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


@torch.no_grad()
def validate_evidence(branch: ConditioningBranch, cache: SliceCache, phrases: PhraseTable, every: int = 2) -> dict[str, float]:
    """Dice of the thresholded evidence per structure, pooled over the slices of a volume and averaged over volumes."""
    branch.eval()
    pooled = phrases.pooled[phrases.canonical()]
    tally = DiceTally(cache)
    chosen = list(range(0, len(cache), every))
    for start in range(0, len(chosen), 16):
        batch = chosen[start : start + 16]
        images, labels = cache.read(batch)
        with torch.autocast(pooled.device.type, torch.bfloat16):
            features = branch.encode_slices(images.to(pooled.device))
            logits = branch.predict_evidence(features, pooled)
        tally.add(batch, labels, {"evidence": logits.float().cpu() > 0})
    per = np.nanmean(tally.compute_dice("evidence"), axis=0)
    return {"dice_all": float(np.nanmean(per)), **{s: float(d) for s, d in zip(cache.structures, per, strict=True)}}


def train_evidence(
    branch: ConditioningBranch,
    backbone: Backbone,
    training: SliceCache,
    validation: SliceCache | None,
    config: LoopConfig,
    folder: Path,
    batch_size: int = 16,
    strength: float = 1.0,
) -> list[dict[str, float]]:
    """Train the encoder and the query head; the rest of the branch is not touched.

    Returns:
        The validation history; on return the branch holds the averaged weights.
    """
    phrases = PhraseTable(backbone, training.structures)
    count = len(training.structures)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        chosen = training.draw_balanced(batch_size, rng)
        images, labels = training.read(chosen)
        images, labels = augment(images, labels, generator, strength)
        annotated = training.weigh(chosen)
        features = branch.encode_slices(images.to(backbone.device))
        logits = branch.predict_evidence(features, phrases.pooled[phrases.draw(generator)])
        return compute_evidence_loss(logits, one_hot(labels, count).to(backbone.device), annotated.to(backbone.device))

    modules = {"encoder": branch.encoder, "query_head": branch.query_head}
    check = None if validation is None else lambda: validate_evidence(branch, validation, phrases)
    return run_loop(modules, compute_loss, config, folder, check)
