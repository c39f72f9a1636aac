"""A server on Orthanc: MR too, labels as DICOM SEG and back, proposals that label nothing. Skipped where Orthanc is
missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
from dicomweb_client import DICOMwebClient

from progidiff.dicomweb.multipart import Envelope
from progidiff.images.reading import load_label, load_volume
from progidiff.images.writing import save_mask
from progidiff.testing import add_tiny_close_up
from support.pacs import find_lack, run_orthanc
from support.phantoms import write_phantom
from support.segmentations import make_seg, to_bytes
from support.servers import Server, copy_app, run_server

pytestmark = pytest.mark.skipif(bool(find_lack()), reason=find_lack() or "-")

SAGITTAL = np.array([[0, 0, 5.5, -160], [-6.5, 0, 0, 150], [0, -5.0, 0, 70], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("pacs")
    images = folder / "images"
    images.mkdir()
    write_phantom(images / "axial.nii.gz")
    (images / "axial.json").write_text('{"modality": "CT"}')
    write_phantom(images / "sagittal.nii.gz", shape=(40, 12, 44), seed=1, affine=SAGITTAL)
    (images / "sagittal.json").write_text('{"modality": "MR"}')
    with run_orthanc(folder, images) as address:
        yield images, address


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pacs: tuple[Path, str]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    before = dict(os.environ)
    os.environ["MONAI_LABEL_DICOMWEB_CACHE_PATH"] = str(folder / "cache")
    os.environ["PATH"] = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if not shutil.which("itkimage2segimage", path=part)
    )
    model = shutil.copytree(tiny_model, folder / "model")
    conf = ("model_dir", str(add_tiny_close_up(model)), "device", "cpu", "store", str(folder / "state"))
    try:
        with run_server(pacs[1], copy_app(folder), folder / "server.log", *conf) as running:  # type: ignore[arg-type]
            yield running
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def series(server: Server) -> dict[str, tuple[str, str]]:
    found = DICOMwebClient(server.url + "/proxy/dicom/qido").search_for_series()
    return {
        entry["00100020"]["Value"][0]: (entry["0020000D"]["Value"][0], entry["0020000E"]["Value"][0]) for entry in found
    }


def wait_for(condition, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def store_segmentation(pacs: tuple[Path, str], of: tuple[str, str], kind: str, uid: str) -> None:
    """Put a liver on one slice of the image `axial` into the PACS, past the server."""
    volume = load_volume(pacs[0] / "axial.nii.gz")
    mask = np.zeros(volume.to_stack()[0].shape, bool)
    mask[3, 5:20, 5:20] = True
    seg = make_seg(volume, {"liver": mask})
    seg.StudyInstanceUID, seg.PatientID = of[0], "axial"
    seg.SOPInstanceUID, seg.SeriesInstanceUID = f"{uid}.1", f"{uid}.2"
    seg.file_meta.MediaStorageSOPInstanceUID = seg.SOPInstanceUID
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = of[1]
    seg.SegmentSequence[0].SegmentAlgorithmType = kind
    DICOMwebClient(pacs[1]).store_instances([seg])


def test_ct_and_mr_are_images(server: Server, series: dict[str, tuple[str, str]]):
    assert set(series) == {"axial", "sagittal"}
    assert server.get("/info/").json()["datastore"]["total"] == 2


def test_searches_keep_their_query_and_nothing_else_is_reached(server: Server, series: dict[str, tuple[str, str]]):
    found = server.get("/proxy/dicom/qido/studies", params={"PatientID": "axial"}).json()
    assert [study["00100020"]["Value"] for study in found] == [["axial"]]
    study, uid = series["axial"]
    assert len(server.get(f"/proxy/dicom/wado/studies/{study}/series/{uid}/metadata").json()) == 8
    for path in ("system", "wado/instances/1/file", "qido/../system", "wado/servers", "changes"):
        assert server.get(f"/proxy/dicom/{path}").status_code in (404, 422), path


@pytest.mark.parametrize("image", ["axial", "sagittal"])
def test_the_image_is_the_one_that_was_put_in(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]], image: str, tmp_path: Path
):
    _, uid = series[image]
    answer = server.infer(uid, {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="image")
    assert answer.status_code == 200, answer.text
    (tmp_path / "mask.nii.gz").write_bytes(answer.content)
    source = load_volume(pacs[0] / f"{image}.nii.gz")
    mask = load_volume(tmp_path / "mask.nii.gz", "CT")
    assert mask.to_stack()[0].shape == source.to_stack()[0].shape
    np.testing.assert_allclose(mask.grid.stack_affine, source.grid.stack_affine, atol=1e-3)
    described = server.get(f"/progidiff/ohif/images/{uid}").json()
    assert described["axial_slices"] == list(range(source.to_stack()[0].shape[0]))


def test_a_label_that_draws_nothing_is_refused_and_counts_for_nothing(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]], tmp_path: Path
):
    _, uid = series["sagittal"]
    (tmp_path / "mask.nii.gz").write_bytes(
        server.infer(uid, {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="image").content
    )
    image = load_volume(tmp_path / "mask.nii.gz", "MR")
    file = save_mask(np.zeros(image.array.shape, np.uint8), image.grid, tmp_path / "label.nii.gz")
    form = {
        "params": (None, json.dumps({"structures": ["liver"], "slices": [1]})),
        "label": ("label.nii.gz", file.read_bytes()),
    }
    answer = requests.put(
        f"{server.url}/datastore/label", params={"image": uid, "tag": "final"}, files=form, timeout=120
    )
    assert (answer.status_code, answer.json()["error"]) == (422, "RequestError"), answer.text
    assert "skip" in answer.json()["detail"]
    assert server.get("/info/").json()["datastore"]["completed"] == 0


def test_a_saved_label_is_a_seg_in_the_pacs_and_comes_back_complete_and_a_proposal_labels_nothing(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]], tmp_path: Path
):
    study, uid = series["sagittal"]
    store_segmentation(pacs, series["axial"], "AUTOMATIC", "2.25.91")  # a proposal, which must not label its image
    mask = server.infer(uid, {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="image")
    (tmp_path / "mask.nii.gz").write_bytes(mask.content)
    image = load_volume(tmp_path / "mask.nii.gz", "MR")
    labels = np.zeros(image.array.shape, np.uint8)
    stack = image.arrange(labels)
    stack[4:6, 3:9, 5:20] = 6  # two of twelve slices
    stack[5, 12:15, 5:20] = 1
    file = save_mask(labels, image.grid, tmp_path / "label.nii.gz")
    names = [
        {"name": "aorta", "idx": 8},
        {"name": "liver", "idx": 6},
        {"name": "spleen", "idx": 1},
    ]  # more than is drawn, in another order
    form = {"params": (None, json.dumps({"label_info": names})), "label": ("label.nii.gz", file.read_bytes())}
    answer = requests.put(
        f"{server.url}/datastore/label", params={"image": uid, "tag": "final"}, files=form, timeout=120
    )
    assert answer.status_code == 200, answer.text

    client = DICOMwebClient(pacs[1])
    (seg,) = client.search_for_series(study, search_filters={"Modality": "SEG"})
    (dataset,) = client.retrieve_series(study, seg["0020000E"]["Value"][0])
    assert {(segment.SegmentLabel, segment.SegmentAlgorithmType) for segment in dataset.SegmentSequence} == {
        ("liver", "SEMIAUTOMATIC"),
        ("spleen", "SEMIAUTOMATIC"),
    }
    assert dataset.NumberOfFrames < 12  # empty frames are left out
    saved = max(
        server.get("/progidiff/annotations", params={"image": uid}).json()["annotations"],
        key=lambda entry: entry["sequence"],
    )
    for segment in dataset.SegmentSequence:
        assert segment.SegmentDescription.startswith(
            f"{segment.SegmentLabel}. Save {saved['sequence']} of {saved['time']}"
        )
    assert server.get("/info/").json()["datastore"]["completed"] == 1  # saving a label has the lists read anew

    # What another server makes of the PACS alone, with nothing kept.
    code = (
        "import sys; from progidiff.server.datastores import pacs as p; from "
        "monailabel.datastore.dicom import DICOMwebClientX as C;d = p.PacsDatastore(client=C(url=sys.argv[1]), "
        "search_filter={'Modality': 'CT'}, cache_path=sys.argv[2]);d.get_image_uri(sys.argv[3]); print('FILE', "
        "d.get_label_uri(sys.argv[3], 'final', sys.argv[3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pacs[1], str(tmp_path / "cache"), uid],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    back = Path(next(line for line in done.stdout.splitlines() if line.startswith("FILE")).removeprefix("FILE "))
    np.testing.assert_array_equal(image.arrange(load_label(back, like=image.grid)), stack)
    assert nibabel.load(back).shape == image.array.shape


def test_the_agreement_goes_into_the_pacs_and_labels_nothing(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]]
):
    study, uid = series["axial"]
    assert server.infer(uid, {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="json").status_code == 200
    answer = requests.post(
        f"{server.url}/progidiff/proposals/{uid}/dicom-seg", params={"show": "agreement"}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    stored = answer.json()
    assert (stored["study"], stored["segments"]) == (study, ["liver"])
    client = DICOMwebClient(pacs[1])
    (dataset,) = client.retrieve_series(study, stored["series"])
    assert (dataset.SegmentationType, dataset.ReferencedSeriesSequence[0].SeriesInstanceUID) == ("FRACTIONAL", uid)
    assert set(np.unique(dataset.pixel_array)) - {0} <= {120, 240}
    assert "no calibrated probability" in dataset.SegmentSequence[0].SegmentDescription
    assert client.retrieve_instance_rendered(study, stored["series"], stored["instance"], ("image/png",))
    assert server.get("/info/").json()["datastore"]["completed"] == 1


def test_a_drawn_segmentation_in_the_pacs_labels_its_image(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]]
):
    assert server.get("/info/").json()["datastore"]["completed"] == 1
    store_segmentation(pacs, series["axial"], "MANUAL", "2.25.92")
    wait_for(lambda: server.get("/info/").json()["datastore"]["completed"] != 1)
    assert server.get("/info/").json()["datastore"]["completed"] == 2


def test_a_segmentation_stored_through_the_server_is_a_label(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]]
):
    study, uid = series["axial"]
    volume = load_volume(pacs[0] / "axial.nii.gz")
    mask = np.zeros(volume.to_stack()[0].shape, bool)
    mask[2, 5:20, 5:20] = True
    seg = make_seg(volume, {"liver": mask})
    seg.StudyInstanceUID = study
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = uid
    envelope = Envelope.of("application/dicom")
    answer = requests.post(
        f"{server.url}/proxy/dicom/wado/studies",
        data=b"".join(envelope.write([to_bytes(seg)])),
        headers={"Content-Type": envelope.content_type},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    saved = max(
        server.get("/progidiff/annotations", params={"image": uid}).json()["annotations"],
        key=lambda entry: entry["sequence"],
    )
    assert saved["structures"] == ["liver"]


def read_segment(pacs: tuple[Path, str], image: tuple[str, str], structure: str) -> np.ndarray:
    """A segment of the newest SEG that has it, as (columns, rows, slices) of the image's series: by the standard and
    the positions of its frames, not by the server's code.
    """
    client, (study, uid) = DICOMwebClient(pacs[1]), image
    across, down = np.array(client.retrieve_series_metadata(study, uid)[0]["00200037"]["Value"]).reshape(2, 3)
    normal = np.cross(across, down)
    places = sorted(
        float(normal @ np.array(one["00200032"]["Value"])) for one in client.retrieve_series_metadata(study, uid)
    )
    found = [
        dataset
        for series in client.search_for_series(study, search_filters={"Modality": "SEG"})
        for dataset in client.retrieve_series(study, series["0020000E"]["Value"][0])
        if dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == uid
        and structure in [segment.SegmentLabel for segment in dataset.SegmentSequence]
    ]
    dataset = max(found, key=lambda one: (one.ContentDate, one.ContentTime, one.SOPInstanceUID))
    (number,) = [one.SegmentNumber for one in dataset.SegmentSequence if one.SegmentLabel == structure]
    mask = np.zeros((dataset.Columns, dataset.Rows, len(places)), bool)
    for frame, group in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            place = float(normal @ np.array(group.PlanePositionSequence[0].ImagePositionPatient, float))
            mask[:, :, int(np.abs(np.array(places) - place).argmin())] = frame.T
    return mask


def test_what_was_clicked_on_a_series_is_what_its_segmentation_holds_voxel_by_voxel(
    server: Server, pacs: tuple[Path, str], series: dict[str, tuple[str, str]], tmp_path: Path
):
    _, uid = series["sagittal"]
    inside, outside = [[9, 20, 4], [30, 30, 4]], [[12, 20, 4]]
    edits = [{"kind": "click", "points": [place]} for place in inside]
    edits += [{"kind": "click", "points": [place], "positive": False} for place in outside]
    asked = {"prompt": "pancreas", "num_proposals": 2, "edits": edits, "result_extension": ".nrrd"}
    proposed = server.infer(uid, asked, output="json")
    assert proposed.status_code == 200, proposed.text
    shown = tmp_path / "shown.nrrd"
    shown.write_bytes(server.infer(uid, asked, output="image").content)
    wanted = load_volume(shown, "MR").array > 0  # columns, rows, slices of the series: how OHIF takes it

    page = server.get(f"/progidiff/review/{uid}").json()
    assert page["listens_to_edits"]
    decisions = {
        "proposals": proposed.json()["proposals"],
        "volume": {"pancreas": {"rule": "consensus"}},
        "base": page["sequence"],
    }
    saved = requests.post(f"{server.url}/progidiff/review/{uid}", json=decisions, timeout=120)
    assert saved.status_code == 200, saved.text

    mask = read_segment(pacs, series["sagittal"], "pancreas")
    assert [bool(mask[tuple(place)]) for place in [*inside, *outside]] == [True, True, False]
    np.testing.assert_array_equal(mask, wanted)
    saves = server.get("/progidiff/annotations", params={"image": uid}).json()["annotations"]
    last = max(saves, key=lambda entry: entry["sequence"])
    assert (last["structures"], last["source"]["steering"]) == (["pancreas"], "2 clicks inside, 1 click outside")
