"""Users, tokens, sessions and failed logins, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.errors import BusyError, LoginError, NotFoundError, RequestError, TooManyTriesError
from progidiff.server.gate.auth import COOKIE, Attempts, Authenticator, User
from progidiff.server.options import ServerOptions
from progidiff.storage.state_files import list_damage
from progidiff.users import Role, Token, UsersFile, hash_password, matches_password, read_tokens

SECRET = "a-token-that-is-long-enough"
PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def _quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is written into each hash; a real one takes 0.2 s."""
    monkeypatch.setattr("progidiff.users._N", 2**8)


@pytest.fixture
def users(tmp_path: Path) -> UsersFile:
    file = UsersFile(tmp_path / "users.json")
    file.put("anna", Role.ANNOTATE, PASSWORD)
    return file


@pytest.fixture
def auth(users: UsersFile, tmp_path: Path) -> Authenticator:
    return Authenticator((Token.of("bot", Role.READ, SECRET),), users, None, tmp_path / "state")


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_a_password_is_kept_as_a_salted_hash_and_only_it_matches():
    first, second = hash_password(PASSWORD), hash_password(PASSWORD)
    assert first != second
    assert PASSWORD not in first
    assert matches_password(PASSWORD, first)
    assert not matches_password(PASSWORD + " ", first)


@pytest.mark.parametrize("hashed", ["", "scrypt$1$1", "md5$x", "scrypt$16384$8$5$!!$!!", "scrypt$x$8$5$AAAA$AAAA"])
def test_a_hash_that_is_none_matches_nothing(hashed: str):
    assert not matches_password(PASSWORD, hashed)


@pytest.mark.parametrize("password", ["", "short", "x" * 257])
def test_a_password_too_short_or_too_long_is_refused_with_the_bounds(password: str):
    with pytest.raises(RequestError, match="10 to 256 characters"):
        hash_password(password)


def test_the_users_file_is_private_holds_no_password_and_is_read_again_when_it_changes(users: UsersFile):
    assert users.path.stat().st_mode & 0o077 == 0
    assert PASSWORD not in users.path.read_text()
    other = UsersFile(users.path)
    assert other.check("anna", PASSWORD) is Role.ANNOTATE
    users.put("anna", Role.READ, "another password")
    assert other.check("anna", "another password") is Role.READ
    users.remove("anna")
    with pytest.raises(LoginError):
        other.check("anna", "another password")
    with pytest.raises(NotFoundError, match="has no user 'anna'"):
        users.remove("anna")


def test_a_wrong_name_and_a_wrong_password_give_the_same_answer(users: UsersFile):
    reasons = set()
    for name, password in (("anna", "wrong password"), ("nobody", PASSWORD), ("", "")):
        with pytest.raises(LoginError) as caught:
            users.check(name, password)
        reasons.add(str(caught.value))
    assert len(reasons) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "users": {}}',
        '{"format": 1, "users": {"a": {}}}',
        '{"format": 1, "users": {"a": {"role": "king", "password": "scrypt$"}}}',
        '{"format": 1, "users": {"a": {"role": "read", "password": "plain"}}}',
        '{"format": 1, "users": {"../a": {"role": "read", "password": "scrypt$"}}}',
    ],
)
def test_a_users_file_that_somebody_broke_is_refused(content: str, tmp_path: Path):
    with pytest.raises(RequestError, match="user"):
        UsersFile(write(tmp_path / "users.json", content)).read()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such bits")
@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_secrets_that_every_account_can_read_are_refused_with_the_command_that_cures_it(mode: int, tmp_path: Path):
    for read in (read_tokens, lambda path: UsersFile(path).read()):
        with pytest.raises(RequestError, match="chmod o-rwx"):
            read(write(tmp_path / "secrets", SECRET, mode))


def test_a_token_file_has_a_line_per_token_or_one_token_alone(tmp_path: Path):
    tokens = read_tokens(write(tmp_path / "many", f"# ours\n\nbot:read:{SECRET}\nanna:annotate:{SECRET}:with:colons\n"))
    assert [(token.name, token.role) for token in tokens] == [("bot", Role.READ), ("anna", Role.ANNOTATE)]
    (alone,) = read_tokens(write(tmp_path / "one", f"{SECRET}\n"))
    assert alone.role is Role.ADMINISTER


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "short",
        f"bot:king:{SECRET}",
        f"bot:{SECRET}",
        f"../x:read:{SECRET}",
        "bot:read:short",
        f"{SECRET}\n{SECRET}\n",
    ],
)
def test_a_senseless_token_file_is_refused(text: str, tmp_path: Path):
    with pytest.raises(RequestError):
        read_tokens(write(tmp_path / "tokens", text))


def test_a_token_is_known_by_its_text_and_an_unknown_one_is_refused(auth: Authenticator):
    assert auth.find_user(bearer(SECRET), {}) == User("bot", Role.READ)
    assert auth.find_user({"authorization": f"bearer  {SECRET} "}, {}) == User("bot", Role.READ)
    assert auth.find_user({}, {}) is None
    assert auth.find_user({"authorization": "Basic abc"}, {}) is None
    for wrong in ("", SECRET[:-1], "x", "é" * 30, "a.b", "." * 2000):
        with pytest.raises(LoginError, match="Log in again"):
            auth.find_user(bearer(wrong), {})


def test_a_session_is_good_as_token_and_as_cookie_also_after_a_restart(
    auth: Authenticator, users: UsersFile, tmp_path: Path
):
    user, session = auth.log_in("anna", PASSWORD, "10.0.0.1")
    again = Authenticator(auth.tokens, users, None, tmp_path / "state")
    assert (
        user
        == again.find_user(bearer(session), {})
        == again.find_user({}, {COOKIE: session})
        == User("anna", Role.ANNOTATE)
    )
    assert PASSWORD not in session


def test_a_token_logs_in_too_with_its_name_or_none(auth: Authenticator):
    for name in ("", "bot"):
        user, session = auth.log_in(name, SECRET, "10.0.0.1")
        assert user == auth.read_session(session) == User("bot", Role.READ)
    with pytest.raises(LoginError):
        auth.log_in("anna", SECRET, "10.0.0.1")


def test_a_session_ends_by_logout_expiry_a_new_password_removal_and_another_key(
    auth: Authenticator, users: UsersFile, tmp_path: Path
):
    _, session = auth.log_in("anna", PASSWORD, "10.0.0.1")
    auth.end_session(session)
    assert auth.read_session(session) is None
    assert (
        Authenticator(auth.tokens, users, None, tmp_path / "state").read_session(session) is None
    )  # A restart forgets no logout.
    auth.session_seconds = -1
    assert auth.read_session(auth.log_in("anna", PASSWORD, "10.0.0.1")[1]) is None
    auth.session_seconds = 60
    _, session = auth.log_in("anna", PASSWORD, "10.0.0.1")
    users.put("anna", Role.ADMINISTER, "another password")
    assert auth.read_session(session) is None
    _, session = auth.log_in("anna", "another password", "10.0.0.1")
    users.remove("anna")
    assert auth.read_session(session) is None
    _, session = auth.log_in("", SECRET, "10.0.0.1")
    assert Authenticator(auth.tokens, users, None, tmp_path / "elsewhere").read_session(session) is None
    assert Authenticator((), users, None, tmp_path / "state").read_session(session) is None


def test_a_clock_that_was_wrong_for_a_while_neither_revives_a_session_nor_makes_one_last(
    auth: Authenticator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    now = time.time()
    _, ended = auth.log_in("anna", PASSWORD, "10.0.0.1")
    _, kept = auth.log_in("anna", PASSWORD, "10.0.0.1")
    auth.end_session(ended)
    monkeypatch.setattr("progidiff.server.gate.auth.time.time", lambda: now + 30 * 86_400)
    _, from_the_future = auth.log_in("anna", PASSWORD, "10.0.0.1")
    assert auth.read_session(kept) is None
    assert auth.read_session(from_the_future) is not None
    auth.end_session(kept)
    monkeypatch.setattr("progidiff.server.gate.auth.time.time", lambda: now - 300)
    assert auth.read_session(ended) is None
    assert auth.read_session(kept) is None
    assert auth.read_session(from_the_future) is None
    monkeypatch.setattr("progidiff.server.gate.auth.time.time", lambda: now)
    _, session = auth.log_in("anna", PASSWORD, "10.0.0.1")
    monkeypatch.setattr("progidiff.server.gate.auth.time.time", lambda: now - 300)
    assert auth.read_session(session) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": "b"}', b'{"a": NaN}', b"\xff"])
def test_a_damaged_list_of_ended_sessions_ends_all_and_new_ones_begin(
    auth: Authenticator, users: UsersFile, tmp_path: Path, content: bytes
):
    _, ended = auth.log_in("anna", PASSWORD, "10.0.0.1")
    auth.end_session(ended)
    (tmp_path / "state" / "ended.json").write_bytes(content)
    restarted = Authenticator(auth.tokens, users, None, tmp_path / "state")
    assert restarted.read_session(ended) is None
    _, session = restarted.log_in("anna", PASSWORD, "10.0.0.1")
    assert restarted.read_session(session) is not None
    assert restarted.read_session(ended) is None
    restarted.end_session(session)
    again = Authenticator(auth.tokens, users, None, tmp_path / "state")
    assert (again.read_session(ended), again.read_session(session)) == (None, None)
    assert [path.read_bytes() for path in (tmp_path / "state").glob("ended.json.damaged-*")] == [content]


def test_a_halved_signing_key_is_replaced_and_everybody_logs_in_again(
    auth: Authenticator, users: UsersFile, tmp_path: Path
):
    _, session = auth.log_in("anna", PASSWORD, "10.0.0.1")
    key = tmp_path / "state" / "session.key"
    key.write_bytes(key.read_bytes()[:16])
    restarted = Authenticator(auth.tokens, users, None, tmp_path / "state")
    assert restarted.read_session(session) is None
    _, session = restarted.log_in("anna", PASSWORD, "10.0.0.1")
    assert restarted.read_session(session) is not None
    assert key.stat().st_mode & 0o777 == 0o600
    assert any(damage.file == str(key) and "logs in again" in damage.meaning for damage in list_damage())


def test_a_session_that_somebody_changed_is_worth_nothing(auth: Authenticator):
    _, session = auth.log_in("anna", PASSWORD, "10.0.0.1")
    body, _, signature = session.partition(".")
    for forged in (
        body,
        f"{body}.",
        f".{signature}",
        f"{body[:-2]}AA.{signature}",
        f"{body}.{signature[:-2]}AA",
        session + "x",
        "é." + signature,
        "a" * 5000,
    ):
        assert auth.read_session(forged) is None


def test_failed_logins_are_counted_per_address_and_forgotten(auth: Authenticator):
    now = [1000.0]
    attempts = Attempts(per_key=3, window=60, clock=lambda: now[0])
    auth.attempts = attempts
    for _ in range(3):
        with pytest.raises(LoginError):
            auth.log_in("anna", "wrong password", "10.0.0.1")
    for name in ("anna", "other"):
        with pytest.raises(TooManyTriesError, match="Try again in 61 seconds") as caught:
            auth.log_in(name, PASSWORD, "10.0.0.1")
        assert (caught.value.status, caught.value.retry_after) == (429, 61)
    now[0] += 61
    assert auth.log_in("anna", PASSWORD, "10.0.0.1")[0].name == "anna"


def test_wrong_passwords_from_elsewhere_never_lock_a_name(auth: Authenticator):
    for number in range(40):
        with pytest.raises((LoginError, TooManyTriesError)):
            auth.log_in("anna", "wrong password", f"10.0.1.{number // 10}")
    assert auth.log_in("anna", PASSWORD, "10.0.0.1")[0].name == "anna"


def test_right_passwords_are_never_counted(auth: Authenticator):
    names = [auth.log_in("anna", PASSWORD, "10.0.0.1")[0].name for _ in range(30)]
    assert names == ["anna"] * 30


def test_an_ipv6_machine_cannot_try_from_each_of_its_addresses(auth: Authenticator):
    with pytest.raises(TooManyTriesError):
        for number in range(12):
            with contextlib.suppress(LoginError):
                auth.log_in("anna", "wrong password", f"2001:db8::{number:x}")


def test_of_many_wrong_passwords_at_once_no_more_are_looked_at_than_may_fail(
    auth: Authenticator, users: UsersFile, monkeypatch: pytest.MonkeyPatch
):
    looked: list[str] = []

    def look(name: str, password: str) -> Role:
        looked.append(password)
        time.sleep(0.02)
        raise LoginError("wrong")

    monkeypatch.setattr(users, "check", look)

    async def try_all() -> tuple[list[BaseException], float]:
        tries = [auth.log_in_apart("anna", f"wrong password {number}", "10.0.0.1") for number in range(60)]
        gathered = asyncio.ensure_future(asyncio.gather(*tries, return_exceptions=True))
        started = time.monotonic()
        await asyncio.gather(*(asyncio.to_thread(time.monotonic) for _ in range(20)))  # Readers have threads meanwhile.
        return await gathered, time.monotonic() - started

    errors, waited = asyncio.run(try_all())
    assert len(looked) == 10
    assert sorted({type(error).__name__ for error in errors}) == ["LoginError", "TooManyTriesError"]
    assert waited < 5


def test_no_more_logins_wait_than_the_server_can_look_at(auth: Authenticator, users: UsersFile, monkeypatch):
    monkeypatch.setattr(users, "check", lambda name, password: time.sleep(0.05) or Role.READ)

    async def try_all() -> list[BaseException]:
        tries = [auth.log_in_apart("anna", PASSWORD, f"10.0.0.{number}") for number in range(100)]
        return await asyncio.gather(*tries, return_exceptions=True)

    assert sum(isinstance(error, BusyError) for error in asyncio.run(try_all())) == 36


def test_trying_from_addresses_by_the_thousand_takes_no_memory():
    attempts = Attempts()
    for number in range(attempts.MAX_KEYS + 100):
        attempts.reserve(f"address {number}")
    assert len(attempts._tries) <= attempts.MAX_KEYS


def options(tmp_path: Path, **conf: str) -> ServerOptions:
    return ServerOptions.from_conf(conf, str(tmp_path))


def test_the_log_says_who_may_connect(tmp_path: Path, users: UsersFile):
    token_file = write(tmp_path / "tokens", SECRET)
    for conf, environment, required, words in (
        ({}, {}, True, "this machine only, with the link that is printed"),
        ({"login": "off"}, {}, False, "this machine only, everybody on it WITHOUT A LOGIN"),
        ({"allow_anonymous": "true"}, {}, True, "annotate WITHOUT A LOGIN; with the link"),
        ({"allow_anonymous": "true", "login": "off"}, {}, False, "annotate WITHOUT A LOGIN"),
        ({"token_file": str(token_file)}, {}, True, "1 tokens"),
        (
            {"token_file": str(token_file), "users_file": str(users.path)},
            {"PROGIDIFF_TOKEN": SECRET + "2"},
            True,
            "2 tokens and the users of",
        ),
        ({"users_file": str(users.path), "allow_anonymous": "read"}, {}, True, "without a login: read"),
    ):
        auth = Authenticator.from_options(options(tmp_path, **conf), environment)
        assert auth.required is required
        assert words in auth.describe()
        assert SECRET not in auth.describe()


def test_secrets_that_do_not_fit_stop_the_start(tmp_path: Path):
    empty = write(tmp_path / "users.json", json.dumps({"format": 1, "users": {}}))
    for conf, environment, reason in (
        ({"users_file": str(empty)}, {}, "progidiff users add"),
        ({"token_file": str(tmp_path / "missing")}, {}, "cannot be read"),
        ({"token_file": str(tmp_path)}, {}, "is no file"),
        ({}, {"PROGIDIFF_TOKEN": "short"}, "PROGIDIFF_TOKEN: a token has at least 20"),
    ):
        with pytest.raises(RequestError, match=reason):
            Authenticator.from_options(options(tmp_path, **conf), environment)


def test_without_users_and_tokens_this_machine_has_a_token_of_its_own_that_stays(tmp_path: Path):
    first = Authenticator.from_options(options(tmp_path), {})
    file = tmp_path / ".progidiff" / "sessions" / "local-token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert first.local_token == file.read_text().strip()
    assert first.find_user(bearer(first.local_token), {}) == User("local", Role.ADMINISTER)
    assert first.log_in("", first.local_token, "127.0.0.1")[0].name == "local"
    again = Authenticator.from_options(options(tmp_path), {})
    assert (again.local_token, again.only_local) == (first.local_token, True)
    printed = CliRunner().invoke(app, ["users", "link", "--studies", str(tmp_path), "--port", "8123"]).stdout
    assert printed == f"http://127.0.0.1:8123/progidiff/login?token={first.local_token}\n"
    file.write_text("half")
    assert len(Authenticator.from_options(options(tmp_path), {}).local_token or "") >= 20
    file.chmod(0o644)
    with pytest.raises(RequestError, match="chmod o-rwx"):
        Authenticator.from_options(options(tmp_path), {})


def test_two_servers_on_this_machine_do_not_end_the_logins_of_each_other(tmp_path: Path):
    first, second = (Authenticator.from_options(options(tmp_path / name), {}) for name in ("a", "b"))
    cookies = {}
    for auth, host in ((first, "127.0.0.1:8000"), (second, "127.0.0.1:9000")):
        assert auth.local_token is not None
        cookies[auth.name_cookie(host)] = auth.log_in("", auth.local_token, "127.0.0.1")[1]
    for auth, host in ((first, "127.0.0.1:8000"), (second, "127.0.0.1:9000")):
        assert auth.find_user({"host": host}, cookies) == User("local", Role.ADMINISTER)


def test_where_nothing_can_be_kept_one_logs_in_for_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("progidiff.server.gate.auth.write_private", refuse)
    monkeypatch.setattr("progidiff.users.write_private", refuse)
    auth = Authenticator.from_options(options(tmp_path), {})
    assert auth.local_token is not None
    assert auth.read_session(auth.log_in("", auth.local_token, "127.0.0.1")[1]) == User("local", Role.ADMINISTER)


def test_a_configured_login_makes_no_token_for_this_machine(tmp_path: Path):
    auth = Authenticator.from_options(options(tmp_path), {"PROGIDIFF_TOKEN": SECRET})
    assert (auth.local_token, auth.only_local) == (None, False)
    assert not (tmp_path / ".progidiff").exists()
    nothing = CliRunner().invoke(app, ["users", "link", "--studies", str(tmp_path)])
    assert nothing.exit_code == 2
    assert "Start the server once" in nothing.output


@pytest.mark.parametrize(
    ("conf", "reason"),
    [
        ({"login": "none"}, "must be one of token, off"),
        ({"tokenfile": "x"}, "Did you mean token_file"),
        ({"modeldir": "x"}, "Did you mean model_dir"),
        ({"zzz": "x"}, "There are .*adapters"),
        ({"allow_anonymous": "maybe"}, "must be one of false, true, read, annotate, administer"),
        ({"cors_origins": "*"}, "origins such as"),
        ({"cors_origins": "https://a.example/path"}, "origins such as"),
        ({"hosts": "http://a.example"}, "names without port"),
        ({"session_hours": "0"}, "from 0.1 to 720"),
        ({"max_upload_gb": "-1"}, "max_upload_gb"),
    ],
)
def test_server_options_that_would_open_or_do_nothing_are_refused(conf: dict[str, str], reason: str, tmp_path: Path):
    with pytest.raises(RequestError, match=reason):
        options(tmp_path, **conf)


def test_the_name_that_the_host_reads_itself_is_let_through(tmp_path: Path):
    assert options(tmp_path, server_mode="true") == options(tmp_path)


def test_the_command_line_writes_what_the_server_reads(tmp_path: Path):
    file = tmp_path / "users.json"

    def run(*words: str, text: str = "") -> str:
        result = CliRunner().invoke(app, ["users", *words], input=text)
        assert result.exit_code == 0, result.output
        return result.stdout

    run("add", "anna", "--role", "read", "--file", str(file), text=f"{PASSWORD}\n")
    assert run("list", "--file", str(file)) == "anna\tread\n"
    line = run("token", "bot")
    auth = Authenticator(read_tokens(write(tmp_path / "tokens", line)), UsersFile(file), None, tmp_path / "state")
    assert auth.find_user(bearer(line.strip().rpartition(":")[2]), {}) == User("bot", Role.ANNOTATE)
    assert auth.log_in("anna", PASSWORD, "10.0.0.1")[0] == User("anna", Role.READ)
    run("remove", "anna", "--file", str(file))
    assert run("list", "--file", str(file)) == ""
