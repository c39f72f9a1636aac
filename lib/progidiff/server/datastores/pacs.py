"""A DICOMweb server (PACS) as datastore: the host's class, with what goes wrong in it mended.

* MR series are images too; the host asks for CT only, unless ``MONAI_LABEL_DICOMWEB_SEARCH_FILTER`` says otherwise.
* An image is labelled by a segmentation that a person made or accepted. One whose segments are all AUTOMATIC is a
  proposal.
* A segmentation comes back on the grid of its image: the host drops every slice that is empty.
* A saved label names the structures that are in it: the host goes through the table of names by position.
* New series are seen after seconds; the host remembers its lists for two hours.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from monailabel.datastore import dicom as host_dicom
from monailabel.datastore import xnat as host_xnat
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.datastore.utils.convert import binary_to_image
from monailabel.interfaces import app as host
from monailabel.interfaces.app import MONAILabelApp
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from progidiff.dicomweb.segmentation import open_segmentation, read_dataset
from progidiff.dicomweb.segmentation_writer import Segment, write_label
from progidiff.dicomweb.sources import read_sources
from progidiff.errors import GeometryError, ImageError, NotFoundError, ProGiDiffError, RequestError, StoreError
from progidiff.images.decoding import apart
from progidiff.images.dicom import convert_series, has_mixed_slices, read_dicom_folder
from progidiff.images.geometry import GRID_TOLERANCE, LPS_TO_RAS, is_same_place
from progidiff.images.modality import list_modalities
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.images.writing import save_array, save_mask
from progidiff.labels.history import FINAL
from progidiff.prompts.structures import name_label_id, number_structures
from progidiff.storage.atomic import scratch_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LISTS_SECONDS = 10.0
_MIN_SLICES = 2
_HOSTS_FILTER = {"Modality": "CT"}
"""What the host searches for if nobody sets ``MONAI_LABEL_DICOMWEB_SEARCH_FILTER``; it cannot be told from the same set
on purpose.
"""

_INFO = ("StudyDate", "StudyTime", "Modality", "RetrieveURL", "PatientID", "StudyInstanceUID")


class PacsDatastore(DICOMWebDatastore):
    """Series of a DICOMweb server as images, its segmentations as labels.

    Args:
        arguments: The host's.
        options: The host's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._recent: dict[str, tuple[float, Any]] = {}
        self._drawn_on: dict[str, tuple[str, str]] = {}
        self._recent_lock = threading.Lock()
        self._rescaled: set[str] = set()
        super().__init__(*arguments, **options)

    def list_images(self) -> list[str]:
        """SeriesInstanceUIDs of the images."""
        return self._remember("images", self._search_images)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images with a segmentation that a person made or accepted; with another tag than `final`, those with such a
        label kept here.
        """
        if label_tag not in (None, "", FINAL):
            return list(map(str, LocalDatastore.get_labeled_images(self, label_tag, labels)))
        return self._remember("labelled", lambda: sorted(set(self._find_labels()) & set(self.list_images())))

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """All other images."""
        labelled = set(self.get_labeled_images(label_tag, labels))
        return [image for image in self.list_images() if image not in labelled]

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Keep a label here; one of tag `final` also goes to the server, as a DICOM SEG.

        Raises:
            RequestError: if the label draws nothing.
            StoreError: if the DICOM SEG cannot be made, or the server does not take it.
        """
        image = self.get_image_uri(image_id)
        file = binary_to_image(image, label_filename) if label_filename.endswith(".bin") else label_filename
        info = dict(label_info)
        if label_tag == FINAL:
            labels = load_label(file, like=load_volume(image, info=self.get_image_info(image_id)).grid)
            segments = _describe_segments(labels, info.get("label_info") or [], str(info.get("provenance", "")))
            if not segments:
                raise RequestError(
                    "A label without any voxel cannot be a DICOM SEG, so the DICOMweb server does not take it. Accept "
                    "a slice that shows a structure first, or skip the image (POST "
                    "/progidiff/annotations/<image>/skip)."
                )
            stack = labels.transpose(2, 1, 0)
            info["SeriesInstanceUID"] = self.send(write_label(self.find_sources(image_id), stack, segments))
        return str(LocalDatastore.save_label(self, image_id, file, label_tag, info))

    def get_image_uri(self, image_id: str) -> str:
        """The file of an image, downloaded and converted by the host; where slices have slopes of their own, anew."""
        file = str(super().get_image_uri(image_id))
        series = Path(self._datastore.image_path()) / image_id
        if image_id not in self._rescaled and series.is_dir() and Path(file).is_file():
            self._rescaled.add(image_id)
            keep_own_slopes(series, Path(file))
        return file

    def find_sources(self, image_id: str) -> list[Dataset]:
        """The headers of an image's slices, ascending along their normal: slice k of its file is the k-th of them.

        Raises:
            ImageError, GeometryError: if a segmentation cannot refer to them.
        """
        grid = read_grid(Path(self.get_image_uri(image_id)))
        sources = read_sources(Path(self._datastore.image_path()) / image_id)
        first = np.asarray(sources[0].ImagePositionPatient, dtype=np.float64)
        if np.abs(LPS_TO_RAS[:3, :3] @ grid.affine[:3, 3] - first).max() > GRID_TOLERANCE * min(grid.spacing):
            raise GeometryError(
                f"The files of series {image_id} and the image that was made of them lie in different places. Remove "
                "both from the cache of the server, and open the image again."
            )
        return sources

    def send(self, content: bytes) -> str:
        """Store a DICOM SEG on the server; its SeriesInstanceUID.

        Raises:
            StoreError: if the server does not take it.
        """
        dataset = read_dataset(content)
        cure = "See that it runs and has space; then save again."
        try:
            answer = self._client.store_instances([dataset])
        except OSError as err:
            raise StoreError(f"The DICOMweb server did not take the segmentation ({err}). {cure}") from err
        refused = answer.get("FailedSOPSequence") or []
        if len(refused):
            raise StoreError(
                "The DICOMweb server refused the segmentation (reason "
                f"{refused[0].get('FailureReason', 'not given')}). {cure}"
            )
        with self._recent_lock:
            self._recent.clear()
        return str(dataset.SeriesInstanceUID)

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The file of a label: as saved here, else the server's segmentation on the grid of its image."""
        image_id = image_id or label_id
        kept = str(LocalDatastore.get_label_uri(self, image_id, label_tag) or "")
        if kept and Path(kept).is_file():
            return kept
        series = self._find_labels().get(image_id) if label_tag == FINAL else None
        return self._fetch_label(image_id, series) if series else ""

    def _download_labeled_data(self) -> None:
        for image in self.get_labeled_images():
            try:
                self.get_image_uri(image)
                self.get_label_uri(image, FINAL)
            except ImageError as err:
                logger.warning("The label of '%s' is left out: %s", image, err)

    def _dicom_info(self, series_id: str) -> dict[str, str]:
        found = self._client.search_for_series(search_filters={"SeriesInstanceUID": series_id})
        if not found:
            raise NotFoundError(f"The DICOMweb server has no series {series_id} any more.")
        meta = Dataset.from_json(found[0])
        return {
            "SeriesInstanceUID": series_id,
            **{name: str(meta[name].value) if name in meta else "UNK" for name in _INFO},
        }

    def _remember(self, name: str, compute: Callable[[], T]) -> T:
        with self._recent_lock:
            known = self._recent.get(name)
        if known is not None and time.monotonic() - known[0] < _LISTS_SECONDS:
            value: T = known[1]
            return value
        value = compute()
        with self._recent_lock:
            self._recent[name] = (time.monotonic(), value)
        return value

    def _search_images(self) -> list[str]:
        filters = (
            [{"Modality": modality} for modality in list_modalities()]
            if self._search_filter == _HOSTS_FILTER
            else [self._search_filter]
        )
        series = []
        for search in filters:
            for found in self._client.search_for_series(search_filters=search):
                dataset = Dataset.from_json(found)
                if int(dataset.get("NumberOfSeriesRelatedInstances") or _MIN_SLICES) >= _MIN_SLICES:
                    series.append(str(dataset.SeriesInstanceUID))
        return list(dict.fromkeys(series))

    def _find_labels(self) -> dict[str, str]:
        """Image -> the series of its last segmentation that is no proposal."""
        return self._remember("segmentations", self._search_labels)

    def _search_labels(self) -> dict[str, str]:
        newest: dict[str, tuple[str, str]] = {}
        for found in self._client.search_for_series(search_filters={"Modality": "SEG"}):
            dataset = Dataset.from_json(found)
            study, series = str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
            if series not in self._drawn_on:  # A series never changes.
                answer = self._client.retrieve_series_metadata(study, series)[0]
                meta = Dataset.from_json({tag: value for tag, value in answer.items() if "BulkDataURI" not in value})
                made = f"{meta.get('ContentDate', '')}{meta.get('ContentTime', '')}"
                self._drawn_on[series] = ("" if _is_proposal(meta) else _find_image(meta), made)
            image, made = self._drawn_on[series]
            if image:
                newest[image] = max(newest.get(image, ("", "")), (made, series))
        return {image: series for image, (_, series) in newest.items()}

    def _fetch_label(self, image_id: str, series: str) -> str:
        found = self._client.search_for_series(search_filters={"SeriesInstanceUID": series})
        (instance, *_) = self._client.retrieve_series(str(Dataset.from_json(found[0]).StudyInstanceUID), series)
        volume = load_volume(self.get_image_uri(image_id), info=self.get_image_info(image_id))
        segmentation = open_segmentation(_to_bytes(instance), volume.grid)
        ids = number_structures(segmentation.names.values())
        table = np.zeros(256, dtype=np.uint8)
        for label, name in segmentation.names.items():
            table[label] = ids[name]
        names = [{"name": name, "idx": int(table[label])} for label, name in segmentation.names.items()]
        with scratch_folder("label") as folder:
            file = save_mask(table[segmentation.labels], volume.grid, folder / "label.nii.gz")
            LocalDatastore.save_label(
                self, image_id, str(file), FINAL, {**self._dicom_info(series), "label_info": names}
            )
        return str(LocalDatastore.get_label_uri(self, image_id, FINAL))


def keep_own_slopes(series: Path, image: Path) -> bool:
    """Write an image that was converted with the first slice's slope for all slices again, each with its own.

    Args:
        series: The DICOM files.
        image: The file that the host made of them; replaced.

    Returns:
        Whether that was needed, and done.
    """
    try:
        if not apart(has_mixed_slices, reads=[series])(series):
            return False
        raw, grid = apart(read_dicom_folder, reads=[series])(series), read_grid(image)
        if not is_same_place(grid.shape, grid.affine, raw.affine):
            raise ImageError("the files and the converted image lie in different places")
        if np.array_equal(load_volume(image, list_modalities()[0]).array, raw.array):
            return False
        save_array(raw.array, raw.affine, image)
    except ProGiDiffError as err:
        logger.error("The slices of '%s' have intensities of different scales, which were lost: %s", series.name, err)
        return False
    logger.info("The slices of '%s' have intensities of different scales; it was converted again", series.name)
    return True


def open_remote(app: MONAILabelApp) -> Any:
    """The app's datastore behind an address: of this class if it is a DICOMweb server, else the host's (XNAT, DSA)."""
    setattr(app, "_download_dcmqi_tools", lambda: None)  # noqa: B010  The host would fetch programs from the network.
    setattr(host_xnat, "nifti_to_dicom_seg", _write_for_host)  # noqa: B010  The host's own calls one of these.
    setattr(host_dicom, "dicom_to_nifti", _convert)  # noqa: B010  It reads what the server sends, in this process.
    setattr(host, "DICOMWebDatastore", PacsDatastore)  # noqa: B010  The name by which the host makes it.
    return app.init_remote_datastore()


def _write_for_host(series_dir: str, label: str, label_info: Any, file_ext: str = "*", use_itk: bool = True) -> str:
    """What the host calls to turn a label into a DICOM SEG, for datastores of its own (XNAT).

    Args:
        series_dir: The DICOM files.
        label: A label file that was converted from them.
        label_info: What the labels are called, ascending.
        file_ext, use_itk: Of the host's own function; which files and which program, without meaning here.

    Returns:
        A new file.
    """
    grid = read_grid(Path(label))
    labels = load_label(label, like=grid)
    drawn = [int(value) for value in np.flatnonzero(np.bincount(labels.ravel())) if value]
    names = [str(entry.get("name", "")) for entry in label_info or []]
    segments = {
        value: Segment(name or f"structure {value}", value)
        for value, name in zip(drawn, [*names, *[""] * len(drawn)], strict=False)
    }
    handle, file = tempfile.mkstemp(prefix="progidiff-seg-", suffix=".dcm")
    with os.fdopen(handle, "wb") as target:
        target.write(write_label(read_sources(Path(series_dir)), labels.transpose(2, 1, 0), segments))
    return file


def _convert(series: str, is_seg: bool = False) -> str:
    """A downloaded series as one NIfTI file, for the host, which moves it away. Segmentations it never asks for."""
    handle, name = tempfile.mkstemp(prefix="progidiff-series-", suffix=".nii.gz")
    os.close(handle)
    with scratch_folder("series") as folder:
        convert_series(Path(series), folder / "image.nii.gz")
        shutil.move(folder / "image.nii.gz", name)
    return name


def _to_bytes(instance: Dataset) -> bytes:
    target = io.BytesIO()
    instance.save_as(target, enforce_file_format=True)
    return target.getvalue()


def _is_proposal(segmentation: Dataset) -> bool:
    kinds = {str(segment.get("SegmentAlgorithmType", "")) for segment in segmentation.get("SegmentSequence") or []}
    return kinds == {"AUTOMATIC"}


def _find_image(segmentation: Dataset) -> str:
    references = segmentation.get("ReferencedSeriesSequence") or []
    return str(references[0].get("SeriesInstanceUID", "")) if len(references) else ""


def _describe_segments(labels: NDArray[Any], names: list[dict[str, Any]], provenance: str) -> dict[int, Segment]:
    """Label id -> segment, of the labels that are present."""
    by_id = {int(entry["idx"]): str(entry["name"]) for entry in names if "idx" in entry and "name" in entry}
    segments = {}
    for value in map(int, np.flatnonzero(np.bincount(labels.ravel()))):
        if value:
            name = by_id.get(value) or name_label_id(value) or f"structure {value}"
            segments[value] = Segment(name, value, provenance)
    return segments
