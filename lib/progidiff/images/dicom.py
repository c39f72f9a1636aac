"""A DICOM series as a volume, with SimpleITK."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.decoding import apart
from progidiff.images.geometry import LPS_TO_RAS, Affine
from progidiff.images.raw import Raw, check_size
from progidiff.storage.atomic import check_regular, open_regular

_STORED_AS = ("0028|1052", "0028|1053", "0028|0100", "0028|0101", "0028|0103")
"""RescaleIntercept, RescaleSlope, BitsAllocated, BitsStored, PixelRepresentation."""


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM, whatever its name."""
    with open_regular(path) as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom_file(path: Path) -> Raw:
    """The series that a file belongs to, from the files beside it."""
    import SimpleITK as sitk

    check_regular(path.parent)  # Every file in it is opened to find the series.
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    series = reader.GetMetaData("0020|000e").strip() if reader.HasMetaDataKey("0020|000e") else ""
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path.parent), series) if series else ()
    return _read_dicom_series(list(files) or [str(path)], path)


@dataclass(frozen=True)
class DicomSeries:
    """The files of one series in a folder.

    Attributes:
        uid: SeriesInstanceUID, with what else the reader tells series apart by.
        modality, description: As DICOM says; "" if it does not.
        files: Their paths.
    """

    uid: str
    modality: str
    description: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.uid} ({', '.join([*filter(None, (self.modality, self.description)), f'{len(self.files)} files'])})"
        )


def read_series_files(files: list[str], path: Path) -> Raw:
    """Files that are one series, wherever they lie; `path` is what to call it in messages."""
    return _read_dicom_series(files, path)


def list_series(folder: Path) -> list[DicomSeries]:
    """The series whose files lie directly in a folder; what is no DICOM image is passed over."""
    return apart(_list_series, reads=[folder])(folder)


def convert_series(folder: Path, target: Path) -> None:
    """A folder of DICOM files as one NIfTI file, as the host does it for its DICOMweb datastore.

    Raises:
        ImageError: if they cannot be read.
    """
    try:
        apart(_convert_series, reads=[folder], writes=[target.parent])(folder, target)
    except RuntimeError as err:
        raise ImageError(f"The series cannot be read ({' '.join(str(err).split())[-200:]}). Export it again.") from err


def _convert_series(folder: Path, target: Path) -> None:
    import SimpleITK as sitk

    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    if len(os.listdir(folder)) > 1:
        series = sitk.ImageSeriesReader()
        series.SetFileNames(files)
        image = series.Execute()
    else:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(folder / os.listdir(folder)[0]))
        image = reader.Execute()
    sitk.WriteImage(image, str(target))


def _list_series(folder: Path) -> list[DicomSeries]:
    import SimpleITK as sitk

    found = []
    check_regular(folder)
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        files = tuple(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid))
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(files[0])
        reader.ReadImageInformation()
        modality, description = (
            reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else "" for key in ("0008|0060", "0008|103e")
        )
        found.append(DicomSeries(uid, modality, description, files))
    return found


def read_dicom_folder(path: Path) -> Raw:
    """The one series of a folder.

    Raises:
        ImageError: if it holds none, or several.
    """
    series = _list_series(path)
    if not series:
        raise ImageError(
            f"The folder '{path.name}' holds no DICOM series; send a file, or a folder "
            "whose files are one DICOM series."
        )
    if len(series) > 1:
        names = "; ".join(map(str, series[:8]))
        raise ImageError(
            f"The folder '{path.name}' holds {len(series)} DICOM series: {names}. Put the "
            "one you want into a folder of its own."
        )
    return _read_dicom_series(list(series[0].files), path)


def has_mixed_slices(folder: Path) -> bool:
    """Whether the slices of a folder store intensities in different ways, so that readers of series which take the
    first slice's for all go wrong.
    """
    import SimpleITK as sitk

    found = set()
    for series in _list_series(folder):
        for file in series.files:
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(file)
            reader.ReadImageInformation()
            found.add(tuple(reader.GetMetaData(key) if reader.HasMetaDataKey(key) else "" for key in _STORED_AS))
    return len(found) > 1


def _read_dicom_series(files: list[str], path: Path) -> Raw:
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
            if len(files) == 1:
                return _read_frames(Path(file))
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
        check_size((*header.GetSize()[:2], len(files)), path)
    if len(files) < 2:
        raise ImageError(f"'{path.name}' is a single DICOM slice; send the folder with the whole series.")
    order, affine = _order_slices(positions, orientations, spacings, path)
    return Raw(_read_slices([files[index] for index in order], path), affine, modality)


def _order_slices(
    positions: Sequence[Sequence[float]],
    orientations: Sequence[Sequence[float]],
    spacings: Sequence[Sequence[float]],
    path: Path,
) -> tuple[NDArray[np.intp], Affine]:
    """The slices by their place along the normal, and voxel index -> RAS mm.

    Args:
        positions: ImagePositionPatient of each, LPS mm.
        orientations: ImageOrientationPatient of each.
        spacings: Of each, along a row and down a column, mm.
        path: Of the series, for messages.

    Raises:
        ImageError: if they are no stack of parallel slices at equal steps.
    """
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
    lps = np.eye(4)
    lps[:3, 0] = row * spacings[0][0]
    lps[:3, 1] = column * spacings[0][1]
    lps[:3, 2] = (places[-1] - places[0]) / (len(places) - 1)
    lps[:3, 3] = places[0]
    return order, LPS_TO_RAS @ lps


def _read_frames(file: Path) -> Raw:
    """An enhanced CT or MR object: all slices in one file, with the place and the rescaling of each.

    Raises:
        ImageError: if it is another kind of multi-frame file, or compressed in a way that is not read here.
    """
    import pydicom

    dataset = pydicom.dcmread(file)
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), pydicom.Dataset())
    convert = "convert it to NIfTI first (for example with dcm2niix)."
    check_size((int(dataset.get("Columns", 0)), int(dataset.get("Rows", 0)), max(1, len(frames))), file)

    def find(frame: pydicom.Dataset, group: str, name: str) -> Any:
        for holder in (frame, shared):
            item = next(iter(holder.get(group) or []), None)
            if item is not None and name in item:
                return item[name].value
        return None

    places = [
        (
            find(frame, "PlanePositionSequence", "ImagePositionPatient"),
            find(frame, "PlaneOrientationSequence", "ImageOrientationPatient"),
            find(frame, "PixelMeasuresSequence", "PixelSpacing"),
        )
        for frame in frames
    ]
    if len(places) < 2 or any(part is None for place in places for part in place):
        raise ImageError(f"'{file.name}' is a multi-frame DICOM file that does not say where its frames lie; {convert}")
    order, affine = _order_slices(
        [[float(value) for value in place[0]] for place in places],
        [[float(value) for value in place[1]] for place in places],
        [[float(value) for value in reversed(place[2])] for place in places],
        file,
    )
    try:
        pixels = dataset.pixel_array
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as err:
        raise ImageError(f"The frames of '{file.name}' cannot be decoded here ({str(err)[:120]}); {convert}") from err
    if pixels.ndim != 3 or len(pixels) != len(frames):
        raise ImageError(f"'{file.name}' is a multi-frame DICOM file of another kind than grey slices; {convert}")
    rescale = "PixelValueTransformationSequence"
    slopes = np.array([float(find(frame, rescale, "RescaleSlope") or 1) for frame in frames])
    intercepts = np.array([float(find(frame, rescale, "RescaleIntercept") or 0) for frame in frames])
    stack: NDArray[Any] = pixels
    if (slopes != 1).any() or (intercepts != np.rint(intercepts)).any():
        stack = (pixels * slopes[:, None, None] + intercepts[:, None, None]).astype(np.float32)
    elif intercepts.any():
        stack = pixels.astype(np.int32) + intercepts.astype(np.int32)[:, None, None]
    return Raw(np.ascontiguousarray(stack[order]).T, affine, str(dataset.get("Modality", "")) or None)


def _read_slices(files: list[str], path: Path) -> NDArray[Any]:
    """The slices as one array (I, J, K), each rescaled by its own slope and intercept.

    One after the other: ITK's reader of series takes the type of the first slice for all, and where that one has a
    whole slope, as the first slices of PET and some MR series do, fractions of all others would be cut off.

    Returns:
        Whole numbers of the smallest type that holds those of all slices, or float32 if a slice has fractions.
    """
    import SimpleITK as sitk

    slices: list[NDArray[Any]] = []
    for file in files:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(file)
        image = reader.Execute()
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise ImageError(
                f"The series in '{path.name}' is in colour; send the original images, not captures of a screen."
            )
        pixels = sitk.GetArrayFromImage(image)
        pixels = pixels.reshape(pixels.shape[-2:])
        if slices and pixels.shape != slices[0].shape:
            raise ImageError(f"The slices of the series in '{path.name}' differ in size; remove scouts and localisers.")
        slices.append(pixels)
    dtype = np.result_type(*{pixels.dtype for pixels in slices})
    stack = np.empty((len(slices), *slices[0].shape), np.float32 if np.issubdtype(dtype, np.floating) else dtype)
    for index, pixels in enumerate(slices):
        stack[index] = pixels
    return stack.T
