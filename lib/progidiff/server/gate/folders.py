"""Folders of the server: administrators see where things lie, others see names.

Who connects from this machine sees them too: 3D Slicer opens an image there by its path, because it would download it
without its token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import Scope

from progidiff.errors import AccessError
from progidiff.server.gate.auth import find_user
from progidiff.server.gate.peers import is_local
from progidiff.users import Role


@dataclass(frozen=True)
class Folders:
    """Where the server keeps its files.

    Attributes:
        roots: Absolute, the longest first.
    """

    roots: tuple[str, ...]

    @classmethod
    def of(cls, paths: Iterable[Path | str | None]) -> Folders:
        """Of these and of where their links lead; what is none of this machine's is left out."""
        given = [Path(path).expanduser() for path in paths if path is not None and "://" not in str(path)]
        roots = {str(root) for path in given for root in (path.absolute(), path.resolve())}
        return cls(tuple(sorted(roots - {"/"}, key=len, reverse=True)))

    def hide(self, text: str) -> str:
        """The text with what lies in a folder named from there, and the folder by its name.

        Example:
            >>> Folders(("/data/studies",)).hide("'/data/studies/a.nii.gz' is no image; look into '/data/studies'.")
            "'a.nii.gz' is no image; look into 'studies'."
        """
        for root in self.roots:
            text = text.replace(f"{root}/", "").replace(root, Path(root).name)
        return text


NO_FOLDERS = Folders(())


def set_folders(web: FastAPI, folders: Folders) -> None:
    """Tell an application which folders its answers are not to name."""
    web.state.progidiff_folders = folders


def sees_folders(scope: Scope) -> bool:
    """Whether a request comes from an administrator, or from this machine."""
    try:
        administers = find_user(scope).role.covers(Role.ADMINISTER)
    except AccessError:  # Refused before anybody knew who it is.
        return False
    return administers or is_local(scope, Headers(scope=scope))


def show_detail(scope: Scope, text: str) -> str:
    """The text of an error, as this request may see it."""
    folders = getattr(scope["app"].state, "progidiff_folders", NO_FOLDERS)
    return text if sees_folders(scope) else folders.hide(text)


def show_paths(scope: Scope, info: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """What is known of an image, with paths under these names as this request may see them: whole, or the last part."""
    if sees_folders(scope):
        return dict(info)
    return {
        name: Path(value).name if name in names and isinstance(value, str) else value for name, value in info.items()
    }
