"""What a process may still do once it reads bytes that nobody vouches for: nothing but compute, and open what it was
given.

Each measure stands alone, and is left out where the system does not have it; `Confinement` says which ones hold.

* Landlock (Linux 5.13): files and folders other than those given cannot be opened, whatever their name; from 6.7 no TCP
  port, from 6.12 no signal to others.
* seccomp (x86-64, ARM64): no socket, process, program, mount, trace, key ring, nor rights of any file.
* A network without interfaces, where namespaces may be made.
* Limits of memory, processor time, size and number of files; no privilege of root but to read files; no new ones ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

try:
    import resource
except ImportError:  # Windows has none.
    resource = None  # type: ignore[assignment]

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION = 1
_LANDLOCK_PATH_BENEATH = 1
_READ_FILE, _READ_DIR, _TRUNCATE = 1 << 2, 1 << 3, 1 << 14
_CHANGE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # Write and remove files and folders, make files and folders.
_FILES_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NO_TCP, _NO_SIGNALS_NOR_SOCKETS = 0b11, 0b11

_NEW_PRIVILEGES, _SET_SECCOMP, _SECCOMP_FILTER, _DUMPABLE = 38, 22, 2, 4
_CAPABILITIES_VERSION = 0x20080522
_READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH; Landlock says which.
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000

_COMMON = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 440, 442, 443, 452)
"""Numbers that all machines share: signals and descriptors of other processes, io_uring, mounts."""

_CLONE3 = 435


@dataclass(frozen=True)
class _Machine:
    """Numbers of system calls.

    Attributes:
        audit: How the kernel calls the machine.
        denied: Sockets, processes, programs, shared memory, mounts, traces, keys, modules, users, rights of files, and
            whatever reaches into other processes.
        signal: tgkill, which `abort` uses on the process itself.
        limits: prlimit64, which must not reach other processes.
        capset: For giving up what root may do.
    """

    audit: int
    denied: tuple[int, ...]
    signal: int
    limits: int
    capset: int


_X86_64 = _Machine(
    0xC000003E,
    (
        *(29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71),
        *range(41, 60),
        *(62, 90, 91, 92, 93, 94, 101, 105, 106, 113, 114, 116, 117, 119, 122, 123, 129, 132, 133, 135, 141, 142, 144),
        *(155, 161, 165, 166, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 188, 189, 190, 197, 198, 199, 200, 203),
        *(235, 237, 238, 240, 241, 242, 243, 244, 245, 246, 248, 249, 250, 251, 256, 259, 260, 261, 268, 272, 278, 279),
        *(280, 288, 297, 298, 299, 300, 303, 304, 307, 308, 310, 311, 312, 313, 314, 320, 321, 322, 323),
    ),
    signal=234,
    limits=302,
    capset=126,
)
_AARCH64 = _Machine(
    0xC00000B7,
    (
        *(5, 6, 7, 14, 15, 16, 30, 33, 39, 40, 41, 51, 52, 53, 54, 55, 60, 75, 88, 92, 97, 104, 105, 106, 117, 118),
        *(119, 122, 129, 130, 138, 140, 142, 143, 144, 145, 146, 147, 149, 151, 152, 159, 161, 162),
        *range(180, 213),
        *(217, 218, 219, 220, 221, 224, 225, 235, 237, 238, 239, 240, 241, 242, 243, 262, 264, 265, 268, 269, 270, 271),
        *(272, 273, 274, 280, 281, 282, 294),
    ),
    signal=131,
    limits=261,
    capset=91,
)
_MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}


@dataclass(frozen=True)
class Confinement:
    """Which measures hold.

    Attributes:
        files: Whether only what was given can be opened.
        calls: Whether sockets, processes and programs are refused.
        network: Whether the network has no interface, or TCP is refused.
        limits: Whether memory, time and sizes are limited.
    """

    files: bool = False
    calls: bool = False
    network: bool = False
    limits: bool = False


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
        memory: Bytes of addresses beyond what the process has when it starts.
        output: Bytes of any file that it writes.
        seconds: Of the processor, and on the clock.
    """

    memory: int
    output: int
    seconds: float


def leave_network() -> bool:
    """Have this process and its children see no network, for good; False if the system does not let them.

    Users other than root get a name space of users for it, in which they are who they are.
    """
    if sys.platform != "linux":
        return False
    user, group, is_root = os.geteuid(), os.getegid(), os.geteuid() == 0
    if _load_libc().unshare(_NEW_NETWORK | _NEW_IPC | (0 if is_root else _NEW_USER)):
        return False
    if not is_root:
        with contextlib.suppress(OSError):
            maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(text)
    return True


def prepare() -> None:
    """Give up what needs no job to be known: privileges of root but reading files, and new ones for good."""
    if sys.platform != "linux":
        return
    libc = _load_libc()
    libc.prctl(_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(_DUMPABLE, 0, 0, 0, 0)
    machine = _MACHINES.get(platform.machine())
    if machine is not None:
        _drop_capabilities(libc, machine)
        _pack_filter(machine, os.getpid())


def confine(readable: Iterable[int], writable: Iterable[int], limits: Limits, leaves_network: bool) -> Confinement:
    """Give up everything but computing and the given files, for good; after `prepare`, and with one thread.

    Args:
        readable: Descriptors of files and folders that may be opened for reading.
        writable: Of folders in which files may also be made, changed and removed.
        limits: Of this process.
        leaves_network: Whether `leave_network` has succeeded.
    """
    has_limits = _set_limits(limits)
    if sys.platform != "linux":
        return Confinement(limits=has_limits)
    libc, machine = _load_libc(), _MACHINES.get(platform.machine())
    version = _restrict_files(libc, readable, writable)
    has_filter = machine is not None and _filter_calls(libc, machine)
    return Confinement(version > 0, has_filter, leaves_network or version >= 4 or has_filter, has_limits)


@functools.cache
def _load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _set_limits(limits: Limits) -> bool:
    if resource is None:
        return False
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: max(1, round(limits.seconds)),
        resource.RLIMIT_FSIZE: limits.output,
        resource.RLIMIT_NOFILE: 64,
    }
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:
        wanted[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + limits.memory
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    return resource.RLIMIT_AS in wanted


def _drop_capabilities(libc: ctypes.CDLL, machine: _Machine) -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_VERSION, 0))
    kept = _READ_ANY_FILE if os.geteuid() == 0 else 0
    data = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    if libc.syscall(machine.capset, header, data):  # Root of a container may not have had this one.
        libc.syscall(machine.capset, header, ctypes.create_string_buffer(bytes(24)))


def _restrict_files(libc: ctypes.CDLL, readable: Iterable[int], writable: Iterable[int]) -> int:
    """The version of Landlock that is in force; 0 for none."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return 0
    handled = _FILES_OF_VERSION[max(known for known in _FILES_OF_VERSION if known <= version)]
    size = 8 if version < 4 else 16 if version < 6 else 24
    attribute = struct.pack("=QQQ", handled, _NO_TCP, _NO_SIGNALS_NOR_SOCKETS)[:size]
    rules = libc.syscall(_LANDLOCK_CREATE, ctypes.create_string_buffer(attribute, size), size, 0)
    if rules < 0:
        return 0
    try:
        given = [(handle, _READ_FILE | _READ_DIR) for handle in readable]
        given += [(handle, _READ_FILE | _READ_DIR | _CHANGE | _TRUNCATE) for handle in writable]
        for handle, rights in given:
            is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
            rights &= handled & (~0 if is_folder else _READ_FILE)
            rule = struct.pack("=Qi", rights, handle)
            if libc.syscall(_LANDLOCK_ADD, rules, _LANDLOCK_PATH_BENEATH, ctypes.create_string_buffer(rule, 12), 0):
                return 0
        return 0 if libc.syscall(_LANDLOCK_RESTRICT, rules, 0) else int(version)
    finally:
        os.close(rules)


def _filter_calls(libc: ctypes.CDLL, machine: _Machine) -> bool:
    """Refuse system calls by number, for good."""
    program = _pack_filter(machine, os.getpid())
    steps = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(steps)), struct.calcsize("@HP")
    )
    return bool(libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, pointer, 0, 0) == 0)


@functools.cache
def _pack_filter(machine: _Machine, process: int) -> bytes:
    return b"".join(struct.pack("=HBBI", *step) for step in _write_filter(machine, process))


def _write_filter(machine: _Machine, process: int) -> list[tuple[int, int, int, int]]:
    """The program, one (code, steps if true, steps if not, value) each; see the kernel's seccomp_filter text."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    refused, unknown = (give, 0, 0, refuse | errno.EPERM), (give, 0, 0, refuse | errno.ENOSYS)
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine.audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine is _X86_64:
        steps += [(at_least, 0, 1, 0x40000000), refused]  # The same calls under other numbers.
    for number in (*machine.denied, *_COMMON):
        steps += [(equal, 0, 1, number), refused]
    steps += [(equal, 0, 1, _CLONE3), unknown]
    for number, own in ((machine.signal, process), (machine.limits, 0)):  # Of this process itself they may be.
        steps += [(equal, 0, 4, number), (load, 0, 0, 16), (equal, 0, 1, own), (give, 0, 0, allow), refused]
    return [*steps, (give, 0, 0, allow)]
