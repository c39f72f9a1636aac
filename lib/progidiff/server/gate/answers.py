"""Errors as JSON with a status, a reason and a cure: ours, the host's, the web framework's, and those nobody expected.

Every error answer is ``{"error": kind, "detail": what happened, why, and what to do, "suggestions": [...]}``.
"""

from __future__ import annotations

import errno
import json
import logging
import uuid
from collections.abc import Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import Scope

from progidiff.errors import BusyError, LoginError, ProGiDiffError, PromptError
from progidiff.server import counting
from progidiff.server.gate.folders import NO_FOLDERS, Folders, set_folders, show_detail
from progidiff.server.gate.log_text import one_line
from progidiff.storage.json_text import show_text, write_json

logger = logging.getLogger(__name__)

# The host's name for "there is no such strategy" is APP_INIT_ERROR.
_REQUEST_ERRORS = (MONAILabelError.INVALID_INPUT, MONAILabelError.APP_INIT_ERROR)

_CURES = {
    404: "GET /openapi.json lists the addresses that there are.",
    405: "GET /openapi.json lists the methods of every address.",
    406: "An administrator starts the server with MONAI_LABEL_SESSIONS=true.",
    429: "Wait until the running task has ended, or stop it.",
}
"""What to do about an error of the host or the framework, whose own text does not say."""


class ErrorAnswer(BaseModel):
    """What every refusal and every error looks like.

    Attributes:
        error: Its kind, a class of `progidiff.errors` or of the host.
        detail: What happened, why, and what to do about it.
        suggestions: Names that may have been meant, best first.
    """

    model_config = ConfigDict(frozen=True)

    error: str
    detail: str
    suggestions: list[str]


class JSONAnswer(JSONResponse):
    """JSON that can always be written and read, see `write_json`."""

    def render(self, content: object) -> bytes:
        """The body."""
        return write_json(content)


def install_handlers(web: FastAPI, folders: Folders = NO_FOLDERS) -> None:
    """Answer every kind of error of this web application in the one form.

    Args:
        web: The application.
        folders: Of the server, which answers name to administrators only.
    """
    set_folders(web, folders)
    handlers: dict[Any, Any] = {
        ProGiDiffError: _answer_error,
        MONAILabelException: _answer_host_error,
        json.JSONDecodeError: _answer_bad_json,
        RequestValidationError: _answer_invalid,
        HTTPException: _answer_status,
        OSError: _answer_disk_error,
        Exception: _answer_incident,
    }
    web.exception_handlers.update(handlers)


def build_answer(err: ProGiDiffError, scope: Scope) -> Response:
    """The answer to an error of ours, without folders of the server for those who have no business there."""
    headers = {}
    if isinstance(err, BusyError):
        headers["Retry-After"] = str(err.retry_after)
    if isinstance(err, LoginError):
        headers["WWW-Authenticate"] = "Bearer"
    suggestions = err.suggestions if isinstance(err, PromptError) else ()
    return _answer(err.status, type(err).__name__, show_detail(scope, str(err)), suggestions, headers)


def _answer(
    status: int, error: str, detail: str, suggestions: Sequence[str] = (), headers: dict[str, str] | None = None
) -> Response:
    counting.count_error(error)
    answer = ErrorAnswer(error=error, detail=show_text(detail, len(detail)), suggestions=list(suggestions))
    return JSONAnswer(answer.model_dump(), status_code=status, headers=headers)


async def _answer_error(request: Request, err: Exception) -> Response:
    error = cast(ProGiDiffError, err)
    logger.info(
        "%s %s -> %d %s: %s",
        request.method,
        one_line(request.url.path),
        error.status,
        type(error).__name__,
        one_line(str(error)),
    )
    return build_answer(error, request.scope)


async def _answer_host_error(request: Request, err: Exception) -> Response:
    error = cast(Any, err)  # A MONAILabelException: `error` is its kind, `msg` its text.
    if isinstance(err, (ImageNotFoundException, LabelNotFoundException)):
        status, cure = 404, " GET /datastore/?output=all lists images and labels."
    else:
        status, cure = (
            (422, " GET /info/ lists what this server offers.") if error.error in _REQUEST_ERRORS else (500, "")
        )
    logger.info("%s %s -> %d %s", request.method, one_line(request.url.path), status, one_line(str(error.msg)))
    return _answer(status, str(error.error.value), f"{show_detail(request.scope, str(error.msg)).rstrip('.')}.{cure}")


async def _answer_bad_json(request: Request, err: Exception) -> Response:
    return _answer(
        422,
        "RequestError",
        f"A form field of {request.url.path} is not JSON ({err}). Send an object, for example {{}}.",
    )


async def _answer_invalid(request: Request, err: Exception) -> Response:
    faults = []
    for fault in cast(RequestValidationError, err).errors()[:5]:
        place, *path = (str(part) for part in fault.get("loc", ("request",)))
        name = ".".join(path)
        faults.append(
            f"{place} {name}: {fault.get('msg', 'is wrong')}" if name else f"{place}: {fault.get('msg', 'is wrong')}"
        )
    reason = f"{request.method} {request.url.path} cannot be read: {'; '.join(faults)}."
    return _answer(422, "RequestError", f"{reason} GET /openapi.json says what it takes.")


async def _answer_status(request: Request, err: Exception) -> Response:
    error = cast(HTTPException, err)
    if error.status_code < 400 or error.status_code in (204, 304):
        return Response(status_code=error.status_code, headers=dict(error.headers or {}))
    reason = error.detail if isinstance(error.detail, str) else json.dumps(error.detail)
    if error.status_code in (404, 405) and reason in ("Not Found", "Method Not Allowed"):
        reason = f"There is no {request.method} {request.url.path[:200]} here"
    cure = _CURES.get(error.status_code, "GET /openapi.json says what this address takes.")
    return _answer(error.status_code, "HTTPError", f"{reason.rstrip('.')}. {cure}", headers=dict(error.headers or {}))


async def _answer_disk_error(request: Request, err: Exception) -> Response:
    """A full disk is no bug; parts that change state say more themselves."""
    if cast(OSError, err).errno not in (errno.ENOSPC, errno.EDQUOT):
        return await _answer_incident(request, err)
    logger.error("%s %s: %s", request.method, one_line(request.url.path), err)
    return _answer(
        507,
        "StoreError",
        f"The server's disk is full ({err.args[-1]}). Free some space there and send the request again.",
    )


async def _answer_incident(request: Request, err: Exception) -> Response:
    incident = uuid.uuid4().hex[:8]
    logger.error("Incident %s in %s %s", incident, request.method, one_line(request.url.path), exc_info=err)
    return _answer(
        500,
        "ProGiDiffError",
        f"The request broke unexpectedly ({type(err).__name__}, incident {incident}). The "
        "server's log has the details under this number; please report them.",
    )
