"""Compare what is installed here with the known advisories: python .ci/audit.py

pip-audit asks the index; `advisories.toml` names the advisories that were looked at. Ends with 1 for any other, and for
an entry whose day has passed. Where the index of advisories cannot be reached, or knows none of the packages, nothing
is known: that is said, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

REVIEWED = Path(__file__).with_name("advisories.toml")

_SECONDS = 300
_FOUND, _NOTHING = 1, 0
_UNREACHABLE = ("ConnectionError", "ServiceError", "Timeout", "Failed to resolve", "Max retries", "timed out")


@dataclass(frozen=True)
class Reviewed:
    """An advisory that was looked at.

    Attributes:
        id: One of its names.
        package: What it is about.
        until: When to look again.
        reason: Why it may wait.
    """

    id: str
    package: str
    until: date
    reason: str


@dataclass(frozen=True)
class Advisory:
    """An advisory about an installed package.

    Attributes:
        package, version: What is installed.
        ids: All its names.
        fixed: Versions that mend it.
    """

    package: str
    version: str
    ids: frozenset[str]
    fixed: tuple[str, ...]

    def __str__(self) -> str:
        cure = f"mended in {', '.join(self.fixed)}" if self.fixed else "not mended in any release"
        return f"{self.package} {self.version}: {', '.join(sorted(self.ids))}, {cure}"


def read_reviewed(text: str) -> list[Reviewed]:
    """The entries of `advisories.toml`.

    Raises:
        ValueError: if one lacks a field, or gives no reason.
    """
    entries = [Reviewed(**entry) for entry in _check_fields(tomllib.loads(text).get("advisory", []))]
    for entry in entries:
        if not entry.reason.strip() or not isinstance(entry.until, date):
            raise ValueError(f"{entry.id}: give a reason, and a day (until = 2027-06-01) to look at it again.")
    return entries


def _check_fields(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        if set(entry) != {"id", "package", "until", "reason"}:
            raise ValueError(f"{entry.get('id', 'An entry')}: an entry has id, package, until and reason.")
    return entries


def read_report(text: str) -> tuple[int, list[Advisory]]:
    """How many packages the index knew, and the advisories about them, from the JSON of pip-audit."""
    known, found = 0, []
    for package in json.loads(text)["dependencies"]:
        if "skip_reason" in package:
            continue
        known += 1
        for vulnerability in package["vulns"]:
            ids = frozenset([vulnerability["id"], *vulnerability.get("aliases", [])])
            found.append(Advisory(package["name"], package["version"], ids, tuple(vulnerability["fix_versions"])))
    return known, found


def judge(found: list[Advisory], reviewed: list[Reviewed], today: date) -> tuple[list[str], list[str]]:
    """What stops the build, and what is to be said besides."""
    stops, remarks, met = [], [], set()
    for advisory in found:
        entry = next((one for one in reviewed if one.package == advisory.package and one.id in advisory.ids), None)
        if entry is None:
            stops.append(f"{advisory}. Take a newer version, or look at it and add it to .ci/advisories.toml.")
            continue
        met.add(entry)
        if entry.until < today:
            stops.append(f"{advisory}. It was to be looked at again by {entry.until}; see .ci/advisories.toml.")
        else:
            remarks.append(f"{advisory}. Looked at: {' '.join(entry.reason.split())}")
    gone = [entry for entry in reviewed if entry not in met]
    remarks += [f"{entry.id} is not about what is installed any more: take it out." for entry in gone]
    return stops, remarks


def main() -> int:
    """Ask, compare, say; the exit status."""
    reviewed = read_reviewed(REVIEWED.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--format", "json", "--aliases", "on"]
    try:
        asked = subprocess.run(
            [*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return _say_unknown(f"it did not answer within {_SECONDS} seconds")
    if not asked.stdout.strip():
        reason = asked.stderr.strip().splitlines()[-1:] or ["no reason given"]
        if any(sign in asked.stderr for sign in _UNREACHABLE):
            return _say_unknown(reason[0])
        print(f"pip-audit did not work: {reason[0]}", file=sys.stderr)
        return _FOUND
    known, found = read_report(asked.stdout)
    if not known:
        return _say_unknown("it knows none of the packages, as mirrors of PyPI without its JSON addresses do")
    stops, remarks = judge(found, reviewed, date.today())
    for line in (*remarks, *stops):
        print(line)
    print(f"{known} packages audited, {len(found)} advisories, {len(stops)} of them to be acted on.")
    return _FOUND if stops else _NOTHING


def _say_unknown(reason: str) -> int:
    print(f"The index of advisories cannot be asked ({reason[:200]}): nothing is known about what is installed.")
    return _NOTHING


if __name__ == "__main__":
    sys.exit(main())
