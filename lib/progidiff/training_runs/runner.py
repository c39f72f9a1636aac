"""Trainings of a server, one at a time, each in a process of its own; knows neither HTTP nor the host.

::

    <root>/
      lock                 held by the process that trains
      work/                checkpoints and cached slices; a run that was stopped or killed continues from them
      runs/<id>/           request.json, progress.json (by the process), outcome.json (by the server), log.txt

A run is started, watched and ended by one thread of its own (the kernel ends the process when that thread does). Its
outcome reaches the server over a pipe and is then written down; a run without an outcome that nobody works on was
interrupted by the end of its server. The other direction of the pipe tells the process to pause while requests want the
device, and to stop.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from progidiff.errors import BusyError, ProGiDiffError, StoreError
from progidiff.logs import make_environment
from progidiff.storage.atomic import replace_text
from progidiff.training_runs.options import TrainingOptions
from progidiff.training_runs.status import RunStatus

logger = logging.getLogger(__name__)

LOCK = "lock"
WORK = "work"
REQUEST = "request.json"
PROGRESS = "progress.json"
OUTCOME = "outcome.json"
LOG = "log.txt"

ACTIVE = ("starting", "running", "stopping")
"""States of a run that is under way; the others are done, failed, stopped and interrupted."""

STOP_SECONDS = 30.0
"""Time for a clean checkpoint before the process is ended."""

_KILL_SECONDS = 5.0
_STAMP = "%Y%m%dT%H%M%S"
_STAMP_LENGTH = 15
_RUN_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
_AGAIN = "What was trained until the last checkpoint is kept; start it again with the same options to continue there."


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: "done", "failed" or "stopped".
        message: What came out, in a sentence.
        reason: Why it failed and what to do about it, else "".
        published: Whether a new version is served.
        version: The version that was written, ``name@version``, else "".
        best_metric: Dice on the held-back slices.
        figures: Dice of "base", "current" and "adapted": "evidence" and "consensus", means over the structures.
    """

    state: str
    message: str = ""
    reason: str = ""
    published: bool = False
    version: str = ""
    best_metric: float = 0.0
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        return cls(**{k: values[k] for k in cls.__dataclass_fields__ if k in values})


@dataclass
class _Active:
    """The run under way."""

    folder: Path
    request: dict[str, Any]
    started: float
    process: subprocess.Popen[str] | None = None
    stop_asked: float | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class TrainingRunner:
    """Starts trainings, knows how far they are, and keeps what became of them.

    Args:
        root: Folder of all this; made at the first start.
        collect: Gathers the labels when a run starts, in the run's thread: "cases" (see `training.labels.to_json`),
            "model_dir", "adapters", "backbone", "device".
        check: Asked before a start; raises if there is nothing to train on.
        on_published: Called with ``name@version`` when another version is served, with "" for the model itself.
        on_ended: Called with the status of a run that ended, after that; not at the end of the server. One that raises
            is logged.
        stop_seconds: See `STOP_SECONDS`.
        nice: How far the process steps back on the processor, 0 to 19.
        module: What the process runs.
    """

    def __init__(
        self,
        root: Path,
        collect: Callable[[TrainingOptions], Mapping[str, Any]],
        check: Callable[[], None] = lambda: None,
        on_published: Sequence[Callable[[str], None]] = (),
        stop_seconds: float = STOP_SECONDS,
        nice: int = 0,
        module: str = "progidiff.training_runs.child",
        on_ended: Sequence[Callable[[RunStatus], None]] = (),
    ) -> None:
        self.root = Path(root)
        self._collect = collect
        self._check = check
        self._on_published = on_published
        self._on_ended = on_ended
        self._stop_seconds = stop_seconds
        self._arguments = [sys.executable, "-m", module]
        self._nice = nice
        self._lock = threading.Lock()
        self._pipe_lock = threading.Lock()
        self._active: _Active | None = None
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._demanded = False
        self._closed = False

    def start(self, trainer: str, params: Mapping[str, Any] | None = None, user: str = "") -> RunStatus:
        """Begin a training.

        Args:
            trainer: One of `training_options.TRAINERS`.
            params: See `TrainingOptions`; what is missing has its default.
            user: Who asked for it.

        Returns:
            The new run's status.

        Raises:
            RequestError: if a parameter is wrong, or nothing is labelled.
            BusyError: if a training is under way, of this server or of another on the same store.
            StoreError: if the disk refuses.
        """
        params = dict(params or {})
        options, ignored = TrainingOptions.from_params(trainer, params)
        self._check()
        with self._lock:
            self._check_free()
            run_id = self._make_run_id()
            shown = {k: params[k] for k in params if k not in ("model", "client_id")}
            request = {
                "id": run_id,
                "trainer": trainer,
                "params": shown,
                "ignored": list(ignored),
                "user": user,
                "started": time.time(),
            }
            request["options"] = options.to_dict()
            folder = self.root / "runs" / run_id
            try:
                folder.mkdir(parents=True)
                write_json(folder / REQUEST, request)
            except OSError as err:
                raise StoreError(
                    f"The training cannot be written down in '{folder}' ({err}). Free "
                    "some disk space; nothing was started."
                ) from err
            active = self._active = _Active(folder, request, time.time())
        # The kernel ends the process when the thread that started it does: it must not be one of the web server's.
        # The copy of the context says for which request its lines are.
        work = contextvars.copy_context().run, (self._supervise, active, options)
        threading.Thread(target=work[0], args=work[1], name=f"training-{run_id}", daemon=True).start()
        return self.status()

    def status(self) -> RunStatus:
        """The run under way, or else the last one."""
        runs = self._run_ids()
        return self._describe(runs[-1]) if runs else RunStatus(state="idle", message="No training was started yet.")

    def history(self, limit: int = 50) -> list[RunStatus]:
        """The last runs, newest first, as `status` describes them."""
        return [self._describe(run_id) for run_id in reversed(self._run_ids()[-limit:])]

    def is_running(self) -> bool:
        """Whether a run of this server is under way."""
        return self._active is not None

    def stop(self, wait: float = 0.0) -> RunStatus | None:
        """Ask the run under way for a clean checkpoint and its end; if it has not ended after `stop_seconds`, it is
        ended.

        Args:
            wait: Seconds to wait for that.

        Returns:
            Its status; None if none is under way.
        """
        active = self._active
        if active is None:
            return None
        if active.stop_asked is None:
            active.stop_asked = time.monotonic()
        self._say(active, "stop")
        active.ended.wait(wait)
        return self._describe(active.folder.name)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end of the run under way. Returns whether none is."""
        active = self._active
        return active is None or active.ended.wait(seconds)

    def set_demand(self, demanded: bool) -> None:
        """Tell the run whether requests want the device; for `DeviceQueue.on_demand`."""
        self._demanded = demanded
        active = self._active
        if active is not None:
            self._say(active, "pause" if demanded else "resume")

    def close(self) -> None:
        """For the end of the server: end the run, with a checkpoint if it makes one in time, and start no more."""
        self._closed = True
        self.stop()

    def _check_free(self) -> None:
        if self._closed:
            raise BusyError("The server is stopping and starts no training; ask again when it is back.", retry_after=30)
        if self._active is not None:
            told = self._describe(self._active.folder.name)
            left = told.eta_seconds
            about = f" and takes about {left / 60:.0f} more minutes" if left else ""
            raise BusyError(
                f"Trainer '{told.trainer}' is under way: {told.message} One training at a time uses the "
                f"device{about}. Wait for it, or stop it with DELETE /train/.",
                retry_after=max(5, min(600, round(left or 30))),
            )
        if self._is_locked():
            raise BusyError(
                "Another server trains on this store. Wait for it, or start this one with another --conf store.",
                retry_after=60,
            )

    def _supervise(self, active: _Active, options: TrainingOptions) -> None:
        """The run's thread: gather, start, watch, write down."""
        try:
            outcome = self._carry_out(active, options)
        except ProGiDiffError as err:
            outcome = Outcome("failed", reason=str(err))
        except OSError as err:
            told = (
                f"The training could not be started: '{active.folder}' cannot be written "
                f"or the process not be made ({err})."
            )
            outcome = Outcome("failed", reason=f"{told} Free some disk space or memory; nothing was changed.")
        except Exception as err:
            logger.exception("The training could not be started")
            outcome = Outcome(
                "failed",
                reason=(
                    f"The training could not be started ({type(err).__name__}: {err}). "
                    "The server's log has the details."
                ),
            )
        values = {**outcome.to_dict(), "ended": time.time()}
        self._outcomes[active.folder.name] = values
        # Stopped because the server ends: nobody asked for that, so it stays a run to be continued.
        if not (self._closed and outcome.state == "stopped"):
            try:
                write_json(active.folder / OUTCOME, values)
            except OSError as err:
                logger.warning("The outcome of training %s is not written down: %s", active.folder.name, err)
        logger.info("Training %s: %s. %s%s", active.folder.name, outcome.state, outcome.message, outcome.reason)
        with self._lock:
            self._active = None
        active.ended.set()
        if outcome.published:
            self.announce(outcome.version)
        for listener in () if self._closed else self._on_ended:
            try:
                listener(self._describe(active.folder.name))
            except Exception:
                logger.exception("A listener failed on the end of training %s", active.folder.name)

    def announce(self, version: str) -> None:
        """Tell `on_published` that another version is served; "" for the model itself."""
        for listener in self._on_published:
            try:
                listener(version)
            except Exception:
                logger.exception("A listener failed on the new version %s", version)

    def _carry_out(self, active: _Active, options: TrainingOptions) -> Outcome:
        collected = dict(self._collect(options))
        write_json(active.folder / REQUEST, {**active.request, **collected})
        oom_kills = _count_oom_kills()
        with (active.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self._arguments, str(active.folder), str(os.getpid()), str(self._nice)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=_make_environment(),
                start_new_session=True,  # Ctrl-C is for the server, which then asks for a clean stop.
            )
        active.process = process
        if self._demanded:
            self._say(active, "pause")
        if active.stop_asked is not None:
            self._say(active, "stop")
        self._watch(active, process)
        told = _read_outcome(process.stdout)
        if told is not None:
            return told
        return self._explain_end(active, process.returncode, _count_oom_kills() > oom_kills)

    def _watch(self, active: _Active, process: subprocess.Popen[str]) -> None:
        """Wait for the end of the process; a stop that takes too long becomes harder."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                return
            waited = 0.0 if active.stop_asked is None else time.monotonic() - active.stop_asked
            if waited > self._stop_seconds:
                logger.warning(
                    "Training %s did not stop within %g s and is ended", active.folder.name, self._stop_seconds
                )
                process.kill()

    def _explain_end(self, active: _Active, code: int, out_of_memory: bool) -> Outcome:
        progress = read_json(active.folder / PROGRESS) or {}
        best = float(progress.get("best_metric", 0.0))
        place = f"at {progress.get('stage', 'start')}, step {progress.get('step', 0)} of {progress.get('total', 0)}"
        if active.stop_asked is not None:
            return Outcome(
                "stopped",
                f"Ended {place}: it did not stop by itself within {self._stop_seconds:g} s. {_AGAIN}",
                best_metric=best,
            )
        if code == -signal.SIGKILL and out_of_memory:
            batch_size = active.request["options"]["batch_size"]
            reason = (
                f"The training ran out of memory and the operating system ended it {place}. Lower batch_size (it was "
                f"{batch_size}). {_AGAIN}"
            )
        elif code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            reason = f"The training was killed (signal {-code}, {name}) {place}. {_AGAIN}"
        else:
            reason = (
                f"The training ended with code {code} {place} and did not say why; "
                f"'{active.folder / LOG}' may tell. {_AGAIN}"
            )
        return Outcome("failed", reason=reason, best_metric=best)

    def _say(self, active: _Active, word: str) -> None:
        process = active.process
        if process is None or process.stdin is None:
            return  # It is told when it has started.
        with self._pipe_lock, contextlib.suppress(OSError, ValueError):
            process.stdin.write(word + "\n")
            process.stdin.flush()

    def _describe(self, run_id: str) -> RunStatus:
        folder = self.root / "runs" / run_id
        request = read_json(folder / REQUEST) or {}
        progress = read_json(folder / PROGRESS) or {}
        active = self._active if self._active is not None and self._active.folder == folder else None
        outcome = self._outcomes.get(run_id) or read_json(folder / OUTCOME)
        told = {
            "id": run_id,
            "trainer": request.get("trainer", ""),
            "params": request.get("params", {}),
            "ignored": request.get("ignored", []),
            "user": request.get("user", ""),
            "state": "running",
            "stage": progress.get("stage", "start"),
            "step": progress.get("step", 0),
            "total": progress.get("total", 0),
            "eta_seconds": None,
            "best_metric": float(progress.get("best_metric", 0.0)),
            "message": progress.get("message", "Gathering the labels."),
            "reason": "",
            "published": False,
            "version": "",
            "figures": {},
            "data": progress.get("data", {}),
            "sequence": request.get("sequence", 0),
            "paused": False,
            "started": request.get("started", 0.0),
            "ended": None,
            "log": str(folder / LOG),
        }
        if outcome is not None:
            told.update(outcome)
            told["message"] = outcome.get("message") or outcome.get("reason", "")
        elif active is not None:
            state = "stopping" if active.stop_asked is not None else "running" if progress else "starting"
            told.update(state=state, eta_seconds=progress.get("eta_seconds"), paused=self._demanded)
        elif run_id == (self._run_ids() or [""])[-1] and self._is_locked():
            told["eta_seconds"] = progress.get("eta_seconds")  # Another server's.
        else:
            place = f"at {told['stage']}, step {told['step']} of {told['total']}"
            reason = f"The server ended while the training was {place}. {_AGAIN}"
            told.update(
                state="interrupted", reason=reason, message=reason, ended=progress.get("time") or told["started"]
            )
        return RunStatus.model_validate(told)

    def _run_ids(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root / "runs") if _RUN_ID.fullmatch(name))
        except OSError:
            return []

    def _make_run_id(self) -> str:
        """A name that sorts behind those of all runs before, whatever the clock says: the last one is the one that is
        asked about.
        """
        now = datetime.now(UTC)
        for last in self._run_ids()[-1:]:
            now = max(now, datetime.strptime(last[:_STAMP_LENGTH], _STAMP).replace(tzinfo=UTC) + timedelta(seconds=1))
        return f"{now:{_STAMP}}-{uuid.uuid4().hex[:6]}"

    def _is_locked(self) -> bool:
        """Whether some process trains on this store."""
        from filelock import FileLock, Timeout

        path = self.root / LOCK
        if not path.is_file():
            return False
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            return True
        lock.release()
        return False


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file by rename."""
    replace_text(path, json.dumps(values, indent=1) + "\n")


def _read_outcome(pipe: IO[str] | None) -> Outcome | None:
    """The process's last word."""
    if pipe is None:
        return None
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        return Outcome.from_dict(json.loads(pipe.read()))
    return None


def _make_environment() -> dict[str, str]:
    """All processor cores but one for the training, unless the operator set the number; and this very package."""
    package = str(Path(__file__).resolve().parents[2])
    threads = str(max(1, (os.cpu_count() or 2) - 1))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **os.environ,
        **make_environment(),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
    }


def _count_oom_kills() -> int:
    """Processes that the kernel has ended for memory, on this machine and in this container; 0 where it does not
    say.
    """
    total = 0
    for path, word in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                name, _, number = line.partition(" ")
                total += int(number) if name == word else 0
    return total
