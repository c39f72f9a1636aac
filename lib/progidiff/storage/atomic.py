"""Files and folders that appear by rename, whole or not at all, and stay through a power cut; plain files, and no
others, opened for reading; used by every store.

What is being written has a name of its own beside its place, ``.writing-<machine>.<process>.<start>-<random>``, until
it is complete and flushed. A process that is killed leaves such a name behind; as it says whose it is, the next one
can tell what nobody will ever finish (`remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeGuard

from progidiff.errors import BusyError, ImageError, StoreError

WRITING = ".writing-"
"""How the names of what is not finished begin."""

_OWNER = re.compile(r"([0-9a-f]{8})\.(\d+)\.(\d+)-[0-9a-f]{12}")
_TEMPORARY = re.compile(r"\.?progidiff-[a-z]+-(.*)")
_STALE_SECONDS = 3600.0
"""What another machine, or a version that left its name out, has not touched for so long is nobody's any more."""


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_scratch_name(suffix: str = "", prefix: str = WRITING) -> str:
    """A new name for what this process is writing."""
    return f"{prefix}{_describe_owner()}-{secrets.token_hex(6)}{suffix}"


@contextlib.contextmanager
def atomic_file(path: Path, *, suffix: str = "", mode: int = 0o666, durable: bool = True) -> Iterator[Path]:
    """Write a file by rename: whoever reads it finds the old content or the new one, never a part.

    Args:
        path: Where it appears when the block ends; after an exception nothing has changed.
        suffix: Of the name to write to, for writers that go by it. A folder that is watched for images needs none.
        mode: Of the file, less the umask; 0o600 keeps its content from other accounts from the first byte on.
        durable: Whether it must survive a power cut; False for what can be made again.

    Yields:
        The path to write to. It is there, and empty.

    Raises:
        OSError: if the disk refuses; the old file stays then.
    """
    scratch = path.with_name(make_scratch_name(suffix))
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield scratch
        if durable:
            flush(scratch)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


def replace_bytes(path: Path, content: bytes, *, mode: int = 0o666, durable: bool = True) -> None:
    """Write a small file as `atomic_file` does.

    Raises:
        OSError: if the disk refuses; the old file stays then.
    """
    with atomic_file(path, mode=mode, durable=durable) as scratch:
        scratch.write_bytes(content)


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small file, in UTF-8, as `atomic_file` does.

    Raises:
        OSError: if the disk refuses; the old file stays then.
    """
    replace_bytes(path, text.encode(), durable=durable)


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    existing: Literal["refuse", "replace", "keep"] = "refuse",
    previous: Path | None = None,
    durable: bool = True,
) -> Iterator[Path]:
    """Write a folder with all that is in it by rename.

    Args:
        path: Where it appears when the block ends; after an exception nothing has changed.
        existing: What happens to a folder that is there already and holds something: an `OSError`; or it is replaced;
            or it stays, and the new one is dropped.
        previous: Where a replaced folder goes, in place of what is there; None to remove it.
        durable: Whether it must survive a power cut; False for what can be made again.

    Yields:
        The folder to write to.

    Raises:
        OSError: if the disk refuses; the old folder stays then.
    """
    scratch = path.with_name(make_scratch_name())
    try:
        scratch.mkdir()
        yield scratch
        if durable:
            for place, _, files in os.walk(scratch):
                for name in files:
                    flush(Path(place) / name)
                flush(Path(place))
        if existing == "replace":
            _put_in_place(scratch, path, previous)
        elif existing == "refuse" or not _holds_something(path):
            os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if durable:
        flush(path.parent)


def _holds_something(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _put_in_place(scratch: Path, path: Path, previous: Path | None) -> None:
    """Rename; a folder cannot replace one that holds something, which therefore steps aside first."""
    if not path.is_dir():
        os.replace(scratch, path)
        return
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)
    aside = previous or path.with_name(make_scratch_name())
    os.replace(path, aside)
    try:
        os.replace(scratch, path)
    except OSError:
        os.replace(aside, path)
        raise
    if previous is None:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(purpose: str, *, hidden: bool = False) -> Iterator[Path]:
    """A folder in the system's place for temporary files that is gone after the block.

    Args:
        purpose: A word for its name.
        hidden: Whether its name begins with a dot, as that of a folder does which stays for the life of a process.
    """
    folder = Path(tempfile.gettempdir()) / make_scratch_name(prefix=f"{'.' * hidden}progidiff-{purpose}-")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> int:
    """Remove what processes that died were writing directly into a folder.

    Returns:
        How many files and folders are gone.
    """
    removed = 0
    for path in folder.glob(f"{WRITING}*"):
        owner = _OWNER.match(path.name[len(WRITING) :])
        with contextlib.suppress(OSError):
            is_stale = time.time() - path.lstat().st_mtime > _STALE_SECONDS
            removed += (_is_dead(owner) if _is_near(owner) else is_stale) and _remove(path)
    return removed


def remove_scratch_folders() -> int:
    """Remove what `scratch_folder` made for processes of this account and machine that died.

    Returns:
        How many folders are gone.
    """
    removed = 0
    for path in Path(tempfile.gettempdir()).iterdir():
        name = _TEMPORARY.fullmatch(path.name)
        owner = None if name is None else _OWNER.fullmatch(name[1])
        with contextlib.suppress(OSError):
            removed += _is_near(owner) and _is_dead(owner) and path.lstat().st_uid == os.getuid() and _remove(path)
    return removed


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True


def open_regular(path: str | os.PathLike[str], follow: bool = True) -> BinaryIO:
    """Open a file for reading, but no device, pipe or socket: those block, never end, or do something when opened.

    Args:
        path: The file.
        follow: Whether it may be a symbolic link to one.

    Raises:
        ImageError: if it is something else.
        OSError: if it cannot be opened.
    """
    path = Path(path)
    state = path.stat() if follow else path.lstat()
    # Asked before, since opening some devices does something already, and after, since names can change hands.
    if stat.S_ISREG(state.st_mode):
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return open(handle, "rb")
        os.close(handle)
    raise ImageError(
        f"'{path.name}' is a link, device, pipe or folder and no plain file. Put the image itself in its place."
    )


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what `open_regular` refuses; of a folder, any entry that is neither a plain file nor a folder.

    Raises:
        ImageError: if it is something else.
        OSError: if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        with os.scandir(path) as entries:
            strange = next((entry.name for entry in entries if not (entry.is_file() or entry.is_dir())), None)
        if strange is not None:
            raise ImageError(
                f"The folder '{path.name}' holds '{strange[:60]}', which is a broken link, device or pipe. Leave "
                "only the images in it."
            )
        return
    open_regular(path).close()


@contextlib.contextmanager
def locked(path: Path, holder: str, seconds: float = 30.0) -> Iterator[None]:
    """Hold a lock file against other processes, and against other calls of this one.

    Args:
        path: Of the lock file; its folder is made.
        holder: What is happening as long as somebody else has it, for the message: "Another process has been writing
            to 'x'".
        seconds: How long to wait.

    Raises:
        BusyError: if somebody else has it for too long.
        StoreError: if there cannot be a lock file.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=seconds)
        lock.acquire()
    except Timeout as err:
        raise BusyError(f"{holder} for {seconds:.0f} s. Try again.", retry_after=30) from err
    except OSError as err:
        raise StoreError(
            f"'{path.parent}' cannot be locked ({err}). Free some disk space or check who may write there."
        ) from err
    try:
        yield
    finally:
        lock.release()


def _is_near(owner: re.Match[str] | None) -> TypeGuard[re.Match[str]]:
    """Whether the process that a name speaks of would be seen from here."""
    return owner is not None and owner[1] == _name_machine() and owner[3] != "0"


def _is_dead(owner: re.Match[str]) -> bool:
    return _find_start(int(owner[2])) != int(owner[3])


def _describe_owner() -> str:
    return f"{_name_machine()}.{os.getpid()}.{_find_start(os.getpid())}"


@functools.cache
def _name_machine() -> str:
    """Of the host and, in a container, of its own numbering of processes."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:8]


def _find_start(process: int) -> int:
    """When a process started, in ticks since the machine did: numbers of processes are given again. 0 if there is no
    such process, or the system does not say.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def name_owner() -> str:
    """A new name that says which process has something: machine, process and its start, and a random part."""
    return make_scratch_name(prefix="")


def is_owner_gone(name: str) -> bool | None:
    """Whether the process that `name_owner` named has ended; None if that cannot be told from here."""
    owner = _OWNER.fullmatch(name)
    return _is_dead(owner) if _is_near(owner) else None
