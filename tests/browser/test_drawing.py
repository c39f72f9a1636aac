"""Drawing on the review page in a real browser: what was drawn there is what lies on disk, voxel by voxel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from progidiff.images.reading import load_volume
from progidiff.prompts.structures import fixed_ids
from support.browser import drive, needs_browser
from support.crops import write_crop
from support.servers import Server, copy_app, run_server

pytestmark = needs_browser

PROMPT = "spleen"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("drawing")
    studies = folder / "studies"
    studies.mkdir()
    write_crop(studies / "abdomen.nii.gz")
    (studies / "abdomen.json").write_text(json.dumps({"modality": "CT"}))
    conf = ("model_dir", str(tiny_model), "device", "cpu", "score_pool", "off")
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
