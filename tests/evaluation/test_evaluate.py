"""Scores of proposals against ground truth."""

import json
import math
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance

from progidiff.errors import RequestError, StoreError
from progidiff.evaluation.evaluate import (
    TRANSUNET_STRUCTURES,
    evaluate,
    match_structures,
    save_report,
    score_case,
    summarise,
)
from progidiff.evaluation.metrics import compute_dice, compute_hd95, keep_largest_component
from progidiff.images.volume import Volume
from progidiff.images.working_grid import WorkingGrid
from progidiff.labels.cases import list_labelled, load_label_names
from progidiff.prompts.structures import STRUCTURES
from progidiff.proposals.volume_proposals import VolumeProposals
from support.segment_files import write_seg_nrrd

SHAPE = (6, 24, 20)  # (Z, Y, X)


def make_volume() -> Volume:
    array = np.random.default_rng(0).integers(-100, 200, SHAPE[::-1]).astype(np.int16)
    return Volume(
        array=array, affine=np.diag([-1.5, -2.0, 3.0, 1.0]), modality="CT", modality_source="option", name="toy"
    )


def make_proposals(masks: np.ndarray, structures: tuple[str, ...]) -> VolumeProposals:
    """Proposals whose masks are exactly `masks`, (P, K, Z, Y, X): rows and columns of the window are twice those of the
    stack.
    """
    volume = make_volume()
    _, spacing = volume.to_stack()
    fine = np.zeros((*masks.shape[:3], 96, 64), dtype=np.uint8)
    # A window of 0.5 mm pixels: 4 per row of 2 mm, 3 per column of 1.5 mm.
    enlarged = np.repeat(np.repeat(masks, 4, axis=3), 3, axis=4)
    fine[..., : enlarged.shape[3], : enlarged.shape[4]] = enlarged * np.uint8(255)
    grid = WorkingGrid(shape=SHAPE, stack_spacing=spacing, center=(24.0, 16.0), spacing=0.5, height=96, width=64)
    return VolumeProposals(structures, fine, grid, 0, 1, 1.0, "toy@1", "", "CT", "option", 0.5)


def box(*ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(*part) for part in ranges)] = True
    return mask


TRUTH = box((1, 4), (4, 14), (5, 15))
SMALLER = box((1, 4), (4, 14), (5, 10))
LARGER = box((1, 5), (4, 14), (5, 15))
EMPTY = np.zeros(SHAPE, dtype=bool)


def write_case(studies: Path, name: str, labels: np.ndarray, image: np.ndarray, suffix: str = ".nii.gz") -> None:
    (studies / "labels" / "final").mkdir(parents=True, exist_ok=True)
    affine = np.diag([-5.0, -6.0, 5.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(image, affine), studies / f"{name}{suffix}")
    nibabel.save(nibabel.Nifti1Image(labels, affine), studies / "labels" / "final" / f"{name}{suffix}")


@pytest.fixture
def studies(tmp_path) -> Path:
    """Two labelled cases and one without a label; the ids are not those of STRUCTURES."""
    rng = np.random.default_rng(3)
    for name in ("case1", "case2"):
        image = np.full((48, 40, 5), -1000, dtype=np.int16)
        image[4:44, 4:36] = rng.integers(0, 120, (40, 32, 5))
        labels = np.zeros(image.shape, dtype=np.uint8)
        labels[10:30, 10:25, 1:4] = 1
        if name == "case1":
            labels[32:40, 10:20, 1:4] = 2
        labels[31:33, 30:34, 2:4] = 7
        write_case(tmp_path, name, labels, image)
    shutil.copy(tmp_path / "case1.nii.gz", tmp_path / "unlabelled.nii.gz")
    (tmp_path / "labels.json").write_text(json.dumps({"1": "liver", "2": "kidney_left", "7": "spinal cord"}))
    return tmp_path


def test_dice_is_that_of_the_formula():
    assert compute_dice(SMALLER, TRUTH) == pytest.approx(2 * SMALLER.sum() / (SMALLER.sum() + TRUTH.sum()))
    assert compute_dice(TRUTH, TRUTH) == 1
    assert compute_dice(EMPTY, TRUTH) == 0
    assert math.isnan(compute_dice(TRUTH, EMPTY))


@pytest.mark.parametrize(
    "prediction", [SMALLER, LARGER, box((0, 6), (0, 24), (0, 20)), box((5, 6), (20, 24), (0, 3)), TRUTH]
)
def test_hd95_is_monais_on_the_whole_volume_in_millimetres(prediction):
    spacing = (3.0, 2.0, 1.5)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, TRUTH)]
    expected = float(
        compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))[0, 0]
    )
    assert compute_hd95(prediction, TRUTH, spacing) == pytest.approx(expected)


def test_hd95_of_an_empty_mask_is_not_defined():
    assert math.isnan(compute_hd95(EMPTY, TRUTH, (1, 1, 1)))
    assert math.isnan(compute_hd95(TRUTH, EMPTY, (1, 1, 1)))


def test_the_largest_component_stays():
    mask = TRUTH | box((5, 6), (20, 22), (0, 2))
    np.testing.assert_array_equal(keep_largest_component(mask), TRUTH)
    np.testing.assert_array_equal(keep_largest_component(EMPTY), EMPTY)


def test_single_consensus_and_best_are_three_different_scores():
    volume = make_volume()
    proposals = make_proposals(np.stack([SMALLER, SMALLER, TRUTH, EMPTY])[None], ("liver",))
    labels = volume.from_stack(TRUTH.astype(np.uint8) * 6)
    scores = score_case(volume, labels, proposals, {"liver": (6,)})["liver"]
    small = compute_dice(SMALLER, TRUTH)
    assert scores["proposals"]["dice"] == pytest.approx([small, small, 1.0, 0.0])
    assert scores["single"]["dice"] == pytest.approx((2 * small + 1) / 4)
    assert scores["consensus"]["dice"] == pytest.approx(small)
    assert scores["best"]["dice"] == 1
    assert scores["best"]["proposal"] == 3
    assert scores["best"]["hd95"] == 0
    assert scores["single"]["hd95"] == pytest.approx(2 * compute_hd95(SMALLER, TRUTH, (3.0, 2.0, 1.5)) / 3)
    assert scores["single"]["missed"] == 1


def test_an_absent_structure_counts_for_the_false_positives_only():
    volume = make_volume()
    proposals = make_proposals(np.stack([EMPTY, box((2, 4), (0, 3), (0, 3))])[None], ("spleen",))
    scores = score_case(volume, np.zeros(volume.array.shape, np.uint8), proposals, {"spleen": (1,)})
    entry = scores["spleen"]
    assert not entry["present"]
    assert math.isnan(entry["consensus"]["dice"])
    assert entry["consensus"]["false_positive_slices"] == 2  # a tie belongs to the consensus
    assert entry["single"]["false_positive_slices"] == 1
    assert entry["best"]["false_positive_slices"] == 0
    summary = summarise([{"structures": scores}], ["spleen"])
    assert summary["consensus"]["dice"] == {}
    assert summary["false_positives"]["consensus"]["slices"]["spleen"] == pytest.approx(2 / 6)
    assert summary["false_positives"]["single"]["slices"]["spleen"] == pytest.approx(1 / 6)
    assert summary["false_positives"]["consensus"]["cases"]["spleen"] == 1
    assert summary["false_positives"]["single"]["cases"]["spleen"] == 0.5
    assert summary["false_positives"]["best"]["cases"]["spleen"] == 0


def test_slices_beyond_the_structure_count_for_the_false_positives_too():
    volume = make_volume()
    scores = score_case(
        volume,
        volume.from_stack(TRUTH.astype(np.uint8)),
        make_proposals(LARGER[None, None], ("liver",)),
        {"liver": (1,)},
    )
    assert scores["liver"]["slices_without"] == 3
    assert scores["liver"]["consensus"]["false_positive_slices"] == 1


def test_an_empty_prediction_is_missed_with_dice_0_and_without_hd95():
    volume = make_volume()
    labels = volume.from_stack(TRUTH.astype(np.uint8))
    missed = score_case(volume, labels, make_proposals(EMPTY[None, None], ("liver",)), {"liver": (1,)})
    found = score_case(volume, labels, make_proposals(SMALLER[None, None], ("liver",)), {"liver": (1,)})
    summary = summarise([{"structures": missed}, {"structures": found}], ["liver"])
    assert summary["consensus"]["dice"]["liver"] == pytest.approx(compute_dice(SMALLER, TRUTH) / 2)
    assert summary["consensus"]["hd95"]["liver"] == pytest.approx(compute_hd95(SMALLER, TRUTH, (3.0, 2.0, 1.5)))
    assert summary["missed"] == {kind: {"liver": 1} for kind in ("single", "consensus", "best")}


def test_the_mean_over_structures_is_kept_apart_from_the_structures():
    volume = make_volume()
    masks = np.stack([SMALLER, TRUTH])[:, None]
    labels = volume.from_stack(TRUTH.astype(np.uint8))
    scores = score_case(
        volume, labels, make_proposals(masks, ("liver", "esophagus")), {"liver": (1,), "esophagus": (1,)}
    )
    summary = summarise([{"structures": scores}], ["liver", "esophagus"])
    small = compute_dice(SMALLER, TRUTH)
    for kind in ("single", "consensus", "best"):
        assert set(summary[kind]) == {"dice", "hd95"}
        assert set(summary[kind]["dice"]) == {"liver", "esophagus"}
    assert summary["mean"]["consensus"]["dice"] == {
        "transunet_8": pytest.approx(small),
        "all": pytest.approx((small + 1) / 2),
    }
    assert summary["mean_over"]["transunet_8"] == ["liver"]


def test_removing_small_parts_is_done_before_scoring():
    volume = make_volume()
    proposals = make_proposals((TRUTH | box((5, 6), (20, 22), (0, 2)))[None, None], ("liver",))
    labels = volume.from_stack(TRUTH.astype(np.uint8))
    assert score_case(volume, labels, proposals, {"liver": (1,)}, hd95=False)["liver"]["consensus"]["dice"] < 1
    assert (
        score_case(volume, labels, proposals, {"liver": (1,)}, hd95=False, largest_component=True)["liver"][
            "consensus"
        ]["dice"]
        == 1
    )


def test_labels_are_matched_by_name_and_never_by_number():
    matched, notes = match_structures({1: "liver", 2: "right kidney", 4: "spleen"}, STRUCTURES)
    assert matched == {"spleen": (4,), "right kidney": (2,), "liver": (1,)}
    assert any("'pancreas' has no label" in note for note in notes)


def test_another_name_of_a_structure_and_several_ids_of_one_are_understood():
    matched, notes = match_structures({1: "kidney_left", 2: "portal vein", 3: "splenic vein", 4: "femur"}, STRUCTURES)
    assert matched == {"left kidney": (1,), "portal and splenic veins": (2, 3)}
    assert "label 4 'femur' is no structure of the model; skipped" in notes


def test_wanted_structures_may_be_synonyms():
    assert match_structures({1: "liver", 2: "spleen"}, STRUCTURES, ["hepatic parenchyma"])[0] == {"liver": (1,)}
    with pytest.raises(RequestError, match="labels.json names liver"):
        match_structures({1: "liver"}, STRUCTURES, ["aorta"])


def test_only_cases_with_a_label_are_taken(studies):
    assert [case.name for case in list_labelled(studies)] == ["case1", "case2"]
    assert [case.name for case in list_labelled(studies, ["case2.nii.gz", "case1"])] == ["case1", "case2"]
    with pytest.raises(RequestError, match="unlabelled has no label"):
        list_labelled(studies, ["unlabelled"])
    with pytest.raises(RequestError, match="there is no image case9"):
        list_labelled(studies, ["case9"])


def test_a_folder_without_labels_is_refused(tmp_path, studies):
    with pytest.raises(RequestError, match="There is no folder"):
        list_labelled(tmp_path / "absent")
    shutil.rmtree(studies / "labels")
    with pytest.raises(RequestError, match="nothing to compare with"):
        list_labelled(studies)


@pytest.mark.parametrize("content", ["[1]", "{", '{"liver": [1, 2]}', '{"1": 2}', '{"liver": "spleen"}'])
def test_labels_json_must_map_ids_to_structures(studies, content):
    (studies / "labels.json").write_text(content)
    with pytest.raises(RequestError, match="does not map label ids"):
        load_label_names(studies)
    (studies / "labels.json").unlink()
    with pytest.raises(RequestError, match=r"has no labels\.json"):
        load_label_names(studies)


def test_an_evaluation_has_the_format_that_others_read(studies, tiny_model, tmp_path):
    from progidiff.proposals.engine import Engine

    seen = []
    report = evaluate(
        Engine(tiny_model, device="cpu"),
        studies,
        num_proposals=2,
        num_inference_steps=1,
        seed=3,
        progress=lambda *state: seen.append(state),
        command="test",
    )
    path = save_report(report, tmp_path / "out" / "evaluation.json")
    read = json.loads(path.read_text())
    assert read == report
    for kind in ("single", "consensus", "best"):
        for metric in ("dice", "hd95"):
            assert set(read["summary"][kind][metric]) == {"liver", "left kidney"}
        assert all(0 <= value <= 1 for value in read["summary"][kind]["dice"].values())
    assert [case["case"] for case in read["cases"]] == ["case1", "case2"]
    mean = np.mean([case["structures"]["liver"]["consensus"]["dice"] for case in read["cases"]])
    assert read["summary"]["consensus"]["dice"]["liver"] == pytest.approx(mean, abs=1e-5)
    assert read["summary"]["cases_with"] == {"liver": 2, "left kidney": 1}
    assert (read["seed"], read["num_proposals"], read["num_inference_steps"]) == (3, 2, 1)
    assert {"torch", "progidiff", "commit"} <= set(read["versions"])
    assert any("spinal cord" in note for note in read["notes"])
    assert seen[-1][0] == 2
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


def test_the_same_seed_gives_the_same_evaluation(studies, tiny_model):
    from progidiff.proposals.engine import Engine

    options = {"cases": ["case1"], "structures": ["liver"], "num_proposals": 2, "num_inference_steps": 1, "hd95": False}
    first, again = (evaluate(Engine(tiny_model, device="cpu"), studies, **options) for _ in range(2))
    assert first["summary"] == again["summary"]


def test_a_case_on_another_grid_is_reported_and_left_out(studies, tiny_model):
    from progidiff.proposals.engine import Engine

    label = studies / "labels" / "final" / "case2.nii.gz"
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), label)
    report = evaluate(
        Engine(tiny_model, device="cpu"),
        studies,
        num_proposals=1,
        num_inference_steps=1,
        structures=["liver"],
        hd95=False,
    )
    assert report["num_cases"] == 1
    assert "error" in report["cases"][1]
    assert report["summary"]["cases_with"] == {"liver": 1}
    assert any("case2 could not be read" in note for note in report["notes"])


def test_a_report_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        save_report({"value": math.nan}, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        save_report({}, tmp_path / "file" / "report.json")


def test_the_eight_structures_of_transunet_are_structures():
    assert len(TRANSUNET_STRUCTURES) == 8
    assert set(TRANSUNET_STRUCTURES) <= set(STRUCTURES)


def test_the_examples_have_exactly_the_masks_they_say():
    volume = make_volume()
    for mask in (TRUTH, SMALLER, LARGER, EMPTY):
        np.testing.assert_array_equal(
            volume.arrange(make_proposals(mask[None, None], ("liver",)).mask(volume.grid, "liver")), mask
        )


def test_a_label_that_names_its_own_ids_is_scored_by_them(studies, tiny_model):
    from progidiff.proposals.engine import Engine

    def score() -> list[dict]:
        result = evaluate(Engine(tiny_model), studies, num_proposals=2, num_inference_steps=1, hd95=False)
        return [case["structures"] for case in result["cases"]]

    before = score()
    assert set(before[0]) == {"liver", "left kidney"}
    final = studies / "labels" / "final"
    image = nibabel.load(final / "case1.nii.gz")
    labels = np.asarray(image.dataobj).astype(np.uint8)
    (final / "case1.nii.gz").unlink()
    moved = np.array([0, 3, 1, 0, 0, 0, 0, 2], np.uint8)[labels]
    segments = [("kidney_left", 1), ("spinal cord", 2), ("Leber", 3)]
    write_seg_nrrd(final / "case1.seg.nrrd", moved, segments, image.affine)
    assert score() == before


def test_what_a_version_was_taught_is_scored_too(studies, tiny_model, tmp_path):
    from progidiff.model.adapters import AdapterStore, compute_base_digest
    from progidiff.model.lora import collect_full
    from progidiff.proposals.engine import Engine

    engine = Engine(tiny_model, adapters=tmp_path / "adapters")
    base = {"base": compute_base_digest(tiny_model), "base_name": engine.model_version}
    card = AdapterStore(tmp_path / "adapters").add(
        "ct-cord",
        "full",
        collect_full(engine.load().branch),
        modality="CT",
        structures=("spinal cord",),
        run={},
        readme=lambda card: "",
        shapes=engine.card.conditioning,
        **base,
    )

    def score(**asked) -> list[str]:
        result = evaluate(engine, studies, num_proposals=1, num_inference_steps=1, hd95=False, **asked)
        return sorted(result["cases"][0]["structures"])

    assert score() == ["left kidney", "liver"]  # Nothing serves it yet.
    assert score(adapter=card.full_name, structures=["spinal cord"]) == ["spinal cord"]
    engine.adapters.publish("ct-cord", 1)
    assert score() == ["left kidney", "liver", "spinal cord"]
    assert score(adapter="none") == ["left kidney", "liver"]
