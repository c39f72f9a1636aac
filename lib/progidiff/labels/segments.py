"""What a label file itself says of its numbers, and a file of several layers as one label map.

Formats that name their numbers: NRRD segmentations of 3D Slicer (``Segment0_Name``, ``_LabelValue``, ``_Layer``, and
codes in ``_Tags``) and NIfTI with a label table, as TotalSegmentator writes it. Whatever is written elsewhere about a
file, its own header is right about it.

A label map holds one structure per voxel. Where segments of several layers overlap, the one that comes last in the list
is kept, as in 3D Slicer's own export to a label map, and a note says where.
"""

from __future__ import annotations

import html
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import GeometryError, ImageError, NotFoundError
from progidiff.images.decoding import apart, is_apart
from progidiff.images.geometry import Grid, times
from progidiff.images.known_files import KnownFiles
from progidiff.images.layers import read_layers
from progidiff.images.nifti import open_nifti
from progidiff.images.raw import MAX_HEADER_BYTES
from progidiff.images.reading import DECODED_PER_VOXEL, load_label, read_grid
from progidiff.images.text_headers import read_header
from progidiff.prompts.parser import canonical_name, contradicts
from progidiff.prompts.structures import UNKNOWN, Code, find_coded

logger = logging.getLogger(__name__)

MAX_NAME = 100
"""Characters of a structure's name."""

_UNNAMED = re.compile(r"(segment(ation)?|label|unnamed|unknown)?[\s_.#-]*\d*", re.IGNORECASE)
_FIELD = re.compile(r"Segment(\d{1,5})_(Name|LabelValue|Layer|Tags|Color)")
_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_TABLE_ROW = re.compile(
    r'<Label\s[^>]*?Key="(\d{1,9})"[^>]*>\s*(?:<!\[CDATA\[(.*?)\]\]>|([^<]*))\s*</Label>', re.DOTALL
)

_known_names: KnownFiles[dict[int, str]] = KnownFiles()


@dataclass(frozen=True)
class Look:
    """How a segment looks and is coded, as a file or a client says.

    Attributes:
        color: "#rrggbb"; None if it says none.
        code: SNOMED CT; None if it says none, or one that says nothing.
    """

    color: str | None = None
    code: Code | None = None


@dataclass(frozen=True)
class LabelMap:
    """A label file, read.

    Attributes:
        array: Ids, shape (I, J, K) in file order, in the smallest unsigned integer type that holds them.
        names: Id -> name, as the file says; empty if it says nothing.
        is_as_stored: Whether the ids are the numbers in the file; False if several layers were joined.
        notes: Sentences for the person whose file it is.
        looks: Id -> look, of those that the file names.
    """

    array: NDArray[Any]
    names: dict[int, str]
    is_as_stored: bool = True
    notes: tuple[str, ...] = ()
    looks: Mapping[int, Look] = field(default_factory=dict)


@dataclass(frozen=True)
class _Segment:
    """One segment of a header: name, the structures that its codes can mean, number, layer, and look."""

    name: str
    coded: tuple[str, ...]
    value: int
    layer: int
    look: Look = Look()


@dataclass(frozen=True)
class _Header:
    """Segments in the order of their list, and layers; 1 if there is one value per voxel."""

    segments: tuple[_Segment, ...]
    layers: int

    @property
    def is_numbered(self) -> bool:
        """Whether a number in the file means one segment, whatever the layer."""
        return self.layers == 1 or len({segment.value for segment in self.segments}) == len(self.segments)

    def numbered(self) -> dict[int, _Segment]:
        """Id -> segment: the file's numbers, or places in the list from 1 where layers give a number twice."""
        if self.is_numbered:
            return {segment.value: segment for segment in self.segments}
        return dict(enumerate(self.segments, start=1))


def is_unnamed(name: str) -> bool:
    """Whether a name says nothing about what is drawn, as viewers give it to a new segment.

    Example:
        >>> is_unnamed("Segment_1"), is_unnamed("label 3"), is_unnamed("segment of the liver")
        (True, True, False)
    """
    return _UNNAMED.fullmatch(name.strip()) is not None


def read_names(path: str | os.PathLike[str]) -> dict[int, str]:
    """Id -> name as a label file itself says, from its header alone; empty if it says nothing.

    The ids are those of `load_label_map`. A name of the table of structures is given as there; one that says nothing
    (see `is_unnamed`) stays as it is.

    Raises:
        ImageError: if the header names a segment as one structure and codes it as another.
    """
    path = Path(path)
    if not path.exists():
        return {}
    read = partial(apart(_read_names, reads=[path]), path)
    try:
        return dict(_known_names.find(path, read)) if is_apart() else read()
    except OSError as err:
        raise ImageError(f"'{path.name}' cannot be opened ({err.strerror}). Check who may read it.") from err


def _read_names(path: Path) -> dict[int, str]:
    return _name(_read_header(path), path)


def find_names(path: str | os.PathLike[str]) -> dict[int, str]:
    """As `read_names`, of a label that is in force already: one that contradicts itself says nothing, with a line in
    the log, so that it can still be replaced.
    """
    try:
        return read_names(path)
    except ImageError as err:
        logger.warning("%s", err)
        return {}


def combine_names(own: Mapping[int, str], told: Mapping[int, str]) -> dict[int, str]:
    """Id -> name: of the file itself, and what is said elsewhere of ids that it does not name, or not telling.

    Example:
        >>> combine_names({1: "liver", 2: "Segment_2"}, {1: "spleen", 2: "tumour", 3: "cyst"})
        {1: 'liver', 2: 'tumour', 3: 'cyst'}
    """
    return {**told, **{value: name for value, name in own.items() if value not in told or not is_unnamed(name)}}


def load_label_map(path: str | os.PathLike[str], like: Grid) -> LabelMap:
    """Read a label file, as `images.load_label` does, with what it says of its ids; several layers become one map.

    Args:
        path: Of a label.
        like: The grid of its image, which it must share.

    Raises:
        NotFoundError, ImageError, GeometryError: as `load_label`, and `read_names`.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"There is no label at '{path}'. Check the path.")
    decoded = DECODED_PER_VOXEL * math.prod(like.shape)
    return apart(_load_label_map, reads=[path], decoded=decoded)(path, like)


def _load_label_map(path: Path, like: Grid) -> LabelMap:
    header = _read_header(path)
    names = _name(header, path)
    looks = {value: segment.look for value, segment in header.numbered().items() if segment.look != Look()}
    shape = read_grid(path).shape
    if shape != like.shape:  # Said by the header, before a voxel is read: a few kilobytes can unpack to any size.
        raise GeometryError(
            f"The label has {times(shape)} voxels and the image {times(like.shape)} ('{like.name}'); resample it "
            "to the image's grid, or save it uncropped."
        )
    if header.layers == 1:
        array = load_label(path, like=like)
        if _is_nifti(path):  # Its table names what the program knows, drawn or not.
            present = set(np.unique(array).tolist()) if names else set()
            names = {value: name for value, name in names.items() if value in present}
        return LabelMap(array, names, looks=looks)
    array, notes = _join_layers(read_layers(path, like), header)
    return LabelMap(array, names, False, tuple(notes), looks)


def _join_layers(layers: NDArray[Any], header: _Header) -> tuple[NDArray[Any], list[str]]:
    """(L, I, J, K) as one map, and a sentence for each pair of segments that overlap."""
    numbered = header.numbered()
    labels = np.zeros(layers.shape[1:], dtype=np.min_scalar_type(max([0, *numbered])))
    overlaps: dict[tuple[int, int], int] = {}
    for number, segment in numbered.items():
        if segment.layer >= len(layers):
            raise ImageError(
                f"Segment '{segment.name[:40]}' lies in layer {segment.layer}, and the file has {len(layers)}. Save "
                "it again."
            )
        drawn = layers[segment.layer] == segment.value
        covered = labels[drawn]
        for other in np.unique(covered[covered != 0]):
            overlaps[int(other), number] = int((covered == other).sum())
        labels[drawn] = number
    stray = sum(
        int(value) not in {segment.value for segment in header.segments if segment.layer == layer} | {0}
        for layer, array in enumerate(layers)
        for value in np.unique(array)
    )
    if stray:
        raise ImageError("The file holds numbers that none of its segments has. Save the segmentation again.")
    told = [
        f"'{numbered[upper].name}' lies over '{numbered[lower].name}' in {count} voxels; a label holds one structure "
        f"per voxel, and '{numbered[upper].name}', which comes later in the list, is kept there."
        for (lower, upper), count in overlaps.items()
    ]
    return labels, told


def _name(header: _Header, path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, segment in header.numbered().items():
        if number == 0:
            continue
        if is_unnamed(segment.name):
            meaning = "" if segment.look.code is None else segment.look.code.meaning
            said = segment.coded[0] if len(segment.coded) == 1 else meaning
            names[number] = said or segment.name or f"Segment_{number}"
            continue
        if contradicts(segment.name, segment.coded):
            raise ImageError(
                f"'{path.name}' calls a segment '{segment.name[:40]}' and codes it as '{' or '.join(segment.coded)}'. "
                "Correct its name or its terminology in the viewer, and save it again."
            )
        names[number] = canonical_name(segment.name)
    return names


def _read_header(path: Path) -> _Header:
    if path.name.lower().endswith(".nrrd"):
        return _read_nrrd(path)
    if _is_nifti(path):
        return _read_nifti(path)
    return _Header((), 1)


def _read_nrrd(path: Path) -> _Header:
    try:
        header = read_header(path, layered=True)
    except (OSError, ValueError):
        return _Header((), 1)  # Whoever reads the voxels says why.
    layers, pairs = header.layers, header.pairs
    found: dict[int, dict[str, str]] = {}
    for key, value in pairs.items():
        match = _FIELD.fullmatch(key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value
    if layers > 1 and not found:
        raise ImageError(
            f"'{path.name}' has {layers} values per voxel and names no segments; save a single layer, or a "
            "segmentation of 3D Slicer (.seg.nrrd)."
        )
    segments = []
    for index, entry in sorted(found.items()):
        # 3D Slicer before 4.11 wrote one layer of zeros and ones per segment, and neither number nor layer.
        value, layer = entry.get("LabelValue", "1"), entry.get("Layer", str(index) if layers > 1 else "0")
        if value.isdecimal() and layer.isdecimal():
            kind, modifier = _read_tags(entry.get("Tags", ""))
            coded = () if kind is None else find_coded(kind.value, modifier)
            look = Look(read_color(entry.get("Color", "").split()), None if coded else name_code(kind))
            segments.append(_Segment(clean_text(entry.get("Name", "")), coded, int(value), int(layer), look))
    if layers == 1 and len({segment.value for segment in segments}) < len(segments):
        return _Header((), 1)  # Two names for one number say nothing.
    return _Header(tuple(segments), layers)


def _read_tags(tags: str) -> tuple[Code | None, str]:
    """The code of a segment's type, and the value of its modifier; None and "" where its terminology says none.

    ``TerminologyEntry:<context>~<category>~<type>~<modifier>~...``, each code as ``<scheme>^<value>^<meaning>``.
    """
    entry = next((tag for tag in tags.split("|") if tag.startswith("TerminologyEntry:")), "")
    parts = [part.split("^") for part in entry.partition(":")[2].split("~")]
    if len(parts) < 4 or len(parts[2]) < 2 or parts[2][0] != "SCT":
        return None, ""
    kind = Code(parts[2][1], clean_text(parts[2][2]) if len(parts[2]) > 2 else "")
    return kind, parts[3][1] if len(parts[3]) > 1 else ""


_SAYS_NOTHING = {UNKNOWN.value, "85756007", "123037004", "113343008", "49755003"}
"""Types that every segment may have: anatomical structure, tissue, organ, altered structure."""


def name_code(code: Code | None) -> Code | None:
    """A code that says what is drawn; None if it says nothing, as the tissue that Slicer gives to a new segment.

    Example:
        >>> name_code(Code("80891009", "Heart")).meaning, name_code(Code("85756007", "Tissue"))
        ('Heart', None)
    """
    return None if code is None or code.scheme != "SCT" or code.value in _SAYS_NOTHING else code


def read_color(value: object) -> str | None:
    """A colour as viewers send it, as "#rrggbb"; None if it is none.

    Args:
        value: "#rrggbb", or three numbers: shares from 0 to 1, or 0 to 255 if one is above 1; text of numbers too, and
            what follows them (opacity) is passed over.

    Example:
        >>> read_color([1.0, 0.5, 0.0]), read_color((255, 128, 0, 255)), read_color("#FF8000"), read_color("red")
        ('#ff8000', '#ff8000', '#ff8000', None)
    """
    if isinstance(value, str):
        return value.lower() if _COLOR.fullmatch(value) else None
    if not isinstance(value, (list, tuple)) or len(value) < 3 or any(isinstance(part, bool) for part in value):
        return None
    try:
        parts = [float(part) for part in value[:3]]
    except (TypeError, ValueError):
        return None
    if not all(0 <= part <= 255 for part in parts):
        return None
    scale = 1 if max(parts) > 1 else 255
    return "#" + "".join(f"{round(part * scale):02x}" for part in parts)


def _read_nifti(path: Path) -> _Header:
    """The label table in a header extension."""
    try:
        extensions = open_nifti(path).header.extensions
    except Exception:  # Whatever the decoder raises on bytes that somebody sent: whoever reads the voxels says why.
        return _Header((), 1)  # Whoever reads the voxels says why.
    rows: Mapping[int, str] = {}
    for extension in extensions:
        content = extension.get_content()
        text = content.decode("utf-8", errors="replace") if isinstance(content, bytes) else str(content)
        if "LabelTable" in text and len(text) <= MAX_HEADER_BYTES:
            rows = {int(key): html.unescape(plain) or cdata for key, cdata, plain in _TABLE_ROW.findall(text)}
    segments = [_Segment(clean_text(name), (), value, 0) for value, name in rows.items() if value and name.strip()]
    return _Header(tuple(segments), 1)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def clean_text(name: str) -> str:
    """One line of printable characters, as many as a name may have."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())[:MAX_NAME]
