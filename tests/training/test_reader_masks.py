"""Crops with several readers: read, split by patient, drawn with all readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from progidiff.errors import ImageError, RequestError
from progidiff.training.reader_masks import ReaderMasks, ReaderSource, load_reader_masks, split_patients
from progidiff.training.window_pool import Jitter, WindowPool


@pytest.fixture
def masks() -> ReaderMasks:
    rng = np.random.default_rng(0)
    drawn = np.zeros((12, 4, 64, 64), np.uint8)
    for n in range(12):
        for reader in range(3):
            drawn[n, reader, 24 : 34 + reader, 26:36] = 1
    images = (drawn.mean(1) * 150 + rng.uniform(0, 50, (12, 64, 64))).astype(np.uint8)
    return ReaderMasks(images, np.packbits(drawn, axis=-1), np.array([f"p{n // 3}" for n in range(12)]))


def test_a_file_comes_back_and_a_wrong_one_is_refused(masks: ReaderMasks, tmp_path: Path):
    key = np.stack([masks.patients, np.zeros(12, int).astype(str), np.arange(12).astype(str)], 1)
    np.savez(tmp_path / "a.npz", images=masks.images, masks_packed=masks.masks, key=key)
    found = load_reader_masks(tmp_path / "a.npz")
    assert (found.patients == masks.patients).all()
    assert (found.unpack(3) == masks.unpack(3)).all()
    np.savez(tmp_path / "b.npz", images=masks.images[:3], masks_packed=masks.masks, key=key)
    with pytest.raises(ImageError, match="inconsistent"):
        load_reader_masks(tmp_path / "b.npz")
    with pytest.raises(ImageError, match="cannot be read"):
        load_reader_masks(tmp_path / "c.npz")


def test_a_split_keeps_patients_together(masks: ReaderMasks):
    first, second = split_patients(masks.patients, [0.5, 0.5])
    assert (first ^ second).all()
    assert not set(masks.patients[first]) & set(masks.patients[second])
    assert len(masks.pick(first)) == 6


def test_windows_hold_every_reader_with_one_who_drew_nothing(masks: ReaderMasks):
    source = ReaderSource(masks, label=1, size=32, jitter=Jitter(0, 0, 0, 0, 0))
    sample = WindowPool([source]).draw(6, np.random.default_rng(0))
    assert sample.truth.shape == (6, 4, 32, 32)
    assert sample.weight.all()
    areas = sample.truth.sum((2, 3))
    assert (areas[:, 0] == 100).all()
    assert (areas[:, 2] == 120).all()
    assert not areas[:, 3].any()
    assert not sample.is_found.any()
    inside = sample.images[0, 2][sample.truth[0, 0] == 1].mean()
    assert inside > 2 * sample.images[0, 2][sample.truth[0].sum(0) == 0].mean()


def test_a_pool_of_nothing_or_of_different_windows_is_refused(masks: ReaderMasks):
    with pytest.raises(RequestError, match="no data set"):
        WindowPool([])
    with pytest.raises(RequestError, match="one size"):
        WindowPool([ReaderSource(masks, 1, size=32), ReaderSource(masks, 1, size=64)])


def test_sources_are_drawn_by_their_weights(masks: ReaderMasks):
    pool = WindowPool([ReaderSource(masks, 1, size=16), ReaderSource(masks, 2, size=16)], weights=[3, 1])
    labels = pool.draw(200, np.random.default_rng(0)).labels
    assert 120 < labels.count(1) < 180
