"""The types of the server's answers, for the pages: OpenAPI of our routes -> `apps/progidiff/web/api.d.ts`.

`make api-types` writes the file (it needs Node.js and npm); the pages themselves need nothing of this.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from progidiff.server.routes.table import build_endpoints
from support.servers import ROOT

TOOLS = ROOT / "tests" / "pages"
"""Folder of package.json with the pinned tools."""

TYPES = ROOT / "apps" / "progidiff" / "web" / "api.d.ts"

_PROSE = ("description", "summary", "title")
_DIGEST = re.compile(r"OpenAPI sha256 ([0-9a-f]{64})")
_HEAD = """// Made by `make api-types` from the routes of progidiff/server/routes; do not edit.
// OpenAPI sha256 {digest}

"""


def describe_routes() -> dict[str, Any]:
    """OpenAPI of our routes, without the prose: only another shape makes another description."""
    web = FastAPI(title="ProGiDiff Label", version="1")
    for module in build_endpoints():
        web.include_router(module.router)
    described: dict[str, Any] = _drop_prose(web.openapi())
    return described


def compute_digest(described: dict[str, Any]) -> str:
    """What the types are made from, in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def read_digest(types: str) -> str:
    """The digest that a file of types names; "" if none."""
    found = _DIGEST.search(types)
    return found.group(1) if found else ""


def find_lack() -> str:
    """Why no types can be made or checked here; "" if they can."""
    if shutil.which("node") is None:
        return "There is no Node.js: apt-get install nodejs npm."
    if not (TOOLS / "node_modules" / "openapi-typescript").is_dir():
        return "The tools are not installed: make check does it (npm ci in tests/pages)."
    return ""


def make_types(described: dict[str, Any]) -> str:
    """The text of api.d.ts.

    Raises:
        RuntimeError: if the tools are not there.
        subprocess.CalledProcessError: if they fail.
    """
    lack = find_lack()
    if lack:
        raise RuntimeError(lack)
    with tempfile.TemporaryDirectory(prefix="progidiff-openapi-") as folder:
        source, target = Path(folder) / "openapi.json", Path(folder) / "api.d.ts"
        source.write_text(json.dumps(described))
        tool = TOOLS / "node_modules" / "openapi-typescript" / "bin" / "cli.js"
        subprocess.run(
            ["node", tool, source, "--output", target, "--default-non-nullable", "false"],
            check=True,
            capture_output=True,
            timeout=120,
        )
        return _HEAD.format(digest=compute_digest(described)) + target.read_text()


def _drop_prose(value: Any) -> Any:
    """A property may be called "title" too; its value is an object then."""
    if isinstance(value, dict):
        return {
            key: _drop_prose(entry) for key, entry in value.items() if key not in _PROSE or not isinstance(entry, str)
        }
    return [_drop_prose(entry) for entry in value] if isinstance(value, list) else value


if __name__ == "__main__":
    TYPES.write_text(make_types(describe_routes()))
    sys.stdout.write(f"Written: {TYPES.relative_to(ROOT)}\n")
