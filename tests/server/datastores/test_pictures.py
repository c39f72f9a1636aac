"""Pictures in a studies folder: their grid, their labels as files, and what the datastore makes of both."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from progidiff.active_learning.strategies import ImageScores, build_pool, pick_slices
from progidiff.errors import GeometryError, ImageError, NotFoundError, RequestError
from progidiff.images.formats import is_picture
from progidiff.images.pictures import (
    PICTURE_AFFINE,
    check_picture,
    read_picture_grid,
    read_picture_label,
    write_picture_label,
)
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.images.writing import save_mask
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations

PATTERNS = ("*.nii.gz", "*.nii", "*.nrrd", "*.png", "*.jpg", "*.jpeg", "*.tif", "*.tiff")
HEIGHT, WIDTH = 20, 30


def save_picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> Path:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return path


def save_label(path: Path, values: dict[int, tuple[slice, slice]], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    array = np.zeros((size[1], size[0]), np.uint8)
    for value, box in values.items():
        array[box] = value
    Image.fromarray(array).save(path)
    return path


BOX = np.s_[2:6, 10:25]
"""Rows and columns: above and to the right of the middle."""


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    save_picture(folder / "one.png")
    save_picture(folder / "two.jpeg", seed=1)
    save_picture(folder / "three.tiff", seed=2)
    (folder / "text.csv").write_text("image,text\none.png,Dense on the left.\n", encoding="utf-8")
    return folder


@pytest.fixture
def store(studies: Path) -> SafeLocalDatastore:
    state = studies / ".progidiff"
    opened = SafeLocalDatastore(
        str(studies),
        state,
        open_annotations(state, str(studies)),
        serves=False,
        extensions=PATTERNS,
        picture_ids=lambda: {"nuclei": 1},
    )
    opened._serves, opened._is_settled = True, False
    opened.refresh()
    return opened


# Grids and label files


def test_a_picture_is_one_axial_slice_that_looks_as_it_is_drawn(tmp_path: Path):
    path = save_picture(tmp_path / "a.png")
    grid = read_grid(path)
    assert grid.shape == (WIDTH, HEIGHT, 1)
    assert np.array_equal(grid.affine, PICTURE_AFFINE)
    assert grid.num_slices == 1
    label = save_label(tmp_path / "b.png", {1: BOX})
    assert np.array_equal(grid.arrange(load_label(label, like=grid))[0] == 1, np.asarray(Image.open(label)) == 1)


def test_a_camera_that_was_turned_gives_the_size_that_is_shown(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture_grid(tmp_path / "turned.jpg")[0] == (20, 30, 1)


def test_a_label_map_goes_through_a_png_and_back_whatever_its_ids(tmp_path: Path):
    for high in (7, 300):
        array = np.random.default_rng(0).integers(0, high, (WIDTH, HEIGHT, 1)).astype(np.uint16)
        write_picture_label(array, tmp_path / "a.png")
        assert np.array_equal(read_picture_label(tmp_path / "a.png"), array)


@pytest.mark.parametrize("suffix", [".png", ".nii.gz", ".nrrd"])
def test_a_mask_of_a_picture_is_written_on_its_grid_in_every_format(tmp_path: Path, suffix: str):
    grid = read_grid(save_picture(tmp_path / "a.png"))
    mask = np.zeros((WIDTH, HEIGHT, 1), np.uint8)
    mask[10:25, 2:6] = 3
    assert np.array_equal(load_label(save_mask(mask, grid, tmp_path / f"m{suffix}"), like=grid), mask)


def test_0_and_255_are_read_as_0_and_1(tmp_path: Path):
    assert set(np.unique(read_picture_label(save_label(tmp_path / "a.png", {255: BOX})))) == {0, 1}
    assert set(np.unique(read_picture_label(save_label(tmp_path / "b.png", {255: BOX, 2: np.s_[10:12, 0:3]})))) == {
        0,
        2,
        255,
    }


def test_a_palette_an_alpha_channel_and_gray_in_three_channels_hold_the_same_ids(tmp_path: Path):
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[BOX] = 2
    gray = Image.fromarray(ids)
    palette = Image.fromarray(ids)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    opaque = np.full_like(ids, 255)
    for name, image in {
        "gray": gray,
        "palette": palette,
        "alpha": Image.merge("LA", (gray, Image.fromarray(opaque))),
        "rgb": Image.merge("RGB", (gray, gray, gray)),
        "bit": Image.fromarray(ids > 0),
    }.items():
        image.save(tmp_path / f"{name}.png")
        expected = ids if name != "bit" else ids > 0
        assert np.array_equal(read_picture_label(tmp_path / f"{name}.png")[:, :, 0].T, expected), name


def test_a_colour_label_and_a_jpeg_label_are_refused(tmp_path: Path):
    with pytest.raises(ImageError, match="is in colour, so its values are no label ids"):
        read_picture_label(save_picture(tmp_path / "a.png"))
    with pytest.raises(ImageError, match="the format changes values. Save it as PNG"):
        read_picture_label(save_picture(tmp_path / "a.jpg", "L"))


def test_a_file_that_is_no_picture_is_named(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"'a.png' cannot be read as a picture \(its content is another\)"):
        read_picture_grid(tmp_path / "a.png")
    with pytest.raises(NotFoundError, match="There is no image at"):
        read_picture_grid(tmp_path / "b.png")
    whole = save_picture(tmp_path / "c.png", size=(300, 300)).read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    assert read_picture_grid(tmp_path / "c.png")[0] == (300, 300, 1)
    with pytest.raises(ImageError, match="'c.png' cannot be read as a picture"):
        check_picture(tmp_path / "c.png")


def test_a_picture_is_no_volume_and_the_error_names_the_model_that_takes_it(tmp_path: Path):
    with pytest.raises(
        ImageError, match="is a picture, and structures are found in CT and MR volumes. Ask the model textdiff"
    ):
        load_volume(save_picture(tmp_path / "a.png"))
    assert not is_picture("case.nii.gz")


# In the datastore


def test_all_spellings_of_pictures_are_listed_and_tables_are_not(store: SafeLocalDatastore):
    assert sorted(store.list_images()) == ["one", "three", "two"]


def test_a_saved_picture_label_is_kept_byte_for_byte_as_one_slice(store: SafeLocalDatastore, studies: Path):
    label = save_label(studies.parent / "label.png", {1: BOX})
    saved = store.save_annotated("one", label, "final", {}, "ada")
    assert (studies / "labels/final/one.png").read_bytes() == label.read_bytes()
    assert (saved.annotation.structures, saved.annotation.num_slices, dict(saved.annotation.label_ids)) == (
        ("nuclei",),
        1,
        {"nuclei": 1},
    )
    assert store.get_labeled_images() == ["one"]
    assert store.save_annotated("one", label, "final", {}).repeated
    store.refresh()
    assert store.get_labeled_images() == ["one"]


def test_a_painted_mask_of_0_and_255_counts_as_the_first_class(store: SafeLocalDatastore, studies: Path):
    saved = store.save_annotated("one", save_label(studies.parent / "label.png", {255: BOX}), "final", {})
    assert saved.annotation.structures == ("nuclei",)


def test_a_tiff_label_becomes_a_png_and_replaces_one_of_another_format(store: SafeLocalDatastore, studies: Path):
    volume_label = np.zeros((WIDTH, HEIGHT, 1), np.uint8)
    nibabel.save(nibabel.Nifti1Image(volume_label, PICTURE_AFFINE), studies.parent / "label.nii.gz")
    store.save_annotated("one", studies.parent / "label.nii.gz", "final", {"structures": ["nuclei"]})
    assert [path.name for path in (studies / "labels/final").iterdir()] == ["one.nii.gz"]
    store.save_annotated("one", save_label(studies.parent / "label.tif", {1: BOX}), "final", {})
    assert [path.name for path in (studies / "labels/final").iterdir()] == ["one.png"]
    assert (np.asarray(Image.open(studies / "labels/final/one.png"))[BOX] == 1).all()


def test_the_table_sent_along_names_other_structures(store: SafeLocalDatastore, studies: Path):
    label = save_label(studies.parent / "label.png", {1: BOX, 2: np.s_[10:12, 0:3]})
    saved = store.save_annotated(
        "one", label, "final", {"label_info": [{"name": "nuclei", "idx": 1}, {"name": "stroma", "idx": 2}]}
    )
    assert set(saved.annotation.structures) == {"nuclei", "stroma"}
    with pytest.raises(ImageError, match="holds the ids 2, which nothing names"):
        store.save_annotated("two", label, "final", {})


def test_an_empty_picture_label_says_that_nothing_is_there(store: SafeLocalDatastore, studies: Path):
    saved = store.save_annotated(
        "one", save_label(studies.parent / "label.png", {}), "final", {"structures": ["nuclei"]}
    )
    assert saved.annotation.structures == ("nuclei",)
    assert store.get_labeled_images() == ["one"]


def test_a_label_of_another_size_is_refused(store: SafeLocalDatastore, studies: Path):
    with pytest.raises(GeometryError, match="The label has 31 x 20 x 1 voxels and the image 30 x 20 x 1"):
        store.save_annotated("one", save_label(studies.parent / "label.png", {}, size=(31, 20)), "final", {})
    with pytest.raises(RequestError, match="must be a whole number from 0 to 0"):
        store.save_annotated("one", save_label(studies.parent / "label.png", {}), "final", {"slices": [1]})


def test_pictures_can_be_added_and_are_listed_again_after_a_restart(store: SafeLocalDatastore, studies: Path):
    assert store.add_image("four", str(save_picture(studies.parent / "x.jpg", seed=5)), {}) == "four"
    assert (studies / "four.jpg").is_file()
    store.refresh()
    assert "four" in store.list_images()
    broken = studies.parent / "broken.png"
    broken.write_bytes(save_picture(studies.parent / "y.png", size=(200, 200)).read_bytes()[:500])
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        store.add_image("five", str(broken), {})


def test_pictures_are_ranked_by_disagreement_as_slices_are():
    def scores(image: str, disagreement: float) -> ImageScores:
        table = np.array([[disagreement]], np.float32)
        return ImageScores(image, ("nuclei",), table, table, np.array([[0.2]], np.float32), 1.0, "nuclei@1")

    from progidiff.active_learning.settings import AcquisitionConfig

    picks = pick_slices(
        build_pool([scores("a", 0.1), scores("b", 0.5), scores("c", 0.3)]),
        3,
        config=AcquisitionConfig(noise=False),
        one_per_image=True,
    )
    assert [pick.image for pick in picks] == ["b", "c", "a"]
