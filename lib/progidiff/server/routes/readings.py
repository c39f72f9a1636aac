"""Double reading over HTTP: who read an image, how far two readings agree, and what a third person decides."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from progidiff.errors import ConflictError, NotFoundError, RequestError
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.labels.history import FINAL
from progidiff.labels.readings import READERS, Reading, compare_readings
from progidiff.labels.segments import load_label_map
from progidiff.params import read_int
from progidiff.server.datastores import images
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, MEDIUM, READ, Content, Endpoints
from progidiff.server.parts import Context, get_context
from progidiff.server.routes import labels
from progidiff.server.routes.image_id import ImageId
from progidiff.server.routes.label_answers import SaveAnswer, list_slices
from progidiff.server.routes.review import open_volume
from progidiff.storage.atomic import scratch_folder
from progidiff.storage.json_text import Text

DECISION = "double reading"
"""The client of what somebody decided between two readings."""


class ReadingAnswer(BaseModel):
    """One person's label of an image.

    Attributes:
        user: Who.
        sequence: The newest save.
        label_ids: Structure -> id in its file.
        annotated: Structure -> axial slices that were read for it, ascending; null for the whole volume.
    """

    model_config = ConfigDict(frozen=True)

    user: Text
    sequence: int
    label_ids: dict[Text, int]
    annotated: dict[Text, list[int] | None]


class SliceAgreementAnswer(BaseModel):
    """Dice on an axial slice."""

    model_config = ConfigDict(frozen=True)

    index: int
    dice: float


class AgreementAnswer(BaseModel):
    """How far two readings agree on a structure, on the slices that both people read.

    Attributes:
        structure: Its name.
        dice: Over all these slices.
        slices: Of each on which somebody draws it, the worst first.
    """

    model_config = ConfigDict(frozen=True)

    structure: Text
    dice: float
    slices: list[SliceAgreementAnswer]


class ReadingsAnswer(BaseModel):
    """The readings of an image.

    Attributes:
        is_on: Whether images are read twice on this server.
        wanted: How many people read an image.
        readings: So far, the first one in front; of others, a reader sees none before the reading is done by two.
        agreement: The structure with the least in front; empty before there are two.
        may_decide: Whether who asks may decide: there are two readings, and neither is by this person.
        decided: The save that counts; null if nobody decided yet.
    """

    model_config = ConfigDict(frozen=True)

    is_on: bool
    wanted: int
    readings: list[ReadingAnswer]
    agreement: list[AgreementAnswer]
    may_decide: bool
    decided: int | None


class Decision(BaseModel):
    """Whose reading counts.

    Attributes:
        structures: Structure -> user.
        slices: Axial slice -> structure -> user, where it is another one there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structures: dict[str, str]
    slices: dict[int, dict[str, str]] = {}


def build_endpoints() -> Endpoints:
    """Readings, their agreement, and the decision."""
    endpoints = Endpoints()

    @endpoints.get(
        "/progidiff/readings/{image}", READ, tags=["Review"], summary="Who read an image, and how far they agree"
    )
    def describe(image: ImageId, user: User = CALLER) -> ReadingsAnswer:
        return _describe(get_context(), image, user)

    @endpoints.get(
        "/progidiff/readings/{image}/{reader}/label/{z}",
        ANNOTATE,
        tags=["Review"],
        summary="A reading on one axial slice, uint8; for who decides",
    )
    def get_label(image: ImageId, reader: str, z: int, user: User = CALLER) -> Response:
        context = get_context()
        volume = open_volume(context, image)
        reading = next((entry for entry in _list_decidable(context, image, user) if entry.user == reader), None)
        if reading is None:
            raise NotFoundError(f"'{reader[:60]}' did not read '{image}'.")
        stack = _load(context, reading, volume)
        index = read_int(z, "slice", 0, len(stack) - 1)
        content = np.ascontiguousarray(stack[index], dtype=np.uint8).tobytes()
        return Response(content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @endpoints.post(
        "/progidiff/readings/{image}/decide",
        ANNOTATE,
        tags=["Review"],
        summary="Decide between two readings: whose counts, by structure and slice",
        takes="JSON: structures (structure -> user), slices (slice -> structure -> user)",
        body=MEDIUM,
        content=Content.JSON,
    )
    def decide(image: ImageId, decision: Decision, user: User = CALLER) -> SaveAnswer:
        return _decide(get_context(), image, decision, user)

    return endpoints


def _load(context: Context, reading: Reading, volume: Volume) -> NDArray[Any]:
    """Label ids of a reading, shape (Z, Y, X)."""
    return volume.arrange(load_label_map(context.annotations.label_file(reading.label), volume.grid).array)


def _describe(context: Context, image: str, user: User) -> ReadingsAnswer:
    images.find_image(context.app, image)
    readings = context.readings.list(image)
    is_whole = len(readings) >= READERS
    shown = readings if is_whole else [reading for reading in readings if reading.user == user.name]
    agreement = []
    if is_whole:
        volume = open_volume(context, image)
        first, second = ((reading, _load(context, reading, volume)) for reading in readings[:READERS])
        agreement = [AgreementAnswer.model_validate(asdict(entry)) for entry in compare_readings(first, second)]
    current = context.annotations.current(image)
    return ReadingsAnswer(
        is_on=context.readings.is_on,
        wanted=READERS,
        readings=[
            ReadingAnswer(
                user=reading.user,
                sequence=reading.label.sequence,
                label_ids=dict(reading.label.label_ids),
                annotated={name: list_slices(slices) for name, slices in reading.annotated.items()},
            )
            for reading in shown
        ],
        agreement=agreement,
        may_decide=is_whole and bool(user.name) and all(reading.user != user.name for reading in readings[:READERS]),
        decided=None if current is None else current.sequence,
    )


def _list_decidable(context: Context, image: str, user: User) -> list[Reading]:
    """The two readings of an image, for a third person.

    Raises:
        ConflictError: if there are not two, or this person's is one of them.
    """
    readings = context.readings.list(image)[:READERS]
    if len(readings) < READERS:
        raise ConflictError(
            f"'{image}' has {len(readings)} of {READERS} readings. It can be decided when {READERS} people have read "
            "it."
        )
    if not user.name or any(reading.user == user.name for reading in readings):
        raise ConflictError(
            f"'{image}' was read by {' and '.join(reading.user for reading in readings)}; somebody else decides, under "
            "a name of their own."
        )
    return readings


def _decide(context: Context, image: str, decision: Decision, user: User) -> SaveAnswer:
    readings = {reading.user: reading for reading in _list_decidable(context, image, user)}
    named = {*decision.structures.values(), *(who for picks in decision.slices.values() for who in picks.values())}
    strange = sorted(named - readings.keys())
    if strange or not decision.structures:
        raise RequestError(
            f"Say for each structure whose reading counts, {' or '.join(readings)}"
            + (f"; '{strange[0][:60]}' read nothing here." if strange else ".")
        )
    volume = open_volume(context, image)
    stacks = {who: _load(context, reading, volume) for who, reading in readings.items()}
    result = np.zeros_like(next(iter(stacks.values())), dtype=np.uint8)
    table = {name: number for number, name in enumerate(decision.structures, 1)}
    for name, number in table.items():
        unread = next((who for who in readings if name not in readings[who].annotated), None)
        if unread is not None:
            raise RequestError(f"{unread} did not read '{name[:60]}'. Decide about what both read.")
        for z in range(len(result)):
            who = decision.slices.get(z, {}).get(name, decision.structures[name])
            own = dict(readings[who].label.label_ids).get(name, -1)
            result[z][stacks[who][z] == own] = number
    extents = [_list_read(readings, name) for name in table]
    slices = None if any(extent is None for extent in extents) else sorted({z for e in extents for z in e or ()})
    params = {
        "slices": slices,
        "structures": list(table),
        "label_info": [{"name": name, "idx": number} for name, number in table.items()],
        "edited": None,
        "client_id": DECISION,
    }
    with scratch_folder("readings") as folder:
        array = volume.grid.from_stack(result)
        file = save_mask(np.ascontiguousarray(array), volume.grid, folder / "label.nii.gz")
        answer = labels.save_as(context, image, file, FINAL, params, user.name)
    context.annotations.decide(image, user.name, _tell(decision))
    return answer


def _list_read(readings: dict[str, Reading], name: str) -> frozenset[int] | None:
    """Axial slices on which both read a structure; None for all."""
    first, second = (reading.annotated[name] for reading in readings.values())
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _tell(decision: Decision) -> str:
    by_structure = ", ".join(f"{name}: {who}" for name, who in decision.structures.items())
    other = sum(len(picks) for picks in decision.slices.values())
    return f"{by_structure}{f'; otherwise on {other} slices' if other else ''}"
