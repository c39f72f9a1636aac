"""A TextDiff configuration that trains in seconds."""

from __future__ import annotations

from dataclasses import replace

from progidiff.textdiff.features import FeatureOptions
from progidiff.textdiff.train import HeadOptions, TextDiffTrainConfig
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
