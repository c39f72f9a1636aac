"""Ids of images: what may be one, and what becomes of names that may not."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from progidiff.errors import RequestError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_NAME = 200


def is_plain_id(name: str) -> bool:
    """Whether a name is an id as it is."""
    return _ID.fullmatch(name) is not None


def check_id(image_id: str) -> str:
    """Refuse an id that would not do as a file name.

    Raises:
        RequestError: saying what it may hold.

    Example:
        >>> check_id("case_01")
        'case_01'
    """
    if not is_plain_id(image_id):
        raise RequestError(
            f"'{image_id[:60]}' cannot name an image: use up to 128 letters, digits, '.', "
            "'_' and '-', not starting with a sign."
        )
    return image_id


def make_id(name: str) -> str:
    """The id of an image that somebody uploads under a name: the name itself if it will do, else one made of it.

    3D Slicer uploads volumes under the names of their nodes, for example "5: Body 1.5 CE". What is made depends on the
    name alone, and differs where names differ.

    Raises:
        RequestError: if the name looks like a path, or is no text for people.

    Example:
        >>> make_id("case_01"), make_id("5: Body 1.5 CE")
        ('case_01', '5_Body_1.5_CE-86dc8c')
    """
    if is_plain_id(name):
        return name
    if not name.strip() or len(name) > _MAX_NAME or not name.isprintable() or set(name) & set("/\\") or name[0] == ".":
        return check_id(name)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")[:100] or "image"
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
