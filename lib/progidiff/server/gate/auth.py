"""Who is asking: tokens, users with passwords, and the sessions that a login starts.

A session is a signed text (name, expiry, an id, and a stamp of the password or token that it began with), sent back as
a cookie by browsers and as a bearer token by Slicer. Nothing of it is kept but the ids of sessions that were ended by a
logout, so sessions survive a restart; removing a user, changing a password or removing a token ends them at once,
because the stamp no longer fits.

What a role may do is in the declaration of each address, see `progidiff.server.gate.endpoints`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextvars
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from progidiff.errors import AccessError, BusyError, LoginError, RequestError, TooManyTriesError
from progidiff.server.gate.log_text import one_line
from progidiff.server.gate.oidc import Identity, Provider, read_settings
from progidiff.server.gate.peers import group_address
from progidiff.server.options import TOKEN, ServerOptions
from progidiff.storage.state_files import load_state
from progidiff.users import (
    LOCAL_NAME,
    TOKEN_BYTES,
    Role,
    Token,
    UsersFile,
    find_token,
    open_local_token,
    read_token,
    read_tokens,
    write_private,
)

logger = logging.getLogger(__name__)

COOKIE = "progidiff_session"
ENVIRONMENT_TOKEN = "PROGIDIFF_TOKEN"

_USER_KEY = "progidiff_user"
"""Where the guard leaves the user in the scope of a request."""

_MAX_SESSION_TEXT = 1024


@dataclass(frozen=True)
class User:
    """Who asks.

    Attributes:
        name: Of the user or token; "" for somebody without a login.
        role: What the user may do.
    """

    name: str
    role: Role


LOCAL_USER = User("", Role.ADMINISTER)
"""Everybody on this machine, if the server was started without a login."""


class Attempts:
    """Logins that failed or are being looked at, per address; too many of them and the next ones wait.

    They are never counted per name alone: ten wrong passwords from anywhere would lock the real user out.

    Args:
        per_key: Tries of an address within the window that are let pass.
        window: Seconds after which a try is forgotten.
        clock: Seconds that never go back.
    """

    MAX_KEYS = 10_000

    def __init__(self, per_key: int = 10, window: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_key = per_key
        self._window = window
        self._clock = clock
        self._tries: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def reserve(self, address: str) -> None:
        """Count a try before it is looked at, so that many at once are not looked at all.

        Raises:
            TooManyTriesError: if there were too many from this address; it says for how long.
        """
        key = group_address(address)
        with self._lock:
            now = self._clock()
            tries = self._recent(key, now)
            if len(tries) >= self._per_key:
                wait = int(tries[0] + self._window - now) + 1
                raise TooManyTriesError(
                    f"There were too many failed logins. Try again in {wait} seconds.", retry_after=wait
                )
            self._tries.setdefault(key, deque()).append(now)
            if len(self._tries) > self.MAX_KEYS:  # Somebody has thousands of addresses: forget the oldest tries.
                for oldest in sorted(self._tries, key=lambda key: self._tries[key][-1])[: self.MAX_KEYS // 2]:
                    del self._tries[oldest]

    def forgive(self, address: str) -> None:
        """Take a try back that did not fail."""
        key = group_address(address)
        with self._lock:
            tries = self._tries.get(key)
            if tries:
                tries.pop()
            if not tries:
                self._tries.pop(key, None)

    def _recent(self, key: str, now: float) -> deque[float]:
        tries = self._tries.get(key, deque())
        while tries and tries[0] <= now - self._window:
            tries.popleft()
        if not tries:
            self._tries.pop(key, None)
        return tries


_HASHERS = 2
"""Threads that look at passwords."""

_MAX_WAITING = 64
"""Logins that wait for them."""

_SEALED = "sealed "
"""Stands before what is signed and is no session; no session's text has a space."""

_KEY_FILE = "session.key"
_KEY_BYTES = 32
_ENDED_FILE = "ended.json"
_ENDED = TypeAdapter(dict[str, FiniteFloat])
"""Ids of ended sessions, and when they would have expired: seconds since 1970."""

_ALL_ENDED = "All sessions are ended; everybody logs in again."

_CLOCK_SECONDS = 600.0
"""By so much a clock may be set back without ending the sessions that began meanwhile."""

_ENDED_SECONDS = 90 * 86_400.0
"""How long ended sessions are remembered beyond their time: a clock that is ahead for a while must not revive them."""


class Authenticator:
    """Finds out who sends a request. Safe to use from several threads.

    Args:
        tokens: Bearer tokens.
        users: Users with passwords, or None.
        anonymous: What somebody without a login may do from another machine, or None for nothing.
        state: Folder for the signing key and the ended sessions; made when the first session starts.
        session_seconds: How long a login lasts.
        local_token: The text of this machine's own token, one of `tokens`; None if there is none. With it, and without
            `anonymous`, other machines are refused whatever they send.
        provider: Where users log in by OpenID Connect; None if nowhere.
    """

    def __init__(
        self,
        tokens: tuple[Token, ...],
        users: UsersFile | None,
        anonymous: Role | None,
        state: Path,
        session_seconds: float = 43_200,
        local_token: str | None = None,
        provider: Provider | None = None,
    ) -> None:
        self.provider = provider
        self.tokens = tokens
        self.users = users
        self.anonymous = anonymous
        self.session_seconds = session_seconds
        self.attempts = Attempts()
        self._state = state
        self._lock = threading.Lock()
        self.local_token = local_token
        self._hashing = ThreadPoolExecutor(_HASHERS, "progidiff-login")
        self._waiting = 0
        self._key: bytes | None = None
        self._ended: dict[str, float] | None = None

    @classmethod
    def from_options(cls, options: ServerOptions, environment: Mapping[str, str] = os.environ) -> Authenticator:
        """As `--conf` and the environment say.

        Raises:
            RequestError: if a file of secrets is missing, malformed, or open to every account of the machine.
        """
        tokens = read_tokens(options.token_file) if options.token_file else ()
        if environment.get(ENVIRONMENT_TOKEN):
            tokens = (
                *tokens,
                read_token(environment[ENVIRONMENT_TOKEN], f"The environment variable {ENVIRONMENT_TOKEN}"),
            )
        users = UsersFile(options.users_file) if options.users_file else None
        if users is not None and not users.read():
            raise RequestError(
                f"The users file {users.path} has no user. Add one: progidiff users add "
                f"NAME --role annotate --file {users.path}"
            )
        provider = Provider(read_settings(options.oidc_file)) if options.oidc_file else None
        local = None
        if not tokens and users is None and provider is None and options.login == TOKEN:
            local = _open_local(options.store)
            tokens = (Token.of(LOCAL_NAME, Role.ADMINISTER, local),)
        state, seconds = options.store / "sessions", options.session_hours * 3600
        return cls(tokens, users, options.allow_anonymous, state, seconds, local, provider)

    @property
    def required(self) -> bool:
        """Whether there is something to log in with; then nobody is let in for being on this machine."""
        return bool(self.tokens) or self.users is not None or self.provider is not None

    @property
    def only_local(self) -> bool:
        """Whether other machines are refused, whatever they send."""
        unconfigured = self.local_token is not None or not self.required
        return unconfigured and self.anonymous is None

    def describe(self) -> str:
        """Who may connect, as a line of the log."""
        if self.local_token is not None:
            with_token = "with the link that is printed where it was started"
            if self.anonymous:
                return (
                    f"everybody who reaches this server may {self.anonymous} WITHOUT A LOGIN; {with_token}, administer"
                )
            return (
                f"this machine only, {with_token}; other hosts are refused until --conf token_file or users_file is set"
            )
        ways = [f"{len(self.tokens)} tokens"] if self.tokens else []
        ways += [f"the users of {self.users.path}"] if self.users is not None else []
        ways += [f"those whom {self.provider.settings.issuer} logs in"] if self.provider is not None else []
        if ways:
            others = f"; without a login: {self.anonymous}" if self.anonymous else ""
            return f"{' and '.join(ways)}, from any address that reaches this server{others}"
        if self.anonymous:
            return (
                f"everybody who reaches this server may {self.anonymous} WITHOUT A LOGIN "
                "(--conf allow_anonymous); this machine may administer"
            )
        return (
            "this machine only, everybody on it WITHOUT A LOGIN (--conf login off); other hosts are refused until "
            "--conf token_file, users_file or allow_anonymous is set"
        )

    def find_user(self, headers: Mapping[str, str], cookies: Mapping[str, str]) -> User | None:
        """The user of a bearer token or a session cookie; None if neither is sent, or the cookie has expired.

        Raises:
            LoginError: if a bearer token is sent that is not, or no longer, valid.
        """
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            user = self._read_token(secret.strip()) or self.read_session(secret.strip())
            if user is None:
                raise LoginError(
                    "The bearer token is unknown, expired or ended by a logout. Log in "
                    "again: POST /auth/token, or /progidiff/login."
                )
            return user
        return self.read_session(cookies.get(self.name_cookie(headers.get("host", "")), ""))

    def name_cookie(self, host: str) -> str:
        """Under which name a browser keeps its session.

        Browsers do not tell ports apart: of two servers on this machine each needs a name of its own, or a login at one
        ends that at the other.

        Args:
            host: The header ``Host``.
        """
        port = host.rpartition(":")[2] if self.local_token is not None else ""
        return f"{COOKIE}_{port}" if port.isascii() and port.isdigit() else COOKIE

    def _read_token(self, secret: str) -> User | None:
        token = find_token(self.tokens, secret)
        return User(token.name, token.role) if token else None

    def log_in(self, name: str, password: str, address: str) -> tuple[User, str]:
        """Check name and password, or a token in the place of the password.

        Args:
            name: Of the user; for a token its name or nothing.
            password: Or token.
            address: Where the request comes from, to count failures.

        Returns:
            The user, and the text of a new session.

        Raises:
            LoginError: if they are wrong.
            TooManyTriesError: after too many failures.
        """
        token = find_token(self.tokens, password)
        if token is not None and name in ("", token.name):
            return User(token.name, token.role), self._start_session(token.name, _stamp(token.digest))
        self.attempts.reserve(address)
        try:
            if self.users is None:
                raise LoginError(
                    "The name or the token is wrong. Try again; an administrator gives you a line of the token file."
                )
            role = self.users.check(name, password)
        except LoginError:
            shown = one_line(name[:64])
            logger.warning("Failed login of '%s' from %s", shown, address, extra={"account": shown})
            raise
        self.attempts.forgive(address)
        return User(name, role), self._start_session(name, _stamp(self.users.read()[name].password.encode()))

    async def log_in_apart(self, name: str, password: str, address: str) -> tuple[User, str]:
        """As `log_in`, in threads of its own: each hash takes 16 MiB and a core, and the threads that answer everybody
        else must not wait for it.

        Raises:
            BusyError: if too many wait already.
        """
        if self._waiting >= _MAX_WAITING:
            raise BusyError("Too many people log in at this moment. Try again in a few seconds.")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            context = contextvars.copy_context()  # Its lines belong to the request, too.
            return await loop.run_in_executor(self._hashing, context.run, self.log_in, name, password, address)
        finally:
            self._waiting -= 1

    def start_session_of(self, identity: Identity) -> str:
        """The text of a new session of somebody whom the provider has logged in; the role lies in it."""
        if self.provider is None:
            raise LoginError("This server has no login provider. Log in with a name and a password.")
        return self._start_session(identity.name, _stamp(self.provider.fingerprint), r=str(identity.role))

    def is_of_provider(self, text: str) -> bool:
        """Whether a session's text is of somebody whom the provider has logged in."""
        return "r" in (self._open_session(text) or {})

    def seal(self, text: str) -> str:
        """A text that `unseal` knows as this server's own; it is no session."""
        return f"{_encode(text.encode())}.{_encode(self._sign(_SEALED + text))}"

    def unseal(self, sealed: str) -> str | None:
        """What `seal` was given; None if it was not."""
        body, _, signature = sealed.partition(".")
        try:
            text = _decode(body).decode()
            return text if hmac.compare_digest(_decode(signature), self._sign(_SEALED + text)) else None
        except (binascii.Error, ValueError):
            return None

    def _start_session(self, name: str, stamp: str, **more: str) -> str:
        content = {
            "n": name,
            "e": int(time.time() + self.session_seconds),
            "s": stamp,
            "i": secrets.token_hex(8),
            **more,
        }
        body = _encode(json.dumps(content, separators=(",", ":")).encode())
        return f"{body}.{_encode(self._sign(body))}"

    def read_session(self, text: str) -> User | None:
        """The user of a session's text; None if it is not ours, has expired or was ended."""
        ended = self._read_ended()  # First: a damaged list changes the key that the session is opened with.
        content = self._open_session(text)
        now = time.time()
        # One that lasts longer than a term began while the clock was ahead.
        if (
            content is None
            or not now < content["e"] <= now + self.session_seconds + _CLOCK_SECONDS
            or content["i"] in ended
        ):
            return None
        name, stamp = content["n"], content["s"]
        if "r" in content:  # Whom the provider has logged in is in no file of ours.
            known = self.provider is not None and hmac.compare_digest(_stamp(self.provider.fingerprint), stamp)
            return User(name, Role(content["r"])) if known else None
        for token in self.tokens:
            if token.name == name and hmac.compare_digest(_stamp(token.digest), stamp):
                return User(name, token.role)
        account = self.users.read().get(name) if self.users is not None else None
        if account is not None and hmac.compare_digest(_stamp(account.password.encode()), stamp):
            return User(name, account.role)
        return None

    def end_session(self, text: str) -> None:
        """Log out: this session is worth nothing from now on, also after a restart."""
        content = self._open_session(text)
        if content is None:
            return
        with self._lock:
            ended = {**self._load_ended(), content["i"]: content["e"]}
            self._ended = {key: expiry for key, expiry in ended.items() if expiry > time.time() - _ENDED_SECONDS}
            write_private(self._state / _ENDED_FILE, json.dumps(self._ended).encode())

    def _open_session(self, text: str) -> dict[str, Any] | None:
        body, dot, signature = text.partition(".")
        if not dot or len(text) > _MAX_SESSION_TEXT or not text.isascii():
            return None
        try:
            if not hmac.compare_digest(_decode(signature), self._sign(body)):
                return None
            content: dict[str, Any] = json.loads(_decode(body))
        except (binascii.Error, ValueError):
            return None
        return content

    def _sign(self, body: str) -> bytes:
        return hmac.new(self._load_key(), body.encode(), hashlib.sha256).digest()

    def _load_key(self) -> bytes:
        """The key of this server's sessions, made once; delete the file to end all of them."""
        with self._lock:
            if self._key is None:
                self._key = load_state(self._state / _KEY_FILE, _read_key, bytes, _ALL_ENDED) or self._make_key()
            return self._key

    def _make_key(self) -> bytes:
        """A new key, which ends every session. Needs the lock."""
        key = secrets.token_bytes(_KEY_BYTES)
        try:
            self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(self._state / _KEY_FILE, key)
        except OSError as err:
            logger.warning("Logins end with this run of the server: the key of sessions cannot be kept (%s)", err)
        return key

    def _read_ended(self) -> dict[str, float]:
        with self._lock:
            return self._load_ended()

    def _load_ended(self) -> dict[str, float]:
        """Needs the lock."""
        if self._ended is None:
            file = self._state / _ENDED_FILE
            known = load_state(file, _ENDED.validate_json, self._end_all, _ALL_ENDED) if file.exists() else {}
            self._ended = known
        return self._ended

    def _end_all(self) -> dict[str, float]:
        """Without the list a session that was ended would be worth something again, so all of them end."""
        self._key = self._make_key()
        return {}


def _open_local(store: Path) -> str:
    """This machine's token; one for this run if the disk refuses to keep it."""
    try:
        return open_local_token(store)
    except OSError as err:
        logger.warning("The link of this server changes with every start: its token cannot be kept (%s)", err)
        return secrets.token_urlsafe(TOKEN_BYTES)


def _read_key(content: bytes) -> bytes:
    if len(content) < _KEY_BYTES:
        raise ValueError(f"{len(content)} bytes are no signing key")
    return content


def _stamp(secret: bytes) -> str:
    return hashlib.sha256(b"session of " + secret).hexdigest()[:32]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def set_user(scope: Any, user: User) -> None:
    """Leave the user of a request where `find_user` finds it."""
    scope[_USER_KEY] = user


def find_user(scope: Any) -> User:
    """The user of a request.

    Raises:
        AccessError: if no guard has looked at the request.
    """
    user = scope.get(_USER_KEY)
    if not isinstance(user, User):
        raise AccessError(
            "Nobody has checked who sends this. Start the server with --app "
            "apps/progidiff, which puts a guard before its routes."
        )
    return user


def check_role(user: User, needed: Role) -> None:
    """Let a user pass who may do this.

    Raises:
        AccessError: if the user's role does not cover it.
    """
    if not user.role.covers(needed):
        who = f"'{user.name}'" if user.name else "somebody without a login"
        raise AccessError(
            f"This needs the role {needed}, and {who} has {user.role}. Log in as somebody "
            "else, or ask an administrator."
        )
