"""The head: shapes, what the text can and cannot do, positions, and the loss."""

from __future__ import annotations

import pytest
import torch

from progidiff.errors import GeometryError
from progidiff.textdiff.network import HeadConfig, TextDiffHead, encode_places
from progidiff.textdiff.train import compute_segmentation_loss

CONFIG = HeadConfig(
    channels=(24, 16, 11),
    strides=(8, 4, 1),
    classes=2,
    text_features=12,
    width=16,
    base=8,
    heads=2,
    attend_stride=4,
    dropout=0.0,
)


def make(config: HeadConfig = CONFIG, loud: bool = True, seed: int = 0) -> TextDiffHead:
    """A head whose text branch says something: a fresh one adds nothing."""
    torch.manual_seed(seed)
    head = TextDiffHead(config).eval()
    if loud and head.text is not None:
        for parameter in head.text.leave.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return head


def draw_features(count: int = 2, height: int = 16, width: int = 32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(count, c, height // s, width // s) for c, s in zip(CONFIG.channels, CONFIG.strides, strict=True)
    ]


TOKENS = torch.randn((2, 5, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def test_logits_are_per_working_pixel_with_background_first():
    assert make()(draw_features(), TOKENS, MASK).shape == (2, 3, 16, 32)


def test_a_head_has_about_a_million_parameters_at_its_defaults():
    head = TextDiffHead(HeadConfig(channels=(768, 384, 192, 99), strides=(8, 4, 2, 1)))
    assert 0.8e6 < sum(p.numel() for p in head.parameters()) < 3e6


def test_a_fresh_head_does_not_listen_yet():
    head, features = make(loud=False), draw_features()
    assert torch.equal(head(features, TOKENS, MASK), head(features))


def test_a_sentence_matters_and_what_is_masked_does_not():
    head, features = make(), draw_features()
    said = head(features, TOKENS, MASK)
    assert not torch.allclose(said, head(features, -TOKENS, MASK), atol=1e-3)
    assert not torch.allclose(said, head(features), atol=1e-3)
    other = TOKENS.clone()
    other[1, 3:] = 99.0
    assert torch.allclose(said, head(features, other, MASK), atol=1e-5)


def test_a_row_without_words_is_a_picture_without_a_sentence():
    head, features = make(), draw_features()
    mask = MASK.clone()
    mask[1] = False
    mixed = head(features, TOKENS, mask)
    assert torch.allclose(mixed[1], head(features)[1], atol=1e-5)
    assert torch.allclose(mixed[0], head(features, TOKENS, MASK)[0], atol=1e-5)


def test_with_the_text_left_out_no_sentence_makes_a_difference():
    head, features = make(), draw_features()
    silent = head(features, TOKENS, MASK, attend=False)
    assert torch.equal(silent, head(features, -TOKENS, MASK, attend=False))
    assert torch.equal(silent, head(features, attend=False))
    assert not torch.allclose(silent, head(features, TOKENS, MASK), atol=1e-3)


def test_a_head_without_text_branch_ignores_sentences():
    head = make(
        HeadConfig(**{**CONFIG.to_dict(), "channels": CONFIG.channels, "strides": CONFIG.strides, "text_features": 0})
    )
    assert head.text is None
    features = draw_features()
    assert torch.equal(head(features, TOKENS, MASK), head(features))


def test_a_crop_knows_where_in_its_picture_it_lies():
    head, features = make(), draw_features()
    left = head(features, TOKENS, MASK, torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 2))
    right = head(features, TOKENS, MASK, torch.tensor([[0.5, 0.5, 1.0, 1.0]] * 2))
    assert not torch.allclose(left, right, atol=1e-3)
    whole = head(features, TOKENS, MASK, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
    assert torch.allclose(whole, head(features, TOKENS, MASK))


def test_places_of_a_crop_are_those_of_the_whole_picture():
    whole = encode_places(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 4, 8).unflatten(1, (4, 8))
    crop = encode_places(torch.tensor([[0.5, 0.25, 1.0, 0.75]]), 2, 4).unflatten(1, (2, 4))
    assert torch.allclose(crop, whole[:, 2:, 2:6], atol=1e-6)
    assert torch.allclose(whole[0, 0, 0, :2], torch.tensor([-0.75, -0.875]))


def test_statistics_standardise_the_features():
    head, features = make(), draw_features()
    plain = head(features)
    head.set_statistics(
        [torch.full((c,), 3.0) for c in CONFIG.channels], [torch.full((c,), 5.0) for c in CONFIG.channels]
    )
    assert torch.allclose(head([5 * f + 3 for f in features]), plain, atol=1e-3)


def test_channels_are_dropped_in_training_only():
    config = HeadConfig(**{**CONFIG.to_dict(), "channels": CONFIG.channels, "strides": CONFIG.strides, "dropout": 0.5})
    head, features = make(config), draw_features()
    assert torch.equal(head(features), head(features))
    head.train()
    torch.manual_seed(0)
    assert not torch.equal(head(features), head(features))


def test_features_of_another_extractor_are_refused():
    with pytest.raises(GeometryError, match="takes features of"):
        make()(draw_features()[1:])


def test_the_configuration_comes_back_from_plain_values():
    assert HeadConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_the_loss_is_cross_entropy_and_dice_on_probabilities():
    logits = torch.randn((2, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    classes = torch.rand((2, 4, 4), generator=torch.Generator().manual_seed(1)) > 0.5
    targets = torch.nn.functional.one_hot(classes.long(), 2).permute(0, 3, 1, 2).float()
    loss, figures = compute_segmentation_loss(logits, targets, 1.0, 1.5)
    p = logits.softmax(1)[:, 1]
    dice = (2 * p[classes].sum() + 1) / (p.sum() + classes.sum() + 1)
    expected = torch.nn.functional.cross_entropy(logits, classes.long()) + 1.5 * (1 - dice)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert figures["dice"] == pytest.approx(float(dice), rel=1e-5)
    # Of probabilities, not of logits: scaling confident logits changes nothing.
    sure = targets * 40 - 20
    assert float(compute_segmentation_loss(sure, targets, 1.0, 1.5)[0]) == pytest.approx(
        float(compute_segmentation_loss(2 * sure, targets, 1.0, 1.5)[0]), abs=1e-5
    )


def test_an_empty_mask_gives_a_finite_loss_that_falls_with_the_foreground():
    targets = torch.zeros(1, 2, 4, 4)
    targets[:, 0] = 1
    full, none = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    full[:, 1], none[:, 1] = 9, -9
    high, low = (float(compute_segmentation_loss(logits, targets, 1.0, 1.5)[0]) for logits in (full, none))
    assert low < 0.01 < 1 < high


def test_a_loss_that_knows_all_classes_is_the_plain_one():
    logits, targets = torch.randn(2, 3, 4, 4), torch.softmax(torch.randn(2, 3, 4, 4), dim=1)
    plain = compute_segmentation_loss(logits, targets, 1.0, 1.5)[0]
    known = compute_segmentation_loss(logits, targets, 1.0, 1.5, torch.ones((2, 2), dtype=torch.bool))[0]
    assert float(known) == pytest.approx(float(plain), abs=1e-5)


def test_what_a_label_does_not_speak_about_is_neither_taught_nor_forbidden():
    # All background, and nobody looked for the second class: drawing it costs nothing, drawing the first one does.
    targets = torch.zeros(1, 3, 4, 4)
    targets[:, 0] = 1
    known = torch.tensor([[True, False]])
    losses = []
    for drawn in (0, 1, 2):
        logits = torch.full((1, 3, 4, 4), -9.0)
        logits[:, drawn] = 9.0
        losses.append(float(compute_segmentation_loss(logits, targets, 1.0, 1.5, known)[0]))
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    assert losses[1] > losses[2] + 5
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    compute_segmentation_loss(logits, targets, 1.0, 1.5, known)[0].backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 2] < 0).all(), "it is not pushed down"
    assert (logits.grad[:, 1] > 0).all()
