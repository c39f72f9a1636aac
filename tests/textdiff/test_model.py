"""Answers: sizes, tiles, draws, notes; and a model's way to the disk and back."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from progidiff.errors import CancelledError, ModelError, NotFoundError, RequestError
from progidiff.testing import build_tiny_denoiser
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.model import (
    TextDiffCard,
    TextDiffModel,
    find_version,
    load_textdiff,
    load_textdiff_card,
    refer_to,
)
from progidiff.textdiff.pictures import read_picture, to_picture
from progidiff.textdiff.train import TextDiffTraining
from progidiff.textdiff.versions import TextDiffStore
from support.cards import read_hub_card

SENTENCE = "The density in the upper left is high."


def draw(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 300), (33, 47), (64, 64), (130, 70)])
def test_an_answer_has_the_size_of_its_picture(model: TextDiffModel, height: int, width: int):
    result = model.predict(draw(height, width, 3), SENTENCE, tile=64, overlap=8)
    assert result.probabilities.shape == (1, height, width)
    assert result.mask.shape == (height, width)
    assert result.masks.shape == (1, height, width)
    assert result.disagreement_map.shape == (height, width)
    assert 0 <= float(result.probabilities.min()) <= float(result.probabilities.max()) <= 1
    assert set(np.unique(result.mask)) <= {0, 1}
    assert result.notes == ()


def test_a_picture_in_tiles_is_answered_nearly_as_in_one(model: TextDiffModel, cases: list[PictureCase]):
    picture = np.tile(read_picture(cases[3].image).pixels.permute(1, 2, 0).numpy(), (3, 3, 1))
    one, many = (model.predict(picture, SENTENCE, tile=tile, overlap=32) for tile in (512, 96))
    assert np.abs(one.probabilities - many.probabilities).mean() < 0.1
    assert (one.mask == many.mask).mean() > 0.9


def test_progress_counts_all_tiles_of_all_draws(model: TextDiffModel):
    seen = []
    model.predict(
        draw(70, 120, 3),
        SENTENCE,
        draws=2,
        tile=64,
        overlap=8,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(k, 8) for k in range(1, 9)]


def test_a_prediction_can_be_cancelled_between_tiles(model: TextDiffModel):
    asked = iter([False, False, True])
    with pytest.raises(CancelledError, match="after 2 of 4 tiles"):
        model.predict(draw(70, 120, 3), SENTENCE, tile=64, overlap=8, is_cancelled=lambda: next(asked))


def test_draws_are_averaged_and_their_disagreement_is_told(model: TextDiffModel):
    picture = draw(48, 48, 3)
    one, four = model.predict(picture, SENTENCE), model.predict(picture, SENTENCE, draws=4)
    assert one.disagreement == 0
    assert not one.disagreement_map.any()
    assert four.masks.shape == (4, 48, 48)
    assert np.array_equal(four.masks[0], one.mask)
    assert 0 < four.disagreement_map.max() <= 1
    assert 0 <= four.disagreement <= 1
    assert np.array_equal(model.predict(picture, SENTENCE, draws=4).probabilities, four.probabilities)
    for draws in (0, 65):
        with pytest.raises(RequestError, match=r"1\.\.64"):
            model.predict(picture, SENTENCE, draws=draws)


def test_later_draws_look_at_the_mirrored_picture_with_the_mirrored_sentence(
    model: TextDiffModel, cases: list[PictureCase]
):
    picture = read_picture(cases[0].image).pixels.permute(1, 2, 0).numpy()
    heard: list[str] = []
    seen: list[torch.Tensor] = []

    class Watching:
        channels, strides, options, key = (
            model.extractor.channels,
            model.extractor.strides,
            model.extractor.options,
            model.extractor.key,
        )

        def __call__(self, pictures: torch.Tensor, draw: int = 0) -> list[torch.Tensor]:
            seen.append(pictures[0])
            return model.extractor(pictures, draw)

    class Reading:
        def check(self, sentences: list[str]) -> None:
            pass

        def encode(self, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            heard.extend(sentences)
            return model.encoder.encode(sentences)

    watched = TextDiffModel(Watching(), Reading(), model.head, model.card)
    result = watched.predict(picture, SENTENCE, draws=4)
    assert heard == [
        f"The density in the {place} is high." for place in ("upper left", "upper right", "lower left", "lower right")
    ]
    for found, axes in zip(seen, ([], [-1], [-2], [-1, -2]), strict=True):
        assert torch.equal(found, seen[0].flip(axes))
    # All draws are turned back: they mark the same blobs.
    assert result.disagreement < 0.3
    assert np.abs(result.probabilities[0][::-1, ::-1] - result.probabilities[0]).mean() > 0.1
    plain = replace(model.card, features=replace(model.card.features, mirror=False))
    seen.clear()
    TextDiffModel(Watching(), Reading(), model.head, plain).predict(picture, SENTENCE, draws=2)
    assert torch.equal(seen[0], seen[1])


def test_a_tile_must_be_larger_than_its_overlaps(model: TextDiffModel):
    with pytest.raises(RequestError, match="twice the overlap"):
        model.predict(draw(8, 8, 3), SENTENCE, tile=16, overlap=8)


@pytest.mark.parametrize("sentence", [None, "", "  \n"])
def test_a_picture_without_a_sentence_is_answered_and_said(model: TextDiffModel, sentence: str | None):
    result = model.predict(draw(16, 16, 3), sentence)
    assert result.sentence is None
    assert any("no sentence" in note for note in result.notes)
    assert np.array_equal(result.probabilities, model.predict(draw(16, 16, 3)).probabilities)


def test_a_sentence_too_long_is_refused_before_anything_is_computed(model: TextDiffModel):
    with pytest.raises(RequestError, match="reads 512 at most"):
        model.predict(draw(16, 16, 3), "dense " * 600, on_progress=lambda *_: pytest.fail("computed"))


def test_gray_where_colour_was_learned_is_answered_and_said(model: TextDiffModel):
    result = model.predict(draw(16, 16), SENTENCE)
    assert any("learned from colour" in note for note in result.notes)
    gray = TextDiffModel(model.extractor, model.encoder, model.head, replace(model.card, gray=True))
    assert not gray.predict(draw(16, 16), SENTENCE).notes
    assert any("learned from gray" in note for note in gray.predict(draw(16, 16, 3), SENTENCE).notes)


def test_alpha_and_16_bit_are_answered_and_said(model: TextDiffModel):
    assert any("blended over white" in note for note in model.predict(draw(16, 16, 4), SENTENCE).notes)
    assert any(
        "scaled to 0..255" in note for note in model.predict(draw(16, 16, 3).astype(np.uint16) * 200, SENTENCE).notes
    )


def test_pictures_tensors_and_arrays_are_all_taken(model: TextDiffModel):
    array = draw(16, 24, 3)
    wanted = model.predict(to_picture(array), SENTENCE).probabilities
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array.transpose(2, 0, 1).copy())):
        assert np.array_equal(model.predict(same, SENTENCE).probabilities, wanted)


def test_several_classes_are_drawn_by_the_likeliest(model: TextDiffModel):
    two = TextDiffModel(
        model.extractor, model.encoder, model.head, replace(model.card, classes=("a", "b"), threshold=0.5)
    )
    probabilities = np.array([[[0.1, 0.4, 0.2, 0.6]], [[0.2, 0.3, 0.5, 0.1]]])
    assert two.draw_mask(probabilities).tolist() == [[0, 1, 2, 1]]


def test_a_model_comes_back_from_the_disk(training: TextDiffTraining):
    folder = training.model.folder
    assert folder is not None
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "card.json", "head.safetensors", "run.json"]
    loaded = load_textdiff(folder, "cpu")
    assert loaded.card == training.model.card == load_textdiff_card(folder)
    picture = draw(40, 40, 3)
    found, wanted = (m.predict(picture, SENTENCE).probabilities for m in (loaded, training.model))
    assert np.abs(found - wanted).max() < 0.02  # the file is fp16
    assert TextDiffCard.from_dict(json.loads(json.dumps(loaded.card.to_dict()))) == loaded.card
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "a0, a1, a2" in readme
    assert "Held out: a3" in readme
    assert read_hub_card(folder / "README.md").library_name == "progidiff"


def test_model_and_denoiser_can_be_moved_together(training: TextDiffTraining, denoiser: Path, tmp_path: Path):
    shutil.copytree(denoiser, tmp_path / "here" / "denoiser")
    model = load_textdiff(training.model.folder, "cpu", tmp_path / "here" / "denoiser")
    card = replace(model.card, denoiser=str(tmp_path / "here" / "denoiser"))
    TextDiffModel(model.extractor, model.encoder, model.head, card).save(tmp_path / "here" / "toy" / "1", {})
    assert load_textdiff_card(tmp_path / "here" / "toy" / "1").denoiser == "../../denoiser"
    (tmp_path / "here").rename(tmp_path / "there")
    load_textdiff(tmp_path / "there" / "toy" / "1", "cpu")
    shutil.rmtree(tmp_path / "there" / "denoiser")
    with pytest.raises(ModelError, match="Move both together"):
        load_textdiff(tmp_path / "there" / "toy" / "1", "cpu")


def test_a_hub_id_is_kept_as_it_is(tmp_path: Path):
    assert refer_to("owner/denoiser", None, tmp_path / "m") == "owner/denoiser"


def test_nothing_is_overwritten(training: TextDiffTraining):
    assert training.model.folder is not None
    with pytest.raises(RequestError, match="nothing is overwritten"):
        training.model.save(training.model.folder, {})


def copy_model(training: TextDiffTraining, denoiser: Path, folder: Path) -> Path:
    assert training.model.folder is not None
    shutil.copytree(training.model.folder, folder)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    card["denoiser"] = os.path.relpath(denoiser, folder)
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def test_damaged_or_foreign_parts_are_refused(training: TextDiffTraining, denoiser: Path, tmp_path: Path):
    folder = copy_model(training, denoiser, tmp_path / "m")
    load_textdiff(folder, "cpu")
    with pytest.raises(ModelError, match="another denoiser"):
        load_textdiff(folder, "cpu", build_tiny_denoiser(tmp_path / "other", seed=5))
    weights = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(weights[:-1] + b"?")
    with pytest.raises(ModelError, match="is damaged"):
        load_textdiff(folder, "cpu")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_textdiff(folder, "cpu")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    (folder / "card.json").write_text(json.dumps({**card, "format": 99}), encoding="utf-8")
    with pytest.raises(ModelError, match="format 99"):
        load_textdiff_card(folder)
    del card["threshold"]
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(ModelError, match="KeyError"):
        load_textdiff_card(folder)
    with pytest.raises(ModelError, match="holds no model"):
        find_version(tmp_path)


def test_another_sentence_encoder_is_refused(training: TextDiffTraining, denoiser: Path, tmp_path: Path):
    folder = copy_model(training, denoiser, tmp_path / "m")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    (folder / "card.json").write_text(json.dumps({**card, "encoder_digest": "0" * 64}), encoding="utf-8")
    with pytest.raises(ModelError, match="another sentence encoder"):
        load_textdiff(folder, "cpu")


def test_versions_are_added_published_and_rolled_back(training: TextDiffTraining, denoiser: Path, tmp_path: Path):
    store = TextDiffStore(tmp_path)
    first, second = (store.add("nuclei", training.model, training.run) for _ in range(2))
    assert (first.full_name, second.full_name) == ("nuclei@1", "nuclei@2")
    with pytest.raises(ModelError, match="holds no model"):
        find_version(tmp_path / "nuclei")
    with pytest.raises(NotFoundError, match="no published version"):
        store.find("nuclei")
    store.publish("nuclei", 1)
    store.publish("nuclei", 2)
    assert find_version(tmp_path / "nuclei") == tmp_path / "nuclei" / "2"
    assert store.rollback("nuclei") == 1
    card = store.find("nuclei")
    assert card.version == 1
    loaded = store.load_model(card, "cpu")
    assert loaded.card.full_name == "nuclei@1"
    picture = draw(24, 24, 3)
    assert (
        np.abs(
            loaded.predict(picture, SENTENCE).probabilities - training.model.predict(picture, SENTENCE).probabilities
        ).max()
        < 0.02
    )
    assert load_textdiff(tmp_path / "nuclei", "cpu").card == card
    assert store.run(card)["training_cases"] == ["a0", "a1", "a2"]
    with pytest.raises(RequestError, match="'denoiser' cannot name a model"):
        store.add("denoiser", training.model, {})
    with pytest.raises(NotFoundError, match="There is no model 'cells'"):
        store.find("cells")
