"""One slice, steered by clicks: the choice, what SmartEdit sends and expects, and a real server's answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from progidiff.errors import GeometryError, RequestError
from progidiff.images.volume import Volume
from progidiff.proposals.clicks import choose_by_clicks
from progidiff.server.tasks.slices import read_clicks
from support.answers import OBLIQUE, read_answer, read_mask
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server

SAGITTAL = np.array([[0, 0, 5.0, -100], [6.5, 0, 0, -150], [0, 5.5, 0, -20], [0, 0, 0, 1.0]])


def make_volume(affine: np.ndarray | None = None) -> Volume:
    array = np.arange(8 * 6 * 4, dtype=np.int16).reshape(8, 6, 4)
    return Volume(array, np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine, "CT", "option", "toy")


def make_maps() -> np.ndarray:
    """Three proposals on a line of five pixels, each a little larger."""
    return np.array([[[200, 200, 0, 0, 0]], [[200, 200, 200, 0, 0]], [[250, 250, 250, 250, 100]]], np.uint8)


def test_proposals_that_agree_with_every_click_make_the_answer():
    maps = make_maps()
    choice = choose_by_clicks(maps, maps >= 128, [(0, 2)], [(0, 4)])
    assert (choice.kept, choice.fits) == ((1, 2), True)
    assert choice.mask.tolist() == [[True, True, True, True, False]]  # A tie counts, as in every consensus.


def test_the_answer_contains_the_foreground_and_avoids_the_background_whenever_a_proposal_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        maps = rng.integers(0, 256, (6, 9, 9), dtype=np.uint8)
        clicks = [tuple(map(int, pixel)) for pixel in rng.integers(0, 9, (3, 2))]
        choice = choose_by_clicks(maps, maps >= 128, clicks[:2], clicks[2:])
        fitting = [k for k in range(6) if all(maps[k][p] >= 128 for p in clicks[:2]) and maps[k][clicks[2]] < 128]
        assert choice.fits == bool(fitting)
        if fitting:
            assert choice.kept == tuple(fitting)
            assert all(choice.mask[p] for p in clicks[:2])
            assert not choice.mask[clicks[2]]


def test_if_none_agrees_the_fewest_contradictions_win_and_then_the_probabilities():
    maps = make_maps()
    choice = choose_by_clicks(maps, maps >= 128, [(0, 0), (0, 4)], [(0, 1)])
    assert (choice.kept, choice.missed) == ((2,), 2)  # All contradict two; the last is nearest to drawing pixel 4.
    choice = choose_by_clicks(maps, maps >= 128, [(0, 4)], [(0, 3)])
    assert (choice.kept, choice.missed) == ((0,), 1)


def test_clicks_need_proposals_of_one_shape():
    with pytest.raises(GeometryError, match=r"one shape \(K, Y, X\)"):
        choose_by_clicks(np.zeros((2, 3, 3)), np.zeros((3, 3), bool), [], [])


@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 1.0, 3.0, 1.0]), np.diag([-1.0, -1.0, -3.0, 1.0]), OBLIQUE], ids=["RAS", "LPI", "oblique"]
)
def test_clicks_are_placed_on_the_axial_stack(affine: np.ndarray):
    volume = make_volume(affine)
    clicks = read_clicks([[1, 2, 3], [5, 5, 0]], [[7, 0, 3]], 3, volume)
    stack, _ = volume.to_stack()
    assert [stack[clicks.z][pixel] for pixel in clicks.foreground] == [
        volume.array[1, 2, 3]
    ]  # The click on slice 0 is another slice's.
    assert [stack[clicks.z][pixel] for pixel in clicks.background] == [volume.array[7, 0, 3]]


def test_without_a_slice_the_last_foreground_click_says_which():
    assert read_clicks([[1, 1, 0], [1, 1, 2]], None, None, make_volume()).k == 2
    assert read_clicks("[[1, 1, 0]]", "", "", make_volume()).k == 0


@pytest.mark.parametrize(
    "foreground, index, error, reason",
    [
        ([], None, RequestError, "neither|no foreground click"),
        ([[1, 2]], 0, RequestError, r"three voxel indices \[i, j, k\]"),
        ("here", 0, RequestError, "foreground holds"),
        ([["1", "2", "3"]], 0, RequestError, "three voxel indices"),
        ([[1, 2, float("nan")]], 0, RequestError, "three voxel indices"),
        ([[8, 0, 0]], 0, GeometryError, "outside of 'toy'"),
        ([[1, 1, 0]], 4, RequestError, "slice is 4; it must be a whole number from 0 to 3"),
    ],
)
def test_senseless_clicks_are_refused(foreground: Any, index: Any, error: type[Exception], reason: str):
    with pytest.raises(error, match=reason):
        read_clicks(foreground, [], index, make_volume())


def test_an_image_that_is_not_stored_in_axial_slices_is_refused_with_another_way():
    with pytest.raises(GeometryError, match="Auto Segmentation"):
        read_clicks([[1, 1, 1]], [], 1, make_volume(SAGITTAL))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slices")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / "plain.nii.gz")
    write_phantom(studies / "oblique.nii.gz", shape=(40, 44, 6), seed=1, affine=OBLIQUE)
    write_phantom(studies / "sagittal.nii.gz", shape=(10, 40, 30), seed=2, affine=SAGITTAL)
    with run_server(
        studies,
        copy_app(folder),
        folder / "server.log",
        "model_dir",
        str(tiny_model),
        "device",
        "cpu",
        "score_pool",
        "off",
    ) as running:
        yield running


def click(server: Server, image: str, **params: Any) -> tuple[dict[str, Any], np.ndarray]:
    answer, content, _ = read_answer(
        server.infer(image, {"steps": 1, "num_proposals": 4, **params}, model="progidiff_slice")
    )
    return answer, np.asarray(read_mask(content).dataobj)


def test_slicer_offers_the_task_under_smartedit(server: Server):
    task = server.get("/info/").json()["models"]["progidiff_slice"]
    assert (task["type"], task["dimension"], task["labels"]) == (
        "deepgrow",
        2,
        [],
    )  # With labels, Slicer could run it by itself on a new sample.
    assert task["config"]["prompt"] == ""  # So that the segment's name counts.
    assert list(server.get("/info/").json()["models"]) == [
        "progidiff",
        "progidiff_slice",
        "progidiff_scribbles",
        "textdiff",
    ]


@pytest.mark.parametrize("image, shape", [("plain", (64, 48, 8)), ("oblique", (40, 44, 6))])
def test_a_click_inside_is_contained_and_only_the_clicked_slice_is_drawn(
    server: Server, image: str, shape: tuple[int, int, int]
):
    _, content, _ = read_answer(server.infer(image, {"prompt": "liver", "num_proposals": 4, "steps": 1, "show": "2"}))
    volume = np.asarray(read_mask(content).dataobj)
    k = int((volume > 0).sum(axis=(0, 1)).argmax())
    inside = [int(v) for v in np.argwhere(volume[:, :, k])[0]] + [k]
    elsewhere = [0, 0, (k + 1) % shape[2]]
    answer, mask = click(server, image, label="liver", foreground=[inside, elsewhere], background=[], slice=k)
    assert mask.shape == shape
    assert answer["fits"] is True
    assert mask[tuple(inside)] == 6
    assert not np.delete(mask, k, axis=2).any()
    assert set(np.unique(mask)) == {0, 6}
    assert answer["label_names"] == {"liver": 6}
    assert answer["slice"] == k
    assert "agree with all 1 clicks" in answer["message"]


def test_further_clicks_on_a_slice_use_what_was_drawn(server: Server):
    _, mask = click(server, "plain", label="spleen", foreground=[[30, 20, 4]], slice=4, seed=7)
    answer, again = click(server, "plain", label="spleen", foreground=[[30, 20, 4]], slice=4, seed=7)
    assert answer["latencies"]["compute"] == 0
    assert np.array_equal(mask, again)


def test_more_are_drawn_up_to_the_bound_and_then_the_nearest_is_given_and_said_so(server: Server):
    impossible = {"foreground": [[30, 20, 4]], "background": [[30, 20, 4]]}
    answer, mask = click(server, "plain", label="left kidney", slice=4, rounds=3, **impossible)
    assert (answer["fits"], answer["missed_clicks"], answer["num_proposals"], answer["kept_proposals"]) == (
        False,
        1,
        12,
        1,
    )
    assert "nearest and contradicts 1" in answer["message"]
    more, _ = click(server, "plain", label="left kidney", slice=4, rounds=4, **impossible)
    assert more["num_proposals"] == 16
    assert set(np.unique(mask)) <= {0, 3}


def test_several_structures_in_one_segment_are_one_label(server: Server):
    answer, mask = click(server, "plain", label="kidneys", foreground=[[30, 20, 4]], slice=4)
    assert answer["structures"] == ["left kidney", "right kidney"] or answer["structures"] == [
        "right kidney",
        "left kidney",
    ]
    assert list(answer["label_names"]) in ([], ["kidneys"])
    assert len(set(np.unique(mask)) - {0}) <= 1


def test_a_prompt_in_the_options_names_what_the_segments_name_does_not(server: Server):
    refused = server.infer(
        "plain", {"label": "Segment_1", "foreground": [[30, 20, 4]], "slice": 4}, model="progidiff_slice"
    )
    assert (refused.status_code, refused.json()["error"]) == (422, "PromptError")
    answer, _ = click(server, "plain", label="Segment_1", prompt="aorta", foreground=[[30, 20, 4]], slice=4)
    assert list(answer["label_names"]) in ([], ["Segment_1"])


@pytest.mark.parametrize(
    "image, params, reason",
    [
        ("plain", {"foreground": [[1, 1, 1]], "slice": 1}, "neither label nor prompt"),
        ("plain", {"label": "liver"}, "Place a click"),
        ("plain", {"label": "liver", "foreground": [[1, 1, 1]], "rounds": 0}, "rounds is 0"),
        ("plain", {"label": "liver", "foreground": [[1, 1, 99]], "slice": 99}, "from 0 to 7"),
        ("sagittal", {"label": "liver", "foreground": [[1, 1, 1]], "slice": 1}, "not stored in axial slices"),
    ],
)
def test_a_bad_request_is_refused_with_its_cure(server: Server, image: str, params: dict[str, Any], reason: str):
    response = server.infer(image, params, model="progidiff_slice")
    assert response.status_code == 422, response.text
    assert reason in response.json()["detail"]


def test_proposals_become_labels_for_the_reviewer_module_and_the_image_stays_unlabelled(server: Server):
    request = {"prompt": "liver and spleen", "num_proposals": 3, "steps": 1, "seed": 11}
    _, consensus, _ = read_answer(server.infer("plain", request))
    answer, _, _ = read_answer(server.infer("plain", {**request, "save_proposals": True}))
    assert answer["saved_tags"] == ["original", "proposal_1", "proposal_2", "proposal_3"]
    info = server.get("/datastore/").json()
    assert (info["completed"], info["label_tags"].get("final", 0)) == (0, 0)
    labels = server.get("/datastore/?output=all").json()["objects"]["plain"]["labels"]
    assert set(labels) == set(answer["saved_tags"])
    # Slicer names segments by position: exactly the labels drawn, ascending.
    original = read_mask(server.get("/datastore/label", params={"label": "plain", "tag": "original"}).content)
    assert np.array_equal(original.dataobj, read_mask(consensus).dataobj)
    assert sorted(labels["original"]["info"]["params"]["label_names"].values()) == sorted(
        set(np.unique(original.dataobj)) - {0}
    )
    for k in (1, 2, 3):
        _, content, _ = read_answer(server.infer("plain", {**request, "show": str(k)}))
        saved = server.get("/datastore/label", params={"label": "plain", "tag": f"proposal_{k}"})
        assert np.array_equal(read_mask(saved.content).dataobj, read_mask(content).dataobj)
    fewer, _, _ = read_answer(server.infer("plain", {**request, "num_proposals": 2, "save_proposals": True}))
    assert fewer["saved_tags"] == ["original", "proposal_1", "proposal_2"]
    left = server.get("/datastore/?output=all").json()["objects"]["plain"]["labels"]
    assert "proposal_3" not in left  # Nothing of an older result stays beside.


def test_next_sample_has_the_consensus_ready_as_tag_original(server: Server):
    request = {"prompt": "liver and spleen", "num_proposals": 2, "steps": 1, "seed": 21}
    _, consensus, _ = read_answer(server.infer("oblique", request))
    answer = requests.post(f"{server.url}/activelearning/random", json={"client_id": "slicer"}, timeout=120).json()
    while answer.get("id") not in (None, "oblique"):  # Each image is given once, to one client each.
        answer = requests.post(
            f"{server.url}/activelearning/random", json={"client_id": f"not {answer['id']}"}, timeout=120
        ).json()
    assert answer["id"] == "oblique"
    labels = server.get("/datastore/?output=all").json()["objects"]["oblique"]["labels"]
    original = read_mask(server.get("/datastore/label", params={"label": "oblique", "tag": "original"}).content)
    assert np.array_equal(original.dataobj, read_mask(consensus).dataobj)
    assert list(labels["original"]["info"]["params"]["label_names"].values()) == sorted(
        set(np.unique(original.dataobj)) - {0}
    )
    assert "final" not in labels


def test_clicks_in_another_order_of_voxels_are_refused(server: Server):
    """OHIF names the image by its series and counts the voxels of DICOM slices."""
    study = server.get("/proxy/dicom/qido/series").json()[0]
    series = study["0020000E"]["Value"][0]
    response = server.infer(
        series, {"label": "liver", "foreground": [[30, 20, 4]], "slice": 4}, model="progidiff_slice"
    )
    assert (response.status_code, "3D Slicer" in response.json()["detail"]) == (422, True), response.text
