"""House rules that no linter states: functions are short, or say beside them why they are not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "lib" / "progidiff"

MOST_LINES = 80
"""Of a function, from its first decorator's end to its last line; docstring included."""

REASON = "# long because "
"""How a reason begins, on the line of ``def`` or the one above it."""


def list_long_functions(text: str) -> Iterator[tuple[int, str, int]]:
    """(line, name, lines) of every function that is too long and does not say why."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            beside = lines[max(0, node.lineno - 2) : node.lineno]
            if length > MOST_LINES and not any(REASON in line for line in beside):
                yield node.lineno, node.name, length


def test_a_function_is_at_most_80_lines_or_says_why_not():
    found = [
        f"{path.relative_to(LIBRARY)}:{line} {name} has {length} lines"
        for path in sorted(LIBRARY.rglob("*.py"))
        for line, name, length in list_long_functions(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_a_long_function_is_found_unless_it_gives_its_reason():
    body = "    x = 1\n" * MOST_LINES
    assert list(list_long_functions(f"def plain():\n{body}")) == [(1, "plain", MOST_LINES + 1)]
    assert list(list_long_functions(f"{REASON}it is a table\ndef excused():\n{body}")) == []
    assert list(list_long_functions(f"def short():\n{body[:-10]}")) == []
