"""Damaged files of every format, JSON and parameters, from a seed; and trying files out in a confined process."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from PIL import Image

from progidiff.dicomweb.segmentation import open_instance
from progidiff.errors import ProGiDiffError
from progidiff.images.archives import Limits, extract_archive
from progidiff.images.geometry import Grid
from progidiff.images.pictures import check_picture, read_pixels
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.labels.segments import load_label_map, read_names

SHAPE = (8, 7, 4)
CANARY = "canary-secret.txt"

NUMBERS = ["0", "-1", "1", "2", "7", "255", "65536", "2147483647", "2147483648", "4294967295", "9223372036854775807"]
NUMBERS += ["1e308", "-1e7", "nan", "inf", "0.0000001", "99999999999999999999", "1" * 400, "0x10", "", " ", "1,5"]
TEXTS = ["'", '"', "\\", "\0", "\n", "\r\n\r\n", "../..", "/etc/passwd", "%s%n", "\ud800", "é" * 40, "=1+1", "x" * 5000]
TEXTS += [
    "LIST",
    "LOCAL",
    "data file: ",
    "ElementDataFile = ",
    "gzip",
    "raw",
    "ascii",
    "none",
    "(1,0,0)",
    "True",
    "\ufeff",
]


def make_samples(canary: str) -> dict[str, bytes]:
    """Suffix -> a small good file, and headers that name another file."""
    voxels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    image = nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
    samples = {".nii": image.to_bytes(), ".nii.gz": gzip.compress(image.to_bytes())}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".nrrd", ".mha", ".dcm"):
            path = str(Path(folder) / f"x{suffix}")
            stack = sitk.GetImageFromArray(voxels.T)
            sitk.WriteImage(stack[:, :, :1] if suffix == ".dcm" else stack, path)
            samples[suffix] = Path(path).read_bytes()
    text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 8 7 4\nspace: LPS\nendian: little\nencoding: raw\n"
    text += "space directions: (2,0,0) (0,2,0) (0,0,3)\nspace origin: (0,0,0)\nSegment0_Name:=liver\n"
    text += (
        "Segment0_LabelValue:=1\nSegment0_Layer:=0\nSegment0_Tags:=TerminologyEntry:a~SCT^1^b~SCT^10200004^Liver~^^\n"
    )
    samples[".seg.nrrd"] = text.encode() + b"\n" + voxels.T.tobytes()
    samples["-beside.nrrd"] = f"{text}data file: {canary}\n\n".encode()
    meta = "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 8 7 4\nElementType = MET_SHORT\n"
    samples["-beside.mha"] = f"{meta}ElementDataFile = {canary}\n".encode()
    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG"), (".tif", "TIFF")):
        target = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(target, kind)
        samples[suffix] = target.getvalue()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/b.nii", samples[".nii"])
    samples[".zip"] = target.getvalue()
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("é" * 120)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"abcd"))
    samples[".tar.gz"] = target.getvalue()
    return samples


def damage(content: bytes, chance: random.Random) -> bytes:
    """One to six changes: mostly in the header, where they matter most."""
    is_packed = content[:2] == b"\x1f\x8b" and chance.random() < 0.8
    data = bytearray(gzip.decompress(content) if is_packed else content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(min(len(data), 600) if chance.random() < 0.8 else len(data)) if data else 0
        kind = chance.randrange(8)
        if kind == 0 and data:
            data[place] = chance.randrange(256)
        elif kind == 1:
            data[place : place + 4] = chance.randbytes(4)
        elif kind == 2:
            del data[place : place + chance.choice((1, 2, 4, 100, len(data)))]
        elif kind == 3:
            data[place:place] = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif kind == 4:
            number = chance.choice(NUMBERS).encode()
            data[place : place + len(number)] = number
        elif kind == 5:
            data[place:place] = data[place : place + chance.choice((8, 80, 348))]
        elif kind == 6:
            data[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        else:
            lines = bytes(data).split(b"\n")
            chance.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return gzip.compress(bytes(data), 1) if is_packed else bytes(data)


def damage_json(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """Another value of JSON, near the one given."""
    kind = chance.randrange(12)
    if kind < 2:
        return chance.choice((None, True, False, 0, -1, 1.5, 1e308, 2**63, 10**400, "", [], {}, [[]], {"a": None}))
    if kind == 2:
        return chance.choice(TEXTS)
    if kind == 3 and depth == 0:
        nested: Any = value
        for _ in range(chance.choice((2, 40, 400))):
            nested = [nested]
        return nested
    if isinstance(value, dict):
        changed = {
            name: damage_json(entry, chance, depth + 1) if chance.random() < 0.4 else entry
            for name, entry in value.items()
        }
        if chance.random() < 0.2:
            changed[chance.choice(TEXTS)] = chance.choice(TEXTS)
        return changed
    if isinstance(value, list):
        return [damage_json(entry, chance, depth + 1) for entry in value] * chance.choice((0, 1, 2, 30))
    return chance.choice((value, str(value), [value]))


def write_json(value: Any, chance: random.Random) -> str:
    """As text, sometimes with a flaw."""
    text = json.dumps(value)
    if chance.random() < 0.2:
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(("", "NaN", "}", '"', "\\ud800", "1" * 500, "[" * 200)) + text[place + 1 :]
    return text


_outside: list[str] = []


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith("/"):
        _outside.append(arguments[0])


def _list_readers(suffix: str, path: Path, content: bytes, like: Grid, target: Path) -> list[Callable[[], object]]:
    """What reads a file of such a name."""
    if suffix in (".png", ".jpg", ".tif"):
        return [partial(read_pixels, path), partial(check_picture, path), partial(load_label, path)]
    if suffix == ".dcm":
        return [partial(load_volume, path), partial(open_instance, content)]
    if suffix in (".zip", ".tar.gz"):
        target.mkdir(exist_ok=True)
        return [partial(extract_archive, path, target, Limits(50, 1 << 20))]
    volumes = [partial(load_volume, path), partial(load_label, path), partial(read_grid, path)]
    return [*volumes, partial(load_label_map, path, like), partial(read_names, path)]


def try_files(samples: dict[str, bytes], seed: int, count: int) -> dict[str, list[str]]:
    """Damage files and read them, in a process that is confined already.

    Returns:
        "unexpected" errors, and "opened" paths outside of the own folder.
    """
    sys.addaudithook(_note)
    chance = random.Random(seed)
    own, like = str(Path.cwd()), Grid(SHAPE, np.diag([2.0, 2.0, 3.0, 1.0]))
    target = Path("unpacked").absolute()
    unexpected: list[str] = []
    for number in range(count):
        suffix = chance.choice(sorted(samples))
        path = Path(f"x{suffix}").absolute()
        content = damage(samples[suffix], chance)
        path.write_bytes(content)
        for reader in _list_readers(suffix, path, content, like, target):
            try:
                reader()
            except ProGiDiffError as err:
                if len(str(err)) < 10:
                    unexpected.append(f"seed {seed}, try {number}, {suffix}: an error without a reason, {err!r}")
            except MemoryError:
                continue  # The parent says what that means.
            except Exception as err:
                unexpected.append(f"seed {seed}, try {number}, {suffix}: {type(err).__name__}: {err}"[:300])
        path.unlink(missing_ok=True)
        for left in target.rglob("*") if target.exists() else ():
            if left.is_file():
                left.unlink()
    opened = sorted({name for name in _outside if not os.path.realpath(name).startswith(own) and name != os.devnull})
    return {"unexpected": unexpected, "opened": opened[:20]}
