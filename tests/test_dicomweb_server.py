"""DICOMweb of a real server on a local folder, asked by another project's client and the way OHIF asks."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
from dicomweb_client import DICOMwebClient
from PIL import Image

from conftest import Server, copy_app, run_server, write_phantom
from progidiff.volume import load_volume
from test_dicomweb import rebuild

SAGITTAL = np.array([[0, 0, 5.5, -160], [-6.5, 0, 0, 150], [0, -5.0, 0, 70], [0, 0, 0, 1.0]])
QIDO, WADO = "/proxy/dicom/qido", "/proxy/dicom/wado"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / "axial.nii.gz")
    write_phantom(studies / "sagittal.nii.gz", shape=(40, 12, 44), seed=1, affine=SAGITTAL)
    sheared = SAGITTAL.copy()
    sheared[0, 0] = 3
    write_phantom(studies / "sheared.nii.gz", seed=2, affine=sheared)
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    with run_server(studies, copy_app(folder), folder / "server.log", "model_dir", str(tiny_model), "device", "cpu") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> DICOMwebClient:
    return DICOMwebClient(server.url + WADO)


def find_series(client: DICOMwebClient, image: str) -> tuple[str, str]:
    (found,) = client.search_for_series(search_filters={"PatientID": image})
    return found["0020000D"]["Value"][0], found["0020000E"]["Value"][0]


def test_studies_are_listed_and_what_cannot_be_served_is_left_out(client: DICOMwebClient):
    studies = client.search_for_studies()
    assert [study["00100020"]["Value"][0] for study in studies] == ["axial", "sagittal"]
    assert [study["00201208"]["Value"][0] for study in studies] == [8, 12]
    assert all(study["00080061"]["Value"] == ["CT"] for study in studies)
    assert len(client.search_for_studies(limit=1, offset=1)) == 1
    assert client.search_for_studies(search_filters={"PatientName": "*xia*"})[0]["00100020"]["Value"] == ["axial"]
    study, series = find_series(client, "axial")
    assert len(client.search_for_instances(study, series)) == 8
    assert len(client.search_for_instances(search_filters={"PatientID": "sagittal"})) == 12
    assert client.search_for_instances(study, series, search_filters={"InstanceNumber": "3"})[0]["00200013"]["Value"] == [3]


@pytest.mark.parametrize("image", ["axial", "sagittal"])
def test_what_a_client_retrieves_is_the_image(server: Server, client: DICOMwebClient, image: str):
    study, series = find_series(client, image)
    datasets = client.retrieve_series(study, series)
    stack, lps = rebuild(datasets)
    volume = load_volume(server.studies / f"{image}.nii.gz")
    np.testing.assert_array_equal(stack, volume.to_stack()[0])
    np.testing.assert_allclose(np.diag([-1.0, -1, 1, 1]) @ lps, volume.stack_affine, atol=1e-6)
    metadata = client.retrieve_series_metadata(study, series)
    assert [entry["00080018"]["Value"][0] for entry in metadata] == [ds.SOPInstanceUID for ds in datasets]
    frames = client.retrieve_instance_frames(study, series, datasets[2].SOPInstanceUID, [1])
    assert frames == [datasets[2].PixelData]


def test_the_uids_are_the_same_after_a_restart(server: Server, client: DICOMwebClient, tmp_path: Path, tiny_model: Path):
    # Another server, with a state folder of its own, on the same files.
    with run_server(
        server.studies, copy_app(tmp_path), tmp_path / "server.log", "model_dir", str(tiny_model), "device", "cpu", "store", str(tmp_path / "store")
    ) as again:
        assert find_series(DICOMwebClient(again.url + WADO), "sagittal") == find_series(client, "sagittal")


def test_pictures_have_the_type_that_was_asked_for(server: Server, client: DICOMwebClient):
    study, series = find_series(client, "sagittal")
    for path, accept, kind in (("rendered", "image/png", "PNG"), ("thumbnail", "image/jpeg", "JPEG"), ("thumbnail", "*/*", "JPEG")):
        answer = server.get(f"{WADO}/studies/{study}/series/{series}/{path}", headers={"Accept": accept})
        assert Image.open(io.BytesIO(answer.content)).format == kind
    assert server.get(f"{WADO}/studies/{study}/series/{series}/rendered?viewport=0,0").status_code == 422


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/qido/patients", 404),
        ("/qido/studies?Colour=red", 422),
        ("/qido/studies?limit=-1", 422),
        ("/wado/studies/1.2.3/metadata", 404),
        ("/wado/studies/1.2.3/series/1.2/metadata", 404),
        ("/system", 404),
        ("/wado/../../info", 404),
        ("/wado/studies/%2e%2e%2f%2e%2e/metadata", 404),
    ],
)
def test_other_addresses_are_refused_with_a_reason(server: Server, path: str, status: int):
    url = server.url + "/proxy/dicom" + path
    prepared = requests.Request("GET", url).prepare()
    prepared.url = url  # as typed, dots and all
    answer = requests.Session().send(prepared, timeout=30)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]


def test_unknown_instances_and_frames_are_not_found(server: Server, client: DICOMwebClient):
    study, series = find_series(client, "axial")
    instance = client.search_for_instances(study, series)[0]["00080018"]["Value"][0]
    base = f"{WADO}/studies/{study}/series/{series}/instances"
    assert server.get(f"{base}/1.2.3/frames/1").status_code == 404
    assert server.get(f"{base}/{instance}/frames/2").status_code == 404
    assert server.get(f"{base}/{instance}/frames/1").status_code == 200
    other = find_series(client, "sagittal")[0]
    assert server.get(f"{WADO}/studies/{other}/series/{series}/metadata").status_code == 404


@pytest.mark.parametrize("extension", [".nrrd", ".nii.gz"])
def test_a_mask_asked_for_by_series_has_the_voxel_order_of_the_series(server: Server, client: DICOMwebClient, tmp_path: Path, extension: str):
    _, series = find_series(client, "sagittal")
    params = {"prompt": "liver", "num_proposals": 2, "steps": 1, "result_extension": extension}
    by_id = tmp_path / f"by_id{extension}"
    by_id.write_bytes(server.infer("sagittal", params, output="image").content)
    by_series = tmp_path / f"by_series{extension}"
    answer = server.infer(series, params, output="image")
    assert answer.status_code == 200, answer.text
    by_series.write_bytes(answer.content)
    volume = load_volume(server.studies / "sagittal.nii.gz")
    mask = load_volume(by_id, "CT")
    served = load_volume(by_series, "CT")
    np.testing.assert_array_equal(served.array.T, volume.arrange(mask.array))  # x runs fastest, as OHIF takes the buffer
    np.testing.assert_allclose(served.affine, volume.stack_affine, atol=1e-4)
    assert served.array.any()


def test_a_series_that_is_not_here_is_not_found(server: Server):
    answer = server.infer("1.2.840.3", {"prompt": "liver"})
    assert answer.status_code == 404
    assert "There is no image" in answer.json()["detail"]


def test_a_replaced_image_is_another_series(server: Server, client: DICOMwebClient):
    path = write_phantom(server.studies / "replaced.nii.gz", seed=3)
    deadline = time.monotonic() + 20  # The host's folder watcher notices new files.
    while not client.search_for_series(search_filters={"PatientID": "replaced"}) and time.monotonic() < deadline:
        time.sleep(0.2)
    first = find_series(client, "replaced")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), path)
    assert find_series(client, "replaced") != first
