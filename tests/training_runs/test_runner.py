"""Trainings as processes: started, watched, paused, stopped, killed; with stand-ins for the process that trains."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from progidiff import logs
from progidiff.errors import BusyError, CancelledError, ImageError, RequestError, StoreError
from progidiff.server.trainings import describe_stats
from progidiff.training_runs import child
from progidiff.training_runs.child import Control, Progress, explain, tidy_up
from progidiff.training_runs.options import TRAINERS, TrainingOptions, get_defaults
from progidiff.training_runs.runner import LOCK, Outcome, TrainingRunner, read_json, write_json

HEAD = """
import json, os, signal, sys, time
folder = sys.argv[1]

def progress(**values):
    with open(folder + "/new", "w") as file:
        json.dump({"stage": "evidence", "step": 7, "total": 40, "best_metric": 0.5, "message": "Busy.", **values}, file)
    os.replace(folder + "/new", folder + "/progress.json")

"""


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingRunner]:
    """A runner whose process is the given program."""

    def build(program: str, **options: Any) -> TrainingRunner:
        (tmp_path / "stand_in.py").write_text(HEAD + program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        collect = options.pop("collect", lambda _: {"cases": []})
        return TrainingRunner(tmp_path / "training", collect, module="stand_in", **options)

    return build


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_to_end(runner: TrainingRunner, **params: Any) -> dict[str, Any]:
    runner.start("progidiff_adapt", params)
    assert runner.wait(60)
    return runner.status()


# --- the server's side ---


def test_the_outcome_arrives_over_the_pipe_and_is_written_down(build: Callable[..., TrainingRunner], tmp_path: Path):
    published: list[str] = []

    def fail(version: str) -> None:
        raise RuntimeError(version)

    answer = '{"state": "done", "message": "mr@1 is published", "published": True, "version": "mr@1"}'
    program = f"progress(); print(json.dumps({answer}))"
    runner = build(program, on_published=[fail, published.append])
    assert runner.status().state == "idle"
    status = run_to_end(runner, steps=40, strange=1, client_id="me")
    assert (status.state, status.published, status.version, status.message) == (
        "done",
        True,
        "mr@1",
        "mr@1 is published",
    )
    assert (status.params, status.ignored) == ({"steps": 40, "strange": 1}, ["strange"])
    wait_for(lambda: published == ["mr@1"])
    again = TrainingRunner(tmp_path / "training", lambda _: {}).status()
    assert again == status


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "progress(); os.kill(os.getpid(), signal.SIGKILL)",
            r"was killed \(signal 9, SIGKILL\) at evidence, step 7 of 40.*start it again",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"was killed \(signal 11, SIGSEGV\) at start"),
        ("sys.exit(5)", "ended with code 5.*log.txt"),
        ('print("no JSON"); sys.exit(1)', "ended with code 1"),
    ],
)
def test_a_process_that_ends_without_a_word_is_explained(
    build: Callable[..., TrainingRunner], program: str, reason: str
):
    status = run_to_end(build(program))
    assert status.state == "failed"
    assert re.search(reason, status.reason)
    assert status.message == status.reason


def test_a_process_that_the_kernel_ended_for_memory_is_told_apart(
    build: Callable[..., TrainingRunner], monkeypatch: pytest.MonkeyPatch
):
    counts = iter((3, 4))
    monkeypatch.setattr("progidiff.training_runs.runner._count_oom_kills", lambda: next(counts))
    status = run_to_end(build("os.kill(os.getpid(), signal.SIGKILL)"), batch_size=9)
    assert "ran out of memory" in status.reason
    assert "Lower batch_size (it was 9)" in status.reason


def test_stop_pause_and_resume_reach_the_process(build: Callable[..., TrainingRunner]):
    program = """
progress(message="")
words = []
for line in sys.stdin:
    words.append(line.strip())
    progress(message=" ".join(words))
    if words[-1] == "stop":
        print(json.dumps({"state": "stopped", "message": " ".join(words)}))
        break
"""
    runner = build(program)
    runner.set_demand(True)
    runner.start("progidiff")
    wait_for(lambda: runner.status().message == "pause")
    assert runner.status().paused is True
    runner.set_demand(False)
    wait_for(lambda: runner.status().message == "pause resume")
    stopped = runner.stop(wait=60)
    assert stopped is not None
    assert (stopped.state, stopped.message) == ("stopped", "pause resume stop")
    assert runner.stop() is None


def test_a_process_that_does_not_stop_is_ended(build: Callable[..., TrainingRunner]):
    runner = build("progress(); time.sleep(600)", stop_seconds=0.3)
    runner.start("progidiff")
    wait_for(lambda: runner.status().state == "running")
    stopped = runner.stop(wait=30)
    assert stopped is not None
    assert stopped.state == "stopped"
    assert "did not stop by itself within 0.3 s" in stopped.message


def test_one_training_at_a_time(build: Callable[..., TrainingRunner], tmp_path: Path):
    runner = build("progress(); time.sleep(600)", stop_seconds=0.1)
    runner.start("progidiff", {"name": "a"})
    with pytest.raises(BusyError, match="Trainer 'progidiff' is under way.*One training at a time"):
        runner.start("progidiff_adapt")
    runner.stop(wait=30)
    with FileLock(tmp_path / "training" / LOCK), pytest.raises(BusyError, match="Another server trains on this store"):
        runner.start("progidiff_adapt")
    runner.close()
    with pytest.raises(BusyError, match="The server is stopping"):
        runner.start("progidiff_adapt")


def test_a_training_that_ends_with_its_server_is_one_to_be_continued(
    build: Callable[..., TrainingRunner], tmp_path: Path
):
    program = """
progress()
sys.stdin.readline()
print(json.dumps({"state": "stopped", "message": "Stopped on request."}))
"""
    runner = build(program)
    runner.start("progidiff")
    runner.close()
    assert runner.wait(60)
    assert TrainingRunner(tmp_path / "training", lambda _: {}).status().state == "interrupted"


def test_what_prevents_a_start_is_told(build: Callable[..., TrainingRunner], tmp_path: Path):
    def refuse(_: Any = None) -> Any:
        raise RequestError("Nothing is labelled.")

    with pytest.raises(RequestError, match="Nothing is labelled"):
        build("", check=refuse).start("progidiff")
    status = run_to_end(build("", collect=refuse))
    assert (status.state, status.reason) == ("failed", "Nothing is labelled.")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="cannot be written down.*nothing was started"):
        TrainingRunner(tmp_path / "blocked", refuse).start("progidiff")


def test_the_last_run_is_the_last_one_started_whatever_the_clock_says(
    build: Callable[..., TrainingRunner], tmp_path: Path
):
    ids = [f"{date}T000000-ffffff" for date in ("20260101", "20990101")]  # The clock was ahead.
    for run_id in ids:
        (tmp_path / "training" / "runs" / run_id).mkdir(parents=True)
    runner = build('print(json.dumps({"state": "done", "message": "Hello."}))')
    seen = []
    for _ in range(3):
        started = runner.start("progidiff_adapt")
        assert runner.wait(60)
        seen.append(started.id)
        assert runner.status().id == started.id
        assert runner.status().message == "Hello."
    assert seen == sorted(seen)

    # Set back while a training runs: nothing lasts a negative time.
    assert (
        describe_stats(runner.status().model_copy(update={"started": 2000.0, "ended": 1000.0}))["total_time"]
        == "0:00:00"
    )


def test_a_run_without_an_outcome_was_interrupted_unless_somebody_works_on_it(tmp_path: Path):
    folder = tmp_path / "runs" / "20260101T000000-abcdef"
    folder.mkdir(parents=True)
    write_json(folder / "request.json", {"trainer": "progidiff", "params": {}, "started": 5.0})
    write_json(folder / "progress.json", {"stage": "evidence", "step": 30, "total": 200, "time": 9.0})
    runner = TrainingRunner(tmp_path, lambda _: {})
    status = runner.status()
    assert (status.state, status.ended) == ("interrupted", 9.0)
    assert "step 30 of 200" in status.reason
    assert "start it again" in status.reason
    with FileLock(tmp_path / LOCK):
        assert runner.status().state == "running"


# --- the options ---


def test_the_defaults_are_what_viewers_can_draw_and_what_is_trained_with():
    for trainer in TRAINERS:
        values = get_defaults(trainer)
        assert all(
            isinstance(v, (str, int, float, bool)) or (v and all(isinstance(e, str) for e in v))
            for v in values.values()
        )
        options, ignored = TrainingOptions.from_params(trainer, values)
        assert ignored == ()
        assert (options.name, options.modality, options.slices, options.publish) == (None, None, None, True)
        assert TrainingOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"steps": 0}, "Option steps is 0"),
        ({"learning_rate": "fast"}, "Option learning_rate"),
        ({"modality": "PET"}, "Option modality"),
        ({"structures": 5}, "Option structures must be names"),
        ({"publish": "perhaps"}, "Option publish"),
    ],
)
def test_options_that_make_no_sense_are_refused(params: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        TrainingOptions.from_params("progidiff", params)
    with pytest.raises(RequestError, match="There is no trainer 'nobody'; this server has progidiff, progidiff_adapt"):
        TrainingOptions.from_params("nobody", {})


def test_names_are_read_from_text_and_lists():
    options, _ = TrainingOptions.from_params(
        "progidiff", {"structures": "liver, left kidney", "held_out": ["a"], "name": "site-mr"}
    )
    assert (options.structures, options.held_out, options.name) == (("liver", "left kidney"), ("a",), "site-mr")


# --- the process's side ---


def listen_to(monkeypatch: pytest.MonkeyPatch) -> tuple[Control, Any, threading.Event]:
    reading, writing = os.pipe()
    ended = threading.Event()
    control = Control(os.fdopen(reading), ended.set)
    control.listen()
    return control, os.fdopen(writing, "w", buffering=1), ended


def test_a_training_waits_while_the_device_is_wanted_but_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(child, "MAX_PAUSE_SECONDS", 0.3)
    control, say, ended = listen_to(monkeypatch)
    assert control.breathe() is False
    assert control.paused_seconds == 0
    say.write("pause\n")
    wait_for(lambda: not control._clear.is_set())
    started = time.monotonic()
    assert control.breathe() is False
    assert 0.25 < time.monotonic() - started < 5
    assert control.paused_seconds >= 0.25
    say.write("resume\n")
    wait_for(control._clear.is_set)
    say.write("pause\nstop\n")
    wait_for(control.breathe)
    assert not ended.is_set()
    say.close()
    assert ended.wait(5)


def test_a_stop_ends_a_pause_at_once():
    control = Control(io.StringIO("pause\nstop\n"), lambda: None)
    control.listen()
    started = time.monotonic()
    wait_for(control.breathe)
    assert time.monotonic() - started < 10


def test_progress_tells_stage_step_dice_and_the_time_left(tmp_path: Path):
    progress = Progress(tmp_path / "progress.json", Control(io.StringIO()))
    progress.note({"stage": "prepare"})
    for step in range(6):
        progress.note({"stage": "evidence", "step": step, "total": 40})
    progress.note({"stage": "validation", "step": 10, "total": 40, "evidence": 0.625})
    told = read_json(tmp_path / "progress.json")
    assert told is not None
    assert (told["stage"], told["step"], told["total"], told["best_metric"]) == ("validation", 10, 40, 0.625)
    assert told["message"] == "Validated at step 10 of 40, Dice 0.625 on the held-back slices at best."
    for step in range(10, 15):
        progress.note({"stage": "evidence", "step": step, "total": 40})
    assert progress.values["eta_seconds"] >= 0
    progress.note({"stage": "version", "base": 0.1, "adapted": 0.75})
    assert progress.values["best_metric"] == 0.75


def test_progress_that_cannot_be_written_ends_nothing(tmp_path: Path):
    Progress(tmp_path / "gone" / "progress.json", Control(io.StringIO())).write()
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "ran out of memory.*Lower batch_size .it was 12."),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "ran out of memory .CUDA out of memory",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "ran out of memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full.*Free some space.*Nothing was published"),
        (PermissionError(errno.EACCES, "Permission denied"), "could not be read or written"),
        (
            ImageError("The label of 'a' is empty; label a structure."),
            "^The label of 'a' is empty; label a structure.$",
        ),
        (ValueError("strange"), "broke unexpectedly .ValueError: strange."),
    ],
)
def test_every_failure_has_a_reason_and_a_cure(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Outcome:
        raise error

    monkeypatch.setattr(child, "_train", fail)
    write_json(tmp_path / "request.json", {"options": {"batch_size": 12}})
    control = Control(io.StringIO())
    outcome = child.run(tmp_path, control, Progress(tmp_path / "progress.json", control))
    assert (outcome.state, outcome.published) == ("failed", False)
    assert re.search(reason, outcome.reason)
    assert explain(error, 12) == outcome.reason


def test_a_training_that_was_stopped_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: Any) -> Outcome:
        raise CancelledError("stopped")

    monkeypatch.setattr(child, "_train", stop)
    control = Control(io.StringIO())
    progress = Progress(tmp_path / "progress.json", control)
    progress.note({"stage": "evidence", "step": 4, "total": 9})
    outcome = child.run(tmp_path, control, progress)
    assert (outcome.state, outcome.reason) == ("stopped", "")
    assert "at evidence, step 4 of 9; start it again" in outcome.message


def test_what_no_later_run_asks_for_is_removed(tmp_path: Path):
    cache = tmp_path / "cache"
    names = ("cache/read", "cache/replaced", "mr-done", "mr-stopped", "ct-forgotten")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "meta.json").write_text("{}")
    now = time.time()
    os.utime(cache / "replaced" / "meta.json", (now - 100, now - 100))
    os.utime(tmp_path / "ct-forgotten", (now - 1e7, now - 1e7))
    tidy_up(tmp_path, cache, tmp_path / "mr-done", since=now - 50)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("**/*") if p.is_dir()) == [
        "cache",
        "cache/read",
        "mr-stopped",
    ]


def test_the_process_writes_its_log_as_the_server_does_and_for_the_request_that_started_it(
    build: Callable[..., TrainingRunner], tmp_path: Path
):
    program = 'open(folder + "/told", "w").write(os.environ["PROGIDIFF_LOG"]); print(json.dumps({"state": "done"}))'
    runner = build(program)
    logs.describe_for_child(logs.JSON, logs.HASHED, tmp_path / "log.key")

    def start() -> None:
        logs.begin_request(logs.RequestNote("of-anna"))
        run_to_end(runner)

    try:
        copy_context().run(start)
    finally:
        logs.describe_for_child(logs.TEXT, logs.PLAIN, tmp_path)
    told = json.loads((tmp_path / "training" / "runs" / runner.status().id / "told").read_text())
    assert told == {"kind": "json", "names": "hashed", "key": str(tmp_path / "log.key"), "request": "of-anna"}


def test_a_training_names_no_image_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "training" / "runs" / "20260101T000000-abcdef"
    folder.mkdir(parents=True)
    write_json(folder / "request.json", {"cases": [{"name": "Doe_Jane"}], "options": {}})
    environment = {
        **os.environ,
        "PROGIDIFF_LOG": json.dumps(
            {"kind": "json", "names": "hashed", "key": str(tmp_path / "log.key"), "request": "of-anna"}
        ),
        "PYTHONPATH": str(Path(child.__file__).parents[2]),
    }
    program = (
        "import logging, sys; from pathlib import Path; from progidiff.training_runs import child; "
        "child.die_with_parent = lambda server: None; "
        "child._train = lambda folder, *_: logging.getLogger('x').warning('Doe_Jane and %r', 'Smith') or 1 / 0; "
        "sys.exit(child.main(Path(sys.argv[1]), 0, 0))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    # An open pipe: its end would tell that the server is gone.
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        printed = process.stderr.read()
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["level"] for line in lines] == ["WARNING", "ERROR"]
    assert all(line["request"] == "of-anna" for line in lines)
    assert re.fullmatch(r"#\w{12} and '#\w{12}'", lines[0]["message"])
    assert "ZeroDivisionError" in lines[1]["exception"]
