"""The images of a local datastore as DICOM series."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import Datastore
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from progidiff.dicomweb.catalogue import Catalogue, Entry
from progidiff.dicomweb.frames import FrameStore, Series
from progidiff.dicomweb.geometry import ServedGrid
from progidiff.dicomweb.sources import list_sources
from progidiff.errors import ImageError, NotFoundError
from progidiff.images.formats import Use, find_format
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.labels.segments import load_label_map
from progidiff.labels.slicer import save_segmentation
from progidiff.proposals.edits import Edit
from progidiff.server.datastores.images import list_ids
from progidiff.server.datastores.pacs import PacsDatastore

_UID = re.compile(r"\d+(\.\d+)+")


class ServedImages:
    """Looks images up by what DICOM calls them.

    Args:
        root: State folder; entries and slices are kept below it.
        datastore: Gives the app's datastore.
    """

    def __init__(self, root: Path, datastore: Callable[[], Datastore]) -> None:
        self._catalogue = Catalogue(root / "entries")
        self._frames = FrameStore(root / "frames")
        self._datastore = datastore

    @property
    def is_remote(self) -> bool:
        """Whether the images are behind a DICOMweb server, which then serves them itself."""
        return isinstance(self._datastore(), DICOMWebDatastore)

    def entries(self) -> Iterator[Entry]:
        """Every image, by id, also those that cannot be served; one by one, as a new image takes a moment."""
        for image in sorted(map(str, self._datastore().list_images())):
            entry = self.describe(image)
            if entry is not None:
                yield entry

    def describe(self, image: str) -> Entry | None:
        """The entry of an image; None if its file is gone."""
        path = self._path(image)
        return self._catalogue.describe(image, path, self._info(image)) if path is not None else None

    def find(self, study_uid: str | None = None, series_uid: str | None = None) -> Entry:
        """The image of a study or series.

        Raises:
            NotFoundError: if there is none.
        """
        for entry in self.entries():
            identity = entry.identity
            if (
                not entry.refused
                and study_uid in (None, identity.study_uid)
                and series_uid in (None, identity.series_uid)
            ):
                return entry
        uid = f"series {series_uid[:64]}" if series_uid else f"study {(study_uid or '')[:64]}"
        raise NotFoundError(
            f"There is no {uid} here. The image may have been removed or replaced by "
            "another file; open the list of studies again."
        )

    def find_named(self, image: str) -> Entry | None:
        """The image that a client names by its SeriesInstanceUID instead of its id; None if it does not, or the series
        is not served from here.
        """
        if not _UID.fullmatch(image) or self.is_remote or image in list_ids(self._datastore()):
            return None
        try:
            return self.find(series_uid=image)
        except NotFoundError:
            return None

    def load(self, entry: Entry) -> Volume:
        """The image itself.

        Raises:
            ProGiDiffError: whatever is wrong with it.
        """
        path = self._path(entry.identity.image)
        if path is None:
            raise NotFoundError(
                f"The file of image '{entry.identity.image}' is gone from the studies folder. Put it back."
            )
        return load_volume(path, entry.identity.modality, self._info(entry.identity.image))

    def open(self, entry: Entry) -> Series:
        """The image as a series.

        Raises:
            ProGiDiffError: whatever is wrong with it, or the disk.
        """
        return self._frames.open(entry.identity, lambda: self.load(entry))

    def find_sources(self, image: str) -> list[Dataset]:
        """The headers of an image's DICOM slices, ascending along their normal, as `arrange` orders its voxels.

        Args:
            image: Its id.

        Raises:
            NotFoundError: if there is no such image.
            ImageError, GeometryError: if it is no DICOM series, or its slices cannot be referred to.
        """
        datastore = self._datastore()
        if isinstance(datastore, PacsDatastore):
            return datastore.find_sources(image)
        entry = self.describe(image)
        if entry is None:
            raise NotFoundError(f"There is no image '{image[:64]}' that could be a DICOM series.")
        if entry.refused:
            raise ImageError(f"'{image}' is not served as DICOM: {entry.refused}")
        return list_sources(self.open(entry))

    def arrange(self, volume: Volume, array: NDArray[Any]) -> NDArray[Any]:
        """An array on an image's grid, (I, J, K) in file order, as slices of its series, ascending along their normal.

        What came from a DICOMweb server has the order of its series already: slices last, ascending.
        """
        return array.transpose(2, 1, 0) if self.is_remote else volume.arrange(array)

    def to_series_grid(self, mask_file: Path, entry: Entry) -> None:
        """Rewrite a mask on the grid of the image's file to that of its series, in place.

        OHIF takes the voxels of a mask as they come and ignores its header.
        """
        volume = self.load(entry)
        series = ServedGrid.of(volume.grid).to_file_grid(volume.name)
        label = load_label_map(mask_file, volume.grid)
        stack = volume.grid.arrange(label.array).transpose(2, 1, 0)
        if find_format(mask_file, Use.SEGMENTS) is not None:
            save_segmentation(stack, series, mask_file, {name: value for value, name in label.names.items()})
        else:
            save_mask(stack, series, mask_file)

    def to_image_grid(self, mask_file: Path, entry: Entry) -> None:
        """The inverse of `to_series_grid`, for masks that a client made on the slices of the series.

        Raises:
            GeometryError: if the mask is not on the grid of the series.
        """
        volume = self.load(entry)
        series = ServedGrid.of(volume.grid).to_file_grid(volume.name)
        labels = load_label(mask_file, series)
        save_mask(volume.grid.from_stack(labels.transpose(2, 1, 0)), volume.grid, mask_file)

    def to_file_edits(self, edits: Sequence[Edit], entry: Entry) -> list[Edit]:
        """What somebody drew on the slices of a series, in voxels of the image's file.

        Args:
            edits: Their points count the column, the row and the slice of the series, slices ascending along their
                normal, all from 0: the order of the masks that a viewer gets. Painted slices are the same in both.
            entry: Of the series.

        Raises:
            GeometryError: if a point is outside of the series.
        """
        grid = replace(self.load(entry).grid, name=f"the series of {entry.identity.image}")
        return [
            edit.model_copy(
                update={"points": tuple(grid.find_voxel((z, row, column)) for column, row, z in edit.points)}
            )
            for edit in edits
        ]

    def _path(self, image: str) -> Path | None:
        path = Path(str(self._datastore().get_image_uri(image) or ""))
        return path if path.is_file() else None

    def _info(self, image: str) -> dict[str, Any]:
        return dict(self._datastore().get_image_info(image) or {})
