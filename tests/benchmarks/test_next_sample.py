"""The benchmark of the next sample with a handful of images: it runs, and asks a server that answers from the
scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from support.servers import load_script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("next_sample")


def test_the_store_alone_is_measured_without_a_server(benchmark: ModuleType, tmp_path: Path):
    benchmark.main(["--images", "3", "--repeats", "2", "--out", str(tmp_path / "store.json")])
    result = json.loads((tmp_path / "store.json").read_text(encoding="utf-8"))
    assert result["images"] == 3
    assert 3 * 60 <= result["slices"] < 3 * 180
    assert 0 < result["median_ms"] <= result["slowest_ms"]


def test_a_server_is_asked_at_once_and_after_a_while(benchmark: ModuleType, tmp_path: Path):
    benchmark.main(["--http", "--images", "3", "--repeats", "2", "--wait", "0.5", "--out", str(tmp_path / "http.json")])
    result = json.loads((tmp_path / "http.json").read_text(encoding="utf-8"))
    assert (result["images"], result["repeats"], result["leaves_out"]) == (3, 2, benchmark.LEAVES_OUT)
    for case, asked_after in (("at_once", 0.0), ("after_a_while", 0.5)):
        times = result[case]
        assert times["asked_after_s"] == asked_after
        assert times["first_ms"] > 0
        assert 0 < times["median_ms"] <= times["slowest_ms"]
        assert times["ready_s"] > 0


def test_an_answer_without_scores_is_no_measurement(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch):
    class Answer:
        ok = True
        text = "not scored yet"

        def json(self) -> dict[str, str]:
            return {"scores_from": ""}

    monkeypatch.setattr(benchmark.requests, "post", lambda *args, **options: Answer())
    with pytest.raises(SystemExit, match="does not answer from the scores: not scored yet"):
        benchmark.ask("http://nobody")
