"""Which images there are: a table, or whatever lies below an address.

A table (CSV, TSV, JSON lines or Parquet) has a row per image: ``image``, a path or address, absolute or relative to the
table; and if wanted ``id`` (else made of the address), ``modality``, and ``series`` for a folder with several. Below an
address, every volume is an image and every folder with DICOM files is one.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from progidiff.errors import NotFoundError, RequestError
from progidiff.evaluation.prelabel import Item
from progidiff.images.choosing import is_companion
from progidiff.images.formats import Use, find_format, find_kind, list_suffixes, strip_suffix
from progidiff.images.ids import make_id
from progidiff.images.modality import check_modality
from progidiff.storage import addresses

logger = logging.getLogger(__name__)

COLUMNS = ("id", "image", "modality", "series")
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_OURS = ("labels", "reports")
"""Folders that this command writes below an address."""

_LOOKED_AT = 3
"""Images of a table that are looked for before anything begins."""


def read_manifest(address: str) -> list[Item]:
    """The images of a table.

    Raises:
        NotFoundError: if there is no such file.
        RequestError: if it cannot be read, has no column `image`, names an id twice, or has rows that name no image;
            rows are told with their number, counted from 1 below the header.
    """
    try:
        rows = _read_rows(address, addresses.read_bytes(address))
    except OSError as err:
        raise RequestError(f"The manifest '{address}' cannot be read ({err}). Check who may read it.") from err
    if not rows:
        raise RequestError(f"The manifest '{address}' names no image. It needs a row per image, with column 'image'.")
    ignored = sorted({str(name) for row in rows for name in row if name is not None} - set(COLUMNS))
    if ignored:
        logger.warning("Columns of '%s' that are not read: %s", address, ", ".join(ignored[:8]))
    base = address.rpartition("/")[0] if "/" in address else "."
    items = [_make_item(row, number, base, address) for number, row in enumerate(rows, start=1)]
    seen: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        first = seen.setdefault(item.image, number)
        if first != number:
            raise RequestError(
                f"The manifest '{address}' has id '{item.image}' in rows {first} and {number}. Each image needs an id "
                "of its own: it names the label."
            )
    return items


def find_images(address: str, out: str = "") -> list[Item]:
    """The images below an address.

    Args:
        address: A folder.
        out: Where labels will go; what lies there is no image.

    Raises:
        NotFoundError: if there is no such folder.
        RequestError: if it cannot be read, holds no image, or two that would have one id.
    """
    root = address if addresses.is_remote(address) else str(addresses.to_path(address))
    mine = f"{out.rstrip('/')}/" if out and out.rstrip("/") != root.rstrip("/") else ""
    folders: dict[str, list[addresses.FoundFile]] = defaultdict(list)
    for file in addresses.find_files(root):
        parts = file.name.split("/")
        if (len(parts) > 1 and parts[0] in _OURS) or (mine and file.address.startswith(mine)):
            continue
        if not is_companion(Path(file.name)):
            folders[file.name.rpartition("/")[0]].append(file)
    items = [item for folder, files in sorted(folders.items()) for item in _list_folder(root, folder, files)]
    if not items:
        suffixes = ", ".join(list_suffixes(Use.UPLOAD, "volume"))
        raise RequestError(f"No image lies below '{address}': {suffixes} files and folders of DICOM files are read.")
    seen: dict[str, Item] = {}
    for item in items:
        first = seen.setdefault(item.image, item)
        if first is not item:
            raise RequestError(
                f"'{first.address}' and '{item.address}' would both be called '{item.image}'. Rename one, or name the "
                "images in a table (--manifest)."
            )
    return sorted(items, key=lambda item: item.image)


def _list_folder(root: str, folder: str, files: Sequence[addresses.FoundFile]) -> Iterable[Item]:
    """The volumes of one folder, or the folder itself."""
    names = {file.name: file.address for file in files}
    volumes = [file for file in files if find_kind(file.name, Use.UPLOAD) == "volume"]
    for file in volumes:
        stem = strip_suffix(file.name)
        image = "/".join([*filter(None, [folder]), stem])
        sidecar = names.get("/".join([*filter(None, [folder]), f"{stem}.json"]), "")
        yield Item(_make_id(image), file.address, sidecar=sidecar)
    if not volumes and _holds_dicom(files):
        name = folder or root.rstrip("/").rpartition("/")[2]
        yield Item(_make_id(name), addresses.join(root, *filter(None, [folder])))


def _holds_dicom(files: Sequence[addresses.FoundFile]) -> bool:
    """By their endings; of files without any, the first one is looked into."""
    if any(find_format(file.name, Use.SESSION) is not None and find_kind(file.name) == "volume" for file in files):
        return True
    bare = next((file for file in files if "." not in PurePosixPath(file.name).name or _is_uid(file.name)), None)
    if bare is None:
        return False
    filesystem, path = addresses.open_address(bare.address)
    with filesystem.open(path, "rb") as stream:
        return bytes(stream.read(132)[128:]) == b"DICM"


def _is_uid(name: str) -> bool:
    return set(PurePosixPath(name).name) <= set("0123456789.")


def _make_id(name: str) -> str:
    return make_id("__".join(name.split("/"))[-200:])


def _read_rows(address: str, content: bytes) -> list[dict[str, Any]]:
    suffix = PurePosixPath(address).suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist())
        text = content.decode("utf-8-sig")
        if suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("every line must be an object")
            return rows
        if suffix in (".csv", ".tsv"):
            reader = csv.DictReader(
                io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True
            )
            return list(reader)
    except (ValueError, csv.Error, OSError) as err:  # pyarrow's errors are some of these.
        raise RequestError(f"The manifest '{address}' cannot be read ({err}). Save it again, text as UTF-8.") from err
    raise RequestError(f"The manifest '{address}' must end in one of {', '.join(MANIFESTS)}.")


def _make_item(row: Mapping[str, Any], number: int, base: str, address: str) -> Item:
    where = f"Row {number} of the manifest '{address}'"
    if None in row:
        raise RequestError(f"{where} has more cells than the header. Put names with commas into quotes.")
    if "image" not in row:
        found = ", ".join(map(str, row)) or "none"
        raise RequestError(
            f"{where} has the columns {found}. 'image' is needed; 'id', 'modality' and 'series' may be there too."
        )
    values = {name: str(row.get(name) if row.get(name) is not None else "").strip() for name in COLUMNS}
    if not values["image"]:
        raise RequestError(f"{where} names no image. Fill column 'image' in, or remove the row.")
    try:
        modality = check_modality(values["modality"] or None, "Column modality") or ""
        image = make_id(values["id"] or strip_suffix(values["image"].rstrip("/")))
    except RequestError as err:
        raise RequestError(f"{where}: {err}") from err
    place = values["image"]
    if "://" not in place and not place.startswith("/"):
        place = addresses.join(base, place)
    return Item(image, place, modality, values["series"])


def check_there(items: Sequence[Item]) -> None:
    """Refuse a list none of whose first images is there: the table is of another place.

    Raises:
        NotFoundError: naming the first one.
    """
    for item in items[:_LOOKED_AT]:
        try:
            addresses.describe(item.address)
            return
        except NotFoundError:
            continue
    raise NotFoundError(
        f"None of the first {min(len(items), _LOOKED_AT)} images of the manifest is there, for example "
        f"'{items[0].address}'. Paths are relative to the manifest itself."
    )
