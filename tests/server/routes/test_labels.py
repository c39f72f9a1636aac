"""The datastore's routes on a real server: stock clients notice nothing, and every way out of the folder is closed.

Each traversal here was tried on the stock routes, where it worked.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests
from monailabel.client import MONAILabelClient

from progidiff.labels.segments import read_names
from support.phantoms import write_phantom
from support.segment_files import write_seg_nrrd
from support.servers import Server, copy_app, run_server

SHAPE = (32, 24, 8)
LIVER = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("labels")
    studies = folder / "studies"
    studies.mkdir()
    for seed, name in enumerate(("stock", "slices", "proposals", "history", "refused", "removed", "named", "versions")):
        write_phantom(studies / f"{name}.nii.gz", shape=SHAPE, seed=seed)
    (folder / "secret.nii.gz").write_bytes(b"secret")
    with run_server(
        studies, copy_app(folder), folder / "server.log", "model_dir", str(tiny_model), "device", "cpu"
    ) as running:
        yield running


def build_label(server: Server, image: str, values: dict[int, int]) -> bytes:
    array = np.zeros(SHAPE, np.uint8)
    for k, value in values.items():
        array[4:7, 4:7, k] = value
    return nibabel.Nifti1Image(array, nibabel.load(server.studies / f"{image}.nii.gz").affine).to_bytes()


def put_label(
    server: Server,
    image: str,
    content: bytes,
    params: dict[str, Any] | str | None = None,
    tag: str = "final",
    name: str = "label.nii",
) -> requests.Response:
    text = params if isinstance(params, str) else json.dumps(params or {})
    return requests.put(
        f"{server.url}/datastore/label",
        params={"image": image, "tag": tag},
        files={"params": (None, text), "label": (name, content)},
        timeout=120,
    )


def list_files(server: Server) -> dict[Path, bytes]:
    """Everything that matters under the server's parent folder: what a request could have written where it must not."""
    ignored = ("server.log", ".lock", "app.log")
    root = server.studies.parent
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(ignored) and "tmp" not in path.parts
    }


def test_the_stock_client_saves_downloads_and_removes_a_label(server: Server, tmp_path: Path):
    client = MONAILabelClient(server.url, str(tmp_path))
    label = tmp_path / "mine.nii.gz"
    label.write_bytes(gzip.compress(build_label(server, "stock", {2: 1})))
    answer = client.save_label("stock", str(label), params={"label_info": [{"name": "liver", "idx": 1}]})
    assert (answer["image"], answer["label"]) == ("stock", "stock")
    assert answer["annotation"]["structures"] == ["liver"]
    assert answer["annotation"]["slices"] is None
    assert client.datastore()["objects"]["stock"]["labels"]["final"]["info"]["label_info"] == [
        {"name": "liver", "idx": LIVER}
    ]
    assert client.info()["datastore"]["completed"] >= 1
    assert (
        server.get("/datastore/label/info", params={"label": "stock", "tag": "final"}).json()["annotation"]
        == answer["annotation"]["sequence"]
    )
    image = nibabel.Nifti1Image.from_bytes(
        gzip.decompress(server.get("/datastore/label", params={"label": "stock", "tag": "final"}).content)
    )
    assert set(np.unique(np.asarray(image.dataobj))) == {0, LIVER}
    assert (
        requests.head(
            f"{server.url}/datastore/label", params={"image": "stock", "tag": "final"}, timeout=30
        ).status_code
        == 200
    )
    assert (
        requests.delete(f"{server.url}/datastore/label", params={"id": "stock", "tag": "final"}, timeout=30).json()
        == {}
    )
    assert (
        requests.head(
            f"{server.url}/datastore/label", params={"image": "stock", "tag": "final"}, timeout=30
        ).status_code
        == 404
    )


def test_the_stock_client_adds_an_image_and_asks_for_it(server: Server, tmp_path: Path):
    client = MONAILabelClient(server.url, str(tmp_path))
    path = write_phantom(tmp_path / "added.nii.gz", shape=SHAPE, seed=77)
    assert client.upload_image(str(path), "added")["image"] == "added"
    assert server.get("/datastore/image", params={"image": "added"}).content == path.read_bytes()
    assert server.get("/datastore/image/info", params={"image": "added"}).json()["name"] == "added.nii.gz"
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for text, status in ((f"SHA256:{digest}", 200), (digest, 200), (f"SHA256:{'0' * 64}", 404), ("CRC:1", 422)):
        response = requests.head(
            f"{server.url}/datastore/image", params={"image": "added", "check_sum": text}, timeout=30
        )
        assert response.status_code == status, text
    response = requests.put(
        f"{server.url}/datastore/image/info",
        params={"image": "added"},
        files={"info": (None, '{"note": "x"}')},
        timeout=30,
    )
    assert response.status_code == 200
    assert server.get("/datastore/image/info", params={"image": "added"}).json()["note"] == "x"


def test_slice_by_slice_saves_add_up(server: Server):
    for k in (2, 5):
        answer = put_label(
            server, "slices", build_label(server, "slices", {k: LIVER}), {"slices": [k], "seconds": 4.5}
        ).json()
        assert answer["annotation"]["slices"] == [k]
    state = server.get("/progidiff/annotations", params={"image": "slices"}).json()
    assert state["annotated_slices"] == {"slices": [2, 5]}
    assert [label["slices"] for label in state["annotations"]] == [[5], [2]]
    assert [label["in_force"] for label in state["annotations"]] == [True, True]
    again = put_label(server, "slices", build_label(server, "slices", {5: LIVER}), {"slices": [5]}).json()
    assert again["annotation"]["repeated"] is True
    final = server.get("/datastore/label", params={"label": "slices", "tag": "final"}).content
    array = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(final)).dataobj)
    assert set(np.flatnonzero(array[5, 5])) == {2, 5}


def test_a_label_made_from_a_proposal_says_which_and_whether_it_was_edited(server: Server):
    request = {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 3, "result_extension": ".nii"}
    key = server.infer("proposals", request, output="json").json()["proposals"]
    mask = server.infer("proposals", request, output="image").content
    answer = put_label(server, "proposals", mask, {"proposals": key, "shown": "consensus"}).json()
    assert (answer["annotation"]["edited"], answer["annotation"]["slices"]) == (False, None)
    image = nibabel.Nifti1Image.from_bytes(mask)
    array = np.asarray(image.dataobj).copy()
    array[0, 0, 4] = LIVER
    array[1, 1, 4] = LIVER if array[1, 1, 4] == 0 else 0
    edited = nibabel.Nifti1Image(array, image.affine).to_bytes()
    answer = put_label(server, "proposals", edited, {"proposals": key, "shown": "consensus"}).json()
    assert answer["annotation"]["edited"] is True
    assert answer["annotation"]["slices"] == [4]
    rows = list(
        csv.DictReader(io.StringIO(server.get("/progidiff/annotations/export", params={"image": "proposals"}).text))
    )
    assert [(row["proposals"], row["shown"], row["seed"], row["edited"]) for row in rows] == [
        (key, "consensus", "3", v) for v in ("False", "True")
    ]
    assert all(row["model"] for row in rows)
    refused = put_label(server, "slices", mask, {"proposals": key})
    assert refused.status_code == 422
    assert "not of 'slices'" in refused.json()["detail"]


def test_the_history_goes_back_and_gives_every_version(server: Server):
    contents = [build_label(server, "history", {k: LIVER}) for k in (1, 2)]
    numbers = [put_label(server, "history", content).json()["annotation"]["sequence"] for content in contents]
    base = f"{server.url}/progidiff/annotations/history"
    assert requests.get(f"{base}/{numbers[0]}/label", timeout=30).content == contents[0]
    answer = requests.post(f"{base}/undo", timeout=30).json()
    assert answer["annotation"]["sequence"] == numbers[0]
    assert server.get("/datastore/label", params={"label": "history", "tag": "final"}).content == contents[0]
    answer = requests.post(f"{base}/{numbers[1]}/restore", timeout=30).json()
    assert (answer["annotation"]["sequence"], answer["annotated_slices"]) == (numbers[1], None)
    assert server.get("/datastore/label", params={"label": "history", "tag": "final"}).content == contents[1]
    assert requests.post(f"{base}/skip", params={"reason": "noisy"}, timeout=30).json()["image"] == "history"
    assert requests.get(f"{base}/999/label", timeout=30).status_code == 404
    assert requests.post(f"{base}/999/restore", timeout=30).status_code == 404
    assert requests.post(f"{server.url}/progidiff/annotations/nobody/undo", timeout=30).status_code == 404
    text = server.get("/progidiff/annotations/export", params={"format": "jsonl", "image": "history"}).text
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] for event in events] == ["label", "label", "undo", "restore", "skip"]
    assert server.get("/progidiff/annotations/export", params={"format": "xlsx"}).status_code == 422


def test_a_whole_volume_that_was_begun_before_another_save_is_a_conflict(server: Server):
    image = "versions"
    first = put_label(server, image, build_label(server, image, {1: LIVER})).json()["annotation"]["sequence"]
    loaded = server.get("/datastore/label", params={"label": image, "tag": "final"})
    assert loaded.headers["ETag"] == f'"{first}"'
    second = put_label(server, image, build_label(server, image, {2: LIVER})).json()["annotation"]["sequence"]
    files = {"label": ("label.nii", build_label(server, image, {3: LIVER}))}
    for headers, params in (({"If-Match": f'"{first}"'}, {}), ({}, {"replaces": first})):
        refused = requests.put(
            f"{server.url}/datastore/label",
            params={"image": image, "tag": "final"},
            files={**files, "params": (None, json.dumps(params))},
            headers=headers,
            timeout=60,
        )
        assert refused.status_code == 409
        assert f"Save {second} of this image was made" in refused.text
    assert put_label(server, image, build_label(server, image, {3: LIVER}), {"replaces": "x"}).status_code == 422
    assert put_label(server, image, build_label(server, image, {3: LIVER}), {"replaces": second}).status_code == 200


EVIL_NAMES = [
    "../secret",
    "../../app/evil",
    "..",
    ".hidden",
    "/etc/passwd",
    "a/../../secret",
    "..\\secret",
    "%2e%2e/secret",
]


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_no_id_or_tag_leads_out_of_the_folder(server: Server, name: str):
    before = list_files(server)
    image = (server.studies / "refused.nii.gz").read_bytes()
    label = build_label(server, "refused", {2: LIVER})
    url = f"{server.url}/datastore"
    attempts = {
        "add image": requests.put(
            f"{url}/image", params={"image": name}, files={"file": ("evil.py", image)}, timeout=30
        ),
        "add image as nifti": requests.put(
            f"{url}/image", params={"image": name}, files={"file": ("x.nii.gz", image)}, timeout=30
        ),
        "add image the old way": requests.put(
            f"{url}/", params={"image": name}, files={"file": ("x.nii.gz", image)}, timeout=30
        ),
        "add image by file name": requests.put(
            f"{url}/image", files={"file": (f"{name}/.x.nii.gz", image)}, timeout=30
        ),
        "save label of": put_label(server, name, label),
        "save label tagged": put_label(server, "refused", label, tag=name),
        "get image": requests.get(f"{url}/image", params={"image": name}, timeout=30),
        "image info": requests.get(f"{url}/image/info", params={"image": name}, timeout=30),
        "put image info": requests.put(
            f"{url}/image/info", params={"image": name}, files={"info": (None, "{}")}, timeout=30
        ),
        "get label of": requests.get(f"{url}/label", params={"label": name, "tag": "final"}, timeout=30),
        "get label tagged": requests.get(f"{url}/label", params={"label": "refused", "tag": name}, timeout=30),
        "label info": requests.get(f"{url}/label/info", params={"label": name, "tag": name}, timeout=30),
        "put label info": requests.put(
            f"{url}/label/info", params={"label": name, "tag": name}, files={"info": (None, "{}")}, timeout=30
        ),
        "update label info": requests.put(f"{url}/updatelabelinfo", params={"label": name, "tag": name}, timeout=30),
        "remove image": requests.delete(f"{url}/image", params={"id": name}, timeout=30),
        "remove image the old way": requests.delete(f"{url}/", params={"id": name}, timeout=30),
        "remove label": requests.delete(f"{url}/label", params={"id": name, "tag": "final"}, timeout=30),
        "remove label tagged": requests.delete(f"{url}/label", params={"id": "refused", "tag": name}, timeout=30),
    }
    for what, response in attempts.items():
        assert response.status_code in (404, 422), (what, response.status_code, response.text[:300])
        assert response.content != b"secret"
        assert response.json()["detail"]
    assert list_files(server) == before


def test_what_cannot_count_is_refused_with_a_cure_and_changes_nothing(server: Server):
    good = build_label(server, "refused", {2: LIVER})
    before = list_files(server)
    shifted = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)).to_bytes()
    cases: list[tuple[bytes, Any, str, str]] = [
        (b"this is no label", {}, "label.nii.gz", "cannot be read"),
        (b"", {}, "label.nii.gz", "cannot be read"),
        (good, {}, "label.py", "Send .nii.gz"),
        (shifted, {}, "label.nii", "resample"),
        (good, {"slices": [99]}, "label.nii", "from 0 to 7"),
        (good, {"label_info": 5}, "label.nii", "label_info"),
        (good, "{not json", "label.nii", "not JSON"),
        (good, "[1]", "label.nii", "Send an object"),
        (good, "[" * 100_000, "label.nii", "not JSON"),
    ]
    for content, params, name, words in cases:
        response = put_label(server, "refused", content, params, name=name)
        assert response.status_code == 422, (words, response.text[:300])
        assert words in response.json()["detail"]
    response = requests.put(
        f"{server.url}/datastore/image", files={"file": ("text.nii.gz", b"this is no image")}, timeout=30
    )
    assert response.status_code == 422
    assert "cannot be read" in response.json()["detail"]
    response = requests.put(
        f"{server.url}/datastore/image", params={"image": "refused"}, files={"file": ("a.nii", good)}, timeout=30
    )
    assert response.status_code == 422
    assert requests.put(f"{server.url}/datastore/label", params={"image": "refused"}, timeout=30).status_code == 422
    assert list_files(server) == before


def test_a_segmentation_of_slicer_is_saved_by_its_own_names(server: Server, tmp_path: Path):
    affine = nibabel.load(server.studies / "named.nii.gz").affine
    array = np.zeros(SHAPE, np.uint8)
    array[4:7, 4:7, 2], array[4:7, 4:7, 4] = 1, 2
    segments = [("liver", 1), ("Segment_2", 2)]
    content = write_seg_nrrd(tmp_path / "x.seg.nrrd", array, segments, affine).read_bytes()
    swapped = {"label_info": [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]}
    refused = put_label(server, "named", content, swapped, name="x.seg.nrrd")
    assert refused.status_code == 422
    assert "The file says that 1 is 'liver', and label_info says 'spleen'" in refused.json()["detail"]
    saved = put_label(server, "named", content, name="x.seg.nrrd").json()["annotation"]
    assert saved["label_ids"] == {"liver": LIVER, "Segment_2": 14}
    assert "'Segment_2' has no name" in saved["warnings"][0]
    renamed = requests.post(
        f"{server.url}/progidiff/annotations/named/rename", json={"old": "Segment_2", "new": "Milz"}, timeout=60
    ).json()
    assert renamed["annotation"]["label_ids"] == {"liver": LIVER, "spleen": 1}
    assert renamed["annotated_slices"] is None
    download = {"label": "named", "tag": "final", "format": ".seg.nrrd"}
    answer = requests.get(f"{server.url}/datastore/label", params=download, timeout=60)
    assert answer.headers["content-disposition"].rstrip('"').endswith("named.seg.nrrd")
    (tmp_path / "back.seg.nrrd").write_bytes(answer.content)
    assert read_names(tmp_path / "back.seg.nrrd") == {LIVER: "liver", 1: "spleen"}
    answer = requests.get(f"{server.url}/datastore/label", params={**download, "format": ".stl"}, timeout=60)
    assert answer.status_code == 422
    for body in ({"old": "liver"}, {"old": "liver", "new": "spleen", "by": "me"}, {"old": 1, "new": "spleen"}):
        answer = requests.post(f"{server.url}/progidiff/annotations/named/rename", json=body, timeout=60)
        assert answer.status_code == 422


def test_an_image_may_be_uploaded_under_the_name_that_its_viewer_gives_it(server: Server, tmp_path: Path):
    client = MONAILabelClient(server.url, str(tmp_path))
    name = "5: Body 1.5 CE"
    path = write_phantom(tmp_path / "volume.nii.gz", shape=SHAPE, seed=78)
    image = client.upload_image(str(path), name)["image"]
    assert image == "5_Body_1.5_CE-86dc8c"
    assert server.get("/datastore/image/info", params={"image": name}).json()["original_name"] == name
    assert server.get("/datastore/image", params={"image": name}).content == path.read_bytes()
    affine = nibabel.load(path).affine
    label = nibabel.Nifti1Image(np.full(SHAPE, LIVER, np.uint8), affine).to_bytes()
    assert put_label(server, name, label).json()["image"] == image
    assert server.get("/progidiff/annotations", params={"image": name}).json()["total"] == 1
    assert server.get(f"/progidiff/review/{name}").json()["sequence"] > 0
    assert client.upload_image(str(path), name)["image"] == image


def test_no_upload_is_left_behind(server: Server):
    kinds = ("progidiff-upload-", "progidiff-label-", "progidiff-dataset-")
    deadline = time.monotonic() + 20
    while left := [path for path in server.temporary.iterdir() if path.name.startswith(kinds)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_removed_image_can_be_fetched_back_from_the_trash(server: Server):
    put_label(server, "removed", build_label(server, "removed", {2: LIVER}))
    content = (server.studies / "removed.nii.gz").read_bytes()
    assert requests.delete(f"{server.url}/datastore/image", params={"id": "removed"}, timeout=30).json() == {}
    assert server.get("/datastore/image", params={"image": "removed"}).status_code == 404
    assert content in [path.read_bytes() for path in (server.studies / ".progidiff/trash").iterdir()]
    assert requests.delete(f"{server.url}/datastore/image", params={"id": "removed"}, timeout=30).status_code == 404


def test_the_archive_holds_labelled_images_and_leaves_no_file(server: Server):
    import zipfile

    put_label(server, "history", build_label(server, "history", {3: LIVER}))
    response = server.get("/datastore/dataset", params={"limit_cases": 1})
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        kinds = sorted(name.split("/")[0] for name in archive.namelist())
    assert kinds == ["image", "label", "metadata.json"]
    assert server.get("/datastore/dataset", params={"limit_cases": 0}).status_code == 422
    deadline = time.monotonic() + 20  # It goes after the answer has been sent.
    while list(server.temporary.glob("progidiff-dataset-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_list_of_annotations_is_bounded(server: Server):
    assert server.get("/progidiff/annotations", params={"limit": 1}).json()["total"] > 1
    assert len(server.get("/progidiff/annotations", params={"limit": 1}).json()["annotations"]) == 1
    for limit in ("0", "100000", "x"):
        assert server.get("/progidiff/annotations", params={"limit": limit}).status_code == 422
    assert server.get("/progidiff/annotations", params={"image": "nobody"}).status_code == 404
