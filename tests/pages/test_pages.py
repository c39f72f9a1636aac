"""The pages without a browser: their own tests, what they draw against what the server saves, and their types."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.images.reading import load_label
from progidiff.labels.decisions import Plan, compose_label
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.routes.review import pack_masks
from support.api_types import TYPES, compute_digest, describe_routes, find_lack, make_types, read_digest
from support.proposals import DEPTH, make_proposals, make_volume

HERE = Path(__file__).parent
IDS = {"liver": 6, "spleen": 1, "pancreas": 11}
CASES = 40

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="There is no Node.js: apt-get install nodejs.")


def run_node(script: str, given: object) -> bytes:
    done = subprocess.run(
        ["node", HERE / script], input=json.dumps(given).encode(), capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@needs_node
def test_the_pure_parts_of_the_pages_do_what_their_tests_say():
    files = sorted(HERE.glob("*.test.mjs"))
    done = subprocess.run(["node", "--test", *files], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def make_pick(random: np.random.Generator, count: int) -> dict[str, Any]:
    rule = str(
        random.choice(["consensus", "best", "proposal", "union", "intersection", "majority", "threshold", "nothing"])
    )
    size = 1 if rule == "proposal" else int(random.integers(0, count + 1))
    chosen = sorted(int(k) + 1 for k in random.permutation(count)[:size])
    members = [] if rule in ("best", "nothing", "consensus") else chosen
    # Whole shares of the members, as the page makes them, and shares between those.
    threshold = float(random.choice([*(k / max(1, size) for k in range(1, size + 1)), 0.3, 0.5, 0.7, 1.0]))
    return {"rule": rule, "members": members, "threshold": threshold}


def make_steps(random: np.random.Generator, result: VolumeProposals) -> list[list[Any]]:
    """What a person might do: picks for slices and for the volume, merges changed by hand, acceptances, undos."""
    names, count = list(result.structures), result.num_proposals
    steps: list[list[Any]] = []
    for _ in range(int(random.integers(4, 25))):
        name, z = str(random.choice(names)), int(random.integers(0, DEPTH))
        some = [structure for structure in names if random.random() < 0.7] or names
        steps.append(
            [
                ["setPick", name, make_pick(random, count), z],
                ["setPick", name, make_pick(random, count), None],
                ["mergeBy", name, z, str(random.choice(["union", "intersection", "majority", "threshold"]))],
                ["toggleMember", name, z, int(random.integers(1, count + 1))],
                ["shiftThreshold", name, z, int(random.choice([-1, 1]))],
                ["acceptSlice", z, some],
                ["undo"],
                ["acceptVolume", some],
            ][int(random.choice(8, p=[0.25, 0.1, 0.12, 0.12, 0.08, 0.25, 0.04, 0.04]))]
        )
    return [*steps, ["acceptSlice", int(random.integers(0, DEPTH)), names]]


def unpack(drawn: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    mask, box = np.zeros(shape, bool), drawn["box"]
    if box is not None:
        values = np.frombuffer(base64.b64decode(drawn["mask"]), np.uint8)
        assert set(np.unique(values)) <= {0, 1}
        size = (box["y1"] - box["y0"], box["x1"] - box["x0"])
        mask[box["y0"] : box["y1"], box["x0"] : box["x1"]] = values.reshape(size).astype(bool)
    return mask


@needs_node
@pytest.mark.parametrize("num_proposals", [2, 5, 10])
def test_what_the_page_draws_is_what_the_server_saves(num_proposals: int):
    result, volume = make_proposals(num_proposals), make_volume()
    best = {name: order[0] for name, order in zip(result.structures, result.ranking, strict=True)}
    slices = {z: base64.b64encode(pack_masks(result, z)).decode() for z in range(DEPTH)}
    random = np.random.default_rng(num_proposals)
    cases = [
        {"structures": result.structures, "best": best, "slices": slices, "steps": make_steps(random, result)}
        for _ in range(CASES)
    ]
    overlapping = 0
    for case, answer in zip(cases, json.loads(run_node("parity.mjs", cases)), strict=True):
        plan = Plan.from_params(answer["decisions"], result)
        label = volume.arrange(compose_label(result, volume, plan, IDS))
        for z in range(DEPTH):
            drawn = {name: unpack(entry, label[z].shape) for name, entry in answer["drawn"][str(z)].items()}
            picks = plan.picks_on(z)
            assert set(drawn) == set(picks), (z, case["steps"])
            for name, mask in drawn.items():
                np.testing.assert_array_equal(mask, picks[name].draw(result.slice_masks(name, z), best[name]))
            overlapping += check_slice(label[z], drawn, result, z)
    assert overlapping > 100, "the cases hold too few voxels of several structures"


def check_slice(label: np.ndarray, drawn: dict[str, np.ndarray], result: VolumeProposals, z: int) -> int:
    """Compare a slice of the saved label with what was drawn; returns how many voxels have several structures.

    Where structures overlap, one that most proposals draw is saved; among equals the server looks at probabilities.
    """
    votes = {name: mask * result.slice_masks(name, z).sum(axis=0) for name, mask in drawn.items()}
    most = np.max(list(votes.values()), axis=0) if votes else np.zeros(label.shape, int)
    allowed = {name: mask & (votes[name] == most) for name, mask in drawn.items()}
    none = ~np.any(list(drawn.values()), axis=0) if drawn else np.ones(label.shape, bool)
    np.testing.assert_array_equal(label == 0, none)
    for name, mask in allowed.items():
        assert not (label[~mask] == IDS[name]).any()
    return int((np.sum(list(drawn.values()), axis=0) > 1).sum()) if drawn else 0


@needs_node
def test_the_server_reads_the_panel_s_file_as_it_was_written(tmp_path: Path):
    volume = make_volume("LPS")
    stack = np.random.default_rng(0).integers(0, 14, volume.array.T.shape).astype(np.uint8)
    to_lps = np.diag([-1.0, -1.0, 1.0])
    steps = to_lps @ volume.affine[:3, :3]
    given = {
        "shape": list(stack.shape),
        "origin": (to_lps @ volume.affine[:3, 3]).tolist(),
        "directions": steps.T.tolist(),
        "voxels": base64.b64encode(stack.tobytes()).decode(),
    }
    file = tmp_path / "label.nrrd"
    file.write_bytes(run_node("write_nrrd.mjs", given))
    np.testing.assert_array_equal(load_label(file, like=volume.grid), stack.T)


def test_the_types_of_the_answers_are_those_of_the_routes():
    assert read_digest(TYPES.read_text()) == compute_digest(describe_routes()), (
        "The routes answer in another shape than apps/progidiff/web/api.d.ts says. Run make api-types (which is "
        "PYTHONPATH=lib:tests python -m support.api_types, after npm ci in tests/pages), then make check."
    )


@pytest.mark.skipif(bool(find_lack()), reason=find_lack() or "-")
def test_nobody_edited_the_types_by_hand():
    assert TYPES.read_text() == make_types(describe_routes())
