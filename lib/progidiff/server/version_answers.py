"""What is told of the trained versions, the same for adapters and for models of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from progidiff.storage.json_text import Text


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class VersionEvent(_Answer):
    """What happened to a name, see `VersionStore.history`.

    Attributes:
        time: ISO, UTC.
        event: "added", "published" or "rolled back".
        version: That is meant; None for the model itself.
        before: What rollback goes back through from there, oldest first.
    """

    time: Text = ""
    event: Text = ""
    version: int | None
    before: list[int | None] = []


class VersionAnswer(_Answer):
    """A version. Of one that is damaged only `version` and `problem` are told.

    Attributes:
        version: Its number.
        problem: Why it cannot be used; "" if it can.
        kind: "lora", "full" or "head".
        modality: "CT", "MR" or "picture".
        structures: That it was trained on.
        created: ISO time, UTC.
        base: The model it belongs to.
        fits: Whether that is the one that is loaded.
        accepted: Whether it was better than the one before; None if nobody compared them.
        verdict: A sentence about that.
        parent: The version before; None if there was none.
        training_cases, held_out_cases: Names of images.
        dice: "base", "current", "adapted" -> figure, such as "consensus" -> Dice on the images that were held back.
    """

    version: int
    problem: Text
    kind: str = ""
    modality: Text = ""
    structures: list[Text] = []
    created: Text = ""
    base: Text = ""
    fits: bool = False
    accepted: bool | None = None
    verdict: Text = ""
    parent: Text | None = None
    training_cases: list[Text] = []
    held_out_cases: list[Text] = []
    dice: dict[Text, dict[Text, float | None]] = {}


class NamedVersions(_Answer):
    """An adapter or a model of pictures with its versions.

    Attributes:
        name: Of it.
        trainer: "textdiff" for models of pictures; adapters have none.
        current: The version that is served; None for the model itself.
        published: When it became that, seconds since 1970.
        problem: Why it cannot be used; "" if it can.
        history: Oldest first.
        versions: Newest first.
    """

    name: str
    trainer: str = ""
    current: int | None
    published: float
    problem: Text
    history: list[VersionEvent]
    versions: list[VersionAnswer]


class ServedVersion(_Answer):
    """Which version is served now.

    Attributes:
        name: Whose.
        served: ``name@version``; "" for the model itself.
    """

    name: str
    served: str


def describe_version(version: int, values: Mapping[str, Any], run: Mapping[str, Any], dice: object) -> VersionAnswer:
    """A version that can be read.

    Args:
        version: Its number.
        values: What its card says: kind, modality, structures, created, base, fits.
        run: Its run.json.
        dice: See `VersionAnswer`.
    """
    told = {
        **values,
        "version": version,
        "accepted": run.get("accepted"),
        "verdict": run.get("verdict", ""),
        "parent": run.get("parent"),
        "training_cases": run.get("training_cases", []),
        "held_out_cases": run.get("held_out_cases", []),
        "dice": dice,
        "problem": "",
    }
    try:
        return VersionAnswer.model_validate(told)
    except ValidationError as err:
        fault = err.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        return VersionAnswer(
            version=version,
            problem=f"run.json of version {version} has another form than this program writes ({where}: "
            f"{fault['msg']}). Restore it from a backup, or serve another version.",
        )


def list_events(history: Iterable[Mapping[str, Any]]) -> list[VersionEvent]:
    """The events of a history; like lines that cannot be read, those of another form are left out."""
    events = []
    for event in history:
        with contextlib.suppress(ValidationError):
            events.append(VersionEvent.model_validate(event))
    return events
