"""Structures that a folder brings: added, saved under a new name from every client, asked back, renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.dataset import Dataset
from starlette.testclient import TestClient

from progidiff.dicomweb.multipart import Envelope
from progidiff.images.reading import load_volume
from support.apps import connect, open_app
from support.phantoms import write_phantom
from support.segment_files import write_seg_nrrd
from support.segmentations import make_seg, to_bytes

SHAPE = (32, 24, 8)
HEART = "SCT^80891009^Heart~^^"


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    studies = tmp_path_factory.mktemp("structures") / "studies"
    studies.mkdir()
    for seed, name in enumerate(("slicer", "asked", "renamed", "page", "coded", "seg")):
        write_phantom(studies / f"{name}.nii.gz", shape=SHAPE, seed=seed)
    return studies


@pytest.fixture(scope="module")
def client(studies: Path, tiny_model: Path) -> Iterator[TestClient]:
    with open_app(studies, tiny_model, "login", "off"):
        yield connect()


def add(client: TestClient, name: str, **more: Any) -> Any:
    return client.post("/progidiff/structures", json={"name": name, **more})


def list_own(client: TestClient) -> dict[str, Any]:
    answer = client.get("/progidiff/structures").json()
    return {entry["name"]: entry for entry in answer["structures"] if entry["is_own"]}


def make_label(studies: Path, image: str, values: dict[int, int]) -> bytes:
    """A square of `value` on file slices k."""
    array = np.zeros(SHAPE, np.uint8)
    for k, value in values.items():
        array[4:7, 4:7, k] = value
    image_file = nibabel.load(studies / f"{image}.nii.gz")
    path = studies.parent / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, image_file.affine), path)
    return path.read_bytes()


def save(client: TestClient, image: str, content: bytes, name: str = "label.nii.gz", **params: Any) -> Any:
    form = {"params": json.dumps(params)}
    return client.put("/datastore/label", params={"image": image}, data=form, files={"label": (name, content)})


def list_events(client: TestClient, user: str = "") -> list[str]:
    lines = client.get("/progidiff/annotations/export", params={"format": "jsonl"}).text.splitlines()
    return [row["reason"] for row in map(json.loads, lines) if row["event"] == "structure"]


def test_a_structure_is_added_with_its_words_and_nearly_known_names_are_asked_back(client: TestClient):
    added = add(client, "left ventricle", words=["LV cavity"], color="#3366cc", code={"value": "87878005"})
    assert added.status_code == 200, added.text
    answer = added.json()
    assert (answer["label_id"], answer["color"], answer["is_own"], answer["is_known"]) == (14, "#3366cc", True, False)
    assert (answer["slices"], answer["missing"], answer["words"]) == (0, 4, ["LV cavity"])
    assert answer["code"] == {"value": "87878005", "meaning": "left ventricle"}
    everything = client.get("/progidiff/structures").json()["structures"]
    liver = next(entry for entry in everything if entry["name"] == "liver")
    assert (liver["is_known"], liver["is_own"], liver["slices"], liver["missing"]) == (True, False, None, 0)
    assert "hepar" in liver["words"]

    for name, meant in (("livr", "liver"), ("Left ventrycle", "left ventricle")):
        asked = add(client, name)
        assert (asked.status_code, asked.json()["suggestions"]) == (422, [meant])
    assert add(client, "hepar").json()["suggestions"] == ["liver"]
    assert (add(client, "lv-cavity").status_code, add(client, "LEFT VENTRICLE").status_code) == (409, 409)
    insisted = add(client, "livr", confirm=True)
    assert (insisted.status_code, insisted.json()["name"]) == (200, "livr")
    script = add(client, "左心室", words=["сердце"])
    assert (script.status_code, script.json()["name"]) == (200, "左心室")
    assert any("'左心室'" in reason for reason in list_events(client))
    for body in ({}, {"name": ""}, {"name": "Segment_1"}, {"name": "x", "color": "red"}, {"name": "x", "by": "me"},
                 {"name": "x" * 200}, {"name": "gland", "code": {"value": "1"}}, {"name": ["x"]},
                 {"name": "gland", "code": {"value": "10200004"}}):  # fmt: skip
        refused = client.post("/progidiff/structures", json=body)
        assert refused.status_code in (409, 422), body
        assert refused.json()["detail"]


def test_a_new_segment_of_slicer_is_a_structure_of_the_folder_with_its_colour(client: TestClient, studies: Path):
    info = [{"name": "Aortic Root", "idx": 2, "color": [1.0, 0.5, 0.0]}, {"name": "liver", "idx": 1}]
    saved = save(client, "slicer", make_label(studies, "slicer", {2: 2, 3: 2, 5: 1}), label_info=info)
    assert saved.status_code == 200, saved.text
    own = list_own(client)["Aortic Root"]
    assert saved.json()["annotation"]["label_ids"] == {"liver": 6, "Aortic Root": own["label_id"]}
    assert saved.json()["annotation"]["new_structures"] == ["Aortic Root"]
    assert (own["color"], own["slices"], own["images"], own["missing"]) == ("#ff8000", 2, 1, 2)
    label = np.asarray(nibabel.load(studies / "labels" / "final" / "slicer.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, 6, own["label_id"]}
    assert any("'Aortic Root'" in reason for reason in list_events(client))
    page = client.get("/progidiff/review/slicer").json()
    assert page["colors"]["Aortic Root"] == "#ff8000"

    # Another spelling is the same structure, and another image gives it the same id.
    again = save(client, "page", make_label(studies, "page", {4: 1}), label_info=[{"name": "aortic_root", "idx": 1}])
    assert again.json()["annotation"]["label_ids"] == {"Aortic Root": own["label_id"]}
    assert list_own(client)["Aortic Root"]["slices"] == 3


def test_a_misspelt_segment_is_asked_back_and_nothing_is_saved(client: TestClient, studies: Path):
    content = make_label(studies, "asked", {2: 1})
    refused = save(client, "asked", content, label_info=[{"name": "spleeen", "idx": 1}])
    assert (refused.status_code, refused.json()["suggestions"]) == (422, ["spleen"])
    assert "confirm=true" in refused.json()["detail"]
    assert client.get("/progidiff/review/asked").json()["label"] is None
    assert "spleeen" not in list_own(client)
    painted = {
        "shape": list(SHAPE[::-1]),
        "slices": {"1": [{"structure": "spleeen", "box": [0, 1, 0, 1], "runs": [0, 1]}]},
    }
    asked = client.post("/progidiff/review/asked", json={"painted": painted, "base": 0})
    assert (asked.status_code, asked.json()["suggestions"]) == (422, ["spleen"])
    kept = client.post("/progidiff/review/asked", json={"painted": painted, "base": 0, "confirm": True})
    assert kept.status_code == 200, kept.text
    assert list_own(client)["spleeen"]["slices"] == 1  # labelled on one slice only: it says how many are missing
    assert list_own(client)["spleeen"]["missing"] == 3


def test_a_rename_keeps_the_labels_and_the_former_name_is_understood(client: TestClient, studies: Path):
    first = save(client, "renamed", make_label(studies, "renamed", {2: 1}), label_info=[{"name": "cyst", "idx": 1}])
    number = first.json()["annotation"]["label_ids"]["cyst"]
    file = studies / "labels" / "final" / "renamed.nii.gz"
    before = file.read_bytes()
    changed = client.post(f"/progidiff/structures/{number}", json={"name": "Zyste", "words": ["quiste"]})
    assert changed.status_code == 200, changed.text
    assert (changed.json()["name"], changed.json()["label_id"]) == ("Zyste", number)
    assert changed.json()["words"] == ["quiste", "cyst"]
    page = client.get("/progidiff/review/renamed").json()
    assert page["label_ids"] == {"Zyste": number}
    assert page["annotated"] == {"Zyste": None}
    assert file.read_bytes() == before
    assert (list_own(client)["Zyste"]["slices"], "cyst" in list_own(client)) == (1, False)
    # What is saved under the former name, or under the new one, is the same structure.
    for k, name in ((3, "cyst"), (4, "Zyste"), (5, "quiste")):
        content = make_label(studies, "renamed", {k: 1})
        z = load_volume(studies / "renamed.nii.gz").grid.arrange(np.arange(8)[None, None] * np.ones(SHAPE))[:, 0, 0]
        slices = [int(np.flatnonzero(z == k)[0])]
        saved = save(client, "renamed", content, slices=slices, label_info=[{"name": name, "idx": 1}])
        assert saved.json()["annotation"]["label_ids"] == {"Zyste": number}, name
    assert list_own(client)["Zyste"]["slices"] == 4
    assert any("'cyst' is called 'Zyste' now" in reason for reason in list_events(client))
    for label_id, body, status in ((6, {"name": "hepar"}, 404), (number, {}, 422), (200, {"name": "x"}, 404),
                                   (number, {"name": "livver"}, 422), (number, {"words": ["liver"]}, 422)):  # fmt: skip
        refused = client.post(f"/progidiff/structures/{label_id}", json=body)
        assert (refused.status_code, bool(refused.json()["detail"])) == (status, True), body


def test_files_with_names_colours_and_codes_bring_structures(client: TestClient, studies: Path, tmp_path: Path):
    affine = nibabel.load(studies / "coded.nii.gz").affine
    array = np.zeros(SHAPE, np.uint8)
    array[4:7, 4:7, 2], array[4:7, 4:7, 4] = 1, 2
    segments = [("Segment_1", 1), ("atrial appendix", 2)]
    terms = [HEART, "SCT^85756007^Tissue~^^"]
    content = write_seg_nrrd(tmp_path / "x.seg.nrrd", array, segments, affine, terms).read_bytes()
    saved = save(client, "coded", content, "x.seg.nrrd")
    assert saved.status_code == 200, saved.text
    own = list_own(client)
    assert own["Heart"]["code"] == {"value": "80891009", "meaning": "Heart"}
    assert (own["atrial appendix"]["code"], own["atrial appendix"]["color"]) == (None, "#80ad80")

    volume = load_volume(studies / "seg.nii.gz")
    mask = np.zeros(volume.grid.stack_shape, bool)
    mask[3, 2:5, 2:5] = True
    dataset = make_seg(volume, {"Label 1": mask})
    kind = Dataset()
    kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning = "57034009", "SCT", "Aortic arch"
    dataset.SegmentSequence[0].SegmentedPropertyTypeCodeSequence = [kind]
    dataset.SegmentSequence[0].RecommendedDisplayCIELabValue = [35000, 50000, 48000]
    series = client.get("/progidiff/ohif/images/seg").json()
    dataset.StudyInstanceUID = series["study"]
    dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = series["series"]
    envelope = Envelope.of("application/dicom")
    stored = client.post(
        "/proxy/dicom/stow/studies",
        content=b"".join(envelope.write([to_bytes(dataset)])),
        headers={"Content-Type": envelope.content_type},
    )
    assert stored.status_code == 200, stored.text
    arch = list_own(client)["Aortic arch"]
    assert (arch["code"], arch["slices"]) == ({"value": "57034009", "meaning": "Aortic arch"}, 1)
    assert arch["color"] not in ("#ffffff", "#000000")
