"""What a training says while it runs."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from progidiff.training.run_log import BOARD, RunLog


def test_without_tensorboard_a_training_logs_the_same_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path, 0)
        log.add({"step": 1, "loss": 0.5})
        log.add_validation({"step": 1, "dice": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"validation": {"step": 1, "dice": 0.25}}]
    assert "pip install 'progidiff[train]'" in caplog.text
    assert not (tmp_path / BOARD).exists()
