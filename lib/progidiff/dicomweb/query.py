"""Searches (QIDO-RS): which data sets match the query of an address, and which page of them.

Attributes are named by keyword or tag. Values match as DICOM's C-FIND says: lists of UIDs, ``*`` and ``?`` as
wildcards, ``from-to`` for dates and times, anything else as equal; names whatever their case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from progidiff.errors import RequestError

_OPTIONS = ("limit", "offset", "fuzzymatching", "includefield")
_TAG = re.compile(r"[0-9A-Fa-f]{8}")
_DATE = re.compile(r"\d{8}")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_RANGED = {"DA": _DATE, "TM": _TIME}
_WITHOUT_WILDCARDS = ("UI", "DA", "TM", "IS", "DS", "US", "UL", "SS", "SL")


@dataclass(frozen=True)
class Condition:
    """One attribute and what it must be.

    Attributes:
        tag: Eight hexadecimal digits.
        vr: Its value representation.
        values: Any of them matches.
    """

    tag: str
    vr: str
    values: tuple[str, ...]

    def matches(self, dataset: Mapping[str, Any]) -> bool:
        """Whether a data set (DICOM JSON) has the attribute with such a value."""
        found = [_to_text(value) for value in dataset.get(self.tag, {}).get("Value", [])]
        return any(self._match(wanted, value) for wanted in self.values for value in found or [""])

    def _match(self, wanted: str, value: str) -> bool:
        if self.vr in _RANGED and "-" in wanted:
            low, _, high = wanted.partition("-")
            # A date that is not known lies in no range.
            return bool(value) and (not low or value >= low) and (not high or value[: len(high)] <= high)
        if self.vr in _WITHOUT_WILDCARDS:
            return value == wanted
        if self.vr == "PN":
            wanted, value = wanted.lower(), value.lower()
        return (
            re.fullmatch("".join(_WILDCARDS.get(letter, re.escape(letter)) for letter in wanted), value, re.DOTALL)
            is not None
        )


_WILDCARDS = {"*": ".*", "?": "."}


@dataclass(frozen=True)
class Query:
    """A search.

    Attributes:
        conditions: All must be met.
        limit: Most data sets that are given, None for all.
        offset: How many matches are left out first.
    """

    conditions: tuple[Condition, ...] = ()
    limit: int | None = None
    offset: int = 0

    @classmethod
    def read(cls, parameters: Sequence[tuple[str, str]]) -> Query:
        """Read the query of an address; ``includefield`` is not needed, as everything known is answered.

        Raises:
            RequestError: if it names no DICOM attribute, or a number or date cannot be one.

        Example:
            >>> Query.read([("PatientName", "liver*"), ("limit", "10")]).limit
            10
        """
        options = {name.lower(): value for name, value in parameters if name.lower() in _OPTIONS}
        conditions = [_read_condition(name, value) for name, value in parameters if name.lower() not in _OPTIONS]
        return cls(
            tuple(condition for condition in conditions if condition is not None),
            _read_count(options["limit"], "limit") if options.get("limit") else None,
            _read_count(options["offset"], "offset") if options.get("offset") else 0,
        )

    def select(self, datasets: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The page of matching data sets, taken from `datasets` one by one and no further than needed."""
        matches = (dataset for dataset in datasets if all(condition.matches(dataset) for condition in self.conditions))
        return islice(matches, self.offset, None if self.limit is None else self.offset + self.limit)

    def may_match(self, dataset: Mapping[str, Any]) -> bool:
        """Whether a data set of a higher level contradicts no condition: what it does not have is not asked."""
        return all(condition.matches(dataset) for condition in self.conditions if condition.tag in dataset)

    def with_equal(self, keyword: str, value: str) -> Query:
        """The same search, narrowed to one value of one attribute: what a path like ``studies/<uid>/series`` says."""
        return Query(
            (*self.conditions, Condition(_tag(keyword), _vr(_tag(keyword)), (value,))), self.limit, self.offset
        )


def _read_condition(name: str, value: str) -> Condition | None:
    """None if any value will do."""
    tag = _tag(name)
    vr = _vr(tag)
    parts = re.split(r"[\\,]", value) if vr in ("UI", "CS") else [value.strip().strip('"')]
    values = tuple(part.strip() for part in parts if part.strip())
    if not values or set(values) == {"*"}:
        return None
    pattern = _RANGED.get(vr)
    for text in values if pattern is not None else ():
        ends = text.split("-", 1)
        if not any(ends) or any(end and not pattern.fullmatch(end) for end in ends):  # type: ignore[union-attr]
            kind = (
                "date, 20260131, or a range, 20260101-20260131" if vr == "DA" else "time, 081500, or a range, 08-1230"
            )
            raise RequestError(f"{name} is '{text[:40]}'; it must be a {kind}.")
    return Condition(tag, vr, values)


def _tag(name: str) -> str:
    number = int(name, 16) if _TAG.fullmatch(name) else tag_for_keyword(name)
    try:
        dictionary_VR(number or 0)
    except KeyError:
        number = None
    if number is None:
        raise RequestError(f"'{name[:60]}' is no DICOM attribute. Search by keyword (PatientID) or tag (00100020).")
    return f"{number:08X}"


def _vr(tag: str) -> str:
    return str(dictionary_VR(int(tag, 16)))


def _read_count(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RequestError(f"{name} is '{text[:40]}'; it must be a whole number from 0.")
    return int(text)


def _to_text(value: Any) -> str:
    return str(value.get("Alphabetic", "")) if isinstance(value, dict) else str(value)
