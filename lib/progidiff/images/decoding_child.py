"""The process that decodes what nobody vouches for; `decoding` is its parent and says what for.

`main` runs in a fresh program, with one thread, no environment and no secret: it imports the decoders once, and forks
for each job. What is forked gives up everything but the files of its job (`sandbox`), runs one function, and sends back
JSON and arrays (`decoding_wire`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from progidiff.errors import ProGiDiffError
from progidiff.images import sandbox
from progidiff.images.decoding_wire import Packer
from progidiff.images.raw import limit_decoded
from progidiff.images.sandbox import Confinement, Limits

WARM = ("nibabel", "SimpleITK", "pydicom", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.TiffImagePlugin")
"""Imported before anything is decoded: afterwards no file of these can be opened any more."""

MAX_REPLY = 4 << 20
"""Bytes of JSON that a job may send back."""

MAX_DESCRIPTORS = 16
_BACKLOG = 4096
_WARM_FOLDER, _WARMING = "warm", "progidiff.images.warming"


@dataclass(frozen=True)
class Job:
    """What the parent asks for. It comes as pickle, from the parent only.

    Attributes:
        function: To be called, named by its module: modules are imported before anything is decoded.
        arguments: Of it.
        limits: Of the process.
        readable: How many of the descriptors that came along may be opened for reading.
        writable: How many, after those, may be written in.
    """

    function: Any
    arguments: tuple[Any, ...]
    limits: Limits
    readable: int
    writable: int


def main() -> None:
    """Serve jobs until the parent is gone. Arguments: the descriptor of its socket, and "fork" or "once"."""
    control = socket.socket(fileno=int(sys.argv[1]))
    forks = sys.argv[2] == "fork"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    leaves_network = sandbox.leave_network()
    _import_decoders()
    if forks:
        _Server(control, leaves_network).serve()
    else:
        message, handles = _receive(control)
        if message:
            folder = Path.cwd() / "job"
            folder.mkdir()
            _settle(folder)
            _run(handles, folder, leaves_network)


class _Server:
    """One thread, which forks and waits.

    A process for the next job is forked ahead: forking takes longer than most jobs.
    """

    def __init__(self, control: socket.socket, leaves_network: bool) -> None:
        self._control = control
        self._leaves_network = leaves_network
        self._running: dict[int, tuple[socket.socket, Path]] = {}
        self._next: tuple[int, socket.socket, Path] | None = None
        self._count = 0
        self._woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        os.set_blocking(self._woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the parent is gone."""
        self._fork()
        self._control.sendall(b"ready")
        while True:
            stations = {status.fileno(): process for process, (status, _) in self._running.items()}
            poll = select.poll()
            for handle in (self._control.fileno(), self._woken, *stations):
                poll.register(handle, select.POLLIN)
            for handle, _ in poll.poll():
                if handle in stations:  # The parent has what it wants, is not interested any more, or is gone.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(stations[handle], signal.SIGKILL)
                elif handle == self._woken:
                    os.read(self._woken, 512)
                elif not self._start():
                    self._end()
                    return
            self._collect()
            if self._next is None and not self._running:  # Not while somebody waits.
                self._fork()

    def _fork(self) -> None:
        """Have a process wait for the next job."""
        self._count += 1
        folder = Path.cwd() / f"job-{self._count}"
        folder.mkdir()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = os.fork()
        if process == 0:
            for other in (self._control, ours, *(status for status, _ in self._running.values())):
                other.close()
            signal.set_wakeup_fd(-1)
            _settle(folder)
            message, handles = _receive(theirs)
            if not message:
                os._exit(0)
            _run(handles, folder, self._leaves_network)
        theirs.close()
        self._next = process, ours, folder

    def _start(self) -> bool:
        """Start a job; False if the parent is gone."""
        message, handles = _receive(self._control)
        if not message:
            return False
        module = json.loads(message)["module"]
        if module not in sys.modules:
            with contextlib.suppress(ImportError):  # The child says so.
                importlib.import_module(module)
            self._drop_next()
        if self._next is None:
            self._fork()
        assert self._next is not None
        (process, station, folder), self._next = self._next, None
        status = socket.socket(fileno=handles.pop(0))
        with station, contextlib.suppress(OSError):
            socket.send_fds(station, [message], handles)
        for handle in handles:
            os.close(handle)
        self._running[process] = (status, folder)
        return True

    def _drop_next(self) -> None:
        if self._next is not None:
            process, station, folder = self._next
            station.close()  # It ends then.
            os.waitpid(process, 0)
            shutil.rmtree(folder, ignore_errors=True)
            self._next = None

    def _end(self) -> None:
        self._drop_next()
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _collect(self) -> None:
        """Say of jobs that have ended how."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if self._next is not None and process == self._next[0]:  # Somebody has ended it while it waited.
                self._next[1].close()
                self._next = None
                continue
            station, folder = self._running.pop(process)
            with contextlib.suppress(OSError):
                station.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
            station.close()
            shutil.rmtree(folder, ignore_errors=True)


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """A message with its descriptors; empty if the parent is gone."""
    try:
        message, handles, _, _ = socket.recv_fds(control, _BACKLOG, MAX_DESCRIPTORS)
    except OSError:
        return b"", []
    return message, handles


def _import_decoders() -> None:
    """All that decoders import when they are first used, and what they start: they are used here once."""
    for name in WARM:
        importlib.import_module(name)
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    folder = Path.cwd() / _WARM_FOLDER
    folder.mkdir()
    importlib.import_module(_WARMING).warm_up(folder)
    gc.collect()
    gc.disable()
    gc.freeze()


def _settle(folder: Path) -> None:
    """All that a job needs and that can be done before it is known."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # If memory ends, this process goes, and not the server.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.chdir(folder)
    os.environ.update(TMPDIR=str(folder), HOME=str(folder))
    tempfile.tempdir = str(folder)
    warnings.simplefilter("ignore")  # Nobody sees them, and their lines would be looked up in files.
    sandbox.prepare()
    # Memory that was shared at the fork is copied when it is first used: better now than when somebody waits.
    sample = Job(_settle, (), Limits(0, 0, 0), 0, 0)
    pickle.loads(pickle.dumps(sample))  # written by this process
    importlib.import_module(_WARMING).touch(folder.parent / _WARM_FOLDER)
    json.dumps(Packer(len).pack({"a": np.zeros((2, 2, 2), np.int16, "F"), "b": asdict(Confinement())}))


def _run(handles: list[int], folder: Path, leaves_network: bool) -> NoReturn:
    """The job, in a process of its own, which ends with it."""
    request, content, reply, *given = handles
    code = 1
    try:
        with open(request, "rb") as file:
            job: Job = pickle.load(file)  # written by the server's own process, never from outside
        own = os.open(folder, os.O_RDONLY)
        writable = [own, *given[job.readable : job.readable + job.writable]]
        held = sandbox.confine(given[: job.readable], writable, job.limits, leaves_network)
        answer = _answer(job, content, held)
        _write(reply, json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)


def _answer(job: Job, content: int, held: Confinement) -> dict[str, Any]:
    try:
        limit_decoded(job.limits.output)
        value = Packer(lambda data: _write(content, data)).pack(job.function(*job.arguments))
        answer: dict[str, Any] = {"value": value}
    except ProGiDiffError as err:
        answer = {"refused": type(err).__name__, "message": str(err)[:4000]}
    except MemoryError:
        answer = {"failed": "memory", "message": ""}
    except Exception as err:
        where = traceback.extract_tb(err.__traceback__)[-1]
        answer = {
            "failed": type(err).__name__,
            "message": " ".join(str(err).split())[-300:],
            "where": f"{Path(where.filename).name}:{where.lineno}",
        }
    return {**answer, "confinement": asdict(held), "peak_kb": _find_peak()}


def _find_peak() -> int:
    """Largest memory of this process so far, in KiB."""
    try:
        import resource
    except ImportError:  # Windows has none.
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _write(handle: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest[: 1 << 30]) :]


if __name__ == "__main__":
    main()
