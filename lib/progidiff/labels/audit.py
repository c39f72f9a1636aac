"""The audit of all labels as a table: who saved what, when, and from which proposal of which model version."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from progidiff.errors import RequestError
from progidiff.labels.history import Annotation, AnnotationStore

AUDIT_COLUMNS = (
    "sequence",
    "time",
    "event",
    "image",
    "tag",
    "user",
    "client",
    "slices",
    "structures",
    "proposals",
    "shown",
    "seed",
    "model",
    "adapter",
    "edited",
    "seconds",
    "in_force",
    "sha256",
    "file",
    "reason",
    "target",
    "clicks",
    "edits",
    "steering",
)
"""Of `list_audit`, in order."""


def describe_origin(label: Annotation) -> str:
    """Where a saved label comes from, in a sentence that is stored with copies of it elsewhere.

    Example:
        >>> from progidiff.labels.history import Source
        >>> source = Source("3f2a9c", "2", "ct-base@2", "mr@1", 7)
        >>> label = Annotation(4, "2026-01-02T03:04:05Z", "scan", "final", "anna", "", None, ("liver",), source, True,
        ...     None, "", "")
        >>> describe_origin(label)
        'Save 4 of 2026-01-02T03:04:05Z by anna: proposal 2 of 3f2a9c, ct-base@2 with mr@1, seed 7; edited.'
    """
    who = f" by {label.user}" if label.user else ""
    if label.source is None:
        return f"Save {label.sequence} of {label.time}{who}: no proposal is named."
    source = label.source
    shown = f"proposal {source.shown}" if source.shown.isdigit() else source.shown
    model = f"{source.model} with {source.adapter}" if source.adapter else source.model
    edited = {True: "; edited", False: "; unchanged", None: ""}[label.edited]
    given = f" given {source.steering}" if source.steering else ""
    return (
        f"Save {label.sequence} of {label.time}{who}: {shown} of {source.proposals}{given}, "
        f"{model}, seed {source.seed}{edited}."
    )


def list_audit(store: AnnotationStore, image: str | None = None) -> list[dict[str, Any]]:
    """The audit: one flat row per event, oldest first.

    Returns:
        Rows of `AUDIT_COLUMNS`. "slices" is "all" or numbers with spaces between, "structures" is separated by "; ",
        "in_force" says whether a saved label counts now. What does not apply or is not known is None.
    """
    counting = store.counting()
    rows = []
    for event in store.events(image):
        row: dict[str, Any] = dict.fromkeys(AUDIT_COLUMNS)
        row |= {
            "sequence": event.sequence,
            "time": event.time,
            "event": event.kind,
            "image": event.image,
            "tag": event.tag,
            "user": event.user,
        }
        row |= {"reason": event.reason or None, "target": event.target}
        label = event.label
        if label is not None:
            row |= {
                "client": label.client,
                "slices": "all" if label.slices is None else " ".join(map(str, label.slices)),
                "structures": "; ".join(label.structures),
                "edited": label.edited,
                "seconds": label.seconds,
                "clicks": sum(clicks for _, _, clicks in label.effort) if label.effort else None,
                "edits": label.edits,
                "in_force": label.sequence in counting,
                "sha256": label.sha256,
                "file": label.file,
            }
            if label.source is not None:
                row |= asdict(label.source)
        rows.append(row)
    return rows


def format_audit(rows: Iterable[Mapping[str, Any]], kind: str) -> str:
    """The audit as text.

    Args:
        rows: Of `list_audit`.
        kind: "csv" or "jsonl". In CSV, text that a spreadsheet would take for a formula gets an apostrophe in front,
            wherever a spreadsheet may begin a cell.

    Raises:
        RequestError: if the kind is neither.
    """
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if kind != "csv":
        raise RequestError(f"The audit cannot be written as '{kind[:20]}'; choose csv or jsonl.")
    text = io.StringIO()
    writer = csv.DictWriter(text, AUDIT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _disarm(value) for name, value in row.items()})
    return text.getvalue()


_FORMULA = re.compile(r"(^|[\r\n\t;,|])([\s\ufeff\u200b]*)(?=[=+\-@＝＋－＠])")
"""Where a cell may begin, for a spreadsheet that splits at semicolons too, and what it drops before it looks."""


def _disarm(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula.

    Example:
        >>> _disarm("=1+1"), _disarm("\\n =1"), _disarm("liver; \uff1d1"), _disarm("left-kidney"), _disarm(-1)
        ("'=1+1", "\\n '=1", "liver; '\uff1d1", 'left-kidney', -1)
    """
    if not isinstance(value, str):
        return value
    disarmed = _FORMULA.sub(r"\1\2'", value)
    return f"'{disarmed}" if disarmed[:1] in ("\t", "\r") else disarmed
