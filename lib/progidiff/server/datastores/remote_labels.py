"""Labels of a datastore that is not a local folder (DICOMweb): the same checks and the same history, kept beside the
server.

The datastore stays the host's: it turns a label into a DICOM SEG and sends it. The history comes first, so that a label
is kept even if the sending fails; then it is taken out of force again and the request fails.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore

from progidiff.dicomweb.codes import warn_uncoded
from progidiff.errors import NotFoundError
from progidiff.images.reading import read_grid
from progidiff.labels.audit import describe_origin
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.history import FINAL, Annotation, AnnotationStore
from progidiff.labels.in_force import find_previous, is_repeat, record_ready, rename_in_force
from progidiff.labels.naming import declare_label, name_label
from progidiff.labels.saving import (
    SaveOptions,
    check_label,
    combine_ids,
    load_label_ids,
    open_label,
    prepare_label,
)
from progidiff.proposals.store import ProposalStore
from progidiff.server.datastores.image_locks import ImageLocks
from progidiff.server.datastores.local import SavedLabel, check_replaced, check_tag
from progidiff.storage.atomic import scratch_folder

logger = logging.getLogger(__name__)


class RemoteLabels:
    """What `SafeLocalDatastore` does for labels, for any datastore of the host.

    Args:
        datastore: Gives the datastore.
        find_image: Image id -> path of the image, or `NotFoundError`.
        state: The server's own folder; its labels.json, if there is one, names the ids.
        annotations: History of labels.
        proposals: Kept proposals, to compare labels with.
    """

    def __init__(
        self,
        datastore: Callable[[], Datastore],
        find_image: Callable[[str], str],
        state: Path,
        annotations: AnnotationStore,
        proposals: ProposalStore,
    ) -> None:
        self.annotations = annotations
        self.structures = FolderStructures(state, state, annotations)
        """As `SafeLocalDatastore.structures`."""
        self._datastore = datastore
        self._find_image = find_image
        self._state = state
        self._proposals = proposals
        self._locks = ImageLocks()

    def read_label_ids(self) -> dict[str, int]:
        """As `SafeLocalDatastore.read_label_ids`."""
        return load_label_ids(self._state)

    def save_annotated(
        self,
        image_id: str,
        label_file: str | os.PathLike[str],
        tag: str,
        params: Mapping[str, Any],
        user: str = "",
        client: str = "",
        replaces: int | None = None,
    ) -> SavedLabel:
        """As `SafeLocalDatastore.save_annotated`."""
        check_tag(tag)
        grid = read_grid(Path(self._find_image(image_id)))
        options = SaveOptions.from_params(params, grid.num_slices)
        sent = open_label(Path(label_file), grid)
        with self._locks.hold(image_id), scratch_folder("label") as scratch:
            previous = find_previous(self.annotations, image_id, tag)
            named = name_label(sent, options, self.structures, previous)
            kept_ids = combine_ids(load_label_ids(self._state), previous, named.names)
            checked = check_label(Path(label_file), named.label, named.options, kept_ids)
            ready = prepare_label(checked, grid, named.options, image_id, previous, self._proposals, scratch)
            saves = self.annotations.in_force(image_id, tag)
            check_replaced(saves, replaces)
            if is_repeat(ready, saves):
                return SavedLabel(image_id, saves[-1], True, ready.warnings)
            label = record_ready(self.annotations, image_id, ready, tag, user, ready.client or client)
            label_id = self._send(image_id, tag, label, params, user)
            told, added = declare_label(
                self.structures, replace(ready, looks=named.looks, confirm=options.confirm), user
            )
            return SavedLabel(label_id, label, False, (*ready.warnings, *told, *warn_uncoded(ready.label_ids)), added)

    def remove_label(self, label_id: str, label_tag: str, user: str = "", reason: str = "") -> None:
        """Take a label out of force, and out of what the host keeps of it; a series that was sent stays where it is.

        Raises:
            NotFoundError: if there is no such label.
        """
        tag = check_tag(label_tag)
        if (
            tag not in self._datastore().get_labels_by_image_id(label_id)
            and self.annotations.current(label_id, tag) is None
        ):
            raise NotFoundError(
                f"Image '{label_id[:100]}' has no label with tag '{tag}'. GET "
                "/datastore/?output=all lists what there is."
            )
        with self._locks.hold(label_id):
            if self.annotations.current(label_id, tag) is not None:
                self.annotations.delete(label_id, user, tag, reason)
            self._forget(label_id, tag)

    def undo(self, image_id: str, user: str = "", tag: str = FINAL) -> Annotation | None:
        """Go back one step and send what is in force then; see `AnnotationStore.undo`."""
        with self._locks.hold(image_id):
            label = self.annotations.undo(image_id, user, tag)
            if label is None:
                self._forget(image_id, tag)
            else:
                self._send(image_id, tag, label, {}, user)
            return label

    def restore(self, image_id: str, sequence: int, user: str = "") -> Annotation:
        """Put an earlier save in force again and send it; see `AnnotationStore.restore`."""
        with self._locks.hold(image_id):
            label = self.annotations.restore(image_id, sequence, user)
            self._send(image_id, label.tag, label, {}, user)
            return label

    def rename_structure(self, image_id: str, old: str, new: str, user: str = "", tag: str = FINAL) -> Annotation:
        """As `SafeLocalDatastore.rename_structure`; the renamed label is sent."""
        grid = read_grid(Path(self._find_image(image_id)))
        with self._locks.hold(image_id), scratch_folder("label") as scratch:
            ready = rename_in_force(
                self.annotations, image_id, old, new, grid, load_label_ids(self._state), scratch, tag
            )
            label = record_ready(self.annotations, image_id, ready, tag, user, ready.client)
            self._send(image_id, tag, label, {}, user)
            return label

    def _forget(self, image_id: str, tag: str) -> None:
        """Take a label out of the host's copy. Its own way would look for a series of the label's name on the DICOMweb
        server first.
        """
        datastore = self._datastore()
        if not isinstance(datastore, LocalDatastore):
            datastore.remove_label(image_id, tag)
            return
        path = LocalDatastore.get_label_uri(datastore, image_id, tag)
        if path:
            Path(path).unlink(missing_ok=True)
            datastore.refresh()

    def _send(self, image_id: str, tag: str, label: Annotation, params: Mapping[str, Any], user: str) -> str:
        info = {
            **params,
            "label_info": [{"name": name, "idx": value} for name, value in label.label_ids],
            "annotation": label.sequence,
        }
        info["provenance"] = describe_origin(label)
        try:
            return str(self._datastore().save_label(image_id, str(self.annotations.label_file(label)), tag, info))
        except Exception:
            logger.error(
                "Label %d of '%s' could not be sent; it stays in the history and counts no more",
                label.sequence,
                image_id,
            )
            try:
                self.annotations.undo(image_id, user, tag)
            except NotFoundError:
                logger.exception("It could not be taken out of force")
            raise
