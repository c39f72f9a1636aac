"""Every kind of picture ends as RGB with a note on what was done, or as a named error; tiles cover and blend."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from progidiff.errors import GeometryError, ImageError, TooLargeError
from progidiff.textdiff.pictures import (
    compute_blend,
    compute_working_size,
    list_tiles,
    pad,
    read_label,
    read_picture,
    to_picture,
    to_working,
)

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def save(folder: Path, array: np.ndarray, name: str = "p.png", **options: object) -> Path:
    path = folder / name
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_rgb_comes_back_as_it_is_without_a_note(tmp_path: Path, suffix: str):
    picture = read_picture(save(tmp_path, RGB, f"p.{suffix}"))
    assert picture.size == (6, 9)
    assert not picture.gray
    assert picture.notes == ()
    assert np.array_equal(picture.pixels.permute(1, 2, 0).numpy(), RGB)


def test_a_jpeg_is_read(tmp_path: Path):
    picture = read_picture(save(tmp_path, np.full((16, 16, 3), 200, np.uint8), "p.jpg"))
    assert int(picture.pixels.float().mean()) in range(198, 203)


def test_alpha_is_blended_over_white_and_said(tmp_path: Path):
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, :3] = 255
    picture = read_picture(save(tmp_path, np.dstack([RGB, alpha])))
    pixels = picture.pixels.permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[:, :3], RGB[:, :3])
    assert (pixels[:, 3:] == 255).all()
    assert any("blended over white" in note and "67%" in note for note in picture.notes)


def test_16_bit_is_scaled_by_its_own_range_and_said(tmp_path: Path):
    values = np.linspace(1000, 5000, 54).reshape(6, 9).astype(np.uint16)
    picture = read_picture(save(tmp_path, values))
    assert int(picture.pixels.min()) == 0
    assert int(picture.pixels.max()) == 255
    assert (np.diff(picture.pixels[0].numpy().ravel().astype(int)) >= 0).all()
    assert any("1000 to 5000" in note for note in picture.notes)
    assert picture.gray


def test_a_constant_16_bit_picture_is_black():
    assert int(to_picture(np.full((4, 4), 700, np.uint16)).pixels.max()) == 0


def test_gray_is_repeated_to_three_channels(tmp_path: Path):
    picture = read_picture(save(tmp_path, RGB[..., 0]))
    assert picture.gray
    assert all(torch.equal(picture.pixels[0], picture.pixels[c]) for c in (1, 2))


def test_a_palette_a_bilevel_and_a_cmyk_picture_are_read(tmp_path: Path):
    image = Image.fromarray(np.full((5, 5, 3), (200, 30, 30), np.uint8))
    for mode, name in (("P", "p.png"), ("1", "b.png"), ("CMYK", "c.tif")):
        image.convert(mode).save(tmp_path / name)
        picture = read_picture(tmp_path / name)
        assert picture.size == (5, 5)
        assert picture.gray == (mode == "1")


def test_floating_point_is_scaled_and_not_finite_refused():
    assert int(to_picture(np.array([[0.0, 0.5], [1.0, 0.25]])).pixels.max()) == 255
    with pytest.raises(ImageError, match="not finite"):
        to_picture(np.array([[0.0, np.nan]]))


def test_of_a_tiff_with_pages_the_first_is_read_and_said(tmp_path: Path):
    first, second = (Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (10, 200))
    first.save(tmp_path / "p.tif", save_all=True, append_images=[second])
    picture = read_picture(tmp_path / "p.tif")
    assert int(picture.pixels.max()) == 10
    assert any("2 pages" in note for note in picture.notes)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path):
    (tmp_path / "p.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ImageError, match=r"'p\.png' cannot be read as a picture"):
        read_picture(tmp_path / "p.png")
    with pytest.raises(ImageError, match="does not exist"):
        read_picture(tmp_path / "q.png")
    with pytest.raises(GeometryError, match="1 to 4 channels"):
        to_picture(np.zeros((4, 4, 7), np.uint8))
    whole = save(
        tmp_path, np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8), "whole.png"
    ).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"'cut\.png' cannot be read"):
        read_picture(tmp_path / "cut.png")


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("progidiff.images.pictures.MAX_PIXELS", 50)
    with pytest.raises(TooLargeError, match="cut it into pictures"):
        read_picture(save(tmp_path, RGB))


def test_a_label_keeps_its_numbers_and_a_coloured_one_is_refused(tmp_path: Path):
    values, _ = read_label(save(tmp_path, np.array([[0, 3], [255, 1]], np.uint8)))
    assert values.tolist() == [[0, 3], [255, 1]]
    values, _ = read_label(save(tmp_path, np.array([[0, 700]], np.uint16)))
    assert values.tolist() == [[0, 700]]
    values, _ = read_label(save(tmp_path, np.full((2, 2, 3), 4, np.uint8)))
    assert values.tolist() == [[4, 4], [4, 4]]
    with pytest.raises(ImageError, match="colour picture"):
        read_label(save(tmp_path, RGB))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (41, 100), (7, 333), (300, 257)])
def test_tiles_cover_the_picture_overlap_and_blend_to_one(height: int, width: int):
    tiles = list_tiles(height, width, 64, 8)
    weight, count = torch.zeros(height, width), torch.zeros(height, width)
    for tile in tiles:
        assert tile.bottom - tile.top <= 64
        assert tile.right - tile.left <= 64
        tile.crop(count).add_(1)
        tile.crop(weight).add_(compute_blend(tile, height, width, 8))
    assert int(count.min()) >= 1
    assert float(weight.min()) > 0.05
    lefts = sorted({(tile.left, tile.right) for tile in tiles})
    assert all(one[1] - other[0] >= 8 for one, other in pairwise(lefts))


def test_padding_mirrors_and_gives_multiples():
    picture = torch.arange(3 * 5 * 6.0).reshape(3, 5, 6)
    padded = pad(picture, 8)
    assert padded.shape == (3, 8, 8)
    assert torch.equal(padded[:, :5, :6], picture)
    assert torch.equal(padded[:, 5, :6], picture[:, 3])
    assert pad(picture[:, :1, :1], 8, 16).shape == (3, 16, 16)
    assert pad(padded, 8) is padded


def test_the_working_resolution_follows_scale_or_size():
    assert compute_working_size(1000, 600, 0.5, None) == (500, 300)
    assert compute_working_size(1000, 600, None, 200) == (200, 120)
    assert compute_working_size(3, 1000, 0.01, None) == (1, 10)
    working = to_working(torch.full((3, 8, 8), 255, dtype=torch.uint8), 0.5, None)
    assert working.shape == (3, 4, 4)
    assert torch.allclose(working, torch.ones(()))


def test_pictures_are_brought_to_one_tone_and_an_empty_one_stays_empty():
    tone = (0.2, -0.1, 0.3, 0.2, 0.1, 0.15)
    pixels = torch.randint(60, 160, (3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    working = to_working(pixels, 1.0, None, tone)
    assert torch.allclose(working.mean(dim=(1, 2)), torch.tensor(tone[:3]), atol=1e-4)
    assert torch.allclose(working.std(dim=(1, 2), correction=0), torch.tensor(tone[3:]), atol=1e-4)
    darker = to_working((pixels.float() * 0.5 + 10).to(torch.uint8), 1.0, None, tone)
    assert (working - darker).abs().mean() < 0.01
    empty = to_working(torch.full((3, 8, 8), 240, dtype=torch.uint8), 1.0, None, tone)
    assert torch.allclose(empty, torch.tensor(tone[:3]).view(3, 1, 1).expand(3, 8, 8))
    pale = pixels.clone()
    pale[:] = 200 + (pixels > 110)
    assert float(to_working(pale, 1.0, None, tone).std(dim=(1, 2)).max()) < 0.05
