"""What made a result: versions of the packages, and the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import progidiff

if TYPE_CHECKING:
    pass


def describe_versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the commit if this is a git checkout."""
    versions = {"progidiff": progidiff.__version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "monai", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            cwd=Path(progidiff.__file__).parent,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=10,
            check=True,
        )
        versions["commit"] = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        versions["commit"] = "unknown"
    return versions
