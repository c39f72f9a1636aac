"""The main job as a user does it: the stock client against a real server process with the embedded weights, on a real
CT.

It runs on `sample_ct_abdomen`, or on the generated phantom where that could not be fetched; the test's id says which.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monailabel.client import MONAILabelClient

from support.servers import APP, ROOT, Server, copy_app, run_server

SAMPLES = ROOT / "sample_datastore"
REAL, PHANTOM = "sample_ct_abdomen", "sample_phantom_ct"
IMAGE = REAL if (SAMPLES / f"{REAL}.nii.gz").is_file() else PHANTOM
REQUEST = {"prompt": "liver", "num_proposals": 4, "seed": 0}

WEIGHTS = list((APP / "model").rglob("*.safetensors"))

pytestmark = [
    pytest.mark.skipif(not WEIGHTS, reason="apps/progidiff/model holds no weights; `progidiff train` writes them"),
    pytest.mark.skipif(
        not (SAMPLES / f"{IMAGE}.nii.gz").is_file(), reason="sample_datastore is empty; run `make setup`"
    ),
    pytest.mark.parametrize("image", [IMAGE]),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("end-to-end")
    studies = folder / "studies"
    studies.mkdir()
    for file in SAMPLES.glob(f"{IMAGE}.*"):
        shutil.copy(file, studies)
    app = copy_app(folder)
    (app / "model").symlink_to(APP / "model")
    with run_server(studies, app, folder / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> MONAILabelClient:
    return MONAILabelClient(server.url, tmpdir=str(tmp_path_factory.mktemp("client")), client_id="end-to-end")


@pytest.fixture(scope="module")
def consensus(client: MONAILabelClient, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The first inference: its file (the client reuses names only by chance, so it is copied) and parameters."""
    file, params = client.infer("progidiff", IMAGE, dict(REQUEST))
    return Path(shutil.copy(file, tmp_path_factory.mktemp("consensus") / "mask.nii.gz")), params


def test_the_client_connects_and_gets_the_next_sample(client: MONAILabelClient, image: str):
    info = client.info()
    assert info["name"] == "ProGiDiff Label"
    assert "progidiff" in info["models"]
    sample = client.next_sample("random", {})
    assert sample["id"] == image
    assert Path(sample["path"]).is_file()


def test_the_mask_of_the_liver_is_on_the_images_grid(consensus: tuple[Path, dict], image: str):
    file, params = consensus
    mask, original = nibabel.load(file), nibabel.load(SAMPLES / f"{image}.nii.gz")
    assert mask.shape == original.shape
    np.testing.assert_allclose(mask.affine, original.affine, atol=1e-4)
    assert mask.get_data_dtype() == np.uint8
    voxels = np.asarray(mask.dataobj)
    assert params["label_names"] == ({"liver": 6} if (voxels == 6).any() else {})
    assert set(np.unique(voxels)) <= {0, 6}
    assert params["num_proposals"] == 4
    assert params["modality"] == "CT"
    assert len(params["structures"]["liver"]["proposals_ml"]) == 4
    if image == REAL:
        # A part of the organ is in the picture; an adult's whole liver has 0.8 to 2.5 litres.
        assert 200 < params["shown_ml"]["liver"] < 2500


def test_switching_the_proposal_computes_nothing_and_shows_another_mask(
    consensus: tuple[Path, dict], client: MONAILabelClient, image: str
):
    _, first = consensus
    masks = {}
    for show in ("1", "2", "3", "4", "best", "consensus", "disagreement"):
        file, params = client.infer("progidiff", image, {**REQUEST, "show": show})
        assert params["cached"] is True
        assert params["proposals"] == first["proposals"]
        masks[show] = np.asarray(nibabel.load(file).dataobj).copy()
        os.unlink(file)
    if first["label_names"]:
        assert len({masks[str(k)].tobytes() for k in range(1, 5)}) == 4
        best = first["structures"]["liver"]["best"]
        assert np.array_equal(masks["best"], masks[str(best)])
        drawn = sum((masks[str(k)] > 0).astype(int) for k in range(1, 5))
        assert np.array_equal(masks["consensus"] > 0, drawn >= 2)
        assert np.array_equal(masks["disagreement"] > 0, (drawn > 0) & (drawn < 4))


def test_a_label_is_saved_and_read_back_byte_for_byte(
    consensus: tuple[Path, dict], client: MONAILabelClient, image: str
):
    file, _ = consensus
    answer = client.save_label(image, str(file), "final", {"label_info": [{"name": "liver", "idx": 6}]})
    assert answer["image"] == image
    back = client.download_label(answer["label"], "final")
    assert Path(back).read_bytes() == file.read_bytes()
    entry = client.datastore()["objects"][image]
    assert "final" in entry["labels"]
    assert "id" not in client.next_sample("random", {})  # Nothing unlabelled is left, which is how Slicer reads it.
