"""What made a result: versions of the packages, and the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata

import progidiff
from progidiff.storage.app_folder import CHECKOUT


def describe_versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the commit if this is a git checkout."""
    versions = {"progidiff": progidiff.__version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "monai", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    versions["commit"] = ask_git("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*") or "unknown"
    return versions


def ask_git(*words: str) -> str:
    """What git says of the checkout that this package is used from; "" where there is none or no git.

    An installed package is no part of the repository that its environment may lie in.
    """
    if not (CHECKOUT / "apps" / "progidiff" / "main.py").is_file():
        return ""
    try:
        command = ["git", *words]
        found = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, encoding="utf-8", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
