"""Who may do what: roles, users with hashed passwords, and tokens, in files that an administrator writes.

Nothing here knows HTTP. A users file is JSON with one scrypt hash per user (`progidiff users add` writes it); a token
file has one ``name:role:token`` per line. Both are secrets: a file that every account of the machine can read is
refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from progidiff.errors import LoginError, NotFoundError, RequestError
from progidiff.storage.atomic import replace_bytes
from progidiff.storage.state_files import load_state

MIN_PASSWORD = 10
MAX_PASSWORD = 256
TOKEN_BYTES = 32
MIN_TOKEN = 20
"""Characters. A token is not slowed down by a hash as a password is, so it must be too long to guess."""

# 16 MiB and about 0.2 s per try: the second of the scrypt settings that OWASP's password storage sheet recommends.
_N, _R, _P = 2**14, 8, 5

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_FORMAT = 1


class Role(StrEnum):
    """What somebody may do; each role includes those before it.

    Example:
        >>> Role.ANNOTATE.covers(Role.READ), Role.ANNOTATE.covers(Role.ADMINISTER)
        (True, False)
    """

    READ = "read"
    ANNOTATE = "annotate"
    ADMINISTER = "administer"

    def covers(self, needed: Role) -> bool:
        """Whether this role is `needed` or more."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


def read_role(text: str, where: str) -> Role:
    """The role of this name.

    Raises:
        RequestError: if there is none; the message starts with `where`.
    """
    try:
        return Role(text.strip().lower())
    except ValueError as err:
        raise RequestError(f"{where}: '{text[:40]}' is no role; it must be {', '.join(Role)}.") from err


def check_name(name: str, where: str) -> str:
    """The name, if it is one.

    Raises:
        RequestError: if it holds anything but letters, digits, '.', '_', '@' or '-', or more than 64 of them.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}: '{name[:64]}' is no name of a user; take up to 64 letters, digits, '.', '_', '@' or '-'."
        )
    return name


def check_private(path: Path, what: str, cure: str = "Name an existing file.") -> None:
    """Refuse a file of secrets that is missing, no file, or open to every account of the machine.

    Args:
        path: The file.
        what: It is, for messages.
        cure: What to do if it is not there.

    Raises:
        RequestError: with the command that cures it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as err:
        raise RequestError(f"{what} {path} cannot be read ({err.strerror}). {cure}") from err
    if not stat.S_ISREG(mode):
        raise RequestError(f"{what} {path} is no file. Name a file.")
    if os.name != "nt" and mode & 0o007:  # Windows has no such bits.
        raise RequestError(f"{what} {path} is open to every account of this machine. Close it: chmod o-rwx {path}")


def hash_password(password: str) -> str:
    """A salted scrypt hash as text.

    Raises:
        RequestError: if the password is too short or too long.
    """
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise RequestError(
            f"A password has {MIN_PASSWORD} to {MAX_PASSWORD} characters; this one has "
            f"{len(password)}. Take another one."
        )
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, n=_N, r=_R, p=_P)
    return "$".join(("scrypt", str(_N), str(_R), str(_P), _encode(salt), _encode(digest)))


def matches_password(password: str, hashed: str) -> bool:
    """Whether `hashed` is of this password, in a time that does not tell how nearly."""
    try:
        kind, n, r, p, salt, digest = hashed.split("$")
        if kind != "scrypt" or len(password) > MAX_PASSWORD:
            return False
        wanted = base64.b64decode(digest, validate=True)
        found = hashlib.scrypt(
            password.encode(),
            salt=base64.b64decode(salt, validate=True),
            n=int(n),
            r=int(r),
            p=int(p),
            dklen=len(wanted),
        )
    except ValueError:
        return False  # A line that somebody edited by hand; `UsersFile.read` has said so.
    return hmac.compare_digest(found, wanted)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


_NOBODY = f"scrypt${_N}${_R}${_P}${_encode(bytes(16))}${_encode(bytes(64))}"
"""Checked for a name that does not exist, so that the time of the answer does not tell which names do."""


@dataclass(frozen=True)
class Account:
    """One user of a users file.

    Attributes:
        role: What the user may do.
        password: Its hash, see `hash_password`.
    """

    role: Role
    password: str


class UsersFile:
    """Users with hashed passwords in a JSON file, read again whenever it changes: a removed user is out at once.

    Safe to use from several threads.

    Args:
        path: The file; `put` creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._accounts: dict[str, Account] = {}

    def read(self) -> Mapping[str, Account]:
        """Name -> account.

        Raises:
            RequestError: if the file is missing, malformed or open to every account of the machine.
        """
        make = f"progidiff users add NAME --role administer --file {self.path}"
        check_private(self.path, "The users file", f"Name an existing file, or make it: {make}")
        with self._lock:
            status = self.path.stat()
            version = (status.st_mtime_ns, status.st_size)
            if version != self._version:
                self._accounts = _parse_users(self.path)
                self._version = version
            return self._accounts

    def put(self, name: str, role: Role, password: str) -> None:
        """Add a user, or change one's role and password.

        Raises:
            RequestError: if name, password or the file are not as they must be.
        """
        check_name(name, "users")
        accounts = dict(self.read()) if self.path.exists() else {}
        accounts[name] = Account(role, hash_password(password))
        self._write(accounts)

    def remove(self, name: str) -> None:
        """Remove a user; whoever is logged in under this name is out.

        Raises:
            NotFoundError: if there is no such user.
        """
        accounts = dict(self.read())
        if name not in accounts:
            raise NotFoundError(
                f"{self.path} has no user '{name[:64]}'; it has {', '.join(sorted(accounts)) or 'none'}."
            )
        del accounts[name]
        self._write(accounts)

    def check(self, name: str, password: str) -> Role:
        """The role of a user who gives the right password.

        Raises:
            LoginError: if the name or the password is wrong; which of them is not told.
        """
        account = self.read().get(name)
        if not matches_password(password, account.password if account else _NOBODY) or account is None:
            raise LoginError(
                "The name or the password is wrong. Try again; an administrator sets a "
                "new one with `progidiff users add`."
            )
        return account.role

    def _write(self, accounts: Mapping[str, Account]) -> None:
        users = {
            name: {"role": str(account.role), "password": account.password}
            for name, account in sorted(accounts.items())
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_private(self.path, json.dumps({"format": _FORMAT, "users": users}, indent=1).encode())


def _parse_users(path: Path) -> dict[str, Account]:
    cure = "Write it with `progidiff users add`, or restore a copy."
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise RequestError(
                f"The users file {path} has format {content['format']!r}, this version reads {_FORMAT}. {cure}"
            )
        accounts = {}
        for name, entry in content["users"].items():
            if not str(entry["password"]).startswith("scrypt$"):
                raise ValueError(f"the password of '{name}' is not hashed")
            accounts[check_name(name, str(path))] = Account(
                read_role(str(entry["role"]), f"{path}, user {name}"), str(entry["password"])
            )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise RequestError(
            f"The users file {path} is not as `progidiff users` writes it ({type(err).__name__}: {err}). {cure}"
        ) from err
    return accounts


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    replace_bytes(path, content, mode=0o600)


@dataclass(frozen=True)
class Token:
    """One token, kept as its digest.

    Attributes:
        name: Who it stands for.
        role: What it allows.
        digest: SHA-256 of the token: comparing digests tells nothing about how much of a guess was right.
    """

    name: str
    role: Role
    digest: bytes

    @classmethod
    def of(cls, name: str, role: Role, secret: str) -> Token:
        """Of the token's text."""
        return cls(name, role, hashlib.sha256(secret.encode()).digest())


LOCAL_NAME = "local"
"""Whom the token stands for that a server makes for its own machine."""

LOGIN_LINK = "/progidiff/login?token="
"""What stands before that token in the link that a browser opens."""

_LOCAL_FILE = "local-token"


def find_local_token(store: Path) -> Path:
    """Where a server with this store keeps the token of its own machine."""
    return store / "sessions" / _LOCAL_FILE


def open_local_token(store: Path) -> str:
    """The token with which this machine logs in where no other login is configured; made at the first start.

    It is an administrator's, lies in a file that only the account of the server can read, and stays the same until the
    file is deleted.

    Raises:
        RequestError: if every account of the machine can read the file.
        OSError: if it can be neither read nor written.
    """
    file = find_local_token(store)
    if file.exists():
        check_private(file, "The file with this machine's token")

    def make() -> str:
        secret = secrets.token_urlsafe(TOKEN_BYTES)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(file, f"{secret}\n".encode())
        return secret

    return load_state(file, _read_local, make, "This machine gets another token; open the link that the server prints.")


def _read_local(content: bytes) -> str:
    secret = content.decode("ascii").strip()
    if len(secret) < MIN_TOKEN:
        raise ValueError(f"{len(secret)} characters are no token")
    return secret


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file: one ``name:role:token`` per line, or a single line with a token alone, which is an
    administrator's.

    Empty lines and lines that start with # are skipped.

    Raises:
        RequestError: if the file is missing, open to every account of the machine, empty or malformed.
    """
    make = f"progidiff users token NAME --role annotate > {path}; chmod o-rwx {path}"
    check_private(path, "The token file", f"Name an existing file, or make it: {make}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as err:
        raise RequestError(
            f"The token file {path} is not text ({err.reason}). Write one name:role:token per line."
        ) from err
    entries = [(number, line) for number, line in enumerate(lines, start=1) if line and not line.startswith("#")]
    if not entries:
        raise RequestError(
            f"The token file {path} has no token. `progidiff users token NAME --role annotate` makes a line for it."
        )
    if len(entries) == 1 and ":" not in entries[0][1]:
        return (read_token(entries[0][1], f"{path}, line {entries[0][0]}"),)
    tokens = []
    for number, line in entries:
        where = f"{path}, line {number}"
        fields = line.split(":", 2)
        if len(fields) != 3:
            raise RequestError(
                f"{where} is not name:role:token. `progidiff users token NAME --role annotate` makes such a line."
            )
        tokens.append(read_token(fields[2], where, check_name(fields[0].strip(), where), read_role(fields[1], where)))
    return tuple(tokens)


def read_token(secret: str, where: str, name: str = "token", role: Role = Role.ADMINISTER) -> Token:
    """One token.

    Raises:
        RequestError: if it is too short, or holds anything but visible ASCII characters.
    """
    secret = secret.strip()
    if len(secret) < MIN_TOKEN or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise RequestError(
            f"{where}: a token has at least {MIN_TOKEN} visible ASCII characters without "
            "a space. `progidiff users token NAME` makes one."
        )
    return Token.of(name, role, secret)


def find_token(tokens: tuple[Token, ...], secret: str) -> Token | None:
    """The token with this text, or None; every one is compared, in constant time."""
    digest = hashlib.sha256(secret.encode()).digest()
    found = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token
    return found
