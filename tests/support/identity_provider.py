"""A small OpenID provider on this machine, which logs everybody in at once and does wrong what a test tells it to."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey


@functools.cache
def make_key(name: str) -> RSAKey:
    """The key of this name; slow the first time."""
    return RSAKey.generate_key(2048, {"kid": name})


SECRET = "the-secret-of-this-client"


@dataclass
class IdentityProvider:
    """What it says and does.

    Attributes:
        issuer: Its address.
        claims: What it says of the account, beside what a token must have.
        wrong: In the place of what it would say in a token (None leaves it out); `iss`, `aud`, `nonce`, ...
        offset: By so many seconds its clock is ahead.
        user_info: What it says at the address for that; None if it has none.
        down: Whether it answers 500 to everything.
        algorithm: Of its signatures.
        asked: Paths of the requests so far.
    """

    issuer: str = ""
    claims: dict[str, Any] = field(default_factory=lambda: {"preferred_username": "anna", "groups": ["annotators"]})
    wrong: dict[str, Any] = field(default_factory=dict)
    offset: float = 0.0
    user_info: dict[str, Any] | None = None
    down: bool = False
    algorithm: str = "RS256"
    key: RSAKey = field(default_factory=lambda: make_key("one"))
    published: RSAKey | None = None
    secret: str = SECRET
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, query: dict[str, str], form: dict[str, str], authorization: str) -> tuple[int, Any]:
        """Status and JSON, or status and the address to lead to."""
        self.asked.append(path)
        if self.down:
            return 500, {"error": "down"}
        if path == "/.well-known/openid-configuration":
            return 200, self._describe()
        if path == "/keys":
            return 200, {"keys": [(self.published or self.key).as_dict(private=False)]}
        if path == "/authorize":
            code = hashlib.sha256(query["state"].encode()).hexdigest()
            self.codes[code] = query
            return 303, f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"
        if path == "/userinfo" and self.user_info is not None:
            return 200, self.user_info
        return self._give_token(form, authorization) if path == "/token" else (404, {})

    def _describe(self) -> dict[str, Any]:
        page = {"userinfo_endpoint": f"{self.issuer}/userinfo"} if self.user_info is not None else {}
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "end_session_endpoint": f"{self.issuer}/logout",
            **page,
        }

    def _give_token(self, form: dict[str, str], authorization: str) -> tuple[int, Any]:
        asked = self.codes.pop(form.get("code", ""), None)  # Once.
        challenge = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if asked is None or form.get("grant_type") != "authorization_code":
            return 400, {"error": "invalid_grant"}
        if asked["code_challenge_method"] != "S256" or asked["code_challenge"] != _encode(challenge):
            return 400, {"error": "invalid_grant", "error_description": "PKCE"}
        if asked["redirect_uri"] != form.get("redirect_uri"):
            return 400, {"error": "invalid_grant", "error_description": "redirect_uri"}
        expected = base64.b64encode(f"{asked['client_id']}:{self.secret}".encode()).decode()
        if authorization != f"Basic {expected}":
            return 401, {"error": "invalid_client"}
        now = time.time() + self.offset
        access = "an-access-token"
        claims = {
            "iss": self.issuer,
            "sub": "id-0815",
            "aud": asked["client_id"],
            "iat": int(now),
            "exp": int(now + 300),
            "nonce": asked["nonce"],
            "at_hash": _encode(hashlib.sha256(access.encode()).digest()[:16]),
            **self.claims,
            **self.wrong,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        header = {"alg": self.algorithm, "kid": self.key.kid}
        signed = jwt.encode(header, claims, self.key, algorithms=[self.algorithm])
        return 200, {"access_token": access, "token_type": "Bearer", "expires_in": 300, "id_token": signed}


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@contextlib.contextmanager
def run_provider() -> Iterator[IdentityProvider]:
    """The provider, on a free port of the loop-back interface."""
    provider = IdentityProvider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            self.send(*provider.answer(parts.path, dict(parse_qsl(parts.query)), {}, ""))

        def do_POST(self) -> None:
            form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send(*provider.answer(self.path, {}, form, self.headers.get("Authorization", "")))

        def send(self, status: int, content: Any) -> None:
            self.send_response(status)
            if isinstance(content, str):
                self.send_header("Location", content)
            body = b"" if isinstance(content, str) else json.dumps(content).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.issuer = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
