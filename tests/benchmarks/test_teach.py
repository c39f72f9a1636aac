"""The script on new structures: which slices a person annotates, and the table of what is done."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pytest

from progidiff.training.slice_cache import list_cases
from support.labelled_phantoms import write_case, write_table
from support.servers import ROOT, load_script


@pytest.fixture
def teach(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("teach")


def write_study(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a", "b", "c"):
        write_case(folder, name, {1: np.s_[6:16, 6:20, 2:5]}, slices=8)
    write_table(folder, {1: "anterior"})
    return folder


def test_annotated_slices_are_spread_over_patients_and_show_something(teach: ModuleType, tmp_path: Path):
    cases = list_cases(write_study(tmp_path / "studies"))
    chosen = teach.annotate(cases, 4, seed=1)
    slices = {case.name: sorted(case.annotated[""]) for case in chosen}
    assert sorted(len(drawn) for drawn in slices.values()) == [1, 1, 2]
    assert all(2 <= z < 5 for drawn in slices.values() for z in drawn)
    assert teach.annotate(cases, 4, seed=1) == chosen
    assert teach.annotate(cases, 4, seed=2) != chosen
    assert len(teach.annotate(cases, 1, seed=1)) == 1
    assert teach.annotate(cases, teach.POOL, seed=1) == cases


def test_the_table_has_one_row_per_set_and_number_of_slices(teach: ModuleType):
    cells = [
        {"set": "heart", "slices": 10, "seed": seed, "cpu_seconds": 60.0, "taught": dice, "u-net": 0.5}
        for seed, dice in ((0, 0.7), (1, 0.8))
    ]
    rows = teach.summarise(cells)
    assert [(row["set"], row["slices"], row["seeds"]) for row in rows] == [("heart", 10, 2)]
    table = teach.format_table(rows)
    assert "| heart | 10 | 0.750 ± 0.071 | 0.500 ± 0.000 | 60 | 2, 2 |" in table
    pool = [{"set": "heart", "slices": teach.POOL, "seed": 0, "cpu_seconds": 90.0, "taught": 0.9}]
    assert "| heart | pool | 0.900 |  | 90 | 1, 0 |" in teach.format_table(teach.summarise(pool))


def test_the_picture_of_the_curves_is_drawn(teach: ModuleType, tmp_path: Path):
    cells = [
        {"set": "heart", "slices": count, "seed": 0, "cpu_seconds": 60.0, "taught": dice, "u-net": dice - 0.2}
        for count, dice in ((1, 0.4), (10, 0.7))
    ]
    cells.append({"set": "heart", "slices": teach.POOL, "seed": 0, "cpu_seconds": 90.0, "taught": 0.8})
    teach.draw(teach.summarise(cells), tmp_path / "teach.png")
    pixels = plt.imread(tmp_path / "teach.png")
    assert pixels[..., :3].std() > 0.01
