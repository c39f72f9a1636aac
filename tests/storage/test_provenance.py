"""What made a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from progidiff.storage import provenance
from progidiff.storage.provenance import ask_git, describe_versions


def test_the_commit_is_that_of_the_checkout():
    commit = describe_versions()["commit"]
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) == 40


def test_an_installed_package_does_not_take_the_repository_round_its_environment_for_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert ask_git("rev-parse", "HEAD") == ""
    assert describe_versions()["commit"] == "unknown"


def test_a_machine_without_git_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_git("rev-parse", "HEAD") == ""
