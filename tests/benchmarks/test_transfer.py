"""The CT -> MR benchmark at a size of seconds: it runs, resumes, and its arithmetic is right. Its figures mean nothing
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from progidiff.images.volume import Volume
from support.labelled_phantoms import write_case, write_table
from support.servers import load_script

BOXES = {
    1: (slice(8, 18), slice(6, 14), slice(2, 10)),
    2: (slice(22, 30), slice(6, 14), slice(4, 12)),
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("transfer")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    for name in ("one", "two", "three"):
        write_case(folder, name, BOXES)
    write_table(folder, {1: "liver", 2: "spleen"})
    return folder


def test_the_smoke_size_runs_and_a_second_run_computes_nothing(
    benchmark: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.json"
    rows = ["unadapted", "unadapted, wider window", "LoRA, 5 volumes", "LoRA, 10 slices", "full, 5 volumes"]
    arguments = [
        "--studies",
        str(studies),
        "--model",
        str(tiny_model),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(out),
        "--smoke",
    ]
    arguments += ["--seeds", "0", "1", "--test", "three", "--rows", *rows]
    benchmark.main(arguments)
    first, told = json.loads(out.read_text()), capsys.readouterr()
    assert told.err.count(", seed ") == 8
    for row in rows:
        assert f"| {row} |" in told.out
    assert list(first["cells"]["unadapted"]) == ["0"]
    trained = first["cells"]["LoRA, 5 volumes"]
    assert {cell["validation"] for cell in trained.values()} | {
        name for cell in trained.values() for name in cell["training"]
    } == {"one", "two"}
    assert all(set(cell["tests"]["0"]["volumes"]) == {"three"} for cell in trained.values())
    assert first["cells"]["LoRA, 10 slices"]["0"]["training_slices"] == 2
    summary = first["summary"]
    assert summary["LoRA, 5 volumes"]["parameters"] < summary["full, 5 volumes"]["parameters"]
    assert set(summary["unadapted"]["evidence_under_shading"]) == {"0", "0.3"}
    assert summary["full, 5 volumes"]["share_of_full"] == 1
    benchmark.main(arguments)
    assert ", seed " not in capsys.readouterr().err
    assert json.loads(out.read_text())["cells"] == first["cells"]
    done = next((tmp_path / "work").glob("transfer-*"))
    sorted(done.glob("*-1.json"))[0].unlink()
    benchmark.main([*arguments, "--collect"])
    assert ", seed " not in capsys.readouterr().err
    assert sum(map(len, json.loads(out.read_text())["cells"].values())) == 7
    benchmark.main(["--summarise", str(out)])
    assert capsys.readouterr().out.startswith("| row |")


def test_no_seed_trains_on_a_test_volume_and_seeds_differ(benchmark: ModuleType):
    names = [f"case{i}" for i in range(10)]
    splits = [benchmark.split_volumes(names, names[6:], seed) for seed in range(3)]
    for training, validation in splits:
        assert sorted([*training, validation]) == names[:6]
    assert len({validation for _, validation in splits}) == 3
    assert len({training[0] for training, _ in splits}) == 3


def test_shading_is_smooth_has_the_strength_asked_for_and_changes_no_zero(benchmark: ModuleType):
    array = np.full((32, 24, 12), 100.0, np.float32)
    array[:4] = 0
    volume = Volume(array, np.diag([2.0, 2.0, 6.0, 1.0]), "MR", "option", "flat")
    shaded = benchmark.shade(volume, 0.2, seed=3).array
    field = np.log(shaded[4:] / 100)
    assert benchmark.shade(volume, 0.0, seed=3) is volume
    assert not shaded[:4].any()
    assert 0.1 < field.std() < 0.3
    assert np.abs(np.diff(field, axis=0)).max() < 0.25 * np.ptp(field)
    stronger = np.log(benchmark.shade(volume, 0.4, seed=3).array[4:] / 100)
    np.testing.assert_allclose(stronger, 2 * field, atol=1e-4)


def test_the_largest_part_drops_islands_and_false_slices_are_counted(benchmark: ModuleType):
    truth = np.zeros((8, 20, 20), bool)
    truth[2:5, 4:12, 4:12] = True
    mask = truth.copy()
    mask[7, 18:, 18:] = True
    found = benchmark.score(mask, truth, (5.0, 1.0, 1.0))
    assert found["dice largest"] == 1
    assert found["hd95 largest"] == 0
    assert found["dice"] < 1
    assert found["false slices"] == pytest.approx(1 / 5)


def test_the_model_as_it_is_answers_as_the_engine_does(
    benchmark: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path
):
    from progidiff.images.reading import load_volume
    from progidiff.prompts.parser import parse_prompt
    from progidiff.proposals.engine import Engine
    from progidiff.proposals.request import ProposalRequest

    bench = benchmark.Bench(benchmark.Setup(test=("three",)), studies, tiny_model, tmp_path / "work", print)
    volume = load_volume(studies / "three.nii.gz")
    engine = Engine(tiny_model)
    queries = parse_prompt("spleen, liver", engine.structures)
    expected = engine.propose(ProposalRequest(queries=queries, num_proposals=2, adapter="none"), volume)
    chosen = range(0, 20, 4)
    drawn = benchmark.draw_masks(
        bench.load_base(1.0)[2], bench.card, volume, [query.name for query in queries], chosen, 2
    )
    for p, query in enumerate(queries):
        for k in range(2):
            mask = volume.arrange(expected.mask(volume.grid, query.name, k + 1)).astype(bool)[list(chosen)]
            assert mask.any()
            assert (mask != drawn[1 + k, p]).mean() < 0.01  # the engine keeps probabilities as bytes


def test_the_wider_window_reaches_training_slices_and_networks(
    benchmark: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path
):
    from progidiff.images.reading import load_volume
    from progidiff.training.slice_cache import SliceCache
    from progidiff.training.slice_cache import list_cases as list_labelled

    for name in ("one", "two", "three"):
        (studies / f"{name}.json").write_text(json.dumps({"modality": "MR"}), encoding="utf-8")
    bench = benchmark.Bench(benchmark.Setup(test=("three",)), studies, tiny_model, tmp_path / "work", print)
    means, evidence = [], []
    volume = load_volume(studies / "three.nii.gz")
    assert volume.modality == "MR"
    for headroom in (1.0, 4.0):
        folder, card, pipeline = bench.load_base(headroom)
        assert card.conditioning.mr_headroom == headroom
        assert (folder == tiny_model) == (headroom == 1)
        cache = SliceCache(
            list_labelled(studies, ["three"]), ("liver", "spleen"), card.conditioning, tmp_path / "cache"
        )
        means.append(float((cache.read(range(20))[0] + 1).mean()))
        evidence.append(benchmark.draw_masks(pipeline, card, volume, ["liver"], range(20), 0))
    assert means[1] < 0.5 * means[0]
    assert (evidence[0] != evidence[1]).any()
