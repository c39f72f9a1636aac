"""When a training is due and when to stop: counting and arithmetic."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from progidiff.active_learning.advice import KEPT, MIN_SAVES, CurvePoint, advise, estimate_gain, predict_gain
from progidiff.training_runs.mark import Mark, MarkFile


def test_the_mark_survives_a_restart_and_a_damaged_one_counts_everything_as_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "deep" / "retrain.json"
    assert MarkFile(file).load() == Mark()
    MarkFile(file).save(Mark(7, 3))
    assert MarkFile(file).load() == Mark(adapters=7, textdiff=3)
    assert [path.name for path in file.parent.iterdir()] == ["retrain.json"]
    file.write_text('{"sequence": 5, "run": "run-1", "automatic": true}')  # as version 0.1 wrote it
    assert MarkFile(file).load() == Mark(5, 5)
    for content in ("", "{", "[]", '{"adapters": "x"}', '{"textdiff": []}'):
        file.write_text(content)
        assert MarkFile(file).load() == Mark()
    assert "count as new" in caplog.text


def test_a_mark_that_cannot_be_written_raises_and_leaves_the_old_one(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        MarkFile(tmp_path / "file" / "retrain.json").save(Mark(1))


def test_the_expected_gain_falls_as_the_curve_flattens():
    steep = [CurvePoint("a@1", 10, 0.5), CurvePoint("a@2", 20, 0.7)]
    flat = [CurvePoint("a@1", 100, 0.80), CurvePoint("a@2", 200, 0.802)]
    assert estimate_gain(steep, 20) == pytest.approx(0.2)  # doubling brought 0.2, and 20 more double again
    gain = estimate_gain(flat, 20)
    assert gain is not None
    assert 0 < gain < 0.005
    assert estimate_gain([CurvePoint("a@1", 10, 0.8), CurvePoint("a@2", 20, 0.7)], 20) == 0.0
    assert estimate_gain(steep[:1], 20) is None
    assert estimate_gain([CurvePoint("a@1", 10, 0.5), CurvePoint("a@2", 10, 0.7)], 20) is None
    assert estimate_gain([], 20) is None


def test_the_next_ten_slices_have_an_interval_that_narrows_with_versions_and_is_told():
    curve = [CurvePoint(f"a@{n}", 10 * n, 0.5 + 0.1 * math.log(n)) for n in range(1, 5)]
    few, many = predict_gain(curve[:2], 10), predict_gain(curve, 10)
    assert few is not None
    assert many is not None
    line = estimate_gain(curve, 10)
    assert line is not None
    assert many.expected == pytest.approx(KEPT * line)
    assert many.low < many.expected < many.high
    assert many.high - many.low < few.high - few.low
    falling = predict_gain([CurvePoint("a@1", 10, 0.8), CurvePoint("a@2", 20, 0.7)], 10)
    assert falling is not None
    assert falling.expected == 0.0
    advice = advise([True] * MIN_SAVES, curve, 20)
    assert advice.next_ten == many
    assert f"of the next 10, {many.expected:.3f} is likely, {many.low:+.3f} to {many.high:+.3f}" in advice.message


def test_stopping_is_advised_only_when_both_signs_are_flat_and_with_the_numbers():
    flat = [CurvePoint("a@1", 100, 0.80), CurvePoint("a@2", 200, 0.802)]
    steep = [CurvePoint("a@1", 10, 0.5), CurvePoint("a@2", 20, 0.7)]
    steady = [False, True] * MIN_SAVES
    better = [True] * MIN_SAVES + [False] * MIN_SAVES
    stop = advise(steady, flat, 20)
    assert stop.stop
    assert "50 % of the last 10 masks were accepted without a change, 50 % before." in stop.message
    assert "20 more slices are expected to bring 0.000 Dice." in stop.message
    assert "Both are flat" in stop.message
    assert not advise(better, flat, 20).stop
    assert not advise(steady, steep, 20).stop
    assert advise(steady, steep, 20).message.endswith("Go on.")


def test_too_little_is_known_at_the_beginning_and_the_advice_says_so():
    advice = advise([True], [], 20)
    assert not advice.stop
    assert (advice.unchanged_now, advice.expected_gain) == (None, None)
    assert "10 are needed" in advice.message
    assert "Two trained versions are needed" in advice.message
    told = {"stop", "message", "unchanged_before", "unchanged_now", "expected_gain"}
    assert set(asdict(advice)) == {*told, "next_ten"}
    assert advice.next_ten is None
