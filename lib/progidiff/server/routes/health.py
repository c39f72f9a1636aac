"""Whether the server's state is as it was left."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

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


class HealthAnswer(BaseModel):
    """Whether anything was found damaged since the server started."""

    model_config = ConfigDict(frozen=True)

    healthy: bool
    damaged: list[DamageAnswer]


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
        return HealthAnswer(healthy=not damaged, damaged=damaged)

    return endpoints
