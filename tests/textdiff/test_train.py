"""Training: it learns, resumes to the same weights, stops on request, and says what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from progidiff.errors import CancelledError, GeometryError, ImageError, RequestError
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.evaluate import evaluate
from progidiff.textdiff.features import DiffusionFeatures
from progidiff.textdiff.model import TextDiffModel
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.train import TextDiffTraining, make_view, train_textdiff
from support.toy_textdiff import TOY, toy


def weights(model: TextDiffModel) -> dict[str, torch.Tensor]:
    return model.head.state_dict()


def test_a_minute_of_training_finds_blobs_it_never_saw(training: TextDiffTraining, cases: list[PictureCase]):
    assert training.figures["dice"] > 0.8
    assert training.model.card.threshold == training.figures["threshold"]
    report = evaluate(training.model, cases[3:])
    assert report["summary"]["dice"] == pytest.approx(training.figures["dice"], abs=0.02)


def test_what_made_a_model_is_kept(training: TextDiffTraining):
    run = training.run
    assert run["training_cases"] == ["a0", "a1", "a2"]
    assert run["held_out_cases"] == ["a3"]
    assert run["config"]["features"]["timesteps"] == [50, 150]
    assert run["parameters"] == sum(p.numel() for p in training.model.head.parameters())
    assert run["denoiser"]["digest"] == training.model.card.denoiser_digest
    assert training.notes == ()


def test_a_model_that_draws_one_piece_does_so_when_it_is_trained_further(
    training: TextDiffTraining,
    cases: list[PictureCase],
    extractor: DiffusionFeatures,
    encoder: SentenceEncoder,
    tmp_path: Path,
):
    former = training.model
    for one_piece in (True, False):
        start = TextDiffModel(former.extractor, encoder, former.head, replace(former.card, one_piece=one_piece))
        further = train_textdiff(
            cases[:1],
            denoiser=extractor,
            encoder=encoder,
            start=start,
            work=tmp_path / str(one_piece),
            config=toy(steps=1),
            device="cpu",
        )
        assert further.model.card.one_piece == one_piece


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    cases: list[PictureCase], extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    config = toy(steps=12)
    whole = train_textdiff(
        cases[:2], denoiser=extractor, encoder=encoder, work=tmp_path / "a", config=config, device="cpu"
    )
    count = iter(range(1000))
    with pytest.raises(CancelledError, match="step 3 of 12"):
        # Asked once per view of a picture, then before every step.
        train_textdiff(
            cases[:2],
            denoiser=extractor,
            encoder=encoder,
            work=tmp_path / "b",
            config=config,
            device="cpu",
            is_cancelled=lambda: next(count) >= 7,
        )
    again = train_textdiff(
        cases[:2], denoiser=extractor, encoder=encoder, work=tmp_path / "b", config=config, device="cpu"
    )
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, weights(again.model)[name]), name


def test_another_picture_sentence_or_mask_is_another_run(
    cases: list[PictureCase], extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    config = toy(steps=1)
    train_textdiff(cases[:1], denoiser=extractor, encoder=encoder, work=tmp_path, config=config, device="cpu")
    for other in (cases[1], replace(cases[0], sentence="Sparse."), replace(cases[0], label=cases[1].label)):
        with pytest.raises(RequestError, match="other settings"):
            train_textdiff([other], denoiser=extractor, encoder=encoder, work=tmp_path, config=config, device="cpu")


def test_features_are_computed_once_and_cancelling_there_works(
    cases: list[PictureCase], extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    seen: list[dict] = []
    train_textdiff(
        cases[:2],
        denoiser=extractor,
        encoder=encoder,
        work=tmp_path / "a",
        config=toy(steps=1),
        device="cpu",
        report=seen.append,
    )
    assert [(e["step"], e["total"]) for e in seen if e["stage"] == "features"] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert any(e["stage"] == "head" and e["total"] == 1 for e in seen)
    assert len(list((tmp_path / "a" / "features").glob("*.safetensors"))) == 4
    with pytest.raises(CancelledError, match="picture 1 of 2"):
        train_textdiff(
            cases[:2],
            denoiser=extractor,
            encoder=encoder,
            work=tmp_path / "b",
            config=toy(),
            device="cpu",
            is_cancelled=lambda: True,
        )


def test_without_text_no_encoder_is_needed_and_sentences_change_nothing(
    cases: list[PictureCase], extractor: DiffusionFeatures, tmp_path: Path
):
    result = train_textdiff(
        cases[:1], denoiser=extractor, encoder=None, work=tmp_path, config=toy(steps=2, use_text=False), device="cpu"
    )
    assert result.model.encoder is None
    assert result.model.card.head.text_features == 0
    said = result.model.predict(np.zeros((16, 16, 3), np.uint8), "Dense.")
    assert any("trained without sentences" in note for note in said.notes)


def test_without_held_out_pictures_the_threshold_is_a_half(
    cases: list[PictureCase], extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    result = train_textdiff(
        cases[:1], denoiser=extractor, encoder=encoder, work=tmp_path, config=toy(steps=1), device="cpu"
    )
    assert result.figures == {}
    assert result.model.card.threshold == 0.5


def write_case(
    folder: Path, picture: np.ndarray, mask: np.ndarray, name: str = "p", sentence: str | None = None
) -> PictureCase:
    paths = []
    for kind, array in (("images", picture), ("labels", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        paths.append(folder / kind / f"{name}.png")
        Image.fromarray(array).save(paths[-1])
    return PictureCase(name, *paths, sentence)


@pytest.mark.parametrize(
    ("picture", "note"),
    [
        (np.full((40, 40), 90, np.uint8), None),
        (np.random.default_rng(0).integers(0, 60000, (40, 40)).astype(np.uint16), "scaled to 0..255"),
        (np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8), "blended over white"),
        (np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8), None),
    ],
    ids=["gray", "16-bit", "alpha", "smaller than a crop"],
)
def test_unusual_pictures_empty_masks_and_no_sentence_are_learned_from(
    picture: np.ndarray, note: str | None, extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    case = write_case(tmp_path, picture, np.zeros(picture.shape[:2], np.uint8))
    result = train_textdiff(
        [case], denoiser=extractor, encoder=encoder, work=tmp_path / "work", config=toy(steps=2), device="cpu"
    )
    assert "p: there is no sentence; it is learned from without one." in result.notes
    assert note is None or any(note in n for n in result.notes)
    assert result.model.card.gray == (picture.ndim == 2)
    assert result.model.predict(picture).mask.shape == picture.shape[:2]


def test_several_classes_are_learned(extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path):
    mask = np.zeros((40, 40), np.uint8)
    mask[:20, :20], mask[20:, 20:] = 1, 2
    picture = np.stack([120 * (mask == 1), 120 * (mask == 2), np.full((40, 40), 60)], axis=-1).astype(np.uint8)
    case = write_case(tmp_path, picture, mask)
    config = toy(steps=40, classes=("red", "green"), views=1)
    result = train_textdiff(
        [case], denoiser=extractor, encoder=encoder, work=tmp_path / "work", config=config, device="cpu"
    )
    answer = result.model.predict(picture)
    assert answer.probabilities.shape == (2, 40, 40)
    assert (answer.mask == mask).mean() > 0.9
    assert set(evaluate(result.model, [case])["summary"]["per_class"]) == {"red", "green"}


def test_what_makes_no_sense_is_refused_before_anything_is_computed(
    cases: list[PictureCase], extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    def run(chosen: list[PictureCase], held_out: list[PictureCase] | None = None, **changes: object) -> None:
        train_textdiff(
            chosen, held_out or [], denoiser=extractor, encoder=encoder, work=tmp_path / "w", config=toy(steps=1,
            **changes), device="cpu",
            report=lambda entry: pytest.fail("computed"),
        )  # fmt: skip

    with pytest.raises(RequestError, match="no labelled picture"):
        run([])
    with pytest.raises(RequestError, match="a1 has no label"):
        run([cases[0], replace(cases[1], label=None)])
    with pytest.raises(RequestError, match="a0 cannot be learned from and held out"):
        run(cases[:2], cases[:1])
    with pytest.raises(RequestError, match="multiple of 8"):
        run(cases[:1], crop=20)
    with pytest.raises(RequestError, match="different names"):
        run(cases[:1], classes=("a", "a"))
    with pytest.raises(RequestError, match="reads 512 at most"):
        run([replace(cases[0], sentence="dense " * 600)])
    (tmp_path / "there").mkdir()
    with pytest.raises(RequestError, match="nothing is overwritten"):
        train_textdiff(
            cases[:1], denoiser=extractor, encoder=encoder, out=tmp_path / "there", work=tmp_path / "w", config=TOY
        )


def test_damaged_pictures_and_masks_of_another_size_are_refused_by_name(
    cases: list[PictureCase], extractor: DiffusionFeatures, encoder: SentenceEncoder, tmp_path: Path
):
    wrong = write_case(tmp_path, np.zeros((40, 40, 3), np.uint8), np.zeros((40, 41), np.uint8))
    with pytest.raises(GeometryError, match=r"p\.png"):
        train_textdiff(
            [wrong], denoiser=extractor, encoder=encoder, work=tmp_path / "w", config=toy(steps=1), device="cpu"
        )
    wrong.image.write_bytes(b"?")
    with pytest.raises(ImageError, match=r"p\.png"):
        train_textdiff(
            [wrong], denoiser=extractor, encoder=encoder, work=tmp_path / "w", config=toy(steps=1), device="cpu"
        )


def test_a_view_mirrors_picture_target_and_sentence_together():
    picture, target = torch.rand(3, 4, 6), torch.rand(2, 4, 6)
    for view, axes, said in (
        (0, [], "upper left"),
        (1, [-1], "upper right"),
        (2, [-2], "lower left"),
        (3, [-1, -2], "lower right"),
    ):
        shown, mask, sentence = make_view(picture, target, "Dense in the upper left.", view, 0.0, seed=1)
        assert torch.equal(shown, picture.flip(axes))
        assert torch.equal(mask, target.flip(axes))
        assert sentence == f"Dense in the {said}."
    assert make_view(picture, target, None, 3, 0.0, 1)[2] is None
    upright = make_view(picture, target, "Upper left.", 3, 0.0, 1, mirror=False)
    assert torch.equal(upright[0], picture)
    assert upright[2] == "Upper left."


def test_views_are_tinted_but_not_the_first():
    picture = torch.rand(3, 4, 6)
    assert torch.equal(make_view(picture, picture, None, 0, 0.3, 1)[0], picture)
    tinted = make_view(picture, picture, None, 4, 0.3, 1)[0]
    assert not torch.equal(tinted, picture)
    assert torch.equal(tinted, make_view(picture, picture, None, 4, 0.3, 1)[0])
    assert not torch.equal(tinted, make_view(picture, picture, None, 4, 0.3, 2)[0])
