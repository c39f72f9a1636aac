"""The HTTP layer's parts that need no server process."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from monailabel.datastore import xnat
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.utils.convert import dicom_to_nifti

from progidiff.dicomweb.segmentation import read_segmentation
from progidiff.errors import BusyError, GeometryError, NotFoundError, StoreError
from progidiff.images.reading import load_volume, read_grid
from progidiff.images.writing import save_array, save_mask
from progidiff.server.datastores.images import find_image
from progidiff.server.datastores.pacs import PacsDatastore, keep_own_slopes, open_remote
from support.images import make_affine, make_image, write_dicom, write_slice

CT, MR = "1.2.826.0.1.1", "1.2.826.0.1.2"


class Pacs:
    """The calls that the host's DICOMweb datastore makes, answered from folders of real DICOM files."""

    base_url = "http://pacs.example/dicom-web"

    def __init__(self, **folders: Path) -> None:
        self.series = {
            uid: [pydicom.dcmread(file) for file in sorted(folder.iterdir())] for uid, folder in folders.items()
        }
        self.down, self.refuses = False, 0
        self.stored: list[pydicom.Dataset] = []

    def search_for_series(self, search_filters: dict[str, Any]) -> list[dict[str, Any]]:
        if self.down:
            raise requests.ConnectionError("connection refused")
        heads = (files[0] for files in self.series.values())
        return [
            head.to_json_dict()
            for head in heads
            if all(str(getattr(head, key)) == value for key, value in search_filters.items())
        ]

    def retrieve_series(self, study: str, series: str) -> list[pydicom.Dataset]:
        return self.series[series]

    def store_instances(self, datasets: list[pydicom.Dataset]) -> pydicom.Dataset:
        if self.down:
            raise requests.ConnectionError("connection refused")
        answer = pydicom.Dataset()
        if self.refuses:
            failed = pydicom.Dataset()
            failed.FailureReason = self.refuses
            answer.FailedSOPSequence = [failed]
        else:
            self.stored += datasets
        return answer


@pytest.fixture
def pacs(tmp_path: Path) -> Pacs:
    ct = write_dicom(tmp_path / "ct", make_image(), make_affine("LPS"), uid=CT)
    mr = write_dicom(tmp_path / "mr", make_image(1), make_affine("LPS"), uid=MR, **{"0008x0060": "MR"})
    return Pacs(**{CT: ct, MR: mr})


@pytest.fixture
def app(pacs: Pacs, tmp_path: Path) -> Any:
    datastore = DICOMWebDatastore(pacs, {"Modality": "CT"}, cache_path=str(tmp_path / "cache"))
    return SimpleNamespace(datastore=lambda: datastore)


@pytest.mark.parametrize(("series", "modality"), [(CT, "CT"), (MR, "MR")])
def test_a_dicomweb_series_is_found_listed_or_not_and_keeps_its_modality(app: Any, series: str, modality: str):
    path = find_image(app, series)  # The host lists CT alone.
    volume = load_volume(path, info=app.datastore().get_image_info(series))
    assert (volume.modality, volume.modality_source) == (modality, "dicom")


@pytest.mark.parametrize("image", ["", "1.2.3.4", "..", "1.2/../../etc", "1" * 65, "plain"])
def test_what_is_no_series_of_the_dicomweb_server_is_a_404(app: Any, image: str):
    with pytest.raises(NotFoundError, match="There is no image"):
        find_image(app, image)


def test_a_dicomweb_server_that_is_down_is_named(app: Any, pacs: Pacs):
    pacs.down = True
    with pytest.raises(BusyError, match="does not answer.*connection refused"):
        find_image(app, CT)


@pytest.fixture
def datastore(pacs: Pacs, tmp_path: Path) -> PacsDatastore:
    return PacsDatastore(pacs, {"Modality": "CT"}, cache_path=str(tmp_path / "cache"))


def draw(datastore: PacsDatastore, tmp_path: Path) -> tuple[Path, np.ndarray, Any]:
    grid = read_grid(Path(datastore.get_image_uri(CT)))
    labels = np.zeros(grid.shape, np.uint8)
    labels[2:5, 3:9, 1] = 6
    return save_mask(labels, grid, tmp_path / "label.nii.gz"), labels, grid


def test_a_label_is_sent_on_the_slices_of_its_series(datastore: PacsDatastore, pacs: Pacs, tmp_path: Path):
    file, labels, grid = draw(datastore, tmp_path)
    datastore.save_label(CT, str(file), "final", {"label_info": [{"name": "liver", "idx": 6}]})
    (sent,) = pacs.stored
    read = read_segmentation(sent, grid)
    assert read.names == {1: "liver"}
    np.testing.assert_array_equal(read.labels, labels // 6)
    assert sent.StudyInstanceUID == pacs.series[CT][0].StudyInstanceUID


def test_a_label_that_the_dicomweb_server_does_not_take_is_told_with_its_reason(
    datastore: PacsDatastore, pacs: Pacs, tmp_path: Path
):
    file, _, _ = draw(datastore, tmp_path)
    info = {"label_info": [{"name": "liver", "idx": 6}]}
    pacs.refuses = 0xA700
    with pytest.raises(StoreError, match="reason 42752"):
        datastore.save_label(CT, str(file), "final", info)
    pacs.down = True
    with pytest.raises(StoreError, match="connection refused"):
        datastore.save_label(CT, str(file), "final", info)
    assert datastore.get_label_uri(CT, "original") == ""


def test_a_segmentation_is_not_put_on_slices_that_lie_elsewhere_than_the_image(datastore: PacsDatastore):
    datastore.get_image_uri(CT)
    path = Path(datastore.get_image_uri(CT))  # The first time the host names the file that it has copied.
    grid = read_grid(path)
    away = grid.affine.copy()
    away[2, 3] += 30
    save_array(np.zeros(grid.shape, np.int16), away, path)
    with pytest.raises(GeometryError, match="lie in different places"):
        datastore.find_sources(CT)


def test_the_hosts_own_datastores_write_segmentations_without_a_program_from_the_network(
    datastore: PacsDatastore, tmp_path: Path
):
    file, labels, grid = draw(datastore, tmp_path)
    app = SimpleNamespace(init_remote_datastore=lambda: datastore)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            ("monailabel.datastore.dicom", "dicom_to_nifti"),
            ("monailabel.datastore.xnat", "nifti_to_dicom_seg"),
            ("monailabel.interfaces.app", "DICOMWebDatastore"),
        ):
            patch.setattr(f"{module}.{name}", getattr(importlib.import_module(module), name))
        assert open_remote(app) is datastore
        assert app._download_dcmqi_tools() is None
        series = Path(datastore._datastore.image_path()) / CT
        written = Path(xnat.nifti_to_dicom_seg(str(series), str(file), [{"name": "liver"}]))
    read = read_segmentation(pydicom.dcmread(written), grid)
    written.unlink()
    assert read.names == {1: "liver"}
    np.testing.assert_array_equal(read.labels, labels // 6)


def test_an_image_that_was_converted_with_one_slope_for_all_slices_is_converted_again(tmp_path: Path):
    stored = np.random.default_rng(2).integers(0, 4000, (3, 20, 24), dtype=np.uint16)
    slopes = (1, 0.37, 2.0913)
    for z, slope in enumerate(slopes):
        write_slice(tmp_path / "series" / f"{z}.dcm", z, stored[z], "MR", slope, 0)
    image = tmp_path / "case.nii.gz"
    shutil.move(dicom_to_nifti(str(tmp_path / "series")), image)
    before = read_grid(image)
    assert keep_own_slopes(tmp_path / "series", image)
    stack, _ = load_volume(image, "MR").to_stack()
    for z, slope in enumerate(slopes):
        np.testing.assert_allclose(stack[z], stored[z] * slope, atol=slope / 2)
    np.testing.assert_allclose(read_grid(image).affine, before.affine, atol=1e-4)
    assert not keep_own_slopes(tmp_path / "series", image)  # Once is enough.
