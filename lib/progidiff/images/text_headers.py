"""NRRD and MetaImage, read here and nowhere else: formats whose header is text and may name any other file.

A `data file: /etc/passwd` (NRRD) or `ElementDataFile = /etc/passwd` (MetaImage) makes the usual readers return the
bytes of that file as voxels, so a header that somebody sent could fetch any file of the server, or a device that
never ends. Here the header is parsed strictly, and the voxels come from behind it in the same file. Only headers
that are made to have their data elsewhere (.nhdr, .mhd) may name one plain file beside them, and only where the
caller or `--conf detached_data true` says so.

Geometry is that of ITK: NRRD's own spaces are turned to LPS, an unnamed one is taken as LPS, measurement frames and
centerings are ignored. What ITK would read in a way that is easy to get wrong (axis minima, skipped lines or bytes,
voxels as text) is refused.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import LPS_TO_RAS, Affine
from progidiff.images.raw import MAX_HEADER_BYTES, Place, Raw, check_size
from progidiff.storage.atomic import open_regular

MAX_AXES = 8

_DETACHED = "PROGIDIFF_DETACHED_DATA"
"""Environment variable: trainings and batches, which are processes of their own, read what the server reads."""

_here: ContextVar[bool | None] = ContextVar("detached", default=None)

DETACHED_SUFFIXES = (".nhdr", ".mhd")
_DATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,199}\.(raw|zraw|gz|img|bin|dat)", re.IGNORECASE)
_CHUNK = 1 << 20

Packing = Literal["raw", "deflate"]

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a header says, checked.

    Attributes:
        path: Of the header.
        shape: Voxels per axis, fastest first: three, or more if the file says so.
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4), float64; of the first three axes.
        dtype: Of the voxels as stored.
        packing: "raw", or "deflate" for gzip and zlib.
        data: Name of the file beside it that has the voxels; None if they follow the header.
        offset: First byte of the voxels.
        layers: Values per voxel, stored beside each other.
        pairs: Key/value pairs of NRRD, of which a viewer makes what it likes.
    """

    path: Path
    shape: tuple[int, ...]
    affine: Affine
    dtype: np.dtype[Any]
    packing: Packing
    data: str | None
    offset: int
    layers: int = 1
    pairs: Mapping[str, str] = field(default_factory=dict)


def allow_detached(allowed: bool) -> None:
    """Say whether .nhdr and .mhd may have their data in a file beside them, in this process and those it starts."""
    if allowed:
        os.environ[_DETACHED] = "1"
    else:
        os.environ.pop(_DETACHED, None)


def is_detached_allowed() -> bool:
    """Whether .nhdr and .mhd may have their data beside them, here and now."""
    told = _here.get()
    return os.environ.get(_DETACHED) == "1" if told is None else told


@contextmanager
def detached_data(allowed: bool | None) -> Iterator[None]:
    """Whether .nhdr and .mhd read inside may have their data beside them; None for what `allow_detached` said."""
    token = _here.set(allowed)
    try:
        yield
    finally:
        _here.reset(token)


def read_file(path: Path) -> Raw:
    """Voxels and affine, as the table of formats wants them; raises what `read_header` and `read_voxels` do."""
    header = read_header(path)
    check_size((header.layers, *header.shape), path, header.dtype.itemsize)
    return Raw(read_voxels(header), header.affine)


def read_file_place(path: Path) -> Place:
    """Shape and affine from the header, whatever number of layers lies there; raises what `read_header` does."""
    header = read_header(path, layered=True)
    return Place(header.shape, header.affine)


def read_header(path: Path, layered: bool = False) -> Header:
    """Parse a header strictly.

    Args:
        path: Ends in .nrrd, .nhdr, .mha or .mhd. Only of .nhdr and .mhd a file beside it may have the voxels, and only
            where `allow_detached` or `detached_data` said so.
        layered: Whether there may be several values per voxel.

    Raises:
        ImageError: if it names another file, or says something that is not read here.
        ValueError: if it is no header of this format, with the reason.
        OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(MAX_HEADER_BYTES)
    name = path.name
    parse = _parse_nrrd if name.lower().endswith((".nrrd", ".nhdr")) else _parse_metaimage
    header = parse(path, content)
    if header.data is not None:
        _check_detached(header, is_detached_allowed())
    if header.layers > 1 and not layered:
        raise ImageError(
            f"'{name}' has {header.layers} values per voxel (colour, several layers or time points); save a single one."
        )
    return header


def read_voxels(header: Header) -> NDArray[Any]:
    """The voxels of a file whose header was read.

    No more than the header states is unpacked, whatever the file holds.

    Returns:
        Shape `header.shape`, with the layers before it if there are several, in the type and byte order of the file.

    Raises:
        ImageError: if the file beside the header is a link or no plain file.
        ValueError: if there are fewer bytes than the header states, or they are damaged.
        OSError: if the file cannot be read.
    """
    shape = header.shape if header.layers == 1 else (header.layers, *header.shape)
    count = math.prod(shape)
    source = header.path if header.data is None else header.path.with_name(header.data)
    with closing(open_regular(source, follow=header.data is None)) as file:
        size = os.fstat(file.fileno()).st_size
        needed = count * header.dtype.itemsize
        if header.packing == "raw" and size - header.offset < needed:
            raise ValueError(
                f"its header states {needed} bytes of voxels, and {max(0, size - header.offset)} are there"
            )
        array = np.empty(count, dtype=header.dtype)
        file.seek(header.offset)
        target = array.view(np.uint8).data
        if header.packing == "raw":
            _fill(file, target)
        else:
            _inflate(file, target)
    return array.reshape(shape, order="F")


def _fill(file: IO[bytes], target: memoryview) -> None:
    place = 0
    while place < len(target):
        chunk = file.read(min(len(target) - place, 16 * _CHUNK))
        if not chunk:
            raise ValueError("it ends before its last voxel")
        target[place : place + len(chunk)] = chunk
        place += len(chunk)


def _inflate(file: IO[bytes], target: memoryview) -> None:
    """Unpack exactly as many bytes as there is room for, from zlib or gzip with any number of members."""
    place, unpacker, pending = 0, zlib.decompressobj(47), b""
    while place < len(target):
        if unpacker.eof:  # Another member follows.
            pending, unpacker = unpacker.unused_data, zlib.decompressobj(47)
        pending = pending or file.read(_CHUNK)
        if not pending:
            raise ValueError("its packed voxels end early")
        chunk = unpacker.decompress(pending, min(len(target) - place, 16 * _CHUNK))
        target[place : place + len(chunk)] = chunk
        place += len(chunk)
        pending = unpacker.unconsumed_tail
    if not unpacker.eof:
        unpacker.decompress(pending or file.read(64), 1)  # The checksum, if the stream ends here as it should.


def _check_detached(header: Header, allowed: bool) -> None:
    name = header.path.name
    if not name.lower().endswith(DETACHED_SUFFIXES):
        raise ImageError(
            f"'{name}' has its voxels in another file, and only its own bytes are read. Save it as one file: NRRD "
            "with the data attached, "
            "MetaImage as .mha, or NIfTI."
        )
    if not allowed:
        raise ImageError(
            f"'{name}' has its voxels in another file, and such files are not read here. Save it as one file "
            "(.nrrd, .mha or .nii.gz), or have an "
            "administrator start the server with --conf detached_data true."
        )
    if not _DATA_NAME.fullmatch(header.data or ""):
        raise ImageError(
            f"'{name}' has its voxels in '{(header.data or '')[:60]}', which is no plain name of a data file "
            "beside it. Give one .raw, .zraw, .gz, "
            ".img, .bin or .dat file in the same folder, or save it as one file (.nrrd, .mha)."
        )


# NRRD

_NRRD_MAGIC = re.compile(rb"NRRD000[1-5]\r?\n")
_NRRD_END = re.compile(rb"\r?\n\r?\n")
_NRRD_FIELDS = frozenset(
    {
        "axismaxs",
        "axismins",
        "blocksize",
        "byteskip",
        "centerings",
        "centers",
        "content",
        "dimension",
        "encoding",
        "endian",
        "kinds",
        "labels",
        "lineskip",
        "max",
        "measurementframe",
        "min",
        "number",
        "oldmax",
        "oldmin",
        "sampleunits",
        "sizes",
        "space",
        "spacedimension",
        "spacedirections",
        "spaceorigin",
        "spaceunits",
        "spacings",
        "thicknesses",
        "type",
        "units",
    }
)
"""Every field of the format, without spaces, but `data file`."""

_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
        "i8",
    ),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_NRRD_DOMAINS = ("domain", "space", "time", "???", "none")
_NRRD_SPACES = {  # To RAS; an unknown space of three axes counts as LPS, as in ITK.
    **dict.fromkeys(("right-anterior-superior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1.0, 1.0, 1.0)),
    **dict.fromkeys(
        ("left-posterior-superior", "lps", "scanner-xyz", "3d-right-handed", "3d-left-handed"), (-1.0, -1.0, 1.0)
    ),
}
_VECTOR = re.compile(r"\(([^()]*)\)|none", re.IGNORECASE)


def _parse_nrrd(path: Path, content: bytes) -> Header:
    start = _NRRD_MAGIC.match(content)
    if start is None:
        raise ValueError("it does not begin as NRRD does, with NRRD0001 to NRRD0005")
    end = _NRRD_END.search(content, start.end() - 1)
    if end is None and (len(content) >= MAX_HEADER_BYTES or not path.name.lower().endswith(".nhdr")):
        raise ValueError(f"its header has no end within {min(len(content), MAX_HEADER_BYTES)} bytes")
    fields, pairs = _read_nrrd_fields(path, content[start.end() : end.start() if end is not None else None])
    shape, affine, layers = _find_nrrd_grid(path, fields)
    packing = _pick({"raw": "raw", "gzip": "deflate", "gz": "deflate"}, fields, "encoding", path)
    dtype = np.dtype(_pick(_NRRD_TYPES, fields, "type", path))
    if dtype.itemsize > 1:
        dtype = dtype.newbyteorder(_pick({"little": "<", "big": ">"}, fields, "endian", path))
    offset = end.end() if end is not None else len(content)
    data = fields.get("datafile")
    return Header(
        path,
        shape,
        affine,
        dtype,
        "raw" if packing == "raw" else "deflate",
        data,
        0 if data is not None else offset,
        layers,
        pairs,
    )


def _read_nrrd_fields(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """Fields, and key/value pairs."""
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for line in _split_lines(text):
        name, colon, value = line.partition(":")
        field = "".join(name.split()).lower()
        if line.startswith("#") or not line.strip():
            continue
        if colon and not value.startswith("=") and field in ("datafile", *_NRRD_FIELDS):
            if field in fields:
                raise ValueError(f"its header has the field '{name.strip()[:40]}' twice")
            fields[field] = value.strip()
            continue
        key, is_pair, said = line.partition(":=")
        if not is_pair:
            raise ValueError(f"its header has a line '{line[:40]}', which is no field of the format")
        pairs[key.strip()] = re.sub(r"\\([\\n])", lambda match: "\n" if match[1] == "n" else "\\", said)
    if any(int(fields.get(field, "0") or 0) for field in ("lineskip", "byteskip")):
        raise ImageError(
            f"'{path.name}' skips lines or bytes before its voxels, which is not read here. Save it again with the "
            "data attached."
        )
    return fields, pairs


def _find_nrrd_grid(path: Path, fields: Mapping[str, str]) -> tuple[tuple[int, ...], Affine, int]:
    """Shape and affine, without axes that are no place, and how many values a voxel has."""
    sizes = _read_sizes(fields.get("sizes", ""))
    if fields.get("dimension") != str(len(sizes)):
        raise ValueError(f"its header states {fields.get('dimension', 'no')[:20]} dimensions and {len(sizes)} sizes")
    has_space = "space" in fields or "spacedimension" in fields
    vectors = _read_vectors(fields["spacedirections"], len(sizes)) if "spacedirections" in fields else None
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * len(sizes)
    if len(kinds) != len(sizes):
        raise ValueError(f"its header gives {len(kinds)} kinds for {len(sizes)} axes")
    placed = [
        axis
        for axis in range(len(sizes))
        if kinds[axis] in _NRRD_DOMAINS and (vectors is None or vectors[axis] is not None)
    ]
    values = [sizes[axis] for axis in range(len(sizes)) if axis not in placed]
    if math.prod(values) > 1 and (0 in placed or math.prod(values) != sizes[0]):
        raise ImageError(
            f"'{path.name}' has {math.prod(values)} values per voxel (colour, several layers or time points); save "
            "a single one."
        )
    affine = np.eye(4)
    if has_space:
        signs = np.array(_find_nrrd_space(fields, path))
        for column, axis in enumerate(placed[:3]):
            vector = vectors[axis] if vectors is not None else None
            affine[:3, column] = LPS_TO_RAS[:3, column] if vector is None else signs * vector
        origin = _read_vectors(fields.get("spaceorigin", "(0,0,0)"), 1)[0]
        affine[:3, 3] = signs * (np.zeros(3) if origin is None else origin)
    else:
        if any(
            not math.isnan(value)
            for field in ("axismins", "axismaxs")
            for value in _read_numbers(fields.get(field, ""))
        ):
            raise ImageError(
                f"'{path.name}' gives its place by axis minima, which viewers read in different ways. Save it with "
                "a space, directions and an origin."
            )
        spacings = _read_numbers(fields.get("spacings", "")) or [math.nan] * len(sizes)
        if len(spacings) != len(sizes):
            raise ValueError(f"its header gives {len(spacings)} spacings for {len(sizes)} axes")
        for column, axis in enumerate(placed[:3]):
            affine[column, column] = 1.0 if math.isnan(spacings[axis]) else spacings[axis]
        affine = LPS_TO_RAS @ affine
    return tuple(sizes[axis] for axis in placed), affine, math.prod(values)


def _find_nrrd_space(fields: Mapping[str, str], path: Path) -> tuple[float, float, float]:
    space = fields.get("space", "lps").lower()
    if space not in _NRRD_SPACES or fields.get("spacedimension", "3") != "3":
        raise ImageError(
            f"'{path.name}' lies in the space '{space[:40]}', which is not read here. Save it in one of three "
            "axes, for example "
            "left-posterior-superior."
        )
    return _NRRD_SPACES[space]


def _read_vectors(text: str, count: int) -> list[NDArray[np.float64] | None]:
    """`count` vectors of three finite numbers, or `none`."""
    vectors: list[NDArray[np.float64] | None] = []
    for match in _VECTOR.finditer(text):
        numbers = None if match.group(1) is None else _read_numbers(match.group(1).replace(",", " "))
        if numbers is not None and (len(numbers) != 3 or not all(map(math.isfinite, numbers))):
            raise ValueError(
                f"its header has a direction or origin '{match.group()[:40]}', which is no vector of three numbers"
            )
        vectors.append(None if numbers is None else np.array(numbers))
    if len(vectors) != count or _VECTOR.sub("", text).strip():
        raise ValueError(f"its header has directions or an origin '{text[:60]}'; {count} vectors are needed")
    return vectors


# MetaImage

_META_END = re.compile(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*([^\r\n]*)(\r?\n|\Z)", re.MULTILINE)
_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_META_FIELDS = {
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Position": "Offset",
    "Origin": "Offset",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
"""Other names of a field -> the one used here."""
_META_FLAGS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _parse_metaimage(path: Path, content: bytes) -> Header:
    end = _META_END.search(content)
    if end is None:
        raise ValueError(f"its first {len(content)} bytes are no MetaImage header, which ends with ElementDataFile")
    fields: dict[str, str] = {}
    for line in _split_lines(content[: end.start()]):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals and line.strip():
            raise ValueError(f"its header has a line '{line[:40]}', which is no field of the format")
        field = _META_FIELDS.get(name, name)
        if field and field in fields:
            raise ValueError(f"its header has the field '{name[:40]}' twice")
        fields[field] = value
    if fields.get("ObjectType", "Image").lower() != "image":
        raise ImageError(f"'{path.name}' is a MetaIO {fields['ObjectType'][:30]} and no image; save it as an image.")
    if fields.get("HeaderSize", "0") != "0":
        raise ImageError(
            f"'{path.name}' skips bytes before its voxels (HeaderSize), which is not read here. Save it again as .mha."
        )
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise ImageError(
            f"'{path.name}' has {fields['ElementNumberOfChannels'][:10]} values per voxel (colour, several layers "
            "or time points); save a single one."
        )
    if not _pick(_META_FLAGS, {"BinaryData": "True", **fields}, "BinaryData", path):
        raise ImageError(f"The voxels of '{path.name}' are text, which is not read here. Save it in binary.")
    shape, affine = _find_meta_grid(fields)
    dtype = np.dtype(_pick(_META_TYPES, fields, "ElementType", path))
    is_big = _pick(_META_FLAGS, {"BinaryDataByteOrderMSB": "False", **fields}, "BinaryDataByteOrderMSB", path)
    is_packed = _pick(_META_FLAGS, {"CompressedData": "False", **fields}, "CompressedData", path)
    place = end.group(1).decode("utf-8", errors="replace").strip()
    data = None if place in ("LOCAL", "Local", "local") else place
    if data is None and not end.group(2):
        raise ValueError("it ends with its header")
    offset = end.end() if data is None else 0
    return Header(
        path,
        shape,
        affine,
        dtype.newbyteorder(">" if is_big else "<"),
        "deflate" if is_packed else "raw",
        data,
        offset,
    )


def _find_meta_grid(fields: Mapping[str, str]) -> tuple[tuple[int, ...], Affine]:
    sizes = _read_sizes(fields.get("DimSize", ""))
    rank = len(sizes)
    if fields.get("NDims") != str(rank):
        raise ValueError(f"its header states {fields.get('NDims', 'no')[:20]} dimensions and {rank} sizes")

    def read(field: str, default: list[float]) -> NDArray[np.float64]:
        numbers = _read_numbers(fields[field]) if field in fields else default
        if len(numbers) != len(default) or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"its header gives {len(numbers)} numbers as {field}; {len(default)} finite ones are needed"
            )
        return np.array(numbers)

    spacing = read("ElementSpacing" if "ElementSpacing" in fields else "ElementSize", [1.0] * rank)
    directions = read("TransformMatrix", np.eye(rank).ravel().tolist()).reshape(rank, rank)
    count = min(rank, 3)
    affine = np.eye(4)
    affine[:count, :count] = (directions.T * spacing)[:count, :count]
    affine[:count, 3] = read("Offset", [0.0] * rank)[:count]
    return sizes, LPS_TO_RAS @ affine


# Both


def _split_lines(text: bytes) -> list[str]:
    """The lines of a header, without anything that another reader might take for the end of a line or of the text."""
    text = text.replace(b"\r\n", b"\n")
    if re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", text):
        raise ValueError("its header holds bytes that are no text")
    return text.decode("utf-8", errors="replace").split("\n")


def _pick(table: Mapping[str, T], fields: Mapping[str, str], field: str, path: Path) -> T:
    given = " ".join(fields.get(field, "").split())
    for name, value in table.items():
        if name.lower() == given.lower():
            return value
    raise ImageError(
        f"'{path.name}' has the {field} '{given[:40]}', which is not read here; it must be one of "
        f"{', '.join(table)}. Save it again that way."
    )


def _read_sizes(text: str) -> tuple[int, ...]:
    words = text.split()
    if not 1 <= len(words) <= MAX_AXES or not all(re.fullmatch(r"[0-9]{1,10}", word) and int(word) for word in words):
        raise ValueError(f"its header gives '{text[:40]}' as sizes; 1 to {MAX_AXES} whole numbers from 1 are needed")
    return tuple(map(int, words))


def _read_numbers(text: str) -> list[float]:
    if len(text) > 4096:
        raise ValueError(f"its header has {len(text)} characters where a few numbers are needed")
    return [float(word) for word in text.split()]
