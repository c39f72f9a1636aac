"""OHIF in a real browser, on a folder and against Orthanc: open, prompt, step through, accept, submit, export; what is
saved is what was accepted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from progidiff.images.reading import load_label, load_volume
from support.browser import drive, needs_browser
from support.crops import SWITCH_MS, write_crop
from support.pacs import find_lack, run_orthanc
from support.servers import APP, Server, copy_app, run_server

pytestmark = needs_browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ohif")
    studies = folder / "studies"
    studies.mkdir()
    write_crop(studies / "abdomen.nii.gz")
    (studies / "abdomen.json").write_text(json.dumps({"modality": "CT", "description": "upper abdomen"}))
    with run_server(
        studies,
        copy_app(folder),
        folder / "server.log",
        "model_dir",
        str(APP / "model"),
        "device",
        "cpu",
        "score_pool",
        "off",
    ) as running:
        yield running


def read_proposal(server: Server, image: str, show: str, file: Path) -> np.ndarray:
    """Liver of a proposal, as an axial stack."""
    file.write_bytes(server.infer(image, {"prompt": "liver", "num_proposals": 3, "show": show}, output="image").content)
    return load_volume(file, "CT").to_stack()[0] == 6


def check_round(server: Server, image: str, called: str, tmp_path: Path) -> None:
    """Drive the whole round, and compare what was shown and saved with what the server proposes.

    Args:
        server: Running.
        image: Id of the image on the server.
        called: Its patient id.
        tmp_path: For files.
    """
    seen = drive(
        "ohif.mjs", server.url, tmp_path / "shots", image=called, called=image, prompt="liver", count=3, accept="2"
    )
    print(json.dumps({key: seen[key] for key in ("listed", "firstPixels", "first", "proposals", "switches")}), tmp_path)
    assert seen["shows"] == ["consensus", "1", "2", "3", "disagreement"]
    for show in ("consensus", "1", "2", "3"):
        assert seen["counts"][show].get("6", 0) == int(
            read_proposal(server, image, show, tmp_path / "mask.nii.gz").sum()
        ), show
    assert statistics.median(seen["switches"][1:]) < SWITCH_MS  # the first one fetched its mask

    accepted = read_proposal(server, image, "2", tmp_path / "accepted.nii.gz")
    assert accepted.any()
    assert seen["exported"]["status"] == 200, seen["exported"]["text"]
    saves = sorted(
        server.get("/progidiff/annotations", params={"image": image}).json()["annotations"],
        key=lambda entry: entry["sequence"],
    )
    first, second, third = saves
    assert first["slices"] == [seen["slice"]]
    assert first["edited"] is False
    assert (second["slices"], second["edited"]) == (None, False)
    assert second["structures"] == ["liver"]
    assert second["source"]["shown"] == "2"
    # OHIF's own export of the same mask: another save of the same voxels.
    assert (third["slices"], third["structures"]) == (None, ["liver"])
    grid = load_volume(tmp_path / "accepted.nii.gz", "CT")
    for save in (second, third):
        answer = server.get(f"/progidiff/annotations/{image}/{save['sequence']}/label")
        name = answer.headers["content-disposition"].split("filename=")[-1].strip('"')
        file = tmp_path / f"{save['sequence']}{'.nrrd' if name.endswith('.nrrd') else '.nii.gz'}"
        file.write_bytes(answer.content)
        np.testing.assert_array_equal(grid.arrange(load_label(file, like=grid.grid)) == 6, accepted)


def test_the_whole_round_in_ohif_on_a_folder(server: Server, tmp_path: Path):
    check_round(server, "abdomen", "abdomen", tmp_path)
    # The file on disk is the accepted proposal, voxel by voxel, on the grid of the image.
    image = load_volume(server.studies / "abdomen.nii.gz")
    label = load_label(next((server.studies / "labels" / "final").glob("abdomen.*")), like=image.grid)
    np.testing.assert_array_equal(
        image.arrange(label) == 6, read_proposal(server, "abdomen", "2", tmp_path / "mask.nii.gz")
    )


@pytest.mark.skipif(bool(find_lack()), reason=find_lack() or "-")
def test_the_same_round_against_orthanc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = tmp_path / "images"
    images.mkdir()
    write_crop(images / "abdomen.nii.gz")
    (images / "abdomen.json").write_text(json.dumps({"modality": "CT", "description": "upper abdomen"}))
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path / "cache"))
    conf = ("model_dir", str(APP / "model"), "device", "cpu", "store", str(tmp_path / "state"))
    with (
        run_orthanc(tmp_path, images) as address,
        run_server(address, copy_app(tmp_path), tmp_path / "server.log", *conf) as running,
    ):  # type: ignore[arg-type]
        found = running.get("/proxy/dicom/qido/series", params={"PatientID": "abdomen"}).json()
        check_round(running, found[0]["0020000E"]["Value"][0], "abdomen", tmp_path)
        found = running.get("/proxy/dicom/qido/series", params={"Modality": "SEG"}).json()
        assert len(found) == 3
