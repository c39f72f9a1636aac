"""The checker of shapes in annotations, for jaxtyping's import hook (see `conftest.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_SHAPED = re.compile(r"\b(Float|Float32|Bool|UInt8|Shaped)\[")


def check(function: Callable[..., Any]) -> Any:
    """Check arrays and tensors only: what else is annotated, mypy checks, and tests send nonsense on purpose."""
    kept = {name: hint for name, hint in function.__annotations__.items() if _SHAPED.search(str(hint))}
    function.__annotations__ = kept
    return beartype(function)
