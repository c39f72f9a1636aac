"""DICOMweb of a real server on a local folder, asked by another project's client and the way OHIF asks."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient
from PIL import Image

from progidiff.dicomweb.multipart import Envelope
from progidiff.dicomweb.segmentation import read_segmentation
from progidiff.images.reading import load_label, load_volume
from progidiff.images.writing import save_array
from progidiff.testing import add_tiny_close_up
from support.phantoms import write_phantom
from support.segmentations import make_masks, make_seg, to_bytes
from support.series import rebuild
from support.servers import Server, copy_app, run_server

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
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    with run_server(
        studies, copy_app(folder), folder / "server.log", "model_dir", str(add_tiny_close_up(model)), "device", "cpu"
    ) as running:
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
    assert client.search_for_instances(study, series, search_filters={"InstanceNumber": "3"})[0]["00200013"][
        "Value"
    ] == [3]


@pytest.mark.parametrize("image", ["axial", "sagittal"])
def test_what_a_client_retrieves_is_the_image(server: Server, client: DICOMwebClient, image: str):
    study, series = find_series(client, image)
    datasets = client.retrieve_series(study, series)
    stack, lps = rebuild(datasets)
    volume = load_volume(server.studies / f"{image}.nii.gz")
    np.testing.assert_array_equal(stack, volume.to_stack()[0])
    np.testing.assert_allclose(np.diag([-1.0, -1, 1, 1]) @ lps, volume.grid.stack_affine, atol=1e-6)
    metadata = client.retrieve_series_metadata(study, series)
    assert [entry["00080018"]["Value"][0] for entry in metadata] == [ds.SOPInstanceUID for ds in datasets]
    frames = client.retrieve_instance_frames(study, series, datasets[2].SOPInstanceUID, [1])
    assert frames == [datasets[2].PixelData]


def test_pictures_have_the_type_that_was_asked_for(server: Server, client: DICOMwebClient):
    study, series = find_series(client, "sagittal")
    for path, accept, kind in (
        ("rendered", "image/png", "PNG"),
        ("thumbnail", "image/jpeg", "JPEG"),
        ("thumbnail", "*/*", "JPEG"),
    ):
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
        ("/wado/../../info", 422),
        ("/wado/studies/%2e%2e%2f%2e%2e/metadata", 422),
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
def test_a_mask_asked_for_by_series_has_the_voxel_order_of_the_series(
    server: Server, client: DICOMwebClient, tmp_path: Path, extension: str
):
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
    np.testing.assert_array_equal(
        served.array.T, volume.arrange(mask.array)
    )  # x runs fastest, as OHIF takes the buffer
    np.testing.assert_allclose(served.affine, volume.grid.stack_affine, atol=1e-4)
    assert served.array.any()


def test_edits_on_a_series_count_its_columns_rows_and_slices(server: Server, client: DICOMwebClient, tmp_path: Path):
    _, series = find_series(client, "sagittal")
    assert server.get(f"/progidiff/ohif/images/{series}").json()["listens_to_edits"]
    places = [(30, 10, 3), (31, 10, 3), (8, 35, 7)]
    signs = [True, True, False]
    edits = [{"kind": "click", "points": [place], "positive": sign} for place, sign in zip(places, signs, strict=True)]
    file = tmp_path / "mask.nrrd"
    params = {"prompt": "liver", "num_proposals": 2, "steps": 1, "result_extension": ".nrrd", "edits": edits}
    answer = server.infer(series, params, output="image")
    assert answer.status_code == 200, answer.text
    file.write_bytes(answer.content)
    mask = load_volume(file, "CT").array  # x, y, z of the series
    assert [bool(mask[place]) for place in places] == signs

    # The same places in voxels of the file, by what the review page is told, are the same question.
    told = server.get("/progidiff/review/sagittal").json()["voxels"]
    steps = np.array(told["steps"])
    voxels = [[(np.array(told["origin"]) + z * steps[0] + y * steps[1] + x * steps[2]).tolist()] for x, y, z in places]
    by_id = [{**edit, "points": points} for edit, points in zip(edits, voxels, strict=True)]
    same = server.infer("sagittal", {**params, "edits": by_id}, output="json").json()
    assert same["cached"]
    outside = server.infer(series, {**params, "edits": [{"kind": "click", "points": [[99, 0, 0]]}]}, output="json")
    assert outside.status_code == 422
    assert "outside of 'the series of sagittal'" in outside.json()["detail"]


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


def store(server: Server, *parts: bytes, study: str = "", **query: str) -> requests.Response:
    envelope = Envelope.of("application/dicom")
    address = f"{server.url}{WADO}/studies" + (f"/{study}" if study else "")
    return requests.post(
        address,
        params=query,
        data=b"".join(envelope.write(parts)),
        headers={"Content-Type": envelope.content_type},
        timeout=60,
    )


def make_seg_of(
    server: Server, client: DICOMwebClient, image: str, masks: dict[str, np.ndarray] | None = None
) -> tuple[pydicom.Dataset, dict]:
    study, series = find_series(client, image)
    volume = load_volume(server.studies / f"{image}.nii.gz")
    masks = masks or make_masks(volume)
    seg = make_seg(volume, masks)
    seg.StudyInstanceUID = study
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = series
    return seg, masks


def test_a_stored_segmentation_is_the_label_of_its_image(server: Server, client: DICOMwebClient):
    seg, masks = make_seg_of(server, client, "sagittal")
    answer = store(server, to_bytes(seg))
    assert answer.status_code == 200, answer.text
    assert answer.json()["00081199"]["Value"][0]["00081155"]["Value"] == [seg.SOPInstanceUID]
    image = load_volume(server.studies / "sagittal.nii.gz")
    label = load_label(next((server.studies / "labels" / "final").glob("sagittal.*")), like=image.grid)
    for name, index in (("spleen", 1), ("liver", 6)):
        np.testing.assert_array_equal(image.arrange(label) == index, masks[name])
    (saved,) = server.get("/progidiff/annotations", params={"image": "sagittal"}).json()["annotations"]
    assert sorted(saved["structures"]) == ["liver", "spleen"]
    assert store(server, to_bytes(seg), study=seg.StudyInstanceUID).status_code == 200
    assert (
        len(server.get("/progidiff/annotations", params={"image": "sagittal"}).json()["annotations"]) == 1
    )  # Twice the same is once.


def test_what_cannot_be_stored_is_refused_and_changes_nothing(server: Server, client: DICOMwebClient):
    before = server.get("/progidiff/annotations").json()
    seg, masks = make_seg_of(server, client, "axial")
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3.4"
    elsewhere = store(server, to_bytes(seg))
    assert elsewhere.status_code == 404
    assert "no image here" in elsewhere.json()["detail"]
    seg, _ = make_seg_of(server, client, "axial")
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = find_series(client, "sagittal")[1]
    assert store(server, to_bytes(seg)).status_code == 422
    seg, _ = make_seg_of(server, client, "axial", {"disagreement over 75 %": masks["liver"]})
    assert "no structure" in store(server, to_bytes(seg)).json()["detail"]
    seg, _ = make_seg_of(server, client, "axial")
    assert store(server, to_bytes(seg), study="1.2.3").status_code == 422
    assert store(server, b"no DICOM").status_code == 422
    assert store(server).status_code == 422
    assert (
        requests.post(
            f"{server.url}{WADO}/studies", data=b"x", headers={"Content-Type": "application/dicom"}, timeout=30
        ).status_code
        == 422
    )
    assert server.get("/progidiff/annotations").json() == before


def test_segments_that_overlap_are_stored_where_the_client_says_which_wins(server: Server, client: DICOMwebClient):
    seg, masks = make_seg_of(server, client, "sagittal")
    masks["spleen"] = masks["spleen"] | masks["liver"]
    seg, _ = make_seg_of(server, client, "sagittal", masks)
    refused = store(server, to_bytes(seg))
    assert refused.status_code == 422
    assert "overlap=later" in refused.json()["detail"]
    assert store(server, to_bytes(seg), overlap="first").status_code == 422
    answer = store(server, to_bytes(seg), overlap="later")
    assert answer.status_code == 200, answer.text
    (stored,) = answer.json()["00081199"]["Value"]
    assert stored["00081196"]["Value"] == [0xB000]
    assert "'liver' and 'spleen'" in stored["00000902"]["Value"][0]


def read_seg(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def test_the_agreement_of_proposals_is_a_fractional_seg_of_the_series(server: Server, client: DICOMwebClient):
    address, request = (
        "/progidiff/proposals/sagittal/dicom-seg",
        {"prompt": "liver and spleen", "num_proposals": 2, "steps": 1},
    )
    key = str(server.infer("sagittal", request, output="json").json()["proposals"])
    answer = server.get(address, params={"proposals": key, "show": "agreement"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/dicom"
    seg, series = read_seg(answer.content), find_series(client, "sagittal")[1]
    assert (seg.SegmentationType, seg.ReferencedSeriesSequence[0].SeriesInstanceUID) == ("FRACTIONAL", series)
    assert {segment.SegmentAlgorithmType for segment in seg.SegmentSequence} == {"AUTOMATIC"}
    assert set(np.unique(seg.pixel_array)) <= {0, 120, 240}
    consensus = read_seg(server.get(address, params={"proposals": key}).content)
    assert 0 < consensus.pixel_array.sum() <= (seg.pixel_array >= 120).sum()
    volume = load_volume(server.studies / "sagittal.nii.gz")
    mask = server.infer("sagittal", request, "image").content
    shown = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(mask)).dataobj)
    read = read_segmentation(consensus, volume.grid)
    for label, name in read.names.items():
        np.testing.assert_array_equal(read.labels == label, shown == {"spleen": 1, "liver": 6}[name])


def test_the_hosts_output_dicom_seg_gives_what_is_shown(server: Server):
    request, kinds = {"prompt": "liver and spleen", "num_proposals": 2, "steps": 1}, {}
    for show in ("consensus", "2", "all", "agreement"):
        answer = server.infer("axial", {**request, "show": show}, output="dicom_seg")
        assert answer.status_code == 200, answer.text
        seg = read_seg(answer.content)
        kinds[show] = (seg.SegmentationType, len(seg.SegmentSequence))
    assert kinds["consensus"][0] == kinds["2"][0] == "BINARY"
    assert kinds["agreement"][0] == "FRACTIONAL"
    assert kinds["all"] == ("BINARY", 2 * kinds["agreement"][1])
    files = {
        "file": ("a.nii.gz", (server.studies / "axial.nii.gz").read_bytes()),
        "params": (None, json.dumps(request)),
    }
    address = f"{server.url}/infer/progidiff"
    refused = requests.post(address, params={"output": "dicom_seg"}, files=files, timeout=60)
    assert refused.status_code == 422
    assert "output=image" in refused.json()["detail"]


def test_a_seg_that_cannot_be_made_is_refused(server: Server):
    answer = server.infer("axial", {"prompt": "liver and spleen", "num_proposals": 2, "steps": 1}, output="json")
    key, address = str(answer.json()["proposals"]), "/progidiff/proposals/axial/dicom-seg"
    for show in ("9", "disagreement", "nonsense"):
        assert server.get(address, params={"proposals": key, "show": show}).status_code == 422, show
    assert server.get(address, params={"proposals": "0" * 64}).status_code == 404
    assert server.get("/progidiff/proposals/nobody/dicom-seg").status_code == 404
    answer = requests.post(f"{server.url}{address}", timeout=30)
    assert (answer.status_code, "Download it" in answer.json()["detail"]) == (422, True)


def test_one_bad_instance_does_not_lose_the_others(server: Server, client: DICOMwebClient):
    seg, _ = make_seg_of(server, client, "axial")
    answer = store(server, b"no DICOM", to_bytes(seg))
    assert answer.status_code == 202
    assert len(answer.json()["00081199"]["Value"]) == len(answer.json()["00081198"]["Value"]) == 1


def test_ohif_gets_our_configuration_and_the_files_of_the_panel(server: Server):
    config = server.get("/ohif/app-config.js")
    assert "/proxy/dicom/wado" in config.text  # the host's
    assert "Folder of images" in config.text
    for name, kind in (("panel.js", "text/javascript"), ("viewer.js", "text/javascript"), ("panel.css", "text/css")):
        answer = server.get(f"/progidiff/ohif/files/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert len(answer.content) > 500
    assert server.get("/progidiff/ohif/files/nothing.js").status_code == 404
    assert server.get("/progidiff/ohif/files/%2e%2e%2fmain.py").status_code == 422


def test_masks_for_the_panel_are_the_proposals_in_the_order_of_the_series(server: Server, client: DICOMwebClient):
    study, series = find_series(client, "sagittal")
    request = {"prompt": "liver and spleen", "num_proposals": 2, "steps": 1}
    result = server.infer(series, request, output="json").json()
    described = server.get(f"/progidiff/ohif/images/{series}").json()
    assert described == {
        "image": "sagittal",
        "study": study,
        "series": series,
        "axial_slices": list(range(12)),
        "listens_to_edits": True,
    }
    volume = load_volume(server.studies / "sagittal.nii.gz")
    for show in ("consensus", "1", "2", "disagreement"):
        answer = server.get(f"/progidiff/ohif/masks/{series}", params={"proposals": result["proposals"], "show": show})
        depth, rows, columns = map(int, answer.headers["X-Shape"].split(","))
        z0, z1, y0, y1, x0, x1 = map(int, answer.headers["X-Box"].split(","))
        labels = np.zeros((depth, rows, columns), np.uint8)
        labels[z0:z1, y0:y1, x0:x1] = np.frombuffer(answer.content, np.uint8).reshape(z1 - z0, y1 - y0, x1 - x0)
        mask = np.asarray(
            nibabel.Nifti1Image.from_bytes(
                gzip.decompress(server.infer("sagittal", {**request, "show": show}, "image").content)
            ).dataobj
        )
        np.testing.assert_array_equal(np.where(labels > 200, labels - 200, labels), volume.arrange(mask))
    assert server.get(f"/progidiff/ohif/masks/{series}", params={"proposals": "0" * 64}).status_code == 404
    assert server.get(f"/progidiff/ohif/masks/{series}", params={"job": "unknown"}).status_code == 404
    assert (
        server.get(
            f"/progidiff/ohif/masks/{series}", params={"proposals": result["proposals"], "show": "9"}
        ).status_code
        == 422
    )


def test_a_label_sent_by_series_is_saved_on_the_grid_of_the_image(
    server: Server, client: DICOMwebClient, tmp_path: Path
):
    _, series = find_series(client, "sagittal")
    volume = load_volume(server.studies / "sagittal.nii.gz")
    stack = np.zeros(volume.to_stack()[0].shape, np.uint8)
    stack[3, 5:9, 4:20] = 6
    file = save_array(stack.transpose(2, 1, 0), volume.grid.stack_affine, tmp_path / "label.nrrd")
    form = {
        "params": (
            None,
            json.dumps({"slices": [3], "structures": ["liver"], "label_info": [{"name": "liver", "idx": 6}]}),
        )
    }
    answer = requests.put(
        f"{server.url}/datastore/label",
        params={"image": series, "tag": "final"},
        files={**form, "label": ("label.nrrd", file.read_bytes())},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    label = load_label(next((server.studies / "labels" / "final").glob("sagittal.*")), like=volume.grid)
    np.testing.assert_array_equal(volume.arrange(label)[3] == 6, stack[3] == 6)
    wrong = save_array(
        stack.transpose(2, 1, 0)[::-1], volume.grid.stack_affine @ np.diag([-1.0, 1, 1, 1]), tmp_path / "wrong.nrrd"
    )
    answer = requests.put(
        f"{server.url}/datastore/label",
        params={"image": series, "tag": "final"},
        files={**form, "label": ("wrong.nrrd", wrong.read_bytes())},
        timeout=60,
    )
    assert answer.status_code == 422, answer.text


def test_names_survive_a_restart(tmp_path: Path, tiny_model: Path):
    studies, found = tmp_path / "studies", []
    studies.mkdir()
    write_phantom(studies / "axial.nii.gz")
    for number in range(2):
        conf = ("model_dir", str(tiny_model), "device", "cpu")
        with run_server(studies, copy_app(tmp_path / str(number)), tmp_path / f"{number}.log", *conf) as running:
            client = DICOMwebClient(running.url + WADO)
            study, series = find_series(client, "axial")
            found.append(
                (
                    study,
                    series,
                    [entry["00080018"]["Value"] for entry in client.retrieve_series_metadata(study, series)],
                )
            )
    assert found[0] == found[1]
