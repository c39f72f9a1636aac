"""Reading numbers, flags and choices as clients send them.

Viewers send what their widgets hold: numbers as text, a choice as text or as the whole list of choices, booleans as
text. Everything is read tolerantly where the meaning is clear and refused with a cure where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from progidiff.errors import RequestError


def read_int(value: object, name: str, low: int, high: int) -> int:
    """A whole number in low..high, from a number or its text.

    Raises:
        RequestError: if it is none, or out of range.

    Example:
        >>> read_int("4", "num_proposals", 1, 16)
        4
    """
    number: int | None = None
    if isinstance(value, str):
        try:
            number = int(value.strip())
        except ValueError:
            number = None
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if number is None or not low <= number <= high:
        raise RequestError(f"Option {name} is {show_value(value)}; it must be a whole number from {low} to {high}.")
    return number


def read_float(value: object, name: str, low: float, high: float) -> float:
    """A number in low..high, from a number or its text.

    Raises:
        RequestError: if it is none, or out of range.
    """
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not low <= number <= high:
        raise RequestError(f"Option {name} is {show_value(value)}; it must be a number from {low:g} to {high:g}.")
    return number


def read_bool(value: object, name: str) -> bool:
    """True or false, from a boolean, 0 or 1, or their text.

    Raises:
        RequestError: if it is none of these.
    """
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0", ""):
        return False
    raise RequestError(f"Option {name} is {show_value(value)}; it must be true or false.")


def read_choice(value: object, name: str, choices: Sequence[str]) -> str:
    """One of the choices, whatever its case. A list, as untouched widgets send it, stands for its first entry.

    Raises:
        RequestError: if it is none of them.
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    for choice in choices:
        if text == choice.lower():
            return choice
    raise RequestError(f"Option {name} is {show_value(value)}; it must be one of {', '.join(choices)}.")


def show_value(value: object) -> str:
    """A value as it is quoted in a refusal, 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
