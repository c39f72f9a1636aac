"""The local datastore: checked labels, kept history, files that appear by rename, one server per folder.

What MONAI Label's own class does without locks and in place happens here under one lock per process and one between
processes, on copies that are swapped in: a reader never sees half of a change. What somebody sent is opened before any
lock is taken, and joined with the label in force under a lock of its image alone: a file that takes long to read keeps
nobody from saving. A save then goes

1. a copy of the file beside its place in `labels/<tag>/`, flushed: a disk that refuses it refuses it here,
2. the label version and its line into the history (`AnnotationStore.record`), under the lock of all,
3. the copy to its place by rename; what refuses this is taken back in the history,
4. a row into the index (`DatastoreIndex`), which remembers which file was placed. `datastore_v2.json`, the host's list,
   is written when nothing else happens, and at the end.

No lock is waited for longer than 30 s. Only plain files count, and links only if they stay in the studies folder.

Labels that somebody else made count from the moment they lie in `labels/final/`. Their headers are looked at beside all
locks soon after (`check_foreign_labels`): one that is no label, or on another grid than its image, counts no more, with
the reason among what is left out. Its history begins when somebody opens or saves the image.

What a crash left between two steps is finished from the history at the next start, for every image: a file that is the
one placed last and not the one in force shows it. Files that somebody else puts into, changes in or takes out of the
folders are taken as they are, and go into the history too; one that cannot be read does not count.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import functools
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from monailabel.config import settings
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel

from progidiff.errors import (
    BusyError,
    ConflictError,
    ImageError,
    NotFoundError,
    ProGiDiffError,
    RequestError,
    StoreError,
)
from progidiff.images.folders import LeftOut, list_left_out
from progidiff.images.formats import Use, find_format, is_picture, list_spellings, list_suffixes, strip_suffix
from progidiff.images.geometry import Grid
from progidiff.images.ids import check_id
from progidiff.images.pictures import check_picture
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.history import FINAL, Annotation, AnnotationStore, hash_file, split_label_name
from progidiff.labels.in_force import find_previous, is_repeat, record_ready, rename_in_force
from progidiff.labels.naming import declare_label, name_label
from progidiff.labels.saving import (
    ReadyLabel,
    SaveOptions,
    check_label,
    combine_ids,
    load_label_ids,
    open_label,
    prepare_label,
)
from progidiff.labels.segments import LabelMap, find_names
from progidiff.proposals.store import ProposalStore
from progidiff.server.datastores.changes import ChangeLog
from progidiff.server.datastores.host_file import HostFile, merge_records, parse_record, plain
from progidiff.server.datastores.image_locks import ImageLocks
from progidiff.server.datastores.index import DatastoreIndex, FileState, Placed, Row
from progidiff.storage.atomic import flush, make_scratch_name, remove_leftovers, scratch_folder
from progidiff.storage.json_text import is_plain_path, is_whole, show_text, write_json
from progidiff.storage.state_files import note_damage

logger = logging.getLogger(__name__)

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCK_SECONDS = 30.0
_TRIES = 5
_CHANGES = ("created", "deleted", "modified", "moved")
_TAKEN_OUT = "the file was taken out of the folder"
_HOST_NOTE = "host file"
"""Of the index: which `datastore_v2.json` is this program's own, or was taken over."""

_HOST_REVISION = "host revision"
"""Of the index: which of its revisions that file holds."""

_NOT_WRITTEN = "'{}' could not be written ({}). Free some disk space and send it again; nothing else changed."

_NO_IMAGE = "There is no image '{}', so this label counts for none. Give it the name of its image, letter by letter."

_NO_LABEL = "This label does not count: {}"

_IDLE_SECONDS = 5.0
"""Without a change before the host's file is written; twenty times longer than the last time took, if that is more."""

_REST = 20
"""How many times longer than looking through the labels took nobody looks again."""

_PATIENCE_SECONDS = 300.0
"""After which it is written all the same."""

_held: dict[str, FileLock] = {}
"""Folders that this process serves. A reload of the app opens its folder again, in the same process."""


@dataclass(frozen=True)
class SavedLabel:
    """What a save did.

    Attributes:
        label_id: As the host names the label.
        annotation: In the history.
        repeated: Whether exactly this was in force already, so that nothing new was kept.
        warnings: Sentences for the person who saved.
        added: Structures that are the folder's from now on.
    """

    label_id: str
    annotation: Annotation
    repeated: bool = False
    warnings: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Look:
    """What was found in the header of a label that somebody else made.

    Attributes:
        name: Of the file among the final labels.
        states: Image and label as they were then.
        problem: Why it does not count, a sentence; "" if it does.
    """

    name: str
    states: tuple[FileState | None, FileState | None]
    problem: str


class SafeLocalDatastore(LocalDatastore):
    """A folder of images with `labels/<tag>/`; see the module's text.

    Args:
        studies: The folder.
        state: The server's own folder, for what was deleted.
        annotations: History of labels.
        proposals: Kept proposals, to compare labels with.
        serves: Whether this process is the server. Processes that the host starts beside it (batches) read the same
            files, and may save labels, but take no lock for their lifetime and mend nothing.
        extensions: Patterns of image and label files.
        auto_reload: Watch the folder.
        read_only: Do not look for new files at start.
        picture_ids: Structure -> label id, as answers about pictures use them; see `labels.saving.check_label`.

    Raises:
        BusyError: if another server runs on this folder.
        StoreError: if the folder cannot be written.
    """

    _datastore: LocalDatastoreModel

    def __init__(
        self,
        studies: str,
        state: Path,
        annotations: AnnotationStore,
        proposals: ProposalStore | None = None,
        *,
        serves: bool = True,
        extensions: tuple[str, ...] | list[str] = ("*.nii.gz", "*.nii", "*.nrrd"),
        auto_reload: bool = False,
        read_only: bool = False,
        picture_ids: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.annotations = annotations
        self.structures = FolderStructures(studies, state, annotations)
        """What the folder labels beyond what the program knows."""
        self._picture_ids = picture_ids
        self._proposals = proposals
        self._state = state
        self._serves = serves
        self._mutex = threading.RLock()
        self._depth = 0
        self._images = ImageLocks()
        self._is_settled = not serves
        self._placed: dict[str, dict[str, Placed]] = {}
        self._unsettled: set[tuple[str, str]] = set()
        self._unwritten: set[str] = set()
        self._faults: dict[str, str] = {}
        self._looked_at: dict[str, _Look] = {}
        self.left_out: tuple[LeftOut, ...] = ()
        """What of the folder is not served, and why; as of the last look at it."""
        if serves:
            Path(studies).mkdir(parents=True, exist_ok=True)
            _claim(Path(studies))
        self.changes = ChangeLog()
        self._index = DatastoreIndex(state / "datastore.sqlite")
        self._revision = 0
        self._host_file = HostFile(Path(studies) / "datastore_v2.json")
        self._host_identity: str | None = None
        self._host_revision: int | None = None
        self._changed = self._host_seconds = 0.0
        self._host_written = time.monotonic()
        super().__init__(
            studies, extensions=list(extensions), auto_reload=auto_reload and serves, read_only=read_only or not serves
        )
        if hasattr(self, "_handler"):
            self._handler.on_moved = self._on_any_event  # Files appear by rename.
            match = self._handler.dispatch
            # Opening and closing change nothing. Matching these with every pattern kept the server busy for seconds
            # after 1000 files were read.
            self._handler.dispatch = lambda event: match(event) if event.event_type in _CHANGES else None
        reference = weakref.ref(self)
        atexit.register(_close, reference)
        if serves:
            threading.Thread(target=_keep_host_file, args=(reference,), name="host-file", daemon=True).start()

    # Labels

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
        """Check a label, keep it in the history and make it the one in force.

        Args:
            image_id: Of this datastore.
            label_file: Copied.
            tag: "final" for a label that counts.
            params: See `labels.saving.SaveOptions`; all of it is kept beside the label, as the host does.
            user: Who saves it.
            client: What saves it, unless `params` says so.
            replaces: The save that was in force when the work on this one began, 0 for none; None to replace any.

        Raises:
            NotFoundError: if there is no such image.
            RequestError, ImageError, GeometryError: if the label cannot count; nothing has changed then.
            PromptError: if it names a structure nearly as a known one, see `labels.naming`.
            ConflictError: if another save is in force than `replaces`.
            BusyError: if somebody else is at work on the image for too long.
            StoreError: if the disk refuses; what was in force before still is.
        """
        check_tag(tag)
        grid = self._load_grid(image_id)
        options = SaveOptions.from_params(params, grid.num_slices)
        label = open_label(Path(label_file), grid)
        return self._save(
            image_id,
            tag,
            params,
            user,
            client,
            lambda scratch: self._prepare(Path(label_file), label, grid, options, image_id, tag, scratch),
            replaces,
        )

    def _save(
        self,
        image_id: str,
        tag: str,
        params: Mapping[str, Any],
        user: str,
        client: str,
        prepare: Callable[[Path], ReadyLabel],
        replaces: int | None = None,
    ) -> SavedLabel:
        """Prepare a label beside all locks but that of its image, and put it in force.

        Args:
            prepare: Gets a folder for files; asked again if what it joined the label with is not in force any more.
        """
        with self._images.hold(image_id):
            for _ in range(_TRIES):
                with self._guard():
                    self._check_known(image_id)
                    self._adopt(image_id, tag)
                    before = self._state_of(image_id, tag)
                check_replaced(before[0], replaces)
                with scratch_folder("label") as scratch:
                    saved = self._commit(prepare(scratch), before, image_id, tag, params, user, client)
                if saved is not None:
                    return saved
        raise BusyError(
            f"Another process keeps changing the label of '{image_id[:100]}'. Send it again; nothing was changed.",
            retry_after=5,
        )

    def _state_of(self, image_id: str, tag: str) -> tuple[list[Annotation], FileState | None]:
        """The saves in force, and which file the folder has; equal as long as nobody saved, deleted, or put a file
        there.
        """
        path = self._label_path(image_id, tag)
        return self.annotations.in_force(image_id, tag), None if path is None else FileState.of(path)

    def _commit(
        self,
        ready: ReadyLabel,
        before: tuple[list[Annotation], FileState | None],
        image_id: str,
        tag: str,
        params: Mapping[str, Any],
        user: str,
        client: str,
    ) -> SavedLabel | None:
        """Keep a prepared label and put it in force; None if what it was joined with is not in force any more."""
        saves = before[0]
        repeated = bool(saves) and is_repeat(ready, saves)
        with self._staged(ready.file, self._label_target(image_id, tag, ready.file)) as staged, self._guard():
            self._check_known(image_id)
            if self._state_of(image_id, tag) != before:
                return None
            label = saves[-1] if repeated else None
            if label is None:
                who = ready.client or client
                label = record_ready(self.annotations, image_id, ready, tag, user, who)
            self._keep_misfit(image_id, tag, saves)
            self._put_in_force(image_id, tag, label, params, staged, is_new=not repeated)
            told, added = self._declare(image_id, ready, user)
            return SavedLabel(image_id, label, repeated, (*ready.warnings, *told), added)

    def _declare(self, image_id: str, ready: ReadyLabel, user: str) -> tuple[list[str], tuple[str, ...]]:
        """Let what a label draws for the first time be structures of the folder; sentences, and what is new.

        What is drawn on pictures is named by the models for them.
        """
        return ([], ()) if is_picture(self.get_image_uri(image_id)) else declare_label(self.structures, ready, user)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """The host's way to save, for labels that this program makes itself.

        A label of tag `FINAL` is checked and recorded like any other. Of other tags only the place is checked: they can
        be made again from the kept proposals, and get no history.
        """
        tag = str(getattr(label_tag, "value", label_tag))
        if tag == FINAL:
            return self.save_annotated(image_id, label_filename, tag, label_info or {}, client="server").label_id
        check_tag(tag)
        row = find_format(label_filename, Use.ANSWER)
        if row is None:
            raise RequestError(
                f"A label named '{Path(label_filename).name[-40:]}' cannot be kept here. "
                f"Write {', '.join(list_suffixes(Use.ANSWER))}."
            )
        with self._guard():
            self._check_known(image_id)
            self._adopt(image_id, tag)
            target = self._label_target(image_id, tag, Path(label_filename))
            with self._staged(Path(label_filename), target) as staged:
                self._rename(staged, target)
            self._list(image_id, tag, target, 0, {**(label_info or {})})
        return image_id

    def remove_label(self, label_id: str, label_tag: str, user: str = "", reason: str = "") -> None:
        """Take a label out of force; its versions stay in the history.

        Raises:
            NotFoundError: if there is no such label.
        """
        tag = check_tag(str(getattr(label_tag, "value", label_tag)))
        with self._images.hold(label_id), self._guard():
            path = self._label_path(label_id, tag)
            if path is None:
                raise NotFoundError(
                    f"Image '{label_id[:100]}' has no label with tag '{tag}'. GET "
                    "/datastore/?output=all lists what there is."
                )
            self._adopt(label_id, tag)
            is_known = self.annotations.current(label_id, tag) is not None
            delete = (lambda: self.annotations.delete(label_id, user, tag, reason)) if is_known else None
            self._settle(label_id, tag, None, delete)

    def undo(self, image_id: str, user: str = "", tag: str = FINAL) -> Annotation | None:
        """Go back one step; see `AnnotationStore.undo`."""
        with self._images.hold(image_id), self._guard():
            self._check_known(image_id)
            self._adopt(image_id, tag)
            wanted = self.annotations.find_undone(image_id, tag)
            self._settle(image_id, tag, wanted, lambda: self.annotations.undo(image_id, user, tag))
            return wanted

    def restore(self, image_id: str, sequence: int, user: str = "") -> Annotation:
        """Make an earlier save the one in force again; see `AnnotationStore.restore`."""
        with self._images.hold(image_id), self._guard():
            self._check_known(image_id)
            label = self.annotations.get(image_id, sequence)
            self._adopt(image_id, label.tag)
            self._settle(image_id, label.tag, label, lambda: self.annotations.restore(image_id, sequence, user))
            return label

    def rename_structure(self, image_id: str, old: str, new: str, user: str = "", tag: str = FINAL) -> Annotation:
        """Give a structure of the label in force another name; a save like any other, which an undo takes back.

        Raises:
            NotFoundError: if there is no such image, label or structure.
            RequestError: if the new name is none.
        """
        grid = self._load_grid(image_id)

        def prepare(scratch: Path) -> ReadyLabel:
            ids = self._load_ids(self._find_served_ids(image_id))
            return rename_in_force(self.annotations, image_id, old, new, grid, ids, scratch, tag)

        return self._save(image_id, tag, {}, user, "", prepare).annotation

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to a label's record.

        Raises:
            NotFoundError: if there is no such label.
        """
        with self._guard():
            record = self._object(label_id)
            label = record.labels.get(label_tag)
            if label is None:
                raise NotFoundError(
                    f"Image '{label_id[:100]}' has no label with tag '{str(label_tag)[:64]}'. Save one first."
                )
            changed = label.model_copy(update={"info": {**label.info, **info}})
            self._replace(label_id, record.model_copy(update={"labels": {**record.labels, label_tag: changed}}))

    # Images

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Check an image and add it.

        Raises:
            RequestError: if the id or the format will not do, or another image has this id.
            ImageError: if it cannot be read.
        """
        row = find_format(image_filename, Use.IMAGE)
        if row is None:
            raise RequestError(
                f"An image named '{Path(image_filename).name[-40:]}' cannot be added. "
                f"Send {', '.join(list_suffixes(Use.IMAGE))}."
            )
        check_id(image_id)
        if is_picture(image_filename):
            check_picture(image_filename)
        else:
            load_volume(image_filename, info=image_info)
        sha256 = hash_file(image_filename)
        with self._images.hold(image_id), self._guard():
            old = self._datastore.objects.get(image_id)
            target = Path(self._datastore.image_path()) / (image_id + (row.suffix if old is None else old.image.ext))
            if target.exists():
                if hash_file(target) == sha256:
                    return image_id
                raise RequestError(
                    f"There is another image '{image_id}' already, with its labels. "
                    "Choose another id, or delete it first."
                )
            with self._staged(Path(image_filename), target) as staged:
                self._rename(staged, target)
            info = {**(image_info or {}), "ts": int(time.time()), "name": target.name}
            self._replace(image_id, ImageLabelModel(image=DataModel(info=info, ext=row.suffix)))
        return image_id

    def remove_image(self, image_id: str, user: str = "") -> None:
        """Take an image and its labels out of the datastore: into the folder `trash` of the server's state.

        Raises:
            NotFoundError: if there is no such image.
        """
        with self._guard():
            record = self._object(image_id)
            for tag in list(record.labels):
                with contextlib.suppress(NotFoundError):
                    self.remove_label(image_id, tag, user, "the image was removed")
            image = Path(self._datastore.image_path()) / self._filename(image_id, record.image.ext)
            if image.exists():
                self._throw_away(image)
            self._write_rows({image_id: None})

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to an image's record."""
        with self._guard():
            record = self._object(image_id)
            image = record.image.model_copy(update={"info": {**record.image.info, **info}})
            self._replace(image_id, record.model_copy(update={"image": image}))

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A ZIP of images and final labels, in a new temporary file that the caller removes.

        Raises:
            NotFoundError: if no image has a final label.
        """
        pairs = self.datalist()[: limit_cases or None]
        if not pairs:
            raise NotFoundError("No image has a final label yet, so there is nothing to pack.")
        handle, name = tempfile.mkstemp(prefix="progidiff-dataset-", suffix=".zip")
        try:
            with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
                for pair in pairs:
                    for kind, path in pair.items():
                        archive.write(path, arcname=f"{kind}/{Path(path).name}")
                archive.writestr("metadata.json", self._datastore.model_dump_json(exclude={"base_path"}))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return name

    def list_names(self) -> Mapping[str, Any]:
        """Ids of all images; another object when there are others."""
        return cast(Mapping[str, Any], self._datastore.objects)

    def is_labelled(self, image_id: str) -> bool:
        """Whether there is a label of tag `FINAL`; `changes` has the images of which this may have changed."""
        record = self._datastore.objects.get(image_id)
        return record is not None and FINAL in record.labels

    def get_image_uri(self, image_id: str) -> str:
        """The path of an image, "" if there is none.

        Raises:
            ImageError: if it is a link out of the studies folder.
        """
        record = self._datastore.objects.get(image_id)
        if record is not None:
            self._check_place(Path(self._datastore.image_path()) / self._filename(image_id, record.image.ext))
        return str(LocalDatastore.get_image_uri(self, image_id))

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The path of a label, "" if there is none.

        Raises:
            ImageError: if it is a link out of the studies folder.
        """
        self._heal()
        record = self._datastore.objects.get(label_id)
        label = record.labels.get(label_tag) if record is not None else None
        if label is not None:
            self._check_place(Path(self._datastore.label_path(label_tag)) / self._filename(label_id, label.ext))
        return str(LocalDatastore.get_label_uri(self, label_id, label_tag))

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Images with their final labels, for a training."""
        self._heal()
        found: list[dict[str, Any]] = LocalDatastore.datalist(self, full_path)
        return found

    # What may be used

    def explain_absence(self, image_id: str) -> str | None:
        """Why an image that lies in the folder is not in the list; None if there is no such file."""
        names = [name for name in list(self._faults) if self._to_id(name)[0] == image_id]
        faults = (self._find_fault(Path(self._datastore.image_path()) / name) for name in names)
        return next(filter(None, faults), None)

    def _check_place(self, path: Path) -> None:
        reason = self._find_fault(path)
        if reason is not None:
            raise ImageError(reason)

    def _find_fault(self, path: Path) -> str | None:
        """Why a name in the folders is not used; None if it is a plain file or a folder, or a link to one that is
        served too.
        """
        if (fault := _find_name_fault(path.name)) is not None:
            return fault
        try:
            if path.is_symlink():
                parts = Path(os.path.realpath(path)).parts
                root = Path(os.path.realpath(self._datastore_path)).parts
                if parts[: len(root)] != root or any(part.startswith(".") for part in parts[len(root) :]):
                    return (
                        f"'{path.name}' is a link to something outside of the studies folder, and such links are not "
                        "followed. Copy the file itself into the folder, or have its folder mounted there."
                    )
            if path.exists() and not (path.is_file() or path.is_dir()):
                return f"'{path.name}' is a device, pipe or socket and no file. Put the image itself in its place."
        except OSError as err:
            return f"'{path.name}' cannot be looked at ({err.strerror}). Check who may read it."
        return None

    # What saves are made of

    def _load_grid(self, image_id: str) -> Grid:
        self._check_known(image_id)
        return read_grid(Path(self.get_image_uri(image_id)))

    def _check_known(self, image_id: str) -> None:
        record = self._object(image_id)
        path = Path(self._datastore.image_path()) / self._filename(image_id, record.image.ext)
        self._check_place(path)
        if not path.exists():
            raise NotFoundError(
                f"The file of image '{image_id[:100]}' is gone from the studies folder. Put it back to label it."
            )

    def _object(self, image_id: str) -> ImageLabelModel:
        record = self._datastore.objects.get(image_id)
        if record is None:
            reason = self.explain_absence(image_id)
            if reason is not None:
                raise ImageError(reason)
            raise NotFoundError(
                f"There is no image '{image_id[:100]}' in the datastore. GET /datastore/?output=all lists the ids."
            )
        return record

    def _prepare(
        self,
        file: Path,
        label: LabelMap,
        grid: Grid,
        options: SaveOptions,
        image_id: str,
        tag: str,
        scratch: Path,
    ) -> ReadyLabel:
        previous = find_previous(self.annotations, image_id, tag)
        served_ids = self._find_served_ids(image_id)
        if served_ids is not None:
            kept_ids = combine_ids(self._load_ids(served_ids), previous)
            checked = check_label(file, label, options, kept_ids, served_ids)
            return prepare_label(checked, grid, options, image_id, previous, self._proposals, scratch)
        named = name_label(label, options, self.structures, previous)
        kept_ids = combine_ids(self._load_ids(None), previous, named.names)
        checked = check_label(file, named.label, named.options, kept_ids)
        ready = prepare_label(checked, grid, named.options, image_id, previous, self._proposals, scratch)
        return replace(ready, looks=named.looks, confirm=options.confirm)

    def _find_served_ids(self, image_id: str) -> Mapping[str, int] | None:
        """Structure -> id as answers about a picture use them; None for a volume."""
        return self._picture_ids() if is_picture(self.get_image_uri(image_id)) else None

    def _load_ids(self, served_ids: Mapping[str, int] | None) -> dict[str, int]:
        """Structure -> id in kept labels. A labels.json that came with the first structure of the folder's own says
        nothing about pictures.
        """
        if served_ids is not None and self.structures.adds_to_table:
            return dict(served_ids)
        return load_label_ids(Path(self._datastore_path), served_ids)

    def _label_target(self, image_id: str, tag: str, file: Path) -> Path:
        """Where a label goes; its suffix is the host's, which knows no `.seg.nrrd`."""
        suffix = file.name[len(strip_suffix(file)) :]
        return Path(self._datastore.label_path(tag)) / self._filename(image_id, suffix)

    @contextlib.contextmanager
    def _staged(self, source: Path, target: Path) -> Iterator[Path]:
        """A copy beside its place, flushed; its name is free of suffixes, so that no watcher takes it for an image."""
        staged = target.with_name(make_scratch_name())
        try:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._own_change(target):
                    shutil.copyfile(source, staged)
                flush(staged)
            except OSError as err:
                raise StoreError(_NOT_WRITTEN.format(target, err)) from err
            yield staged
        finally:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)

    def _own_change(self, target: Path) -> contextlib.AbstractContextManager[None]:
        """While this program puts a file into a folder: it is nobody else's label there."""
        is_final = target.parent == self.annotations.final_labels
        return self.annotations.final_watch.own_change() if is_final else contextlib.nullcontext()

    def _rename(self, staged: Path, target: Path) -> None:
        try:
            with self._own_change(target):
                os.replace(staged, target)
        except OSError as err:
            raise StoreError(_NOT_WRITTEN.format(target, err)) from err
        try:
            flush(target.parent)
        except OSError as err:  # It is there; after a power cut the next start would put it there again.
            logger.warning("'%s' could not be flushed: %s", target.parent, err)

    @contextlib.contextmanager
    def _taken_back(self, image_id: str, tag: str, is_new: bool) -> Iterator[None]:
        """What the folder refuses counts no more in the history, if that has just said it."""
        try:
            yield
        except StoreError as err:
            self._unsettled.add((image_id, tag))
            if is_new:
                try:
                    self.annotations.take_back(image_id, tag, "the folder with the labels refused it")
                    self._unsettled.discard((image_id, tag))
                except ProGiDiffError:
                    logger.exception("The label of '%s' could neither be placed nor taken back", image_id)
                    raise StoreError(
                        f"{err} The history could not be written either: it has the label, and it will count when the "
                        "disk takes it. Look at the image again before you save."
                    ) from err
            raise

    def _put_in_force(
        self, image_id: str, tag: str, label: Annotation, params: Mapping[str, Any], staged: Path, *, is_new: bool
    ) -> None:
        """Rename a copy of a label to its place, and list it."""
        info: dict[str, Any] = {**params, "annotation": label.sequence}
        info["label_info"] = [{"name": name, "idx": value} for name, value in label.label_ids] or params.get(
            "label_info"
        )
        target = self._label_target(image_id, tag, self.annotations.label_file(label))
        with self._taken_back(image_id, tag, is_new):
            self._rename(staged, target)
        self._list(image_id, tag, target, label.sequence, info)

    def _settle(
        self, image_id: str, tag: str, wanted: Annotation | None, record: Callable[[], object] | None = None
    ) -> None:
        """Have the folder say what the history says.

        Args:
            wanted: The save in force; None for none.
            record: Writes the line of the history that makes it so, when the copy is there; None if it is written.
        """
        is_new = record is not None
        if wanted is None:
            if record is not None:
                record()
            with self._taken_back(image_id, tag, is_new):
                self._take_away(image_id, tag)
            return
        file = self.annotations.label_file(wanted)
        with self._staged(file, self._label_target(image_id, tag, file)) as staged:
            if record is not None:
                record()
            self._put_in_force(image_id, tag, wanted, {}, staged, is_new=is_new)

    def _list(self, image_id: str, tag: str, target: Path, sequence: int, info: Mapping[str, Any]) -> None:
        """Note which file was placed, instead of one of another format. The label counts already, whatever the index
        says.
        """
        record = self._object(image_id)
        old = record.labels.get(tag)
        suffix = target.name[len(image_id) :]
        if old is not None and old.ext != suffix:
            with contextlib.suppress(OSError):
                (target.parent / self._filename(image_id, old.ext)).unlink(missing_ok=True)
        label = DataModel(info={**info, "ts": int(time.time()), "name": target.name}, ext=suffix)
        self._note_placed(image_id, tag, target, sequence)
        self._write_what_counts(image_id, record.model_copy(update={"labels": {**record.labels, tag: label}}))

    def _note_placed(self, image_id: str, tag: str, path: Path, sequence: int) -> None:
        state = FileState.of(path)
        if state is not None:
            self._placed[image_id] = {**self._placed.get(image_id, {}), tag: Placed(sequence, state)}
        self._unsettled.discard((image_id, tag))

    def _forget_placed(self, image_id: str, tag: str) -> None:
        placed = {name: entry for name, entry in self._placed.get(image_id, {}).items() if name != tag}
        self._placed[image_id] = placed
        self._unsettled.discard((image_id, tag))

    def _take_away(self, image_id: str, tag: str) -> None:
        path = self._label_path(image_id, tag)
        if path is not None and find_format(path, Use.LABEL) is not None:
            try:
                path.unlink(missing_ok=True)  # The history has it, or it can be made again from the kept proposals.
            except OSError as err:
                raise StoreError(f"'{path}' could not be removed ({err}). Check who may write there.") from err
        elif path is not None:
            self._throw_away(path)
        record = self._object(image_id)
        self._forget_placed(image_id, tag)
        labels = {name: label for name, label in record.labels.items() if name != tag}
        self._write_what_counts(image_id, record.model_copy(update={"labels": labels}))

    def _label_path(self, image_id: str, tag: str) -> Path | None:
        """Where the label is; None if there is none."""
        record = self._datastore.objects.get(image_id)
        label = record.labels.get(tag) if record is not None else None
        path = None if label is None else Path(self._datastore.label_path(tag)) / self._filename(image_id, label.ext)
        return path if path is not None and path.is_file() and self._find_fault(path) is None else None

    # History and folder

    def _adopt(self, image_id: str, tag: str) -> None:
        """Note in the history what somebody changed in the folder since: a label replaced, added or taken away."""
        if self._label_path(image_id, tag) is None:
            self._list_unlisted(image_id, tag)
        self._reconcile(image_id, tag, self._datastore.objects)
        path = self._label_path(image_id, tag)
        if path is not None and tag == FINAL and self.annotations.current(image_id, tag) is None:
            self._record_foreign(image_id, tag, path)

    def _list_unlisted(self, image_id: str, tag: str) -> None:
        """A label that came into the folder since it was read."""
        folder = Path(self._datastore.label_path(tag))
        for suffix in list_suffixes(Use.LABEL):
            path = folder / self._filename(image_id, suffix)
            if path.is_file() and self._find_fault(path) is None and not self._is_misfit(image_id, path.name):
                record = self._object(image_id)
                label = DataModel(info={"ts": int(time.time()), "name": path.name}, ext=suffix)
                self._write_rows({image_id: record.model_copy(update={"labels": {**record.labels, tag: label}})})
                return

    def _heal(self) -> None:
        """Try again what a disk refused, before somebody reads it."""
        for image_id, tag in list(self._unsettled):
            try:
                with self._guard():
                    self._reconcile(image_id, tag, self._datastore.objects)
            except ProGiDiffError as err:
                logger.warning("The label of '%s' is still not as the history says: %s", image_id, err)

    def _reconcile(self, image_id: str, tag: str, listed: Mapping[str, ImageLabelModel]) -> None:
        """Compare history and folder for an image. What this program left half done is finished from the history; what
        somebody else did to the folder goes into the history.

        Args:
            listed: Records as they were before the folder was read: what an older version, which did not remember its
                files, had put there.
        """
        if image_id not in self._datastore.objects:
            return
        path = self._label_path(image_id, tag)
        state = None if path is None else FileState.of(path)
        wanted = self.annotations.current(image_id, tag)
        placed = self._placed.get(image_id, {}).get(tag)
        if placed is not None and state == placed.file:
            if placed.sequence != (0 if wanted is None else wanted.sequence):
                self._finish(image_id, tag, wanted)
            self._unsettled.discard((image_id, tag))
            return
        known = listed[image_id].labels.get(tag) if image_id in listed else None
        sequence = placed.sequence if placed is not None else known.info.get("annotation") if known else None
        if path is None:
            if wanted is not None and sequence == wanted.sequence:
                logger.warning(
                    "The label of '%s' was taken out of the folder; it counts no more. The history has it.", image_id
                )
                self.annotations.delete(image_id, "", tag, _TAKEN_OUT)
                self._take_away(image_id, tag)
            elif wanted is not None:
                self._finish(image_id, tag, wanted)
            return
        found = hash_file(path)
        if wanted is not None and found == wanted.sha256:
            self._note_placed(image_id, tag, path, wanted.sequence)
            self._write_what_counts(image_id, self._object(image_id))
        elif (image_id, tag) not in self.annotations.list_tracked():
            return  # It counts by itself; see `AnnotationStore`.
        elif placed is None and self._is_cut_off(image_id, tag, found, wanted, known):
            self._finish(image_id, tag, wanted)
        else:
            self._record_foreign(image_id, tag, path)

    def _drop_misfit(self, image_id: str, path: Path, problem: str) -> None:
        """Have a file count no more as the label of its image, until it changes."""
        record = self._object(image_id)
        image = Path(self._datastore.image_path()) / self._filename(image_id, record.image.ext)
        states = FileState.of(image), FileState.of(path)
        self._looked_at[image_id] = _Look(path.name, states, _NO_LABEL.format(problem))
        self.annotations.misfits |= {image_id}
        labels = {tag: label for tag, label in record.labels.items() if tag != FINAL}
        self._write_what_counts(image_id, record.model_copy(update={"labels": labels}))

    def _keep_misfit(self, image_id: str, tag: str, saves: list[Annotation]) -> None:
        """Before a first save takes its place, put a file that was no label of the image aside."""
        if saves or tag != FINAL:
            return
        for suffix in list_suffixes(Use.LABEL):
            path = Path(self._datastore.label_path(tag)) / self._filename(image_id, suffix)
            if path.is_file() and self._find_fault(path) is None:
                kept = self._throw_away(path)
                logger.warning("'%s' was no label of its image and is now '%s'", path.name, kept)

    def adopt(self, image_id: str) -> None:
        """Begin the history of a label that somebody else put into the folder, so that it can be shown and joined.

        Raises:
            BusyError: if somebody else is at work on the image for too long.
            StoreError: if the disk refuses.
        """
        with self._images.hold(image_id), self._guard():
            self._adopt(image_id, FINAL)

    def read_label_ids(self) -> dict[str, int]:
        """Structure -> id of labels of volumes that say nothing about it themselves; see `load_label_ids`."""
        return load_label_ids(Path(self._datastore_path))

    def check_foreign_labels(self) -> None:
        """Look at the headers of final labels without a history, beside all locks; what was looked at before is not
        opened again until it changes.
        """
        tracked = {image_id for image_id, tag in self.annotations.list_tracked() if tag == FINAL}
        folder = Path(self._datastore.label_path(FINAL))
        found: list[str] = []
        for image_id, record in list(self._datastore.objects.items()):
            label = record.labels.get(FINAL)
            if label is None or image_id in tracked:
                continue
            path = folder / self._filename(image_id, label.ext)
            image = Path(self._datastore.image_path()) / self._filename(image_id, record.image.ext)
            states = FileState.of(image), FileState.of(path)
            look = self._looked_at.get(image_id)
            if look is None or (look.name, look.states) != (path.name, states):
                problem = _find_misfit(image, path) if None not in states else ""
                self._looked_at[image_id] = _Look(path.name, states, problem)
                found += [image_id] if problem else []
        if found:
            logger.warning("%d labels in '%s' do not count; the list of what is left out says why", len(found), folder)
            self.refresh()

    def _is_misfit(self, image_id: str, name: str) -> bool:
        """Whether a file among the final labels was found to be none of its image, and both are as they were then."""
        look = self._looked_at.get(image_id)
        if look is None or not look.problem or look.name != name or image_id not in self._datastore.objects:
            return False
        image = Path(self._datastore.image_path()) / self._filename(
            image_id, self._datastore.objects[image_id].image.ext
        )
        return look.states == (FileState.of(image), FileState.of(Path(self._datastore.label_path(FINAL)) / name))

    def _is_cut_off(
        self, image_id: str, tag: str, found: str, wanted: Annotation | None, known: DataModel | None
    ) -> bool:
        """Whether a file is a former label that a crash of an older version left in its place. That version listed a
        label after placing it: one that is listed as in force was replaced by somebody else since, and one that is not
        listed at all was put back.
        """
        if found not in {label.sha256 for label in self.annotations.list(image_id) if label.tag == tag}:
            return False
        if wanted is None:
            return known is not None and "annotation" in known.info
        return known is None or known.info.get("annotation") != wanted.sequence

    def _finish(self, image_id: str, tag: str, wanted: Annotation | None) -> None:
        logger.warning("The last save of '%s' was cut off; finishing it from the history", image_id)
        self._settle(image_id, tag, wanted)

    def _record_foreign(self, image_id: str, tag: str, path: Path) -> None:
        """Keep a label in the history that was put into the folder by somebody else; one that cannot be read gives way
        to the label in force.
        """
        if find_format(path, Use.LABEL) is None:
            return
        try:
            load_label(path, like=_find_grid(Path(self.get_image_uri(image_id))))
        except ProGiDiffError as err:
            self._refuse_foreign(image_id, tag, path, str(err))
            return
        logger.info(
            "Label '%s' of '%s' was put into the folder by somebody else; keeping it in the history", tag, image_id
        )
        named = {name: value for value, name in find_names(path).items()}
        label = self.annotations.record(image_id, path, tag=tag, client="folder", label_ids=named)
        if not is_picture(path):
            self._note_foreign_names(image_id, named)
        self._note_placed(image_id, tag, path, label.sequence)
        self._write_what_counts(image_id, self._object(image_id))

    def _note_foreign_names(self, image_id: str, named: Mapping[str, int]) -> None:
        try:
            told = self.structures.declare(named)
        except (StoreError, RequestError) as err:
            told = [f"Its new structures are not noted: {err}"]
        for sentence in told:
            logger.info("Of the label of '%s': %s", image_id, sentence)

    def _refuse_foreign(self, image_id: str, tag: str, path: Path, problem: str) -> None:
        wanted = self.annotations.current(image_id, tag)
        if wanted is None:
            note_damage(path, problem, f"The label of '{image_id}' cannot be read. Put a whole file in its place.")
            if tag == FINAL:
                self._drop_misfit(image_id, path, problem)
            return
        kept = self._throw_away(path)
        self._settle(image_id, tag, wanted)
        meaning = f"Save {wanted.sequence} of '{image_id}' is in its place again, from the history."
        note_damage(path, problem, f"{meaning} What was there is in the folder 'trash' of the server's state.", kept)

    def _filename(self, id: str, ext: str) -> str:
        name = id + ext
        if os.path.basename(name) != name or name.startswith("."):
            raise RequestError(
                f"'{name[:100]}' is no file name of this datastore. Use letters, digits, '.', '_' and '-'."
            )
        return name

    def _throw_away(self, path: Path) -> Path:
        trash = self._state / "trash"
        target = trash / f"{time.time_ns()}-{path.name}"
        try:
            trash.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        except OSError as err:
            raise StoreError(
                f"'{path.name}' could not be moved to '{trash}' ({err}); it stays. Free some disk space."
            ) from err
        return target

    # The list of images and labels

    def _replace(self, image_id: str, record: ImageLabelModel) -> None:
        self._write_rows({image_id: record})

    def _write_what_counts(self, image_id: str, record: ImageLabelModel) -> None:
        """As `_replace`, for what is true whether or not the index takes it; it is asked again at the next change."""
        try:
            self._write_rows({image_id: record})
        except StoreError as err:
            logger.error("The index is behind: %s", err)
            self._datastore.objects = {**self._datastore.objects, image_id: record}
            self._unwritten.add(image_id)
            self.changes.note([image_id])

    def _write_rows(self, records: Mapping[str, ImageLabelModel | None]) -> None:
        """Change records, in the index and here; all of them or none.

        Raises:
            StoreError: if the disk refuses.
        """
        behind = {image_id: self._datastore.objects.get(image_id) for image_id in self._unwritten}
        rows: dict[str, Row] = {}
        parsed: dict[str, ImageLabelModel] = {}
        for image_id, record in {**behind, **records}.items():
            if record is None:
                rows[image_id] = Row(None)
                continue
            text = _write_record(record)
            parsed[image_id] = parse_record(text)  # What could not be read again never gets onto the disk.
            rows[image_id] = Row(text, self._placed.get(image_id, {}))
        self._revision = self._index.save(rows)
        self._unwritten.clear()
        self._apply(parsed, [image_id for image_id, row in rows.items() if row.record is None])

    def _apply(self, changed: Mapping[str, ImageLabelModel], gone: Iterable[str]) -> None:
        """Change the records in memory. Whoever goes through them meanwhile sees the old ones or the new ones."""
        objects = self._datastore.objects
        gone = [image_id for image_id in gone if image_id in objects]
        for image_id in gone:
            self._placed.pop(image_id, None)
        if not gone and changed.keys() <= objects.keys():
            objects.update(changed)
        else:
            self._datastore.objects = {
                image_id: record for image_id, record in {**objects, **changed}.items() if image_id not in gone
            }
        self.changes.note([*changed, *gone])
        self._changed = time.monotonic()

    def _reconcile_datastore(self) -> None:
        with self._guard():
            if not Path(self._datastore.label_path(FINAL)).is_dir():
                logger.error(
                    "'%s' is gone or not mounted; its images and labels stay listed until it is back",
                    self._datastore_path,
                )
                return
            listed = dict(self._datastore.objects)
            objects = self._scan()
            changed: dict[str, ImageLabelModel | None] = {
                image_id: record for image_id, record in objects.items() if listed.get(image_id) != record
            }
            changed |= dict.fromkeys(listed.keys() - objects.keys())
            if changed:
                self._write_rows(changed)
            if not self._is_settled:
                self._is_settled = True
                self.annotations.set_aside_unfinished()
                for loss in self.annotations.find_losses():
                    note_damage(self.annotations.root, loss, "`progidiff audit verify` says more.")
                self._remove_leftovers()
            if self._serves:
                self._reconcile_all(listed)
            if not self._host_file.path.exists():
                self.write_host_file()

    def _reconcile_all(self, listed: Mapping[str, ImageLabelModel]) -> None:
        for image_id, tag in sorted(self.annotations.list_tracked()):
            try:
                self._reconcile(image_id, tag, listed)
            except (OSError, ProGiDiffError) as err:  # The others must not wait for it.
                self._unsettled.add((image_id, tag))
                logger.error("The label '%s' of '%s' is not as the history says: %s", tag, image_id, err)

    def _scan(self) -> dict[str, ImageLabelModel]:
        """What is in the folders, with the records of what was known."""
        known = self._datastore.objects
        objects: dict[str, ImageLabelModel] = {}
        now = int(time.time())
        names = set(self._list_names(self._datastore.image_path()))
        for image_id, record in known.items():
            if self._filename(image_id, record.image.ext) in names:
                objects[image_id] = record.model_copy(update={"labels": {}})
            else:
                logger.info("Image '%s' is gone from the folder", image_id)
        for name in sorted(self._list_files(self._datastore.image_path(), self._extensions)):
            image_id, suffix = self._to_id(name)
            if image_id not in objects:
                objects[image_id] = ImageLabelModel(image=DataModel(info={"ts": now, "name": name}, ext=suffix))
        labels = Path(self._datastore.label_path(None))
        tags = {name for name in self._list_names(str(labels)) if _TAG.fullmatch(name)}
        strays: list[str] = []
        # Labels that count may lie on another disk, which the administrator then has linked.
        for folder in sorted(path for path in (labels / name for name in {*tags, FINAL}) if path.is_dir()):
            files = set(self._list_names(str(folder)))
            for name in sorted(files):
                found = self._find_labelled(name, objects)
                if found is None:
                    strays += [name] if folder.name == FINAL and not name.startswith(".") else []
                    continue
                image_id, suffix = found
                if folder.name == FINAL and self._is_misfit(image_id, name):
                    continue
                old = known[image_id].labels.get(folder.name) if image_id in known else None
                if old is not None and self._filename(image_id, old.ext) in files:
                    objects[image_id].labels[folder.name] = old
                else:
                    objects[image_id].labels[folder.name] = DataModel(info={"ts": now, "name": name}, ext=suffix)
        self.annotations.misfits = frozenset(
            image_id for image_id, look in self._looked_at.items() if self._is_misfit(image_id, look.name)
        )
        self._note_left_out(
            {self._filename(image_id, record.image.ext) for image_id, record in objects.items()}, strays
        )
        return objects

    def _find_labelled(self, name: str, objects: Mapping[str, ImageLabelModel]) -> tuple[str, str] | None:
        """The image that a label's file belongs to, and its suffix as it is written; None if there is none."""
        if name.startswith("."):
            return None
        of_host = self._to_id(name) if self._list_matches([name], self._extensions) else None
        candidates = (of_host, split_label_name(name))
        return next((parts for parts in candidates if parts is not None and parts[0] in objects), None)

    def _to_id(self, file: str) -> tuple[str, str]:
        """The id of an image or label, and its suffix as it is written."""
        row = find_format(file, Use.IMAGE)
        if row is None:
            image_id, suffix = super()._to_id(file)
            return str(image_id), str(suffix)
        return file[: -len(row.suffix)], file[-len(row.suffix) :]

    def _note_left_out(self, served: set[str], strays: Iterable[str]) -> None:
        """Say what somebody may look for in vain, once.

        Args:
            served: Names of the images that are.
            strays: Names of files among the final labels that are of no image.
        """
        labels = Path(self._datastore.label_path(None))
        folder = Path(self._datastore.image_path())
        faults = {name: fault for name in self._faults if (fault := self._find_fault(folder / name)) is not None}
        misfits = [
            LeftOut(f"{labels.name}/{FINAL}/{look.name}", look.problem)
            for image_id, look in self._looked_at.items()
            if self._is_misfit(image_id, look.name)
        ]
        lost = [
            LeftOut(f"{labels.name}/{FINAL}/{name}", _NO_IMAGE.format(parts[0]))
            for name in strays
            if (parts := split_label_name(name)) is not None
        ]
        found = (*list_left_out(folder, served, {labels.name}, faults), *lost, *misfits)
        for entry in found:
            if entry not in self.left_out and self._serves:
                logger.warning("Not served: '%s'. %s", entry.name, entry.reason)
        self.left_out = found

    def _list_files(self, path: str, patterns: list[str]) -> dict[str, str]:
        names = [name for name in self._list_names(path) if not name.startswith(".")]
        return {name: name for name in self._list_matches(names, patterns)}

    @staticmethod
    def _list_matches(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
        match = _compile_patterns(tuple(patterns)).match
        return [name for name in names if match(name.lower())]

    def _list_names(self, path: str) -> list[str]:
        """What a folder holds, without what is neither a file nor a folder, links that lead out, and names that are no
        text.
        """
        with os.scandir(path) as entries:
            faults = {
                entry.name: None if entry.is_file(follow_symlinks=False) else self._find_fault(Path(entry.path))
                for entry in entries
            }
        for name in faults:
            faults[name] = _find_name_fault(name) or faults[name]
        for name, fault in faults.items():
            if fault is not None and self._faults.get(name) != fault:
                self._faults[name] = fault
                logger.warning("Left out of the datastore: %s", fault)
        return [name for name, fault in faults.items() if fault is None]

    def _on_any_event(self, event: Any) -> None:
        try:
            if not self._is_own(Path(os.fsdecode(getattr(event, "dest_path", "") or event.src_path))):
                self.refresh()
        except (OSError, ProGiDiffError):
            logger.exception("The studies folder could not be read again")

    def _is_own(self, path: Path) -> bool:
        """Whether a file in the labels' folders is as this program left it: there is nothing to look for then."""
        if path.parent.parent != Path(self._datastore.label_path(None)):
            return False
        with self._own_mutex():
            found = self._find_labelled(path.name, self._datastore.objects)
            placed = None if found is None else self._placed.get(found[0], {}).get(path.parent.name)
            return placed is not None and placed.file == FileState.of(path)

    def _on_modify_event(self, event: Any) -> None:
        if event.src_path == self._datastore_config_path:
            self._on_any_event(event)

    # The index, and datastore_v2.json

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._guard():  # Reads what changed.
            return

    def _update_datastore_file(self, lock: bool = True) -> None:
        self.write_host_file()

    def write_host_file(self) -> None:
        """Write ``datastore_v2.json`` as things are now.

        Raises:
            StoreError: if the disk refuses.
        """
        began = time.monotonic()
        with self._guard():
            revision, objects = self._revision, dict(self._datastore.objects)
            model = self._datastore.model_copy(update={"objects": {}})
            texts = self._index.list_records()
            behind = [image_id for image_id in objects if image_id in self._unwritten or image_id not in texts]
        texts |= {image_id: _write_record(objects[image_id]) for image_id in behind}
        content = self._host_file.encode(model, ((image_id, texts[image_id]) for image_id in objects))
        with self._guard(reads=False):
            self._host_file.write(content)
            self._host_identity = self._host_file.identify()
            self._index.set_note(_HOST_NOTE, self._host_identity)
            self._index.set_note(_HOST_REVISION, str(revision))
            self._host_revision = revision
            self._host_written = time.monotonic()
        self._host_seconds = self._host_written - began

    def write_host_file_if_idle(self, idle_seconds: float | None = None) -> None:
        """Write ``datastore_v2.json`` if it is behind and nothing has happened for a while.

        Args:
            idle_seconds: How long; None for what suits the number of images.
        """
        if idle_seconds is None:
            idle_seconds = max(_IDLE_SECONDS, 20 * self._host_seconds)
        with self._guard():
            is_behind = self._host_revision != self._revision
        waited = time.monotonic() - self._changed
        behind_for = time.monotonic() - self._host_written
        if is_behind and (waited >= idle_seconds or behind_for > _PATIENCE_SECONDS):
            self.write_host_file()

    def close(self) -> None:
        """Write what is not written yet; the datastore can be used on."""
        if self._host_revision != self._revision:
            self.write_host_file()

    def _load_list(self) -> None:
        """Read what other processes changed, in the index or in the host's file."""
        if self._revision and not Path(self._datastore.label_path(FINAL)).is_dir():
            return  # Not mounted any more; see `_reconcile_datastore`.
        revision, rows = self._index.load(self._revision)
        if revision < self._revision:  # The index was lost.
            self._unwritten.update(self._datastore.objects)
        changed: dict[str, ImageLabelModel] = {}
        for image_id, row in rows.items():
            if row.record is not None:
                record = parse_record(row.record)
                if self._is_sound(image_id, record):
                    changed[image_id] = record
                    self._placed[image_id] = dict(row.placed)
        if rows:
            self._apply(changed, [image_id for image_id, row in rows.items() if row.record is None])
        self._revision = revision
        identity = self._host_file.identify()
        if identity == self._host_identity:
            return
        self._host_identity = identity
        if identity != self._index.get_note(_HOST_NOTE) or (not identity and self._host_file.backup.exists()):
            self._take_over(identity)
            return
        if self._host_revision is None and self._index.get_note(_HOST_REVISION) == str(revision):
            self._host_revision = revision

    def _take_over(self, identity: str) -> None:
        """Take over what somebody else, or an older version, wrote into the host's file."""
        known = self._datastore.objects
        model = self._host_file.read(has_index=bool(known))
        self._host_revision = None
        if model is not None:
            found = {image_id: record for image_id, record in model.objects.items() if self._is_sound(image_id, record)}
            merged = {image_id: merge_records(known.get(image_id), record) for image_id, record in found.items()}
            model.base_path = self._datastore_path
            model.objects = known
            self._datastore = model
            changed = {image_id: record for image_id, record in merged.items() if known.get(image_id) != record}
            if changed:
                self._write_rows(changed)
        self._index.set_note(_HOST_NOTE, identity)
        if not self._host_file.path.exists():
            self.write_host_file()

    def _is_sound(self, image_id: str, record: ImageLabelModel) -> bool:
        """Whether an entry stays in the folders; the file may come from a server that took any name."""
        try:
            for ext in (record.image.ext, *(label.ext for label in record.labels.values())):
                self._filename(image_id, ext)
        except RequestError:
            logger.warning("Left out of the datastore: '%s' is no file name", image_id)
            return False
        for tag in [tag for tag in record.labels if not _TAG.fullmatch(tag)]:
            logger.warning("Left out of the datastore: label '%s' of '%s'", tag, image_id)
            del record.labels[tag]
        return True

    @contextlib.contextmanager
    def _guard(self, reads: bool = True) -> Iterator[None]:
        """The lock of all changes, for threads and for processes; with the newest list of images."""
        with self._own_mutex():
            if self._depth:
                yield
                return
            lock = FileLock(self._lock_file, timeout=_LOCK_SECONDS)
            try:
                lock.acquire()
            except Timeout as err:
                raise BusyError(
                    f"Another process has been changing the datastore for {_LOCK_SECONDS:.0f} s. Try again.",
                    retry_after=30,
                ) from err
            except OSError as err:
                raise StoreError(f"'{self._lock_file}' cannot be locked ({err}). Check who may write there.") from err
            self._depth = 1
            try:
                if reads:
                    self._load_list()
                yield
            finally:
                self._depth = 0
                lock.release()

    @contextlib.contextmanager
    def _own_mutex(self) -> Iterator[None]:
        if not self._mutex.acquire(timeout=_LOCK_SECONDS):
            raise BusyError(
                f"Somebody else's change of the datastore has been going on for {_LOCK_SECONDS:.0f} s. Try again.",
                retry_after=30,
            )
        try:
            yield
        finally:
            self._mutex.release()

    def _remove_leftovers(self) -> None:
        """What processes that died were writing."""
        labels = Path(self._datastore.label_path(None))
        for folder in (Path(self._datastore_path), *(path for path in labels.iterdir() if path.is_dir())):
            remove_leftovers(folder)


def check_replaced(saves: list[Annotation], expected: int | None) -> None:
    """Refuse a label that was drawn on an older one than the one in force.

    Args:
        saves: In force.
        expected: The last of them when the work began, 0 for none; None if the client does not say.

    Raises:
        ConflictError: if somebody saved meanwhile.
    """
    last = saves[-1] if saves else None
    if expected is None or expected == (0 if last is None else last.sequence):
        return
    if last is None:
        raise ConflictError("The label that this one replaces was deleted meanwhile. Open the image again, then save.")
    who = f" by {last.user}" if last.user else ""
    raise ConflictError(
        f"Save {last.sequence} of this image was made{who} at {last.time}, after this label was begun. Open the image "
        "again and look at both, then save."
    )


def is_folder(studies: str) -> bool:
    """Whether the studies lie in a folder, not behind an address."""
    return not studies.startswith(("http://", "https://"))


def open_annotations(state: Path, studies: str) -> AnnotationStore:
    """The history of the labels of some studies; `state` is the server's own folder."""
    return AnnotationStore(state / "annotations", Path(studies) / "labels" / FINAL if is_folder(studies) else None)


def open_local(
    studies: str,
    annotations: AnnotationStore,
    proposals: ProposalStore,
    state: Path,
    picture_ids: Callable[[], Mapping[str, int]] = dict,
) -> SafeLocalDatastore:
    """The datastore of a folder, as MONAI Label is configured; in the server's own process it claims the folder."""
    return SafeLocalDatastore(
        studies,
        state,
        annotations,
        proposals,
        serves="monailabel.app" in sys.modules,
        extensions=list_patterns(settings.MONAI_LABEL_DATASTORE_FILE_EXT),
        auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        picture_ids=picture_ids,
    )


def list_patterns(configured: Sequence[str]) -> list[str]:
    """Patterns of the files that are served.

    Args:
        configured: As the host has them. Its own list, which nobody chose, is short of formats that are read here; of
            any other, only the second spelling of a suffix is added (.jpeg, .tiff).
    """
    patterns = [str(pattern) for pattern in configured]
    own = type(settings).model_fields["MONAI_LABEL_DATASTORE_FILE_EXT"].default
    known = {f"*{suffix}" for suffix in list_suffixes(Use.IMAGE)}
    wanted = known if set(own) <= set(patterns) else {f"*{suffix}" for suffix in list_spellings(patterns)}
    return [*patterns, *sorted(wanted - set(patterns))]


def check_tag(tag: str) -> str:
    """Refuse a tag that would not do as a folder.

    Raises:
        RequestError: saying what it may hold.
    """
    if not _TAG.fullmatch(tag):
        raise RequestError(
            f"'{tag[:60]}' is no tag: use up to 64 letters, digits, '.', '_' and '-', not "
            "starting with a sign, for example final."
        )
    return tag


@functools.cache
def _compile_patterns(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns))


def _write_record(record: ImageLabelModel) -> str:
    return write_json(plain(record.model_dump())).decode()


def _find_name_fault(name: str) -> str | None:
    """Why a file of this name is not used: no address can name it; None if one can."""
    if not is_whole(name):
        return f"'{show_text(name)}' has a name that is not UTF-8. Rename the file."
    if not is_plain_path(name):
        plain = "".join(character if is_plain_path(character) else "_" for character in name)
        return f"'{plain}' has a backslash or a control character in its name (shown as _). Rename the file."
    return None


def _find_grid(image: Path) -> Grid | None:
    """Of an image; None if it cannot be read, which is said to whoever opens it."""
    try:
        return read_grid(image)
    except ProGiDiffError:
        return None


def _find_misfit(image: Path, label: Path) -> str:
    """Why a label cannot be one of an image, by their headers; "" if it can, or the image is at fault."""
    grid = _find_grid(image)
    if grid is None:
        return ""
    try:
        grid.check_same(read_grid(label))
    except ProGiDiffError as err:
        return _NO_LABEL.format(err)
    return ""


def _claim(studies: Path) -> None:
    """Be the only server on a folder, for the life of this process; the system frees the lock of a process that
    dies.
    """
    key = str(studies.resolve())
    if key in _held:
        return
    lock = FileLock(studies / ".server.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as err:
        message = f"Another server is running on '{studies}'. Stop it, or give this one another folder with --studies."
        logger.error(message)
        raise BusyError(message) from err
    except OSError as err:
        raise StoreError(
            f"'{studies}' cannot be written ({err}), and a server keeps its labels there. Check who may write there."
        ) from err
    _held[key] = lock


def _keep_host_file(reference: weakref.ref[SafeLocalDatastore]) -> None:
    """Write the host's file again and again, as long as there is the datastore."""
    looked, pause = 0.0, 0.0
    while True:
        time.sleep(_IDLE_SECONDS)
        store = reference()
        if store is None:
            return
        try:
            store.write_host_file_if_idle()
        except ProGiDiffError as err:
            logger.warning("The host's list of images is behind: %s", err)
        if (began := time.monotonic()) - looked >= pause:
            try:
                store.check_foreign_labels()
            except (OSError, ProGiDiffError) as err:
                logger.warning("The labels that were made elsewhere could not be looked at: %s", err)
            looked = time.monotonic()
            pause = _REST * (looked - began)  # Of very many labels, a small share of the time.
        del store


def _close(reference: weakref.ref[SafeLocalDatastore]) -> None:
    store = reference()
    if store is not None:
        try:
            store.close()
        except ProGiDiffError as err:
            logger.warning("The host's list of images is behind: %s", err)
