"""Text of a request as it may stand in the log."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Text of a request as it may stand in the log, where it must not look like a line of its own.

    Example:
        >>> one_line("a\\nb")
        'a\\\\nb'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
