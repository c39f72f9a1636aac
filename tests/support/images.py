"""Small images in every format and orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, PositronEmissionTomographyImageStorage

SHAPE = (11, 9, 7)


def make_affine(codes: str, spacing: tuple[float, float, float] = (1.5, 0.8, 4.0), degrees: float = 0.0) -> np.ndarray:
    """Voxel index -> RAS mm for a volume with these axis codes and voxel edges, tilted about the patient's z and x
    axes.
    """
    orientation = axcodes2ornt(tuple(codes))
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(orientation):
        affine[int(world), axis] = sign * spacing[axis]
    affine[3, 3] = 1
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn_z = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    turn_x = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])
    affine = turn_x @ turn_z @ affine
    affine[:3, 3] = (12.5, -40.25, 101.0)
    return affine


GEOMETRIES = {
    "lps": make_affine("LPS"),
    "ras": make_affine("RAS"),
    "las": make_affine("LAS"),
    "sagittal": make_affine("PIR", (1.0, 1.0, 5.0)),
    "coronal": make_affine("RSA", (1.2, 1.2, 6.0)),
    "thin slices": make_affine("RPI", (0.7, 0.7, 0.5)),
    "oblique": make_affine("LPS", degrees=12),
    "oblique sagittal": make_affine("AIL", degrees=-20),
}


def make_image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Random HU-like int16 values."""
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def write_dicom(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    compressor: str | None = None,
    uid: str = "1.2.826.0.1.1",
    **tags: str,
) -> Path:
    """One file per slice of an (I, J, K) array of HU (stored with an offset of 1024), with the tags that place it in
    the patient.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    values = {
        "0008|0060": "CT",
        "0020|000e": uid,
        "0020|000d": "1.2.826.0.1",
        "0008|103e": "abdomen",
        "0028|1052": "-1024",
        "0028|1053": "1",
    }
    values |= {key.replace("x", "|"): value for key, value in tags.items()}
    for k in reversed(range(array.shape[2])):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k].T)[None])
        image.SetSpacing([*spacing[:2].tolist(), float(spacing[2])])
        for key, value in values.items():
            image.SetMetaData(key, value)
        place = lps[:3, 3] + k * lps[:3, 2]
        image.SetMetaData("0020|0032", "\\".join(f"{v:.6f}" for v in place))
        image.SetMetaData("0020|0037", "\\".join(f"{v:.8f}" for v in (*row, *column)))
        image.SetMetaData("0020|0013", str(array.shape[2] - k))
        image.SetMetaData("0008|0018", f"{uid}.{k}")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        if compressor:
            writer.UseCompressionOn()
            writer.SetCompressor(compressor)
        writer.SetFileName(str(folder / f"{(k * 7) % 23:03d}.dcm"))
        writer.Execute(image)
    return folder


_CLASSES = {"PT": PositronEmissionTomographyImageStorage, "MR": MRImageStorage, "CT": CTImageStorage}


def write_slice(path: Path, z: int, stored: np.ndarray, modality: str, slope: float, intercept: float) -> None:
    """One axial DICOM slice, 3 mm above the one before, of numbers as they are stored."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = _CLASSES[modality]
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"1.2.826.0.1.5.{z}"
    dataset.Modality = modality
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1", "1.2.826.0.1.4"
    dataset.ImagePositionPatient = [-10.0, -12.0, 3.0 * z]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [1.5, 1.5]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = stored.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = dataset.BitsAllocated, dataset.BitsAllocated - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
    dataset.add_new("PixelData", "OW" if dataset.BitsAllocated == 16 else "OB", stored.tobytes())
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
