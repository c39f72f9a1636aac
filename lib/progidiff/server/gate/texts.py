"""What bodies say: JSON that can be sent back, forms in UTF-8, and no parameter of a task that names a file."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.errors import RequestError
from progidiff.server.gate.endpoints import Content, get_endpoint
from progidiff.storage.json_text import MAX_CHARACTERS, read_json

FORBIDDEN_PARAMS = (
    "bundle_path",
    "image",
    "path",
    "session",
    "file",
    "model_dir",
    "model_path",
    "backbone",
    "store",
    "adapters",
    "app_dir",
    "studies",
)
"""Parameters of tasks that would name a file, a folder or another input; the host hands some of them to the environment
of a process.
"""

_ENCODINGS = ("utf-8", "utf8", "us-ascii", "ascii")


class Texts:
    """Reads the JSON of an address that takes some, before the route does.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the text of one request."""
        if scope["type"] == "http":
            _check_encoding(Headers(scope=scope))
            endpoint = get_endpoint(scope)
            content = endpoint.content
            if content is not Content.ANY:
                body = await _read(receive)
                value = read_json(body, "The body", most=max(MAX_CHARACTERS, endpoint.body))
                if content is Content.PARAMS:
                    _check_params(value)
                receive = _replay(body, receive)
        await self.app(scope, receive, send)


def _check_encoding(headers: Headers) -> None:
    """Refuse a form that names its own decoder: some of Python's make text that cannot be sent back."""
    for part in headers.get("content-type", "").split(";")[1:]:
        name, _, encoding = part.partition("=")
        if name.strip().lower() == "charset" and encoding.strip(" \t\"'").lower() not in _ENCODINGS:
            raise RequestError(f"The text of the request is in {encoding.strip()[:40]}. Send UTF-8.")


def _check_params(value: Any) -> None:
    """Refuse parameters of a task that name a file or another input, at the top or one level down, where the host looks
    too.
    """
    if value is None:
        return
    if not isinstance(value, dict):
        raise RequestError(f"The body is a JSON {type(value).__name__}. Send an object, for example {{}}.")
    for level in (value, *(entry for entry in value.values() if isinstance(entry, dict))):
        for name in level:
            if name.strip().lower() in FORBIDDEN_PARAMS:
                raise RequestError(
                    f"Parameter {name[:40]} cannot be set by a request. Leave it out; "
                    "files and folders are set by --conf."
                )


async def _read(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more for the route, then whatever comes after it."""
    left = [body]

    async def receive_again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return receive_again
