"""OHIF in a real browser on a local folder: open, prompt, step through, accept, submit; the file on disk is the accepted proposal."""

from __future__ import annotations

import gzip
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from browser import drive, needs_browser
from conftest import APP, ROOT, Server, copy_app, run_server, write_phantom

pytestmark = needs_browser

SWITCH_MS = 300
"""Another proposal is on the screen after this time."""


def write_crop(path: Path) -> Path:
    """The upper abdomen of the sample CT at half its resolution, turned so that files and slices run differently; else a phantom."""
    source = ROOT / "sample_datastore" / "sample_ct_abdomen.nii.gz"
    if not source.is_file():
        return write_phantom(path, shape=(96, 96, 24))
    image = nibabel.as_closest_canonical(nibabel.load(source))
    crop = image.slicer[::2, ::2, -60::2]
    turned = crop.as_reoriented(nibabel.orientations.axcodes2ornt(("P", "S", "R")))
    nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj).astype(np.int16), turned.affine), path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ohif")
    studies = folder / "studies"
    studies.mkdir()
    write_crop(studies / "abdomen.nii.gz")
    (studies / "abdomen.json").write_text(json.dumps({"modality": "CT", "description": "upper abdomen"}))
    with run_server(
        studies, copy_app(folder), folder / "server.log", "model_dir", str(APP / "model"), "device", "cpu", "score_pool", "off"
    ) as running:
        yield running


def read_proposal(server: Server, show: str) -> np.ndarray:
    answer = server.infer("abdomen", {"prompt": "liver", "num_proposals": 3, "show": show}, output="image")
    return np.asarray(nibabel.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(answer.content))).dataobj)


def test_the_whole_round_in_ohif(server: Server, tmp_path: Path):
    seen = drive("ohif.mjs", server.url, tmp_path / "shots", image="abdomen", prompt="liver", count=3, accept="2")
    print(json.dumps({key: seen[key] for key in ("listed", "firstPixels", "first", "proposals", "switches")}), tmp_path)
    assert seen["shows"] == ["consensus", "1", "2", "3", "disagreement"]
    for show in ("consensus", "1", "2", "3"):
        expected = read_proposal(server, show)
        assert seen["counts"][show].get("6", 0) == int((expected == 6).sum()), show
    assert statistics.median(seen["switches"][1:]) < SWITCH_MS  # the first one fetched its mask

    accepted = read_proposal(server, "2")
    assert accepted.any()
    image = nibabel.load(server.studies / "abdomen.nii.gz")
    label = nibabel.load(next((server.studies / "labels" / "final").glob("abdomen.*")))
    np.testing.assert_array_equal(np.asarray(label.dataobj), accepted)
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-4)

    assert seen["exported"]["status"] == 200, seen["exported"]["text"]
    first, second, third = sorted(
        server.get("/progidiff/annotations", params={"image": "abdomen"}).json()["annotations"], key=lambda entry: entry["sequence"]
    )
    assert first["slices"] == [seen["slice"]]
    assert first["edited"] is False
    assert (second["slices"], second["edited"]) == (None, False)
    assert second["structures"] == ["liver"]
    assert second["source"]["shown"] == "2"
    # OHIF's own export of the same mask: another save of the same voxels.
    assert (third["slices"], third["structures"]) == (None, ["liver"])
