"""The data sets of a served series: what a DICOM file of each slice says, and the same as DICOM JSON.

Everything that identifies comes from the image's id and the bytes of its file, so it is the same after a restart and on
another server, and another file under the same name is another series.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from progidiff.dicomweb.geometry import ServedGrid
from progidiff.dicomweb.pixels import Rescale
from progidiff.images.modality import get_modality

IMPLEMENTATION_UID = "2.25.238612271044953103211262302158963846217"

_NAMESPACE = uuid.UUID("b3837b83-6f0c-5d5e-9c47-8f1f6b1f5d89")


def make_uid(*parts: str) -> str:
    """A UID of the root 2.25 (a UUID as a number), the same for the same parts.

    Example:
        >>> make_uid("series", "liver_01") == make_uid("series", "liver_01") != make_uid("study", "liver_01")
        True
    """
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(0).join(parts)).int}"


@dataclass(frozen=True)
class Identity:
    """Who a served image is.

    Attributes:
        image: Id in the datastore.
        digest: Of the bytes of its file.
        modality: "CT" or "MR".
        study_date: YYYYMMDD, "" if not known: a file's own date says nothing about the examination.
        description: One line for people.
    """

    image: str
    digest: str
    modality: str
    study_date: str = ""
    description: str = ""

    @cached_property
    def study_uid(self) -> str:
        """StudyInstanceUID."""
        return make_uid("study", self.image, self.digest)

    @cached_property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return make_uid("series", self.image, self.digest)

    @cached_property
    def frame_of_reference_uid(self) -> str:
        """FrameOfReferenceUID."""
        return make_uid("frame of reference", self.image, self.digest)

    def instance_uid(self, index: int) -> str:
        """SOPInstanceUID of a slice."""
        return make_uid("instance", self.image, self.digest, str(index))

    @property
    def sop_class_uid(self) -> str:
        """CT or MR Image Storage."""
        return get_modality(self.modality).sop_class_uid


def build_study(identity: Identity, num_instances: int) -> Dataset:
    """What a search for studies answers."""
    study = _build_patient_and_study(identity)
    study.ModalitiesInStudy = [identity.modality]
    study.NumberOfStudyRelatedSeries = 1
    study.NumberOfStudyRelatedInstances = num_instances
    return study


def build_series(identity: Identity, num_instances: int) -> Dataset:
    """What a search for series answers; it also says what the study is, for searches across studies."""
    series = build_study(identity, num_instances)
    series.Modality = identity.modality
    series.SeriesInstanceUID = identity.series_uid
    series.SeriesNumber = 1
    series.SeriesDescription = identity.description or identity.image
    series.NumberOfSeriesRelatedInstances = num_instances
    return series


def build_common(identity: Identity, grid: ServedGrid, rescale: Rescale, window: tuple[float, float]) -> Dataset:
    """What all slices of a series say.

    Args:
        identity: Who the image is.
        grid: Where its slices lie.
        rescale: How its intensities are stored.
        window: The intensities shown as black and white.
    """
    modality = get_modality(identity.modality)
    common = _build_patient_and_study(identity)
    common.SOPClassUID = modality.sop_class_uid
    common.Modality = identity.modality
    common.Manufacturer = "ProGiDiff Label"
    common.ImageType = ["DERIVED", "SECONDARY", modality.image_type]
    common.DerivationDescription = "Axial slices of an image file that was no DICOM"
    common.SeriesInstanceUID = identity.series_uid
    common.SeriesNumber = 1
    common.SeriesDescription = identity.description or identity.image
    common.FrameOfReferenceUID = identity.frame_of_reference_uid
    common.PositionReferenceIndicator = ""
    common.PatientPosition = ""
    common.AcquisitionNumber = 1
    common.ImageOrientationPatient = [_decimal(value) for value in grid.orientation]
    dx, dy, dz = grid.spacing
    common.PixelSpacing = [_decimal(dy), _decimal(dx)]
    common.SliceThickness = _decimal(dz)
    common.SpacingBetweenSlices = _decimal(dz)
    common.Rows, common.Columns = grid.shape[1], grid.shape[2]
    common.SamplesPerPixel = 1
    common.PhotometricInterpretation = "MONOCHROME2"
    common.BitsAllocated = common.BitsStored = 16
    common.HighBit = 15
    common.PixelRepresentation = int(rescale.signed)
    common.RescaleSlope = _decimal(rescale.slope)
    common.RescaleIntercept = _decimal(rescale.intercept)
    common.RescaleType = modality.rescale_type
    common.WindowCenter = _decimal((window[0] + window[1]) / 2)
    common.WindowWidth = _decimal(max(window[1] - window[0], 1e-6))
    if not modality.is_magnetic:
        common.KVP = None
    else:
        common.ScanningSequence = "RM"
        common.SequenceVariant = "NONE"
        common.ScanOptions = common.MRAcquisitionType = ""
        common.EchoTime = common.EchoTrainLength = common.RepetitionTime = None
    return common


def build_own(identity: Identity, grid: ServedGrid, index: int) -> Dataset:
    """What one slice says beside `build_common`."""
    own = Dataset()
    own.SOPInstanceUID = identity.instance_uid(index)
    own.InstanceNumber = index + 1
    position = grid.position(index)
    own.ImagePositionPatient = [_decimal(value) for value in position]
    own.SliceLocation = _decimal(float(position @ np.cross(grid.orientation[:3], grid.orientation[3:])))
    return own


def build_file(common: Dataset, own: Dataset, pixels: bytes) -> Dataset:
    """A whole DICOM file of one slice; write it with ``save_as(..., enforce_file_format=True)``."""
    dataset = Dataset()
    dataset.update(common)
    dataset.update(own)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = common.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = own.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = IMPLEMENTATION_UID
    dataset.add_new("PixelData", "OW", pixels)
    return dataset


def to_json(dataset: Dataset) -> dict[str, Any]:
    """DICOM JSON."""
    return dict(dataset.to_json_dict())


def join_json(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """DICOM JSON of several data sets as one, its tags ascending."""
    joined = {tag: element for part in parts for tag, element in part.items()}
    return dict(sorted(joined.items()))


def _build_patient_and_study(identity: Identity) -> Dataset:
    study = Dataset()
    study.SpecificCharacterSet = "ISO_IR 192"
    study.PatientName = identity.image
    study.PatientID = identity.image
    study.PatientBirthDate = study.PatientSex = ""
    study.StudyInstanceUID = identity.study_uid
    study.StudyDate = identity.study_date
    study.StudyTime = study.AccessionNumber = study.ReferringPhysicianName = ""
    study.StudyID = "1"
    study.StudyDescription = identity.description
    return study


def _decimal(value: float) -> str:
    return str(format_number_as_ds(float(value)))
