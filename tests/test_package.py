"""What the package's metadata promises fits what is tested: ranges, pins and lock speak of the same versions."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_pins(*names: str) -> dict[str, str]:
    """Requirement files without comments: canonical name -> what follows it."""
    pins = {}
    for name in names:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            text = line.partition("#")[0].partition(" \\")[0].strip()
            if text and not text.startswith("-"):
                requirement = Requirement(text)
                pins[canonicalize_name(requirement.name)] = str(requirement.specifier)
    return pins


def read_ranges(entries: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(entry.name): entry for entry in map(Requirement, entries)}


def check(ranges: dict[str, Requirement], pins: dict[str, str]) -> list[str]:
    """What is pinned to a version that its range leaves out."""
    exact = {name: pin.removeprefix("==") for name, pin in pins.items() if pin.startswith("==")}
    return [str(ranges[name]) for name, version in exact.items() if not ranges[name].specifier.contains(version)]


def test_every_pinned_package_has_its_range_and_every_range_its_pin():
    pins = read_pins("requirements.txt", "requirements-host.txt")
    del pins["monailabel"]  # the wheel carries it
    extras = {name: entries for name, entries in PROJECT["optional-dependencies"].items() if name != "dev"}
    ranges = read_ranges(PROJECT["dependencies"])
    optional = read_ranges([entry for entries in extras.values() for entry in entries])
    missing = pins.keys() - ranges.keys() - optional.keys()
    assert not missing, f"Give each a range in pyproject.toml, [project] dependencies: {sorted(missing)}"
    assert not ranges.keys() - pins.keys(), "each of these needs a pin, with its reason, in requirements.txt"
    assert check({**optional, **ranges}, pins) == []


def test_every_place_that_names_a_python_names_those_of_the_package():
    specifier = Requirement(f"x{PROJECT['requires-python']}").specifier
    wanted = [f"3.{minor}" for minor in range(8, 20) if specifier.contains(f"3.{minor}")]
    assert [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if ":: Python ::" in entry] == wanted
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.findall(r'"(3\.\d+)"', re.findall(r"python: (\[.*\])", workflow)[0]) == wanted
    first, last = (entry.replace(".", ", ") for entry in (wanted[0], wanted[-1]))
    for name in ("Makefile", "packaging/image/install.sh"):
        assert f"({first}) <= v <= ({last})" in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_tools_of_developers_are_pinned_within_their_ranges():
    ranges = read_ranges(PROJECT["optional-dependencies"]["dev"])
    pins = read_pins("requirements-dev.txt", "requirements-docs.txt")
    assert not pins.keys() - ranges.keys(), "each of these needs a range in pyproject.toml, extra dev"
    assert check(ranges, pins) == []


def test_the_lock_holds_the_tested_versions_and_their_hashes():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", lock, flags=re.MULTILINE):
        locked.setdefault(canonicalize_name(name), set()).add(version)
    stale = {
        name: (pin, locked.get(name))
        for name, pin in read_pins("requirements.txt", "requirements-host.txt").items()
        if pin.startswith("==") and name != "monailabel" and locked.get(name) != {pin.removeprefix("==")}
    }
    assert not stale, f"`make lock` brings requirements.lock up to date: {stale}"
    entries = re.split(r"^(?=[A-Za-z0-9])", lock.partition("\n\n")[2] or lock, flags=re.MULTILINE)
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
    assert not {name for name in locked if name == "torch" or name.startswith(("nvidia-", "cuda-"))}, (
        "torch comes apart"
    )


def test_the_wheel_carries_the_host_that_is_tested():
    pin = read_pins("requirements-host.txt")["monailabel"]
    text = (ROOT / "setup.py").read_text(encoding="utf-8") + (ROOT / "lib/progidiff/server/start.py").read_text("utf-8")
    assert set(re.findall(r"monailabel(==[\d.]+\d)", text)) == {pin}


def test_the_notes_of_a_release_are_its_section_of_the_changelog():
    def run(version: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "packaging" / "release_notes.py"), version]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    notes = run("0.1.0").stdout.strip()
    assert notes
    assert notes in text
    assert "## " not in notes.replace("### ", "")
    assert "CHANGELOG.md says nothing of version 99.0" in run("99.0").stderr
