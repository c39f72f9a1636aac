"""Logins by OpenID Connect: a provider of the hospital says who somebody is, and its groups say what they may do.

The authorization code flow with PKCE. What a login must remember between its two steps is a signed cookie of the
browser that began it, so that nothing is kept here for somebody who never comes back, and nobody can finish a login
that another browser began. A login can be finished once.

The provider is asked when somebody logs in and not before: the server starts without it, and users of the users file
log in without it. Whoever is removed there stays in here until the session ends (`--conf session_hours`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests
import yaml
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from progidiff.errors import AccessError, BusyError, LoginError, RequestError
from progidiff.server.gate.log_text import one_line
from progidiff.users import Role, check_name, check_private

logger = logging.getLogger(__name__)

LOGIN_SECONDS = 600.0
"""Time to log in at the provider."""

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures by a key that only the provider has; "none" and those by a shared secret are not among them."""

_WAIT_SECONDS = 10.0
_METADATA_SECONDS = 3600.0
_KEYS_SECONDS = 60.0
"""Unknown keys are looked for again after so long."""
_DOWN_SECONDS = 5.0
"""So long a provider that did not answer is not asked again: each try holds a thread of the server."""
_DOWN_RETRY = 60
"""Seconds after which people are told to try again."""
_MAX_FINISHED = 10_000


class ProviderSettings(BaseModel):
    """The file of `--conf oidc_file`.

    Attributes:
        issuer: Address of the provider, as it calls itself.
        client_id: Under which this server is registered there.
        client_secret: "" for a public client, which PKCE alone protects.
        title: What the button on the login page says after "Log in with".
        scopes: What is asked for.
        name_claim: The claim with the name of the account; `sub` where it is missing.
        role_claim: The claim with the groups; dots lead into objects (`realm_access.roles`).
        roles: Group -> role; of several the one with most rights.
        default_role: Of somebody in none of these groups; None to refuse them.
        public_url: Address of this server for browsers, if a proxy in front of it does not say.
        clock_skew_seconds: By so much the clocks of both may differ, 0..300.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str
    client_id: str = Field(min_length=1)
    client_secret: str = ""
    title: str = Field("the hospital's account", max_length=60)
    scopes: tuple[str, ...] = ("openid", "profile")
    name_claim: str = "preferred_username"
    role_claim: str = "groups"
    roles: dict[str, Role] = {}
    default_role: Role | None = None
    public_url: str = ""
    clock_skew_seconds: float = Field(60.0, ge=0, le=300)

    @field_validator("issuer")
    @classmethod
    def _check_issuer(cls, issuer: str) -> str:
        parts = urlsplit(issuer)
        if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")):
            return issuer
        raise ValueError("it must begin with https://")

    @field_validator("scopes")
    @classmethod
    def _check_scopes(cls, scopes: tuple[str, ...]) -> tuple[str, ...]:
        return scopes if "openid" in scopes else ("openid", *scopes)


def read_settings(path: Path) -> ProviderSettings:
    """What the file says.

    Raises:
        RequestError: if it is missing, open to every account of the machine, or not as it must be.
    """
    check_private(path, "The file of --conf oidc_file")
    try:
        settings = ProviderSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        fault = " ".join(str(err).split())[:200]
        raise RequestError(f"{path} is not YAML ({fault}). See docs/how-to/users.md.") from err
    except ValidationError as err:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in err.errors()[:5])
        raise RequestError(f"{path} does not describe a provider ({faults}). See docs/how-to/users.md.") from err
    if not settings.roles and settings.default_role is None:
        raise RequestError(f"{path} lets nobody in. Name groups under `roles`, or a `default_role`.")
    return settings


@dataclass(frozen=True)
class Begun:
    """A login that waits for the provider.

    Attributes:
        state: Comes back with the browser.
        nonce: Comes back in the signed token.
        verifier: Of PKCE; only who has it can use the code.
        target: Address of this server to go to.
        expires: Seconds since 1970.
    """

    state: str
    nonce: str
    verifier: str
    target: str
    expires: float

    def to_text(self) -> str:
        """For the cookie."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Begun:
        """The inverse of `to_text`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Identity:
    """Who somebody is.

    Attributes:
        name: Of the account.
        role: What the groups allow.
    """

    name: str
    role: Role


class Provider:
    """An OpenID provider. Safe to use from several threads.

    Args:
        settings: From the file.
        clock: Seconds since 1970.
    """

    def __init__(self, settings: ProviderSettings, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._metadata: tuple[float, dict[str, Any]] | None = None
        self._keys: tuple[float, KeySet] | None = None
        self._down: tuple[float, str] | None = None
        self._finished: OrderedDict[str, None] = OrderedDict()

    @property
    def fingerprint(self) -> bytes:
        """Changes when the meaning of a login does: sessions that began before end then."""
        meaning = self.settings.model_dump_json(exclude={"client_secret", "title", "public_url", "clock_skew_seconds"})
        return hashlib.sha256(meaning.encode()).digest()

    def begin(self, redirect: str, target: str) -> tuple[str, Begun]:
        """The address of the provider to lead the browser to, and what to remember.

        Raises:
            BusyError: if the provider does not answer.
        """
        metadata = self._find_metadata()
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        begun = Begun(state, nonce, verifier, target, self._clock() + LOGIN_SECONDS)
        with self._open_session(redirect, metadata) as session:
            url, _ = session.create_authorization_url(
                metadata["authorization_endpoint"],
                state=begun.state,
                nonce=begun.nonce,
                code_verifier=begun.verifier,
            )
        return str(url), begun

    def finish(self, begun: Begun | None, answer: Mapping[str, str], redirect: str) -> Identity:
        """Who came back from the provider.

        Args:
            begun: Of the browser's cookie; None if it has none.
            answer: The query of the provider's answer.
            redirect: As in `begin`.

        Raises:
            LoginError: if the answer, or the token in it, is not good.
            AccessError: if it is, and the account may do nothing here.
            BusyError: if the provider does not answer.
        """
        again = "Begin again at the login page."
        if begun is None or not secrets.compare_digest(begun.state.encode(), answer.get("state", "").encode()):
            raise LoginError(f"This login was not begun in this browser. {again}")
        if self._clock() > begun.expires:
            raise LoginError(f"This login took longer than {LOGIN_SECONDS / 60:.0f} minutes. {again}")
        if answer.get("iss", self.settings.issuer) != self.settings.issuer:
            raise LoginError(f"The answer to this login comes from another provider. {again}")
        self._use_up(begun.state)
        if "error" in answer:
            told = f"{answer['error']} {answer.get('error_description', '')}".strip()[:300]
            raise LoginError(f"The provider did not log you in ({told}). {again}")
        claims = self._fetch_claims(begun, answer.get("code", ""), redirect)
        return self._identify(claims)

    def find_logout(self, back: str) -> str:
        """Where a browser logs out at the provider too; "" if the provider has no such page or has not been asked yet.

        Args:
            back: Address of this server to come back to.
        """
        known = self._metadata
        page = str(known[1].get("end_session_endpoint", "")) if known is not None else ""
        query = urlencode({"client_id": self.settings.client_id, "post_logout_redirect_uri": back})
        return f"{page}{'&' if '?' in page else '?'}{query}" if page else ""

    def _use_up(self, state: str) -> None:
        with self._lock:
            if state in self._finished:
                raise LoginError("This login was finished already. Begin again at the login page.")
            self._finished[state] = None
            while len(self._finished) > _MAX_FINISHED:
                self._finished.popitem(last=False)

    def _open_session(self, redirect: str, metadata: Mapping[str, Any]) -> OAuth2Session:
        settings = self.settings
        ways = metadata.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        secret_way = "client_secret_basic" if "client_secret_basic" in ways else "client_secret_post"
        return OAuth2Session(
            settings.client_id,
            settings.client_secret or None,
            token_endpoint_auth_method=secret_way if settings.client_secret else "none",
            scope=" ".join(settings.scopes),
            redirect_uri=redirect,
            code_challenge_method="S256",
        )

    def _fetch_claims(self, begun: Begun, code: str, redirect: str) -> dict[str, Any]:
        metadata = self._find_metadata()
        try:
            with self._open_session(redirect, metadata) as session:
                token = session.fetch_token(
                    metadata["token_endpoint"],
                    grant_type="authorization_code",
                    code=code,
                    code_verifier=begun.verifier,
                    timeout=_WAIT_SECONDS,
                )
        except (requests.RequestException, ValueError) as err:
            raise self._note_down(err) from err
        except OAuthError as err:
            logger.warning("The provider refused the code of a login: %s", one_line(str(err)))
            raise LoginError(
                f"The provider did not accept the login ({str(err)[:200]}). Begin again at the login page; if it "
                "stays, an administrator looks at client_id and client_secret in the file of --conf oidc_file."
            ) from err
        id_token, access_token = (str(token.get(name) or "") for name in ("id_token", "access_token"))
        claims = self._read_id_token(id_token, access_token, begun.nonce)
        if _find_claim(claims, self.settings.role_claim) is None and metadata.get("userinfo_endpoint"):
            claims = {**self._fetch_user_info(metadata["userinfo_endpoint"], token, claims["sub"]), **claims}
        return claims

    def _read_id_token(self, text: str, access_token: str, nonce: str) -> dict[str, Any]:
        settings = self.settings
        cure = "Begin again; if it stays, an administrator compares issuer, client_id and both clocks."
        try:
            decoded = self._decode(text)
            options = {
                "iss": {"essential": True, "value": settings.issuer},
                "aud": {"essential": True, "value": settings.client_id},
            }
            params = {"nonce": nonce, "client_id": settings.client_id, "access_token": access_token}
            claims = CodeIDToken(decoded.claims, decoded.header, options, params)
            claims.validate(now=int(self._clock()), leeway=int(settings.clock_skew_seconds))
        except (JoseError, ValueError, TypeError, KeyError) as err:
            logger.warning("The token of a login is not good: %s", one_line(str(err)))
            raise LoginError(f"The provider's token is not good ({str(err)[:200]}). {cure}") from err
        return dict(claims)

    def _decode(self, text: str) -> jwt.Token:
        try:
            return jwt.decode(text, self._find_keys(), algorithms=_ALGORITHMS)
        except (JoseError, ValueError):
            known = self._keys
            if known is None or self._clock() - known[0] < _KEYS_SECONDS:
                raise
        self._keys = None  # Providers change their keys.
        return jwt.decode(text, self._find_keys(), algorithms=_ALGORITHMS)

    def _fetch_user_info(self, address: str, token: Mapping[str, Any], subject: str) -> dict[str, Any]:
        told = self._get_json(address, {"Authorization": f"Bearer {token.get('access_token')}"})
        if told.get("sub") != subject:
            raise LoginError("The provider told of another account than it logged in. Begin again at the login page.")
        return told

    def _identify(self, claims: Mapping[str, Any]) -> Identity:
        settings = self.settings
        name = str(_find_claim(claims, settings.name_claim) or claims["sub"])
        try:
            check_name(name, "name")
        except RequestError:
            try:
                name = check_name(str(claims["sub"]), "sub")
            except RequestError as err:
                raise AccessError(
                    f"The account's name '{name[:64]}' has other letters than names of this server have. An "
                    "administrator sets another name_claim in the file of --conf oidc_file."
                ) from err
        groups = _find_claim(claims, settings.role_claim)
        groups = [groups] if isinstance(groups, str) else groups if isinstance(groups, list) else []
        roles = [settings.roles[group] for group in groups if isinstance(group, str) and group in settings.roles]
        order = list(Role)
        role = max(roles, key=order.index, default=settings.default_role)
        if role is None:
            raise AccessError(
                f"'{name}' is logged in at the provider and in none of the groups that may use this server. Ask for "
                "one of them; an administrator names them under `roles` in the file of --conf oidc_file."
            )
        return Identity(name, role)

    def _find_metadata(self) -> dict[str, Any]:
        known = self._metadata
        if known is not None and self._clock() - known[0] < _METADATA_SECONDS:
            return known[1]
        address = f"{self.settings.issuer.rstrip('/')}/.well-known/openid-configuration"
        metadata = self._get_json(address)
        needed = ("authorization_endpoint", "token_endpoint", "jwks_uri")
        missing = [name for name in needed if not isinstance(metadata.get(name), str)]
        if metadata.get("issuer") != self.settings.issuer or missing:
            wrong = f"has no {', '.join(missing)}" if missing else f"calls itself '{metadata.get('issuer')}'"
            raise BusyError(
                f"The provider at {self.settings.issuer} {wrong}. An administrator corrects issuer in the file of "
                "--conf oidc_file."
            )
        self._metadata = (self._clock(), metadata)
        return metadata

    def _find_keys(self) -> KeySet:
        known = self._keys
        if known is None or self._clock() - known[0] > _METADATA_SECONDS:
            keys: Any = self._get_json(str(self._find_metadata()["jwks_uri"]))
            known = self._keys = (self._clock(), KeySet.import_key_set(keys))
        return known[1]

    def _get_json(self, address: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        if self._down is not None and self._clock() - self._down[0] < _DOWN_SECONDS:
            raise BusyError(self._down[1], retry_after=_DOWN_RETRY)
        try:
            answer = requests.get(address, headers=dict(headers or {}), timeout=_WAIT_SECONDS)
            answer.raise_for_status()
            told = answer.json()
            if not isinstance(told, dict):
                raise ValueError("it answered no JSON object")
        except (requests.RequestException, ValueError) as err:
            raise self._note_down(err) from err
        self._down = None
        return told

    def _note_down(self, err: Exception) -> BusyError:
        logger.warning("The login provider cannot be asked: %s", one_line(str(err)))
        host = urlsplit(self.settings.issuer).hostname
        told = (
            f"The login provider {host} does not answer as one ({type(err).__name__}). "
            "Try again in a minute, or log in with a name and password of this server; an administrator looks whether "
            "the server reaches it."
        )
        self._down = (self._clock(), told)
        return BusyError(told, retry_after=_DOWN_RETRY)


def _find_claim(claims: Mapping[str, Any], path: str) -> Any:
    """What stands under a name, or under names with dots between them; None if nothing does.

    Example:
        >>> claims = {"realm_access": {"roles": ["a"]}, "a.b": 1}
        >>> _find_claim(claims, "realm_access.roles"), _find_claim(claims, "a.b"), _find_claim(claims, "groups")
        (['a'], 1, None)
    """
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
