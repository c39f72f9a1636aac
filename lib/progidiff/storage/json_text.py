"""JSON as it comes from others and as it goes back: one reader that lets in only what can be sent again, one writer.

Python's own reader takes more than JSON (``NaN``, ``Infinity``, ``1e999``) and text that no answer can hold: half of a
surrogate pair, ``"\\ud800"``, is a `str` that no encoding writes. One such value in a log or a datastore breaks every
answer that it comes into. So what a request brings is read by `read_json`; what goes out is written by `write_json`,
which escapes what an older version let in.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator

from progidiff.errors import RequestError, TooLargeError

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 64
"""Objects and lists inside each other; a prompt needs 2, a label with its segments 4."""

MAX_DIGITS = 64
"""Characters of a number; a 64-bit float is written with 24 at most, a 128-bit integer with 39."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BRACKETS = re.compile(r"[\[\]{}]")


def read_json(text: str | bytes, what: str, *, most: int = MAX_CHARACTERS) -> Any:
    """The value of a JSON text; None for an empty one.

    Args:
        text: As it was sent; bytes are UTF-8, with or without a byte order mark.
        what: What holds it, as a refusal begins: "The form field params".
        most: Longest text, in characters.

    Raises:
        TooLargeError: if it is longer.
        RequestError: if it is not JSON, not a number that a 64-bit float holds, has half of a surrogate pair in it, or
            lists and objects more than `MAX_DEPTH` deep.

    Example:
        >>> read_json('{"prompt": "liver"}', "The body")
        {'prompt': 'liver'}
        >>> read_json('["\\\\ud800"]', "The body")
        Traceback (most recent call last):
        ...
        progidiff.errors.RequestError: The body has half of a character in it (a lone surrogate). Send whole text.
    """
    if len(text) > most:
        raise TooLargeError(f"{what} has {len(text):,} characters; at most {most:,} are read. Send less.")
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        plain = plain.removeprefix("\ufeff")
        if not plain.strip():
            return None
        value = json.loads(plain, parse_constant=_refuse_constant, parse_float=_read_float, parse_int=_read_int)
    except (ValueError, RecursionError) as err:
        raise RequestError(f"{what} is not JSON ({show_text(str(err))}). Send an object, for example {{}}.") from err
    if len(_BRACKETS.findall(plain)) > 2 * MAX_DEPTH and _is_deep(value):
        raise RequestError(f"{what} is nested more than {MAX_DEPTH} deep. Send an object, for example {{}}.")
    if ("\\u" in plain or _HALF_PAIR.search(plain)) and _HALF_PAIR.search(json.dumps(value, ensure_ascii=False)):
        raise RequestError(f"{what} has half of a character in it (a lone surrogate). Send whole text.")
    return value


def read_json_object(text: str | bytes, what: str, *, most: int = MAX_CHARACTERS) -> dict[str, Any]:
    """The object of a JSON text, as `read_json` reads it; empty for an empty text.

    Raises:
        RequestError: whatever `read_json` refuses, and any other JSON value.

    Example:
        >>> read_json_object("", "The body"), read_json_object("{}", "The body")
        ({}, {})
    """
    value = read_json(text, what, most=most)
    if value is None and not text.strip():
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{what} is a JSON {type(value).__name__}. Send an object, for example {{}}.")
    return value


def decode_json_file(content: bytes, *, errors: str = "strict") -> str:
    """The text of a JSON file that some program or person wrote: in UTF-8, or in UTF-16 or UTF-32 as Windows does, with
    or without a byte order mark.

    Args:
        content: Of the file.
        errors: As of `bytes.decode`.

    Raises:
        UnicodeDecodeError: if it is in another encoding, and `errors` is "strict".

    Example:
        >>> decode_json_file('{"modality": "MR"}'.encode("utf-16"))
        '{"modality": "MR"}'
    """
    return content.decode(json.detect_encoding(content), errors).removeprefix("\ufeff")


def write_json(value: object, *, indent: int | None = None) -> bytes:
    """UTF-8 that every reader takes, whatever an older version let in: a number that is none becomes null, half of a
    surrogate pair its escape.

    Example:
        >>> write_json({"name": "M\\u00fcller", "half": "\\ud800", "score": float("nan")}).decode()
        '{"name":"Müller","half":"\\\\ud800","score":null}'
    """
    try:
        text = _dump(value, indent)
    except ValueError:
        text = _dump(_drop_constants(value), indent)
    return text.encode("utf-8", errors="backslashreplace")  # A half pair's escape in Python is the one in JSON.


def mend(value: Any) -> Any:
    """A value as `read_json` lets it in: half of a surrogate pair becomes U+FFFD, a number that is none becomes None.

    For what older versions have kept.

    Example:
        >>> mend({"name": "a\\ud800", "score": [float("nan")]})
        {'name': 'a�', 'score': [None]}
    """
    if isinstance(value, str):
        return value if value.isascii() else _HALF_PAIR.sub("\ufffd", value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {mend(key): mend(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [mend(entry) for entry in value]
    return value


Text = Annotated[str, BeforeValidator(mend)]
"""Of a model of answers: text that an older version or the name of a file may have given half of a character."""


def show_text(text: str, most: int = 120) -> str:
    """Text of somebody else as it may stand in an answer, a log or a name: whole characters, `most` of them.

    Example:
        >>> show_text("a\\ud800b")
        'a\ufffdb'
    """
    return _HALF_PAIR.sub("\ufffd", text[:most])


def is_whole(text: str) -> bool:
    """Whether text can be written in UTF-8; a file name that is not UTF-8 reaches Python as text that cannot.

    Example:
        >>> is_whole("M\\u00fcller.nii.gz"), is_whole("M\\udcfcller.nii.gz")
        (True, False)
    """
    return not _HALF_PAIR.search(text)


def is_plain_path(text: str) -> bool:
    """Whether text can stand in an address as it is: without a backslash, which some take for a slash, and without
    what controls a terminal or ends a line. Spaces of all kinds and joiners may stand in names.

    Example:
        >>> is_plain_path("scan\u3000\u0661"), is_plain_path("folder\\\\scan"), is_plain_path("scan\\n")
        (True, False, False)
    """
    return _CONTROLS.search(text) is None


def _dump(value: object, indent: int | None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)


def _drop_constants(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _drop_constants(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_drop_constants(entry) for entry in value]
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _read_float(digits: str) -> float:
    number = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too long or too large a number")
    return number


def _read_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"{digits[:20]}... is too long a number")
    return int(digits)


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            entry
            for held in level
            if isinstance(held, (dict, list))
            for entry in (held.values() if isinstance(held, dict) else held)
            if isinstance(entry, (dict, list))
        ]
        if not level:
            return False
    return True
