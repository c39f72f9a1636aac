"""The benchmark of augmentation at a size of a second: it runs, and both ways give the same pictures."""

from __future__ import annotations

import sys

import pytest
import torch

from support.servers import ROOT, load_script


def test_both_ways_are_measured_on_the_same_slices_and_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    found = load_script("augmentation").measure(torch.device("cpu"), batch=2, blocks=2, structures=4, bias_field=0.2)
    assert set(found["ms_per_slice"]) == {"0.1", "now"}
    assert set(found["times_faster"]) == {"reading", "augmentation", "targets", "all"}
    assert all(value > 0 for parts in found["ms_per_slice"].values() for value in parts.values())
    assert found["largest_difference"]["image"] < 1e-3
    assert found["largest_difference"]["label_share"] < 1e-3
