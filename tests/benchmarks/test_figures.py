"""The figures of the README: what they show is what the results hold, and the worst cases are the worst ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progidiff.images.volume import Volume
from support.labelled_phantoms import write_case, write_table
from support.servers import ROOT, load_script

RESULTS = ROOT / "benchmarks" / "results"
CODES = np.diag([-2.0, -2.0, 5.0, 1.0])


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return load_script("figures")


def find_points(plot: Any, label: str) -> np.ndarray:
    """(x, y) of the points that the legend calls so."""
    found = [part for part in plot.collections if part.get_label() == label]
    assert len(found) == 1
    return np.asarray(found[0].get_offsets())


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_all_charts_are_drawn_from_the_committed_results_alone_and_the_same_again(
    figures: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for folder in ("one", "two"):
        figures.main(["charts", "--out", str(tmp_path / folder)])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["figures_quality.png", "figures_segmentation.png", "figures_text.png", "figures_transfer.png"]
    for name in names:
        path = tmp_path / "one" / name
        assert path.stat().st_size < 150_000
        assert Image.open(path).width > 600
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert f"Wrote {path}" in capsys.readouterr().out or name != names[0]


def test_results_that_are_absent_or_broken_are_named_with_what_to_do(figures: ModuleType, tmp_path: Path):
    (tmp_path / "text_controls.json").write_text("{", encoding="utf-8")
    for name, wrong in (("quality", "proposal_quality.json"), ("text", "text_controls.json")):
        with pytest.raises(SystemExit, match=f"{wrong}' cannot be read .*--results"):
            figures.main(["charts", "--results", str(tmp_path), "--only", name, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_segmentation_chart_shows_the_tables_of_the_readme(figures: ModuleType):
    heldout, rivals = read("evaluate_ct_heldout"), read("segmentation")
    (plot,) = figures.chart_segmentation(heldout, rivals).axes
    names = [label.get_text() for label in plot.get_yticklabels()]
    summary = heldout["summary"]
    for label, kind in (
        ("single proposal (mean)", "single"),
        ("consensus of 4", "consensus"),
        ("best of 4, picked with the truth", "best"),
    ):
        shown = {name: x for name, (x, _) in zip(names, find_points(plot, label), strict=True)}
        assert shown.pop("mean of 8") == summary["mean"][kind]["dice"]["transunet_8"]
        assert shown.pop("mean of all 13") == summary["mean"][kind]["dice"]["all"]
        assert shown == summary[kind]["dice"]
    values = find_points(plot, "consensus of 4")[:-2, 0]
    assert (np.diff(values) <= 0).all()
    unet = rivals["volumes"]["networks"]["U-Net"]["as drawn"]["summary"]["consensus"]["dice"]
    assert dict(zip(names[:-2], find_points(plot, "U-Net")[:, 0], strict=False)) == unet
    each = find_points(plot, "consensus of each volume")
    assert len(each) == 3 * 13
    for row, value in enumerate(values):
        assert each[each[:, 1] == row, 0].mean() == pytest.approx(value, abs=1e-5)
    (plot,) = figures.chart_segmentation(heldout, {}).axes
    assert "U-Net" not in [part.get_label() for part in plot.collections]


def test_the_quality_chart_shows_calibration_and_correlation(figures: ModuleType):
    report = read("proposal_quality")
    calibration, ranking = figures.chart_quality(report).axes
    lines = {line.get_label(): line.get_xydata() for line in calibration.lines}
    rows = report["voxels"]["reliability"]
    np.testing.assert_allclose(
        lines[f"agreement of 8, ECE {report['voxels']['ece']['band']:.3f}"],
        [(r["agreement"], r["inside"]) for r in rows],
    )
    served = report["disagreement_against_error"]["disagreement (served)"]
    assert find_points(ranking, "slice alone, all volumes")[0, 0] == served["slice alone"]["drawn"]
    assert find_points(ranking, "mean of 3 slices, all volumes")[0, 0] == served["mean of 3 slices"]["drawn"]


def test_the_text_chart_shows_the_means_that_belong_to_each_side(figures: ModuleType):
    controls = read("text_controls")["summary"]["controls"]
    everything, sides = figures.chart_text(read("text_controls")).axes
    names = [name for name in controls if not name.startswith("swapped")]
    assert [bar.get_width() for bar in everything.patches] == [controls[name]["all"] for name in names]
    assert [bar.get_width() for bar in sides.patches] == [controls[name]["with a side"] for name in figures.SIDED]
    assert [len(points.get_offsets()) for points in everything.collections] == [13] * len(names)
    assert [len(points.get_offsets()) for points in sides.collections] == [4] * 3


def make_cell(dice: float, with_proposals: bool = True) -> dict[str, Any]:
    """As `benchmarks/transfer.py` keeps them."""
    evidence = {"dice": dice - 0.1, "hd95": 9.0, "dice largest": 0.5, "hd95 largest": 8.0, "false slices": 0.1}
    plain = {"evidence": {"mean": evidence, "liver": evidence}}
    if with_proposals:
        plain |= {kind: {"mean": {"dice": dice}, "liver": {"dice": dice}} for kind in ("single", "consensus", "best")}
    shaded = {"evidence": {"mean": {**evidence, "dice": dice - 0.2}}}
    return {"tests": {"0": {"means": plain}, "0.2": {"means": shaded}}}


def test_the_transfer_chart_shows_every_seed_and_only_the_rows_that_there_are(figures: ModuleType):
    transfer = load_script("transfer")
    tried = "LoRA, 5 volumes, half of the slices at random"  # in the table alone
    assert set(figures.LABELS) | {f"unadapted{figures.WIDER}", f"LoRA, 5 volumes{figures.WIDER}", tried} == set(
        transfer.MAIN
    )
    assert set(figures.SHADED) == set(transfer.CROSSED)
    cells = {
        "unadapted": {"0": make_cell(0.4)},
        "LoRA, 3 volumes": {"0": make_cell(0.6), "1": make_cell(0.8)},
        "LoRA, 5 volumes, wider window": {"0": make_cell(0.7), "1": make_cell(0.9), "2": make_cell(0.8)},
        "LoRA, 5 volumes, no shading": {"0": make_cell(0.5, with_proposals=False)},
    }
    report = {"setup": {"test": ["a", "b"], "num_proposals": 4}, "summary": transfer.summarise(cells)}
    amount, shading = figures.chart_transfer(report).axes
    assert [label.get_text() for label in amount.get_xticklabels()] == ["as it is", "3 volumes", "5 volumes"]
    np.testing.assert_allclose(find_points(amount, "window as in training")[:, 1], [0.4, 0.7])
    np.testing.assert_allclose(find_points(amount, "wider window")[:, 1], [0.8])
    np.testing.assert_allclose(find_points(amount, "each seed")[:, 1], [0.4, 0.6, 0.8])
    assert {text.get_text() for text in amount.texts} == {"0.40", "0.70", "0.80"}
    lines = {line.get_label(): line.get_xydata() for line in shading.lines}
    assert list(lines) == ["as it is", "5 volumes, no shading in training", "5 volumes, wider window"]
    np.testing.assert_allclose(lines["5 volumes, wider window"], [(0, 0.7), (0.2, 0.6)])


class Masks:
    """Proposals on the image's grid, of one structure: what `find_worst` asks of `VolumeProposals`."""

    structures = ("liver",)

    def __init__(self, masks: np.ndarray, disagreement: list[float]) -> None:
        self.masks, self.disagreement = masks, np.array([disagreement], np.float32)

    def slice_masks(self, structure: str, z: int) -> np.ndarray:
        assert structure == "liver"
        return self.masks[:, z]


@pytest.fixture
def volume() -> Volume:
    """Six slices of 40 x 40 pixels of 2 x 2 mm, body in the middle."""
    array = np.full((40, 40, 6), -1000, np.int16)
    array[3:37, 3:37] = 40
    return Volume(array, CODES, "CT", "option", "toy")


@pytest.fixture
def truth() -> np.ndarray:
    """10 x 10 pixels (400 mm2) on slices 1 to 3, one pixel on slice 4; axial stack (Z, Y, X)."""
    labels = np.zeros((6, 40, 40), np.uint8)
    labels[1:4, 10:20, 10:20] = 1
    labels[4, 15, 15] = 1
    return labels


def arrange(volume: Volume, stack: np.ndarray) -> np.ndarray:
    """Back from the axial stack to file order."""
    places = np.arange(stack.size).reshape(volume.array.shape)
    result = np.zeros(stack.size, stack.dtype)
    result[volume.arrange(places).ravel()] = stack.ravel()
    return result.reshape(volume.array.shape)


def test_a_missed_pixel_does_not_beat_a_large_error_and_a_missed_slice_does(
    figures: ModuleType, volume: Volume, truth: np.ndarray
):
    drawn = truth.astype(bool)
    drawn[4] = False  # Dice 0 on one pixel
    drawn[2, 10:20, 10:14] = False  # 60 of 100 pixels: Dice 0.75
    labels = arrange(volume, truth)
    np.testing.assert_array_equal(volume.arrange(labels), truth)
    (worst,) = figures.find_worst("toy", volume, Masks(np.stack([drawn] * 3), [0] * 6), labels, {"liver": [1]})
    assert (worst.case, worst.structure, worst.z) == ("toy", "liver", 2)
    assert worst.score == pytest.approx(0.25)
    np.testing.assert_array_equal(worst.truth, truth[2].astype(bool))
    np.testing.assert_array_equal(worst.consensus, drawn[2])
    drawn[3] = False
    (worst,) = figures.find_worst("toy", volume, Masks(np.stack([drawn] * 3), [0] * 6), labels, {"liver": [1]})
    assert (worst.z, worst.score) == (3, 1.0)
    assert figures.weigh(1, 4, 400) == 0.01
    assert figures.weigh(1, 4, 4) == 0.04  # a structure of one pixel is held against 1 cm2


def test_what_is_drawn_where_nothing_is_counts_and_what_is_right_does_not(
    figures: ModuleType, volume: Volume, truth: np.ndarray
):
    drawn, labels = truth.astype(bool), arrange(volume, truth)
    assert figures.find_worst("toy", volume, Masks(np.stack([drawn] * 3), [0] * 6), labels, {"liver": [1]}) == []
    masks = np.stack([drawn] * 4)
    masks[:2, 5, 30:35, 30:35] = True  # two of four: the consensus draws it
    (worst,) = figures.find_worst("toy", volume, Masks(masks, [0] * 6), labels, {"liver": [1]})
    assert (worst.z, worst.score) == (5, 0.25)
    masks[1, 5] = False
    assert figures.find_worst("toy", volume, Masks(masks, [0] * 6), labels, {"liver": [1]}) == []


def test_without_labels_the_disagreement_ranks_and_a_few_pixels_do_not_win(
    figures: ModuleType, volume: Volume, truth: np.ndarray
):
    masks = np.stack([truth.astype(bool)] * 2)
    (worst,) = figures.find_worst("toy", volume, Masks(masks, [0, 0.1, 0.4, 0.2, 0.9, 0]))
    assert (worst.z, worst.truth) == (2, None)
    assert worst.score == pytest.approx(0.4)
    assert worst.disagreement == pytest.approx(0.4)


def test_the_truth_is_drawn_beside_the_proposals_and_over_their_consensus(
    figures: ModuleType, volume: Volume, truth: np.ndarray, tmp_path: Path
):
    drawn = truth.astype(bool)
    drawn[2, 10:20, 10:14] = False
    worst = figures.find_worst(
        "toy", volume, Masks(np.stack([drawn] * 3), [0] * 6), arrange(volume, truth), {"liver": [1]}
    )
    picture = np.asarray(Image.open(figures.draw_worst(worst, tmp_path / "worst.png")).convert("RGB")).astype(int)
    white = (picture.min(axis=2) > 245)[30:-30]  # the titles are grey
    slice_, truth_column, first, second, third, consensus, agreement = np.array_split(
        white[:, : int(white.shape[1] * 0.965)], 7, axis=1
    )
    assert slice_.any()  # the frame
    assert min(part.sum() for part in (truth_column, consensus, agreement)) > 50
    assert not first.any()
    assert not second.any()
    assert not third.any()


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    boxes = {1: (slice(8, 18), slice(6, 14), slice(2, 10)), 2: (slice(22, 30), slice(6, 14), slice(4, 12))}
    for name in ("one", "two"):
        write_case(folder, name, boxes, slices=12)
    write_table(folder, {1: "liver", 2: "spleen"})
    return folder


def read_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")
    ][1:]


def test_the_worst_cases_of_a_folder_are_found_with_and_without_labels(
    figures: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "worst.png"
    arguments = [
        "worst",
        "--studies",
        str(studies),
        "--model",
        str(tiny_model),
        "--num-proposals",
        "3",
        "--rows",
        "3",
        "--out",
        str(out),
    ]
    figures.main(arguments)
    told = capsys.readouterr().out
    rows = read_rows(told)
    assert len(rows) == 3
    assert len({(case, structure) for case, structure, *_ in rows}) == 3
    assert {case for case, *_ in rows} == {"one", "two"}
    scores = [float(row[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= float(row[3]) < 1 for row in rows)
    assert "K = 3" in told
    assert "ranked by error" in told
    height = Image.open(out).height
    figures.main([*arguments, "--structures", "liver", "--cases", "one", "--unlabelled"])
    told = capsys.readouterr().out
    assert [(row[0], row[1], row[3]) for row in read_rows(told)] == [("one", "liver", "-")]
    assert "ranked by disagreement" in told
    assert Image.open(out).height < height
    (studies / "labels").rename(tmp_path / "away")
    figures.main([*arguments, "--structures", "liver", "--cases", "one"])
    assert capsys.readouterr().out == told


def test_an_unknown_volume_is_refused_with_those_that_there_are(
    figures: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path
):
    for flag in ([], ["--unlabelled"]):
        with pytest.raises(SystemExit, match=r"there is no image three.*one, two"):
            figures.main(
                [
                    "worst",
                    "--studies",
                    str(studies),
                    "--model",
                    str(tiny_model),
                    "--cases",
                    "three",
                    "--out",
                    str(tmp_path / "x"),
                    *flag,
                ]
            )
