"""Training a head on a few labelled pictures: features once, then minutes of small steps on crops of them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.errors import CancelledError, RequestError
from progidiff.model.backbone import pick_device
from progidiff.textdiff.data import PictureCase, read_classes
from progidiff.textdiff.evaluate import compute_scores
from progidiff.textdiff.feature_cache import CachedFeatures, FeatureCache
from progidiff.textdiff.features import DiffusionFeatures, FeatureExtractor, FeatureOptions
from progidiff.textdiff.model import OVERLAP, TILE, TextDiffCard, TextDiffModel, default_folder, pick_mirror
from progidiff.textdiff.network import HeadConfig, TextDiffHead
from progidiff.textdiff.phrases import Phrase, group_phrases, keep_classes
from progidiff.textdiff.pictures import list_tiles, pad, read_picture, resize, to_working
from progidiff.textdiff.sentences import SentenceEncoder, mirror_sentence
from progidiff.training.loop import LoopConfig, Precision, Report, RunConfig, Schedule, derive_seed, run_loop
from progidiff.training.recipes import describe_run
from progidiff.training.settings import Range, check_config, to_values

logger = logging.getLogger(__name__)

THRESHOLDS = tuple(round(0.2 + 0.05 * k, 2) for k in range(13))
"""Tried on the held-out pictures."""


PHRASES_PER_STEP = 64
"""That a gate learns from: they cost next to nothing."""


@dataclass(frozen=True)
class HeadOptions:
    """Shapes of the head that are free to choose; see `network.HeadConfig`."""

    width: Annotated[int, Range(8, 2048)] = 128
    base: Annotated[int, Range(8, 1024)] = 32
    heads: Annotated[int, Range(1, 64)] = 4
    attend_stride: Annotated[int, Range(1, 64)] = 8
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    gate: bool = False


@dataclass(frozen=True)
class TextDiffTrainConfig(RunConfig):
    """A training: its length, what a step sees, and the head.

    Attributes:
        name: Of the model.
        classes: Foreground classes by name; label value 1 is the first.
        schedule: Length and rate.
        features: Which activations.
        head: Shapes.
        use_text: False leaves the text branch out.
        crop: Side of a crop in working pixels; a multiple of the coarsest stride.
        batch_size: Crops per micro-batch.
        views: Versions of each picture whose features are computed: the first is the picture itself, others are
            mirrored (and their sentences with them) and tinted.
        color: Strength of the tint of views.
        move: Views after the first are shifted, turned and enlarged by up to this share of the picture; 0 for none.
        sentence_dropout: Share of crops that are shown without their sentence, so that images without one work.
        cross_entropy, dice: Weights of the losses.
        cache_gb: Largest size of the cached features.
        one_piece: Serving draws the largest connected piece of each class only.
    """

    precision: Precision = "auto"
    name: str = "textdiff"
    classes: tuple[str, ...] = ("foreground",)
    schedule: Schedule = field(
        default_factory=lambda: Schedule(steps=300, learning_rate=5e-3, warmup=20, ema_decay=0.98, checkpoint_every=100)
    )
    features: FeatureOptions = field(default_factory=lambda: FeatureOptions(own_scale=True))
    head: HeadOptions = field(default_factory=HeadOptions)
    use_text: bool = True
    crop: Annotated[int, Range(8, 4096)] = 128
    batch_size: Annotated[int, Range(1, 1024)] = 8
    views: Annotated[int, Range(1, 64)] = 4
    color: Annotated[float, Range(0, 1)] = 0.15
    move: Annotated[float, Range(0, 0.5)] = 0.0
    sentence_dropout: Annotated[float, Range(0, 1)] = 0.15
    cross_entropy: Annotated[float, Range(0, 100)] = 1.0
    dice: Annotated[float, Range(0, 100)] = 1.5
    cache_gb: Annotated[float, Range(0, 1e6)] = 20.0
    one_piece: bool = False


@dataclass(frozen=True)
class TextDiffTraining:
    """What a training gave.

    Attributes:
        model: Ready to predict; saved only if `out` was given.
        run: What made it, for run.json: configuration, cases, data hashes, figures, seconds.
        figures: "dice", "iou" of the held-out images and the "threshold"; empty if none were held out.
        notes: What the user should know.
    """

    model: TextDiffModel
    run: dict[str, Any]
    figures: dict[str, float]
    notes: tuple[str, ...]


def train_textdiff(
    cases: Sequence[PictureCase],
    held_out: Sequence[PictureCase] = (),
    *,
    denoiser: str | Path | FeatureExtractor | None = None,
    encoder: str | Path | SentenceEncoder | None = None,
    start: TextDiffModel | None = None,
    phrases: Sequence[Phrase] = (),
    out: Path | None = None,
    work: Path,
    cache: Path | None = None,
    config: TextDiffTrainConfig | None = None,
    device: str | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> TextDiffTraining:
    """Train a head.

    The same call continues a run that was stopped or killed, at its last checkpoint in `work`.

    Args:
        cases: Labelled pictures to learn from; those without a label are refused. One is enough.
        held_out: Labelled pictures that choose the threshold and are reported; never learned from.
        denoiser: Folder or hub id, or an extractor (its options then count, not the configuration's); None for the
            shipped one.
        encoder: Folder or hub id, or a loaded encoder; None for the offline default.
        start: A model of the same features, encoder and classes whose head is trained further, shapes and all; None for
            a fresh head.
        phrases: With them the sentence selects what is drawn, nothing without one; those of the pictures are not read.
        out: Version folder to write; None to leave that to the caller (`TextDiffModel.save`, `TextDiffStore.add`).
        work: Checkpoints and curves.
        cache: Of features; None for ``features/`` in `work`.
        config: Settings.
        device: "cpu", "cuda"; None to pick.
        is_cancelled: Asked before every picture and every step.
        report: Receives {"stage": "features", "step", "total"} and then the training's log entries with {"stage":
            "head"}.

    Raises:
        RequestError: if settings and cases make no sense together, or `out` exists.
        ImageError: if a picture or mask cannot be used.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or TextDiffTrainConfig()
    denoiser = default_folder() / "denoiser" if denoiser is None else denoiser
    extractor: FeatureExtractor = (
        DiffusionFeatures.load(denoiser, config.features, device) if isinstance(denoiser, str | Path) else denoiser
    )
    config = replace(config, features=extractor.options)
    check_config(config)
    _check_request(cases, held_out, extractor, out, config)
    _check_phrases(phrases, config)
    texts = [*(case.sentence for case in (*cases, *held_out) if case.sentence), *(phrase.text for phrase in phrases)]
    reader = _load_reader(encoder, texts, device) if config.use_text else None
    kept = FeatureCache(cache or work / "features", config.cache_gb)
    started = time.monotonic()
    pool = _prepare(cases, extractor, kept, config, phrases, is_cancelled, report)
    seconds = {"features": time.monotonic() - started}
    head = _make_head(start, config, extractor, reader, pool)
    started = time.monotonic()
    _train_head(head, pool, reader, extractor, start, config, pick_device(device), work, is_cancelled, report)
    seconds["head"] = time.monotonic() - started
    model = TextDiffModel(extractor, reader, head, _make_card(config, extractor, reader, head, pool, start))
    figures: dict[str, float] = {}
    if held_out:
        threshold, figures = choose_threshold(model, held_out, kept, is_cancelled)
        model.card = replace(model.card, threshold=threshold, figures=figures)
    run = {
        **describe_run(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": to_values(config),
        "training_cases": [case.name for case in cases],
        "held_out_cases": [case.name for case in held_out],
        "data_sha256": pool.digest,
        "denoiser": {"digest": model.card.denoiser_digest},
        "parameters": sum(p.numel() for p in head.parameters()),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "validation": figures,
    }
    return TextDiffTraining(model if out is None else model.save(out, run), run, figures, tuple(pool.notes))


def _load_reader(
    encoder: str | Path | SentenceEncoder | None, texts: Sequence[str], device: str | None
) -> SentenceEncoder:
    """The sentence encoder, once it is known to read all texts to their end."""
    reader = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder.load(encoder, device)
    reader.check(texts)
    return reader


def _make_head(
    start: TextDiffModel | None,
    config: TextDiffTrainConfig,
    extractor: FeatureExtractor,
    reader: SentenceEncoder | None,
    pool: _Pool,
) -> TextDiffHead:
    """A fresh head, or that of a model that is trained further.

    Raises:
        RequestError: if that model has other features or classes.
    """
    torch.manual_seed(derive_seed(config.seed, 0, "head"))
    options = config.head
    shapes = HeadConfig(
        channels=extractor.channels,
        strides=extractor.strides,
        classes=len(config.classes),
        text_features=reader.features if reader is not None else 0,
        width=options.width,
        base=options.base,
        heads=options.heads,
        attend_stride=options.attend_stride,
        dropout=options.dropout,
        gate=options.gate,
    )
    if start is None:
        head = TextDiffHead(shapes)
        head.set_statistics(*pool.measure())
        return head
    free = {name: getattr(start.head.config, name) for name in to_values(options)}
    if replace(shapes, **free) != start.head.config:
        raise RequestError(
            f"'{start.card.full_name}' has other features or classes than this training; start with a fresh head."
        )
    head = TextDiffHead(start.head.config)
    head.load_state_dict(start.head.state_dict())
    return head


def _train_head(
    head: TextDiffHead,
    pool: _Pool,
    reader: SentenceEncoder | None,
    extractor: FeatureExtractor,
    start: TextDiffModel | None,
    config: TextDiffTrainConfig,
    place: torch.device,
    work: Path,
    is_cancelled: Callable[[], bool] | None,
    report: Report | None,
) -> None:
    """The steps; on return the head holds the averaged weights and is frozen."""
    words = _Words(reader, pool.list_sentences(), place)
    head.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        features, targets, boxes, sentences, known = pool.draw(config.batch_size, config.crop, generator)
        kept = torch.rand(len(sentences), generator=generator) >= config.sentence_dropout
        shown = [s if k else None for s, k in zip(sentences, kept.tolist(), strict=True)]
        if pool.selects and head.gate is None:
            targets = torch.stack([pool.select(target, s) for target, s in zip(targets, shown, strict=True)])
        tokens, mask = words.look_up(shown)
        logits = head([f.to(place) for f in features], tokens, mask, boxes.to(place), attend=head.gate is None)
        known = None if known is None else known.to(place)
        loss, said = compute_segmentation_loss(logits, targets.to(place), config.cross_entropy, config.dice, known)
        if head.gate is None:
            return loss, said
        phrases, asked = pool.draw_phrases(PHRASES_PER_STEP, generator)
        gates = F.binary_cross_entropy_with_logits(head.weigh(*words.look_up(phrases), len(phrases)), asked.to(place))
        return loss + gates, {**said, "gates": float(gates.detach())}

    unimportant = ("schedule", "name", "cache_gb", "one_piece", *to_values(RunConfig()))
    settings = {k: v for k, v in to_values(config).items() if k not in unimportant}
    if start is not None:
        settings["start"] = start.card.sha256
    settings |= {
        "pictures": pool.digest,
        "features_key": extractor.key,
        "encoder": reader.digest if reader is not None else "",
    }
    if pool.selects:
        settings["phrases"] = [[phrase.text, list(phrase.classes)] for phrase in pool.phrases]
    run_loop(
        {"head": head},
        compute_loss,
        LoopConfig.of(config.schedule, config),
        work,
        is_cancelled=is_cancelled,
        report=None if report is None else lambda entry: report({"stage": "head", **entry}),
        settings=settings,
    )
    head.requires_grad_(False)


def _make_card(
    config: TextDiffTrainConfig,
    extractor: FeatureExtractor,
    reader: SentenceEncoder | None,
    head: TextDiffHead,
    pool: _Pool,
    start: TextDiffModel | None,
) -> TextDiffCard:
    """What a training made; a model that is trained further goes on drawing one piece of each class if it did."""
    return TextDiffCard(
        name=config.name,
        version=0,
        classes=config.classes,
        denoiser=str(getattr(extractor, "source", "")),
        denoiser_digest=getattr(extractor, "digest", extractor.key),
        encoder=reader.source if reader is not None else "",
        encoder_digest=reader.digest if reader is not None else "",
        features=config.features,
        head=head.config,
        gray=pool.gray,
        phrases=tuple(pool.phrases),
        one_piece=config.one_piece or (start is not None and start.card.one_piece),
    )


def compute_segmentation_loss(
    logits: Tensor, targets: Tensor, cross_entropy: float, dice: float, known: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy and Dice, both on probabilities.

    Args:
        logits: (N, 1 + classes, H, W), background first.
        targets: The same shape: the share of each class in a pixel, sums to 1.
        cross_entropy, dice: Their weights.
        known: Bool (N, classes), which foreground classes a label speaks about; None: all. For the others "background
            or one of these" is one class (the marginal loss of Shi et al., arXiv 2007.03868), and they do not count for
            the Dice: what nobody looked for is not taught to be absent.

    Returns:
        The loss; {"cross_entropy", "dice"}. The Dice is that of each foreground class over the whole batch, so that a
        crop without it does not count as all wrong.
    """
    logits = logits.float()
    if known is None:
        entropy = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        found, wanted = logits.softmax(dim=1)[:, 1:], targets[:, 1:]
    else:
        logs, kept = logits.log_softmax(dim=1), known[:, :, None, None]
        rest = F.pad(~kept, (0, 0, 0, 0, 1, 0), value=True)  # (N, 1 + classes, 1, 1): what counts as background
        merged = logs.masked_fill(~rest, -torch.inf).logsumexp(dim=1)
        entropy = -((targets * rest).sum(dim=1) * merged + (targets * logs * ~rest).sum(dim=1)).mean()
        found, wanted = logits.softmax(dim=1)[:, 1:] * kept, targets[:, 1:] * kept
    overlap = (found * wanted).sum(dim=(0, 2, 3))
    score = ((2 * overlap + 1) / (found.sum(dim=(0, 2, 3)) + wanted.sum(dim=(0, 2, 3)) + 1)).mean()
    loss = cross_entropy * entropy + dice * (1 - score)
    return loss, {"cross_entropy": float(entropy.detach()), "dice": float(score.detach())}


@dataclass(frozen=True)
class _Piece:
    """A tile of one view of a picture.

    Attributes:
        case: Number of the picture.
        features: (C_b, h_b, w_b) fp16 each.
        target: (1 + classes, h, w) fp16, on the padded tile.
        box: Top, left, bottom, right of the padded tile, as shares of the view.
        sentence: Of the view; None if there is none.
        unknown: Classes that the label says nothing about.
    """

    case: int
    features: list[Tensor]
    target: Tensor
    box: tuple[float, float, float, float]
    sentence: str | None
    unknown: tuple[int, ...] = ()


class _Pool:
    """Features and targets that crops are drawn from.

    Attributes:
        pieces: All there are.
        digest: Of pictures, masks and sentences.
        gray: All pictures are.
        notes: What was said about pictures.
        phrases: What crops are shown with in place of the pictures' sentences; empty if those are read.
    """

    def __init__(
        self,
        pieces: list[_Piece],
        strides: Sequence[int],
        digest: str,
        gray: bool,
        notes: list[str],
        phrases: Sequence[Phrase] = (),
    ) -> None:
        self.pieces, self.digest, self.gray, self.notes, self.phrases = pieces, digest, gray, notes, phrases
        self._strides = strides
        self._groups = list(group_phrases(phrases).values())
        self._asked = {phrase.text: phrase.classes for phrase in phrases}
        self._of_case: dict[int, list[_Piece]] = {}
        for piece in pieces:
            self._of_case.setdefault(piece.case, []).append(piece)

    @property
    def selects(self) -> bool:
        """Whether the sentence decides what is drawn."""
        return bool(self.phrases)

    def list_sentences(self) -> list[str | None]:
        """All that a crop may be shown with."""
        return [phrase.text for phrase in self.phrases] or [piece.sentence for piece in self.pieces]

    def select(self, target: Tensor, phrase: str | None) -> Tensor:
        """A target (1 + classes, h, w) in which what a phrase does not ask for is background; all of it without one."""
        asked = self._asked[phrase] if phrase else ()
        kept = torch.zeros(len(target), 1, 1)
        kept[list(asked)] = 1
        found = target * kept
        found[0] = 1 - found.sum(dim=0)
        return found

    def draw_phrases(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Phrases, each selection as often; (count, classes) floats, 1 for what they ask for."""
        texts, asked = [], torch.zeros(count, len(self.pieces[0].target) - 1)
        for number in range(count):
            group = self._groups[int(torch.randint(len(self._groups), (), generator=generator))]
            texts.append(group[int(torch.randint(len(group), (), generator=generator))])
            asked[number, [value - 1 for value in self._asked[texts[-1]]]] = 1
        return texts, asked

    def draw(
        self, count: int, side: int, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor, Tensor, list[str | None], Tensor | None]:
        """Random crops: every picture as often, whatever its size.

        Returns:
            Features (N, C_b, side / s_b, side / s_b) each; targets (N, 1 + classes, side, side); boxes (N, 4);
            sentences; which classes the labels speak about, bool (N, classes), None if all of all.
        """
        coarsest = max(self._strides)

        def pick(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        sides = [side // stride for stride in self._strides]
        features = [
            torch.empty((count, len(found), n, n), memory_format=torch.channels_last)
            for found, n in zip(self.pieces[0].features, sides, strict=True)
        ]
        targets, boxes, unknown = [], [], []
        sentences: list[str | None] = []
        for number in range(count):
            pieces = self._of_case[pick(len(self._of_case))]
            piece = pieces[pick(len(pieces))]
            height, width = piece.target.shape[1:]
            top, left = (pick((n - side) // coarsest + 1) * coarsest for n in (height, width))
            for maps, found, stride, n in zip(features, piece.features, self._strides, sides, strict=True):
                a, b = top // stride, left // stride
                maps[number].copy_(found[:, a : a + n, b : b + n])
            targets.append(piece.target[:, top : top + side, left : left + side].float())
            y0, x0, y1, x1 = piece.box
            down, right = (y1 - y0) / height, (x1 - x0) / width
            boxes.append([y0 + top * down, x0 + left * right, y0 + (top + side) * down, x0 + (left + side) * right])
            if self._groups:
                texts = self._groups[pick(len(self._groups))]
                sentences.append(texts[pick(len(texts))])
            else:
                sentences.append(piece.sentence)
            unknown.append(piece.unknown)
        known = None
        if any(unknown):
            known = torch.tensor([[value not in none for value in range(1, len(targets[0]))] for none in unknown])
        return features, torch.stack(targets), torch.tensor(boxes), sentences, known

    def measure(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and standard deviation of every feature, (C_b,) per scale, every picture counting alike."""
        means, deviations = [], []
        for scale in range(len(self._strides)):
            # A few thousand pixels of a picture say as much as all of them.
            moments = []
            for pieces in self._of_case.values():
                step = max(1, round((pieces[0].features[scale][0].numel() / 4096) ** 0.5))
                values = pieces[0].features[scale][:, ::step, ::step].float().flatten(1)
                moments.append(torch.stack([values.mean(dim=1), values.square().mean(dim=1)]))
            mean, square = torch.stack(moments).mean(dim=0)
            means.append(mean)
            deviations.append((square - mean.square()).clamp_min(0).sqrt())
        return means, deviations


class _Words:
    """Encoded sentences, each computed once."""

    def __init__(self, reader: SentenceEncoder | None, sentences: Sequence[str | None], device: torch.device) -> None:
        self._numbers: dict[str, int] = {}
        self._tokens = self._mask = None
        known = sorted({s for s in sentences if s})
        if reader is not None and known:
            tokens, mask = reader.encode(known)
            self._tokens, self._mask = tokens.to(device), mask.to(device)
            self._numbers = {sentence: number for number, sentence in enumerate(known)}

    def look_up(self, sentences: Sequence[str | None]) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (N, L, D) and mask (N, L); all False in rows without a sentence. None, None if no sentence is known at
        all.
        """
        if self._tokens is None or self._mask is None:
            return None, None
        rows = torch.tensor([self._numbers[s] if s else 0 for s in sentences], device=self._tokens.device)
        spoken = torch.tensor([bool(s) for s in sentences], device=self._tokens.device)
        return self._tokens[rows], self._mask[rows] & spoken[:, None]


def _check_request(
    cases: Sequence[PictureCase],
    held_out: Sequence[PictureCase],
    extractor: FeatureExtractor,
    out: Path | None,
    config: TextDiffTrainConfig,
) -> None:
    """Refuse what cannot be trained before anything is computed."""
    if out is not None and out.exists():
        raise RequestError(f"'{out}' exists; give a folder that does not, nothing is overwritten.")
    if not cases:
        raise RequestError("There is no labelled picture to learn from; one is enough.")
    bare = [case.name for case in (*cases, *held_out) if case.label is None]
    if bare:
        raise RequestError(
            f"{', '.join(bare[:5])} {'has' if len(bare) == 1 else 'have'} no label; add one, or leave the picture out."
        )
    both = sorted({case.name for case in cases} & {case.name for case in held_out})
    if both:
        raise RequestError(f"{', '.join(both[:5])} cannot be learned from and held out at once; leave it out of one.")
    if config.crop % max(extractor.strides):
        raise RequestError(
            f"Setting crop must be a multiple of {max(extractor.strides)}, the coarsest "
            f"stride of the features, got {config.crop}."
        )
    if not config.classes or len(set(config.classes)) < len(config.classes):
        raise RequestError(
            f"Setting classes needs one or more different names, got {', '.join(config.classes) or 'none'}."
        )


def _check_phrases(phrases: Sequence[Phrase], config: TextDiffTrainConfig) -> None:
    """Refuse a selection that cannot be taught."""
    if not phrases:
        if config.head.gate:
            raise RequestError("Setting head.gate needs phrases to learn from; give a table of them (--phrases).")
        return
    if not config.use_text:
        raise RequestError("A head that a phrase selects with must read: leave out --without-text, or --phrases.")
    if config.features.mirror:
        raise RequestError(
            "A mirrored picture would teach a phrase the other side; set features.mirror to false where phrases select."
        )
    wrong = next((phrase for phrase in phrases if any(not 1 <= n <= len(config.classes) for n in phrase.classes)), None)
    if wrong is not None:
        raise RequestError(
            f"The phrase '{wrong.text[:80]}' asks for a class there is not; there are {len(config.classes)}."
        )


def _prepare(
    cases: Sequence[PictureCase],
    extractor: FeatureExtractor,
    cache: FeatureCache,
    config: TextDiffTrainConfig,
    phrases: Sequence[Phrase],
    is_cancelled: Callable[[], bool] | None,
    report: Report | None,
) -> _Pool:
    """Features and targets of all views of all pictures."""
    options, coarsest = extractor.options, max(extractor.strides)
    pieces: list[_Piece] = []
    notes: list[str] = []
    grays = []
    state = hashlib.sha256()
    for number, case in enumerate(cases):
        picture = read_picture(case.image)
        classes = read_classes(case, picture.size, len(config.classes))
        notes += [f"{case.name}: {note}" for note in picture.notes]
        if config.use_text and not case.sentence and not phrases:
            notes.append(f"{case.name}: there is no sentence; it is learned from without one.")
        grays.append(picture.gray)
        state.update(
            json.dumps([case.name, picture.size, case.sentence]).encode()
            + picture.pixels.numpy().tobytes()
            + classes.tobytes()
        )
        if case.unknown:
            state.update(json.dumps(sorted(case.unknown)).encode())
        plain = to_working(picture.pixels, options.scale, options.size, options.tone)
        shares = F.one_hot(torch.from_numpy(classes).long(), 1 + len(config.classes)).permute(2, 0, 1).float()
        target = resize(shares[None], (int(plain.shape[1]), int(plain.shape[2])))[0]
        for view in range(config.views):
            if is_cancelled is not None and is_cancelled():
                raise CancelledError(
                    f"Training stopped on request at picture {number + 1} of {len(cases)}; start it again to continue."
                )
            if report is not None:
                report({"stage": "features", "step": number * config.views + view, "total": len(cases) * config.views})
            working, shown, sentence = make_view(
                plain,
                target,
                case.sentence,
                view,
                config.color,
                derive_seed(config.seed, view, case.name),
                options.mirror,
                config.move,
            )
            height, width = int(working.shape[1]), int(working.shape[2])
            for tile in list_tiles(height, width, TILE, OVERLAP):
                # As in serving, but never smaller than a crop.
                grown = pad(tile.crop(working), coarsest, config.crop)
                features = cache.get(extractor, grown, view % options.draws)
                box = tile.place(height, width)
                box = (box[0], box[1], box[0] + grown.shape[1] / height, box[1] + grown.shape[2] / width)
                target_piece = pad(tile.crop(shown), coarsest, config.crop).half()
                pieces.append(_Piece(number, features, target_piece, box, sentence, case.unknown))
    return _Pool(pieces, extractor.strides, state.hexdigest(), all(grays), notes, phrases)


def make_view(
    working: Tensor,
    target: Tensor,
    sentence: str | None,
    view: int,
    color: float,
    seed: int,
    mirror: bool = True,
    move: float = 0.0,
) -> tuple[Tensor, Tensor, str | None]:
    """A version of a picture with its target and sentence: 0 is the picture itself, others are mirrored and tinted.

    Args:
        working: (3, h, w) floats in -1..1.
        target: (..., h, w).
        sentence: Mirrored with the picture, so that "left" stays true.
        view: Which version; mirrored as the draw of this number is, see `model.pick_mirror`.
        color: Strength of random gains and offsets per colour channel.
        seed: Of the tint.
        mirror: False leaves every view the right way round.
        move: How far other views are shifted, turned and enlarged, as a share of the picture; 0 leaves them in place.
    """
    axes = pick_mirror(view) if mirror else []
    working, target = working.flip(axes), target.flip(axes)
    if sentence:
        sentence = mirror_sentence(sentence, -1 in axes, -2 in axes)
    if view and color:
        gain, offset = (
            color * (2 * torch.rand((2, 3, 1, 1), generator=torch.Generator().manual_seed(seed)) - 1)
        ).unbind(0)
        working = working * (1 + gain) + offset
    if view and move:
        working, target = move_picture(working, target, move, seed)
    return working, target, sentence


def move_picture(working: Tensor, target: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A picture and its target shifted, turned and enlarged a little; what comes into view repeats the edge.

    Args:
        working: (3, h, w) floats in -1..1.
        target: (1 + classes, h, w), sums to 1.
        share: Largest shift, as a share of a side; as much for the logarithm of the size, and for the turn in radians.
        seed: Of how far.
    """
    down, right, size, turn, aspect = (
        share * (2 * torch.rand(5, generator=torch.Generator().manual_seed(derive_seed(seed, 0, "move"))) - 1)
    ).tolist()
    height, width = working.shape[1:]
    cosine, sine = math.cos(turn), math.sin(turn)
    tall, wide = math.exp(size + aspect / 2), math.exp(size - aspect / 2)
    # Rows: x and y of where a pixel comes from, in -1..1 of the picture's own sides.
    matrix = torch.tensor(
        [
            [cosine * wide, -sine * tall * height / width, 2 * right],
            [sine * wide * width / height, cosine * tall, 2 * down],
        ]
    )
    both = torch.cat([working, target])[None]
    grid = F.affine_grid(matrix[None], list(both.shape), align_corners=False)
    moved = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return moved[: len(working)], moved[len(working) :]


def list_questions(card: TextDiffCard, case: PictureCase) -> list[tuple[str | None, tuple[int, ...]]]:
    """What a picture is asked when a model is judged on it, with the classes that are the right answer.

    Its own sentence and all classes; of a model that selects the first phrase of each selection, which leaves out those
    that the label says nothing about.
    """
    if not card.phrases:
        return [(case.sentence, tuple(range(1, 1 + len(card.classes))))]
    questions: list[tuple[str | None, tuple[int, ...]]] = []
    for classes, texts in group_phrases(card.phrases).items():
        if classes and not set(classes) & set(case.unknown):
            questions.append((texts[0], classes))
    return questions


def choose_threshold(
    model: TextDiffModel,
    held_out: Sequence[PictureCase],
    cache: FeatureCache,
    is_cancelled: Callable[[], bool] | None = None,
) -> tuple[float, dict[str, float]]:
    """The threshold with the best mean Dice, and what it gives.

    Returns:
        One of `THRESHOLDS`; {"dice", "iou", "threshold"} of the held-out pictures, which that choice flatters.
    """
    answering = TextDiffModel(CachedFeatures(model.extractor, cache), model.encoder, model.head, model.card)
    asked = [(case, *question) for case in held_out for question in list_questions(model.card, case)]
    scores = np.zeros((len(THRESHOLDS), len(asked), 2))
    for number, (case, sentence, classes) in enumerate(asked):
        picture = read_picture(case.image)
        truth_classes = keep_classes(read_classes(case, picture.size, len(model.card.classes)), classes)
        truth = truth_classes > 0
        probabilities = answering.predict(picture, sentence, is_cancelled=is_cancelled).probabilities
        foreground = probabilities.sum(axis=0)
        if case.unknown:  # Where one of these is drawn, nobody knows better.
            truth &= ~np.isin(truth_classes, case.unknown)
            foreground = np.where(np.isin(probabilities.argmax(axis=0) + 1, case.unknown), 0, foreground)
        for k, threshold in enumerate(THRESHOLDS):
            scores[k, number] = compute_scores(foreground > threshold, truth)
    means = scores.mean(axis=1)
    best = int(means[:, 0].argmax())
    return THRESHOLDS[best], {
        "dice": float(means[best, 0]),
        "iou": float(means[best, 1]),
        "threshold": THRESHOLDS[best],
    }
