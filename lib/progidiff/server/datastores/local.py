"""The local datastore: checked labels, kept history, files that appear by rename, one server per folder.

What MONAI Label's own class does without locks and in place happens here under one lock per process and one between
processes, on copies that are swapped in: a reader never sees half of a change. What somebody sent is opened before any
lock is taken, and joined with the label in force under a lock of its image alone: a file that takes long to read keeps
nobody from saving. Then, under the lock of all, a save goes

1. the label version into the history (`AnnotationStore.record`: file, then its line in the log, both flushed),
2. the file into `labels/<tag>/` by rename,
3. `datastore_v2.json` by rename, the one before it kept as `.bak`.

No lock is waited for longer than 30 s. Only plain files count, and links only if they stay in the studies folder.

After a crash between 1 and 2 the next start finishes the last save; after one between 2 and 3 it finds the file by
looking. Files that somebody else puts into, changes in or takes out of the folders are taken as they are; before one is
replaced it goes into the history too.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from monailabel.config import settings
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from pydantic import ValidationError

from progidiff.errors import BusyError, ImageError, NotFoundError, ProGiDiffError, RequestError, StoreError
from progidiff.images.folders import LeftOut, list_left_out
from progidiff.images.formats import Use, find_format, is_picture, list_suffixes, strip_suffix
from progidiff.images.geometry import Grid
from progidiff.images.pictures import check_picture
from progidiff.images.reading import load_volume, read_grid
from progidiff.labels.history import FINAL, Annotation, AnnotationStore, hash_file
from progidiff.labels.saving import (
    Previous,
    ReadyLabel,
    SaveOptions,
    check_label,
    combine_ids,
    load_label_ids,
    open_label,
    prepare_label,
    prepare_renamed,
)
from progidiff.labels.segments import LabelMap, combine_names, read_names
from progidiff.proposals.store import ProposalStore
from progidiff.server.datastores.ids import check_id
from progidiff.server.datastores.image_locks import ImageLocks
from progidiff.storage.atomic import flush, scratch_folder

logger = logging.getLogger(__name__)

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCK_SECONDS = 30.0
_TRIES = 5
_WRITING = ".writing-"
_CHANGES = ("created", "deleted", "modified", "moved")
_STALE_SECONDS = 3600.0

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
    """

    label_id: str
    annotation: Annotation
    repeated: bool = False
    warnings: tuple[str, ...] = ()


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
        self._picture_ids = picture_ids
        self._proposals = proposals
        self._state = state
        self._serves = serves
        self._mutex = threading.RLock()
        self._images = ImageLocks()
        self._faults: dict[str, str] = {}
        self._depth = 0
        self._config_state: tuple[int, int, int] | None = None
        self._is_settled = not serves
        self.left_out: tuple[LeftOut, ...] = ()
        """What of the folder is not served, and why; as of the last look at it."""
        if serves:
            Path(studies).mkdir(parents=True, exist_ok=True)
            _claim(Path(studies))
        super().__init__(
            studies, extensions=list(extensions), auto_reload=auto_reload and serves, read_only=read_only or not serves
        )
        if hasattr(self, "_handler"):
            self._handler.on_moved = self._on_any_event  # Files appear by rename.
            match = self._handler.dispatch
            # Opening and closing change nothing. Matching these with every pattern kept the server busy for seconds
            # after 1000 files were read.
            self._handler.dispatch = lambda event: match(event) if event.event_type in _CHANGES else None

    # Labels

    def save_annotated(
        self,
        image_id: str,
        label_file: str | os.PathLike[str],
        tag: str,
        params: Mapping[str, Any],
        user: str = "",
        client: str = "",
    ) -> SavedLabel:
        """Check a label, keep it in the history and make it the one in force.

        Args:
            image_id: Of this datastore.
            label_file: Copied.
            tag: "final" for a label that counts.
            params: See `labels.saving.SaveOptions`; all of it is kept beside the label, as the host does.
            user: Who saves it.
            client: What saves it, unless `params` says so.

        Raises:
            NotFoundError: if there is no such image.
            RequestError, ImageError, GeometryError: if the label cannot count; nothing has changed then.
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
        )

    def _save(
        self,
        image_id: str,
        tag: str,
        params: Mapping[str, Any],
        user: str,
        client: str,
        prepare: Callable[[Path], ReadyLabel],
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
                with scratch_folder("label") as scratch:
                    saved = self._commit(prepare(scratch), before, image_id, tag, params, user, client)
                if saved is not None:
                    return saved
        raise BusyError(
            f"Another process keeps changing the label of '{image_id[:100]}'. Send it again; nothing was changed.",
            retry_after=5,
        )

    def _state_of(self, image_id: str, tag: str) -> tuple[list[Annotation], tuple[int, int, int] | None]:
        """Saves in force, and which file the folder has; equal while nobody saved, deleted, or put a file there."""
        path = self._label_path(image_id, tag)
        return self.annotations.in_force(image_id, tag), None if path is None else _identify(path)

    def _commit(
        self,
        ready: ReadyLabel,
        before: tuple[list[Annotation], tuple[int, int, int] | None],
        image_id: str,
        tag: str,
        params: Mapping[str, Any],
        user: str,
        client: str,
    ) -> SavedLabel | None:
        """Keep a prepared label and put it in force; None if what it was joined with is not in force any more."""
        with self._guard():
            self._check_known(image_id)
            if self._state_of(image_id, tag) != before:
                return None
            saves = before[0]
            current = saves[-1] if saves else None
            repeated = current is not None and is_repeat(ready, saves)
            if current is None or not repeated:
                current = record_ready(self.annotations, image_id, ready, tag, user, ready.client or client)
            self._put_in_force(image_id, tag, current, params)
            return SavedLabel(image_id, current, repeated, ready.warnings)

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
            self._adopt_foreign(image_id, tag)
            self._place(Path(label_filename), image_id, tag, row.suffix, {**(label_info or {})})
        return image_id

    def remove_label(self, label_id: str, label_tag: str, user: str = "", reason: str = "") -> None:
        """Take a label out of force; its versions stay in the history.

        Raises:
            NotFoundError: if there is no such label.
        """
        tag = check_tag(str(getattr(label_tag, "value", label_tag)))
        with self._guard():
            path = self._label_path(label_id, tag)
            if path is None:
                raise NotFoundError(
                    f"Image '{label_id[:100]}' has no label with tag '{tag}'. GET "
                    "/datastore/?output=all lists what there is."
                )
            self._adopt_foreign(label_id, tag)
            if self.annotations.current(label_id, tag) is not None:
                self.annotations.delete(label_id, user, tag, reason)
            self._take_away(label_id, tag)

    def undo(self, image_id: str, user: str = "") -> Annotation | None:
        """Go back one step; see `AnnotationStore.undo`."""
        with self._guard():
            self._check_known(image_id)
            self._adopt(image_id, FINAL)
            label = self.annotations.undo(image_id, user)
            self._settle(image_id, FINAL, label)
            return label

    def restore(self, image_id: str, sequence: int, user: str = "") -> Annotation:
        """Make an earlier save the one in force again; see `AnnotationStore.restore`."""
        with self._guard():
            self._check_known(image_id)
            self._adopt(image_id, self.annotations.get(image_id, sequence).tag)
            label = self.annotations.restore(image_id, sequence, user)
            self._settle(image_id, label.tag, label)
            return label

    def rename_structure(self, image_id: str, old: str, new: str, user: str = "") -> Annotation:
        """Give a structure of the label in force another name; a save like any other, which an undo takes back.

        Raises:
            NotFoundError: if there is no such image, label or structure.
            RequestError: if the new name is none.
        """
        grid = self._load_grid(image_id)

        def prepare(scratch: Path) -> ReadyLabel:
            served_ids = self._picture_ids() if is_picture(self.get_image_uri(image_id)) else None
            ids = load_label_ids(Path(self._datastore_path), served_ids)
            return rename_in_force(self.annotations, image_id, old, new, grid, ids, scratch)

        return self._save(image_id, FINAL, {}, user, "", prepare).annotation

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
        with self._guard():
            old = self._datastore.objects.get(image_id)
            target = Path(self._datastore.image_path()) / (image_id + (row.suffix if old is None else old.image.ext))
            if target.exists():
                if hash_file(target) == sha256:
                    return image_id
                raise RequestError(
                    f"There is another image '{image_id}' already, with its labels. "
                    "Choose another id, or delete it first."
                )
            self._write(Path(image_filename), target)
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
            self._datastore.objects = {
                name: other for name, other in self._datastore.objects.items() if name != image_id
            }
            self._update_datastore_file()

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
        record = self._datastore.objects.get(label_id)
        label = record.labels.get(label_tag) if record is not None else None
        if label is not None:
            self._check_place(Path(self._datastore.label_path(label_tag)) / self._filename(label_id, label.ext))
        return str(LocalDatastore.get_label_uri(self, label_id, label_tag))

    def _check_place(self, path: Path) -> None:
        reason = self._find_fault(path)
        if reason is not None:
            raise ImageError(reason)

    def _find_fault(self, path: Path) -> str | None:
        """Why a name in the folders is not used; None for a plain file, a folder, or a link to one that is served."""
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
        self, file: Path, label: LabelMap, grid: Grid, options: SaveOptions, image_id: str, tag: str, scratch: Path
    ) -> ReadyLabel:
        previous = find_previous(self.annotations, image_id, tag)
        served_ids = self._picture_ids() if is_picture(self.get_image_uri(image_id)) else None
        kept_ids = combine_ids(load_label_ids(Path(self._datastore_path), served_ids), previous)
        checked = check_label(file, label, options, kept_ids, served_ids)
        return prepare_label(checked, grid, options, image_id, previous, self._proposals, scratch)

    def _put_in_force(self, image_id: str, tag: str, label: Annotation, params: Mapping[str, Any]) -> None:
        info: dict[str, Any] = {**params, "annotation": label.sequence}
        info["label_info"] = [{"name": name, "idx": value} for name, value in label.label_ids] or params.get(
            "label_info"
        )
        file = self.annotations.label_file(label)
        self._place(file, image_id, tag, Path(label.file).name[len(strip_suffix(label.file)) :], info)

    def _settle(self, image_id: str, tag: str, label: Annotation | None) -> None:
        """Make the folder say what the history says."""
        if label is None:
            self._take_away(image_id, tag)
        else:
            self._put_in_force(image_id, tag, label, {})

    def _place(self, file: Path, image_id: str, tag: str, suffix: str, info: dict[str, Any]) -> None:
        """Put a label where the host looks for it, in place of one of another format, and list it."""
        record = self._object(image_id)
        target = Path(self._datastore.label_path(tag)) / self._filename(image_id, suffix)
        self._write(file, target)
        old = record.labels.get(tag)
        if old is not None and old.ext != suffix:
            (target.parent / self._filename(image_id, old.ext)).unlink(missing_ok=True)
        label = DataModel(info={**info, "ts": int(time.time()), "name": target.name}, ext=suffix)
        self._replace(image_id, record.model_copy(update={"labels": {**record.labels, tag: label}}))

    def _take_away(self, image_id: str, tag: str) -> None:
        path = self._label_path(image_id, tag)
        if path is not None and find_format(path, Use.LABEL) is not None:
            path.unlink(missing_ok=True)  # The history has it, or it can be made again from the kept proposals.
        elif path is not None:
            self._throw_away(path)
        record = self._object(image_id)
        self._replace(
            image_id,
            record.model_copy(update={"labels": {name: label for name, label in record.labels.items() if name != tag}}),
        )

    def _label_path(self, image_id: str, tag: str) -> Path | None:
        """Where the label is; None if there is none."""
        record = self._datastore.objects.get(image_id)
        label = record.labels.get(tag) if record is not None else None
        path = None if label is None else Path(self._datastore.label_path(tag)) / self._filename(image_id, label.ext)
        return path if path is not None and path.is_file() and self._find_fault(path) is None else None

    def _adopt(self, image_id: str, tag: str) -> None:
        """Note in the history what somebody changed in the folder since: a label replaced, added or taken away."""
        if self._label_path(image_id, tag) is None:
            if self.annotations.current(image_id, tag) is not None:
                self.annotations.delete(image_id, "", tag, "the file was taken out of the folder")
            return
        self._adopt_foreign(image_id, tag)

    def _adopt_foreign(self, image_id: str, tag: str) -> None:
        """Keep a label in the history that was put into the folder by somebody else, before it is replaced."""
        path = self._label_path(image_id, tag)
        if path is None or find_format(path, Use.LABEL) is None:
            return
        current = self.annotations.current(image_id, tag)
        if current is None and tag != FINAL:
            return  # Made by this program, see `save_label`.
        if current is None or current.sha256 != hash_file(path):
            logger.info(
                "Label '%s' of '%s' was put into the folder by somebody else; keeping it in the history", tag, image_id
            )
            named = {name: value for value, name in read_names(path).items()}
            self.annotations.record(image_id, path, tag=tag, client="folder", label_ids=named)

    def _filename(self, id: str, ext: str) -> str:
        name = id + ext
        if Path(name).name != name or name.startswith("."):
            raise RequestError(
                f"'{name[:100]}' is no file name of this datastore. Use letters, digits, '.', '_' and '-'."
            )
        return name

    def _write(self, source: Path, target: Path) -> None:
        """Copy by rename, flushed; the name is free of suffixes until then, so that no watcher takes it for an
        image.
        """
        temporary = target.parent / f"{_WRITING}{uuid.uuid4().hex}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary)
            flush(temporary)
            os.replace(temporary, target)
            flush(target.parent)
        except OSError as err:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StoreError(
                f"'{target}' could not be written ({err}). Free some disk space and send "
                "it again; nothing else changed."
            ) from err

    def _throw_away(self, path: Path) -> None:
        trash = self._state / "trash"
        try:
            trash.mkdir(parents=True, exist_ok=True)
            shutil.move(path, trash / f"{time.time_ns()}-{path.name}")
        except OSError as err:
            raise StoreError(
                f"'{path.name}' could not be moved to '{trash}' ({err}); it stays. Free some disk space."
            ) from err

    # The list of images and labels

    def _replace(self, image_id: str, record: ImageLabelModel) -> None:
        self._datastore.objects = {**self._datastore.objects, image_id: record}
        self._update_datastore_file()

    def _reconcile_datastore(self) -> None:
        with self._guard():
            if not Path(self._datastore.label_path(FINAL)).is_dir():
                logger.error(
                    "'%s' is gone or not mounted; its images and labels stay listed until it is back",
                    self._datastore_path,
                )
                return
            listed = self._datastore.objects
            objects = self._scan()
            if objects != listed:
                self._datastore.objects = objects
                self._update_datastore_file()
            if not self._is_settled:
                self._is_settled = True
                self.annotations.set_aside_unfinished()
                self._finish_last_save(listed)
                self._remove_leftovers()
            if self._serves:
                self._note_removed_labels()

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
        tags = [name for name in self._list_names(str(labels)) if _TAG.fullmatch(name)]
        # Labels that count may lie on another disk, which the administrator then has linked.
        for folder in sorted(path for path in (labels / name for name in {*tags, FINAL}) if path.is_dir()):
            files = self._list_files(str(folder), self._extensions)
            for name in sorted(files):
                image_id, suffix = self._to_id(name)
                if image_id not in objects:
                    continue
                old = known[image_id].labels.get(folder.name) if image_id in known else None
                if old is not None and self._filename(image_id, old.ext) in files:
                    objects[image_id].labels[folder.name] = old
                else:
                    objects[image_id].labels[folder.name] = DataModel(info={"ts": now, "name": name}, ext=suffix)
        self._note_left_out({self._filename(image_id, record.image.ext) for image_id, record in objects.items()})
        return objects

    def _list_files(self, path: str, patterns: list[str]) -> dict[str, str]:
        """Names that fit the host's patterns, in any case."""
        names = [name for name in self._list_names(path) if not name.startswith(".")]
        return {name: name for name in names if any(fnmatch.fnmatchcase(name.lower(), p.lower()) for p in patterns)}

    def _to_id(self, file: str) -> tuple[str, str]:
        """The id of an image or label, and its suffix as it is written."""
        row = find_format(file, Use.IMAGE)
        if row is None:
            image_id, suffix = super()._to_id(file)
            return str(image_id), str(suffix)
        return file[: -len(row.suffix)], file[-len(row.suffix) :]

    def _note_left_out(self, served: set[str]) -> None:
        """Say what somebody may look for in vain, once."""
        labels = Path(self._datastore.label_path(None))
        found = list_left_out(Path(self._datastore.image_path()), served, {labels.name})
        for entry in found:
            if entry not in self.left_out and self._serves:
                logger.warning("Not served: '%s'. %s", entry.name, entry.reason)
        self.left_out = found

    def _list_names(self, path: str) -> list[str]:
        """What a folder holds, without what is neither a file nor a folder, and without links that lead out."""
        with os.scandir(path) as entries:
            faults = {
                entry.name: None if entry.is_file(follow_symlinks=False) else self._find_fault(Path(entry.path))
                for entry in entries
            }
        for name, fault in faults.items():
            if fault is not None and self._faults.get(name) != fault:
                self._faults[name] = fault
                logger.warning("Left out of the datastore: %s", fault)
        return [name for name, fault in faults.items() if fault is None]

    def explain_absence(self, image_id: str) -> str | None:
        """Why an image that lies in the folder is not in the list; None if there is no such file."""
        names = [name for name in list(self._faults) if self._to_id(name)[0] == image_id]
        return next(filter(None, (self._find_fault(Path(self._datastore.image_path()) / name) for name in names)), None)

    def _finish_last_save(self, listed: Mapping[str, ImageLabelModel]) -> None:
        """Do what a crash left undone between the log and the folder; only the last event can be concerned.

        Args:
            listed: What datastore_v2.json said at the start. A save that it knows was finished: if the file is not
                there, somebody took it away.
        """
        events = [event for event in self.annotations.events() if event.kind != "skip"]
        if not events or events[-1].image not in self._datastore.objects:
            return
        image_id, tag = events[-1].image, events[-1].tag
        wanted = self.annotations.current(image_id, tag)
        path = self._label_path(image_id, tag)
        found = None if path is None else hash_file(path)
        old = listed[image_id].labels.get(tag) if image_id in listed else None
        if found == (None if wanted is None else wanted.sha256) or (
            wanted and old and old.info.get("annotation") == wanted.sequence
        ):
            return
        if found is not None and found not in {
            label.sha256 for label in self.annotations.list(image_id) if label.tag == tag
        }:
            return  # Somebody else put it there meanwhile.
        logger.warning("The last save of '%s' was cut off; finishing it from the history", image_id)
        self._settle(image_id, tag, wanted)

    def _note_removed_labels(self) -> None:
        """Labels that somebody took out of the folder count no more; the history still has them."""
        folder = Path(self._datastore.label_path(FINAL))
        names = self._list_files(str(folder), self._extensions)
        present = {self._to_id(name)[0] for name in names}
        for image_id in self.annotations.annotated_images():
            if image_id in self._datastore.objects and image_id not in present:
                logger.warning(
                    "The label of '%s' was taken out of the folder; it counts no more. The history has it.", image_id
                )
                self.annotations.delete(image_id, "", FINAL, "the file was taken out of the folder")

    def _on_any_event(self, event: Any) -> None:
        try:
            self.refresh()
        except (OSError, ProGiDiffError):
            logger.exception("The studies folder could not be read again")

    def _on_modify_event(self, event: Any) -> None:
        if event.src_path == self._datastore_config_path:
            self._on_any_event(event)

    # datastore_v2.json

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._guard():  # Reads the file if it changed.
            return

    def _update_datastore_file(self, lock: bool = True) -> None:
        config = Path(self._datastore_config_path)
        text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        with self._guard(reads=False):
            temporary = config.with_name(f"{_WRITING}{uuid.uuid4().hex}")
            try:
                if config.exists():
                    shutil.copyfile(config, temporary)
                    flush(temporary)
                    os.replace(temporary, _backup(config))
                temporary.write_text(text, encoding="utf-8")
                flush(temporary)
                os.replace(temporary, config)
                flush(config.parent)
            except OSError as err:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise StoreError(
                    f"'{config}' could not be written ({err}). Free some disk space and try again."
                ) from err
            self._config_state = _identify(config)

    def _load_list(self) -> None:
        """Read datastore_v2.json if it changed; a damaged one gives way to its backup, or to what is in the folders."""
        config = Path(self._datastore_config_path)
        state = _identify(config)
        if state is None and self._config_state is None and not _backup(config).exists():
            return  # A new folder.
        if state is not None and state == self._config_state:
            return
        model = None if state is None else _parse_list(config)
        if model is None:
            if state is not None:
                aside = config.with_name(f"{config.name}.damaged-{time.time_ns()}")
                os.replace(config, aside)
                logger.error("'%s' is damaged; it is kept as '%s'", config, aside.name)
            model = _parse_list(_backup(config)) if _backup(config).exists() else None
            logger.warning(
                "Recovered the list of images from %s; files are looked for again",
                "the folders: notes on images and labels are lost"
                if model is None
                else f"the backup '{_backup(config).name}'",
            )
        is_recovered = state is None or not config.exists()
        if model is not None:
            model.base_path = self._datastore_path
            model.objects = {
                image_id: record for image_id, record in model.objects.items() if self._is_sound(image_id, record)
            }
            self._datastore = model
        self._config_state = state
        if is_recovered:
            self._update_datastore_file()

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
        """Temporary files of processes that died."""
        folders = [
            Path(self._datastore_path),
            *(path for path in Path(self._datastore.label_path(None)).iterdir() if path.is_dir()),
        ]
        for path in (path for folder in folders for path in folder.glob(f"{_WRITING}*")):
            with contextlib.suppress(OSError):
                if path.is_file() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


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
    patterns = list(settings.MONAI_LABEL_DATASTORE_FILE_EXT)
    # The host lists one spelling of each; the other is as common.
    patterns += [
        long for short, long in (("*.jpg", "*.jpeg"), ("*.tif", "*.tiff")) if short in patterns and long not in patterns
    ]
    return SafeLocalDatastore(
        studies,
        state,
        annotations,
        proposals,
        serves="monailabel.app" in sys.modules,
        extensions=patterns,
        auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        picture_ids=picture_ids,
    )


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


def find_previous(annotations: AnnotationStore, image_id: str, tag: str) -> Previous | None:
    """The label in force, for `labels.saving.prepare_label`."""
    saves = annotations.in_force(image_id, tag)
    if not saves:
        return None
    slices: frozenset[int] | None = None
    if all(label.slices is not None for label in saves):
        slices = frozenset(z for label in saves for z in label.slices or ())
    structures = tuple(dict.fromkeys(name for label in saves for name in label.structures))
    file = annotations.label_file(saves[-1])
    names = combine_names(read_names(file), {value: name for name, value in saves[-1].label_ids})
    return Previous(file, {name: value for value, name in names.items()}, slices, structures)


def rename_in_force(
    annotations: AnnotationStore, image_id: str, old: str, new: str, grid: Grid, ids: Mapping[str, int], scratch: Path
) -> ReadyLabel:
    """The label in force with another name for a structure, see `labels.saving.prepare_renamed`.

    Args:
        ids: Structure -> id, of the folder.
        scratch: For the file.

    Raises:
        NotFoundError: if there is no label, or no such structure.
    """
    previous = find_previous(annotations, image_id, FINAL)
    if previous is None:
        raise NotFoundError(f"Image '{image_id[:100]}' has no saved label yet, so there is nothing to rename.")
    saves = annotations.in_force(image_id, FINAL)
    return prepare_renamed(old, new, grid, saves, previous, combine_ids(ids, previous), scratch)


def is_repeat(ready: ReadyLabel, saves: list[Annotation]) -> bool:
    """Whether a label says nothing that the saves in force do not say already."""
    if not saves or hash_file(ready.file) != saves[-1].sha256:
        return False
    whole = any(label.slices is None for label in saves)
    known = {z for label in saves for z in label.slices or ()}
    covered = whole or (ready.slices is not None and known.issuperset(ready.slices))
    return covered and {name for label in saves for name in label.structures}.issuperset(ready.structures)


def record_ready(
    annotations: AnnotationStore, image_id: str, ready: ReadyLabel, tag: str, user: str, client: str
) -> Annotation:
    """Put a prepared label into the history."""
    return annotations.record(
        image_id,
        ready.file,
        tag=tag,
        user=user,
        client=client,
        slices=ready.slices,
        structures=ready.structures,
        source=ready.source,
        edited=ready.edited,
        seconds=ready.seconds,
        num_slices=ready.num_slices,
        label_ids=ready.label_ids,
    )


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


def _backup(config: Path) -> Path:
    return config.with_name(config.name + ".bak")


def _identify(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def _parse_list(path: Path) -> LocalDatastoreModel | None:
    try:
        return LocalDatastoreModel.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError) as err:
        logger.error("'%s' cannot be read: %s", path, " ".join(str(err).split())[:200])
        return None
