"""A TextDiff configuration that trains in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from progidiff.textdiff.features import DiffusionFeatures, FeatureOptions
from progidiff.textdiff.model import TextDiffCard, TextDiffModel
from progidiff.textdiff.network import HeadConfig, TextDiffHead
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.train import HeadOptions, TextDiffTrainConfig
from progidiff.textdiff.versions import TextDiffStore
from progidiff.training.loop import Schedule

TOY_SCHEDULE = Schedule(steps=60, learning_rate=5e-3, warmup=5, ema_decay=0.9, checkpoint_every=1000)


TOY = TextDiffTrainConfig(
    name="toy",
    classes=("blob",),
    schedule=TOY_SCHEDULE,
    features=FeatureOptions(timesteps=(50, 150), scale=1.0, picture=True),
    head=HeadOptions(width=16, base=8, heads=2, dropout=0.0),
    crop=32,
    batch_size=4,
    views=2,
    precision="fp32",
    tensorboard=False,
)


def toy(**changes: object) -> TextDiffTrainConfig:
    steps = changes.pop("steps", None)
    config = replace(TOY, **changes)
    return config if steps is None else replace(config, schedule=replace(config.schedule, steps=steps))


def add_untrained_head(
    root: Path, name: str, classes: tuple[str, ...], gray: bool = False, reads_text: bool = True, seed: int = 0
) -> TextDiffCard:
    """A head with random weights, published as the next version of a name; the denoiser lies in `root`."""
    import torch

    torch.manual_seed(seed)
    extractor = DiffusionFeatures.load(root / "denoiser", TOY.features, "cpu")
    encoder = SentenceEncoder.load(device="cpu") if reads_text else None
    shapes = HeadConfig(
        extractor.channels,
        extractor.strides,
        classes=len(classes),
        text_features=0 if encoder is None else encoder.features,
        width=TOY.head.width,
        base=TOY.head.base,
        heads=TOY.head.heads,
    )
    card = TextDiffCard(
        name,
        0,
        classes,
        str(root / "denoiser"),
        extractor.digest,
        "",
        "" if encoder is None else encoder.digest,
        extractor.options,
        shapes,
        gray=gray,
    )
    model = TextDiffModel(extractor, encoder, TextDiffHead(shapes).eval(), card)
    store = TextDiffStore(root)
    return store.publish(name, store.add(name, model, {}).version)
