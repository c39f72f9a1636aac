"""Requests to a real server process with a model of toy width and random weights: answers, refusals, queue, store.

What the masks look like means nothing here; `test_server_end_to_end.py` asks that of the embedded weights.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest
import requests

from support.answers import OBLIQUE, read_answer, read_mask
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / "plain.nii.gz")
    write_phantom(studies / "oblique.nii.gz", shape=(40, 44, 6), seed=1, affine=OBLIQUE)
    write_phantom(studies / "long.nii.gz", shape=(64, 64, 120), seed=2)
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 3, 4), np.int16), np.eye(4)), studies / "four_axes.nii.gz")
    with run_server(
        studies,
        copy_app(folder),
        folder / "server.log",
        "model_dir",
        str(tiny_model),
        "device",
        "cpu",
        "max_waiting",
        "2",
    ) as running:
        yield running


def test_info_describes_widgets_and_has_no_top_level_config(server: Server):
    info = server.get("/info/").json()
    assert "config" not in info  # Slicer refuses a server with it.
    model = info["models"]["progidiff"]
    assert (model["type"], model["dimension"]) == ("segmentation", 3)
    assert model["labels"]["liver"] == 6
    assert list(model["labels"].values()) == sorted(model["labels"].values())
    config = model["config"]
    assert {
        "prompt",
        "num_proposals",
        "show",
        "steps",
        "seed",
        "adapter",
        "modality",
        "allow_free_text",
        "save_original",
    } <= set(config)
    for name, value in config.items():
        assert isinstance(value, (str, int, float, bool, list)), name
        if isinstance(value, list):
            assert value, f"{name}: an empty list breaks Slicer's menu"
            assert all(isinstance(entry, str) for entry in value), name
    assert config["show"][:3] == ["consensus", "best", "1"]
    assert config["show"][-1] == "disagreement"
    assert info["datastore"]["total"] == 5


def test_the_mask_is_on_the_grid_of_the_image_also_if_that_is_oblique(server: Server):
    for name in ("plain", "oblique"):
        image = nibabel.load(server.studies / f"{name}.nii.gz")
        params, content, _ = read_answer(server.infer(name, {"prompt": "liver", "num_proposals": 2, "steps": 1}))
        mask = read_mask(content)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(np.asarray(mask.dataobj))) == {0, 6}
        assert params["modality"] == "CT"
        assert params["modality_source"] == "guessed"


def test_the_result_parameters_name_what_is_present_and_how_it_was_made(server: Server):
    params, content, _ = read_answer(
        server.infer("plain", {"prompt": "all", "num_proposals": 3, "steps": 1, "seed": 5, "client_id": "me"})
    )
    present = set(np.unique(np.asarray(read_mask(content).dataobj))) - {0}
    assert len(present) > 1
    assert set(params["label_names"].values()) == present
    voxel_ml = 5.5 * 6.5 * 5.0 / 1000
    counts = {
        name: int((np.asarray(read_mask(content).dataobj) == index).sum())
        for name, index in params["label_names"].items()
    }
    assert params["shown_ml"] == pytest.approx({name: count * voxel_ml for name, count in counts.items()}, abs=0.01)
    assert list(params["label_names"].values()) == sorted(params["label_names"].values())
    assert (params["seed"], params["num_proposals"], params["prompt"], params["show"]) == (5, 3, "all", "consensus")
    assert params["model_version"]
    assert params["ignored"] == ["client_id"]
    assert set(params["structures"]) == set(server.get("/info/").json()["models"]["progidiff"]["labels"])
    for numbers in params["structures"].values():
        assert len(numbers["proposals_ml"]) == 3
        assert len(numbers["disagreement_per_slice"]) == 8
        assert all(0 <= value <= 1 for value in numbers["disagreement_per_slice"])
        assert 1 <= numbers["best"] <= 3


def test_every_proposal_can_be_shown_from_the_store_without_computing(server: Server):
    request = {"prompt": "liver", "num_proposals": 3, "steps": 1, "seed": 11}
    first, _, _ = read_answer(server.infer("plain", request))
    assert first["cached"] is False
    assert first["job"]
    jobs = len(server.get("/progidiff/jobs").json())
    masks = {}
    for show in ("1", 2, "3", "best", "consensus", "disagreement"):
        params, content, _ = read_answer(server.infer("plain", {**request, "show": show}))
        assert params["cached"] is True, show
        assert params["proposals"] == first["proposals"]
        assert params["structures"] == first["structures"]
        masks[str(show)] = np.asarray(read_mask(content).dataobj)
    assert len(server.get("/progidiff/jobs").json()) == jobs
    drawn = sum((masks[str(k)] == 6).astype(int) for k in (1, 2, 3))
    assert len({masks[str(k)].tobytes() for k in (1, 2, 3)}) == 3
    assert np.array_equal(masks["consensus"] == 6, drawn >= 2)
    assert np.array_equal(masks["best"], masks[str(first["structures"]["liver"]["best"])])
    assert set(np.unique(masks["disagreement"])) == {
        0,
        4,
    }  # One or two of three: 4 * 1/3 * 2/3 = 89 %, the band over 75 %.
    assert np.array_equal(masks["disagreement"] > 0, (drawn > 0) & (drawn < 3))
    assert params["label_names"] == {"disagreement over 75 %": 4}


def test_the_same_seed_gives_the_same_file_and_synonyms_share_a_result(server: Server):
    request = {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 21}
    first, mask, _ = read_answer(server.infer("plain", request))
    again, same_mask, _ = read_answer(server.infer("plain", {**request, "prompt": "hepatic parenchyma"}))
    assert again["cached"] is True
    assert np.array_equal(read_mask(mask).dataobj, read_mask(same_mask).dataobj)
    other, _, _ = read_answer(server.infer("plain", {**request, "seed": 22}))
    assert other["proposals"] != first["proposals"]


def test_a_structure_is_answered_at_once_from_a_longer_prompts_proposals(server: Server):
    request = {"num_proposals": 2, "steps": 1, "seed": 37}
    long, _, _ = read_answer(server.infer("plain", {**request, "prompt": "spleen and liver"}))
    short, mask, _ = read_answer(server.infer("plain", {**request, "prompt": "liver"}))
    assert long["cached"] is False
    assert short["cached"] is True
    assert short["structures"] == {"liver": long["structures"]["liver"]}
    assert set(np.unique(read_mask(mask).dataobj)) == {0, 6}
    kept = server.get("/progidiff/proposals/plain").json()["kept"]
    assert {one["proposals"]: one["structures"] for one in kept}[short["proposals"]] == ["liver"]


@pytest.mark.parametrize("extension", [".nii.gz", ".nii", ".nrrd", ".seg.nrrd"])
def test_the_file_has_the_extension_the_viewer_asked_for(server: Server, extension: str, tmp_path: Path):
    response = server.infer(
        "oblique", {"prompt": "liver", "num_proposals": 2, "steps": 1, "result_extension": extension}, output="image"
    )
    assert response.status_code == 200
    assert response.headers["content-disposition"].rstrip('"').endswith(extension)
    file = tmp_path / f"mask{extension}"
    file.write_bytes(response.content)
    if not extension.endswith(".nrrd"):
        np.testing.assert_allclose(nibabel.load(file).affine, OBLIQUE, atol=1e-4)
        return
    import SimpleITK as sitk

    lps_to_ras = np.diag([-1.0, -1.0, 1.0])
    mask = sitk.ReadImage(str(file))
    if extension == ".seg.nrrd":
        table = {key: mask.GetMetaData(f"Segment0_{key}") for key in ("Name", "LabelValue", "Color")}
        assert table == {"Name": "liver", "LabelValue": "6", "Color": "0.788235 0.541176 0.356863"}
        assert "~SCT^10200004^Liver~" in mask.GetMetaData("Segment0_Tags")
    assert mask.GetSize() == (40, 44, 6)
    np.testing.assert_allclose(lps_to_ras @ np.array(mask.GetOrigin()), OBLIQUE[:3, 3], atol=1e-4)


def test_output_json_gives_the_parameters_alone(server: Server):
    response = server.infer("plain", {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="json")
    assert response.headers["content-type"].startswith("application/json")
    assert response.json()["prompt"] == "liver"


def test_no_temporary_file_is_left_behind(server: Server):
    server.infer("plain", {"prompt": "liver", "num_proposals": 2, "steps": 1})
    server.infer("plain", {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="json")
    server.infer("broken", {"prompt": "liver"})
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and list_left(server):
        time.sleep(0.05)
    assert not list_left(server)


def list_left(server: Server) -> list[str]:
    """Temporary files and folders of answers, wherever they lie; what goes away while we look is gone."""
    return [
        name
        for _, folders, files in os.walk(server.temporary)
        for name in (*folders, *files)
        if name.startswith("progidiff-")
    ]


def test_a_client_on_the_same_host_keeps_its_file(server: Server):
    from monailabel.client import MONAILabelClient

    client = MONAILabelClient(server.url, tmpdir=str(server.temporary))
    file, _ = client.infer("progidiff", "plain", {"prompt": "liver", "num_proposals": 2, "steps": 1})
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and list(server.temporary.glob(".progidiff-answers-*/progidiff-*")):
        time.sleep(0.05)  # until the server has removed its own
    assert Path(file).parent == server.temporary
    assert Path(file).is_file()
    Path(file).unlink()


REFUSED: list[tuple[str, dict[str, Any] | str, int, str]] = [
    ("plain", "{not json", 422, "not JSON"),
    ("plain", "[1, 2]", 422, "Send an object"),
    ("plain", "null", 422, "Send an object"),
    ("plain", {"prompt": "spline"}, 422, "spleen"),
    ("plain", {"prompt": ""}, 422, "prompt is empty"),
    ("plain", {"prompt": 5}, 422, "must be text"),
    ("plain", {"num_proposals": "abc"}, 422, "num_proposals"),
    ("plain", {"num_proposals": 0}, 422, "from 1 to 16"),
    ("plain", {"num_proposals": -1}, 422, "from 1 to 16"),
    ("plain", {"num_proposals": 1000}, 422, "from 1 to 16"),
    ("plain", {"steps": 0}, 422, "steps"),
    ("plain", {"steps": "many"}, 422, "steps"),
    ("plain", {"seed": -3}, 422, "seed"),
    ("plain", {"seed": {}}, 422, "seed"),
    ("plain", {"show": "9", "num_proposals": 4}, 422, "Raise num_proposals"),
    ("plain", {"show": "worst"}, 422, "Option show"),
    ("plain", {"modality": "PET"}, 422, "modality"),
    ("plain", {"adapter": "../../etc"}, 422, "adapter"),
    ("plain", {"image": "/etc/passwd"}, 422, "cannot be set by a request"),
    ("plain", {"model": "other"}, 422, "cannot be set by a request"),
    ("plain", {"model_dir": "/tmp"}, 422, "cannot be set by a request"),
    ("plain", {"job_id": "../../x"}, 422, "job id"),
    ("nobody", {"prompt": "liver"}, 404, "no image 'nobody'"),
    ("/etc/hostname", {"prompt": "liver"}, 404, "no image"),
    ("../studies/plain", {"prompt": "liver"}, 404, "no image"),
    ("plain.nii.gz", {"prompt": "liver"}, 404, "no image"),
    ("", {"prompt": "liver"}, 422, "names no image"),
    ("broken", {"prompt": "liver"}, 422, "broken"),
    ("four_axes", {"prompt": "liver"}, 422, "four_axes"),
]


@pytest.mark.parametrize(("image", "params", "status", "reason"), REFUSED)
def test_a_bad_request_is_refused_with_reason_and_cure(
    server: Server, image: str, params: dict[str, Any] | str, status: int, reason: str
):
    response = server.infer(image, params)
    assert response.status_code == status, response.text
    answer = response.json()
    assert reason in answer["detail"]
    assert answer["error"].endswith("Error")
    assert isinstance(answer["suggestions"], list)
    assert "Traceback" not in response.text


def test_a_misspelt_prompt_comes_with_suggestions(server: Server):
    answer = server.infer("plain", {"prompt": "spline"}).json()
    assert answer["error"] == "PromptError"
    assert "spleen" in answer["suggestions"]


def test_an_unknown_model_is_a_404_that_lists_those_there_are(server: Server):
    response = server.infer("plain", {}, model="deepedit")
    assert (response.status_code, response.json()["error"]) == (404, "NotFoundError")
    assert "progidiff" in response.json()["detail"]


def test_an_unknown_session_and_an_unknown_job_are_404(server: Server):
    for session in ("00000000-0000", "../../../etc"):
        response = server.infer("", {}, session_id=session)
        assert (response.status_code, response.json()["error"]) == (404, "NotFoundError")
    assert server.get("/progidiff/jobs/nothing").status_code == 404
    assert server.get("/progidiff/proposals/nobody").status_code == 404
    assert server.get("/progidiff/proposals/plain", params={"proposals": "0" * 64}).status_code == 404


def test_dicom_seg_of_what_is_no_whole_volume_is_refused_with_another_way(server: Server):
    response = server.infer("plain", {"prompt": "liver"}, output="dicom_seg", model="textdiff")
    assert response.status_code == 422
    assert "output=image" in response.json()["detail"]


def test_the_hosts_own_errors_are_json_with_a_fitting_status(server: Server):
    assert requests.post(f"{server.url}/activelearning/nonsense", json={}, timeout=30).status_code == 422
    label = {"label": ("mask.nii.gz", b"x")}
    missing = requests.put(f"{server.url}/datastore/label", params={"image": "nobody"}, files=label, timeout=30)
    assert (missing.status_code, "nobody" in missing.json()["detail"]) == (404, True)
    bad_json = requests.put(
        f"{server.url}/datastore/label", params={"image": "plain"}, data={"params": "{"}, files=label, timeout=30
    )
    assert (bad_json.status_code, "not JSON" in bad_json.json()["detail"]) == (422, True)


def test_an_image_can_be_uploaded_with_the_request(server: Server, tmp_path: Path):
    image = write_phantom(tmp_path / "mine.nii.gz", seed=9)
    params = json.dumps({"prompt": "liver", "num_proposals": 2, "steps": 1})
    with image.open("rb") as file:
        files = {"params": (None, params), "file": (image.name, file)}
        response = requests.post(f"{server.url}/infer/progidiff", params={"output": "image"}, files=files, timeout=600)
    assert response.status_code == 200
    assert read_mask(response.content).shape == (64, 48, 8)
    files = {"params": (None, params), "file": ("../../evil.py", b"import os")}
    refused = requests.post(f"{server.url}/infer/progidiff", files=files, timeout=600)
    assert (refused.status_code, "is not read" in refused.json()["detail"]) == (422, True)


def test_an_image_can_come_as_a_session(server: Server, tmp_path: Path):
    image = write_phantom(tmp_path / "mine.nii.gz", seed=10)
    with image.open("rb") as file:
        session = requests.put(f"{server.url}/session/", files=[("files", (image.name, file))], timeout=60).json()[
            "session_id"
        ]
    params, content, _ = read_answer(
        server.infer("", {"prompt": "liver", "num_proposals": 2, "steps": 1}, session_id=session)
    )
    assert params["structures"]["liver"]
    assert read_mask(content).shape == (64, 48, 8)
    refused = server.infer(
        "", {"prompt": "liver", "save_original": True, "num_proposals": 2, "steps": 1}, session_id=session
    )
    assert (refused.status_code, "image of the datastore" in refused.json()["detail"]) == (422, True)
    requests.delete(f"{server.url}/session/{session}", timeout=30)


def test_the_consensus_is_saved_as_tag_original_when_asked(server: Server):
    request = {"prompt": "all", "num_proposals": 2, "steps": 1, "seed": 3}
    _, consensus, _ = read_answer(server.infer("oblique", request))
    params, _, _ = read_answer(server.infer("oblique", {**request, "show": "1", "save_original": "true"}))
    assert params["saved_original"] == "oblique"
    label = server.get("/datastore/label", params={"label": "oblique", "tag": "original"})
    assert label.status_code == 200
    saved = read_mask(label.content)
    np.testing.assert_allclose(saved.affine, OBLIQUE, atol=1e-5)
    assert np.array_equal(saved.dataobj, read_mask(consensus).dataobj)


def test_the_modality_of_the_datastore_is_used_and_named(server: Server):
    requests.put(
        f"{server.url}/datastore/image/info",
        params={"image": "long"},
        data={"info": json.dumps({"modality": "MR"})},
        timeout=30,
    )
    answer = server.infer("long", {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="json").json()
    assert (answer["modality"], answer["modality_source"]) == ("MR", "sidecar")
    assert "was trained on CT images" in answer["warnings"][0]
    answer = server.infer(
        "long", {"prompt": "liver", "num_proposals": 2, "steps": 1, "modality": "CT"}, output="json"
    ).json()
    assert (answer["modality"], answer["modality_source"]) == ("CT", "option")
    assert answer["warnings"] == []


def test_free_text_needs_permission_and_gets_a_label_and_a_warning(server: Server):
    request = {"prompt": "liver and the tumour", "num_proposals": 2, "steps": 1}
    assert server.infer("plain", request).status_code == 422
    answer = server.infer("plain", {**request, "allow_free_text": True}, output="json").json()
    names = list(answer["structures"])
    assert names[0] == "liver"
    assert "tumour" in names[1]
    assert "tumour" in answer["warnings"][0]
    assert set(answer["label_names"].values()) <= {6, 14}


def test_the_class_prompts_of_ohif_are_answered_with_the_declared_label_ids(server: Server):
    params, content, _ = read_answer(server.infer("plain", {"label_prompt": [6, 3], "num_proposals": 2, "steps": 1}))
    assert list(params["structures"]) == ["liver", "left kidney"]
    assert set(np.unique(np.asarray(read_mask(content).dataobj))) <= {0, 3, 6}


def test_what_is_kept_of_an_image_can_be_asked(server: Server):
    answer = server.infer(
        "plain", {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 31}, output="json"
    ).json()
    kept = server.get("/progidiff/proposals/plain").json()
    assert kept["proposals"] == answer["proposals"]
    assert kept["summary"]["structures"] == answer["structures"]
    assert answer["proposals"] in {entry["proposals"] for entry in kept["kept"]}
    assert (server.studies / ".progidiff" / answer["proposals"]).is_dir()


def test_the_prompts_are_listed_with_label_and_synonyms(server: Server):
    prompts = {entry["structure"]: entry for entry in server.get("/progidiff/prompts").json()}
    assert prompts["liver"]["label"] == 6
    assert json.dumps(prompts["liver"]).count("hepatic")


def test_a_batch_runs_on_any_device_saves_labels_and_survives_a_broken_image(server: Server):
    options = {
        "prompt": "liver",
        "num_proposals": 2,
        "steps": 1,
        "device": "cuda",
        "multi_gpu": True,
        "max_batch_size": 3,
    }
    response = requests.post(
        f"{server.url}/batch/infer/progidiff", params={"run_sync": "true"}, json=options, timeout=600
    )
    assert response.status_code == 200, response.text
    results = response.json()
    assert list(results) == ["broken", "four_axes", "long"]
    assert "cannot be read" in results["broken"]["error"]
    assert (results["long"]["label"], results["long"]["tag"]) == ("long", "original")
    label = server.get("/datastore/label", params={"label": "long", "tag": "original"})
    assert read_mask(label.content).shape == (64, 64, 120)
    answer = requests.post(
        f"{server.url}/batch/infer/progidiff",
        params={"run_sync": "true"},
        json={**options, "label_tag": "../x"},
        timeout=600,
    )
    assert (answer.status_code, "label_tag" in answer.json()["detail"]) == (422, True)  # Told before it starts.


def test_a_batch_of_nonsense_is_refused_before_it_starts(server: Server):
    for model, options, status, reason in (
        ("deepedit", {}, 404, "no model"),
        ("progidiff", {"prompt": "spline"}, 422, "spleen"),
    ):
        response = requests.post(f"{server.url}/batch/infer/{model}", json=options, timeout=60)
        assert (response.status_code, reason in response.json()["detail"]) == (status, True)
    assert server.get("/batch/infer").status_code == 404  # No task was started.


class Background:
    """An inference in a thread."""

    def __init__(self, server: Server, image: str, params: dict[str, Any]) -> None:
        self.response: requests.Response | None = None
        self.thread = threading.Thread(target=self._run, args=(server, image, params), daemon=True)
        self.thread.start()

    def _run(self, server: Server, image: str, params: dict[str, Any]) -> None:
        self.response = server.infer(image, params, output="json")

    def answer(self, seconds: float = 300) -> requests.Response:
        self.thread.join(seconds)
        assert self.response is not None, "the inference did not end in time"
        return self.response


def wait_for_state(server: Server, job_id: str, *states: str, seconds: float = 300) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        response = server.get(f"/progidiff/jobs/{job_id}")
        if response.status_code == 200 and response.json()["state"] in states:
            return dict(response.json())
        time.sleep(0.02)
    raise AssertionError(f"job {job_id} did not become {states}: {response.text}")


SLOW = {"prompt": "all", "num_proposals": 16, "steps": 50}


def test_info_answers_while_an_inference_runs_and_the_inference_can_be_cancelled(server: Server):
    running = Background(server, "long", {**SLOW, "seed": 101, "job_id": "slow-1"})
    wait_for_state(server, "slow-1", "running")
    for _ in range(20):
        assert server.get("/info/").status_code == 200
    assert server.get("/progidiff/jobs/slow-1").json()["state"] == "running"  # None of them waited for the inference.
    cancelled = requests.delete(f"{server.url}/progidiff/jobs/slow-1", timeout=30)
    assert cancelled.status_code == 200
    response = running.answer()
    assert (response.status_code, response.json()["error"]) == (409, "CancelledError")
    assert server.get("/progidiff/jobs/slow-1").json()["state"] == "cancelled"


def test_a_second_inference_waits_with_a_position_and_a_fourth_is_sent_away(server: Server):
    first = Background(server, "long", {**SLOW, "seed": 201, "job_id": "busy-1"})
    wait_for_state(server, "busy-1", "running")
    second = Background(server, "long", {**SLOW, "seed": 202, "job_id": "busy-2"})
    wait_for_state(server, "busy-2", "queued")
    third = Background(server, "long", {**SLOW, "seed": 203, "job_id": "busy-3"})
    assert wait_for_state(server, "busy-3", "queued")["position"] == 2
    assert {job["id"] for job in server.get("/progidiff/jobs", params={"image": "long"}).json()} >= {
        "busy-1",
        "busy-2",
        "busy-3",
    }
    fourth = server.infer("long", {**SLOW, "seed": 204})
    assert (fourth.status_code, fourth.json()["error"]) == (503, "BusyError")
    assert int(fourth.headers["Retry-After"]) >= 1
    for name in ("busy-3", "busy-2", "busy-1"):
        requests.delete(f"{server.url}/progidiff/jobs/{name}", timeout=30)
    for background in (first, second, third):
        assert background.answer().status_code == 409


def test_a_client_that_goes_away_gives_up_its_place_and_what_it_computes(server: Server):
    """Two connections that are closed: one computes, one waits."""
    first = send_and_hang_up(server, {**SLOW, "seed": 501, "job_id": "gone-1"})
    wait_for_state(server, "gone-1", "running")
    second = send_and_hang_up(server, {**SLOW, "seed": 502, "job_id": "gone-2"})
    assert wait_for_state(server, "gone-2", "queued")["waiting_for"] == "1 request before it"
    for connection in (second, first):
        connection.close()
    assert "went away" in wait_for_state(server, "gone-2", "cancelled", seconds=30)["reason"]
    wait_for_state(server, "gone-1", "cancelled", seconds=60)


def send_and_hang_up(server: Server, params: dict[str, Any]) -> socket.socket:
    """A connection that has sent its request and does not wait for the answer."""
    request = requests.Request(
        "POST", f"{server.url}/infer/progidiff", params={"image": "long"}, data={"params": json.dumps(params)}
    ).prepare()
    address = urlsplit(server.url)
    lines = [f"POST {request.path_url} HTTP/1.1", f"Host: {address.netloc}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    connection = socket.create_connection((str(address.hostname), int(address.port or 80)))
    connection.sendall("\r\n".join([*lines, "", str(request.body)]).encode())
    return connection


def test_progress_counts_slices(server: Server):
    running = Background(
        server, "long", {"prompt": "liver", "num_proposals": 8, "steps": 10, "seed": 301, "job_id": "progress-1"}
    )
    seen = []
    info = wait_for_state(server, "progress-1", "running", "done")
    while info["state"] == "running":
        assert info["percent"] == (int(100 * info["slices_done"] / info["slices_total"]) if info["slices_total"] else 0)
        seen.append(info["slices_done"])
        time.sleep(0.02)
        info = wait_for_state(server, "progress-1", "running", "done")
    assert seen == sorted(seen)
    assert any(0 < done < 120 for done in seen)
    assert (info["percent"], info["slices_done"], info["slices_total"]) == (100, 120, 120)
    assert running.answer().status_code == 200


def copy_studies(server: Server, folder: Path) -> Path:
    """The folder as a server finds it that comes after this one; two on one folder are refused."""
    return Path(shutil.copytree(server.studies, folder / "studies"))


def test_kept_proposals_survive_a_restart(server: Server, tiny_model: Path, tmp_path: Path):
    request = {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 41}
    before, mask, _ = read_answer(server.infer("plain", request))
    studies = copy_studies(server, tmp_path)
    with run_server(
        studies, copy_app(tmp_path), tmp_path / "again.log", "model_dir", str(tiny_model), "device", "cpu"
    ) as again:
        after, same, _ = read_answer(again.infer("plain", request))
    assert after["cached"] is True
    assert after["structures"] == before["structures"]
    assert np.array_equal(read_mask(mask).dataobj, read_mask(same).dataobj)


def test_a_server_without_weights_starts_and_says_what_is_missing(tmp_path: Path):
    studies, empty = tmp_path / "studies", tmp_path / "empty"
    studies.mkdir()
    empty.mkdir()
    write_phantom(studies / "plain.nii.gz")
    with run_server(studies, copy_app(tmp_path), tmp_path / "server.log", "model_dir", str(empty)) as server:
        assert "progidiff" in server.get("/info/").json()["models"]
        response = server.infer("plain", {"prompt": "liver"})
        assert response.status_code == 503
        assert str(empty) in response.json()["detail"]


def test_a_senseless_server_option_stops_the_start_with_its_reason(tmp_path: Path):
    studies = tmp_path / "studies"
    studies.mkdir()
    app = copy_app(tmp_path)
    with (
        pytest.raises(AssertionError, match="must be auto, cpu, mps, cuda"),
        run_server(studies, app, tmp_path / "log", "device", "toaster"),
    ):
        pass


def test_ctrl_c_ends_the_server_although_an_inference_runs(server: Server, tiny_model: Path, tmp_path: Path):
    studies = copy_studies(server, tmp_path)
    with run_server(
        studies, copy_app(tmp_path), tmp_path / "log", "model_dir", str(tiny_model), "device", "cpu"
    ) as other:
        running = Background(other, "long", {**SLOW, "seed": 401, "job_id": "last-1"})
        wait_for_state(other, "last-1", "running")
        other.process.send_signal(signal.SIGINT)
        other.process.wait(60)  # The inference alone would take many minutes.
        assert (running.answer().status_code, running.answer().json()["error"]) == (409, "CancelledError")
