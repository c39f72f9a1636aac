"""NRRD and MetaImage headers: the geometry is ITK's, and no header makes anything else be opened."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import ImageError, ProGiDiffError
from progidiff.images import text_headers
from progidiff.images.pictures import check_picture, read_picture_label
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.textdiff.pictures import read_picture

VOXELS = np.arange(24, dtype="<i2")
SECRET = b"root:x:0:0:root:/root:/bin/bash and the key of the session" * 4
SPACE = "space: LPS\nspace directions: (1,0,0.5) (0,2,0) (0.25,0,3)\nspace origin: (10,20,30)\n"


def nrrd(
    body: str = "", data: bytes = VOXELS.tobytes(), encoding: str = "raw", sizes: str = "4 3 2", type: str = "short"
) -> bytes:
    rank = len(sizes.split())
    return (
        f"NRRD0004\ntype: {type}\ndimension: {rank}\nsizes: {sizes}\nendian: little\n".encode()
        + f"encoding: {encoding}\n{body}\n".encode()
        + data
    )


def mha(
    body: str = "",
    data: bytes = VOXELS.tobytes(),
    place: str = "LOCAL",
    sizes: str = "4 3 2",
    type: str = "MET_SHORT",
) -> bytes:
    header = (
        f"ObjectType = Image\nNDims = {len(sizes.split())}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{body}"
    )
    return f"{header}DimSize = {sizes}\nElementType = {type}\nElementDataFile = {place}\n".encode() + data


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROGIDIFF_DETACHED_DATA", raising=False)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.raw"
    path.write_bytes(SECRET)
    return path


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that Python opens; what ITK opens is seen by the bytes that come back."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def read_both(path: Path) -> None:
    read_grid(path)
    load_label(path)


ELSEWHERE: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "a file": (".nrrd", lambda name: nrrd(f"data file: {name}\n")),
    "a file, in one word": (".nrrd", lambda name: nrrd(f"datafile: {name}\n")),
    "a file, shouted": (".nrrd", lambda name: nrrd(f"DATA FILE: {name}\n")),
    "a file, without a space": (".nrrd", lambda name: nrrd(f"data file:{name}\n")),
    "a file, instead of data": (".nrrd", lambda name: nrrd(f"data file: {name}\n", b"")),
    "a list": (".nrrd", lambda name: nrrd(f"data file: LIST\n{name}\n", b"")),
    "a pattern": (".nrrd", lambda name: nrrd(f"data file: {name}%03d 1 2 1 2\n", b"")),
    "a file of a segmentation": (".seg.nrrd", lambda name: nrrd(f"data file: {name}\n")),
    "a file and Windows lines": (".nrrd", lambda name: nrrd(f"data file: {name}\n").replace(b"\n", b"\r\n", 8)),
    "a file behind a lone carriage return": (".nrrd", lambda name: nrrd(f"# a\rdata file: {name}\n")),
    "a file behind a null": (".nrrd", lambda name: nrrd(f"# a\0data file: {name}\n")),
    "skipped bytes": (".nrrd", lambda name: nrrd("byte skip: 20\n")),
    "bytes from the end": (".nrrd", lambda name: nrrd("byte skip: -1\n")),
    "skipped lines": (".nrrd", lambda name: nrrd("line skip: 2\n")),
    "a detached header": (".nhdr", lambda name: nrrd(f"data file: {name}\n", b"")),
    "a MetaImage file": (".mha", lambda name: mha(place=name)),
    "a MetaImage list": (".mha", lambda name: mha(place="LIST", data=f"{name}\n".encode())),
    "a MetaImage list of slices": (".mha", lambda name: mha(place="LIST 2", data=f"{name}\n".encode())),
    "a MetaImage pattern": (".mha", lambda name: mha(place=f"{name}%03d 1 2 1")),
    "a detached MetaImage": (".mhd", lambda name: mha(place=name)),
    "a MetaImage header size": (".mha", lambda name: mha("HeaderSize = -1\n")),
    "a second place after a long value": (
        ".mha",
        lambda name: mha(f"Comment = {'x' * 1200}ElementDataFile = {name}\n", b""),
    ),
    "a place swallowed by numbers": (
        ".mha",
        lambda name: mha("Offset = 1\n", f"ElementDataFile = {name}\n".encode()),
    ),
    "MetaImage named as NRRD": (".nrrd", lambda name: mha(place=name)),
    "NRRD named as MetaImage": (".mha", lambda name: nrrd(f"data file: {name}\n")),
    "NRRD named as NIfTI": (".nii", lambda name: nrrd(f"data file: {name}\n")),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_header_that_names_another_place_is_refused_and_nothing_there_is_opened(
    secret: Path, opened: list[str], tmp_path: Path, kind: str
):
    suffix, make = ELSEWHERE[kind]
    path = tmp_path / f"image{suffix}"
    for name in (str(secret), secret.name):
        path.write_bytes(make(name))
        with pytest.raises(ImageError, match=r"image.*[A-Za-z].*\.") as refused:
            read_both(path)
        assert "root:x" not in str(refused.value)
        with pytest.raises(ImageError):
            load_volume(path)
    assert not [name for name in opened if "secret" in name]


def test_a_second_data_file_behind_the_header_is_only_voxels(tmp_path: Path):
    """MetaIO goes on reading the header where ours has ended, if it lost count before."""
    path = tmp_path / "image.mha"
    data = b"ElementDataFile = /etc/passwd\n".ljust(48, b"\n")
    path.write_bytes(mha(data=data))
    assert load_label(path).tobytes(order="F") == data


@pytest.mark.parametrize("allowed", [False, True], ids=["not-allowed", "allowed"])
@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_data_beside_the_header_are_read_only_where_an_option_says_so(
    tmp_path: Path, suffix: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "voxels.raw").write_bytes(VOXELS.tobytes())
    path = tmp_path / f"image{suffix}"
    path.write_bytes(
        nrrd(SPACE + "data file: voxels.raw\n", b"") if suffix == ".nhdr" else mha(place="voxels.raw", data=b"")
    )
    if not allowed:
        with pytest.raises(ImageError, match="detached_data true"):
            load_volume(path)
    monkeypatch.setenv("PROGIDIFF_DETACHED_DATA", "0")  # Brought back after the test.
    text_headers.allow_detached(allowed)
    if allowed:
        assert load_volume(path).array.ravel(order="F").tolist() == VOXELS.tolist()
        attached = path.with_suffix(".nrrd" if suffix == ".nhdr" else ".mha")
        attached.write_bytes(path.read_bytes())
        with pytest.raises(ImageError, match="has its voxels in another file, and only its own bytes are read"):
            load_volume(attached)
    else:
        with pytest.raises(ImageError, match="such files are not read here"):
            load_volume(path)
    assert np.array_equal(load_volume(path, detached=True).array.ravel(order="F"), VOXELS)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.raw",
        "/etc/passwd",
        "sub/x.raw",
        "..",
        ".hidden.raw",
        "link.raw",
        "pipe.raw",
        "folder.raw",
        "meta.info",
        "x.raw\t",
    ],
)
def test_even_then_the_data_must_be_a_plain_file_beside_it(tmp_path: Path, secret: Path, name: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.raw").symlink_to(secret)
    (folder / "folder.raw").mkdir()
    (folder / ".hidden.raw").write_bytes(SECRET)
    (folder / "meta.info").write_bytes(SECRET)
    os.mkfifo(folder / "pipe.raw")
    for path, content in (
        (folder / "a.nhdr", nrrd(f"data file: {name}\n", b"")),
        (folder / "b.mhd", mha(place=name)),
    ):
        path.write_bytes(content)
        if name == "x.raw\t":
            continue
        with pytest.raises(ImageError):
            load_volume(path, detached=True)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".dcm", ".png", ".tif"])
def test_a_pipe_or_device_is_refused_at_once(tmp_path: Path, suffix: str):
    pipe, device = tmp_path / f"pipe{suffix}", tmp_path / f"device{suffix}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        for read in (load_volume, load_label, read_grid):
            with pytest.raises(ProGiDiffError):
                read(path)
        if suffix in (".png", ".tif"):
            for read in (read_picture, check_picture, read_picture_label):
                with pytest.raises(ImageError, match="no plain file"):
                    read(path)


def test_a_pipe_among_the_files_of_a_series_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "slice.dcm")
    with pytest.raises(ImageError, match="holds 'slice.dcm'"):
        load_volume(tmp_path)


def test_a_picture_is_only_taken_for_png_jpeg_or_tiff_whatever_is_in_it(tmp_path: Path):
    """Pillow would start Ghostscript on this one."""
    path = tmp_path / "picture.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(/etc/passwd) (r) file\n%%EOF\n"
    )
    for read in (read_picture, check_picture, read_picture_label):
        with pytest.raises(ImageError, match="cannot be read as a picture"):
            read(path)


def test_nifti_in_two_files_or_with_an_endless_header_is_refused(tmp_path: Path):
    image = nibabel.Nifti1Image(VOXELS.reshape(4, 3, 2), np.eye(4))
    content = bytearray(image.to_bytes())
    path = tmp_path / "image.nii"
    path.write_bytes(content.replace(b"n+1\0", b"ni1\0"))
    with pytest.raises(ImageError, match="in another file"):
        load_volume(path)
    content[108:112] = np.array([1e9], np.float32).tobytes()
    path.write_bytes(content)
    with pytest.raises(ImageError, match="at most 4194304 are read"):
        load_volume(path)


BODIES = {
    "plain": "",
    "spacings": "spacings: 1 2.5 3\n",
    "no spacing on one axis": "spacings: 1 nan 3\n",
    "lps": SPACE,
    "ras": SPACE.replace("LPS", "right-anterior-superior"),
    "las": SPACE.replace("LPS", "LAS"),
    "scanner": SPACE.replace("LPS", "scanner-xyz"),
    "left handed": SPACE.replace("LPS", "3D-left-handed"),
    "space dimension": SPACE.replace("space: LPS", "space dimension: 3"),
    "no origin": SPACE.replace("space origin: (10,20,30)\n", ""),
    "space alone": "space: RAS\n",
    "kinds": SPACE
    + 'kinds: domain domain domain\nspace units: "mm" "mm" "mm"\nmeasurement frame: (1,0,0) (0,1,0) (0,0,1)\n',
    "metadata": "# a comment\nSegment0_Name:=data file: x\nSegment0_Tags:=a: b|c\nA.B_1:=CT\nspacings: 1 2 3\n",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_nrrd_lies_where_itk_puts_it(tmp_path: Path, body: str, encoding: str):
    path = tmp_path / "image.nrrd"
    path.write_bytes(nrrd(body, VOXELS.tobytes() if encoding == "raw" else gzip.compress(VOXELS.tobytes()), encoding))
    check_against_itk(path)


@pytest.mark.parametrize(
    ("sizes", "kinds", "vectors"),
    [
        ("1 4 3 2", "vector domain domain domain", "none (1,0,0.5) (0,2,0) (0.25,0,3)"),
        ("4 3 2 1", "domain domain domain list", "(1,0,0.5) (0,2,0) (0.25,0,3) none"),
    ],
)
def test_an_axis_of_one_value_per_voxel_is_dropped_as_itk_does(tmp_path: Path, sizes: str, kinds: str, vectors: str):
    path = tmp_path / "image.nrrd"
    path.write_bytes(nrrd(f"kinds: {kinds}\nspace: RAS\nspace directions: {vectors}\n", sizes=sizes))
    check_against_itk(path)


METAIMAGES = {
    "plain": "",
    "spacing": "ElementSpacing = 1 2.5 3\nOffset = 10 20 30\n",
    "size": "ElementSize = 1 2.5 3\nOrigin = 10 20 30\n",
    "turned": "ElementSpacing = 1 2.5 3\nTransformMatrix = 0 1 0 0.6 0 0.8 0.8 0 -0.6\nPosition = 10 20 30\n",
    "rotation": "ElementSpacing = 1 2.5 3\nRotation = 0 1 0 1 0 0 0 0 -1\nCenterOfRotation = 5 5 5\n",
    "negative": "ElementSpacing = -1 2 3\n",
    "metadata": "Comment = a = b\n0008|0060 = CT\nAnatomicalOrientation = RAI\nITK_InputFilterName = NrrdImageIO\n",
}


@pytest.mark.parametrize("body", METAIMAGES.values(), ids=METAIMAGES)
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "zlib"])
def test_a_metaimage_lies_where_itk_puts_it(tmp_path: Path, body: str, compressed: bool):
    path = tmp_path / "image.mha"
    packed = zlib.compress(VOXELS.tobytes())
    extra = f"CompressedData = True\nCompressedDataSize = {len(packed)}\n" if compressed else ""
    path.write_bytes(mha(body + extra, packed if compressed else VOXELS.tobytes()))
    check_against_itk(path)


def check_against_itk(path: Path) -> None:
    image = sitk.ReadImage(str(path))
    direction = np.asarray(image.GetDirection()).reshape(3, 3)
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = direction * np.asarray(image.GetSpacing()), image.GetOrigin()
    volume = load_volume(path)
    assert np.allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-9)
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(image).T)
    assert volume.array.dtype == sitk.GetArrayFromImage(image).dtype
    grid = read_grid(path)
    assert grid.shape == volume.array.shape
    assert np.array_equal(grid.affine, volume.affine)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize(
    "kind",
    [
        sitk.sitkInt8,
        sitk.sitkUInt8,
        sitk.sitkUInt16,
        sitk.sitkInt32,
        sitk.sitkUInt32,
        sitk.sitkInt64,
        sitk.sitkFloat64,
    ],
)
def test_what_itk_writes_of_any_type_is_read(tmp_path: Path, suffix: str, kind: int):
    image = sitk.Cast(sitk.GetImageFromArray(VOXELS.reshape(2, 3, 4)), kind)
    for compressed in (True, False):
        sitk.WriteImage(image, str(tmp_path / f"image{suffix}"), compressed)
        assert np.array_equal(load_label(tmp_path / f"image{suffix}"), VOXELS.reshape(2, 3, 4).T)


def test_big_endian_voxels_and_windows_lines_are_read(tmp_path: Path):
    swapped = VOXELS.astype(">i2").tobytes()
    header = nrrd(data=b"").replace(b"little", b"big")
    for name, content in (
        ("a.nrrd", header + swapped),
        ("b.nrrd", header.replace(b"\n", b"\r\n") + swapped),
        ("c.mha", mha(data=b"").replace(b"MSB = False", b"MSB = True") + swapped),
        ("d.mha", mha(data=b"").replace(b"\n", b"\r\n") + VOXELS.tobytes()),
    ):
        (tmp_path / name).write_bytes(content)
        assert load_label(tmp_path / name).ravel(order="F").tolist() == VOXELS.tolist()


BROKEN = {
    "cut off": (".nrrd", nrrd()[:-1], "bytes of voxels"),
    "packed and cut off": (
        ".nrrd",
        nrrd(data=gzip.compress(bytes(48))[:-14], encoding="gzip"),
        "cannot be read as an image",
    ),
    "packed with a wrong checksum": (
        ".nrrd",
        nrrd(data=gzip.compress(bytes(48))[:-8] + bytes(8), encoding="gzip"),
        "check",
    ),
    "no end": (".nrrd", nrrd(data=b"").rstrip(), "no end"),
    "an endless header": (".nrrd", b"NRRD0004\n" + b"# comment\n" * 600_000, "no end within 4194304 bytes"),
    "unknown field": (".nrrd", nrrd("file: x\n"), "no field of the format"),
    "twice": (".nrrd", nrrd("type: short\n"), "twice"),
    "text": (".nrrd", nrrd(encoding="ascii"), "must be one of raw, gzip"),
    "text without an order of bytes": (
        ".nrrd",
        nrrd(encoding="ascii").replace(b"endian: little\n", b""),
        "has the encoding 'ascii'",
    ),
    "bzip2": (".nrrd", nrrd(encoding="bzip2"), "must be one of raw, gzip"),
    "block": (".nrrd", nrrd(type="block"), "must be one of"),
    "huge": (".nrrd", nrrd(sizes="9999999999 9999999999 9"), "more than"),
    "negative": (".nrrd", nrrd(sizes="4 -3 2"), "whole numbers from 1"),
    "zero": (".nrrd", nrrd(sizes="4 0 2"), "whole numbers from 1"),
    "many axes": (".nrrd", nrrd(sizes="1 " * 16), "1 to 8 whole numbers"),
    "two values": (".nrrd", nrrd("kinds: vector domain domain domain\n", sizes="2 2 3 2"), "2 values per voxel"),
    "axis minima": (".nrrd", nrrd("spacings: 1 2 3\naxis mins: 5 6 7\n"), "axis minima"),
    "infinite": (".nrrd", nrrd(SPACE.replace("0.5", "inf")), "no vector of three numbers"),
    "time": (".nrrd", nrrd("space: LPST\n"), "space 'lpst'"),
    "MetaImage text": (".mha", mha().replace(b"BinaryData = True", b"BinaryData = False"), "are text"),
    "MetaImage channels": (".mha", mha("ElementNumberOfChannels = 3\n"), "3 values per voxel"),
    "MetaImage mesh": (".mha", mha().replace(b"= Image", b"= Mesh"), "no image"),
    "MetaImage vector": (".mha", mha(type="MET_SHORT_ARRAY"), "ElementType 'MET_SHORT_ARRAY'"),
    "MetaImage dims": (".mha", mha("ElementSpacing = 1 2\n"), "3 finite ones"),
    "MetaImage nan": (".mha", mha("Offset = nan 1 2\n"), "3 finite ones"),
    "MetaImage cut off": (".mha", mha()[:-1], "bytes of voxels"),
    "MetaImage without voxels": (".mha", mha(data=b"").rstrip(), "ends with its header"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused_with_the_reason(tmp_path: Path, kind: str):
    suffix, content, reason = BROKEN[kind]
    (tmp_path / f"image{suffix}").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        load_volume(tmp_path / f"image{suffix}")


def test_packed_voxels_may_come_in_several_members_and_with_padding(tmp_path: Path):
    path, content = tmp_path / "image.nrrd", VOXELS.tobytes()
    path.write_bytes(nrrd(data=gzip.compress(content[:20]) + gzip.compress(content[20:]) + b"padding", encoding="gzip"))
    assert load_label(path).ravel(order="F").tolist() == VOXELS.tolist()


def test_a_bomb_unpacks_to_what_its_header_states_and_no_further(tmp_path: Path):
    path = tmp_path / "image.nrrd"
    path.write_bytes(nrrd(data=gzip.compress(VOXELS.tobytes() + bytes(400 << 20), 1), encoding="gzip"))
    import tracemalloc

    tracemalloc.start()
    load_label(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
