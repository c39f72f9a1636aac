"""Files and folders by address: paths of this machine, object stores (``s3://bucket/folder``), and whatever else fsspec
reaches (``sftp://``, ``gs://``, ``https://``).

What is written appears whole or not at all: by rename on a disk, by a single put in an object store. S3 is reached
through pyarrow, which is there for the Parquet reports anyway and needs no package of Amazon's; it takes credentials
where Amazon's own tools do (environment, ``~/.aws``, the machine's role), and fsspec's settings (``FSSPEC_S3_...``)
count.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from progidiff.errors import NotFoundError, RequestError, StoreError
from progidiff.storage.atomic import make_scratch_name, replace_bytes

_SINGLE_PUT = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory")
"""Where an object appears when its last byte is there; elsewhere it is renamed."""

_CONNECT_SECONDS = 10.0
_REQUEST_SECONDS = 60.0


@dataclass(frozen=True)
class FoundFile:
    """A file below a folder.

    Attributes:
        name: Relative to the folder, with "/".
        address: Its own.
        size: Bytes.
        token: What changes when its content does: an entity tag or a time; "" if the place tells neither.
    """

    name: str
    address: str
    size: int
    token: str


def is_remote(address: str) -> bool:
    """Whether an address is no path of this machine.

    Example:
        >>> is_remote("s3://bucket/scans"), is_remote("/data/scans"), is_remote("file:///data/scans")
        (True, False, False)
    """
    return "://" in address and not address.startswith(("file://", "local://"))


def to_path(address: str) -> Path:
    """The path that an address of this machine means, absolute.

    Example:
        >>> to_path("file:///data/scans").as_posix()
        '/data/scans'
    """
    return Path(address.removeprefix("file://").removeprefix("local://")).expanduser().absolute()


def check_address(address: str) -> str:
    """Refuse what would quietly become a folder of this machine called ``s3:``.

    Raises:
        RequestError: if nothing follows the protocol (a variable of the shell that is empty), or a slash is missing.

    Example:
        >>> check_address("s3://bucket/scans"), check_address("scans")
        ('s3://bucket/scans', 'scans')
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", address)
    if found is None:
        return address
    protocol, slashes, rest = found.groups()
    if len(slashes) == 1:
        raise RequestError(f"'{address}' is no address. Write '{protocol}://' with two slashes, or './' before a path.")
    if not rest:
        raise RequestError(f"'{address}' names no place. Write for example {protocol}://bucket/folder.")
    return address


def join(address: str, *names: str) -> str:
    """The address of what lies in a folder.

    Example:
        >>> join("s3://bucket/scans/", "labels", "a.nii.gz")
        's3://bucket/scans/labels/a.nii.gz'
    """
    return "/".join([address.rstrip("/"), *names])


def find_files(address: str, deep: bool = True) -> Iterator[FoundFile]:
    """The files of a folder, by name; hidden ones are passed over.

    Args:
        address: Of the folder.
        deep: Whether its subfolders count.

    Raises:
        NotFoundError: if there is no such folder.
        RequestError: if it cannot be read.
    """
    filesystem, root = open_address(address)
    try:
        filesystem.invalidate_cache()
        if filesystem.info(root)["type"] != "directory":
            raise NotFoundError(f"There is no folder '{address}'. Check the address.")
        entries: dict[str, Any] = filesystem.find(root, maxdepth=None if deep else 1, detail=True)
    except FileNotFoundError as err:
        raise NotFoundError(f"There is nothing at '{address}'. Check the address.") from err
    except OSError as err:
        raise RequestError(f"'{address}' cannot be read ({_shorten(err)}). {_CURE}") from err
    base = root.rstrip("/") + "/"
    for path, info in sorted(entries.items()):
        name = path.removeprefix(base) if path.startswith(base) else path.lstrip("/").removeprefix(base.lstrip("/"))
        if not any(part.startswith(".") for part in name.split("/")):
            yield FoundFile(name, join(address, name), int(info.get("size") or 0), _find_token(info))


def describe(address: str) -> tuple[bool, list[str | int]]:
    """Whether there is a folder, and a stamp that changes when the file, or a file directly in the folder, does.

    Raises:
        NotFoundError: if there is nothing.
        OSError: if the place does not answer.
    """
    filesystem, path = open_address(address)
    try:
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        if info["type"] != "directory":
            return False, [_find_token(info), int(info.get("size") or 0)]
        entries = [entry for entry in filesystem.ls(path, detail=True) if entry["type"] == "file"]
    except FileNotFoundError as err:
        raise NotFoundError(f"There is nothing at '{address}'. Check the address.") from err
    state = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: str(entry["name"])):
        state.update(f"{entry['name']}\0{entry.get('size')}\0{_find_token(entry)}\n".encode())
    return True, [state.hexdigest()[:32], sum(int(entry.get("size") or 0) for entry in entries)]


def fetch(address: str, folder: Path) -> tuple[Path, int]:
    """Copy a file, or the files directly in a folder, into a folder of this machine.

    Returns:
        The file or subfolder, and how many bytes came.

    Raises:
        NotFoundError: if there is nothing.
        StoreError: if the disk here is full.
        OSError: if the place does not answer, or what came is cut off; another try may do.
    """
    filesystem, path = open_address(address)
    target = folder / address.rstrip("/").rpartition("/")[2]
    try:
        if filesystem.info(path)["type"] != "directory":
            return target, _fetch_file(filesystem, path, target)
        target.mkdir()
        names = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] == "file"]
        return target, sum(_fetch_file(filesystem, name, target / name.rpartition("/")[2]) for name in names)
    except FileNotFoundError as err:
        raise NotFoundError(f"There is nothing at '{address}'. Check the address.") from err
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"'{address}' cannot be fetched, the disk is full. Free some space, or set TMPDIR to another disk."
            ) from err
        raise


def _fetch_file(filesystem: Any, path: str, target: Path) -> int:
    wanted = filesystem.info(path).get("size")
    filesystem.get_file(path, str(target))
    size = target.stat().st_size
    if wanted is not None and size != wanted:
        raise OSError(f"{size} of {wanted} bytes of '{path}' came")
    return size


def exists(address: str) -> bool:
    """Whether there is a file.

    Raises:
        OSError: if the place does not answer.
    """
    if not is_remote(address):
        return to_path(address).is_file()
    return find_size(address) is not None


def find_size(address: str) -> int | None:
    """Bytes of a file; None if there is none.

    Raises:
        OSError: if the place does not answer.
    """
    filesystem, path = open_address(address)
    try:
        filesystem.invalidate_cache()
        info = filesystem.info(path)
    except FileNotFoundError:
        return None
    return int(info.get("size") or 0) if info["type"] == "file" else None


def read_bytes(address: str) -> bytes:
    """A whole file.

    Raises:
        NotFoundError: if there is none.
        OSError: if the place does not answer, or refuses.
    """
    filesystem, path = open_address(address)
    try:
        return bytes(filesystem.cat_file(path))
    except FileNotFoundError as err:
        raise NotFoundError(f"There is nothing at '{address}'. Check the address.") from err


def put_bytes(address: str, content: bytes) -> None:
    """Write a file whole: whoever reads it finds what was there before, or this.

    Raises:
        StoreError: if the place refuses.
    """
    try:
        if not is_remote(address):
            path = to_path(address)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, content)
            return
        filesystem, path_there = open_address(address)
        if address.partition("://")[0] in _SINGLE_PUT:
            filesystem.pipe_file(path_there, content)
            return
        folder = path_there.rpartition("/")[0]
        filesystem.makedirs(folder, exist_ok=True)
        scratch = f"{folder}/{make_scratch_name()}"
        filesystem.pipe_file(scratch, content)
        filesystem.mv(scratch, path_there)
    except (OSError, NotImplementedError) as err:
        raise StoreError(
            f"'{address}' cannot be written ({_shorten(err)}). Choose another place, free some space, or check who may "
            "write there."
        ) from err


@cache
def open_filesystem(protocol: str) -> Any:
    """The fsspec filesystem of a protocol that needs nothing else to be named.

    Raises:
        RequestError: if the package for it is not installed, or there is no such protocol.
    """
    import fsspec

    if protocol in ("s3", "s3a"):
        return _open_s3()
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as err:
        raise RequestError(
            f"Addresses that begin with '{protocol}://' cannot be read here ({_shorten(err)}). Install what it names, "
            "or use a path or s3://."
        ) from err


def open_address(address: str) -> tuple[Any, str]:
    """The fsspec filesystem of an address, and the path in it.

    Raises:
        RequestError: if nothing here reaches such addresses.
    """
    if not is_remote(address):
        return open_filesystem("file"), str(to_path(address))
    protocol, _, rest = address.partition("://")
    if protocol in ("s3", "s3a"):
        if not rest.strip("/"):
            raise RequestError(f"'{address}' names no bucket. Write s3://bucket/folder.")
        return open_filesystem(protocol), rest.rstrip("/")
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(address)
    except (ImportError, ValueError) as err:
        raise RequestError(
            f"'{address}' cannot be reached from here ({_shorten(err)}). Install what it names, or use a path or s3://."
        ) from err
    return filesystem, str(path)


def _open_s3() -> Any:
    from fsspec.config import conf
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    settings = conf.get("s3", {})
    endpoint = (
        settings.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "request_timeout": _REQUEST_SECONDS}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    if region:
        options["region"] = region
    if str(settings.get("anon", "")).lower() in ("1", "true", "yes"):
        options["anonymous"] = True
    elif settings.get("key"):
        options |= {"access_key": settings["key"], "secret_key": settings.get("secret")}
    return ArrowFSWrapper(S3FileSystem(**options))


def _find_token(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(name) is not None:
            return str(info[name])
    return ""


_CURE = "Check the address, the credentials and who may read there."


def _shorten(err: BaseException) -> str:
    return " ".join(str(err).split())[:300] or type(err).__name__
