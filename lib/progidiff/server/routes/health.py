"""Whether the server's state is as it was left, and how it reads what comes in."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import BaseModel, ConfigDict

from progidiff.images.decoding import describe_reading
from progidiff.server.gate.endpoints import ADMINISTER, Endpoints
from progidiff.storage.state_files import list_damage


class DamageAnswer(BaseModel):
    """Something in the state that is not as it was left; see `progidiff.storage.state_files.Damage`."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    file: str
    problem: str
    meaning: str
    kept_as: str
    time: str


class ReadingAnswer(BaseModel):
    """How files are read; see `progidiff.images.decoding.Reading` and `progidiff.images.sandbox.Confinement`."""

    model_config = ConfigDict(frozen=True)

    apart: bool
    files: bool
    calls: bool
    network: bool
    limits: bool
    meaning: str


class HealthAnswer(BaseModel):
    """Whether anything was found damaged since the server started, and how files are read."""

    model_config = ConfigDict(frozen=True)

    healthy: bool
    damaged: list[DamageAnswer]
    reading: ReadingAnswer


def build_endpoints() -> Endpoints:
    """`/progidiff/health`."""
    endpoints = Endpoints()

    @endpoints.get(
        "/progidiff/health",
        ADMINISTER,
        tags=["ProGiDiff"],
        summary="What was found damaged since the start, and what holds instead",
    )
    def describe_health() -> HealthAnswer:
        damaged = [DamageAnswer.model_validate(damage) for damage in list_damage()]
        return HealthAnswer(healthy=not damaged, damaged=damaged, reading=_describe_reading())

    return endpoints


def _describe_reading() -> ReadingAnswer:
    reading = describe_reading()
    return ReadingAnswer(apart=reading.apart, meaning=reading.describe(), **asdict(reading.confinement))
