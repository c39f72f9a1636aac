"""The id of an image as clients send it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from progidiff.server.datastores.images import resolve_id
from progidiff.server.parts import get_context


def _resolve(name: str) -> str:
    return resolve_id(get_context().app, name)


ImageId = Annotated[str, AfterValidator(_resolve)]
"""Type of a route's parameter that names an image: a client may go on to use the name that it uploaded one under."""
