"""Changing one sentence of ``text.csv`` and nothing else of it: every other row, column, quote and line end stays byte
for byte as a spreadsheet or a person left it.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence

from progidiff.errors import RequestError
from progidiff.textdiff.sentences import find_columns, find_separator, match_names

MAX_LETTERS = 2000
"""Longest sentence that is kept. Encoders read less; what each reads is said when it is asked."""

NEW_TABLE = b"image,text\n"
"""What a table begins with where there is none."""

_FORMULA = ("=", "+", "-", "@")
_BOM = "\ufeff"


def check_sentence(sentence: str) -> str:
    """A sentence as it may stand in the table, with single spaces.

    Raises:
        RequestError: if it is empty, longer than `MAX_LETTERS`, holds control characters, or begins as the formulas of
            spreadsheets do.

    Example:
        >>> check_sentence(" Dense on\\n the left. ")
        'Dense on the left.'
    """
    text = " ".join(sentence.split())
    if not text:
        raise RequestError(
            "The sentence is empty. Write what the picture shows; to take a sentence away, send null instead."
        )
    if len(text) > MAX_LETTERS:
        raise RequestError(
            f"The sentence has {len(text):,} letters; at most {MAX_LETTERS:,} are kept. Write what this picture shows."
        )
    strange = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if strange is not None:
        raise RequestError(
            f"The sentence holds the control character U+{ord(strange):04X}, which no table takes. Type it again "
            "instead of pasting it."
        )
    if text.startswith(_FORMULA):
        raise RequestError(
            f"The sentence begins with '{text[0]}', which spreadsheets take for a formula. Begin with a word."
        )
    return text


def change_sentence(content: bytes, table: str, image: str, sentence: str | None) -> bytes:
    """A table with another sentence for one image.

    Args:
        content: Of the CSV file, UTF-8.
        table: Its name, for messages.
        image: File name of the picture.
        sentence: As `check_sentence` gives it; None for none: the image's row stays, without a text.

    Returns:
        The new content. An image without a row gets one at the end.

    Raises:
        RequestError: if the table is in another encoding, is no CSV, or has no such columns.
    """
    text = _decode(content, table)
    mark, text = (_BOM, text[1:]) if text.startswith(_BOM) else ("", text)
    separator = find_separator(text)
    records = _split(text, table, separator)
    header = records[0][0] if records else []
    columns = find_columns(header, table)
    keys = [row[columns[0]].strip() if columns[0] < len(row) else "" for row, _ in records[1:]]
    wanted = set(match_names(dict.fromkeys(filter(None, keys)), image))
    if sentence is None:  # What another row says of the image, under its name without a suffix, goes too.
        rest = dict.fromkeys(key for key in keys if key)
        while found := match_names(rest, image):
            wanted.update(found)
            rest = {key: None for key in rest if key not in found}
    lines = [raw for _, raw in records]
    for place, key in enumerate(keys, start=1):
        if key in wanted:
            row, raw = records[place]
            lines[place] = _write(_put(row, columns, key, sentence or ""), separator, _find_end(raw))
    if not wanted and sentence is not None:
        end = _find_end(lines[0]) or "\n"
        if not _find_end(lines[-1]):
            lines[-1] += end
        lines.append(_write(_put([""] * len(header), columns, image, sentence), separator, end))
    return (mark + "".join(lines)).encode("utf-8")


def _decode(content: bytes, table: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise RequestError(f"The table '{table}' cannot be read ({err}); save it as CSV in UTF-8.") from err


def _split(text: str, table: str, separator: str) -> list[tuple[list[str], str]]:
    """Every row as its cells and as it stands in the file, line end included."""
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    records, start = [], 0
    try:
        for row in reader:
            records.append((row, "".join(lines[start : reader.line_num])))
            start = reader.line_num
    except csv.Error as err:
        raise RequestError(
            f"The table '{table}' is no CSV ({err}); put texts that hold a comma in double quotes."
        ) from err
    return records


def _put(row: Sequence[str], columns: tuple[int, int], image: str, sentence: str) -> list[str]:
    cells = [*row, *[""] * (max(columns) + 1 - len(row))]
    cells[columns[0]], cells[columns[1]] = image, sentence
    return cells


def _write(row: Sequence[str], separator: str, end: str) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, lineterminator=end).writerow(row)
    return file.getvalue()


def _find_end(raw: str) -> str:
    return raw[len(raw.rstrip("\r\n")) :]
