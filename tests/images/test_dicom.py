"""DICOM series whose slices differ in how they store intensities, against the numbers that each file states itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, PositronEmissionTomographyImageStorage

from progidiff.images.reading import load_volume

SHAPE = (5, 24, 20)
"""Slices, rows, columns."""

CLASSES = {"PT": PositronEmissionTomographyImageStorage, "MR": MRImageStorage, "CT": CTImageStorage}


def write_slice(path: Path, z: int, stored: np.ndarray, modality: str, slope: float, intercept: float) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CLASSES[modality]
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"1.2.826.0.1.5.{z}"
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
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
    dataset.save_as(path, write_like_original=False)


@pytest.mark.parametrize("modality", ["PT", "MR", "CT"])
@pytest.mark.parametrize(
    ("slopes", "intercepts", "types"),
    [
        ((1, 0.37, 2.0913, 0.00051, 7), (0,) * 5, "HHHHH"),
        ((1, 1, 1, 1, 1), (0, -0.5, 3, 1000, -1024), "HHHHH"),
        ((1, 1, 1, 1, 1), (0,) * 5, "BHhHB"),
        ((2, 1, 3, 1, 1), (-1024, 0, 70_000, 5, -5), "hHBhH"),
        ((0.25, 1, 1, 1, 1.5), (0, 0, -1024, 0, 0), "HhHBH"),
    ],
    ids=["slopes", "intercepts", "types", "whole numbers", "mixed"],
)
def test_every_slice_has_its_own_slope_intercept_and_type(
    tmp_path: Path, modality: str, slopes: tuple[float, ...], intercepts: tuple[float, ...], types: str
) -> None:
    random = np.random.default_rng(3)
    for z, kind in enumerate(types):
        limits = np.iinfo(kind)
        stored = random.integers(limits.min, limits.max, SHAPE[1:], dtype=np.dtype(kind), endpoint=True)
        write_slice(tmp_path / "series" / f"{z}.dcm", z, stored, modality, slopes[z], intercepts[z])
    volume = load_volume(tmp_path / "series", "MR")
    stack, _ = volume.to_stack()
    for z, slope in enumerate(slopes):
        file: Any = pydicom.dcmread(tmp_path / "series" / f"{z}.dcm")
        wanted = file.pixel_array.astype(np.float64) * float(file.RescaleSlope) + float(file.RescaleIntercept)
        assert np.abs(stack[z] - wanted).max() < slope, (z, volume.array.dtype)
        assert len(np.unique(stack[z])) == len(np.unique(file.pixel_array))
