"""Chest X-rays as QaTa-COVID19 lays them out (Images/, Ground-truths/mask_*.png, a table of "Image" and "Description"),
on a tiny generated set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from progidiff.errors import RequestError
from progidiff.textdiff.data import find_cases, pick_cases
from progidiff.textdiff.evaluate import CONTROLS, evaluate
from progidiff.textdiff.features import FeatureOptions
from progidiff.textdiff.model import load_textdiff
from progidiff.textdiff.pictures import read_picture
from progidiff.textdiff.pretrain import CropOptions, DenoiserConfig, DenoiserWidths, run_pretrain
from progidiff.textdiff.train import TextDiffTrainConfig, train_textdiff
from progidiff.training.loop import Schedule

SIDE = 64
CENTRES = {"upper left": (22, 18), "lower left": (44, 18), "upper right": (22, 46), "lower right": (44, 46)}
FINDINGS = [
    ("upper left",),
    ("lower right",),
    ("upper left", "lower right"),
    (),
    ("lower left", "upper right"),
    ("upper right",),
]


def describe(places: tuple[str, ...]) -> str:
    if not places:
        return "No pulmonary infection."
    lungs = {place.split()[1] for place in places}
    kind = "Bilateral" if len(lungs) == 2 else "Unilateral"
    areas = f"{('one', 'two')[len(places) - 1]} infected area{'s' * (len(places) > 1)}"
    return f"{kind} pulmonary infection, {areas}, {' and '.join(f'{place} lung' for place in places)}."


def write_chest(folder: Path, k: int, places: tuple[str, ...]) -> str:
    """A gray picture of two lungs with infected areas, and its mask."""
    rng = np.random.default_rng(k)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    lungs = sum((((rows - 33) / 26) ** 2 + ((columns - c) / 12) ** 2 < 1).astype(int) for c in (18, 46))
    mask = np.zeros((SIDE, SIDE), bool)
    for row, column in (CENTRES[place] for place in places):
        mask |= (rows - row) ** 2 + (columns - column) ** 2 < 36
    picture = np.where(mask, 190, np.where(lungs > 0, 50, 130)) + rng.normal(0, 6, (SIDE, SIDE))
    name = f"covid_{k}.png"
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "Images" / name)
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "Ground-truths" / f"mask_{name}")
    return name


@pytest.fixture(scope="module", params=["masks", "pictures"])
def chests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables that are around name the mask or the picture in "Image"."""
    folder = tmp_path_factory.mktemp("qata")
    for part in ("Images", "Ground-truths"):
        (folder / part).mkdir()
    lines = ["Image,Description"]
    for k, places in enumerate(FINDINGS):
        name = write_chest(folder, k, places)
        lines.append(f'{"mask_" if request.param == "masks" else ""}{name},"{describe(places)}"')
    (folder / "train_text.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chest-denoiser")
    for part in ("Images", "Ground-truths"):
        (folder / part).mkdir()
    write_chest(folder, 9, ("upper left",))
    config = DenoiserConfig(
        schedule=Schedule(steps=2),
        crops=CropOptions(scale=1, size=16, per_step=2),
        widths=DenoiserWidths((8, 16, 16, 16), norm_groups=4),
        tensorboard=False,
    )
    run_pretrain(list((folder / "Images").glob("*.png")), folder / "denoiser", folder / "work", config)
    return folder / "denoiser"


def test_pictures_masks_and_sentences_are_found_by_the_folder_alone(chests: Path):
    cases = find_cases(chests)
    assert [case.name for case in cases] == [f"covid_{k}" for k in range(6)]
    assert [case.label.name for case in cases if case.label] == [f"mask_covid_{k}.png" for k in range(6)]
    assert [case.sentence for case in cases] == [describe(places) for places in FINDINGS]
    assert (
        cases[2].sentence == "Bilateral pulmonary infection, two infected areas, upper left lung and lower right lung."
    )
    named = find_cases(chests / "Images", chests / "Ground-truths", chests / "train_text.csv")
    assert named == cases


def test_a_table_of_other_pictures_is_named(chests: Path, tmp_path: Path):
    (tmp_path / "other.csv").write_text('Image,Description\nmask_sub_1.png,"Bilateral."\n', encoding="utf-8")
    with pytest.raises(RequestError, match="No row of .* names a picture"):
        find_cases(chests, text=tmp_path / "other.csv")


def test_a_head_learns_gray_chests_with_sentences_and_is_measured_with_every_control(
    chests: Path, denoiser: Path, tmp_path: Path
):
    cases = find_cases(chests)
    training, held_out = cases[:4], pick_cases(cases, ["covid_4", "covid_5"])
    config = TextDiffTrainConfig(
        name="chest",
        classes=("infection",),
        schedule=Schedule(steps=60, learning_rate=5e-3, warmup=5, ema_decay=0.9, checkpoint_every=60),
        features=FeatureOptions(scale=1.0, picture=True, tone=None),
        crop=64,
        batch_size=4,
        views=2,
        tensorboard=False,
    )
    trained = train_textdiff(
        training,
        held_out,
        denoiser=denoiser,
        out=tmp_path / "chest",
        work=tmp_path / "work",
        config=config,
        device="cpu",
    )
    assert trained.model.card.gray
    model = load_textdiff(tmp_path / "chest", "cpu")
    reports = {control: evaluate(model, held_out, control) for control in CONTROLS}
    assert {report["summary"]["images"] for report in reports.values()} == {2}
    # Bright areas in dark lungs are easy: what is tested is that gray pictures, masks and sentences arrive.
    assert reports["none"]["summary"]["dice"] > 0.7
    assert reports["none"]["images"][0]["sentence"] == describe(FINDINGS[4])
    assert reports["shuffled"]["images"][0]["sentence"] == describe(FINDINGS[5])
    assert not reports["empty"]["images"][0]["sentence"]
    healthy = model.predict(read_picture(chests / "Images" / "covid_3.png"), describe(FINDINGS[3]))
    assert healthy.mask.shape == (SIDE, SIDE)
    assert healthy.mask.mean() < 0.02
