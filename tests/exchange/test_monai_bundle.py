"""A MONAI bundle of a model gives the mask that the model gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigParser

from progidiff.errors import RequestError
from progidiff.exchange.monai_bundle import export_bundle
from progidiff.images.reading import load_volume
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(tmp_path_factory.mktemp("bundle") / "tiny", tiny_model)


def test_running_the_bundle_gives_the_masks_of_the_engine(
    bundle: Path, tiny_model: Path, tmp_path: Path, phantom_writer: Callable[..., Path]
):
    image = phantom_writer(tmp_path / "phantom.nii.gz", shape=(40, 30, 4))
    options = {
        "config_file": str(bundle / "configs" / "inference.json"), "bundle_root": str(bundle), "image": str(image),
        "prompt": "liver and spleen", "modality": "CT", "num_proposals": 2, "seed": 3, "device": "cpu",
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    # What `python -m monai.bundle run` does with its options, in a process that has imported nothing of ours.
    program = "import json, sys; from monai.bundle import run; run(**json.loads(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, json.dumps(options)], check=True, timeout=300)
    volume = load_volume(image, "CT")
    request = ProposalRequest(queries=parse_prompt("liver and spleen"), num_proposals=2, seed=3, clean_up="small")
    wanted = Engine(tiny_model, device="cpu").propose(request, volume)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["labels"] == {"liver": 6, "spleen": 1}
    for name, shown in (("mask", "consensus"), ("proposal_1", 1), ("proposal_2", 2)):
        found = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(found.dataobj), wanted.label_map(volume.grid, shown, result["labels"]))
        assert np.asarray(found.dataobj).any()
        assert np.allclose(found.affine, volume.affine)
    agreement = np.asarray(nibabel.load(tmp_path / "out" / "agreement.nii.gz").dataobj)
    assert np.array_equal(agreement, wanted.agreement(volume.grid))


def test_the_metadata_say_what_goes_in_and_comes_out(bundle: Path):
    parser = ConfigParser()
    parser.read_meta(str(bundle / "configs" / "metadata.json"))
    meta = parser["_meta_"]
    assert meta["name"] == "tiny@1"
    assert meta["network_data_format"]["outputs"]["pred"]["channel_def"]["6"] == "liver"
    assert {"progidiff", "diffusers", "nibabel"} <= meta["required_packages_version"].keys()
    assert sorted(path.name for path in bundle.iterdir()) == ["LICENSE", "configs", "docs", "models"]


def test_a_folder_that_is_there_is_not_overwritten(bundle: Path, tiny_model: Path):
    with pytest.raises(RequestError, match="exists; name a folder that does not"):
        export_bundle(bundle, tiny_model)
