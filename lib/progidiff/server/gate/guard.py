"""The guard in front of every route: middlewares with one duty each, outermost first.

========================================  ==============================================================
`CORSMiddleware` (starlette)              lets pages of configured origins read answers, refusals too
`request_ids.RequestIds`                  gives every request an id, for the log and its answer
`measures.Measures`                       counts requests and their time, for /metrics
`headers.SecurityHeaders`                 says what a browser may do with an answer
`refusals.Refusals`                       makes an answer of what one of the following raises
`paths.PlainPaths`                        the path is a plain one; finds its declaration
`hosts.KnownHosts`                        the ``Host`` is a name of this server (against DNS rebinding)
`callers.Callers`                         the user is known, or on this machine
`origins.OwnOrigins`                      what changes something does not come from a foreign page
`roles.Roles`                             the user's role covers that of the address
`bodies.Bodies`                           the body stays within its limit while it arrives
`texts.Texts`                             its text can be sent back; parameters of tasks name no files
`deadlines.Deadlines`                     the answer begins in time
========================================  ==============================================================

None of them knows a route; what an address takes is in its declaration, see `progidiff.server.gate.endpoints`.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from monailabel.config import settings
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from progidiff.errors import RequestError
from progidiff.logs import JSON
from progidiff.server.gate.auth import Authenticator
from progidiff.server.gate.bodies import Bodies
from progidiff.server.gate.callers import Callers
from progidiff.server.gate.deadlines import Deadlines
from progidiff.server.gate.endpoints import EndpointTable
from progidiff.server.gate.headers import SecurityHeaders
from progidiff.server.gate.hosts import KnownHosts
from progidiff.server.gate.measures import Measures
from progidiff.server.gate.origins import OwnOrigins
from progidiff.server.gate.paths import PlainPaths
from progidiff.server.gate.refusals import Refusals
from progidiff.server.gate.request_ids import RequestIds
from progidiff.server.gate.roles import Roles
from progidiff.server.gate.texts import Texts
from progidiff.server.options import ServerOptions

logger = logging.getLogger(__name__)


def build_middlewares(table: EndpointTable, auth: Authenticator, options: ServerOptions) -> list[Middleware]:
    """The guard, outermost first."""
    guard = [
        Middleware(RequestIds, lines=options.log == JSON),
        Middleware(Measures),
        Middleware(SecurityHeaders),
        Middleware(Refusals),
        Middleware(PlainPaths, table=table),
        Middleware(KnownHosts, hosts=options.hosts, login=auth.required and not auth.only_local),
        Middleware(Callers, auth=auth),
        Middleware(OwnOrigins, origins=options.cors_origins),
        Middleware(Roles),
        Middleware(Bodies, upload=int(options.max_upload_gb * 1e9)),
        Middleware(Texts),
        Middleware(Deadlines),
    ]
    if options.cors_origins:
        origins = list(options.cors_origins)
        every = ["*"]
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_credentials=True, allow_methods=every, allow_headers=every
        )
        guard.insert(0, cors)
    return guard


def install(web: FastAPI, table: EndpointTable, auth: Authenticator, options: ServerOptions) -> None:
    """Put the guard before the routes, and the configured origins in the place of the host's CORS, which lets every
    page in.

    Safe to call again.

    Raises:
        RequestError: if the host's own login is switched on, whose check of tokens fails for valid ones and would shut
            everybody out.
    """
    if settings.MONAI_LABEL_AUTH_ENABLE:
        raise RequestError(
            "MONAI_LABEL_AUTH_ENABLE is set, and MONAI Label 0.8.5 refuses valid tokens. "
            "Unset it and use --conf users_file FILE."
        )
    guard = build_middlewares(table, auth, options)
    replaced: set[Any] = {CORSMiddleware, *(entry.cls for entry in guard)}
    web.user_middleware = [*guard, *(entry for entry in web.user_middleware if entry.cls not in replaced)]
    logger.info("Who may connect: %s.", auth.describe())
