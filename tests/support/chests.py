"""Generated chest pictures with two lungs, and phrases that ask for one, both or none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.phrases import Phrase

SIDE = 48
CLASSES = ("right lung", "left lung")
"""The right one lies on the left of the picture, as radiologists look at a patient."""

PHRASES = (
    Phrase("right lung", (1,)),
    Phrase("left lung", (2,)),
    Phrase("both lungs", (1, 2)),
    Phrase("opacity in the right lower zone", (1,)),
    Phrase("opacity in the left lower zone", (2,)),
    Phrase("bilateral opacities", (1, 2)),
    Phrase("the heart", ()),
    Phrase("the liver", ()),
)


def draw_chest(seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A gray picture (uint8) of dark lungs of differing place and size in a bright body, and the class numbers."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    label = np.zeros((side, side), np.uint8)
    for value, centre in ((1, 0.28), (2, 0.72)):
        y, x = 0.5 + rng.uniform(-0.05, 0.05), centre + rng.uniform(-0.04, 0.04)
        tall, wide = rng.uniform(0.28, 0.36), rng.uniform(0.13, 0.17)
        label[((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 < 1] = value
    body = ((rows - 0.5) / 0.55) ** 2 + ((columns - 0.5) / 0.47) ** 2 < 1
    picture = np.where(label > 0, 60, np.where(body, 180, 20)) + rng.normal(0, 6, (side, side))
    return picture.clip(0, 255).astype(np.uint8), label


def write_chests(folder: Path, count: int, first: int = 0) -> list[PictureCase]:
    """``chest_0.png`` upwards with ``labels/chest_0.png`` in a folder."""
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    cases = []
    for number in range(first, first + count):
        name = f"chest_{number}"
        picture, label = draw_chest(number)
        Image.fromarray(picture).save(folder / f"{name}.png")
        Image.fromarray(label).save(folder / "labels" / f"{name}.png")
        cases.append(PictureCase(name, folder / f"{name}.png", folder / "labels" / f"{name}.png"))
    return cases
