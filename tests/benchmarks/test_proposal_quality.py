"""The benchmarks of proposals and prompts at a size of seconds: they run, resume, and their arithmetic is right.
Figures mean nothing here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from progidiff.proposals.agreement import compute_pairwise_dice
from progidiff.proposals.engine import Engine
from progidiff.proposals.volume_proposals import THRESHOLD
from support.labelled_phantoms import write_case, write_table
from support.servers import load_script

BOXES = {
    1: (slice(8, 18), slice(6, 14), slice(2, 10)),
    2: (slice(22, 30), slice(6, 14), slice(4, 12)),
    3: (slice(8, 16), slice(15, 21), slice(0, 3)),
}


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return load_script("proposal_quality")


@pytest.fixture(scope="module")
def islands() -> ModuleType:
    return load_script("islands")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    for name in ("one", "two"):
        write_case(folder, name, BOXES, slices=12)
    write_table(folder, {1: "liver", 2: "spleen", 3: "right kidney"})
    return folder


def forbid_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this run should have found what it needs")

    monkeypatch.setattr(Engine, "propose", refuse)


def test_proposal_quality_runs_and_a_second_run_draws_nothing(
    quality: ModuleType,
    studies: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "quality.json"
    arguments = [
        "--studies",
        str(studies),
        "--model",
        str(tiny_model),
        "--smoke",
        "--keep",
        str(tmp_path / "keep"),
        "--out",
        str(out),
    ]
    quality.main(arguments)
    table = capsys.readouterr().out
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["diversity"]) == {"served", "1 step", "noise alone"}
    assert set(report["diversity"]["served"]["cases"]) == {"one", "two"}
    for values in report["diversity"].values():
        assert 0 <= values["mean"]["pairwise_dice"] <= 1
        assert (
            values["mean"]["dice, best of K per slice"]
            >= values["mean"]["dice, best of K per volume"]
            >= values["mean"]["dice, single"]
        )
        assert values["mean"]["ged"] >= values["mean"]["ged_unbiased"]
    assert report["pairs"]["drawn"] + report["pairs"]["empty"] == 2 * 3 * 12
    assert report["disagreement_against_error"]["disagreement (served)"]["mean of 3 slices"]["drawn"] is not None
    reliability = report["voxels"]["reliability"]
    assert [row["agreement"] for row in reliability] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-4)
    assert sum(row["voxels"] for row in reliability) == 2 * 3 * 12 * 40 * 28
    assert "| served |" in table
    assert "| AUROC |" in table

    forbid_networks(monkeypatch)
    quality.main(arguments)
    again = json.loads(out.read_text(encoding="utf-8"))
    assert {**again, "versions": None} == {**report, "versions": None}


def test_a_setting_changes_what_is_drawn_and_leaves_the_engine_usable(
    quality: ModuleType, studies: Path, tiny_model: Path
):
    engine = Engine(tiny_model, device="cpu", dtype="fp32")
    engine.load()
    engine._card = type(engine.card)(**{**vars(engine.card), "evidence_spread": (2.0, 2.0)})
    volume = quality.load_volume(studies / "one.nii.gz")
    queries = [quality.Query("liver", "liver")]

    def drawn(setting: object) -> np.ndarray:
        return quality.draw(engine, volume, queries, setting, 3, range(0, 12, 4), None).probabilities

    served, alone = drawn(quality.SETTINGS[0]), drawn(quality.Setting("noise", None, 0.0))
    assert (served != alone).any()
    np.testing.assert_array_equal(served, drawn(quality.SETTINGS[0]))
    assert (alone != drawn(quality.Setting("more", 3, 0.0))).any()


@pytest.fixture
def maps() -> np.ndarray:
    """Four proposals on a slice of 12 x 10, on the scale 0..255."""
    return np.random.default_rng(0).integers(0, 256, (4, 12, 10)).astype(np.float32)


def test_a_pair_is_measured_as_its_definitions_say(quality: ModuleType, maps: np.ndarray):
    truth = np.zeros((12, 10), dtype=bool)
    truth[2:8, 3:9] = True
    pair = quality.measure_pair("liver", 5, maps, truth, 0.25)
    masks = maps >= THRESHOLD
    dice = compute_pairwise_dice(torch.from_numpy(masks)).numpy()
    assert pair.pairwise_dice == pytest.approx(dice[np.triu_indices(4, 1)].mean())

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        return 1 - (first & second).sum() / (first | second).sum()

    assert pair.distance_to_truth == pytest.approx(np.mean([distance(mask, truth) for mask in masks]))
    assert pair.distance_with_self == pytest.approx(np.mean([distance(a, b) for a in masks for b in masks]))
    assert pair.distance == pytest.approx(
        np.mean([distance(masks[a], masks[b]) for a in range(4) for b in range(4) if a != b])
    )
    consensus = masks.mean(axis=0) >= 0.5
    assert pair.error == pytest.approx(1 - 2 * (consensus & truth).sum() / (consensus.sum() + truth.sum()))
    np.testing.assert_allclose(pair.dice, [2 * (mask & truth).sum() / (mask.sum() + truth.sum()) for mask in masks])
    for number in range(5):
        for value in (0, 1):
            assert pair.agreement_counts[number, value] == ((masks.sum(axis=0) == number) & (truth == value)).sum()
    assert pair.probability_counts.sum() == pair.probability_errors.sum() == truth.size
    assert pair.probability_errors[:, 1].sum() == (consensus != truth).sum()
    assert pair.summaries["disagreement (served)"] == 0.25
    mean = maps.mean(axis=0) / 255
    expected = 1 - 2 * mean[consensus].sum() / (mean.sum() + consensus.sum())
    assert pair.summaries["1 - Dice that the mean probability expects"] == pytest.approx(expected)


def test_a_pair_that_nobody_draws_is_wrong_or_not_there(quality: ModuleType, maps: np.ndarray):
    empty = np.zeros((12, 10), dtype=bool)
    assert quality.measure_pair("liver", 0, np.zeros_like(maps), empty, 0.0) is None
    truth = empty.copy()
    truth[0, 0] = True
    missed = quality.measure_pair("liver", 0, np.zeros_like(maps), truth, 0.0)
    assert not any(missed.summaries.values()), "nobody can tell this slice from one without the structure"
    assert (missed.error, missed.pairwise_dice, missed.distance_to_truth, missed.distance_with_self) == (1, 1, 1, 0)
    invented = quality.measure_pair("liver", 0, np.full_like(maps, 255), empty, 0.0)
    assert (invented.error, invented.consensus, list(invented.dice)) == (1, 120, [0, 0, 0, 0])


def test_correlations_are_scipys_on_the_pairs_that_they_name(quality: ModuleType):
    generator = np.random.default_rng(2)
    square = np.zeros((8, 8), dtype=bool)
    square[2:6, 2:6] = True
    pairs = []
    for z in range(2, 9):
        maps = (square * generator.random((3, 8, 8)) * 400).clip(0, 255).astype(np.float32)
        pairs.append(
            quality.measure_pair(
                "liver", z, maps, square if z < 8 else np.zeros_like(square), float(generator.random())
            )
        )
    missed = quality.measure_pair("liver", 9, np.zeros((3, 8, 8), dtype=np.float32), square, 0.0)
    found = quality.summarise_correlation({"one": [*pairs, missed]}, {"one": 12}, ["spleen", "liver"])[
        "disagreement (served)"
    ]
    alone, errors = np.zeros(12), np.zeros(12)
    for pair in (*pairs, missed):
        alone[pair.z], errors[pair.z] = pair.summaries["disagreement (served)"], pair.error
    nearby = [alone[max(0, z - 1) : z + 2].mean() for z in range(12)]
    present = [2, 3, 4, 5, 6, 7, 9]
    assert found["slice alone"]["drawn"] == pytest.approx(spearmanr(alone[2:10], errors[2:10])[0])
    assert found["mean of 3 slices"]["present"] == pytest.approx(
        spearmanr(np.array(nearby)[present], errors[present])[0]
    )
    everything = spearmanr(np.concatenate([np.zeros(12), nearby]), np.concatenate([np.zeros(12), errors]))[0]
    assert found["mean of 3 slices"]["all"] == pytest.approx(everything)
    assert (
        found["slice alone"]["within structures"]
        == found["slice alone"]["drawn"]
        == found["slice alone"]["drawn by case"]["one"]
    )


def test_auroc_is_the_share_of_right_orders(quality: ModuleType):
    generator = np.random.default_rng(1)
    scores, labels = generator.integers(0, 6, 200), generator.integers(0, 2, 200)
    counts = np.zeros((6, 2), dtype=int)
    np.add.at(counts, (scores, labels), 1)
    above = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert quality.compute_auroc(counts) == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())
    assert np.isnan(quality.compute_auroc(np.array([[3, 0], [1, 0]])))


def test_uncertainty_is_highest_where_half_of_the_proposals_draw(quality: ModuleType):
    # Agreement of 4 proposals: rows 0..4; columns: outside, inside of the truth.
    counts = np.array([[10, 1], [4, 2], [3, 5], [2, 6], [1, 20]])
    # Wrong: inside where under half draw, outside where at least half do.
    np.testing.assert_array_equal(
        quality.sort_by_uncertainty(counts, range(5)), [[10 + 20, 1 + 1], [4 + 6, 2 + 2], [5, 3]]
    )
    np.testing.assert_array_equal(quality.sort_by_uncertainty(counts, range(1, 5)), [[20, 1], [4 + 6, 2 + 2], [5, 3]])


def test_calibration_error_is_nothing_where_agreement_is_the_share_inside(quality: ModuleType):
    levels = np.array([0.0, 0.5, 1.0])
    assert quality.compute_ece(np.array([[8, 0], [3, 3], [0, 5]]), levels) == 0
    assert quality.compute_ece(np.array([[8, 0], [0, 2], [0, 0]]), levels) == pytest.approx(2 / 10 * 0.5)


def test_picking_slice_by_slice_pools_the_best_of_every_slice(quality: ModuleType):
    truth = np.zeros((6, 6), dtype=bool)
    truth[1:5, 1:5] = True
    right, wrong, nothing = truth * 255.0, np.roll(truth, 2, axis=1) * 255.0, np.zeros((6, 6))
    pairs = [
        quality.measure_pair("liver", 0, np.stack([right, wrong]).astype(np.float32), truth, 0.0),
        quality.measure_pair("liver", 1, np.stack([wrong, right]).astype(np.float32), truth, 0.0),
        quality.measure_pair("liver", 2, np.stack([wrong, nothing]).astype(np.float32), np.zeros_like(truth), 0.0),
    ]
    ways = quality.summarise_picking(pairs, ["liver", "spleen"])
    assert ways["best of K per slice"] == {"liver": 1.0}
    assert ways["best of K per volume"]["liver"] == pytest.approx(
        2 * (16 + 8) / (32 + 32)
    )  # the second one draws nothing where nothing is
    assert ways["single"]["liver"] == pytest.approx((2 * 24 / 80 + 2 * 24 / 64) / 2)


def test_islands_scores_every_rule(
    islands: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, keep = tmp_path / "islands.json", tmp_path / "keep"
    arguments = [
        "islands",
        "--studies",
        str(studies),
        "--model",
        str(tiny_model),
        "--num-proposals",
        "2",
        "--keep",
        str(keep),
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    islands.main()
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["rules"]) == set(islands.RULES)
    assert report["rules"]["off"]["consensus"]["dice"].keys() == {"liver", "spleen", "right kidney"}
    forbid_networks(monkeypatch)
    islands.main()
    assert json.loads(out.read_text(encoding="utf-8"))["rules"] == report["rules"]


@pytest.fixture(scope="module")
def controls() -> ModuleType:
    return load_script("text_controls")


def test_text_controls_run_and_a_second_run_draws_nothing(
    controls: ModuleType,
    studies: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "controls.json"
    arguments = ["--studies", str(studies), "--model", str(tiny_model), "--smoke", "--at-once", "5", "--out", str(out)]
    controls.main(arguments)
    report = json.loads(out.read_text(encoding="utf-8"))
    summary = report["summary"]
    assert set(summary["controls"]) >= {"right", "empty", "shuffled", "swapped", "unseen synonyms"}
    assert summary["controls"]["swapped"]["structures"] == {}, "there is no left kidney here"
    assert set(report["cases"]) == {"one", "two"}
    assert "| shuffled |" in capsys.readouterr().out
    for name, wrong in summary["shuffled to"].items():
        expected = np.mean([case["dice"][wrong][name] for case in report["cases"].values()])
        assert summary["controls"]["shuffled"]["structures"][name] == pytest.approx(expected, abs=1e-4)

    forbid_networks(monkeypatch)
    controls.main(arguments)
    assert json.loads(out.read_text(encoding="utf-8"))["cases"] == report["cases"]
    with pytest.raises(AssertionError, match="should have found"):
        controls.main([*arguments, "--structures", "liver", "spleen"])  # of other texts nothing is known


def test_unseen_synonyms_and_descriptions_are_unseen(controls: ModuleType):
    seen = {phrase for name in controls.DESCRIPTIONS for phrase in controls.training_phrases(name)}
    texts = controls.list_texts(list(controls.DESCRIPTIONS))
    assert len(texts) == len(set(texts))
    for name, description in controls.DESCRIPTIONS.items():
        assert not seen & {*controls.heldout_phrases(name), description}
        assert not any(phrase in description for phrase in controls.training_phrases(name)), (
            "a description must not name its structure"
        )


def test_a_derangement_leaves_no_name_in_its_place(controls: ModuleType):
    names = list("abcdefg")
    for seed in range(20):
        other = controls.derange(names, seed)
        assert sorted(other.values()) == names
        assert all(name != wrong for name, wrong in other.items())
    with pytest.raises(ValueError, match="at least two"):
        controls.derange(["liver"])


def test_controls_are_scored_against_the_structure_that_was_meant(controls: ModuleType):
    names = ["right kidney", "left kidney"]
    place = {name: np.zeros((3, 4, 8), dtype=bool) for name in names}
    place["right kidney"][:2, :, :3] = True
    place["left kidney"][:2, :, 5:] = True
    nothing = np.zeros((3, 4, 8), dtype=bool)
    masks = {text: place.get(text, nothing) for text in controls.list_texts(names)}
    masks["right nephros"] = place["right kidney"] | place["left kidney"]
    dice, drawn = controls.measure_case(masks, place)
    summary = controls.summarise({"one": {"dice": dice, "drawn": drawn}}, names)
    found = {control: values["all"] for control, values in summary["controls"].items()}
    assert found["right"] == found["swapped, other side"] == 1
    assert found["swapped"] == found["shuffled"] == found["any other name"] == found["empty"] == 0
    assert summary["controls"]["unseen synonyms"]["structures"]["right kidney"] == pytest.approx(2 / 3 / 4)
    assert summary["drawn"]["right kidney"] == pytest.approx(2 / 3)
    assert summary["right above shuffled"] == 1
