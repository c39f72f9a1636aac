"""``datastore_v2.json``, the file in which the host keeps its list of images and labels.

The datastore has an index of its own, and writes this file when nothing else happens, and at its end: the host, other
programs and older versions find everything in it. What they write into it is taken over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from progidiff.errors import StoreError
from progidiff.server.datastores.index import FileState
from progidiff.storage.atomic import atomic_file, replace_bytes
from progidiff.storage.json_text import mend, write_json
from progidiff.storage.state_files import DamagedStateError, note_damage, read_state, set_aside

logger = logging.getLogger(__name__)


class HostFile:
    """The file and its backup, ``datastore_v2.json.bak``.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backup = path.with_name(f"{path.name}.bak")

    def identify(self) -> str:
        """Which file it is; "" if there is none."""
        state = FileState.of(self.path)
        return "" if state is None else f"{state.inode} {state.modified} {state.size}"

    def read(self, has_index: bool) -> LocalDatastoreModel | None:
        """What it says; None if there is neither it nor a backup that can be read. A damaged one is set aside.

        Args:
            has_index: Whether the index knows the images; the backup, which is older, is not needed then.
        """
        try:
            return read_state(self.path, parse_list)
        except FileNotFoundError:
            problem = "" if has_index or not self.backup.exists() else "it is gone"
        except (OSError, DamagedStateError) as err:
            problem = str(err)
        model: LocalDatastoreModel | None = None
        if problem and not has_index:
            with contextlib.suppress(OSError, DamagedStateError):
                model = read_state(self.backup, parse_list)
        if problem:
            source = "the index" if has_index else "the folders: notes on images and labels are lost"
            source = source if model is None else f"the backup '{self.backup.name}'"
            kept = set_aside(self.path) if self.path.exists() else None
            note_damage(self.path, problem, f"Recovered the list of images from {source}; files are looked for.", kept)
        return model

    @staticmethod
    def encode(model: LocalDatastoreModel, records: Iterable[tuple[str, str]]) -> bytes:
        """What the file says of a list; one line per image.

        Args:
            model: Its name, description and folders.
            records: Id and record of every image; the record as JSON, as the index has it, which was read back before
                it was written there.

        Raises:
            StoreError: if what is around the records could not be read again.
        """
        head = write_json(plain(model.model_dump(exclude={"base_path", "objects"})), indent=2)
        try:
            parse_list(head)
        except ValueError as err:
            raise StoreError(f"The list of images could not be read again ({err}); it is not written.") from err
        lines = (b"    %s: %s" % (write_json(image), record.encode()) for image, record in records)
        return b'%s,\n  "objects": {\n%s\n  }\n}' % (head.rstrip().removesuffix(b"}").rstrip(), b",\n".join(lines))

    def write(self, content: bytes) -> None:
        """Replace it; the one before becomes the backup.

        Raises:
            StoreError: if the disk refuses; the old ones stay.
        """
        try:
            if self.path.exists():
                with atomic_file(self.backup) as scratch:
                    scratch.unlink()
                    try:
                        os.link(self.path, scratch)
                    except OSError:  # Not every disk can.
                        shutil.copyfile(self.path, scratch)
            replace_bytes(self.path, content)
        except OSError as err:
            raise StoreError(
                f"'{self.path}' could not be written ({err}). Free some disk space and try again."
            ) from err


def parse_record(text: str | bytes) -> ImageLabelModel:
    """One record of the list.

    Raises:
        ValueError: if it is none.
    """
    return ImageLabelModel.model_validate_json(text)


def parse_list(content: bytes) -> LocalDatastoreModel:
    """The host's list; text that no answer can hold, which older versions took, is mended.

    Raises:
        ValueError: if it is none.
    """
    try:
        return LocalDatastoreModel.model_validate_json(content)
    except ValueError:
        return LocalDatastoreModel.model_validate(mend(json.loads(content)))


def plain(value: object) -> object:
    """A value as JSON gives it back, whatever it held."""
    return mend(json.loads(json.dumps(value, default=str)))


def merge_records(known: ImageLabelModel | None, found: ImageLabelModel) -> ImageLabelModel:
    """What the index and the host's file know of an image, when somebody else wrote the file.

    Notes of both are kept, those of the file where they differ; of a label the younger one.
    """
    if known is None:
        return found
    labels = dict(found.labels)
    for tag, label in known.labels.items():
        if tag not in labels or _read_time(label) > _read_time(labels[tag]):
            labels[tag] = label
    image = found.image.model_copy(update={"info": {**known.image.info, **found.image.info}})
    return found.model_copy(update={"image": image, "labels": labels})


def _read_time(label: DataModel) -> float:
    time = label.info.get("ts")
    return float(time) if isinstance(time, (int, float)) else 0.0
