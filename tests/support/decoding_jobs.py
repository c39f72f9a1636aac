"""What a child that decodes may try; called there by tests, as decoders are."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import GeometryError


def attempt(path: Path) -> dict[str, str]:
    """Whatever a child could try that has been taken over, and how it ended: "done", or the error."""
    own = Path("own.txt")
    attempts = {
        "read its input": lambda: path.read_bytes(),
        "write in its own folder": lambda: own.write_text("x"),
        "read a file beside its input": lambda: (path.parent / "secret.txt").read_bytes(),
        "read the users of the system": lambda: Path("/etc/passwd").read_bytes(),
        "read the environment of its parent": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
        "list a folder": lambda: os.listdir("/"),
        "write its input": lambda: path.write_bytes(b""),
        "write beside its input": lambda: (path.parent / "new.txt").write_bytes(b""),
        "remove its input": lambda: path.unlink(),
        "change rights": lambda: path.chmod(0o777),
        "link to a secret": lambda: Path("link").symlink_to("/etc/passwd"),
        "open a device": lambda: open("/dev/zero", "rb").close(),
        "make a socket": lambda: socket.socket().close(),
        "make a local socket": lambda: socket.socketpair(),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9), 1),
        "fork": lambda: os.fork() or os._exit(0),
        "start a program": lambda: os.execv("/bin/true", ["true"]),
        "start a shell": lambda: subprocess.run(["/bin/true"], check=True),
        "signal its parent": lambda: os.kill(os.getppid(), 0),
        "trace": lambda: _call(101 if os.uname().machine == "x86_64" else 117, 16, os.getppid(), 0, 0),
        "make a name space": lambda: _call(272 if os.uname().machine == "x86_64" else 97, 0x10000000),
        "use io_uring": lambda: _call(425, 1, None),
        "limit its parent": lambda: _call(302 if os.uname().machine == "x86_64" else 261, os.getppid(), 7, None, None),
    }
    found = {}
    for name, function in attempts.items():
        try:
            function()
            found[name] = "done"
        except Exception as err:
            found[name] = type(err).__name__
    return found


def _call(*numbers: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*numbers) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def give(shape: tuple[int, ...], dtype: str, order: str) -> NDArray[np.generic]:
    """An array of ascending numbers."""
    return np.arange(int(np.prod(shape))).astype(dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def lie() -> int:
    """Text where a number is announced."""
    return "not a number"  # type: ignore[return-value]


def refuse(message: str) -> None:
    """As decoders do."""
    raise GeometryError(message)


def fail() -> None:
    """As no decoder should."""
    raise ZeroDivisionError("by a decoder")


def end_by(number: int) -> None:
    """As a decoder that is damaged by its file."""
    os.kill(os.getpid(), number)


def crash() -> None:
    """A real one."""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


def sleep(seconds: float) -> str:
    """Take time."""
    time.sleep(seconds)
    return "slept"


def count(seconds: float) -> str:
    """Take the processor's time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return "counted"


def fill(megabytes: int) -> int:
    """Take memory."""
    return len(np.ones(megabytes << 20, np.uint8)) >> 20


def touch(folder: Path) -> list[str]:
    """Make a file in a folder."""
    (folder / "made.txt").write_text("x")
    return os.listdir(folder)
