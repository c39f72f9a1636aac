"""A medical volume: array, affine and modality together; reading, windowing, and the exact way back to the file's grid.

Everything outside this module sees arrays either in *file order* (I, J, K), exactly as the file stores its voxels, or
as an *axial stack* (Z, Y, X): z towards Superior, y towards Posterior, x towards the patient's Left. `Volume.to_stack`
and `Volume.from_stack` swap and flip axes; they never interpolate, so a mask that leaves through `from_stack` is on the
input's grid voxel by voxel. An oblique volume takes the nearest of the 48 orientations and is not rotated.

Affines map voxel indices to RAS millimetres, as in NIfTI. NRRD, MetaImage and DICOM speak LPS; the sign change happens
here, at reading and writing, and in `dicomweb.geometry`, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from progidiff.errors import GeometryError, ImageError, NotFoundError, RequestError, StoreError
from progidiff.images.pictures import (
    PICTURE_AFFINE,
    PICTURE_SUFFIXES,
    is_picture,
    read_picture_grid,
    read_picture_label,
    write_picture_label,
)

logger = logging.getLogger(__name__)

Modality = Literal["CT", "MR"]

CT_WINDOW = (-125.0, 275.0)
"""Soft-tissue window in HU, the one the TransUNet / BTCV literature uses."""

CT_BODY_HU = -120.0
"""CT intensity above which a voxel is body: below fat (about -100 HU), above air even where it was clipped at -125
HU.
"""

MAX_VOXELS = 1 << 30
"""Largest volume that is read: 1024 x 1024 x 1024."""

GRID_TOLERANCE = 0.1
"""Two grids are the same if no corner differs by more than this share of the smallest voxel edge."""

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
MASK_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    zlib.error,
    ImageFileError,
)


@dataclass(frozen=True, eq=False)
class Volume:
    """One image, as read.

    Attributes:
        array: Intensities in file order, shape (I, J, K): integers as stored, floats as float32, rescaled (HU for CT).
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4), float64.
        modality: "CT" or "MR".
        modality_source: Where the modality comes from: "dicom", "option", "sidecar" or "guessed".
        name: File name without its suffix, or the folder's name for a DICOM series.
    """

    array: np.ndarray
    affine: np.ndarray
    modality: Modality
    modality_source: str
    name: str

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges along i, j, k in mm."""
        edges = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(edges[0]), float(edges[1]), float(edges[2])

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @cached_property
    def digest(self) -> str:
        """Hexadecimal BLAKE2b of voxels, grid and modality: two volumes with the same digest get the same proposals."""
        state = hashlib.blake2b(digest_size=20)
        state.update(f"{self.array.shape} {self.array.dtype.str} {self.modality}".encode())
        state.update(np.ascontiguousarray(self.affine, dtype=np.float64).tobytes())
        state.update(np.ascontiguousarray(self.array.T).data)
        return state.hexdigest()

    def to_stack(self) -> tuple[np.ndarray, tuple[float, float, float]]:
        """The axial stack, a view of `array`.

        Returns:
            The stack, shape (Z, Y, X) with z -> Superior, y -> Posterior, x -> Left, and its spacing (dz, dy, dx) in
            mm.

        Example:
            >>> ras = Volume(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]), "CT", "option", "example")
            >>> stack, spacing = ras.to_stack()
            >>> stack.shape, spacing
            ((6, 5, 4), (3.0, 2.0, 1.0))
        """
        order, _ = _orientation(self.affine)
        edges = self.spacing
        return self.arrange(self.array), (edges[order[2]], edges[order[1]], edges[order[0]])

    @property
    def stack_affine(self) -> np.ndarray:
        """Index (x, y, z, 1) into the axial stack -> RAS mm, shape (4, 4); mind that the stack's axes are (z, y, x).

        Example:
            >>> ras = Volume(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]), "CT", "option", "example")
            >>> ras.stack_affine @ (0, 0, 0, 1)  # the stack begins at the right, front and bottom
            array([3., 8., 0., 1.])
        """
        order, flipped = _orientation(self.affine)
        affine = self.affine[:, [*order, 3]]
        for axis, flip in enumerate(flipped):
            if flip:
                affine[:, 3] += affine[:, axis] * (self.array.shape[order[axis]] - 1)
                affine[:, axis] *= -1
        return affine

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Any array on this volume's grid as an axial stack (a view): (I, J, K) -> (Z, Y, X).

        Raises:
            GeometryError: if its shape is not the volume's.
        """
        self._check_shape(array.shape, self.array.shape, "in file order")
        order, flipped = _orientation(self.affine)
        lps = array.transpose(order)[tuple(slice(None, None, -1) if flip else slice(None) for flip in flipped)]
        return lps.transpose(2, 1, 0)

    def from_stack(self, stack: np.ndarray) -> np.ndarray:
        """The exact inverse of `arrange`: (Z, Y, X) -> (I, J, K), a view.

        Raises:
            GeometryError: if the shape is not that of this volume's axial stack.
        """
        order, flipped = _orientation(self.affine)
        shape = self.array.shape
        self._check_shape(stack.shape, (shape[order[2]], shape[order[1]], shape[order[0]]), "as an axial stack")
        lps = stack.transpose(2, 1, 0)[tuple(slice(None, None, -1) if flip else slice(None) for flip in flipped)]
        return lps.transpose(np.argsort(order))

    def locate(self, index: tuple[int, int, int]) -> tuple[int, int, int]:
        """Where a voxel of the file lies in the axial stack: (i, j, k) -> (z, y, x).

        Raises:
            GeometryError: if it is outside of the volume.

        Example:
            >>> ras = Volume(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]), "CT", "option", "example")
            >>> ras.locate((0, 0, 5))
            (5, 4, 3)
        """
        shape = self.array.shape
        if not all(0 <= place < size for place, size in zip(index, shape, strict=True)):
            raise GeometryError(
                f"The voxel {tuple(index)} is outside of '{self.name}', which has "
                f"{_times(shape)} voxels counted from 0."
            )
        order, flipped = _orientation(self.affine)
        x, y, z = (
            shape[axis] - 1 - index[axis] if flip else index[axis] for axis, flip in zip(order, flipped, strict=True)
        )
        return z, y, x

    @property
    def axial_axis(self) -> int:
        """Which axis of the file (0, 1 or 2) runs from slice to axial slice."""
        return _orientation(self.affine)[0][2]

    def _check_shape(self, given: tuple[int, ...], wanted: tuple[int, ...], kind: str) -> None:
        if tuple(given) != tuple(wanted):
            raise GeometryError(
                f"An array of shape {tuple(given)} is not on the grid of '{self.name}', "
                f"which is {tuple(wanted)} {kind}; resample it to the image first."
            )


def _orientation(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which file axis runs along x (Left), y (Posterior), z (Superior), and which of the three must be flipped."""
    transform = ornt_transform(io_orientation(affine), axcodes2ornt(("L", "P", "S")))
    order = np.argsort(transform[:, 0])
    flips = transform[order, 1] < 0
    return (int(order[0]), int(order[1]), int(order[2])), (bool(flips[0]), bool(flips[1]), bool(flips[2]))


@dataclass(frozen=True)
class _Raw:
    """What a reader returns: voxels in file order, affine to RAS mm, modality tag if the format has one."""

    array: np.ndarray
    affine: np.ndarray
    modality: str | None = None


def load_volume(
    path: str | os.PathLike[str], modality: str | None = None, info: Mapping[str, Any] | None = None
) -> Volume:
    """Read an image: NIfTI, NRRD, MetaImage, a folder with one DICOM series, or one file of such a series.

    The modality is the `modality` argument if given, else the DICOM tag (of the file, or "Modality" in `info`), else
    the entry "modality" of `info` or of the file `<name>.json` next to the image, else a guess from the intensities.

    Args:
        path: File or folder.
        modality: "CT" or "MR" (any case); None, "" or "auto" to find out.
        info: What a datastore knows about the image.

    Raises:
        NotFoundError: if there is no such path.
        RequestError: if `modality` is neither CT nor MR.
        ImageError: if it is no three-dimensional image, is empty, constant, or holds values that are not finite.
    """
    path = Path(path)
    option = _check_modality(modality, "Option modality")
    if is_picture(path):
        raise ImageError(
            f"'{path.name}' is a picture, and structures are found in CT and MR volumes. Ask the model textdiff for it."
        )
    raw = _read(path)
    array = _check_voxels(raw.array, path)
    affine = _check_affine(raw.affine, path)
    order, _ = _orientation(affine)
    if min(array.shape[order[0]], array.shape[order[1]]) < 2:
        raise ImageError(
            f"'{path.name}' is a single sagittal or coronal slice ({_times(array.shape)} "
            "voxels), and structures are found on axial slices; send the whole volume."
        )
    if array.min() == array.max():
        raise ImageError(
            f"All voxels of '{path.name}' have the value {array.flat[0]}; there is "
            "nothing to see in it. Check the export."
        )
    found, source = _find_modality(option, raw, path, info, array)
    return Volume(array=array, affine=affine, modality=found, modality_source=source, name=strip_suffix(path))


def read_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine of a NIfTI, NRRD or MetaImage file from its header alone, as `load_volume` gives them; of a
    picture see `picture_grid`.

    Returns:
        (I, J, K), and voxel index (i, j, k, 1) -> RAS mm, shape (4, 4), float64.

    Raises:
        NotFoundError: if there is no such path.
        ImageError: if it is no three-dimensional image.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"There is no image at '{path}'. Check the path.")
    if is_picture(path):
        return read_picture_grid(path)
    try:
        if _suffix(path) in NIFTI_SUFFIXES:
            image = nibabel.load(path)
            shape, affine = tuple(image.shape), np.asarray(image.affine, dtype=np.float64)
        else:
            import SimpleITK as sitk

            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            shape = tuple(reader.GetSize())
            direction = np.asarray(reader.GetDirection()).reshape(len(shape), len(shape))
            count = min(len(shape), 3)
            affine = np.eye(4)
            affine[:count, :count] = (direction * np.asarray(reader.GetSpacing()))[:count, :count]
            affine[:count, 3] = reader.GetOrigin()[:count]
            affine = _LPS_TO_RAS @ affine
    except _READ_ERRORS as err:
        reason = _explain(err, path)
        raise ImageError(
            f"'{path.name}' cannot be read as an image ({reason}). It may be cut off or "
            "of another format; export it again."
        ) from err
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise ImageError(f"'{path.name}' has {_times(shape)} voxels; a single volume of slices is needed.")
    return (int(shape[0]), int(shape[1]), int(shape[2])), _check_affine(affine, path)


def load_label(path: str | os.PathLike[str], like: Volume | None = None) -> np.ndarray:
    """Read a label map.

    Args:
        path: NIfTI, NRRD or MetaImage file, or the label of a picture as PNG or TIFF.
        like: The image that it must share the grid with.

    Returns:
        Label ids, shape (I, J, K) in file order, in the smallest unsigned integer type that holds them.

    Raises:
        NotFoundError: if there is no such path.
        ImageError: if it is no three-dimensional image of whole, non-negative numbers.
        GeometryError: if its grid is not that of `like`.
    """
    path = Path(path)
    raw = _read(path)
    array = raw.array
    if np.issubdtype(array.dtype, np.floating) and not np.array_equal(array, np.rint(array)):
        raise ImageError(
            f"'{path.name}' holds fractions or values that are not numbers, so it is no "
            "label map; save it with whole numbers."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(np.uint32).max:
        raise ImageError(f"'{path.name}' holds the values {low} to {high}; label ids are whole numbers from 0.")
    if like is not None:
        check_same_grid(array.shape, raw.affine, like, path.name)
    return array.astype(np.min_scalar_type(high), copy=False)


def check_same_grid(shape: tuple[int, ...], affine: np.ndarray, like: Volume, name: str) -> None:
    """Refuse a grid that is not the volume's.

    Args:
        shape: (I, J, K) of the other array.
        affine: Its voxel index -> RAS mm, shape (4, 4).
        like: The volume.
        name: What to call the other array in the message.

    Raises:
        GeometryError: if the shapes differ, or any corner by more than `GRID_TOLERANCE` of the smallest voxel edge.
    """
    if tuple(shape) != like.array.shape:
        raise GeometryError(
            f"'{name}' has {_times(shape)} voxels and the image '{like.name}' {_times(like.array.shape)}; resample it "
            "to the image's grid, or save it uncropped."
        )
    last = np.asarray(shape, dtype=np.float64) - 1
    corners = np.array([[i, j, k, 1.0] for i in (0, last[0]) for j in (0, last[1]) for k in (0, last[2])])
    distance = float(np.abs(corners @ (np.asarray(affine, dtype=np.float64) - like.affine).T).max())
    if not distance <= GRID_TOLERANCE * min(like.spacing):
        raise GeometryError(
            f"'{name}' lies up to {distance:.2f} mm away from the image '{like.name}' although both have "
            f"{_times(shape)} voxels (another origin, spacing or orientation); resample it to the image's grid."
        )


def save_mask(mask: np.ndarray, like: Volume, path: str | os.PathLike[str]) -> Path:
    """Write a mask, label map or real-valued map on the grid of an image.

    The file appears complete or not at all: it is written in a temporary folder beside its place and then renamed.

    Args:
        mask: Shape (I, J, K) in file order; booleans are written as uint8, floats as float32, integers as they are.
        like: The image.
        path: Ends in .nii.gz, .nii, .nrrd or .mha; for a picture also .png.

    Returns:
        The path written.

    Raises:
        GeometryError: if the mask is not on the image's grid.
        RequestError: if the suffix is none of these.
        StoreError: if the disk refuses.
    """
    path = Path(path)
    like._check_shape(mask.shape, like.array.shape, "in file order")
    if mask.dtype == np.bool_:
        mask = mask.astype(np.uint8)
    elif np.issubdtype(mask.dtype, np.floating):
        mask = mask.astype(np.float32, copy=False)
    elif mask.dtype in (np.int64, np.uint64):
        mask = mask.astype(np.int32)
    return save_array(mask, like.affine, path)


def save_array(array: np.ndarray, affine: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write an array in file order (I, J, K) with its affine (voxel index -> RAS mm); see `save_mask`."""
    path = Path(path)
    suffix = _suffix(path)
    is_picture = suffix == ".png" and array.ndim == 3 and array.shape[2] == 1
    if suffix not in MASK_SUFFIXES and not is_picture:
        raise RequestError(f"Cannot write '{path.name}': its suffix must be one of {', '.join(MASK_SUFFIXES)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        try:
            temporary = folder / f"array{suffix}"
            if suffix in NIFTI_SUFFIXES:
                _write_nifti(array, affine, temporary)
            elif suffix == ".png":
                write_picture_label(array, temporary)
            else:
                _write_itk(array, affine, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, RuntimeError) as err:
        raise StoreError(f"'{path}' could not be written ({err}). Free some space or choose another folder.") from err
    return path


def _write_nifti(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(
            None, code=0
        )  # A quaternion cannot say shear (gantry tilt); no answer is better than a wrong one.
    nibabel.save(image, path)


def _write_itk(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    import SimpleITK as sitk

    lps = _LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _read(path: Path) -> _Raw:
    """Voxels and affine of a file or DICOM folder, three-dimensional."""
    if not path.exists():
        raise NotFoundError(f"There is no image at '{path}'. Check the path.")
    suffix = _suffix(path)
    if is_picture(path):
        return _Raw(read_picture_label(path), PICTURE_AFFINE.copy())
    try:
        if path.is_dir():
            raw = _read_dicom_folder(path)
        elif suffix in NIFTI_SUFFIXES:
            raw = _read_nifti(path)
        elif suffix in ITK_SUFFIXES:
            raw = _read_itk(path)
        elif suffix in DICOM_SUFFIXES or _is_dicom(path):
            raw = _read_dicom_file(path)
        else:
            raise ImageError(
                f"'{path.name}' is no image format that can be read here; send NIfTI (.nii, .nii.gz), NRRD (.nrrd), "
                "MetaImage (.mha) or a folder with one DICOM series."
            )
    except _READ_ERRORS as err:
        reason = _explain(err, path)
        raise ImageError(
            f"'{path.name}' cannot be read as an image ({reason}). It may be cut off or "
            "of another format; export it again."
        ) from err
    return _Raw(_squeeze(raw.array, path), np.asarray(raw.affine, dtype=np.float64), raw.modality)


def _read_nifti(path: Path) -> _Raw:
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ImageError(f"'{path.name}' is named as NIfTI and is a {type(image).__name__}; convert it to NIfTI.")
    _check_size(image.shape, path)
    proxy: Any = image.dataobj
    if getattr(proxy, "slope", 1.0) == 1.0 and getattr(proxy, "inter", 0.0) == 0.0:
        return _Raw(np.asanyarray(proxy), image.affine)
    return _Raw(np.asanyarray(proxy, dtype=np.float32), image.affine)


def _read_itk(path: Path) -> _Raw:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    _check_size(reader.GetSize(), path)
    if reader.GetNumberOfComponents() > 1:
        raise ImageError(
            f"'{path.name}' has {reader.GetNumberOfComponents()} values per voxel "
            "(colour, several layers or time points); save a single one."
        )
    return _from_itk(reader.Execute())


def _from_itk(image: Any, modality: str | None = None) -> _Raw:
    """A SimpleITK image of any dimension; beyond three the further axes are dropped if they have one frame
    (`_squeeze`).
    """
    import SimpleITK as sitk

    rank = image.GetDimension()
    direction = np.asarray(image.GetDirection()).reshape(rank, rank)
    count = min(rank, 3)
    affine = np.eye(4)
    affine[:count, :count] = (direction * np.asarray(image.GetSpacing()))[:count, :count]
    affine[:count, 3] = image.GetOrigin()[:count]
    return _Raw(sitk.GetArrayFromImage(image).T, _LPS_TO_RAS @ affine, modality)


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_dicom_file(path: Path) -> _Raw:
    """The series that a file belongs to, from the files beside it."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    series = reader.GetMetaData("0020|000e").strip() if reader.HasMetaDataKey("0020|000e") else ""
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path.parent), series) if series else ()
    return _read_dicom_series(list(files) or [str(path)], path)


def _read_dicom_folder(path: Path) -> _Raw:
    import SimpleITK as sitk

    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if not series:
        raise ImageError(
            f"The folder '{path.name}' holds no DICOM series; send a file, or a folder "
            "whose files are one DICOM series."
        )
    if len(series) > 1:
        names = "; ".join(_describe_series(path, uid) for uid in series[:8])
        raise ImageError(
            f"The folder '{path.name}' holds {len(series)} DICOM series: {names}. Put the "
            "one you want into a folder of its own."
        )
    return _read_dicom_series(list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0])), path)


def _describe_series(path: Path, uid: str) -> str:
    import SimpleITK as sitk

    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), uid)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(files[0])
    reader.ReadImageInformation()
    tags = [reader.GetMetaData(key).strip() for key in ("0008|0060", "0008|103e") if reader.HasMetaDataKey(key)]
    return f"{uid} ({', '.join([*filter(None, tags), f'{len(files)} files'])})"


def _read_dicom_series(files: list[str], path: Path) -> _Raw:
    """Slices sorted by position along the slice normal, rescaled (slope and intercept), with the affine of their own
    tags.

    The third column of the affine is the step between slice positions, so gantry tilt is kept as shear.
    """
    import SimpleITK as sitk

    positions, orientations, spacings, modality = [], [], [], None
    for file in files:
        header = sitk.ImageFileReader()
        header.SetImageIO("GDCMImageIO")
        header.SetFileName(file)
        header.ReadImageInformation()
        if header.GetDimension() > 2 and header.GetSize()[2] > 1:
            raise ImageError(
                f"'{Path(file).name}' is a multi-frame DICOM file; convert it to NIfTI "
                "first (for example with dcm2niix)."
            )
        if not (header.HasMetaDataKey("0020|0032") and header.HasMetaDataKey("0020|0037")):
            raise ImageError(
                f"'{Path(file).name}' does not say where it lies in the patient "
                "(ImagePositionPatient); export the series again."
            )
        positions.append([float(v) for v in header.GetMetaData("0020|0032").split("\\")])
        orientations.append([float(v) for v in header.GetMetaData("0020|0037").split("\\")])
        spacings.append(header.GetSpacing()[:2])
        modality = header.GetMetaData("0008|0060").strip() if header.HasMetaDataKey("0008|0060") else None
        _check_size((*header.GetSize()[:2], len(files)), path)
    if len(files) < 2:
        raise ImageError(f"'{path.name}' is a single DICOM slice; send the folder with the whole series.")
    if np.ptp(np.asarray(orientations), axis=0).max() > 1e-3 or np.ptp(np.asarray(spacings), axis=0).max() > 1e-3:
        raise ImageError(
            f"The slices of the series in '{path.name}' are not parallel or differ in "
            "pixel size; remove scouts and localisers."
        )
    row, column = np.asarray(orientations[0])[:3], np.asarray(orientations[0])[3:]
    places = np.asarray(positions)
    height = places @ np.cross(row, column)
    order = np.argsort(height, kind="stable")
    places, height = places[order], height[order]
    gaps = np.diff(height)
    step = float(np.median(gaps))
    if step <= 0 or np.abs(gaps - step).max() > 0.1 * step:
        raise ImageError(
            f"The slices of the series in '{path.name}' are {gaps.min():.2f} to {gaps.max():.2f} mm apart: some are "
            "missing, doubled or belong to another phase; send one complete series."
        )
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([files[index] for index in order])
    image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise ImageError(
            f"The series in '{path.name}' is in colour; send the original images, not captures of a screen."
        )
    lps = np.eye(4)
    lps[:3, 0] = row * spacings[0][0]
    lps[:3, 1] = column * spacings[0][1]
    lps[:3, 2] = (places[-1] - places[0]) / (len(places) - 1)
    lps[:3, 3] = places[0]
    return _Raw(sitk.GetArrayFromImage(image).T, _LPS_TO_RAS @ lps, modality)


def _squeeze(array: np.ndarray, path: Path) -> np.ndarray:
    """Drop trailing axes of one frame; a native-endian real array of three axes, or an error that says how to get
    one.
    """
    if array.dtype.names is not None or np.issubdtype(array.dtype, np.complexfloating):
        raise ImageError(f"'{path.name}' is a colour or complex image; save a single real value per voxel.")
    if array.ndim < 3:
        raise ImageError(
            f"'{path.name}' has {array.ndim} axes; a volume of slices is needed, with its spacing and orientation."
        )
    frames = array.shape[3:]
    if any(size != 1 for size in frames):
        raise ImageError(
            f"'{path.name}' holds {_times(frames)} volumes (time points, echoes or directions); save the one you want "
            "as its own file, for example with nibabel's four_to_three."
        )
    if min(array.shape) < 1:
        raise ImageError(f"'{path.name}' is empty ({_times(array.shape)} voxels); export it again.")
    return array.reshape(array.shape[:3], order="A").astype(array.dtype.newbyteorder("="), copy=False)


def _check_voxels(array: np.ndarray, path: Path) -> np.ndarray:
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32, copy=False)
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ImageError(
                f"{bad} of {array.size} voxels of '{path.name}' are not finite numbers "
                "(NaN or infinite); replace them by the value of air (for example numpy.nan_to_num) and send it again."
            )
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8)
    return array


def _check_affine(affine: np.ndarray, path: Path) -> np.ndarray:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ImageError(
            f"The header of '{path.name}' gives no usable voxel size and orientation "
            f"(affine {np.round(affine[:3], 4).tolist()}); convert the original images again."
        )
    return affine


def _check_size(shape: tuple[int, ...], path: Path) -> None:
    count = 1
    for size in shape:
        count *= int(size)
    if count > MAX_VOXELS:
        raise ImageError(
            f"'{path.name}' has {_times(shape)} voxels, more than the {MAX_VOXELS} that are read; crop or resample it."
        )


def _check_modality(value: object, where: str) -> Modality | None:
    text = "" if value is None else str(value).strip().upper()
    if text in ("", "AUTO", "NONE"):
        return None
    if text in ("MR", "MRI"):
        return "MR"
    if text == "CT":
        return "CT"
    raise RequestError(f"{where} is '{value}'; it must be CT or MR (or auto, to find out from the image).")


def _find_modality(
    option: Modality | None, raw: _Raw, path: Path, info: Mapping[str, Any] | None, array: np.ndarray
) -> tuple[Modality, str]:
    if option is not None:
        return option, "option"
    return find_stated_modality(path, info, raw.modality) or (guess_modality(array), "guessed")


def find_stated_modality(
    path: Path, info: Mapping[str, Any] | None = None, tag: str | None = None
) -> tuple[Modality, str] | None:
    """The modality that is written down somewhere, and where: "dicom" or "sidecar"; see `load_volume`.

    Args:
        path: The image.
        info: What a datastore knows about it.
        tag: DICOM's modality, if the format has one.

    Returns:
        None if nobody says; `guess_modality` then looks at the intensities.

    Raises:
        ImageError: if it is another modality than CT or MR.
        RequestError: if what the datastore or sidecar says is no modality.
    """
    # A datastore that converted the series to NIfTI (DICOMweb) hands on the tag, or "UNK".
    tag = str(tag or (info or {}).get("Modality") or "").strip().upper()
    if tag and tag not in ("OT", "SC", "SEG", "UNK"):
        if tag not in ("CT", "MR"):
            raise ImageError(
                f"'{path.name}' is a {tag} image, and only CT and MR are known here; give "
                "modality=CT or MR to try it anyway."
            )
        return cast(Modality, tag), "dicom"
    stated = info.get("modality") if info else None
    stated = read_sidecar(path).get("modality") if stated is None else stated
    found = _check_modality(stated, f"The modality that the datastore gives for '{path.name}'")
    return None if found is None else (found, "sidecar")


def read_sidecar(path: Path) -> dict[str, Any]:
    """What the file `<name>.json` next to an image says; empty if there is none or it is no JSON object."""
    sidecar = path.with_name(strip_suffix(path) + ".json")
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
    except (OSError, ValueError) as err:
        logger.warning("Ignored %s, which is no readable JSON: %s", sidecar.name, err)
        return {}
    return content if isinstance(content, dict) else {}


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def strip_suffix(path: str | os.PathLike[str]) -> str:
    """File name without the suffix of its image format.

    Example:
        >>> strip_suffix("studies/case.01.nii.gz")
        'case.01'
    """
    path = Path(path)
    suffix = _suffix(path)
    known = suffix in (*NIFTI_SUFFIXES, *ITK_SUFFIXES, *DICOM_SUFFIXES, *PICTURE_SUFFIXES) and not path.is_dir()
    return path.name[: -len(suffix)] if known else path.name


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(int(size)) for size in shape)


def _sample(array: np.ndarray, count: int = 1 << 20) -> np.ndarray:
    """About `count` voxels on a regular lattice, float32, one axis: enough for percentiles."""
    step = max(1, int(np.ceil((array.size / count) ** (1 / 3))))
    return np.asarray(array[::step, ::step, ::step], dtype=np.float32).ravel()


def guess_modality(array: np.ndarray) -> Modality:
    """CT if the intensities look like Hounsfield units, else MR.

    Hounsfield units are the only common scale with a real share of voxels well below zero (air, lung, fat) and nothing
    beyond dense metal. MR intensities start at zero, or, once normalised, stay within a few units of it. A CT that was
    rescaled to 0..1 or kept its offset of 1024 cannot be told from MR: give the modality.

    Args:
        array: Intensities, any shape of three axes.
    """
    values = _sample(array)
    below = float((values < -40).mean())
    return (
        "CT" if below > 0.005 and float(np.percentile(values, 99.5)) <= 4096 and float(values.min()) >= -32768 else "MR"
    )


def compute_body_threshold(volume: Volume) -> float:
    """Intensity above which a voxel belongs to the body.

    CT: `CT_BODY_HU`. MR: between the background and the body by Otsu's criterion on the square roots of the intensities
    (noise near zero and bright fat are both far from normal), never above a tenth of the 99th percentile.
    """
    if volume.modality == "CT":
        return float(max(CT_BODY_HU, float(volume.array.min()) + 1.0))
    values = _sample(volume.array)
    low, high = (float(v) for v in np.percentile(values, (0.5, 99)))
    if high <= low:
        return low
    scaled = np.sqrt(np.clip((values - low) / (high - low), 0, 1))
    split = _compute_otsu(scaled)
    return low + (high - low) * min(split**2, 0.1)


def _compute_otsu(values: np.ndarray, bins: int = 128) -> float:
    """Otsu's threshold of values in 0..1: the split with the largest variance between the two sides."""
    counts, edges = np.histogram(values, bins=bins, range=(0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][int(np.nanargmax(np.where(np.isfinite(between), between, -1)))])


def compute_window(volume: Volume, mr_headroom: float = 1.0) -> tuple[float, float]:
    """The intensities (low, high) that the network sees as -1 and 1.

    CT: `CT_WINDOW` in HU. MR: percentiles 1 and 99 of the body, so that a bright artefact or empty margins do not
    matter.

    Args:
        volume: The image.
        mr_headroom: How many times wider the window of an MR reaches, above its low end; see `ConditioningConfig`.
    """
    if volume.modality == "CT":
        return CT_WINDOW
    values = _sample(volume.array)
    body = values[values > compute_body_threshold(volume)]
    low, high = (float(v) for v in np.percentile(body if body.size >= 64 else values, (1, 99)))
    if high <= low:
        return float(volume.array.min()), float(volume.array.max())
    return low, low + mr_headroom * (high - low)


def _explain(err: Exception, path: Path) -> str:
    """What a reader says, without the folder: whoever sent an image need not learn where it lies on the server."""
    text = " ".join(str(err).split())
    for folder in {str(path.parent), str(path.resolve().parent)} - {".", os.sep}:
        text = text.replace(folder + os.sep, "")
    return text[-300:] or type(err).__name__
