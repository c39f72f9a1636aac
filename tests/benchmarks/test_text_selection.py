"""The benchmark of selection at a size of seconds: it runs, goes on, and scores what was meant. Figures mean nothing
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from progidiff.textdiff.features import DiffusionFeatures
from progidiff.textdiff.model import TextDiffModel, default_folder
from progidiff.textdiff.pictures import read_picture
from support.chests import CLASSES, PHRASES, write_chests
from support.servers import load_script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("text_selection")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chests")
    for part, first in (("train", 0), ("val", 10)):
        (folder / part).mkdir()
        for case in write_chests(folder / part / "images", 2, first):
            assert case.label is not None
            (folder / part / "labels").mkdir(exist_ok=True)
            case.label.rename(folder / part / "labels" / case.label.name)
        (folder / part / "images" / "labels").rmdir()
    return folder


def test_a_run_trains_measures_every_control_and_goes_on(benchmark: ModuleType, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--data", str(data), "--work", str(tmp_path / "work"), "--sizes", "1", "2", "--seeds", "0"]
    arguments += ["--size", "32", "--steps", "2", "--views", "1", "--attention", "1", "--no-text", "2"]
    arguments += ["--out", str(out)]
    benchmark.main(arguments)
    report = json.loads(out.read_text(encoding="utf-8"))
    rows = report["summary"]["rows"]
    wanted = (
        "right",
        "empty",
        "left out",
        "multi-class",
        "swapped",
        "swapped, other side",
        "another picture's",
        "unseen",
    )
    assert {f"gate: {control}" for control in wanted} <= set(rows)
    assert "attention: right" in rows
    assert "attention: multi-class" not in rows
    assert set(rows["gate: right"]) == {"1", "2"}
    assert {name for name in rows if name.startswith("no text")} == {"no text: right", "no text: multi-class"}
    assert set(rows["no text: right"]) == {"2"}
    assert rows["gate: empty"]["1"]["one"] == 0
    capsys.readouterr()
    benchmark.main(arguments)
    assert capsys.readouterr().err.count(" s\n") == 0  # Nothing is trained again.


def test_a_swapped_sentence_is_scored_against_both_sides(benchmark: ModuleType, data: Path, tmp_path: Path):
    task = benchmark.open_chest(data)
    truths = {case.name: benchmark.read_classes(case, (48, 48), 2) for case in task.held_out}
    asked = {phrase.text: phrase.classes for phrase in (*task.phrases, *task.unseen)}

    def answer(model, cache, case, texts, attend=True):
        """A head that reads and draws without a mistake."""
        if not attend:
            return truths[case.name][None]
        return np.stack([benchmark.keep_classes(truths[case.name], asked[text] if text else ()) for text in texts])

    class Head:
        gate = object()

    class Model:
        head, encoder = Head(), object()

    drawn, benchmark.draw = benchmark.draw, answer
    try:
        scores = benchmark.measure(Model(), None, task, 1, 0)
    finally:
        benchmark.draw = drawn
    perfect = ("right", "multi-class", "swapped, other side", "unseen")
    assert all(value == 1 for control in perfect for values in scores[control].values() for value in values)
    assert all(value == 0 for values in scores["swapped"].values() for value in values)
    assert all(0.5 < value < 0.8 for value in scores["left out"]["right lung"])
    assert set(scores["swapped"]) == set(CLASSES)


def test_masks_are_those_that_serving_draws(benchmark: ModuleType, data: Path, tmp_path: Path, selecting_model):
    model: TextDiffModel = selecting_model
    case = benchmark.open_chest(data).held_out[0]
    found = benchmark.draw(model, benchmark.FeatureCache(None), case, ["left lung", None])
    picture = read_picture(case.image)
    assert (found[0] == model.predict(picture, "left lung").mask).mean() > 0.98  # Features are fp16 here.
    assert not found[1].any()


@pytest.fixture(scope="module")
def selecting_model(benchmark: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TextDiffModel:
    work = tmp_path_factory.mktemp("work")
    parser = benchmark.argparse.Namespace(
        task="chest", blocks=[0, 1, 2, 3], size=32, steps=20, learning_rate=5e-3, views=1, draws=1
    )
    task = benchmark.open_chest(data)
    config = benchmark.make_config(benchmark.replace(task, phrases=PHRASES), parser)
    tools = benchmark.Tools(
        DiffusionFeatures.load(default_folder() / "denoiser", config.features, "cpu"),
        benchmark.Memory.of(benchmark.SentenceEncoder.load(device="cpu")),
        benchmark.FeatureCache(work / "features"),
        work,
    )
    return benchmark.train(benchmark.replace(task, phrases=PHRASES), task.training, config, tools)
