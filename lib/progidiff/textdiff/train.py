"""Training a head on a few labelled pictures: features once, then minutes of small steps on crops of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from progidiff.textdiff.data import Case
from progidiff.textdiff.features import FeatureExtractor, FeatureOptions
from progidiff.textdiff.model import TextDiffModel
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.training.config import Range
from progidiff.training.loop import RunConfig, Schedule


@dataclass(frozen=True)
class HeadOptions:
    """Shapes of the head that are free to choose; see `network.HeadConfig`."""

    width: Annotated[int, Range(8, 2048)] = 128
    heads: Annotated[int, Range(1, 64)] = 4
    attend_stride: Annotated[int, Range(1, 64)] = 8
    dropout: Annotated[float, Range(0, 0.9)] = 0.1


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
        views: Versions of each picture whose features are computed: the first is the picture itself, others are mirrored (and their
            sentences with them) and tinted.
        color: Strength of the tint of views.
        sentence_dropout: Share of crops that are shown without their sentence, so that images without one work.
        cross_entropy, dice: Weights of the losses.
        cache_gb: Largest size of the cached features.
    """

    name: str = "textdiff"
    classes: tuple[str, ...] = ("foreground",)
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=300, learning_rate=2e-3, warmup=20, ema_decay=0.98, checkpoint_every=100))
    features: FeatureOptions = field(default_factory=FeatureOptions)
    head: HeadOptions = field(default_factory=HeadOptions)
    use_text: bool = True
    crop: Annotated[int, Range(8, 4096)] = 128
    batch_size: Annotated[int, Range(1, 1024)] = 8
    views: Annotated[int, Range(1, 64)] = 4
    color: Annotated[float, Range(0, 1)] = 0.15
    sentence_dropout: Annotated[float, Range(0, 1)] = 0.15
    cross_entropy: Annotated[float, Range(0, 100)] = 1.0
    dice: Annotated[float, Range(0, 100)] = 1.5
    cache_gb: Annotated[float, Range(0, 1e6)] = 20.0


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
    cases: Sequence[Case],
    held_out: Sequence[Case] = (),
    *,
    denoiser: str | Path | FeatureExtractor | None = None,
    encoder: str | Path | SentenceEncoder | None = None,
    out: Path | None = None,
    work: Path,
    cache: Path | None = None,
    config: TextDiffTrainConfig | None = None,
    device: str | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> TextDiffTraining:
    """Train a head.

    The same call continues a run that was stopped or killed, at its last checkpoint in `work`.

    Args:
        cases: Labelled pictures to learn from; those without a label are refused. One is enough.
        held_out: Labelled pictures that choose the threshold and are reported; never learned from.
        denoiser: Folder or hub id, or an extractor (its options then count, not the configuration's); None for the shipped one.
        encoder: Folder or hub id, or a loaded encoder; None for the offline default.
        out: Version folder to write; None to leave that to the caller (`TextDiffModel.save`, `TextDiffStore.add`).
        work: Checkpoints and curves.
        cache: Of features; None for ``features/`` in `work`.
        config: Settings.
        device: "cpu", "cuda"; None to pick.
        is_cancelled: Asked before every picture and every step.
        report: Receives {"stage": "features", "step", "total"} and then the training's log entries with {"stage": "head"}.

    Raises:
        RequestError: if settings and cases make no sense together, or `out` exists.
        ImageError: if a picture or mask cannot be used.
        CancelledError: if `is_cancelled` said so.
    """
    raise NotImplementedError
