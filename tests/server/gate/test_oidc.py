"""Logins by OpenID Connect against a provider on this machine: who gets in as what, and everything that is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from fastapi import FastAPI
from joserfc.jwk import OctKey
from starlette.testclient import TestClient

from progidiff.errors import RequestError
from progidiff.server.gate import answers, guard
from progidiff.server.gate.auth import Authenticator
from progidiff.server.gate.endpoints import CALLER, READ, Endpoints, build_table
from progidiff.server.gate.oidc import Provider, ProviderSettings, read_settings
from progidiff.server.options import ServerOptions
from progidiff.server.routes import logins
from progidiff.users import Role, UsersFile
from support.identity_provider import SECRET, IdentityProvider, make_key, run_provider

PASSWORD = "correct horse"
ROLES = {"readers": Role.READ, "annotators": Role.ANNOTATE, "CN=Radiology, OU=Staff": Role.ADMINISTER}


@pytest.fixture
def op() -> Iterator[IdentityProvider]:
    with run_provider() as provider:
        yield provider


Serve = Callable[..., TestClient]


@pytest.fixture
def serve(op: IdentityProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """A client of a server that logs in by the provider; the client comes from another machine."""

    def build(users: UsersFile | None = None, clock: Callable[[], float] = time.time, **settings: Any) -> TestClient:
        told = {"issuer": op.issuer, "client_id": "progidiff", "client_secret": SECRET, "roles": ROLES, **settings}
        provider = Provider(ProviderSettings.model_validate(told), clock)
        auth = Authenticator((), users, None, tmp_path / "state", provider=provider)
        monkeypatch.setattr(logins, "get_context", lambda: SimpleNamespace(auth=auth))
        web, pages = FastAPI(), Endpoints()

        @pages.get("/who", READ, summary="Who asks")
        def tell(user: Any = CALLER) -> dict[str, str]:
            return {"name": user.name, "role": user.role}

        modules = [logins.build_endpoints(), pages]
        for module in modules:
            web.include_router(module.router)
        answers.install_handlers(web)
        guard.install(web, build_table(modules), auth, ServerOptions(tmp_path))
        return TestClient(
            web, base_url="http://labels.example.org:8000", client=("192.168.7.9", 5000), follow_redirects=False
        )

    return build


def begin(client: TestClient, target: str = "/progidiff/?image=a") -> str:
    """Up to the provider and back: the address of the server that the provider leads to."""
    begun = client.get("/progidiff/oidc/login", params={"next": target})
    assert begun.status_code == 303, begun.text
    back = requests.get(begun.headers["location"], allow_redirects=False, timeout=10)
    assert back.status_code == 303, back.text
    return back.headers["location"]


def log_in(client: TestClient) -> Any:
    return client.get(begin(client))


def assert_refused(client: TestClient, answer: Any, status: int, reason: str) -> None:
    assert answer.status_code == status, answer.text
    assert re.search(reason, answer.text), answer.text
    assert "progidiff_session" not in answer.headers.get("set-cookie", "")
    assert client.get("/who").status_code == 401


def test_somebody_whom_the_provider_knows_is_logged_in_and_led_to_the_page(serve: Serve, op: IdentityProvider):
    client = serve()
    login = client.get("/progidiff/login?next=/ohif/")
    assert "Log in with the hospital&#x27;s account" in login.text
    assert 'href="/progidiff/oidc/login?next=%2Fohif%2F"' in login.text
    assert 'name="password"' not in login.text, "there is nothing to log in with a password"
    asked = client.get("/progidiff/oidc/login?next=/progidiff/")
    query = {name: values[0] for name, values in parse_qs(urlsplit(asked.headers["location"]).query).items()}
    assert query["redirect_uri"] == "http://labels.example.org:8000/progidiff/oidc/callback"
    assert (query["response_type"], query["client_id"], query["code_challenge_method"]) == ("code", "progidiff", "S256")
    assert query["scope"].split() == ["openid", "profile"]
    cookie = asked.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    done = log_in(client)
    assert done.status_code == 200
    assert 'content="0;url=/progidiff/?image=a"' in done.text
    session = next(value for name, value in done.headers.multi_items() if "progidiff_session" in value)
    assert "HttpOnly" in session
    assert "SameSite=strict" in session
    assert client.get("/who").json() == {"name": "anna", "role": "annotate"}


@pytest.mark.parametrize(
    ("claims", "settings", "name", "role"),
    [
        ({"preferred_username": "bo", "groups": ["readers", "CN=Radiology, OU=Staff"]}, {}, "bo", "administer"),
        ({"preferred_username": "bo", "groups": "readers"}, {}, "bo", "read"),
        ({"groups": ["readers"]}, {}, "id-0815", "read"),
        ({"preferred_username": "Bo Ek", "groups": ["readers"]}, {}, "id-0815", "read"),
        ({"preferred_username": "bo", "groups": ["others"]}, {"default_role": "read"}, "bo", "read"),
        ({"realm_access": {"roles": ["annotators"]}}, {"role_claim": "realm_access.roles"}, "id-0815", "annotate"),
        ({"upn": "bo@x.org", "groups": ["readers"]}, {"name_claim": "upn"}, "bo@x.org", "read"),
    ],
)
def test_claims_become_a_name_and_the_role_with_most_rights(
    serve: Serve, op: IdentityProvider, claims: dict[str, Any], settings: dict[str, Any], name: str, role: str
):
    op.claims = claims
    client = serve(**settings)
    assert log_in(client).status_code == 200
    assert client.get("/who").json() == {"name": name, "role": role}


@pytest.mark.parametrize("groups", [["others"], [], None, {"a": 1}, [1]])
def test_somebody_without_a_group_is_told_so(serve: Serve, op: IdentityProvider, groups: Any):
    op.claims = {"preferred_username": "bo", "groups": groups}
    client = serve()
    assert_refused(client, log_in(client), 403, "'?bo.*in none of the groups")


def test_groups_that_are_not_in_the_token_are_asked_for_and_of_the_same_account(serve: Serve, op: IdentityProvider):
    op.claims = {"preferred_username": "bo"}
    op.user_info = {"sub": "id-0815", "groups": ["readers"], "preferred_username": "ignored"}
    client = serve()
    assert log_in(client).status_code == 200
    assert client.get("/who").json() == {"name": "bo", "role": "read"}
    op.user_info["sub"] = "somebody-else"
    client = serve()
    assert_refused(client, log_in(client), 401, "another account")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"iss": "https://evil.example"}, "iss"),
        ({"iss": None}, "iss"),
        ({"aud": "another-client"}, "aud"),
        ({"aud": ["another-client"]}, "aud"),
        ({"aud": None}, "aud"),
        ({"aud": ["progidiff", "another"], "azp": "another"}, "azp"),
        ({"exp": int(time.time() - 3600), "iat": int(time.time() - 7200)}, "expired"),
        ({"exp": None}, "exp"),
        ({"nonce": "of-another-login"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}, "at_hash"),
        ({"sub": None}, "sub"),
    ],
)
def test_a_token_that_is_not_for_this_login_is_refused(
    serve: Serve, op: IdentityProvider, wrong: dict[str, Any], reason: str
):
    op.wrong = wrong
    client = serve()
    answer = log_in(client)
    assert_refused(client, answer, 401, f"token is not good .*{reason}.*administrator compares issuer")


def test_a_token_that_another_signed_is_refused(serve: Serve, op: IdentityProvider):
    op.published, op.key = op.key, make_key("two")
    client = serve()
    assert_refused(client, log_in(client), 401, "token is not good")
    op.key, op.algorithm = OctKey.import_key("the-secret-of-this-client-0123456", {"kid": "one"}), "HS256"  # type: ignore[assignment]
    client = serve()
    assert_refused(client, log_in(client), 401, "token is not good")


def test_new_keys_of_the_provider_are_found(serve: Serve, op: IdentityProvider):
    now = [time.time()]
    client = serve(clock=lambda: now[0])
    assert log_in(client).status_code == 200
    op.key = make_key("two")
    now[0] += 90
    op.offset = 90
    assert log_in(client).status_code == 200


@pytest.mark.parametrize(("seconds", "status"), [(50, 200), (-340, 200), (200, 401), (-400, 401)])
def test_clocks_may_differ_a_little(serve: Serve, op: IdentityProvider, seconds: float, status: int):
    """A token is good for 300 s; the provider's clock is so far ahead (or behind), 60 s are forgiven."""
    op.offset = seconds
    op.wrong = {"nbf": int(time.time() + seconds)}
    assert log_in(serve()).status_code == status


def test_a_login_is_finished_once_in_its_own_browser_and_in_time(serve: Serve, op: IdentityProvider):
    now = [time.time()]
    client = serve(clock=lambda: now[0])
    back = begin(client)
    kept = dict(client.cookies)
    stranger = serve(clock=lambda: now[0])
    assert_refused(stranger, stranger.get(back), 401, "not begun in this browser")
    for state in ("", "another", "ä"):
        assert client.get("/progidiff/oidc/callback", params={"code": "x", "state": state}).status_code == 401
    client = serve(clock=lambda: now[0])
    client.cookies.update(kept)
    assert client.get(back).status_code == 200
    client.cookies.update(kept)  # Somebody got hold of the browser's cookie and address.
    assert "finished already" in client.get(back).text
    late = serve(clock=lambda: now[0])
    back = begin(late)
    now[0] += 601
    assert_refused(late, late.get(back), 401, "took longer than 10 minutes")


def test_the_cookie_of_a_login_is_no_session_and_cannot_be_made(serve: Serve):
    client = serve()
    begin(client)
    sealed = client.cookies["progidiff_oidc"].strip('"')
    assert client.get("/who", headers={"Authorization": f"Bearer {sealed}"}).status_code == 401
    body, _, signature = sealed.partition(".")
    for forged in (f"{body}x.{signature}", f"{body}.", "", ".", f"{body}.{signature[:-2]}"):
        client.cookies.set("progidiff_oidc", forged)
        assert client.get("/progidiff/oidc/callback?code=a&state=b").status_code == 401


def test_a_refusal_by_the_provider_is_told_and_harmless(serve: Serve, op: IdentityProvider):
    client = serve()
    state = parse_qs(urlsplit(begin(client)).query)["state"][0]
    query = {"state": state, "error": "access_denied", "error_description": "<script>alert(1)</script>"}
    answer = client.get("/progidiff/oidc/callback", params=query)
    assert_refused(client, answer, 401, "did not log you in .access_denied")
    assert "<script>" not in answer.text
    back = begin(client)
    assert_refused(client, client.get(f"{back}&iss=https://evil.example"), 401, "another provider")
    op.secret = "another"
    assert_refused(client, log_in(client), 401, "client_secret in the file")


def test_what_somebody_sends_as_a_refusal_makes_no_line_of_the_log(serve: Serve, caplog: pytest.LogCaptureFixture):
    client = serve()
    begun = client.get("/progidiff/oidc/login")
    state = parse_qs(urlsplit(begun.headers["location"]).query)["state"][0]
    forged = {
        "state": state,
        "error": "denied",
        "error_description": "x\n2026-01-01 WARNING 'chief' is logged in\x1b[2J",
    }
    assert client.get("/progidiff/oidc/callback", params=forged).status_code == 401
    lines = [
        record.getMessage() for record in caplog.records if "A login by the provider failed" in record.getMessage()
    ]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "\x1b" not in lines[0]


def test_while_the_provider_is_down_its_button_says_so_and_the_users_file_works(
    serve: Serve, op: IdentityProvider, tmp_path: Path
):
    users = UsersFile(tmp_path / "users.json")
    users.put("adam", Role.ADMINISTER, PASSWORD)
    now = [time.time()]
    client = serve(users, clock=lambda: now[0])
    op.down = True
    for _ in range(3):
        answer = client.get("/progidiff/oidc/login?next=/progidiff/")
        assert_refused(
            client, answer, 503, "127.0.0.1 does not answer as one .*Try again in a minute, or log in with a name"
        )
        assert answer.headers["retry-after"] == "60"
        assert 'name="password"' in answer.text
    assert len(op.asked) == 1, "it is not asked again at once"
    form = {"name": "adam", "password": PASSWORD, "next": "/progidiff/"}
    assert client.post("/progidiff/login", data=form).status_code == 303
    assert client.get("/who").json() == {"name": "adam", "role": "administer"}
    token = client.post("/auth/token", data={"username": "adam", "password": PASSWORD}).json()["access_token"]
    assert client.get("/who", headers={"Authorization": f"Bearer {token}"}).json()["name"] == "adam"
    op.down = False
    now[0] += 6
    back = begin(client)
    op.down = True
    assert client.get(back).status_code == 503


def test_a_provider_that_calls_itself_otherwise_is_not_believed(serve: Serve, op: IdentityProvider):
    client = serve(issuer=f"{op.issuer}/")
    answer = client.get("/progidiff/oidc/login")
    assert answer.status_code == 503
    assert "corrects issuer in the file" in answer.text


def test_a_logout_ends_the_session_and_leads_to_that_of_the_provider(serve: Serve, op: IdentityProvider):
    client = serve()
    log_in(client)
    session = client.cookies["progidiff_session"]
    out = client.post("/progidiff/logout")
    assert out.headers["location"] == "/progidiff/login?ended=true"
    page = client.get(out.headers["location"])
    assert f"{op.issuer}/logout?client_id=progidiff" in page.text
    assert client.get("/who", headers={"Authorization": f"Bearer {session}"}).status_code == 401


def test_another_mapping_of_groups_ends_the_sessions_that_began_before(serve: Serve, op: IdentityProvider):
    client = serve()
    log_in(client)
    session = client.cookies["progidiff_session"]
    again = {"Authorization": f"Bearer {session}"}
    assert serve().get("/who", headers=again).status_code == 200, "a restart ends none"
    assert serve(roles={"annotators": Role.READ}).get("/who", headers=again).status_code == 401


def test_behind_a_proxy_the_public_address_counts(serve: Serve):
    client = serve(public_url="https://labels.example.org/seg")
    asked = client.get("/progidiff/oidc/login")
    query = parse_qs(urlsplit(asked.headers["location"]).query)
    assert query["redirect_uri"] == ["https://labels.example.org/seg/progidiff/oidc/callback"]
    assert "Secure" in asked.headers["set-cookie"]


def test_a_way_back_that_leads_elsewhere_is_not_taken(serve: Serve):
    client = serve()
    done = client.get(begin(client, "https://evil.example/"))
    assert 'content="0;url=/"' in done.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a", "does not describe a provider"),
        ("a: [", "is not YAML"),
        ("issuer: http://op.example.org\nclient_id: a\nroles: {x: read}", "must begin with https://"),
        ("issuer: https://op\nclient_id: a\nroles: {x: king}", "roles.x: "),
        ("issuer: https://op\nclient_id: a\nrole: {x: read}", "role: Extra inputs"),
        ("issuer: https://op\nclient_id: a\nroles: {x: read}\nclock_skew_seconds: 9999", "clock_skew_seconds"),
        ("issuer: https://op\nclient_id: a", "lets nobody in"),
    ],
)
def test_a_file_that_describes_no_provider_stops_the_start_with_the_reason(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "oidc.yaml"
    file.touch(mode=0o600)
    file.write_text(text)
    with pytest.raises(RequestError, match=reason):
        read_settings(file)
    options = ServerOptions.from_conf({"oidc_file": str(file)}, str(tmp_path))
    with pytest.raises(RequestError, match=reason):
        Authenticator.from_options(options, {})
    file.chmod(0o644)
    with pytest.raises(RequestError, match="open to every account"):
        read_settings(file)


def test_with_a_provider_other_machines_may_ask_for_a_login(tmp_path: Path):
    file = tmp_path / "oidc.yaml"
    file.touch(mode=0o600)
    file.write_text("issuer: https://op.example.org\nclient_id: a\nroles: {x: read}\n")
    auth = Authenticator.from_options(ServerOptions.from_conf({"oidc_file": str(file)}, str(tmp_path)), {})
    assert auth.required
    assert not auth.only_local
    assert auth.local_token is None
    assert "those whom https://op.example.org logs in" in auth.describe()
