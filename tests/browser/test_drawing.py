"""Drawing on the review page in a real browser: what was drawn there is what lies on disk, voxel by voxel."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from progidiff.images.reading import load_label, load_volume
from progidiff.prompts.structures import fixed_ids
from progidiff.testing import add_tiny_close_up
from support.browser import drive, needs_browser
from support.crops import write_crop
from support.phantoms import write_phantom
from support.series import write_series
from support.servers import Server, copy_app, run_server

pytestmark = needs_browser

PROMPT = "spleen"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("drawing")
    studies = folder / "studies"
    studies.mkdir()
    for name in ("abdomen", "ohif", "steered", "taught"):
        write_crop(studies / f"{name}.nii.gz")
        (studies / f"{name}.json").write_text(json.dumps({"modality": "CT"}))
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    conf = ("model_dir", str(add_tiny_close_up(model)), "device", "cpu", "score_pool", "off")
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as running:
        yield running


def unpack(drawn: list[dict[str, Any]], structure: str, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Axial index -> mask of shape (Y, X), by the description of the format and not by the server's code."""
    masks = {}
    for entry in drawn:
        if entry["structure"] != structure:
            continue
        mask = np.zeros(shape[1:], bool)
        if entry["box"]:
            y0, y1, x0, x1 = entry["box"]
            values = np.concatenate([np.full(length, k % 2, bool) for k, length in enumerate(entry["runs"])])
            mask[y0:y1, x0:x1] = values.reshape(y1 - y0, x1 - x0)
        masks[entry["z"]] = mask
    return masks


def test_what_was_drawn_is_saved_voxel_by_voxel_whatever_happens_on_the_way(server: Server, tmp_path: Path):
    shots = tmp_path / "shots"
    said = drive("drawing.mjs", server.url, shots, image="abdomen", prompt=PROMPT, width=1500, height=900)
    print({name: value for name, value in said.items() if name not in ("first", "second", "third")}, shots)
    problems = [problem for problem in said["problems"] if "Failed to load resource" not in problem]
    assert problems == []

    assert said["ring"] < said["filled"]
    assert said["erased"] < said["filled"]
    assert (said["undone"], said["redone"]) == (said["filled"], said["erased"])
    assert said["lassoed"] > said["cut"] > said["redone"]
    lowest = said["slices"][0]
    assert said["slices"] == list(range(lowest, lowest + 6))
    assert said["isKept"]
    assert (said["afterUndo"], said["afterRedo"]) == (3, 6)
    assert said["isSent"]
    assert 0 <= said["window"]["low"] <= said["window"]["high"] <= 80
    assert said["window"]["count"] > 0
    assert (said["isReadOnly"], said["isTaken"]) == (True, True)
    assert said["mended"] != said["proposed"]
    assert (said["replaced"], said["back"]) == ("proposal 2", said["mended"])
    assert min(said["targets"]) >= 40
    assert said["overflow"] <= 0
    assert said["touched"] == 1
    assert said["zoom"] > 1.2
    assert said["isUntouched"]

    volume = load_volume(server.studies / "abdomen.nii.gz")
    ids = fixed_ids()
    file = next((server.studies / "labels" / "final").glob("abdomen.*"))
    label = volume.arrange(np.asarray(nibabel.load(file).dataobj))
    spleen = unpack(said["third"], PROMPT, label.shape)
    assert len(spleen) == 1
    for z, mask in spleen.items():
        assert np.array_equal(label[z] == ids[PROMPT], mask)
    liver = unpack(said["third"], "liver", label.shape)
    for z in range(len(label)):
        drawn = liver.get(z, np.zeros(label.shape[1:], bool)) & ~spleen.get(z, np.zeros(label.shape[1:], bool))
        assert np.array_equal(label[z] == ids["liver"], drawn), z

    saves = server.get("/progidiff/annotations", params={"image": "abdomen"}).json()["annotations"]
    first = min(saves, key=lambda saved: saved["sequence"])
    drawn = unpack(said["first"], "liver", label.shape)
    assert (first["slices"], first["structures"], first["edited"]) == (sorted(drawn), ["liver"], True)
    assert first["edits"] == sum(entry["edits"] for entry in said["first"])
    content = server.get(f"/progidiff/annotations/abdomen/{first['sequence']}/label").content
    (tmp_path / "first.nii.gz").write_bytes(content)
    version = volume.arrange(np.asarray(nibabel.load(tmp_path / "first.nii.gz").dataobj))
    for z, mask in drawn.items():
        assert np.array_equal(version[z] == ids["liver"], mask), z


def test_a_structure_that_nobody_knows_is_added_and_labelled_on_the_page(server: Server, tmp_path: Path):
    name = "left ventricle"
    given = {"image": "taught", "name": name, "words": "LV, cor", "color": "#3366cc", "width": 1500, "height": 900}
    said = drive("teaching.mjs", server.url, tmp_path / "shots", timeout_s=900, **given)
    print(said, tmp_path / "shots")
    assert [problem for problem in said["problems"] if "Failed to load resource" not in problem] == []
    assert "'livr' is nearly 'liver'" in said["asked"]
    assert "Keep “livr”" in said["asked"]
    assert "no slice labelled yet, 4 until proposals can be expected" in said["fresh"]
    assert said["isActive"] == "true"
    assert "2 slices labelled, 2 more until proposals can be expected" in said["taught"]
    assert "2 slices labelled" in said["again"]
    assert said["color"].replace(" ", "") == "rgb(51,102,204)"
    assert min(said["targets"]) >= 40
    assert said["overflow"] <= 0

    listed = server.get("/progidiff/structures").json()["structures"]
    own = {entry["name"]: entry for entry in listed if entry["is_own"]}
    assert list(own) == [name]  # what was misspelt is none
    assert (own[name]["color"], own[name]["words"], own[name]["slices"]) == ("#3366cc", ["LV", "cor"], 2)
    number = own[name]["label_id"]
    assert json.loads((server.studies / "labels.json").read_text())[str(number)] == name
    volume = load_volume(server.studies / "taught.nii.gz")
    file = next((server.studies / "labels" / "final").glob("taught.*"))
    label = volume.arrange(load_label(file, like=volume.grid))
    drawn = unpack(said["drawn"], name, label.shape)
    spleen = unpack(said["mended"], "spleen", label.shape)  # drawn over it, as spleeen
    assert (len(drawn), len(spleen)) == (2, 1)
    nothing = np.zeros(label.shape[1:], bool)
    for z in range(len(label)):
        assert np.array_equal(label[z] == fixed_ids()["spleen"], spleen.get(z, nothing)), z
        assert np.array_equal(label[z] == number, drawn.get(z, nothing) & ~spleen.get(z, nothing)), z
    assert {entry["structure"] for entry in said["mended"]} == {name, "spleen"}


def test_what_is_drawn_in_ohif_in_another_segment_is_asked_about_and_kept(server: Server, tmp_path: Path):
    ids = fixed_ids()
    said = drive(
        "ohif_drawing.mjs",
        server.url,
        tmp_path / "shots",
        image="ohif",
        prompt="liver",
        other=[ids["spleen"], "spleen"],
        timeout=60000,
    )
    assert said["segments"] == {"listed": ["liver"], "active": "liver"}
    assert "spleen, drawn on 1 slice" in said["kept"]
    assert said["again"].startswith("This was saved already")
    assert [name for name in said["bands"] if name.startswith("disagreement")]
    assert sorted(said["after"]["listed"]) == ["liver", "spleen"]
    assert said["inside"] == [ids["liver"], 0]  # the first point is inside, the second one outside

    volume = load_volume(server.studies / "ohif.nii.gz")
    file = next((server.studies / "labels" / "final").glob("ohif.*"))
    label = volume.arrange(load_label(file, like=volume.grid))
    assert {label[tuple(said[place])] for place in ("stroke", "second")} == {ids["liver"]}  # both were counted as liver
    saves = server.get("/progidiff/annotations", params={"image": "ohif"}).json()["annotations"]
    spleen = [save for save in saves if save["structures"] == ["spleen"]]
    assert [save["slices"] for save in spleen] == [[said["stroke"][0]]]
    kept = server.get(f"/progidiff/annotations/ohif/{spleen[0]['sequence']}/label")
    suffix = ".nrrd" if ".nrrd" in kept.headers["content-disposition"] else ".nii.gz"
    (tmp_path / f"kept{suffix}").write_bytes(kept.content)
    before = volume.arrange(load_label(tmp_path / f"kept{suffix}", like=volume.grid))
    assert before[tuple(said["stroke"])] == ids["spleen"]
    assert (before == ids["spleen"]).sum() == 1


def test_clicks_and_lines_steer_the_proposals_whatever_happens_on_the_way(server: Server, tmp_path: Path):
    said = drive(
        "steering.mjs",
        server.url,
        tmp_path / "shots",
        image="steered",
        name="gizmo",
        width=1500,
        height=900,
        timeout_s=900,
    )
    problems = [problem for problem in said["problems"] if "Failed to load resource" not in problem]
    assert problems == []
    assert said["isTaken"] == "true"
    assert all(said["inside"])  # every proposal keeps what was clicked
    assert said["asked"] <= 2
    assert not any(said["outside"])
    assert all(said["both"])
    assert all(said["scribbled"])
    assert said["kinds"] == [
        "click inside",
        "click outside",
        "click inside",
        "scribble inside",
        "box inside",
        "lasso inside",
    ]
    assert said["results"] == 1  # each answer takes the place of the one before
    assert (said["isSame"], said["isKept"], said["isIgnored"]) == (True, True, True)
    assert all(said["late"])
    assert (said["isReadOnly"], said["isShared"]) == (True, True)
    assert min(said["targets"]) >= 40
    assert said["overflow"] <= 0

    # The saved label holds the clicked voxels, at the very place where they were clicked.
    saves = server.get("/progidiff/annotations", params={"image": "steered"}).json()["annotations"]
    (save,) = saves
    assert (save["slices"], save["structures"]) == ([said["saved"]["z"]], ["gizmo"])
    assert save["source"]["steering"].startswith("3 clicks inside, 1 click outside, 1 scribble inside")
    volume = load_volume(server.studies / "steered.nii.gz")
    file = next((server.studies / "labels" / "final").glob("steered.*"))
    label = volume.arrange(load_label(file, like=volume.grid))
    clicks = [edit for edit in said["last"][:-1] if edit["kind"] == "click"]
    for edit in clicks:
        ((y, x),) = edit["points"]
        assert bool(label[edit["z"], y, x]) == edit["positive"], edit


def test_images_are_added_by_dropping_them_and_as_folders(server: Server, tmp_path: Path):
    scan = write_phantom(tmp_path / "scan.nii.gz").read_bytes()
    series = write_series(tmp_path / "series", name="walk-in")
    files = [("dropped.nii.gz", scan), ("letter.nii.gz", b"Dear colleague, ...")]
    said = drive(
        "adding.mjs",
        server.url,
        tmp_path / "shots",
        files=[(name, base64.b64encode(content).decode()) for name, content in files],
        folder=str(series),
        refused="letter",
    )
    added = [line.partition("added as ")[2] for line in said["lines"] if "added as" in line]
    assert "dropped" in added
    assert len(added) == 2
    assert set(added) <= set(said["listed"])
    assert (server.studies / "dropped.nii.gz").read_bytes() == scan
    (folder,) = set(added) - {"dropped"}
    assert server.get(f"/progidiff/review/{folder}").json()["shape"] == [4, 6, 5]
