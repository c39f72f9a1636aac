"""`make audit`: what stops the build, what does not, and what is said where nothing is known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


REPORT = {
    "dependencies": [
        {"name": "progidiff", "skip_reason": "editable"},
        {"name": "numpy", "version": "2.4.6", "vulns": []},
        {
            "name": "diskcache",
            "version": "5.6.3",
            "vulns": [{"id": "GHSA-w8v5-vhqr-4h9v", "aliases": ["CVE-2025-69872"], "fix_versions": []}],
        },
        {
            "name": "requests",
            "version": "2.0.0",
            "vulns": [{"id": "PYSEC-1-1", "aliases": [], "fix_versions": ["2.1.0"]}],
        },
    ]
}


def test_every_entry_of_the_reviewed_list_has_a_reason_and_a_day(audit: ModuleType):
    entries = audit.read_reviewed(audit.REVIEWED.read_text(encoding="utf-8"))
    assert all(len(entry.reason) > 40 for entry in entries)
    for bad in ("reason = ''", "until = 'soon'", "until = 2027-01-01"):
        with pytest.raises(ValueError, match="give a reason|an entry has"):
            audit.read_reviewed(f"[[advisory]]\nid = 'CVE-1'\npackage = 'a'\n{bad}\n")


def test_only_what_was_looked_at_passes_and_only_until_its_day(audit: ModuleType):
    known, found = audit.read_report(json.dumps(REPORT))
    assert (known, len(found)) == (3, 2)
    reviewed = [
        audit.Reviewed("CVE-2025-69872", "diskcache", date(2027, 6, 1), "Is not used."),
        audit.Reviewed("CVE-2020-1", "pillow", date(2027, 6, 1), "Is not used."),
    ]
    stops, remarks = audit.judge(found, reviewed, date(2027, 1, 1))
    assert [stop.split(":")[0] for stop in stops] == ["requests 2.0.0"]
    assert "mended in 2.1.0" in stops[0]
    assert "Is not used" in remarks[0]
    assert "CVE-2020-1 is not about" in remarks[1]
    stops, _ = audit.judge(found, reviewed, date(2027, 7, 1))
    assert "looked at again by 2027-06-01" in stops[0]


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ((json.dumps(REPORT), ""), 1, "2 advisories, 1 of them"),
        ((json.dumps({"dependencies": REPORT["dependencies"][:2]}), ""), 0, "1 packages audited, 0 advisories"),
        ((json.dumps({"dependencies": REPORT["dependencies"][:1]}), ""), 0, "knows none of the packages"),
        (("", "requests.exceptions.ConnectionError: Failed to resolve 'pypi.org'"), 0, "cannot be asked"),
        (("", "No module named pip_audit"), 1, "did not work"),
    ],
)
def test_a_build_fails_for_an_advisory_and_not_for_a_network(
    audit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: tuple[str, str],
    status: int,
    said: str,
):
    done = subprocess.CompletedProcess([], 1, *answer)
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: done)
    assert audit.main() == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
