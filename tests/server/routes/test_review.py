"""What the review page asks a real server for, and what its decisions become on disk."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests

from progidiff.images.reading import load_volume
from support.answers import OBLIQUE, read_answer, read_mask
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server

FRACTIONS = np.diag([-4.0, -4.0, 5.0, 1.0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("review")
    studies = folder / "studies"
    studies.mkdir()
    for seed, name in enumerate(("plain", "twice", "shared", "merged", "drawn", "several", "ragged")):
        write_phantom(studies / f"{name}.nii.gz", seed=seed)
    write_phantom(studies / "oblique.nii.gz", shape=(40, 44, 6), seed=5, affine=OBLIQUE)
    noise = np.random.default_rng(0).normal(3e5, 1e5, (30, 32, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(noise, FRACTIONS), studies / "fractions.nii.gz")
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    conf = ("model_dir", str(tiny_model), "device", "cpu", "score_pool", "off")
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as running:
        yield running


def propose(server: Server, image: str, prompt: str = "liver and spleen", **params: Any) -> dict[str, Any]:
    request = {"prompt": prompt, "num_proposals": 3, "steps": 1, **params}
    answer, _, _ = read_answer(server.infer(image, request))
    return answer


def unpack(content: bytes) -> list[np.ndarray]:
    """Per structure (box, bool (K, y, x)), by the format's description and not by the server's code."""
    count, proposals = struct.unpack_from("<HH", content)
    offset, result = 4, []
    for _ in range(count):
        y0, y1, x0, x1 = struct.unpack_from("<HHHH", content, offset)
        offset += 8
        size = (y1 - y0) * (x1 - x0)
        masks = []
        for _ in range(proposals if size else 0):
            bits = np.unpackbits(np.frombuffer(content, np.uint8, (size + 7) // 8, offset), bitorder="little")[:size]
            masks.append(bits.reshape(y1 - y0, x1 - x0))
            offset += (size + 7) // 8
        result.append(((y0, y1, x0, x1), np.array(masks)))
    assert offset == len(content)
    return result


def submit(server: Server, image: str, **decisions: Any) -> requests.Response:
    return requests.post(f"{server.url}/progidiff/review/{image}", json=decisions, timeout=120)


def load_final(server: Server, image: str) -> np.ndarray:
    file = next((server.studies / "labels" / "final").glob(f"{image}.*"))
    return load_volume(server.studies / f"{image}.nii.gz").arrange(np.asarray(nibabel.load(file).dataobj))


def load_shown(server: Server, image: str, prompt: str, show: str) -> np.ndarray:
    _, content, _ = read_answer(server.infer(image, {"prompt": prompt, "num_proposals": 3, "steps": 1, "show": show}))
    return load_volume(server.studies / f"{image}.nii.gz").arrange(np.asarray(read_mask(content).dataobj))


def test_the_page_and_its_files_come_with_a_strict_policy_and_name_no_other_site(server: Server):
    page = server.get("/progidiff/")
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert "<script>" not in page.text
    assert "style=" not in page.text
    assert "onclick" not in page.text
    for name in ("review.js", "review.css", "icon.svg", "masks.js", "session.js"):
        file = server.get(f"/progidiff/static/{name}")
        assert file.status_code == 200
        assert "https://" not in file.text
        assert "innerHTML" not in file.text
    assert server.get("/progidiff", allow_redirects=False).headers["location"] == "/progidiff/"
    for name in ("..%2f..%2fmain.py", "main.py", "nothing.js", ".hidden"):
        assert server.get(f"/progidiff/static/{name}").status_code in (400, 404, 422)


@pytest.mark.parametrize("image", ["plain", "oblique"])
def test_slices_are_those_of_the_axial_stack(server: Server, image: str):
    stack, spacing = load_volume(server.studies / f"{image}.nii.gz").to_stack()
    info = server.get(f"/progidiff/review/{image}").json()
    assert (tuple(info["shape"]), info["scale"]) == (stack.shape, [1.0, 0.0])
    assert info["spacing"] == pytest.approx(spacing, abs=1e-5)
    for z in (0, len(stack) - 1):
        pixels = np.frombuffer(server.get(f"/progidiff/review/{image}/slices/{z}").content, "<i2")
        assert np.array_equal(pixels.reshape(stack.shape[1:]), stack[z])


def test_fractions_and_large_values_come_back_by_scale(server: Server):
    stack, _ = load_volume(server.studies / "fractions.nii.gz", "MR").to_stack()
    info = server.get("/progidiff/review/fractions").json()
    slope, intercept = info["scale"]
    pixels = np.frombuffer(server.get("/progidiff/review/fractions/slices/2").content, "<i2").reshape(stack.shape[1:])
    assert np.abs(pixels * slope + intercept - stack[2]).max() <= slope / 2 * 1.01


def test_packed_masks_are_the_proposals_voxel_by_voxel(server: Server):
    answer = propose(server, "oblique")
    shown = {k: load_shown(server, "oblique", "liver", str(k + 1)) for k in range(3)}
    drawn = 0
    for z in range(6):
        content = server.get(f"/progidiff/review/oblique/masks/{z}", params={"proposals": answer["proposals"]}).content
        (y0, y1, x0, x1), masks = unpack(content)[0]
        for k, mask in enumerate(masks):
            full = np.zeros(shown[k].shape[1:], bool)
            full[y0:y1, x0:x1] = mask
            assert np.array_equal(full, shown[k][z] == 6)
            drawn += int(full.sum())
    assert drawn > 0


@pytest.mark.parametrize(
    "path, status, reason",
    [
        ("nobody", 404, "no image"),
        ("broken", 422, "cannot be read"),
        ("plain/slices/99", 422, "from 0 to 7"),
        ("plain/slices/-1", 422, "from 0 to 7"),
        ("plain/masks/0", 422, "names no proposals"),
        ("plain/masks/0?proposals=" + "0" * 64, 404, "no longer kept"),
        ("fractions/label/0", 404, "no saved label"),
    ],
)
def test_what_is_not_there_is_refused_with_a_reason(server: Server, path: str, status: int, reason: str):
    response = server.get(f"/progidiff/review/{path}")
    assert (response.status_code, reason in response.json()["detail"]) == (status, True), response.text


def test_a_job_that_has_not_come_to_a_slice_has_no_content(server: Server):
    assert server.get("/progidiff/review/plain/masks/0", params={"job": "nothing"}).status_code == 204


def test_proposals_of_another_image_are_not_shown(server: Server):
    key = propose(server, "oblique")["proposals"]
    assert server.get("/progidiff/review/plain/masks/0", params={"proposals": key}).status_code == 404


def test_an_accepted_slice_is_saved_with_its_source_and_nothing_else_is_touched(server: Server):
    key = propose(server, "plain", "liver")["proposals"]
    slices = {
        "3": {"liver": {"rule": "proposal", "members": [2]}},
        "5": {"liver": {"rule": "proposal", "members": [2]}},
    }
    answer = submit(server, "plain", proposals=key, slices=slices, base=0, seconds=12.5).json()
    assert (answer["annotation"]["slices"], answer["annotation"]["structures"]) == ([3, 5], ["liver"])
    expected = load_shown(server, "plain", "liver", "2")
    label = load_final(server, "plain")
    assert np.array_equal(label[[3, 5]], expected[[3, 5]])
    assert not np.delete(label, [3, 5], axis=0).any()
    saved = server.get("/progidiff/annotations", params={"image": "plain"}).json()["annotations"][0]
    assert (saved["source"]["proposals"], saved["source"]["shown"], saved["edited"], saved["seconds"]) == (
        key,
        "2",
        False,
        12.5,
    )
    assert saved["client"] == "review page"
    info = server.get("/progidiff/review/plain").json()
    assert (info["annotated_slices"], info["label"]["sequence"]) == ([3, 5], answer["annotation"]["sequence"])
    shown = np.frombuffer(server.get("/progidiff/review/plain/label/3").content, np.uint8).reshape(label.shape[1:])
    assert np.array_equal(shown, label[3])

    # A second structure joins the first one, on its own slices.
    other = propose(server, "plain", "spleen")["proposals"]
    more = submit(
        server, "plain", proposals=other, slices={"3": {"spleen": {"rule": "union"}}}, base=info["sequence"]
    ).json()
    joined = load_final(server, "plain")
    assert more["annotation"]["slices"] == [3]
    assert np.array_equal(joined[5], label[5])
    assert (joined[3] == 1).any()

    undone = requests.post(f"{server.url}/progidiff/annotations/plain/undo", timeout=30).json()
    assert undone["annotation"]["sequence"] == answer["annotation"]["sequence"]
    assert np.array_equal(load_final(server, "plain"), label)


def test_an_accepted_volume_with_a_pick_of_its_own_on_one_slice(server: Server):
    key = propose(server, "merged")["proposals"]
    consensus = {"rule": "consensus"}
    decisions = {
        "volume": {"liver": consensus, "spleen": consensus},
        "slices": {"4": {"liver": {"rule": "nothing"}, "spleen": {"rule": "nothing"}}},
    }
    answer = submit(server, "merged", proposals=key, base=0, **decisions).json()
    assert answer["annotation"]["slices"] is None
    label = load_final(server, "merged")
    expected = load_shown(server, "merged", "liver and spleen", "consensus")
    expected[4] = 0
    assert np.array_equal(label, expected)
    saved = server.get("/progidiff/annotations", params={"image": "merged"}).json()["annotations"][0]
    assert saved["source"]["shown"] == "merged"


def test_submitting_twice_saves_once(server: Server):
    key = propose(server, "twice")["proposals"]
    decisions = {"proposals": key, "slices": {"2": {"liver": {"rule": "union"}}}, "base": 0}
    first, second = (submit(server, "twice", **decisions) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200), second.text
    assert (first.json()["annotation"]["repeated"], second.json()["annotation"]["repeated"]) == (False, True)
    assert second.json()["annotation"]["sequence"] == first.json()["annotation"]["sequence"]
    assert server.get("/progidiff/annotations", params={"image": "twice"}).json()["total"] == 1


def test_two_people_on_one_image_share_it_by_slices_and_are_told_when_they_collide(server: Server):
    key = propose(server, "shared")["proposals"]

    def decide(z: int, rule: str, base: int) -> requests.Response:
        return submit(server, "shared", proposals=key, slices={str(z): {"liver": {"rule": rule}}}, base=base)

    assert decide(2, "union", 0).status_code == 200
    assert decide(3, "union", 0).status_code == 200  # Another slice: both stay.
    clash = decide(2, "intersection", 0)
    assert (clash.status_code, clash.json()["error"]) == (409, "ConflictError")
    assert "nothing of yours is lost" in clash.json()["detail"]
    info = server.get("/progidiff/review/shared").json()
    assert info["annotated_slices"] == [2, 3]
    assert decide(2, "intersection", info["sequence"]).status_code == 200  # Having seen it, it may be replaced.


@pytest.mark.parametrize(
    "change, status, reason",
    [
        ({"proposals": ""}, 422, "names no proposals"),
        ({"proposals": "0" * 64}, 404, "no longer kept"),
        ({"slices": {}}, 422, "Nothing is decided"),
        ({"slices": {"99": {"liver": {"rule": "union"}}}}, 422, "from 0 to 5"),
        ({"slices": {"1": {"aorta": {"rule": "union"}}}}, 422, "hold no 'aorta'"),
        ({"seconds": -1}, 422, "seconds"),
        ({"base": "x"}, 422, "base"),
    ],
)
def test_senseless_decisions_change_nothing(server: Server, change: dict[str, Any], status: int, reason: str):
    key = propose(server, "oblique")["proposals"]
    decisions = {"proposals": key, "slices": {"1": {"liver": {"rule": "union"}}}, "base": 0, **change}
    response = submit(server, "oblique", **decisions)
    assert (response.status_code, reason in response.json()["detail"]) == (status, True), response.text
    assert server.get("/progidiff/annotations", params={"image": "oblique"}).json()["total"] == 0


def test_a_submission_that_is_no_object_is_refused(server: Server):
    response = requests.post(
        f"{server.url}/progidiff/review/plain", data="[1]", headers={"Content-Type": "application/json"}, timeout=30
    )
    assert response.status_code == 422


def test_a_label_that_was_made_elsewhere_is_shown_by_the_ids_of_the_folder(server: Server):
    image = nibabel.load(write_phantom(server.studies / "labelled.nii.gz", seed=7))
    made = np.zeros(image.shape, np.uint8)
    made[5:9, 4:8, 2] = 6
    final = server.studies / "labels" / "final"
    nibabel.save(nibabel.Nifti1Image(made, image.affine), final / "labelled.nii.gz")
    for _ in range(50):
        if server.get("/progidiff/review/labelled").ok:
            break
        time.sleep(0.1)
    info = server.get("/progidiff/review/labelled").json()
    assert info["label_ids"] == {"liver": 6}
    assert info["label"]["sequence"] == info["sequence"] > 0
    assert info["annotated_slices"] is None
    drawn = load_volume(server.studies / "labelled.nii.gz").arrange(made)
    for z in (0, int(np.flatnonzero(drawn.any(axis=(1, 2)))[0])):
        content = server.get(f"/progidiff/review/labelled/label/{z}").content
        assert np.array_equal(np.frombuffer(content, np.uint8).reshape(drawn[z].shape), drawn[z])


def test_structures_of_two_results_are_saved_in_one_submission_each_on_its_own_slices(server: Server):
    liver, spleen = (propose(server, "several", name)["proposals"] for name in ("liver", "spleen"))
    union = {"rule": "union"}
    parts = [
        {"proposals": liver, "slices": {"2": {"liver": union}, "3": {"liver": union}}},
        {"proposals": spleen, "volume": {"spleen": union}},
    ]
    effort = {"liver": {"seconds": 20, "clicks": 9}, "spleen": {"seconds": 5.5, "clicks": 2}}
    answer = submit(server, "several", parts=parts, base=0, seconds=30, effort=effort).json()
    told = [(saved["structures"], saved["slices"]) for saved in answer["saves"]]
    assert told == [(["liver"], [2, 3]), (["spleen"], None)]
    assert answer["annotation"] == answer["saves"][-1]

    label = load_final(server, "several")
    stack = load_volume(server.studies / "several.nii.gz").to_stack()[0]
    masks = {
        name: np.any([load_shown(server, "several", name, str(k)) > 0 for k in (1, 2, 3)], axis=0)
        for name in ("liver", "spleen")
    }
    masks["liver"][[z for z in range(len(stack)) if z not in (2, 3)]] = False
    assert np.array_equal(label > 0, masks["liver"] | masks["spleen"])
    assert not (label[~masks["liver"]] == 6).any()

    info = server.get("/progidiff/review/several").json()
    assert info["annotated"] == {"liver": [2, 3], "spleen": None}
    saves = server.get("/progidiff/annotations", params={"image": "several"}).json()["annotations"][::-1]
    assert [(s["seconds"], s["effort"], s["edited"]) for s in saves] == [
        (20, [["liver", 20, 9]], False),
        (5.5, [["spleen", 5.5, 2]], False),
    ]
    assert [s["source"]["proposals"] for s in saves] == [liver, spleen]


def test_a_structure_that_is_decided_on_other_slices_than_its_neighbour_is_not_called_absent_there(server: Server):
    key = propose(server, "ragged")["proposals"]
    union = {"rule": "union"}
    answer = submit(
        server, "ragged", proposals=key, slices={"2": {"liver": union}, "4": {"spleen": union, "liver": union}}, base=0
    ).json()
    told = [(saved["structures"], saved["slices"]) for saved in answer["saves"]]
    assert told == [(["liver"], [2, 4]), (["spleen"], [4])]
    assert server.get("/progidiff/review/ragged").json()["annotated"] == {"liver": [2, 4], "spleen": [4]}


def test_one_structure_is_decided_by_one_result(server: Server):
    keys = [propose(server, "ragged", name)["proposals"] for name in ("liver", "liver and spleen")]
    parts = [{"proposals": key, "volume": {"liver": {"rule": "union"}}} for key in keys]
    for sent, reason in ((parts, "decided in two parts"), ([], "1 to 32"), ("x", "1 to 32")):
        answer = submit(server, "ragged", parts=sent, base=0)
        assert (answer.status_code, reason in answer.json()["detail"]) == (422, True), answer.text


def pack_drawn(structure: str, mask: np.ndarray, edits: int, **more: Any) -> dict[str, Any]:
    """A slice drawn by hand as the page sends it, by the format's description."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return {"structure": structure, "box": None, "runs": [], "edits": edits, **more}
    box = [int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1]
    inside = mask[box[0] : box[1], box[2] : box[3]].ravel()
    ends = np.flatnonzero(np.diff(np.concatenate([[False], inside]).astype(np.int8))).tolist()
    runs = np.diff([0, *ends, len(inside)]).tolist()
    return {"structure": structure, "box": box, "runs": runs, "edits": edits, **more}


def test_what_was_drawn_by_hand_is_saved_voxel_by_voxel_with_who_and_how_many_edits(server: Server):
    volume = load_volume(server.studies / "drawn.nii.gz")
    shape = volume.grid.stack_shape
    key = propose(server, "drawn")["proposals"]
    random = np.random.default_rng(0)
    liver, lesion = (random.random(shape[1:]) < share for share in (0.5, 0.1))
    consensus = {"rule": "consensus"}
    painted = {
        "shape": list(shape),
        "slices": {
            "2": [
                pack_drawn("liver", liver, 3, start=consensus, proposals=key),
                pack_drawn("Lesion 7", lesion, 2),
            ],
            "4": [pack_drawn("liver", liver & False, 1, start=consensus, proposals=key)],
        },
    }
    slices = {"2": {"spleen": consensus, "liver": consensus}, "3": {"liver": consensus}}
    answer = submit(server, "drawn", proposals=key, slices=slices, painted=painted, base=0).json()
    assert sorted((save["structures"], save["slices"]) for save in answer["saves"]) == [
        (["Lesion 7"], [2]),
        (["liver"], [2, 3, 4]),
        (["spleen"], [2]),
    ]
    ids = answer["annotation"]["label_ids"]
    label = load_final(server, "drawn")
    assert np.array_equal(label[2] == ids["Lesion 7"], lesion)
    assert np.array_equal(label[2] == 6, liver & ~lesion)

    def find_consensus(structure: int, z: int) -> np.ndarray:
        packed = server.get(f"/progidiff/review/drawn/masks/{z}", params={"proposals": key}).content
        (y0, y1, x0, x1), masks = unpack(packed)[structure]
        drawn = np.zeros(shape[1:], bool)
        drawn[y0:y1, x0:x1] = masks.sum(axis=0) * 2 >= len(masks) if len(masks) else False
        return drawn

    assert np.array_equal(label[2] == 1, find_consensus(1, 2) & ~lesion & ~liver)
    assert np.array_equal(label[3] == 6, find_consensus(0, 3))
    assert not (label[4] == 6).any()

    saved = {
        save["structures"][0]: save
        for save in server.get("/progidiff/annotations", params={"image": "drawn"}).json()["annotations"]
    }
    assert (saved["liver"]["edits"], saved["liver"]["edited"], saved["liver"]["source"]["shown"]) == (
        4,
        True,
        "consensus",
    )
    assert (saved["Lesion 7"]["edits"], saved["Lesion 7"]["edited"], saved["Lesion 7"]["source"]) == (2, True, None)
    assert (saved["spleen"]["edits"], saved["spleen"]["edited"]) == (None, False)
    again = submit(server, "drawn", proposals=key, slices=slices, painted=painted, base=0)
    assert again.status_code == 200, again.text


def test_a_drawing_needs_no_proposals_and_one_that_is_cut_off_or_of_another_grid_is_refused(server: Server):
    shape = load_volume(server.studies / "oblique.nii.gz").grid.stack_shape
    mask = np.zeros(shape[1:], bool)
    mask[5:9, 3:30] = True
    entry = pack_drawn("liver", mask, 1, start={"rule": "consensus"}, proposals="0" * 64)
    for change, status, reason in (
        ({"shape": [1, 2, 3]}, 422, "was drawn is on a grid of 1 x 2 x 3 voxels"),
        ({"slices": {"1": [{**entry, "runs": entry["runs"][:-1]}]}}, 422, "cut off on its way"),
        ({"slices": {"1": []}}, 422, "names no proposals"),
        ({"slices": {"99": [entry]}}, 422, "from 0 to 5"),
    ):
        painted = {"shape": list(shape), "slices": {"1": [entry]}, **change}
        refused = submit(server, "oblique", proposals="", painted=painted, base=0)
        assert (refused.status_code, reason in refused.json()["detail"]) == (status, True), refused.text
    saved = submit(server, "oblique", painted={"shape": list(shape), "slices": {"1": [entry]}}, base=0)
    assert saved.status_code == 200, saved.text
    assert np.array_equal(load_final(server, "oblique")[1] == 6, mask)
    assert requests.post(f"{server.url}/progidiff/annotations/oblique/undo", timeout=30).ok
