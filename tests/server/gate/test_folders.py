"""Who sees where the server keeps its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from progidiff.errors import StoreError
from progidiff.server.gate import answers, guard
from progidiff.server.gate.auth import Authenticator
from progidiff.server.gate.endpoints import READ, Endpoint, EndpointTable
from progidiff.server.gate.folders import Folders, show_paths
from progidiff.server.options import ServerOptions
from progidiff.users import Role, Token

SECRETS = {role: f"token-of-somebody-who-may-{role}" for role in Role}


def ask(tmp_path: Path, role: Role | None, peer: str) -> tuple[str, str]:
    """The detail of an error that names a folder, and the path in an answer."""
    web = FastAPI()

    @web.get("/broken")
    def fail() -> None:
        raise StoreError(f"'{tmp_path}/studies/labels/a.nii.gz' could not be written. Make room in {tmp_path}/studies.")

    @web.get("/info")
    def describe(request: Request) -> dict[str, str]:
        return show_paths(request.scope, {"name": "a", "path": f"{tmp_path}/studies/a.nii.gz"}, "path")

    table = EndpointTable((Endpoint("GET", "/broken", READ), Endpoint("GET", "/info", READ)))
    answers.install_handlers(web, Folders.of([tmp_path / "studies", None, "http://pacs.example/dicom-web"]))
    tokens = tuple(Token.of(str(each), each, secret) for each, secret in SECRETS.items())
    guard.install(web, table, Authenticator(tokens, None, READ, tmp_path / "state"), ServerOptions(tmp_path / "store"))
    client = TestClient(web, base_url="http://127.0.0.1", client=(peer, 5000), raise_server_exceptions=False)
    headers = {"Authorization": f"Bearer {SECRETS[role]}"} if role is not None else {}
    return client.get("/broken", headers=headers).json()["detail"], client.get("/info", headers=headers).json()["path"]


@pytest.mark.parametrize("role", [None, Role.READ, Role.ANNOTATE])
def test_others_see_names_only(tmp_path: Path, role: Role | None):
    detail, path = ask(tmp_path, role, "192.168.7.9")
    assert detail == "'labels/a.nii.gz' could not be written. Make room in studies."
    assert path == "a.nii.gz"


@pytest.mark.parametrize(("role", "peer"), [(Role.ADMINISTER, "192.168.7.9"), (Role.ANNOTATE, "127.0.0.1")])
def test_administrators_and_this_machine_see_where_things_lie(tmp_path: Path, role: Role, peer: str):
    detail, path = ask(tmp_path, role, peer)
    assert f"{tmp_path}/studies/labels/a.nii.gz" in detail
    assert path == f"{tmp_path}/studies/a.nii.gz"
