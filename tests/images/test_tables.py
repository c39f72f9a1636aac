"""The tables of formats and of modalities are the only places that know them: one more row is all it takes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from monailabel.config import settings
from numpy.typing import NDArray

from progidiff.dicomweb.catalogue import describe_file
from progidiff.dicomweb.frames import Series
from progidiff.errors import ImageError, RequestError
from progidiff.evaluation.prelabel import list_images
from progidiff.images import formats, modality
from progidiff.images.choosing import keep_one_image
from progidiff.images.folders import list_volumes
from progidiff.images.formats import Format, Use, find_format, strip_suffix
from progidiff.images.geometry import Grid
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.modality import Modality, check_modality
from progidiff.images.raw import Place, Raw
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.images.writing import save_mask
from progidiff.proposals.request import InferOptions
from progidiff.server.datastores.local import SafeLocalDatastore, list_patterns, open_annotations
from progidiff.server.uploads import keep_upload
from progidiff.training_runs.options import TrainingOptions
from support.images import make_affine, make_image

AFFINE = make_affine("LPS")


def read(path: Path) -> Raw:
    return Raw(np.load(path), AFFINE)


def read_place(path: Path) -> Place:
    return Place(np.load(path, mmap_mode="r").shape, AFFINE)


def write(array: NDArray[Any], grid: Grid, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def ask(params: dict[str, str]) -> InferOptions:
    return InferOptions.from_params(params, {}, 8, [])


@pytest.fixture
def npy(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = Use.IMAGE | Use.UPLOAD | Use.SESSION | Use.LABEL | Use.ANSWER
    row = Format(".npy", "NumPy", "volume", uses, read, read_place, write)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, row))


@pytest.mark.usefixtures("npy")
def test_a_row_is_all_that_a_format_needs(tmp_path: Path):
    studies = tmp_path / "studies"
    studies.mkdir()
    image = studies / "case.NPY"
    np.save(studies / "other.npy", make_image(1))
    (studies / "other.npy").rename(image)
    volume = load_volume(image, "CT")
    assert volume.name == strip_suffix(image) == "case"
    assert read_grid(image).shape == volume.array.shape
    # Listed, added and labelled.
    state = tmp_path / "state"
    store = SafeLocalDatastore(
        str(studies),
        state,
        open_annotations(state, str(studies)),
        extensions=list_patterns(settings.MONAI_LABEL_DATASTORE_FILE_EXT),
    )
    np.save(tmp_path / "new.npy", make_image(2))
    store.add_image("new", str(tmp_path / "new.npy"), {})
    assert sorted(store.list_images()) == ["case", "new"]
    mask = (volume.array > 1000).astype(np.uint8)
    label = save_mask(mask, volume.grid, tmp_path / "label.npy")
    assert np.array_equal(load_label(label, volume.grid), mask)
    assert store.save_annotated("new", label, "final", {"label_info": [{"name": "spleen", "idx": 1}]}).label_id == "new"
    assert (studies / "labels" / "final" / "new.npy").is_file()
    # Sent, read by a batch, and answered with.
    with ExitStack() as uploads, image.open("rb") as content:
        upload: Any = SimpleNamespace(filename="X.Npy", file=content)
        assert Path(keep_upload(upload, uploads)).suffix == ".npy"
    assert [path.name for path in list_images(studies)] == ["case.NPY", "new.npy"]
    assert ask({"prompt": "liver", "result_extension": ".npy"}).result_extension == ".npy"
    keep_one_image(studies, "new.npy")
    assert sorted(path.name for path in studies.rglob("*.npy")) == ["new.npy"]


def test_the_first_of_two_files_of_one_name_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("b.nii.gz", "a.nii.gz", "a.nii", "A.NRRD", "note.txt", ".c.nii"):
        (tmp_path / name).touch()
    assert [path.name for path in list_volumes(tmp_path).values()] == ["A.NRRD", "a.nii", "b.nii.gz"]
    assert "'a.nii.gz'. 'a.nii' has the same name" in caplog.text


def test_without_its_row_the_format_is_unknown(tmp_path: Path):
    np.save(tmp_path / "case.npy", make_image())
    assert find_format(tmp_path / "case.npy") is None
    with pytest.raises(ImageError, match="no image format"):
        load_volume(tmp_path / "case.npy")
    with pytest.raises(RequestError, match="result_extension"):
        ask({"prompt": "liver", "result_extension": ".npy"})


def test_a_row_is_all_that_a_modality_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = save_mask(make_image(), Grid((11, 9, 7), AFFINE), tmp_path / "case.nii.gz")
    (tmp_path / "case.json").write_text(json.dumps({"Modality": "PT"}))
    assert "is a PT image" in describe_file("case", image).refused
    row = Modality(
        name="PT",
        spellings=("PET",),
        window=(0.0, 9000.0),
        body_above=100.0,
        presets=(),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.128",
        image_type="OTHER",
        rescale_type="US",
        is_magnetic=False,
        bias_field=0.0,
    )
    monkeypatch.setattr(modality, "MODALITIES", (*modality.MODALITIES, row))
    volume = load_volume(image)
    assert (volume.modality, volume.modality_source) == ("PT", "sidecar")
    assert compute_window(volume) == row.window
    assert compute_body_threshold(volume) == 100.0
    assert check_modality("pet", "modality") == "PT"
    entry = describe_file("case", image)
    assert (entry.refused, entry.identity.modality) == ("", "PT")
    slice_ = Series.of(entry.identity, volume).dataset(0)
    assert (slice_.Modality, slice_.SOPClassUID) == ("PT", row.sop_class_uid)
    assert ask({"prompt": "liver", "modality": "PT"}).modality == "PT"
    assert TrainingOptions.from_params("progidiff_adapt", {"modality": "PT"})[0].modality == "PT"
