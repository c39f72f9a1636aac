"""What is trained: a cross-attention block that all scales share, and a pixel classifier; about one million parameters.

After TextDiff (arXiv 2407.05323), with three differences: image tokens attend at a pooled resolution (a report sentence
says nothing of single pixels), positions are those in the whole picture, also of a crop or tile, and the classifier
merges the scales from coarse to fine instead of upsampling all of them to full size first, which costs a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.errors import GeometryError
from progidiff.training.settings import Range

GROUPS = 8
"""Of the group normalisations."""


@dataclass(frozen=True)
class HeadConfig:
    """Shapes of a head.

    Attributes:
        channels, strides: Of the features, coarse first.
        classes: Foreground classes; background is one more.
        text_features: D of the sentence's tokens; 0 for a head without the text branch.
        width: Features of a token in the attention block.
        base: Features of the classifier at the finest scale; coarser ones have twice and four times as many.
        heads: Of the attention.
        attend_stride: Finest stride at which image tokens attend; finer scales are pooled to it.
        dropout: Of whole feature channels, in training.
        gate: The sentence opens a gate for each class it asks for, in place of being attended to by the image: what is
            where is learned from every label as a whole, what a sentence asks for from sentences alone.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int = 1
    text_features: int = 384
    width: Annotated[int, Range(8, 2048)] = 128
    base: Annotated[int, Range(8, 1024)] = 32
    heads: Annotated[int, Range(1, 64)] = 4
    attend_stride: Annotated[int, Range(1, 64)] = 8
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    gate: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of the classifier per scale, coarse first."""
        return tuple(self.base * min(4, s // self.strides[-1]) for s in self.strides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for card.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadConfig:
        """The inverse of `to_dict`; also of heads from before there was a gate."""
        plain = {f.name: values[f.name] for f in fields(cls) if f.name in values or f.name != "gate"}
        return cls(**{**plain, "channels": tuple(plain["channels"]), "strides": tuple(plain["strides"])})


class TextDiffHead(nn.Module):
    """Features of all scales and a sentence in, a class per working pixel out."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        for i, channels in enumerate(config.channels):
            self.register_buffer(f"mean_{i}", torch.zeros(channels))
            self.register_buffer(f"std_{i}", torch.ones(channels))
        self.enter = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(config.channels, config.widths, strict=True))
        self.text = _TextBranch(config) if config.text_features else None
        self.merge = nn.ModuleList(
            _Merge(coarse, fine) for coarse, fine in zip((0, *config.widths[:-1]), config.widths, strict=True)
        )
        self.classify = nn.Conv2d(config.widths[-1], 1 + config.classes, 1)
        self.gate = _Gate(config) if config.gate and config.text_features else None

    def set_statistics(self, mean: Sequence[Tensor], std: Sequence[Tensor]) -> None:
        """Keep what features are standardised with: (C_b,) per scale, of the training pictures."""
        for i, (m, s) in enumerate(zip(mean, std, strict=True)):
            getattr(self, f"mean_{i}").copy_(m)
            getattr(self, f"std_{i}").copy_(s.clamp_min(1e-4))

    def forward(
        self,
        features: Sequence[Tensor],
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        boxes: Tensor | None = None,
        attend: bool = True,
    ) -> Tensor:
        """Class scores.

        Args:
            features: (N, C_b, H / s_b, W / s_b) each, coarse first.
            tokens: (N, L, D) of the sentences; None for images without one, which get a learned token instead.
            mask: (N, L) bool, True for real tokens; None if all are; a row without any is an image without a sentence.
            boxes: (N, 4) top, left, bottom, right of the crop as shares of its picture, so that "upper right" means the
                picture's; None: the crop is the picture.
            attend: False leaves the text's contribution out (the control "no-text"); a head with a gate then draws all
                classes.

        Returns:
            (N, 1 + classes, H, W) logits at the working resolution, background first.

        Raises:
            GeometryError: if the features do not fit the head.
        """
        if tuple(f.shape[1] for f in features) != self.config.channels:
            raise GeometryError(
                f"This head takes features of {self.config.channels} channels, got "
                f"{tuple(f.shape[1] for f in features)}."
            )
        scales = []
        for i, (found, enter) in enumerate(zip(features, self.enter, strict=True)):
            scales.append(self._enter(found, enter, getattr(self, f"mean_{i}"), getattr(self, f"std_{i}")))
        if self.text is not None:
            # Behind a gate the image hears no words, and the branch only tells it where it is.
            heard = (tokens, mask, boxes, attend) if self.gate is None else (None, None, boxes, True)
            scales = self.text(scales, *heard)
        merged = None
        for scale, merge in zip(scales, self.merge, strict=True):
            merged = merge(merged, scale)
        logits: Tensor = self.classify(merged).float()
        finest = min(self.config.strides)
        if finest != 1:
            logits = F.interpolate(logits, scale_factor=finest, mode="bilinear", align_corners=False)
        if self.gate is not None and attend:
            logits = close_gates(logits, self.weigh(tokens, mask, len(logits)))
        return logits

    def weigh(self, tokens: Tensor | None, mask: Tensor | None, count: int) -> Tensor:
        """How much sentences ask for each class, (N, classes) logits; none of them without a sentence.

        Args:
            tokens, mask: See `forward`.
            count: N, where there are no tokens.
        """
        if self.gate is None:
            raise GeometryError("This head has no gate; train one with head.gate=true.")
        if tokens is None:
            return torch.full((count, self.config.classes), -CLOSED, device=self.classify.weight.device)
        spoken = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        asked: Tensor = self.gate(tokens, spoken).float()
        return asked.masked_fill(~spoken.any(dim=1, keepdim=True), -CLOSED)

    def _enter(self, found: Tensor, enter: nn.Module, mean: Tensor, std: Tensor) -> Tensor:
        """Standardise, drop channels, and mix them to the classifier's width, all in one matrix product: full-size maps
        are large.

        Dropped channels are the same for the whole batch.
        """
        assert isinstance(enter, nn.Conv2d)
        factor = 1 / std
        if self.training and self.config.dropout:
            kept = torch.rand(len(std)).to(std.device) >= self.config.dropout
            factor = factor * kept / (1 - self.config.dropout)
        weight = enter.weight * factor[:, None, None]
        bias = enter.bias - (weight.flatten(1) * mean).sum(dim=1) if enter.bias is not None else None
        return F.conv2d(found, weight, bias)


CLOSED = 20.0
"""A gate's logit below zero that lets nothing through."""


def close_gates(logits: Tensor, gates: Tensor) -> Tensor:
    """Class scores of what is asked for: a class has its own probability times that of being asked for, the rest is
    background.

    Args:
        logits: (N, 1 + classes, H, W), background first.
        gates: (N, classes) logits.

    Returns:
        (N, 1 + classes, H, W) log-probabilities.
    """
    logs, gates = logits.log_softmax(dim=1), gates[:, :, None, None].to(logits.dtype)
    drawn = logs[:, 1:] + F.logsigmoid(gates)
    rest = torch.cat([logs[:, :1], logs[:, 1:] + F.logsigmoid(-gates)], dim=1).logsumexp(dim=1, keepdim=True)
    return torch.cat([rest, drawn], dim=1)


class _Gate(nn.Module):
    """Which classes a sentence asks for: the mean of its words, and what a few learned questions find among them. The
    mean alone misses the one word that tells a side in a long sentence.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, questions = config.width, config.heads
        self.dropout = 2 * config.dropout
        self.norm = nn.LayerNorm(config.text_features)
        self.value = nn.Linear(config.text_features, width)
        self.question = nn.Linear(config.text_features, questions)
        self.answer = nn.Sequential(
            nn.GELU(), nn.Linear(width * (1 + questions), width), nn.GELU(), nn.Linear(width, config.classes)
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(N, L, D) tokens and (N, L) bool -> (N, classes) logits; of a row without words, whatever."""
        words = self.norm(tokens)
        if self.training and self.dropout:
            kept = torch.rand(len(words), 1, words.shape[2]).to(words.device) >= self.dropout
            words = words * kept / (1 - self.dropout)
        values, spoken = self.value(words), mask[:, :, None]
        mean = (values * spoken).sum(dim=1, keepdim=True) / spoken.sum(dim=1, keepdim=True).clamp_min(1)
        found = self.question(words).masked_fill(~spoken, -1e4).softmax(dim=1).transpose(1, 2) @ values
        answer: Tensor = self.answer(torch.cat([mean, found], dim=1).flatten(1))
        return answer


class _Merge(nn.Module):
    """One step of the classifier: what coarser scales found, upsampled, with the features of this one."""

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(coarse, fine, 1) if coarse else None
        self.first = nn.Sequential(
            nn.GroupNorm(GROUPS, fine * (2 if coarse else 1)),
            nn.SiLU(),
            nn.Conv2d(fine * (2 if coarse else 1), fine, 3, padding=1),
        )
        self.second = nn.Sequential(
            nn.GroupNorm(GROUPS, fine),
            nn.SiLU(),
            nn.Conv2d(fine, fine, 3, padding=1),
            nn.GroupNorm(GROUPS, fine),
            nn.SiLU(),
        )

    def forward(self, coarse: Tensor | None, fine: Tensor) -> Tensor:
        """(N, C, h, w) or None, (N, F, H, W) -> (N, F, H, W)."""
        joined = fine
        if self.narrow is not None and coarse is not None:
            # Narrowing commutes with upsampling and is cheaper before it.
            joined = torch.cat([F.interpolate(self.narrow(coarse), size=fine.shape[2:], mode="nearest"), fine], dim=1)
        found: Tensor = self.second(self.first(joined))
        return found


class _TextBranch(nn.Module):
    """The block that all scales share: image tokens ask the sentence; what they learn is added back, at first
    nothing.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.enter = nn.ModuleList(nn.Conv2d(w, width, 1) for w in config.widths)
        self.read = nn.Sequential(nn.LayerNorm(config.text_features), nn.Linear(config.text_features, width))
        self.place = nn.Linear(_PLACE_FEATURES, width)
        self.no_sentence = nn.Parameter(torch.randn(width) * 0.02)
        self.ask, self.listen = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.digest = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.leave = nn.ModuleList(nn.Conv2d(width, w, 1) for w in config.widths)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, scales: Sequence[Tensor], tokens: Tensor | None, mask: Tensor | None, boxes: Tensor | None, attend: bool
    ) -> list[Tensor]:
        count = len(scales[0])
        if boxes is None:
            boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=scales[0].device).expand(count, 4)
        words, silent = self._gather(tokens, mask, count)
        coarsest = max(self.config.strides)
        finest = min(self.config.attend_stride, coarsest)
        told = []
        for scale, stride, enter, leave in zip(scales, self.config.strides, self.enter, self.leave, strict=True):
            # Entering commutes with pooling and is cheaper after it.
            pooled = F.avg_pool2d(scale, finest // stride) if stride < finest else scale
            size = pooled.shape[2:]
            image = enter(pooled).flatten(2).transpose(1, 2)  # (N, h w, width)
            image = image + self.place(encode_places(boxes, int(size[0]), int(size[1])).to(image.dtype))
            if attend:
                asked = self.ask(image)
                image = image + self.attention(asked, words, words, key_padding_mask=silent, need_weights=False)[0]
            image = image + self.digest(image)
            back = leave(image.transpose(1, 2).unflatten(2, tuple(size)))
            told.append(
                scale + (F.interpolate(back, size=scale.shape[2:], mode="nearest") if stride < finest else back)
            )
        return told

    def _gather(self, tokens: Tensor | None, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Words (N, 1 + L, width) with the token for "no sentence" in front, and what must not be listened to (N, 1 +
        L).
        """
        nothing = self.no_sentence.expand(count, 1, -1)
        if tokens is None:
            return self.listen(nothing), torch.zeros(count, 1, dtype=torch.bool, device=nothing.device)
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        words = torch.cat([nothing, self.read(tokens)], dim=1)
        spoken = mask.any(dim=1, keepdim=True)
        return self.listen(words), torch.cat([spoken, ~mask], dim=1)


_FREQUENCIES = 3
"""Few: a sentence speaks of quarters and halves of a picture, and finer places would only help to learn pictures by
heart.
"""
_PLACE_FEATURES = 2 + 4 * _FREQUENCIES


def encode_places(boxes: Tensor, height: int, width: int) -> Tensor:
    """Where in its picture each cell of a crop lies.

    Args:
        boxes: (N, 4) top, left, bottom, right, as shares of the picture.
        height, width: Cells of the crop.

    Returns:
        (N, height * width, features): the cell's centre in -1..1, its sines and cosines.
    """

    def centres(start: Tensor, stop: Tensor, cells: int) -> Tensor:
        steps = (torch.arange(cells, device=boxes.device) + 0.5) / cells
        return (start[:, None] + (stop - start)[:, None] * steps) * 2 - 1

    rows, columns = centres(boxes[:, 0], boxes[:, 2], height), centres(boxes[:, 1], boxes[:, 3], width)
    grid = torch.stack(
        [rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)], dim=-1
    ).flatten(1, 2)
    waves = grid[..., None] * (math.pi / 2 * 2.0 ** torch.arange(_FREQUENCIES, device=boxes.device))
    return torch.cat([grid, waves.sin().flatten(-2), waves.cos().flatten(-2)], dim=-1)
