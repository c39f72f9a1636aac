"""What ships: it is small, it loads, and it finds what it was trained to find."""

from __future__ import annotations

import numpy as np
import pytest

from progidiff.textdiff.model import default_folder, find_version, load_textdiff, load_textdiff_card
from progidiff.textdiff.versions import TextDiffStore
from support.chests import CLASSES, draw_chest
from support.tissue import draw_tissue

LIMIT_BYTES = 30e6
SENTENCE = "The nuclei density in the left is high."


def test_the_denoiser_is_under_30_mb_and_so_is_every_head():
    folders = [default_folder() / "denoiser", *(path.parent for path in default_folder().glob("*/*/card.json"))]
    assert len(folders) >= 3
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 5e5 < size < LIMIT_BYTES, folder


def test_the_served_head_is_the_one_that_is_loaded_by_default():
    store = TextDiffStore(default_folder())
    assert load_textdiff_card(find_version(None)).full_name == f"nuclei@{store.current('nuclei')}"


def test_who_asks_for_no_version_gets_the_one_for_tissue():
    newest = TextDiffStore(default_folder()).find_newest()
    assert newest is not None
    assert newest.name == "nuclei"


def test_the_shipped_chest_head_draws_the_side_that_the_sentence_names():
    model = load_textdiff(default_folder() / "chest", "cpu")
    assert model.card.classes == CLASSES
    picture, truth = draw_chest(0, 256)
    asked = {
        "left lung": (2,),
        "Opacity in the right lower zone": (1,),
        "bilateral pneumonia": (1, 2),
        "die rechte Lunge": (1,),
        "hazy shadow projecting over the left lung base": (2,),
        "right lung unremarkable, left lung shows a nodule": (2,),
        "left lung unremarkable, right lung shows a nodule": (1,),
    }
    for sentence, classes in asked.items():
        mask = model.predict(picture, sentence).mask
        wanted = np.isin(truth, classes)
        overlap = (mask == truth) & wanted
        assert 2 * overlap.sum() / ((mask > 0).sum() + wanted.sum()) > 0.6, sentence
    for sentence in ("the liver", "right femur", None):
        assert not model.predict(picture, sentence).mask.any(), sentence


def test_the_first_chest_head_is_still_there():
    assert load_textdiff(default_folder() / "chest" / "1", "cpu").card.full_name == "chest@1"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_shipped_head_finds_what_looks_like_nuclei(version: int):
    model = load_textdiff(default_folder() / "nuclei" / str(version), "cpu")
    picture, truth = draw_tissue(0)
    found = model.predict(picture, SENTENCE).mask > 0
    assert 2 * (found & (truth > 0)).sum() / (found.sum() + truth.sum()) > 0.5
    assert model.card.head.text_features == (384 if version == 1 else 0)
