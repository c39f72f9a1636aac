"""Reading untrusted files in a process that can do nothing else: `apart` calls a function there.

A decoder is ten thousand lines of C, or a library that unpacks whatever it is told to. What somebody uploads, what
comes from a DICOMweb server, and what lies in the studies folder is read by a child of this process, one per file:

* it opens the files of its job and nothing else, has no network, starts nothing (`sandbox`),
* it has a budget of memory, of unpacked bytes and of time, in proportion to the size of what it reads,
* it ends with its job; what it sends back is JSON and arrays, which are checked (`decoding_wire`).

What goes wrong in there, a crash included, is an `ImageError` here. Children are forked by a helper that has the
decoders loaded (`decoding_child`), which is started at the first use and again whenever it is gone. A server switches
this on (`read_apart`), and the processes that it starts do the same; elsewhere, as on the command line, `apart` is a
plain call: the files of whoever types the command are read as this user.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from progidiff import errors
from progidiff.errors import BusyError, ImageError, ProGiDiffError
from progidiff.images.decoding_child import MAX_REPLY, Job
from progidiff.images.decoding_wire import Unpacker, WireError
from progidiff.images.sandbox import Confinement, Limits
from progidiff.storage.atomic import open_regular, scratch_folder

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_RATIO = 100
"""Unpacked bytes per byte of a file, above `MIN_DECODED`. CT and MR pack to a half or a quarter; a bomb to a
thousandth."""

MIN_DECODED = 256 << 20
"""Unpacked bytes that any file may have, however small."""

MAX_DECODED = 8 << 30
"""Unpacked bytes of the largest volume that is read: 2^30 voxels of eight bytes."""

_MEMORY_PER_BYTE, _OWN_MEMORY = 4, 512 << 20
"""Scaling and checking hold several copies; the rest is for the decoders themselves."""

_SECONDS, _SECONDS_PER_GB = 60.0, 120.0
_WAIT_SECONDS = 120.0
_START_SECONDS, _END_SECONDS = 60.0, 10.0
_MAX_TOGETHER = max(2, min(4, os.cpu_count() or 2))

_CHILD = "progidiff.images.decoding_child"
_APART = "PROGIDIFF_READ_APART"
"""Environment variable: trainings and batches, which are processes of their own, read as the server does."""

_REFUSALS = ("ImageError", "GeometryError", "RequestError", "TooLargeError", "NotFoundError", "StoreError")
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


@dataclass(frozen=True)
class Budget:
    """What reading may cost.

    Attributes:
        decoded: Unpacked bytes.
        seconds: On the clock.
        memory: Bytes of addresses; None for what unpacking so much takes.
    """

    decoded: int
    seconds: float
    memory: int | None = None

    @classmethod
    def of_size(cls, size: int, decoded: int = 0) -> Budget:
        """For a number of packed bytes; `decoded` if more unpacked ones are known to be right.

        Example:
            >>> Budget.of_size(10_000_000).decoded // MAX_RATIO, Budget.of_size(0).decoded == MIN_DECODED
            (10000000, True)
        """
        allowed = max(MIN_DECODED, MAX_RATIO * size, decoded)
        return cls(min(MAX_DECODED, allowed), _SECONDS + _SECONDS_PER_GB * size / 1e9)


@dataclass(frozen=True)
class Reading:
    """What is known about how files are read; for the log and for administrators.

    Attributes:
        apart: Whether in a process of its own.
        confinement: What that process could not do when it was last asked.
    """

    apart: bool
    confinement: Confinement

    def describe(self) -> str:
        """A sentence."""
        if not self.apart:
            return "Files are read in this process, with all that it may do."
        parts = {
            "files": "opens nothing but its file (Landlock)",
            "calls": "starts nothing (seccomp)",
            "network": "has no network",
            "limits": "has limits of memory and time",
        }
        held = [text for name, text in parts.items() if getattr(self.confinement, name)]
        missing = [text for name, text in parts.items() if not getattr(self.confinement, name)]
        text = f"Files are read in a process of their own, which {', '.join(held) or 'is not confined'}."
        return text + (f" This system does not let it be ensured that it {', '.join(missing)}." if missing else "")


def read_apart(wanted: bool = True) -> None:
    """Say whether this process, and those that it starts, read files in a process of their own."""
    if wanted and sys.platform != "win32":
        os.environ[_APART] = "1"
    else:
        os.environ.pop(_APART, None)


def is_apart() -> bool:
    """Whether `apart` calls in another process here."""
    return os.environ.get(_APART) == "1"


def apart(
    function: Callable[P, T],
    *,
    reads: Sequence[Path] = (),
    writes: Sequence[Path] = (),
    decoded: int = 0,
    memory: int | None = None,
    name: str = "",
) -> Callable[P, T]:
    """A function that reads files, to be called in a process of its own where `read_apart` says so.

    Args:
        function: Of a module; what it returns is annotated, see `decoding_wire`.
        reads: Files and folders that it opens.
        writes: Folders in which it makes files.
        decoded: Unpacked bytes that are known to be right, for example since the image has as many voxels.
        memory: Bytes that it may use, if that does not depend on what is unpacked.
        name: What to call the file in messages; that of the first of `reads` if empty.

    Returns:
        It raises what `function` does, and also

        ImageError: if the file crashes the decoder, or needs more memory or time than files of its size do.
        BusyError: if too many files are being read.
    """

    def call(*arguments: P.args, **options: P.kwargs) -> T:
        if not is_apart():
            return function(*arguments, **options)
        if options:
            raise TypeError("Functions that are called apart take their arguments by place.")
        size = sum(map(_measure, reads)) + sum(len(a) for a in arguments if isinstance(a, bytes))
        budget = replace(Budget.of_size(size, decoded), memory=memory)
        called = name or (reads[0].name if reads else "The file")
        result: T = _get_decoder().run(function, arguments, reads, writes, budget, called)
        return result

    return call


def describe_reading() -> Reading:
    """How files are read, found out by reading nothing."""
    if not is_apart():
        return Reading(False, Confinement())
    decoder = _get_decoder()
    if decoder.confinement is None:
        decoder.run(_do_nothing, (), (), (), Budget.of_size(0), "nothing")
    return Reading(True, decoder.confinement or Confinement())


def report_in_background() -> None:
    """Write to the log how files are read; the helper is then warm for whoever comes first."""

    def report() -> None:
        try:
            logger.info("%s", describe_reading().describe())
        except ProGiDiffError as err:
            logger.error("Files cannot be read: %s", err)

    threading.Thread(target=report, name="describe-reading", daemon=True).start()


def _do_nothing() -> None:
    """For `describe_reading`."""


class Decoder:
    """The helper that forks, and the jobs that it has.

    Args:
        forks: Whether one helper forks for all jobs; else each job starts a fresh one, which takes a second.
        together: Jobs at a time.
    """

    def __init__(self, forks: bool, together: int = _MAX_TOGETHER) -> None:
        self.confinement: Confinement | None = None
        self.peak_kb = 0
        """Largest memory of a job so far."""
        self.process = os.getpid()
        self._forks = forks
        self._slots = threading.BoundedSemaphore(together)
        self._lock = threading.Lock()
        self._helper: _Helper | None = None

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        reads: Sequence[Path],
        writes: Sequence[Path],
        budget: Budget,
        name: str,
    ) -> Any:
        """One job; see `apart`."""
        memory = _OWN_MEMORY + _MEMORY_PER_BYTE * budget.decoded if budget.memory is None else budget.memory
        limits = Limits(memory, budget.decoded, budget.seconds)
        job = Job(function, arguments, limits, len(reads), len(writes))
        if not self._slots.acquire(timeout=_WAIT_SECONDS):
            raise BusyError("Too many files are being read. Try again in a while.", retry_after=10)
        try:
            for is_last in (False, True):
                with ExitStack() as stack:
                    given = [stack.enter_context(_opened(path)) for path in (*reads, *writes)]
                    outcome = self._ask(job, given)
                if outcome.exit is not None or is_last:
                    return self._judge(outcome, function, budget, name)
                logger.warning("The process that reads files is gone; it is started again.")
        finally:
            self._slots.release()

    def close(self) -> None:
        """End the helper, and with it all jobs."""
        with self._lock:
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.close()

    def _ask(self, job: Job, given: list[int]) -> _Outcome:
        with ExitStack() as stack:
            request = _make_file(stack)
            with open(os.dup(request), "wb") as file:
                pickle.dump(job, file)
            os.lseek(request, 0, os.SEEK_SET)
            content = _make_file(stack)
            replies, reply = socket.socketpair()
            statuses, status = socket.socketpair()
            for end in (replies, reply, statuses, status):
                stack.callback(end.close)
            message = json.dumps({"module": job.function.__module__}).encode()
            handles = [request, content, reply.fileno(), *given]
            helper = self._send(message, handles, status.fileno())
            if helper is None:
                return _Outcome(None, b"")
            reply.close()
            status.close()
            try:
                outcome = _wait(replies, statuses, helper, job.limits.seconds)
            finally:
                helper.stop(statuses)
            outcome.content = _map_content(content) if outcome.reply else b""
            return outcome

    def _send(self, message: bytes, handles: list[int], status: int) -> _Helper | None:
        """Hand a job to the helper; None if it is gone."""
        handles = [status, *handles] if self._forks else handles
        with self._lock:
            if self._helper is None or not self._forks:
                self._helper = _Helper(self._forks)
            helper = self._helper
            try:
                socket.send_fds(helper.control, [message], handles)
            except OSError:
                self._helper = None
                helper.close()
                return None
            return helper

    def _judge(self, outcome: _Outcome, function: Callable[..., Any], budget: Budget, name: str) -> Any:
        """The result of a job, or the error that it stands for."""
        if outcome.exit is None:
            raise BusyError(f"'{name}' could not be read, since the process for it ended. Try again.", retry_after=5)
        if outcome.is_late or outcome.exit == -signal.SIGXCPU:
            raise ImageError(
                f"'{name}' takes more than {budget.seconds:.0f} s to be read, which files of its size never do. It may "
                "be damaged; export it again."
            )
        if outcome.exit == -signal.SIGKILL:
            raise BusyError(
                f"Reading '{name}' was stopped by the system, which probably has no memory left. Try again later, or "
                "with a smaller image.",
                retry_after=30,
            )
        if outcome.exit == -signal.SIGXFSZ:
            _refuse_size(name, budget)
        if outcome.exit != 0:
            logger.warning("Reading '%s' ended the process for it with %d.", name[:100], outcome.exit)
            raise ImageError(f"'{name}' cannot be read: its decoder crashes. It is damaged; export it again.")
        try:
            answer = json.loads(outcome.reply)
            self.peak_kb = max(self.peak_kb, int(answer["peak_kb"]))
            self.confinement = Unpacker(b"").unpack(answer["confinement"], Confinement)
            if "value" in answer:
                return Unpacker(outcome.content, budget.decoded).unpack(
                    answer["value"], typing.get_type_hints(function)["return"]
                )
            _raise(answer, name, budget)
        except (WireError, ValueError, KeyError, TypeError, RecursionError) as err:
            logger.warning("What was read from '%s' is not what it should be: %s", name[:100], err)
            raise ImageError(f"'{name}' cannot be read. It may be damaged; export it again.") from err


@dataclass
class _Outcome:
    """How a job ended.

    Attributes:
        exit: Exit code, negative for a signal, 0 if it has replied; None if the helper is gone.
        reply: What it sent.
        is_late: Whether it was ended for its time.
        content: Bytes of its arrays.
    """

    exit: int | None
    reply: bytes
    is_late: bool = False
    content: Any = b""


class _Helper:
    """A fresh process with the decoders loaded."""

    def __init__(self, forks: bool) -> None:
        self.forks = forks
        self._stack = ExitStack()
        folder = self._stack.enter_context(scratch_folder("decoding", hidden=True))
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
        self.control, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._stack.callback(self.control.close)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(theirs.fileno()), "fork" if forks else "once"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=folder,
                env={
                    **{name: os.environ[name] for name in _KEPT if name in os.environ},
                    **dict.fromkeys(_THREADS, "1"),
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "TMPDIR": str(folder),
                    "HOME": str(folder),
                },
                start_new_session=True,
            )
        self._stack.callback(self._end)  # Then its folder goes.
        if forks:
            self.control.settimeout(_START_SECONDS)
            with contextlib.suppress(OSError):
                if self.control.recv(16) != b"ready":
                    logger.error("The process that reads files does not start; its reason is above.")
            self.control.settimeout(None)

    def stop(self, statuses: socket.socket) -> None:
        """End a job, if it has not ended yet."""
        if self.forks:
            with contextlib.suppress(OSError):
                statuses.shutdown(socket.SHUT_WR)
        else:
            self.process.kill()

    def close(self) -> None:
        """End it, and with it all jobs."""
        self._stack.close()

    def _end(self) -> None:
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _wait(replies: socket.socket, statuses: socket.socket, helper: _Helper, seconds: float) -> _Outcome:
    """Read what a job sends until it has said all, or has ended without a word."""
    deadline = time.monotonic() + seconds
    reply = _receive(replies, deadline)
    if reply:
        return _Outcome(0, reply)
    is_late = reply is None
    if is_late:
        helper.stop(statuses)
    if not helper.forks:
        return _Outcome(helper.process.wait(_END_SECONDS), b"", is_late)
    report = _receive(statuses, time.monotonic() + _END_SECONDS)
    return _Outcome(json.loads(report)["status"] if report else None, b"", is_late)


def _receive(end: socket.socket, deadline: float) -> bytes | None:
    """All that is sent until the other side closes; None if that takes too long."""
    received = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        end.settimeout(left)
        try:
            data = end.recv(1 << 16)
        except TimeoutError:
            return None
        except ConnectionError:
            data = b""
        received += data
        if not data or len(received) > MAX_REPLY:
            return bytes(received)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or folder."""
    if path.is_dir():
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            yield handle
        finally:
            os.close(handle)
    else:
        with open_regular(path) as file:
            yield file.fileno()


def _measure(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                return sum(entry.stat().st_size for entry in entries if entry.is_file())
        return path.stat().st_size
    except OSError:
        return 0  # Whoever opens it says why.


def _make_file(stack: ExitStack) -> int:
    """A descriptor of a new file without a name, in memory where the system has it."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("progidiff", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, handle)
        return handle
    return stack.enter_context(tempfile.TemporaryFile()).fileno()


def _map_content(handle: int) -> Any:
    """The bytes of a file, as memory: writable, and what is written stays here."""
    size = os.fstat(handle).st_size
    if not size:
        return b""
    import fcntl

    if hasattr(fcntl, "F_ADD_SEALS"):  # Nobody can change or shorten it any more, whoever else may have it.
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return mmap.mmap(handle, size, access=mmap.ACCESS_COPY)


def _raise(answer: dict[str, Any], name: str, budget: Budget) -> NoReturn:
    message = str(answer["message"])
    if answer.get("refused") in _REFUSALS:
        raise typing.cast(type[ProGiDiffError], getattr(errors, answer["refused"]))(message)
    if (answer.get("failed") in ("memory", "OSError") and not message) or "File too large" in message:
        _refuse_size(name, budget)
    reason = message or str(answer.get("failed"))
    logger.warning("'%s' could not be read: %s in %s", name[:100], reason, answer.get("where"))
    raise ImageError(f"'{name}' cannot be read ({reason}). It may be cut off or of another format; export it again.")


def _refuse_size(name: str, budget: Budget) -> NoReturn:
    raise ImageError(
        f"'{name}' unpacks to more than {budget.decoded >> 20} MiB, far more than files of its size hold. Save it "
        "uncompressed, or crop it."
    )


_decoder: Decoder | None = None
_decoder_lock = threading.Lock()


def _get_decoder() -> Decoder:
    """The one of this process; a process that was forked from another has its own."""
    global _decoder
    with _decoder_lock:
        if _decoder is None or _decoder.process != os.getpid():
            _decoder = Decoder(forks=sys.platform == "linux")
            atexit.register(_decoder.close)
        return _decoder
