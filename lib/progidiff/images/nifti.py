"""NIfTI, with nibabel; where its header can be read in more than one way, as ITK reads it.

A header may say twice where the voxels lie (sform and qform), not at all, or in metres, and programs differ in what
they make of it. People look at images and answers in 3D Slicer, ITK-SNAP and OHIF, so what counts here is ITK's
reading; where it is not obvious, ITK itself is asked, with a tiny file that has the same geometry. Answers get the
fields of the image's header as they are, so that every program finds both at the same place. `HeaderReading` keeps the
other readings, for labels that were written with them, and says in words what people should know.
"""

from __future__ import annotations

import gzip
import struct
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import Affine, Grid, HeaderReading, Shape, find_distance, is_same_place
from progidiff.images.itk import read_itk_place
from progidiff.images.raw import MAX_HEADER_BYTES, Place, Raw, check_size
from progidiff.storage.atomic import open_regular

_GEOMETRY_FIELDS = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
    "xyzt_units",
)
_UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}
"""Codes of sizes that are not in mm: their name, and mm in one."""

_SPATIAL_UNIT = 7
"""The bits of `xyzt_units` that are about space."""

_ORTHONORMAL = 1e-4
"""By how much the products of directions may differ from an identity for ITK to take them for rectangular."""

_EXACT = 1e-3
"""Share of a voxel edge below which two readings are one, written with different rounding."""

_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_GZIP = b"\x1f\x8b"
"""How every compressed file begins."""


def read_nifti(path: Path) -> Raw:
    """Voxels, scaled where the header says so, and where they lie.

    Raises:
        ImageError: if it is another format.
    """
    image = open_nifti(path)
    check_size(image.shape, path, image.get_data_dtype().itemsize)
    affine, header = _read_header(image, path)
    proxy: Any = image.dataobj
    if getattr(proxy, "slope", 1.0) == 1.0 and getattr(proxy, "inter", 0.0) == 0.0:
        return Raw(np.asanyarray(proxy), affine, header=header)
    return Raw(np.asanyarray(proxy, dtype=np.float32), affine, header=header)


def read_nifti_place(path: Path) -> Place:
    """Shape and affine from the header."""
    image = open_nifti(path)
    return Place(tuple(image.shape), *_read_header(image, path))


def open_nifti(path: Path) -> nibabel.Nifti1Image:
    """The header of a NIfTI file that holds its own voxels.

    Raises:
        ImageError: if it is something else, or has a header of more than `MAX_HEADER_BYTES`.
    """
    start = _read_start(path)
    for order in ("<", ">"):
        size = int.from_bytes(start[:4], "little" if order == "<" else "big")
        if size == _NIFTI1_BYTES:
            kind, magic = nibabel.Nifti1Image, start[344:348]
            voxels = struct.unpack_from(f"{order}f", start.ljust(_NIFTI1_BYTES, b"\0"), 108)[0]
        elif size == _NIFTI2_BYTES:
            kind, magic = nibabel.Nifti2Image, start[4:8]
            voxels = struct.unpack_from(f"{order}q", start.ljust(_NIFTI2_BYTES, b"\0"), 168)[0]
        else:
            continue
        if magic in (b"ni1\0", b"ni2\0"):
            raise ImageError(
                f"'{path.name}' has its voxels in another file (.hdr and .img). Save it as one file, .nii or .nii.gz."
            )
        if magic not in (b"n+1\0", b"n+2\0"):
            break
        if not 0 <= voxels <= MAX_HEADER_BYTES:
            raise ImageError(
                f"The header of '{path.name}' has {voxels:.0f} bytes; at most {MAX_HEADER_BYTES} are read. Save it "
                "without extensions."
            )
        # By its own name: asked for a name, the library looks for one with a suffix in lower case.
        return kind.from_file_map({"image": nibabel.FileHolder(str(path))})
    raise ImageError(
        f"'{path.name}' cannot be read as an image: it is named as NIfTI and is something else. Convert it to NIfTI."
    )


def _read_start(path: Path) -> bytes:
    """The first bytes of the header.

    Raises:
        ImageError: if the file is empty, or packed although its name does not say so, or the other way round.
    """
    is_named_packed = path.name.lower().endswith(".gz")
    with open_regular(path) as file:
        magic = file.read(len(_GZIP))
        if not magic:
            raise ImageError(
                f"'{path.name}' cannot be read, it is empty: 0 bytes. Copy it again, or wait until whoever writes "
                "it has finished."
            )
        if is_named_packed != (magic == _GZIP):
            packed, ending = ("not compressed", ".nii") if is_named_packed else ("compressed", ".nii.gz")
            raise ImageError(
                f"'{path.name}' cannot be read as an image: it is {packed}, and its name says otherwise. If it is "
                f"NIfTI, rename it to end in {ending}."
            )
        file.seek(0)
        with gzip.GzipFile(fileobj=file) if is_named_packed else nullcontext(file) as content:
            return content.read(_NIFTI2_BYTES)


def write_nifti(array: NDArray[Any], grid: Grid, path: Path) -> None:
    """Write an array (I, J, K), with the geometry of the image's own header if it was a NIfTI."""
    if grid.header is not None:
        image = _make_image(array, grid.header.stated)
        image.set_data_dtype(array.dtype)
    else:
        image = nibabel.Nifti1Image(array, grid.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(grid.affine, code=1)
        image.set_qform(grid.affine, code=1)
        if not np.allclose(image.get_qform(), grid.affine, atol=1e-3):
            # A quaternion cannot say shear (gantry tilt); no answer is better than a wrong one.
            image.set_qform(None, code=0)
    nibabel.save(image, path)


def take_channel(path: Path, index: int, target: Path) -> Path:
    """One of the channels that lie along the fourth axis of a NIfTI, as a file of its own with the same place.

    Args:
        path: Shape (I, J, K, C).
        index: Of the channel, from 0.
        target: Written.

    Raises:
        ImageError: if it is something else, or has fewer channels.
    """
    image = open_nifti(path)
    shape = image.shape
    if len(shape) != 4 or not 0 <= index < shape[3]:
        raise ImageError(
            f"'{path.name}' has {' x '.join(map(str, shape))} voxels, and channel {index} of a fourth axis was to be "
            "taken. "
            "Correct the channels in dataset.json."
        )
    check_size(shape, path, image.get_data_dtype().itemsize)
    nibabel.save(image.slicer[..., index], target)
    return target


def _read_header(image: Any, path: Path) -> tuple[Affine, HeaderReading | None]:
    """Voxel index -> RAS mm, and how it was found."""
    header = image.header
    usual = np.asarray(image.affine, dtype=np.float64)
    if "sform_code" not in header.keys():  # ANALYZE, which the caller refuses.  # noqa: SIM118
        return usual, None
    size_i, size_j, size_k = (*image.shape, 1, 1, 1)[:3]
    shape = (int(size_i), int(size_j), int(size_k))
    stated = {name: np.array(header[name]) for name in _GEOMETRY_FIELDS}
    stated["pixdim"] = np.array(header["pixdim"][:4])
    stated["pixdim"][1:] *= _read_signs(image, path)  # The library makes them positive, and ITK does not.
    unit, scale = _UNITS.get(int(stated["xyzt_units"]) & _SPATIAL_UNIT, ("", 1.0))
    known = _list_stated(header, scale)
    is_mirrored = bool((stated["pixdim"][1:] < 0).any())
    if not unit and not is_mirrored and _is_plain(shape, header, known):
        taken = "both" if len(known) == 2 else next(iter(known))
        return usual, HeaderReading(taken, (), (), stated)

    seen = _ask_itk(stated)
    warnings = [f"The header of '{path.name}' gives its sizes in {unit}; they were turned into mm."] if unit else []
    if seen is None:
        affine, taken = known.get("sform", usual), "sform"
        warnings.append(
            f"The axes in the header of '{path.name}' are not at right angles and it has no qform, so 3D Slicer and "
            "ITK-SNAP do not open it, nor its answers. Its sform was taken; resample it onto a rectangular grid."
        )
    elif is_mirrored:
        affine, taken = seen, next(iter(known), "none")
        sizes = ", ".join(f"{size:g}" for size in stated["pixdim"][1:])
        warnings.append(
            f"The header of '{path.name}' gives negative voxel sizes (pixdim {sizes}). It was taken as 3D Slicer and "
            "ITK-SNAP do, which turn those axes round; others, such as nibabel, do not, and see a mirrored image. "
            "Check what is left and right, and convert the original images again."
        )
    elif not known:
        affine, taken = seen, "none"
        warnings.append(
            f"The header of '{path.name}' gives no orientation (qform and sform have code 0). It was taken as 3D "
            "Slicer and ITK-SNAP do: the axes run to the patient's left, back and head. Check what is left and right."
        )
    else:
        taken, affine = next(((name, at) for name, at in known.items() if _is_exact(shape, seen, at)), ("sform", seen))
        warnings += _compare(path, shape, taken, affine, known, stated)
        if len(known) == 2 and all(_is_exact(shape, affine, at) for at in known.values()):
            taken = "both"
    others = [at for at in (*known.values(), usual, seen) if at is not None and not _is_exact(shape, affine, at)]
    return affine, HeaderReading(taken, tuple(others), tuple(warnings), stated)


def _read_signs(image: Any, path: Path) -> NDArray[np.float32]:
    """Whether the file gives each of its three voxel sizes as positive or negative number, 1 or -1."""
    start = _read_start(path)[: image.header.structarr.dtype.itemsize]
    sizes = type(image.header)(start, check=False)["pixdim"][1:4]
    return np.where(sizes < 0, -1, 1).astype(np.float32)


def _list_stated(header: Any, scale: float) -> dict[str, Affine]:
    """What the header says by "sform" and "qform", in mm; without what it does not say."""
    known = {}
    if int(header["sform_code"]) > 0:
        known["sform"] = _scaled(np.asarray(header.get_sform(), dtype=np.float64), scale)
    if int(header["qform_code"]) > 0:
        try:
            known["qform"] = _scaled(np.asarray(header.get_qform(), dtype=np.float64), scale)
        except HeaderDataError:  # A quaternion that is none; ITK makes the best of it.
            return known
    return known


def _scaled(affine: Affine, scale: float) -> Affine:
    return np.diag([scale, scale, scale, 1.0]) @ affine


def _is_plain(shape: Shape, header: Any, known: Mapping[str, Affine]) -> bool:
    """Whether all programs read the header alike."""
    if not known or len(known) < (int(header["sform_code"]) > 0) + (int(header["qform_code"]) > 0):
        return False
    sform = known.get("sform")
    if sform is None:
        return True
    edges = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.isfinite(sform).all() or edges.min() <= 0:
        return False
    directions = sform[:3, :3] / edges
    is_rectangular = np.abs(directions @ directions.T - np.eye(3)).max() < _ORTHONORMAL
    is_sized = np.allclose(edges, header["pixdim"][1:4], rtol=_EXACT / max(shape))
    return bool(is_rectangular and is_sized and all(_is_exact(shape, sform, other) for other in known.values()))


def _is_exact(shape: Shape, one: Affine, other: Affine) -> bool:
    edges = np.linalg.norm(one[:3, :3], axis=0)
    return find_distance(shape, one, other) <= _EXACT * float(edges.min())


def _compare(
    path: Path, shape: Shape, taken: str, affine: Affine, known: Mapping[str, Affine], stated: Mapping[str, Any]
) -> list[str]:
    """What people should know where sform, qform and the sizes of voxels do not agree."""
    apart = {
        name: find_distance(shape, affine, at) for name, at in known.items() if not is_same_place(shape, affine, at)
    }
    if taken in apart:  # ITK's own mixture of both.
        return [
            f"The sform in the header of '{path.name}' has other voxel sizes than its pixdim, by up to "
            f"{apart[taken]:.2f} mm over the image. The sizes of pixdim were taken, as 3D Slicer and ITK-SNAP do."
        ]
    codes = " and ".join(f"{name} (code {int(stated[name + '_code'])})" for name in known)
    return [
        f"The header of '{path.name}' gives two places, {codes}, up to {distance:.2f} mm apart. The {taken} was taken, "
        "as 3D Slicer and ITK-SNAP do; other programs may take the other."
        for distance in apart.values()
    ]


def _make_image(array: NDArray[Any], stated: Mapping[str, Any]) -> nibabel.Nifti1Image:
    """An image whose header says of its place what another's does."""
    image = nibabel.Nifti1Image(array, None)
    for name in _GEOMETRY_FIELDS:
        image.header[name] = stated[name]
    image.header["pixdim"][:4] = stated["pixdim"]
    return image


def _ask_itk(stated: Mapping[str, Any]) -> Affine | None:
    """Where ITK sees the voxels of an image with such a header; None if it does not open it."""
    with tempfile.TemporaryDirectory(prefix="progidiff-header-") as folder:
        path = Path(folder) / "header.nii"
        nibabel.save(_make_image(np.zeros((2, 2, 2), np.uint8), stated), path)
        try:
            return read_itk_place(path).affine
        except RuntimeError:
            return None
