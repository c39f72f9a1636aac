"""The HTTP layer's parts that need no server process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
import requests
from monailabel.datastore.dicom import DICOMWebDatastore

from progidiff.errors import BusyError, NotFoundError
from progidiff.images.reading import load_volume
from progidiff.server.datastores.images import find_image
from support.images import make_affine, make_image, write_dicom

CT, MR = "1.2.826.0.1.1", "1.2.826.0.1.2"


class Pacs:
    """The calls that the host's DICOMweb datastore makes, answered from folders of real DICOM files."""

    base_url = "http://pacs.example/dicom-web"

    def __init__(self, **folders: Path) -> None:
        self.series = {
            uid: [pydicom.dcmread(file) for file in sorted(folder.iterdir())] for uid, folder in folders.items()
        }
        self.down = False

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
