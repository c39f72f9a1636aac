"""What a person draws to say what is right: clicks, scribbles, boxes, lassos and painted slices.

Edits are part of a request (`ProposalRequest.edits`) and so of its key: proposals are drawn *given* the edits. They are
given in voxels of the image, in file order; `progidiff.proposals.placed_edits` brings them to windows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from progidiff.errors import RequestError
from progidiff.storage.json_text import read_json

MAX_POINTS = 4000
"""Points of all edits of a request together; a hand draws a few hundred an hour."""

MAX_EDITS = 500

Kind = Literal["click", "scribble", "box", "lasso", "paint"]


class Edit(BaseModel):
    """One thing that was drawn, on one slice.

    Attributes:
        kind: A click (one point), a scribble (the points of a line), a box (two opposite corners), a lasso (the points
            of a closed line), or a painted slice (`mask`).
        positive: Inside the structure (else outside). A painted slice is always positive.
        points: Voxel indices [i, j, k] of the image, in file order; all on one slice. A scribble of a wide brush has
            `mask` and `slice` instead: all that the brush touched.
        structure: Which of the structures asked for is meant; "" for the only one.
        mask: Of a painted slice or a scribble: base64 of the packed bits (most significant first) of (Y, X), rows from
            the patient's front to back, columns from right to left as on the screen, that is of one slice of the axial
            stack.
        slice: Of a painted slice or a scribble: the axial index, 0 at the feet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    positive: bool = True
    points: tuple[tuple[int, int, int], ...] = ()
    structure: str = ""
    mask: str = ""
    slice: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Edit:
        if self.kind == "scribble" and not self.points:
            if not self.mask or self.slice is None:
                raise ValueError("a scribble has points, or mask and slice")
            return self
        needed = {"click": 1, "scribble": 1, "box": 2, "lasso": 3, "paint": 0}[self.kind]
        if len(self.points) < needed or (self.kind in ("click", "box") and len(self.points) > needed):
            raise ValueError(f"a {self.kind} has {needed} or more points, got {len(self.points)}")
        if self.kind == "paint" and (not self.mask or self.slice is None or not self.positive):
            raise ValueError("a painted slice has mask and slice, and is positive")
        if self.kind != "paint" and (self.mask or self.slice is not None):
            raise ValueError(f"a {self.kind} has points, not mask and slice")
        return self


def read_edits(value: object) -> tuple[Edit, ...]:
    """Edits as a client sends them: a list, or its JSON text; None and "" are none.

    Raises:
        RequestError: if it is something else, or more than a person draws; the message says which one is wrong.

    Example:
        >>> read_edits('[{"kind": "click", "points": [[1, 2, 3]]}]')[0].points
        ((1, 2, 3),)
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = read_json(value, "Option edits")
    if not isinstance(value, list):
        raise RequestError("Option edits must be a list of objects, each with kind and points.")
    if len(value) > MAX_EDITS:
        raise RequestError(
            f"{len(value)} edits were sent, at most {MAX_EDITS} are read. Paint the slice instead of clicking it, or "
            "accept what is right and start again from there."
        )
    edits = []
    for number, one in enumerate(value, start=1):
        try:
            edits.append(Edit.model_validate(one))
        except ValidationError as err:
            first = err.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"Edit {number} cannot be read ({place or 'as a whole'}: {first['msg']}).") from err
    check_amount(edits)
    return tuple(edits)


def check_amount(edits: Sequence[Edit]) -> None:
    """Refuse more than a person draws.

    Raises:
        RequestError: if there are too many edits, or too many points.
    """
    if len(edits) > MAX_EDITS:
        raise RequestError(
            f"{len(edits)} edits were sent, at most {MAX_EDITS} are read. Paint the slice instead of clicking it, or "
            "accept what is right and start again from there."
        )
    count = sum(len(edit.points) for edit in edits)
    if count > MAX_POINTS:
        raise RequestError(
            f"The edits have {count} points, at most {MAX_POINTS} are read. Paint the slice instead, or thin the lines."
        )


_WORDS = {
    "click": ("click", "clicks"),
    "scribble": ("scribble", "scribbles"),
    "box": ("box", "boxes"),
    "lasso": ("lasso", "lassos"),
    "paint": ("painted slice", "painted slices"),
}


def count_edits(edits: Sequence[Edit]) -> str:
    """How many of each kind, in words; "" for none.

    Example:
        >>> count_edits([Edit(kind="click", points=((i, 2, 3),)) for i in (0, 1)])
        '2 clicks inside'
    """
    counts = Counter((edit.kind, edit.positive) for edit in edits)
    parts = []
    for (kind, positive), count in sorted(counts.items(), key=lambda one: (list(_WORDS).index(one[0][0]), -one[0][1])):
        side = "" if kind == "paint" else " inside" if positive else " outside"
        parts.append(f"{count} {_WORDS[kind][count > 1]}{side}")
    return ", ".join(parts)


def describe_edits(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Plain values for a key or a log: what was drawn, without defaults."""
    described: list[dict[str, Any]] = json.loads(json.dumps([edit.model_dump(exclude_defaults=True) for edit in edits]))
    return described
