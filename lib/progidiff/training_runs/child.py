"""The process that trains for a server: ``python -m progidiff.training_runs.child <run folder> <pid of the server>
<niceness>``.

It talks to the server over two pipes. On standard input come the lines ``pause``, ``resume`` and ``stop``; the end of
input means that the server is gone, and then this process ends at once, as it does by the kernel's parent-death signal
where there is one: a training never outlives its server. On standard output goes one line at the end, the outcome as
JSON, so that the reason of a failure arrives also when the disk is full. In between ``progress.json`` in the run
folder, replaced by rename, says how far it is.

Between two steps it waits while the server wants the device for a request, but for `MAX_PAUSE_SECONDS` at a time at
most, so that requests without end cannot starve it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from progidiff.errors import BusyError, CancelledError, ProGiDiffError
from progidiff.images.formats import strip_suffix
from progidiff.logs import follow_parent
from progidiff.training_runs.options import TRAINERS, TrainingOptions, get_defaults
from progidiff.training_runs.runner import LOCK, PROGRESS, REQUEST, WORK, Outcome, read_json, write_json

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 20.0
_OOM_SCORE = 700
_PR_SET_PDEATHSIG = 1
_WRITE_EVERY_SECONDS = 0.5
_FORGET_SECONDS = 14 * 24 * 3600.0


class Control:
    """What the server says meanwhile; a thread listens.

    Args:
        lines: The server's end of a pipe.
        on_end: Called when the pipe ends.
    """

    def __init__(self, lines: Any, on_end: Any = lambda: os._exit(1)) -> None:
        self._lines, self._on_end = lines, on_end
        self._stop = threading.Event()
        self._clear = threading.Event()
        self._clear.set()
        self.paused_seconds = 0.0

    def listen(self) -> None:
        """Start to listen."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def stop(self) -> None:
        """Ask the training to stop after a clean checkpoint."""
        self._stop.set()
        self._clear.set()

    def breathe(self) -> bool:
        """Wait while the device is wanted elsewhere, a limited time. Returns whether to stop."""
        if not self._clear.is_set():
            started = time.monotonic()
            self._clear.wait(MAX_PAUSE_SECONDS)
            self.paused_seconds += time.monotonic() - started
        return self._stop.is_set()

    def _listen(self) -> None:
        for line in self._lines:
            word = line.strip()
            if word == "pause":
                self._clear.clear()
            elif word == "resume":
                self._clear.set()
            elif word == "stop":
                self.stop()
        self._on_end()


class Progress:
    """How far the training is, in ``progress.json``."""

    def __init__(self, path: Path, control: Control) -> None:
        self._path, self._control = path, control
        self._values: dict[str, Any] = {
            "stage": "start",
            "step": 0,
            "total": 0,
            "eta_seconds": None,
            "best_metric": 0.0,
            "message": "Loading the model.",
        }
        self._written = 0.0
        self._first: tuple[str, int, float] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What was told so far."""
        return dict(self._values)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Take an entry of `run_adapt` into account."""
        stage = str(entry["stage"])
        new_stage = stage != self._values["stage"]
        self._values["stage"] = stage
        if "training_cases" in entry:
            self._values["data"] = {k: v for k, v in entry.items() if k != "stage"}
        if "step" in entry:
            self._values.update(step=int(entry["step"]), total=int(entry["total"]))
        if "evidence" in entry and stage == "validation":
            self._values["best_metric"] = max(self._values["best_metric"], round(float(entry["evidence"]), 4))
        if "adapted" in entry:
            self._values["best_metric"] = round(float(entry["adapted"]), 4)
        self._values["eta_seconds"] = (
            self._estimate(stage) if stage in ("evidence", "proposals", "features", "head") else None
        )
        self._values["message"] = self._describe(stage)
        if new_stage or time.monotonic() - self._written > _WRITE_EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        """Replace the file; a full disk is no reason to end the training."""
        self._written = time.monotonic()
        with contextlib.suppress(OSError):
            write_json(
                self._path,
                {**self._values, "paused_seconds": round(self._control.paused_seconds, 1), "time": time.time()},
            )

    def _estimate(self, stage: str) -> float | None:
        """Seconds left of this stage, from the steps since this process began with it."""
        step, now = self._values["step"], time.monotonic()
        if self._first is None or self._first[0] != stage:
            self._first = (stage, step, now)
        done = step - self._first[1]
        return None if done < 3 else round((now - self._first[2]) / done * (self._values["total"] - step), 1)

    def _describe(self, stage: str) -> str:
        step = f"step {self._values['step']} of {self._values['total']}"
        best = (
            f", Dice {self._values['best_metric']:.3f} on the held-back slices at best"
            if self._values["best_metric"]
            else ""
        )
        return {
            "prepare": "Reading the labelled images.",
            "evidence": f"Image encoder and query head, {step}{best}.",
            "validation": f"Validated at {step}{best}.",
            "proposals": f"Proposals, {step}.",
            "features": f"Features of the labelled images, {step}.",
            "head": f"Head, {step}.",
            "gate": "Comparing the new version with the served one on the held-back slices.",
            "version": "Writing the new version.",
        }.get(stage, "")


def main(folder: Path, server: int, nice: int) -> int:
    """Train as ``request.json`` in the folder says; the outcome goes to standard output. Returns the exit code."""
    die_with_parent(server)
    # Whatever libraries print goes into the log; the pipe is for the outcome.
    outcome_pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    control = Control(sys.stdin)
    control.listen()
    signal.signal(signal.SIGTERM, lambda *_: control.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_modest(nice)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    follow_parent(lambda: _list_images(folder), strip_suffix)
    progress = Progress(folder / PROGRESS, control)
    progress.write()
    outcome = run(folder, control, progress)
    progress.write()
    with contextlib.suppress(OSError):
        outcome_pipe.write(json.dumps(outcome.to_dict()) + "\n")
        outcome_pipe.flush()
    return 0 if outcome.state in ("done", "stopped") else 1


@functools.cache
def _list_images(folder: Path) -> frozenset[str]:
    """Names of what is trained on."""
    request = read_json(folder / REQUEST) or {}
    return frozenset(str(case["name"]) for case in request.get("cases", ()))


def run(folder: Path, control: Control, progress: Progress) -> Outcome:
    """Train, and say in any case how it ended."""
    request = read_json(folder / REQUEST) or {}
    batch_size = int(request.get("options", {}).get("batch_size", 0))
    try:
        return _train(folder, request, control, progress)
    except CancelledError as err:
        logger.info("%s", err)
        where = f"at {progress.values['stage']}, step {progress.values['step']} of {progress.values['total']}"
        return Outcome(
            "stopped",
            f"Stopped on request {where}; start it again with the same options to continue there.",
            best_metric=_best(progress),
        )
    except BaseException as err:
        logger.exception("The training failed")
        return Outcome("failed", reason=explain(err, batch_size), best_metric=_best(progress))


def _train(folder: Path, request: Mapping[str, Any], control: Control, progress: Progress) -> Outcome:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parents[1] / LOCK)
    try:
        lock.acquire(timeout=5)
    except Timeout as err:
        raise BusyError("Another process trains on this store. Start again when it is done.", retry_after=60) from err
    if TRAINERS[request["options"]["trainer"]] == "head":
        with lock:
            return _train_head(folder, request, control, progress)
    with lock:
        from progidiff.model.lora import LoraSettings
        from progidiff.training.accepted_labels import from_json
        from progidiff.training.adapt import CACHE, run_adapt
        from progidiff.training.recipe_settings import AdaptConfig
        from progidiff.training.split import NEWEST

        options = TrainingOptions.from_dict(request["options"])
        targets = ("encoder", "query_head", *(("injection",) if options.proposal_steps else ()))
        config = AdaptConfig(
            kind="lora" if TRAINERS[options.trainer] == "lora" else "full",
            lora=LoraSettings(options.rank, 2.0 * options.rank, targets),
            steps=options.steps,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            validate_every=options.validate_every,
            patience=options.patience,
            augmentation=options.augmentation,
            proposal_steps=options.proposal_steps,
            seed=options.seed,
        )
        work = folder.parents[1] / WORK
        result = run_adapt(
            from_json(request["cases"]),
            Path(request["model_dir"]),
            options.name,
            work,
            config,
            adapters=Path(request["adapters"]),
            cases=options.cases,
            held_out=options.held_out,
            shots=options.shots,
            slices=options.slices,
            structures=options.structures,
            modality=options.modality or NEWEST,
            backbone_source=request["backbone"],
            device=request["device"],
            publish=options.publish,
            declared=request.get("declared", ()),
            command=f"{options.trainer} {json.dumps(request['params'])}",
            is_cancelled=control.breathe,
            report=progress.note,
        )
        tidy_up(work, work / CACHE, result.folder, since=(folder / REQUEST).stat().st_mtime)
    return Outcome(
        "done",
        result.message,
        published=result.published,
        version=result.card.full_name,
        best_metric=round(result.figures["adapted"]["consensus"], 4),
        figures={
            kind: {k: round(v, 4) for k, v in values.items() if k in ("evidence", "consensus")}
            for kind, values in result.figures.items()
        },
    )


def _train_head(folder: Path, request: Mapping[str, Any], control: Control, progress: Progress) -> Outcome:
    """The trainer `textdiff`."""
    from progidiff.textdiff.accepted import FEATURES, AcceptedConfig, run_accepted
    from progidiff.training.accepted_labels import from_json
    from progidiff.training.adapt import CACHE

    options = TrainingOptions.from_dict(request["options"])
    offered = get_defaults(options.trainer)  # what "auto" means here
    work = folder.parents[1] / WORK
    result = run_accepted(
        from_json(request["cases"]),
        request["sentences"],
        Path(request["textdiff"]),
        work,
        AcceptedConfig(
            options.steps or offered["steps"],
            options.learning_rate or offered["learning_rate"],
            options.batch_size,
            options.crop,
            options.views,
            options.seed,
            options.mirror,
        ),
        name=options.name,
        structures=options.structures,
        wanted=options.cases,
        held_out=options.held_out,
        shots=options.shots,
        phrases=Path(request["phrases"]) if request.get("phrases") else None,
        publish=options.publish,
        device=request["device"],
        command=f"{options.trainer} {json.dumps(request['params'])}",
        is_cancelled=control.breathe,
        report=progress.note,
    )
    forget_old_runs(work, result.folder, keep=(FEATURES, CACHE))
    return Outcome(
        "done",
        result.message,
        published=result.published,
        version=result.card.full_name,
        best_metric=round(result.figures["adapted"]["dice"], 4),
        figures={kind: {k: round(v, 4) for k, v in values.items()} for kind, values in result.figures.items()},
    )


def forget_old_runs(work: Path, done: Path, keep: Sequence[str]) -> None:
    """Remove the checkpoints of a version that is written, and runs that nobody continued for weeks."""
    old = [
        path
        for path in work.iterdir()
        if path.name not in keep and time.time() - path.stat().st_mtime > _FORGET_SECONDS
    ]
    for entry in (done, *old):
        shutil.rmtree(entry, ignore_errors=True)


def tidy_up(work: Path, cache: Path, done: Path, since: float) -> None:
    """Remove what no later run will ask for: checkpoints of a version that is written, runs that nobody continued for
    weeks, and slices that were not read since the run began (their labels were replaced, or their images are gone)."""
    forget_old_runs(work, done, keep=(cache.name,))
    for entry in cache.glob("*"):
        with contextlib.suppress(OSError):
            if (entry / "meta.json").stat().st_mtime < since:
                shutil.rmtree(entry, ignore_errors=True)


def explain(err: BaseException, batch_size: int) -> str:
    """Why a training failed and what to do about it, in a sentence or two."""
    again = "Nothing was published; what was trained is kept, and starting again continues there."
    text = str(err)
    if isinstance(err, ProGiDiffError):
        return text
    if isinstance(err, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        first = text.splitlines()[0] if text else type(err).__name__
        return f"The training ran out of memory ({first}). Lower batch_size (it was {batch_size}). {again}"
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({text}). Free some space. {again}"
    if isinstance(err, OSError):
        return f"A file could not be read or written ({text}). {again}"
    return (
        f"The training broke unexpectedly ({type(err).__name__}: {text[:300]}). Its log "
        f"has the details; please report them. {again}"
    )


def die_with_parent(server: int) -> None:
    """Have the kernel end this process when the server's thread that started it ends; where it cannot, `Control`
    notices.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:  # It ended before the kernel was told.
        os._exit(1)


def _be_modest(nice: int) -> None:
    """Leave the processor to requests, and be the one that the kernel ends when memory runs out."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="utf-8")


def _best(progress: Progress) -> float:
    return float(progress.values["best_metric"])


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    logging.shutdown()
    # Not sys.exit: the thread that listens holds the lock of standard input, on which an orderly end would wait.
    os._exit(code)
