"""The review page in a real browser: what was accepted there is what lies on disk, voxel by voxel, whatever happens on
the way.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.model.close_up_folder import FOLDER as CLOSE_UP
from support.browser import drive, needs_browser
from support.crops import SWITCH_MS, write_crop
from support.servers import APP, Server, copy_app, run_server

pytestmark = needs_browser

COUNT = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("review")
    studies = folder / "studies"
    studies.mkdir()
    for name in ("abdomen", "other"):
        write_crop(studies / f"{name}.nii.gz")
        (studies / f"{name}.json").write_text(json.dumps({"modality": "CT"}))
    unsure = nibabel.load(studies / "other.nii.gz")
    unsure.header["qform_code"] = unsure.header["sform_code"] = 0
    nibabel.save(nibabel.Nifti1Image(np.asarray(unsure.dataobj), None, unsure.header), studies / "other.nii.gz")
    (studies / "older").mkdir()
    write_crop(studies / "older" / "lost.nii.gz")
    with serve(studies, folder, APP / "model") as running:
        yield running


def serve(studies: Path, folder: Path, model: Path) -> AbstractContextManager[Server]:
    conf = ("model_dir", str(model), "device", "cpu", "score_pool", "off")
    return run_server(studies, copy_app(folder), folder / "server.log", *conf)


def read_stack(content: bytes, volume: Volume) -> np.ndarray:
    return volume.arrange(np.asarray(nibabel.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(content))).dataobj))


def read_proposals(server: Server, volume: Volume) -> dict[str, np.ndarray]:
    shows = ("consensus", *(str(k + 1) for k in range(COUNT)))
    request = {"prompt": "liver", "num_proposals": COUNT}
    return {
        show: read_stack(server.infer("abdomen", {**request, "show": show}, output="image").content, volume) == 6
        for show in shows
    }


def read_version(server: Server, saved: dict[str, Any], volume: Volume) -> np.ndarray:
    content = server.get(f"/progidiff/annotations/abdomen/{saved['sequence']}/label").content
    return read_stack(content, volume) == 6


def test_the_whole_round_on_the_review_page(server: Server, tmp_path: Path):
    shots = tmp_path / "shots"
    seen = drive(
        "review.mjs",
        server.url,
        shots,
        image="abdomen",
        unsure="other",
        prompt="liver",
        count=COUNT,
        width=1400,
        height=860,
    )
    times = {name: seen[name] for name in ("firstPixels", "firstProposal", "slices", "switches")}
    print(json.dumps(times), shots)
    assert max(seen["switches"]) < SWITCH_MS
    assert seen["foreign"] == []
    assert not seen["isInjected"]
    assert [
        problem
        for problem in seen["problems"]
        if "Failed to load resource" not in problem and "inline script" not in problem
    ] == []
    assert (seen["isReadOnly"], seen["isTaken"]) == (True, True)
    assert seen["overflow"] <= 0
    assert len(seen["leftOut"]) == 1
    assert seen["leftOut"][0].startswith("older/ Images in subfolders are not served (lost.nii.gz)")
    assert seen["isPlainQuiet"]
    assert "'other.nii.gz' gives no orientation" in seen["warning"]

    volume = load_volume(server.studies / "abdomen.nii.gz")
    proposals = read_proposals(server, volume)
    drawn = {str(k + 1): proposals[str(k + 1)] for k in range(COUNT)}
    z = seen["counted"]["z"]
    for key, count in seen["counted"]["counts"].items():
        assert count == proposals["consensus" if key == "c" else key][z].sum(), key

    first, second, third, fourth = (seen[name] for name in ("first", "second", "third", "fourth"))
    assert [part["pick"] for part in (first, second, third)] == ["proposal 2", "union of all", "absent"]
    assert fourth["pick"] == "intersection of 1, 3"
    assert str(third["z"] + 1) not in seen["decided"].split("slices ")[1].replace("–", ",").split(", ")
    assert seen["restored"] == seen["decided"]

    saves = sorted(
        server.get("/progidiff/annotations", params={"image": "abdomen"}).json()["annotations"],
        key=lambda saved: saved["sequence"],
    )
    assert [saved["slices"] for saved in saves] == [
        sorted([first["z"], second["z"]]),
        None,
        [fourth["z"]],
    ]  # Three saves, none of them twice.
    assert [saved["source"]["shown"] for saved in saves] == ["merged", "consensus", "merged"]
    assert all(
        saved["edited"] is False and saved["structures"] == ["liver"] and saved["client"] == "review page"
        for saved in saves
    )

    expected = np.zeros(proposals["consensus"].shape, bool)
    expected[first["z"]] = drawn["2"][first["z"]]
    expected[second["z"]] = np.any([mask[second["z"]] for mask in drawn.values()], axis=0)
    assert (int(expected[first["z"]].sum()), int(expected[second["z"]].sum())) == (first["pixels"], second["pixels"])
    np.testing.assert_array_equal(read_version(server, saves[0], volume), expected)
    np.testing.assert_array_equal(read_version(server, saves[1], volume), proposals["consensus"])
    in_force = {saved["sequence"] for saved in seen["undone"]["annotations"] if saved["in_force"]}
    assert in_force == {saves[0]["sequence"]}

    expected[fourth["z"]] = drawn["1"][fourth["z"]] & drawn["3"][fourth["z"]]
    label = nibabel.load(next((server.studies / "labels" / "final").glob("abdomen.*")))
    np.testing.assert_array_equal(volume.arrange(np.asarray(label.dataobj)) == 6, expected)
    assert set(np.unique(np.asarray(label.dataobj))) <= {0, 6}
    np.testing.assert_allclose(label.affine, volume.affine, atol=1e-4)


def test_clicks_choose_among_the_proposals_of_a_model_without_a_close_up(tmp_path: Path):
    studies, model = tmp_path / "studies", tmp_path / "model"
    studies.mkdir()
    write_crop(studies / "abdomen.nii.gz")
    shutil.copytree(APP / "model", model, ignore=shutil.ignore_patterns(CLOSE_UP))
    with serve(studies, tmp_path, model) as server:
        seen = drive("choosing.mjs", server.url, tmp_path / "shots", image="abdomen", prompt="liver", count=COUNT)
    assert seen["problems"] == []
    assert seen["isDeaf"]
    assert "clicks choose among its proposals" in seen["note"]
    assert (seen["chosen"], seen["after"]) == ("consensus", "proposal 2")
