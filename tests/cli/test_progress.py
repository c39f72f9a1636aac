"""Where no terminal is, progress is plain lines: enough to see that something goes on, and no more."""

from __future__ import annotations

import pytest

from progidiff.cli import progress


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which only the tests change."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "is_terminal", lambda: False)
    return now


def test_every_case_is_one_line(capsys: pytest.CaptureFixture[str], clock: list[float]):
    with progress.show_cases() as report:
        for number, name in enumerate(("a", "b")):
            for done in (0, 4, 8):
                report(number, 2, name, done, 8)
                clock[0] += 1.5
        report(2, 2, "", 1, 1)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["1/2 a: 4.5 s", "2/2 b: 4.5 s"]
    assert captured.out == ""


def test_a_count_is_told_every_few_seconds_and_at_its_end(capsys: pytest.CaptureFixture[str], clock: list[float]):
    with progress.show_count("ct", "slices") as show:
        for done in range(1, 25):
            clock[0] += 1
            show(done, 24)
        show(24, 24)
    assert capsys.readouterr().err.splitlines() == [f"ct: {done} of 24 slices" for done in (10, 20, 24)]


def test_a_training_tells_its_stages_and_steps(capsys: pytest.CaptureFixture[str], clock: list[float]):
    report = progress.make_step_report()
    assert report is not None
    report({"stage": "prepare"})
    report({"stage": "prepare", "name": "mr"})
    for step in (10, 20, 30):
        clock[0] += 6
        report({"stage": "adapt", "step": step, "total": 30, "loss": 0.25, "eta_seconds": 120.0})
    assert capsys.readouterr().err.splitlines() == [
        "prepare",
        "adapt: step 20 of 30, loss 0.2500, 2 min left",
        "adapt: step 30 of 30, loss 0.2500, 2 min left",
    ]


def test_a_terminal_has_the_trainings_own_bar(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    assert progress.make_step_report() is None
