"""What to annotate next, over HTTP: the host's next sample with slices and reasons, the queue, how far scoring is, and
the report.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from progidiff.active_learning.report import BATCH, build_report, format_html
from progidiff.errors import ProGiDiffError, RequestError
from progidiff.images.reading import read_grid
from progidiff.params import read_choice, read_int
from progidiff.server.background.next_sample import MAX_QUEUE, SLICES_PER_IMAGE
from progidiff.server.datastores import images
from progidiff.server.datastores.proposal_labels import refresh_original
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, MEDIUM, READ, Content, Endpoints
from progidiff.server.gate.folders import show_paths
from progidiff.server.parts import Context, get_context

logger = logging.getLogger(__name__)

_MAX_CLIENT = 200


def build_endpoints() -> Endpoints:
    """Next sample, queue, scoring."""
    endpoints = Endpoints()

    @endpoints.post(
        "/activelearning/{strategy}",
        ANNOTATE,
        tags=["ActiveLearning"],
        summary="The image and the slices to annotate next",
        takes="JSON: options of the strategy",
        body=MEDIUM,
        content=Content.PARAMS,
    )
    def pick_next_sample(
        request: Request, strategy: str, params: dict[str, Any] | None = None, user: User = CALLER
    ) -> dict[str, Any]:
        """The host's answer (id, path, what the datastore knows of the image), and beside it `slices`, `reason`,
        `scores_from`.

        The image is reserved for `client_id` (a login's name, or the address, where a client sends none). Without an
        image to give, there is no `id`: stock clients then say that nothing is left, and `message` says what to do.
        """
        params = params or {}
        client = params.get("client_id") or user.name or (request.client.host if request.client else "")
        if not isinstance(client, str) or len(client) > _MAX_CLIENT:
            raise RequestError(f"Option client_id must be text of at most {_MAX_CLIENT} letters.")
        count = read_int(params.get("num_slices", SLICES_PER_IMAGE), "num_slices", 1, 100)
        context = get_context()
        chosen = context.selection.next(client, strategy, count, user.name)
        if "image" not in chosen:
            return chosen
        image = str(chosen.pop("image"))
        logger.info("Next sample for %s: %s", client, image)
        _prepare_original(context, image)
        info = context.app.datastore().get_image_info(image)
        given = {"strategy": {strategy: {"ts": int(time.time()), "client_id": client}}}
        # Ours come last: what a client once stored with an image must not pass for the server's answer.
        return {**show_paths(request.scope, info, "path"), **given, "id": image, **chosen}

    @endpoints.get(
        "/progidiff/queue",
        READ,
        tags=["ProGiDiff"],
        summary="What is to be annotated next, and why",
        takes="Query: limit",
    )
    def list_queue(limit: int = 50) -> list[dict[str, Any]]:
        return get_context().selection.queue(read_int(limit, "limit", 1, MAX_QUEUE))

    @endpoints.get(
        "/progidiff/scoring",
        READ,
        tags=["ProGiDiff"],
        summary="How far the background scoring of the pool is, and which files are in no pool",
    )
    def describe_scoring() -> dict[str, Any]:
        left_out = getattr(get_context().app.datastore(), "left_out", ())
        return {**get_context().scorer.progress(), "left_out": [asdict(entry) for entry in left_out]}

    @endpoints.get(
        "/progidiff/report",
        READ,
        tags=["ProGiDiff"],
        summary="What annotating has brought, as JSON, or as a page with format=html",
        takes="Query: format (json, html), limit",
    )
    def describe_progress(format: str = "json", limit: int = 20) -> Response:
        context = get_context()
        kind = read_choice(format, "format", ("json", "html"))
        queue = context.selection.queue(read_int(limit, "limit", 1, MAX_QUEUE))
        textdiff = context.textdiff.engine.find_store()
        report = build_report(
            context.annotations, context.infer.engine.adapters, queue, context.options.retrain_after or BATCH, textdiff
        )
        return HTMLResponse(format_html(report)) if kind == "html" else JSONResponse(report)

    return endpoints


def _prepare_original(context: Context, image: str) -> None:
    """Have the consensus ready as the label that 3D Slicer loads with the image; without it, the image is given all the
    same.
    """
    try:
        path = images.find_image(context.app, image)
        datastore = context.app.datastore()

        refresh_original(datastore, image, context.infer.store, lambda: read_grid(path))
    except (ProGiDiffError, OSError):
        logger.exception("The consensus of '%s' could not be saved as the label original", image)
