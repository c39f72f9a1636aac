"""Settings of a training as dataclasses, YAML files and ``key=value`` on the command line.

A setting is a field of a dataclass; its type is what it accepts, `Range` its bounds. Files and command line may leave
settings out and never add any: a name that does not exist is refused with the nearest that does. Nothing of a
training's *place* (folders, cases, threads) is a setting, so that a file means the same on every machine.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from progidiff.errors import RequestError

C = TypeVar("C")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float


def load_config(
    kind: type[C], file: Path | None = None, changes: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> C:
    """Put a configuration together; what comes later wins: defaults, file, changes, flags.

    Args:
        kind: The dataclass; it must have a default for everything.
        file: YAML; may hold some of the settings only.
        changes: ``a.b=value``, the value read as YAML.
        flags: dotted name -> value; None stands for a flag that was not given.

    Raises:
        RequestError: if the file cannot be read, a setting does not exist, or a value is of another type or out of
            range.
    """
    default = kind()
    known = list(flatten(to_values(default)))
    given = {} if file is None else _read_file(file, known)
    given.update(_read_changes(kind, known, changes, "--set"))
    given.update({name: value for name, value in (flags or {}).items() if value is not None})
    config = _build(default, given)
    check_config(config)
    return config


def apply_changes(config: C, changes: Sequence[str], source: str) -> C:
    """A copy of some settings with changes as ``--set`` writes them.

    Args:
        config: A dataclass of settings.
        changes: ``a.b=value``.
        source: Where they stand, for messages.

    Raises:
        RequestError: as `load_config`.
    """
    changed = _build(config, _read_changes(type(config), list(flatten(to_values(config))), changes, source))
    check_config(changed)
    return changed


def check_config(config: Any, prefix: str = "") -> None:
    """Check the bounds of all settings, and what a dataclass checks itself (its method `check`).

    Raises:
        RequestError: naming the setting, its value and its bounds.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if is_dataclass(value):
            check_config(value, f"{prefix}{name}.")
        for bounds in _find_ranges(hint):
            if value is not None and not bounds.low <= value <= bounds.high:
                raise RequestError(f"Setting {prefix}{name} must lie in {bounds.low:g}..{bounds.high:g}, got {value}.")
    if hasattr(config, "check"):
        config.check()


def to_values(config: Any) -> dict[str, Any]:
    """Plain values as YAML and JSON write them: nested dictionaries, lists instead of tuples."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> dotted names.

    Example:
        >>> flatten({"seed": 0, "grid": {"height": 128}})
        {'seed': 0, 'grid.height': 128}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def read_template(recipe: str) -> str:
    """The commented file of a recipe ("pretrain", "train" or "adapt") with all settings at their defaults."""
    return (resources.files("progidiff.training") / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8")


def render_config(config: Any, recipe: str) -> str:
    """The commented file of a recipe with the values of `config` in it: what ``--show-config`` prints and ``--config``
    reads.
    """
    values = flatten(to_values(config))
    path: list[tuple[int, str]] = []
    lines = []
    for line in read_template(recipe).splitlines():
        found = re.fullmatch(r"(?P<indent> *)(?P<name>\w+):(?P<value> *[^#]*?)(?P<comment>\s+#.*)?", line)
        if found is None:
            lines.append(line)
            continue
        indent = len(found["indent"])
        path = [*((i, n) for i, n in path if i < indent), (indent, found["name"])]
        name = ".".join(n for _, n in path)
        if name in values:
            comment = found["comment"] or ""
            start = f"{found['indent']}{found['name']}: {_to_yaml(values[name])}"
            # Comments stay in their column where the new value leaves room.
            gap = max(2, line.index("#", len(line) - len(comment)) - len(start)) if comment else 0
            lines.append(start + " " * gap + comment.strip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _read_file(file: Path, known: Sequence[str]) -> dict[str, Any]:
    """The settings of a YAML file by dotted name."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise RequestError(f"The configuration '{file}' cannot be read ({err}); check its path.") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise RequestError(
            f"The configuration '{file}' is no YAML ({' '.join(str(err).split())}); --show-config prints one that is."
        ) from err
    if not isinstance(values, Mapping | None):
        raise RequestError(
            f"The configuration '{file}' must hold names with values, got "
            f"{_describe(values)}; --show-config prints an example."
        )
    flat = flatten(values or {})
    for name in flat:
        _check_name(name, known, f"'{file}'")
    return flat


def _read_changes(kind: type, known: Sequence[str], changes: Sequence[str], source: str) -> dict[str, Any]:
    """``a.b=value`` by dotted name."""
    given: dict[str, Any] = {}
    for change in changes:
        name, separator, text = (part.strip() for part in change.partition("="))
        if not separator:
            flag = "--set " if source == "--set" else ""
            place = "" if flag else f" ({source})"
            raise RequestError(
                f"'{flag}{change}' is no setting{place}; write {flag}name=value, for example {flag}{known[0]}=1."
            )
        _check_name(name, known, source)
        given[name] = text if _find_type(kind, name) is str else _parse(text, name)
    return given


def _check_name(name: str, known: Sequence[str], source: str) -> None:
    """Refuse a setting that does not exist, or a group in the place of a setting."""
    if name in known:
        return
    inside = [k for k in known if k.startswith(f"{name}.")]
    if inside:
        raise RequestError(
            f"{name} in {source} is a group of settings and has no value itself; set one of {', '.join(inside)}."
        )
    raise RequestError(
        f"There is no setting '{name}' (in {source}); did you mean "
        f"'{_find_nearest(name, known)}'? --show-config prints all settings."
    )


def _find_nearest(name: str, known: Sequence[str]) -> str:
    """The known setting that was most likely meant: by its whole name, or by its last part if the group is missing."""

    def score(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, 0.95 * last)

    return max(known, key=score)


def _find_type(kind: Any, name: str) -> Any:
    """The type of a setting by its dotted name."""
    hint: Any = kind
    for part in name.split("."):
        hint = _unwrap(get_type_hints(hint)[part])
    return hint


def _find_ranges(hint: Any) -> list[Range]:
    """The bounds of a type, or of its alternatives."""
    if get_origin(hint) is Annotated:
        return [a for a in get_args(hint)[1:] if isinstance(a, Range)]
    return (
        [r for alternative in get_args(hint) for r in _find_ranges(alternative)]
        if get_origin(hint) in (Union, types.UnionType)
        else []
    )


def _unwrap(hint: Any) -> Any:
    """The type without its bounds."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _build(default: C, given: Mapping[str, Any], prefix: str = "") -> C:
    """A copy of `default` with the given settings."""
    changed: dict[str, Any] = {}
    for name, hint in get_type_hints(type(default)).items():
        value = getattr(default, name)
        if is_dataclass(value):
            changed[name] = _build(value, given, f"{prefix}{name}.")
        elif prefix + name in given:
            changed[name] = _convert(given[prefix + name], hint, prefix + name)
    return replace(default, **changed)  # type: ignore[type-var]


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise RequestError(
            f"The value of --set {name}={text} cannot be read "
            f"({' '.join(str(err).split())}); write it as in the YAML file."
        ) from err


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type of a setting; nothing is guessed but 1 for 1.0.

    Raises:
        RequestError: naming what is expected.
    """
    hint = _unwrap(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), name)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise RequestError(f"Setting {name} must be one of {', '.join(arguments)}, got {_describe(value)}.")
    if origin is tuple:
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) and isinstance(value, list | tuple) else arguments
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            wanted = "a list" if arguments[1:] == (...,) else f"a list of {len(arguments)}"
            raise RequestError(f"Setting {name} must be {wanted}, for example [a, b], got {_describe(value)}.")
        return tuple(_convert(v, i, f"{name}[{n}]") for n, (v, i) in enumerate(zip(value, inner, strict=True)))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as text; whoever writes it means a number.
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
            if math.isfinite(number):
                return number
    if hint is str and isinstance(value, str):
        return value
    wanted = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text (in quotes if it looks like a number)",
    }[hint]
    raise RequestError(f"Setting {name} must be {wanted}, got {_describe(value)}.")


def _describe(value: Any) -> str:
    return f"{_to_yaml(_plain(value))} ({type(value).__name__})"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_values(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _to_yaml(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
