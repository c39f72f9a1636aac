"""Structures as coded concepts in DICOM segmentations: how segments are written, and what the codes of others mean."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as CodedConcept

from progidiff.prompts.structures import CATEGORY, UNKNOWN, Code, find_coded, list_codes, pick_color
from progidiff.prompts.terms import find_terms, get_terms

_MAX_DESCRIPTION = 1024
"""Characters of Segment Description (0062,0006)."""

_OLDER_SCHEMES = ("SRT", "SNM3", "99SDM")
"""What SNOMED was called in DICOM before 2018; archives are full of it."""


def describe_segment(name: str, label_id: int, description: str = "") -> dict[str, Any]:
    """What is said of a segment, as the JSON of dcmqi and of 3D Slicer words it.

    Args:
        name: Of the structure; kept as Segment Label, whether codes are known for it (`prompts.terms`) or not.
        label_id: In the label map.
        description: Who saved it, and from which proposal.

    Example:
        >>> segment = describe_segment("left adrenal gland", 13)
        >>> segment["SegmentedPropertyTypeModifierCodeSequence"]["CodeMeaning"]
        'Left'
    """
    terms = get_terms(name)
    color = pick_color(name, label_id).removeprefix("#")
    segment = {
        "labelID": label_id,
        "SegmentLabel": name,
        "SegmentDescription": f"{name}. {description}".strip()[:_MAX_DESCRIPTION],
        "SegmentAlgorithmType": "SEMIAUTOMATIC",
        "SegmentAlgorithmName": "ProGiDiff Label",
        "SegmentedPropertyCategoryCodeSequence": _write(terms.category),
        "SegmentedPropertyTypeCodeSequence": _write(terms.type),
        "recommendedDisplayRGBValue": [int(color[i : i + 2], 16) for i in (0, 2, 4)],
    }
    if terms.modifier is not None:
        segment["SegmentedPropertyTypeModifierCodeSequence"] = _write(terms.modifier)
    return segment


def warn_uncoded(names: Iterable[str]) -> list[str]:
    """A sentence if a DICOM segmentation cannot say by code what these structures are; empty if it can.

    Example:
        >>> warn_uncoded(["liver"])
        []
    """
    unknown = [name for name in names if find_terms(name) is None]
    if not unknown:
        return []
    listed = ", ".join(f"'{name}'" for name in unknown[:8])
    return [
        f"No code is known for {listed}: the DICOM segmentation says '{UNKNOWN.meaning}' and keeps the name as its "
        "Segment Label."
    ]


def read_coded(segment: Dataset) -> tuple[str, ...]:
    """The structures that the codes of a segment can mean; empty if they mean none, or are of another scheme.

    Codes of SNOMED RT, as older programs write them (T-62000), are read as those of SNOMED CT that mean the same.

    Args:
        segment: An item of the Segment Sequence.
    """
    found = _first(segment, "SegmentedPropertyTypeCodeSequence")
    value = "" if found is None else _read_value(found)
    if found is None or not value:
        return ()
    modifier = _first(found, "SegmentedPropertyTypeModifierCodeSequence")
    return find_coded(value, "" if modifier is None else _read_value(modifier))


def read_type(segment: Dataset) -> Code | None:
    """The SNOMED CT code of what a segment shows; None if it has none.

    Args:
        segment: An item of the Segment Sequence.
    """
    found = _first(segment, "SegmentedPropertyTypeCodeSequence")
    value = "" if found is None else _read_value(found)
    if found is None or not value:
        return None
    return Code(value, " ".join(str(found.get("CodeMeaning", "")).split()))


def _read_value(item: Dataset) -> str:
    """The SNOMED CT value of a coded item; "" if it has none."""
    value, scheme = str(item.get("CodeValue", "")), item.get("CodingSchemeDesignator")
    return value if scheme == CATEGORY.scheme else _translate(value) if scheme in _OLDER_SCHEMES else ""


@lru_cache(maxsize=1024)
def _translate(value: str) -> str:
    """The code of this program's table that means the same as one of SNOMED RT; "" if none does."""
    older = CodedConcept(value, "SRT", "")
    return next((known for known in list_codes() if older == CodedConcept(known, CATEGORY.scheme, "")), "")


def _write(code: Code) -> dict[str, str]:
    return {"CodeValue": code.value, "CodingSchemeDesignator": code.scheme, "CodeMeaning": code.meaning}


def _first(holder: Dataset, keyword: str) -> Dataset | None:
    items = holder.get(keyword) or []
    return items[0] if len(items) else None
