"""Names that say nothing, in place of those of images and patients, and the key that leads back.

The key is a table (CSV) that a person keeps apart from what goes out: whoever has both knows who is who. It grows: an
image or patient that is exported again gets the name that it had.
"""

from __future__ import annotations

import csv
import io
import secrets
import uuid
from collections.abc import Callable
from pathlib import Path

from progidiff.errors import RequestError, StoreError
from progidiff.storage.atomic import replace_bytes

_COLUMNS = ("kind", "original", "replacement")
_PRIVATE = 0o600


class Pseudonyms:
    """Replacements, by what they replace.

    Args:
        path: Of the key, .csv; read if it is there. `save` writes it.

    Raises:
        RequestError: if the file is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, str], str] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            reader = csv.DictReader(io.StringIO(self.path.read_text(encoding="utf-8")))
            if tuple(reader.fieldnames or ()) != _COLUMNS:
                raise ValueError(f"its first line is not {','.join(_COLUMNS)}")
            rows = list(reader)
            self._known = {(row["kind"], row["original"]): row["replacement"] for row in rows}
        except (OSError, ValueError, KeyError, csv.Error) as err:
            raise RequestError(
                f"'{self.path}' is no key of pseudonyms ({type(err).__name__}: {err}). Name the file that an export "
                "wrote, or "
                "a new one."
            ) from err

    def of_image(self, image: str) -> str:
        """For an image's id, for example "image-3f9a2c17"."""
        return self._find("image", image, lambda: f"image-{secrets.token_hex(4)}")

    def of_patient(self, patient: str) -> str:
        """For a patient's id, for example "patient-3f9a2c17"."""
        return self._find("patient", patient, lambda: f"patient-{secrets.token_hex(4)}")

    def of_uid(self, uid: str) -> str:
        """For a DICOM UID: another one, made of a random number (PS3.5 B.2)."""
        return self._find("uid", uid, lambda: f"2.25.{uuid.uuid4().int}")

    def save(self) -> None:
        """Write the key, readable by its owner alone.

        Raises:
            StoreError: if the disk refuses.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((kind, original, replacement) for (kind, original), replacement in sorted(self._known.items()))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(self.path, text.getvalue().encode(), mode=_PRIVATE)
        except OSError as err:
            raise StoreError(
                f"The key '{self.path}' could not be written ({err}). Name another file with --key."
            ) from err

    def _find(self, kind: str, original: str, make: Callable[[], str]) -> str:
        if (kind, original) not in self._known:
            taken = set(self._known.values())
            self._known[kind, original] = next(name for name in iter(make, None) if name not in taken)
        return self._known[kind, original]


def check_apart(key: Path, out: Path) -> None:
    """Refuse a key that would go out with what it opens.

    Raises:
        RequestError: if it lies in the folder.
    """
    if out.resolve() in key.resolve().parents or key.resolve() == out.resolve():
        raise RequestError(
            f"The key '{key}' would lie in '{out}', beside what it opens. Name a file elsewhere with --key, and keep "
            "it where "
            "the data does not go."
        )
