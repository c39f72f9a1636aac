"""Our routes and error answers in the host's web application, and the end of running jobs when the server is told to
stop.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

from fastapi import FastAPI
from monailabel.interfaces.app import MONAILabelApp

from progidiff.server import memory
from progidiff.server.gate import answers, connections, guard, invitation, repeated_lines
from progidiff.server.gate.auth import Authenticator
from progidiff.server.gate.endpoints import Endpoints, build_table
from progidiff.server.gate.folders import Folders
from progidiff.server.options import ServerOptions
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.storage.atomic import remove_scratch_folders

logger = logging.getLogger(__name__)

_OURS = "is_progidiff"
"""Attribute that marks our routes among the host's, to find them again at a reload."""


_closers: list[Callable[[], None]] = []


def install(web: FastAPI, app: MONAILabelApp, modules: Sequence[Endpoints]) -> None:
    """Put our routes before the host's, our error answers in place, and end running jobs when the server is told to
    stop.

    Safe to call again after a reload of the app.

    Args:
        web: The host's web application.
        app: The app that it serves.
        modules: What they declare, of `routes.table.build_endpoints`; what comes first answers first.
    """
    router = web.router
    router.routes[:] = [route for route in router.routes if not getattr(route, _OURS, False)]
    ours = [route for module in modules for route in module.router.routes]
    for route in ours:
        setattr(route, _OURS, True)
    router.routes[:0] = ours
    web.openapi_schema = None
    memory.use_one_arena()
    remove_scratch_folders()
    context = cast(Any, app).context
    answers.install_handlers(web, _list_folders(app, context.options, context.model_dir))
    _prepare_server(context.auth, context.options)
    addresses = build_table(modules)
    if context.names is not None:
        context.names.tell({*addresses.list_words(), *app._infers, *app._trainers})
    guard.install(web, addresses, context.auth, context.options)
    web.middleware_stack = None  # Built again with these handlers at the next request.
    queues = [task.queue for task in app._infers.values() if isinstance(task, ProposalInferTask)]
    _end_jobs_on_signals([queue.close for queue in queues] + [context.training.close])


def _list_folders(app: MONAILabelApp, options: ServerOptions, model_dir: Path) -> Folders:
    secrets = [path.parent for path in (options.users_file, options.token_file) if path is not None]
    kept = (options.store, model_dir, options.adapters, options.textdiff)
    return Folders.of([app.studies, app.app_dir, tempfile.gettempdir(), Path.home(), *kept, *secrets])


def _prepare_server(auth: Authenticator, options: ServerOptions) -> None:
    """Limit the connections of the web server, and have it print the link when it listens; nothing at a reload."""
    repeated_lines.install()
    server = connections.find_server()
    if server is not None and not server.started:
        connections.limit(server.config, options)
        invitation.print_link_when_ready(server, auth)
    elif server is None and auth.local_token is not None:
        logger.info("This machine logs in with a link that `progidiff users link` prints.")


def _end_jobs_on_signals(closers: list[Callable[[], None]]) -> None:
    """On Ctrl-C or SIGTERM cancel all jobs and the training before the web server, which waits for open requests, sees
    the signal.
    """
    _closers[:] = closers
    if threading.current_thread() is not threading.main_thread():
        return  # A reload, served by a thread: the handlers are there since the start.
    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.getsignal(number)
        if callable(previous) and not isinstance(previous, _EndJobs):
            signal.signal(number, _EndJobs(previous))


class _EndJobs:
    """A signal handler in front of another one."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # In a thread: the interrupted code may hold the queue's lock.
        for close in _closers:
            threading.Thread(target=close, daemon=True).start()
        self._previous(number, frame)
