"""The guard in front of a small web application: addresses, hosts, origins, roles, sizes, deadlines. And its table
against the real one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.testclient import TestClient

from progidiff.server.gate import answers, bodies, guard
from progidiff.server.gate.auth import COOKIE, Authenticator, User
from progidiff.server.gate.endpoints import (
    ADMINISTER,
    ANNOTATE,
    CALLER,
    CLOSED_MARK,
    OPEN,
    READ,
    UPLOAD,
    Content,
    Endpoint,
    EndpointTable,
    build_table,
)
from progidiff.server.options import ServerOptions
from progidiff.server.routes.table import build_endpoints, insert_table
from progidiff.users import Role, Token, UsersFile
from support.servers import ROOT

TOKENS = {role: f"token-of-somebody-who-may-{role}" for role in Role}
LOCAL, REMOTE = ("127.0.0.1", 50_000), ("192.168.7.9", 50_000)

TABLE = EndpointTable(
    (
        Endpoint("GET", "/read", READ),
        Endpoint("GET", "/page", READ),
        Endpoint("GET", "/stream", READ, deadline=1),
        Endpoint("GET", "/slow", READ, deadline=1),
        Endpoint("POST", "/write", ANNOTATE, body=1000),
        Endpoint("PUT", "/upload", ANNOTATE, body=UPLOAD),
        Endpoint("POST", "/train/{model}", ADMINISTER, body=10_000, content=Content.PARAMS),
        Endpoint("POST", "/say", ANNOTATE, body=10_000, content=Content.JSON),
        Endpoint("GET", "/open", OPEN),
    )
)


def build_app() -> FastAPI:
    web = FastAPI()
    web.add_middleware(CORSMiddleware, allow_origins=["*"], allow_credentials=True)  # As the host has it.

    @web.get("/read")
    def read(user: User = CALLER) -> dict[str, str]:
        return {"name": user.name, "role": user.role}

    @web.get("/unlisted")
    def unlisted() -> dict[str, str]:
        return {}

    @web.get("/page")
    def page() -> HTMLResponse:
        return HTMLResponse("<p>page</p>")

    @web.get("/open")
    def opened() -> dict[str, str]:
        return {}

    @web.get("/slow")
    def slow() -> dict[str, str]:
        time.sleep(1.6)
        return {"slow": "done"}

    @web.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                await asyncio.sleep(0.6)
                yield b"part "

        return StreamingResponse(parts())

    @web.post("/write")
    @web.put("/upload")
    async def write(request: Request, user: User = CALLER) -> dict[str, Any]:
        return {"size": len(await request.body()), "name": user.name}

    @web.post("/say")
    async def say(request: Request) -> dict[str, Any]:
        return {"said": await request.json()}

    @web.post("/train/{model}")
    def train(model: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"params": params}

    answers.install_handlers(web)
    return web


Connect = Callable[..., TestClient]


@pytest.fixture
def connect(tmp_path: Path) -> Connect:
    """A client of a guarded application: `connect(peer, conf...)`."""

    def build(
        peer: tuple[str, int] = LOCAL,
        tokens: bool = False,
        host: str = "127.0.0.1:8000",
        local: str | None = None,
        root: str = "",
        **conf: str,
    ) -> TestClient:
        web = build_app()
        options = ServerOptions.from_conf(conf, str(tmp_path))
        secrets = tuple(Token.of(f"{role}r", role, text) for role, text in TOKENS.items()) if tokens else ()
        users = UsersFile(options.users_file) if options.users_file else None
        if local is not None:
            secrets = (Token.of("local", ADMINISTER, local),)
        auth = Authenticator(secrets, users, options.allow_anonymous, tmp_path / "state", local_token=local)
        guard.install(web, TABLE, auth, options)
        return TestClient(
            web,
            base_url=f"http://{host}",
            client=peer,
            root_path=root,
            follow_redirects=False,
            raise_server_exceptions=False,
        )

    return build


def bearer(role: Role) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[role]}"}


def assert_refused(response: Any, status: int, reason: str) -> None:
    assert response.status_code == status, response.text
    answer = response.json()
    assert re.search(reason, answer["detail"]), answer
    assert answer["error"]


def test_without_a_login_this_machine_administers_and_others_are_told_how_to_be_let_in(connect: Connect):
    assert connect(LOCAL).get("/read").json() == {"name": "", "role": "administer"}
    assert connect(("::1", 1)).get("/read").status_code == 200
    assert connect(("::ffff:127.0.0.1", 1)).get("/read").status_code == 200
    for peer in (REMOTE, ("::ffff:192.168.7.9", 1), ("172.17.0.1", 1), ("testclient", 1), ("", 0)):
        for path in ("/read", "/open"):
            assert_refused(connect(peer).get(path), 403, "--conf token_file .*--conf allow_anonymous true")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host"])
def test_a_request_that_a_proxy_passed_on_is_not_from_this_machine(connect: Connect, header: str):
    assert_refused(connect(LOCAL).get("/read", headers={header: "127.0.0.1"}), 403, "its own machine only")
    assert_refused(connect(REMOTE).get("/read", headers={header: "127.0.0.1"}), 403, "its own machine only")


LOCAL_TOKEN = "the-token-in-the-link-of-this-machine"
PROXY_HEADERS = [
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Server",
    "X-Forwarded-Port",
    "Forwarded",
    "Via",
    "X-Real-IP",
    "X-Client-IP",
    "X-Cluster-Client-IP",
    "True-Client-IP",
    "CF-Connecting-IP",
    "Fastly-Client-IP",
    "X-Original-Host",
    "Client-IP",
    "X-ProxyUser-Ip",
]


@pytest.mark.parametrize("header", [*PROXY_HEADERS, ""])
def test_nobody_is_administrator_for_coming_through_a_proxy_or_a_tunnel(connect: Connect, header: str):
    headers = {header: "203.0.113.7"} if header else {}
    client = connect(LOCAL, local=LOCAL_TOKEN)
    assert client.get("/read", headers=headers).status_code in (401, 403)
    assert client.post("/write", content=b"x", headers=headers).status_code in (401, 403)


def test_this_machine_enters_with_its_token_and_other_machines_do_not(connect: Connect):
    token = {"Authorization": f"Bearer {LOCAL_TOKEN}"}
    client = connect(LOCAL, local=LOCAL_TOKEN)
    assert_refused(client.get("/read"), 401, "asks for a login: .*`progidiff users link` prints it again")
    assert client.get("/read", headers=token).json() == {"name": "local", "role": "administer"}
    assert client.get("/open").status_code == 200
    assert_refused(client.get("/read", headers={"Host": "evil.example", **token}), 403, "--conf hosts")
    led = client.get("/page", headers={"Accept": "text/html"})
    assert (led.status_code, led.headers["location"]) == (303, "/progidiff/login?next=%2Fpage")
    for path in ("/read", "/open"):
        assert_refused(connect(REMOTE, local=LOCAL_TOKEN).get(path, headers=token), 403, "its own machine only")
    guest = connect(REMOTE, local=LOCAL_TOKEN, allow_anonymous="true")
    assert guest.get("/read").json() == {"name": "", "role": "annotate"}
    assert connect(LOCAL, local=LOCAL_TOKEN, allow_anonymous="true").get("/read").json()["role"] == "annotate"


def test_behind_a_proxy_with_a_sub_path_a_browser_is_led_to_the_login_below_it(connect: Connect):
    client = connect(REMOTE, tokens=True, root="/labels")
    for path in ("/page?a=1", "/labels/page?a=1"):  # As the web server writes it, and as an older one did.
        led = client.get(path, headers={"Accept": "text/html"})
        assert (led.status_code, led.headers["location"]) == (303, "/labels/progidiff/login?next=%2Fpage%3Fa%3D1")
    assert client.get("/labels/read", headers=bearer(READ)).status_code == 200


def test_anonymous_users_get_the_role_that_the_option_names_and_not_more(connect: Connect):
    remote = connect(REMOTE, allow_anonymous="true")
    assert remote.get("/read").json() == {"name": "", "role": "annotate"}
    assert remote.post("/write", content=b"x").status_code == 200
    assert_refused(
        remote.post("/train/m", json={}), 403, "needs the role administer, and somebody without a login has annotate"
    )
    assert connect(REMOTE, allow_anonymous="administer").post("/train/m", json={}).status_code == 200
    assert_refused(connect(REMOTE, allow_anonymous="read").post("/write", content=b"x"), 403, "role annotate")
    assert connect(LOCAL, allow_anonymous="read").post("/write", content=b"x").status_code == 200


def test_with_tokens_nobody_is_let_in_for_being_on_this_machine(connect: Connect):
    for peer in (LOCAL, REMOTE):
        client = connect(peer, tokens=True)
        refused = client.get("/read")
        assert_refused(refused, 401, "POST /auth/token .*/progidiff/login")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/read", headers=bearer(READ)).json() == {"name": "readr", "role": "read"}
        assert_refused(client.get("/read", headers={"Authorization": "Bearer nonsense"}), 401, "unknown, expired")
        assert client.get("/open").status_code == 200
        assert client.get("/open", headers={"Authorization": "Bearer nonsense"}).status_code == 200


@pytest.mark.parametrize(
    ("role", "read", "write", "train", "unlisted"),
    [(READ, 200, 403, 403, 403), (ANNOTATE, 200, 200, 403, 403), (ADMINISTER, 200, 200, 200, 200)],
)
def test_each_role_may_what_the_table_says_and_what_is_not_in_it_is_for_administrators(
    connect: Connect, role: Role, read: int, write: int, train: int, unlisted: int
):
    client = connect(REMOTE, tokens=True)
    headers = bearer(role)
    assert client.get("/read", headers=headers).status_code == read
    assert client.post("/write", content=b"x", headers=headers).status_code == write
    assert client.post("/train/m", json={}, headers=headers).status_code == train
    assert client.get("/unlisted", headers=headers).status_code == unlisted
    assert client.get("/nothing", headers=headers).status_code == (404 if role is ADMINISTER else 403)


def test_a_browser_is_led_to_the_login_with_the_way_back_and_its_cookie_lets_it_in(connect: Connect, tmp_path: Path):
    users = UsersFile(tmp_path / "users.json")
    users.put("anna", ANNOTATE, "correct horse")
    client = connect(REMOTE, users_file=str(users.path))
    response = client.get("/page?a=1&b=2", headers={"Accept": "text/html,*/*"})
    assert (response.status_code, response.headers["location"]) == (
        303,
        "/progidiff/login?next=%2Fpage%3Fa%3D1%26b%3D2",
    )
    assert_refused(client.get("/page"), 401, "asks for a login")
    _, session = Authenticator((), users, None, tmp_path / "state").log_in("anna", "correct horse", "")
    client.cookies.set(COOKIE, session)
    assert client.get("/read").json() == {"name": "anna", "role": "annotate"}
    client.cookies.set(COOKIE, session + "x")
    assert client.get("/read").status_code == 401


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.7.1", "LOCALHOST:1"]
)
def test_the_names_of_this_machine_and_addresses_are_served(connect: Connect, host: str):
    assert connect(LOCAL).get("/read", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "localhost@evil",
    ],
)
def test_a_foreign_name_that_points_here_is_refused(connect: Connect, host: str):
    assert_refused(connect(LOCAL).get("/read", headers={"Host": host}), 403, "--conf hosts")
    assert_refused(connect(REMOTE, allow_anonymous="true").get("/read", headers={"Host": host}), 403, "--conf hosts")


def test_a_configured_name_is_served_and_with_a_login_any_is_until_names_are_configured(connect: Connect):
    assert (
        connect(LOCAL, hosts="labels.example.org").get("/read", headers={"Host": "Labels.example.org:8000"}).status_code
        == 200
    )
    assert connect(REMOTE, tokens=True).get("/read", headers={"Host": "any.example", **bearer(READ)}).status_code == 200
    strict = connect(REMOTE, tokens=True, hosts="labels.example.org")
    assert_refused(strict.get("/read", headers={"Host": "any.example", **bearer(READ)}), 403, "no known name")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "https://127.0.0.1:8001"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000@evil.example"},
        {"Origin": "http://127.0.0.1:8000.evil.example"},
        {"Origin": "file://"},
        {"Origin": "http://[::1"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_origin_cannot_change_anything(connect: Connect, headers: dict[str, str]):
    client = connect(LOCAL)
    assert_refused(client.post("/write", content=b"x", headers=headers), 403, "page of another origin")
    assert "access-control-allow-origin" not in client.get("/read", headers=headers).headers
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/write", headers=preflight).headers


def test_the_servers_own_pages_and_programs_may(connect: Connect):
    client = connect(LOCAL)
    for headers in (
        {},
        {"Origin": "http://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ):
        assert client.post("/write", content=b"x", headers=headers).status_code == 200
    behind_tls = {"Origin": "https://labels.example.org", "Host": "labels.example.org"}
    assert (
        connect(LOCAL, hosts="labels.example.org").post("/write", content=b"x", headers=behind_tls).status_code == 200
    )


def test_configured_origins_are_let_in_with_credentials_and_can_read_refusals(connect: Connect):
    client = connect(REMOTE, tokens=True, cors_origins="https://viewer.example.org:3000")
    origin = {"Origin": "https://viewer.example.org:3000"}
    preflight = client.options(
        "/write",
        headers={**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"},
    )
    assert preflight.headers["access-control-allow-origin"] == origin["Origin"]
    assert client.post("/write", content=b"x", headers={**origin, **bearer(ANNOTATE)}).status_code == 200
    refused = client.post("/write", content=b"x", headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin["Origin"])
    assert_refused(
        client.post("/write", content=b"x", headers={"Origin": "https://viewer.example.org", **bearer(ANNOTATE)}),
        403,
        "another origin",
    )


@pytest.mark.parametrize("size", [1001, 500_000])
def test_a_body_over_its_limit_is_refused_by_its_stated_length_and_while_it_streams(connect: Connect, size: int):
    client = connect(LOCAL)
    assert client.post("/write", content=b"x" * 1000).json()["size"] == 1000
    assert_refused(client.post("/write", content=b"x" * size), 413, "larger than the 1,000 bytes .*max_upload_gb")
    assert_refused(
        client.post("/write", content=iter([b"x" * 400, b"x" * (size - 400)])), 413, "larger than the 1,000 bytes"
    )


def test_the_limit_of_uploads_is_an_option(connect: Connect):
    assert connect(LOCAL, max_upload_gb="0.002").put("/upload", content=b"x" * 1_500_000).json()["size"] == 1_500_000
    assert_refused(
        connect(LOCAL, max_upload_gb="0.001").put("/upload", content=b"x" * 1_500_000), 413, "1,000,000 bytes"
    )


def test_a_length_repeated_by_slicer_in_a_request_without_a_body_does_no_harm(connect: Connect):
    assert (
        connect(LOCAL)
        .get("/read", headers={"Content-Length": "2000000", "Content-Type": "application/json"})
        .status_code
        == 200
    )


@pytest.mark.parametrize("name", ["bundle_path", "image", "model_dir", "Bundle_Path", "store", " path "])
def test_parameters_of_tasks_that_name_files_are_refused_at_the_top_and_below(connect: Connect, name: str):
    client = connect(LOCAL)
    for body in ({name: "/tmp/evil"}, {"m": {name: "/tmp/evil"}, "epochs": 1}):
        assert_refused(client.post("/train/m", json=body), 422, "cannot be set by a request")


@pytest.mark.parametrize("body", ["{", "[1]", '"text"', "5", "[" * 9000, b"\xff\xfe", "{'a': 1}"])
def test_a_body_that_is_no_object_is_refused(connect: Connect, body: Any):
    assert_refused(
        connect(LOCAL).post("/train/m", content=body, headers={"Content-Type": "application/json"}),
        422,
        "Send an object",
    )


@pytest.mark.parametrize(
    ("body", "params"), [("", None), ("null", None), ("{}", {}), ('{"max_epochs": 3}', {"max_epochs": 3})]
)
def test_harmless_parameters_arrive_as_they_were_sent(connect: Connect, body: str, params: object):
    answer = connect(LOCAL).post("/train/m", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (200, {"params": params})


@pytest.mark.parametrize("body", [r'{"client_id": "\ud800"}', '{"a": NaN}', "[" * 70 + "]" * 70, "1e999"])
@pytest.mark.parametrize("path", ["/say", "/train/m"])
def test_json_that_could_not_be_sent_back_is_refused_before_any_route(connect: Connect, path: str, body: str):
    answer = connect(LOCAL).post(path, content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, 422, "The body (is|has)")


@pytest.mark.parametrize("charset", ["unicode_escape", "utf-7", "utf-16", "idna"])
def test_a_form_that_names_its_own_decoder_is_refused(connect: Connect, charset: str):
    kind = {"Content-Type": f'multipart/form-data; boundary=x; charset="{charset}"'}
    assert_refused(connect(LOCAL).post("/write", content=b"--x--", headers=kind), 422, "Send UTF-8")
    plain = {"Content-Type": "application/json; charset=UTF-8"}
    assert connect(LOCAL).post("/say", content=b'"\xc3\xbc"', headers=plain).json() == {"said": "ü"}


@pytest.mark.parametrize(
    "path",
    ["/read/../unlisted", "/%2e%2e/read", "/a//b", "/read%5c..%5c", "/read%00", "/read%0a", "/./read", "/%2e/read"],
)
def test_an_address_that_means_two_places_is_refused(connect: Connect, path: str):
    client = connect(LOCAL)
    request = client.build_request("GET", "/read")
    request.url = request.url.copy_with(raw_path=path.encode())
    response = client.send(request)
    assert response.status_code == 422 or "%" not in path, (
        response.text
    )  # The client library itself resolves plain dots.
    assert response.status_code in (200, 403, 404, 422)


def test_a_late_answer_is_a_503_with_a_reason_and_the_work_goes_on(connect: Connect):
    with connect(LOCAL) as client:
        started = time.monotonic()
        response = client.get("/slow")
        assert time.monotonic() - started < 1.5
        assert_refused(response, 503, "no answer within 1 s. The work goes on")
        assert int(response.headers["Retry-After"]) >= 1
        time.sleep(0.8)
        assert client.get("/read").status_code == 200


def test_an_answer_that_has_begun_may_take_longer_than_the_deadline(connect: Connect):
    response = connect(LOCAL).get("/stream")
    assert (response.status_code, response.text) == (200, "part part part ")


def test_answers_carry_the_security_headers_and_pages_a_policy(connect: Connect):
    client = connect(LOCAL)
    for path in ("/read", "/page", "/nothing"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "SAMEORIGIN"
        assert headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'self'" in client.get("/page").headers["Content-Security-Policy"]
    assert connect(REMOTE).get("/read").headers["X-Content-Type-Options"] == "nosniff"


def test_a_stalled_body_is_given_up(connect: Connect, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "_STALL", 0.2)
    app = connect(LOCAL).app
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not sent and not getattr(receive, "called", False):
            receive.called = True  # type: ignore[attr-defined]
            return {"type": "http.request", "body": b"x", "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError("not reached")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/write",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", b"50")],
        "client": LOCAL,
        "root_path": "",
        "scheme": "http",
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))  # type: ignore[arg-type]
    assert sent[0]["status"] == 503
    assert b"No byte of the request came" in sent[1]["body"]


def test_a_web_socket_is_closed(connect: Connect):
    client = connect(LOCAL)
    with pytest.raises(Exception) as caught, client.websocket_connect("/read"):
        pass
    assert getattr(caught.value, "code", 1008) in (1008, 1000, 403)


def list_routes(routes: Any) -> Iterator[tuple[str, str]]:
    """Method and path of every route of a router, also of those that FastAPI keeps inside included ones."""
    for route in routes:
        if hasattr(route, "effective_candidates"):
            yield from list_routes(route.effective_candidates())
        elif getattr(route, "methods", None):
            yield from ((method, route.path) for method in route.methods)
        else:
            yield "GET", f"{route.path}/{{path:path}}"


def list_all_routes() -> set[tuple[str, str]]:
    import monailabel.app

    ours = [route for module in build_endpoints() for route in module.router.routes]
    return {
        ("GET" if method == "HEAD" else method, path)
        for method, path in (*list_routes(ours), *list_routes(monailabel.app.app.router.routes))
    }


def test_every_route_of_the_app_has_a_row_of_its_own():
    rows = {(row.method, row.path) for row in build_table(build_endpoints()).endpoints}
    missing = {route for route in list_all_routes() if route not in rows}
    assert not missing, "declare them, see progidiff.server.gate.endpoints"


def test_every_row_is_found_by_an_address_of_its_own_and_stands_for_a_route():
    routes, table = list_all_routes(), build_table(build_endpoints())
    for row in table.endpoints:
        example = re.sub(r"\{(\w+)(:path)?\}", lambda match: "a/b" if match[2] else "example", row.path)
        assert table.find(row.method, example) is row, f"{row.method} {row.path} is hidden by a row above it"
        assert (row.method, row.path) in routes, f"{row.method} {row.path} is no route"


def test_only_the_login_and_the_probes_are_open():
    rows = build_table(build_endpoints()).endpoints
    probes = {"/healthz", "/readyz", "/metrics"}  # `/metrics` looks at its own token.
    assert {row.path for row in rows if row.probe} == probes
    assert {row.path for row in rows if row.role is OPEN} - probes == {
        "/auth/",
        "/auth/token",
        "/progidiff/login",
        "/progidiff/logout",
        "/progidiff/oidc/login",
        "/progidiff/oidc/callback",
        "/favicon.ico",
    }


def test_what_changes_something_needs_more_than_reading():
    for row in build_table(build_endpoints()).endpoints:
        if row.method != "GET" and row.role is not OPEN:
            assert row.role is not None
            assert row.role.covers(ANNOTATE), row


def test_the_page_prints_the_table_of_the_code():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = build_table(build_endpoints())
    assert insert_table(page, table) == page, "run: python -m progidiff.server.routes.table"


def test_every_closed_address_has_a_row_that_says_so():
    from progidiff.server.routes.host import CLOSED

    rows = build_table(build_endpoints()).endpoints
    for closed in CLOSED:
        assert closed.reason.count(".") >= 2, "a reason and what to do instead"
        row = next(row for row in rows if (row.method, row.path) == (closed.method, closed.path))
        assert row.summary.startswith(CLOSED_MARK), row


def test_nothing_of_ours_loads_pickles():
    """Weights are safetensors, arrays are read with allow_pickle=False; code in a file that somebody sends must never
    run.

    Checkpoints that a user converts are pickles; torch reads them with weights_only=True, which builds tensors and runs
    nothing. The two marked lines of `images/decoding_child.py` read what this program wrote itself: the order of the
    server to its child, which holds no byte of the file that is read.
    """
    own = {
        "decoding_child.py": (
            "pickle.loads(pickle.dumps(sample))  # written by this process",
            "job: Job = pickle.load(file)  # written by the server's own process, never from outside",
        )
    }
    unsafe = re.compile(
        r"torch\.load(?!\(.*weights_only=True)|pickle\.(load|Unpickler)|joblib\.load|allow_pickle=True|weights_only=False|yaml\.load\(|(?<![.\w])(eval|exec)\("
    )
    for file in (*(ROOT / "lib").rglob("*.py"), *(ROOT / "apps").rglob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [
            f"{file.name}:{number}: {line}"
            for number, line in enumerate(lines, start=1)
            if unsafe.search(line) and not line.lstrip().startswith("#") and line.strip() not in own.get(file.name, ())
        ]
        assert not found
