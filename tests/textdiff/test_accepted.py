"""What a training on accepted labels does with left and right, with structures that nobody annotated, and how versions
are judged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from progidiff.errors import RequestError
from progidiff.images.reading import load_label, load_volume
from progidiff.testing import build_tiny_denoiser
from progidiff.textdiff.accepted import (
    AcceptedConfig,
    Chosen,
    _write_cases,
    choose,
    names_side,
    plan_features,
    run_accepted,
)
from progidiff.textdiff.data import PictureCase, read_classes
from progidiff.textdiff.features import HISTOLOGY_TONE, FeatureOptions
from progidiff.textdiff.model import load_textdiff
from progidiff.textdiff.slices import render_slice
from progidiff.textdiff.versions import TextDiffStore
from progidiff.training.slice_cache import Case
from progidiff.training_runs.options import TrainingOptions

SIDE, DEPTH = 64, 4
SHORT = AcceptedConfig(steps=2, batch_size=2, crop=32, views=1)


def write_kidneys(folder: Path, name: str, seed: int) -> Case:
    """A CT-like body with two balls that look the same and a large one, the liver, on one side; only the ball on the
    other side is labelled.
    """
    rng = np.random.default_rng(seed)
    i, j, _ = np.meshgrid(np.arange(SIDE), np.arange(SIDE), np.arange(DEPTH), indexing="ij")
    down = 40 + rng.integers(-3, 4)
    image = np.full(i.shape, -1000.0)
    image[((i - 32) / 30) ** 2 + ((j - 32) / 28) ** 2 < 1] = 20
    image[((i - 18) / 11) ** 2 + ((j - 22) / 9) ** 2 < 1] = 110
    balls = [((i - column) ** 2 + (j - down) ** 2) < 49 for column in (18, 46)]
    image[balls[0] | balls[1]] = 220
    affine = np.diag([4.0, 4.0, 5.0, 1.0])
    nibabel.save(
        nibabel.Nifti1Image((image + rng.normal(0, 8, image.shape)).astype(np.int16), affine), folder / f"{name}.nii.gz"
    )
    nibabel.save(nibabel.Nifti1Image(balls[1].astype(np.uint8), affine), folder / f"{name}.label.nii.gz")
    return Case(name, folder / f"{name}.nii.gz", folder / f"{name}.label.nii.gz", {1: "left kidney"})


def write_pictures(folder: Path, table: dict[int, str], count: int = 2, **changes: Any) -> list[Case]:
    """Noisy pictures with a bright square for every id of a table."""
    cases = []
    for number in range(count):
        label = np.zeros((SIDE, SIDE), np.uint8)
        for place, value in enumerate(table):
            label[8 + 24 * place : 24 + 24 * place, 8 + 4 * number : 24 + 4 * number] = value
        picture = np.random.default_rng(number).integers(0, 60, (SIDE, SIDE, 3)) + 150 * (label > 0)[..., None]
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"p{number}.png")
        Image.fromarray(label).save(folder / f"p{number}.label.png")
        cases.append(Case(f"p{number}", folder / f"p{number}.png", folder / f"p{number}.label.png", table, **changes))
    return cases


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    build_tiny_denoiser(tmp_path / "heads" / "denoiser")
    return tmp_path / "heads"


# Left and right


def test_a_class_with_a_side_is_drawn_on_that_side_by_every_draw(heads: Path, tmp_path: Path):
    cases = [write_kidneys(tmp_path, f"ct{k}", k) for k in range(2)]
    config = AcceptedConfig(steps=80, learning_rate=5e-3, batch_size=2, crop=32, views=2)
    result = run_accepted(cases, {}, heads, tmp_path / "work", config, structures=("left kidney",), device="cpu")
    model = load_textdiff(heads / result.card.name / "1", "cpu")
    assert (model.card.features.mirror, model.card.features.tone) == (False, None)
    volume = load_volume(cases[0].image)
    truth = volume.arrange(load_label(cases[0].label, like=volume.grid))[1] > 0
    for drawn in model.predict(render_slice(volume, 1), draws=4).masks > 0:
        assert 2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()) > 0.6
        assert (drawn & truth[:, ::-1]).sum() < 0.2 * truth.sum()


@pytest.mark.parametrize("name", ["left kidney", "kidney_right", "kidney_L", "RightVentricle", "upper-lobe", "lt lung"])
def test_names_of_a_side_are_known_however_they_are_written(name: str):
    assert names_side(name)


@pytest.mark.parametrize("name", ["nuclei", "liver", "cleft", "brightness", "CT", "leftover"])
def test_other_names_are_none(name: str):
    assert not names_side(name)


def test_what_is_learned_decides_whether_it_is_mirrored(tmp_path: Path):
    volume, (picture, other) = write_kidneys(tmp_path, "ct", 0), write_pictures(tmp_path, {1: "x"})

    def plan(
        classes: tuple[str, ...], *cases: Case, served: FeatureOptions | None = None, mirror: bool | None = None
    ) -> FeatureOptions:
        return plan_features(Chosen("m", None, classes, [cases[0]], list(cases[1:])), served, mirror)

    tissue = plan(("nuclei",), picture, other)
    assert (tissue.mirror, tissue.tone, tissue.jitter) == (True, HISTOLOGY_TONE, 0.1)
    for options in (
        plan(("liver",), volume, picture),
        plan(("liver",), picture, volume),
        plan(("lung", "left lung"), picture, other),
    ):
        assert (options.mirror, options.tone) == (False, None)
    assert plan(("liver",), volume, picture, mirror=True).mirror
    assert not plan(("nuclei",), picture, other, mirror=False).mirror
    with pytest.raises(RequestError, match="left lung names a side"):
        plan(("left lung",), picture, other, mirror=True)
    # A version is trained further at the tone it knows, but no longer mirrored.
    served = FeatureOptions(timesteps=(50,))
    assert plan(("nuclei",), picture, other, served=served) == served
    assert plan(("left lung",), picture, other, served=served) == replace(served, mirror=False)


def test_training_further_stops_mirroring_and_judges_both_at_the_threshold_that_suits_them(heads: Path, tmp_path: Path):
    cases = [replace(write_kidneys(tmp_path, f"ct{k}", k), structures={1: "liver"}) for k in range(2)]
    first = run_accepted(
        cases, {}, heads, tmp_path / "work", replace(SHORT, mirror=True), structures=("liver",), device="cpu"
    )
    assert first.card.features.mirror
    store = TextDiffStore(heads)
    served = store.load_model(first.card, "cpu")
    served.card = replace(served.card, threshold=0.99)  # Finds nothing, but only because of this.
    store.publish("liver", store.add("liver", served, {}).version)
    second = run_accepted(cases, {}, heads, tmp_path / "work", SHORT, name="liver", device="cpu")
    assert second.card.features.mirror is False
    assert second.figures["current"]["dice"] > 0
    assert {0.2 <= figures["threshold"] <= 0.8 for figures in second.figures.values()} == {True}
    assert second.published == (second.figures["adapted"]["dice"] > second.figures["current"]["dice"])


@pytest.mark.parametrize(
    ("sent", "read"),
    [("auto", None), (["auto", "on", "off"], None), ("on", True), ("off", False), (True, True), (False, False)],
)
def test_mirror_is_an_option_of_a_training(sent: Any, read: bool | None):
    options, ignored = TrainingOptions.from_params("textdiff", {"mirror": sent})
    assert (options.mirror, ignored) == (read, ())
    assert TrainingOptions.from_dict(options.to_dict()) == options


def test_another_word_for_mirror_is_refused():
    with pytest.raises(RequestError, match="Option mirror is"):
        TrainingOptions.from_params("textdiff", {"mirror": "sometimes"})


# What nobody annotated


def prepare(tmp_path: Path, cases: list[Case], classes: tuple[str, ...]) -> dict[str, PictureCase]:
    chosen = choose(TextDiffStore(tmp_path / "none"), cases, "new", classes, (), (), None, 0)
    training, held_out = _write_cases(chosen, {}, tmp_path / "cases")
    return {case.name: case for case in (*training, *held_out)}


def test_a_class_that_a_label_does_not_name_is_unknown_there_and_not_absent(tmp_path: Path):
    both, nuclei = write_pictures(tmp_path, {2: "nuclei", 7: "stroma"})
    written = prepare(tmp_path, [both, replace(nuclei, structures={2: "nuclei", 7: "ink"})], ("nuclei", "stroma"))
    assert (written["p0"].unknown, written["p1"].unknown) == ((), (2,))
    assert set(np.unique(read_classes(written["p1"], (SIDE, SIDE), 2))) == {0, 1}


def test_a_class_that_is_drawn_but_not_vouched_for_is_unknown(tmp_path: Path):
    cases = write_pictures(tmp_path, {2: "nuclei", 7: "stroma"}, annotated={"stroma": None})
    written = prepare(tmp_path, [replace(cases[0], annotated={"": None}), cases[1]], ("nuclei", "stroma"))
    assert (written["p0"].unknown, written["p1"].unknown) == ((), (1,))
    assert set(np.unique(read_classes(written["p1"], (SIDE, SIDE), 2))) == {0, 2}


def test_of_a_volume_every_slice_has_its_own_unknown_classes(tmp_path: Path):
    volume = replace(write_kidneys(tmp_path, "ct", 0), structures={1: "Left Kidney", 2: "liver"})
    volume = replace(volume, annotated={"left kidney": frozenset({0, 1}), "liver": frozenset({1})})
    other = replace(write_kidneys(tmp_path, "other", 1), structures={1: "Left Kidney"})
    written = prepare(tmp_path, [volume, other], ("Left Kidney", "liver"))
    assert {name: case.unknown for name, case in written.items() if name.startswith("ct-")} == {
        "ct-0000": (2,),
        "ct-0001": (),
    }
    assert all(case.unknown == (2,) for name, case in written.items() if name.startswith("other-"))


def test_fixed_ids_say_nothing_about_what_is_not_drawn(tmp_path: Path):
    cases = [
        replace(write_kidneys(tmp_path, f"ct{k}", k), structures={1: "left kidney", 2: "spleen"}, names_all=False)
        for k in range(2)
    ]
    assert {case.unknown for case in prepare(tmp_path, cases, ("left kidney", "spleen")).values()} == {(2,)}


def test_a_picture_that_speaks_about_no_class_is_not_used(tmp_path: Path):
    cases = write_pictures(tmp_path, {1: "nuclei", 2: "ink"}, 3)
    cases[2] = replace(cases[2], annotated={"ink": None})
    assert choose(TextDiffStore(tmp_path / "none"), cases, "new", ("nuclei",), (), (), None, 0).unused == ["p2"]
