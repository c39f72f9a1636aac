"""Teaching a head that selects other phrases: its gate alone is trained, from sentences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.nn import functional as F

from progidiff.errors import CancelledError, RequestError
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.feature_cache import FeatureCache
from progidiff.textdiff.model import TextDiffModel
from progidiff.textdiff.network import TextDiffHead
from progidiff.textdiff.phrases import Phrase, group_phrases
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.train import choose_threshold
from progidiff.training.loop import Report, derive_seed
from progidiff.training.settings import Range, check_config, to_values

READ_AT_ONCE = 64
"""Sentences that the encoder reads together."""

OPEN = 0.5
"""A gate at or above it draws its class."""


@dataclass(frozen=True)
class TeachConfig:
    """A training of a gate.

    Attributes:
        steps: How many.
        learning_rate: Highest rate; it rises for a twentieth of the steps and falls along a cosine.
        weight_decay: Of AdamW.
        batch_size: Phrases of a step, each selection as often as any other.
        seed: Of the order of phrases and of the dropout.
    """

    steps: Annotated[int, Range(1, 100_000)] = 600
    learning_rate: Annotated[float, Range(0, 1)] = 5e-3
    weight_decay: Annotated[float, Range(0, 1)] = 0.1
    batch_size: Annotated[int, Range(1, 4096)] = 128
    seed: int = 0


class _Sentences:
    """Sentences as an encoder reads them, each read once.

    Args:
        encoder: Reads them.
        texts: All that will be asked for.
    """

    def __init__(self, encoder: SentenceEncoder, texts: Sequence[str]) -> None:
        self._features = encoder.features
        self._read: dict[str, torch.Tensor] = {}
        ordered = sorted(dict.fromkeys(texts), key=len)
        for start in range(0, len(ordered), READ_AT_ONCE):
            part = ordered[start : start + READ_AT_ONCE]
            for text, tokens, mask in zip(part, *encoder.encode(part), strict=True):
                self._read[text] = tokens[mask].cpu()

    def look_up(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, L, D) tokens and (N, L) bool, True for real ones."""
        words = [self._read[text] for text in texts]
        tokens = torch.zeros(len(words), max(map(len, words)), self._features)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        for row, found in enumerate(words):
            tokens[row, : len(found)], mask[row, : len(found)] = found, True
        return tokens, mask


def teach_phrases(
    model: TextDiffModel,
    phrases: Sequence[Phrase],
    config: TeachConfig | None = None,
    *,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> tuple[TextDiffModel, dict[str, Any]]:
    """Train the gate of a head further, on the phrases alone.

    What is drawn where was learned from labels and does not change, nor do the threshold and the denoiser; neither
    pictures nor features are needed. The phrases take the place of those that the head was taught.

    Args:
        model: A head with a gate; it stays as it is.
        phrases: What sentences ask for; see `phrases.read_phrases`.
        config: Settings.
        is_cancelled: Asked before every step.
        report: Receives {"stage": "gate", "step", "total", "loss"}.

    Returns:
        The head that was taught, not saved yet and without figures, which are to be measured anew; what made it, for
        run.json.

    Raises:
        RequestError: if the head has no gate, a phrase asks for a class there is not, or is too long for the encoder.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or TeachConfig()
    check_config(config)
    if model.encoder is None or model.head.gate is None:
        raise RequestError(
            f"The sentence selects nothing in '{model.card.full_name}', so it cannot be taught phrases; train one with "
            "--phrases."
        )
    classes = len(model.card.classes)
    wrong = next((p for p in phrases if any(not 1 <= number <= classes for number in p.classes)), None)
    if wrong is not None or not phrases:
        told = "There are no phrases" if wrong is None else f"'{wrong.text[:80]}' asks for a class there is not"
        raise RequestError(f"{told}; the classes are {', '.join(model.card.classes)}.")
    model.encoder.check([phrase.text for phrase in phrases])
    words = _Sentences(model.encoder, [phrase.text for phrase in phrases])
    head = copy.deepcopy(model.head).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 0, "teach"))
        _train_gate(head, words, phrases, config, is_cancelled, report)
    head.eval().requires_grad_(False)
    card = replace(model.card, phrases=tuple(phrases), figures={}, created="", sha256="")
    taught = TextDiffModel(model.extractor, model.encoder, head, card, model.folder)
    texts = [phrase.text for phrase in phrases]
    read = zip(phrases, _ask(taught, words, texts), strict=True)
    misread = [phrase.text for phrase, asked in read if asked != phrase.classes]
    return taught, {
        "taught_from": {"model": model.card.full_name, "sha256": model.card.sha256},
        "config": to_values(config),
        "phrases": len(phrases),
        "misread": misread,
    }


def measure_taught(
    model: TextDiffModel, held_out: Sequence[PictureCase], cache: Path | None = None
) -> dict[str, float]:
    """Choose the threshold on held-out pictures and put it, with their figures, into the card.

    Args:
        model: From `teach_phrases`.
        held_out: Labelled pictures.
        cache: Folder of features; without one they are computed anew for every question.

    Returns:
        {"dice", "iou", "threshold"}, which that choice flatters.
    """
    threshold, figures = choose_threshold(model, held_out, FeatureCache(cache))
    model.card = replace(model.card, threshold=threshold, figures=figures)
    return figures


def read_asked(model: TextDiffModel, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The classes that sentences ask for, as the gate reads them; no picture is needed.

    Raises:
        RequestError: if the head has no gate, or a sentence is too long.
    """
    if model.encoder is None or model.head.gate is None:
        raise RequestError(f"The sentence selects nothing in '{model.card.full_name}'.")
    model.encoder.check(texts)
    return _ask(model, _Sentences(model.encoder, texts), texts)


def _train_gate(
    head: TextDiffHead,
    words: _Sentences,
    phrases: Sequence[Phrase],
    config: TeachConfig,
    is_cancelled: Callable[[], bool] | None,
    report: Report | None,
) -> None:
    """The steps; the caller seeds torch."""
    assert head.gate is not None
    parameters = list(head.gate.requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    selections = list(group_phrases(phrases).items())
    place = parameters[0].device
    for step in range(config.steps):
        if is_cancelled is not None and is_cancelled():
            raise CancelledError(f"Stopped on request after {step} of {config.steps} steps; nothing was written.")
        optimiser.param_groups[0]["lr"] = config.learning_rate * _pick_rate(step / config.steps)
        texts: list[str] = []
        wanted = torch.zeros(config.batch_size, head.config.classes)
        for row, lot in enumerate(torch.randint(len(selections), (config.batch_size,)).tolist()):
            asked, ways = selections[lot]
            texts.append(ways[int(torch.randint(len(ways), ()))])
            wanted[row, [number - 1 for number in asked]] = 1
        tokens, mask = words.look_up(texts)
        found = head.weigh(tokens.to(place), mask.to(place), len(texts))
        loss = F.binary_cross_entropy_with_logits(found, wanted.to(place))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if report is not None and ((step + 1) % 50 == 0 or step + 1 == config.steps):
            report({"stage": "gate", "step": step + 1, "total": config.steps, "loss": float(loss.detach())})


@torch.no_grad()
def _ask(model: TextDiffModel, words: _Sentences, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The classes whose gates open."""
    place = next(model.head.parameters()).device
    found: list[tuple[int, ...]] = []
    for start in range(0, len(texts), READ_AT_ONCE):
        part = texts[start : start + READ_AT_ONCE]
        tokens, mask = words.look_up(part)
        gates = model.head.weigh(tokens.to(place), mask.to(place), len(part)).sigmoid() >= OPEN
        found += [tuple(number for number, is_open in enumerate(row, 1) if is_open) for row in gates.tolist()]
    return found


def _pick_rate(done: float, warmup: float = 0.05) -> float:
    return min(1.0, (done + 1e-3) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
