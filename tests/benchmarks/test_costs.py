"""`benchmarks/cost_curves.py` and `benchmarks/stock_controlnet.py` at a size of seconds; times mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from progidiff.images.reading import load_volume
from support.labelled_phantoms import write_case
from support.servers import ROOT, load_script


def test_one_thing_is_varied_at_a_time(tiny_model: Path, tmp_path: Path):
    write_case(tmp_path, "one", {1: np.s_[8:18, 6:14, 1:5]}, slices=8)
    out, image = tmp_path / "out.json", tmp_path / "one.nii.gz"
    common = ["--image", str(image), "--model", str(tiny_model), "--out", str(out)]
    sizes = ["--slices", "4", "--structures", "1", "--num-proposals", "2"]
    script = ROOT / "benchmarks" / "cost_curves.py"
    subprocess.run([sys.executable, str(script), *common, *sizes], check=True, capture_output=True)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    whole = rows[0]["structures"]
    assert [(row["slices"], row["structures"], row["proposals"]) for row in rows] == [
        (8, whole, 4),
        (4, whole, 4),
        (8, 1, 4),
        (8, whole, 2),
    ]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)
    volume = load_volume(image)
    cut = load_script("cost_curves").cut_slices(volume, 4)
    np.testing.assert_array_equal(cut.array, volume.array[:, :, 2:6])
    np.testing.assert_allclose(cut.affine @ [0, 0, 0, 1], volume.affine @ [0, 0, 2, 1])


def test_the_stock_pipeline_is_timed_on_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.json"
    sizes = ["--windows", "2", "--num-proposals", "2", "--steps", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["stock_controlnet.py", *sizes, "--out", str(out)])
    load_script("stock_controlnet").main()
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["windows"] == 2
    assert set(row["times as long"]) == {"stock", "stock without guidance"}
    assert all(seconds > 0 for seconds in row["seconds"].values())
