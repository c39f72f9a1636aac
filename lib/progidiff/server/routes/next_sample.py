"""What to annotate next, over HTTP: the host's next sample with slices and reasons, the queue, how far scoring is, and
the report.
"""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ConfigDict, SkipValidation

from progidiff.active_learning.answers import QueueEntry, Report, SuggestedSlice, Worklist
from progidiff.active_learning.report import BATCH, build_report, format_html
from progidiff.errors import ProGiDiffError, RequestError
from progidiff.images.folders import LeftOut
from progidiff.images.reading import read_grid
from progidiff.params import read_choice, read_int
from progidiff.server.background.next_sample import MAX_QUEUE, SLICES_PER_IMAGE, NothingLeft
from progidiff.server.background.pool_state import ALL, STATES
from progidiff.server.background.scoring import ScoringProgress
from progidiff.server.datastores import images
from progidiff.server.datastores.proposal_labels import refresh_original
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, MEDIUM, READ, Content, Endpoints
from progidiff.server.gate.folders import show_paths
from progidiff.server.parts import Context, get_context
from progidiff.storage.json_text import Text

logger = logging.getLogger(__name__)

_MAX_CLIENT = 200
_MAX_SEARCH = 200


class StrategyNote(BaseModel):
    """Which request an image was given for, as the host notes it.

    Attributes:
        ts: Seconds since 1970.
        client_id: Who asked.
    """

    model_config = ConfigDict(frozen=True)

    ts: int
    client_id: Text


class NextSample(BaseModel):
    """The image to annotate next, as the host tells it. What the datastore knows of the image (`name`, `checksum`,
    UIDs and whatever a client stored with it) stands beside these, and so more fields are let through.

    Attributes:
        id: Of the image.
        path: Of its file, for who may see where things lie; its name for others.
        strategy: The one that was asked for, and when.
        slices: Best first.
        reason: Why this image, as a sentence.
        scores_from: The model version whose scores were used; "" if none were.
        state: "new" or "started".
        modality: "CT", "MR", "picture"; "" if not known.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    id: Text
    path: Annotated[str, SkipValidation]
    strategy: dict[str, StrategyNote]
    slices: list[SuggestedSlice]
    reason: Text
    scores_from: Text
    state: str
    modality: Text


class ScoringAnswer(ScoringProgress):
    """How far the scoring is, and what of the folder is in no pool.

    Attributes:
        left_out: Files that are not served, and why.
    """

    left_out: tuple[LeftOut, ...]


# long because it is a table: one endpoint after the other, each a few lines.
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
    ) -> NextSample | NothingLeft:
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
        if isinstance(chosen, NothingLeft):
            return chosen
        image = chosen.image
        logger.info("Next sample for '%s': '%s'", client, image)
        _prepare_original(context, image)
        known = context.app.datastore().get_image_info(image)
        # Ours come last: what a client once stored with an image must not pass for the server's answer.
        told = {**known, **{name: value for name, value in chosen if name != "image"}}
        note = StrategyNote(ts=int(time.time()), client_id=client)
        return NextSample.model_validate(
            {**show_paths(request.scope, told, "path"), "strategy": {strategy: note}, "id": image}
        )

    @endpoints.get(
        "/progidiff/queue",
        READ,
        tags=["ProGiDiff"],
        summary="What is to be annotated next, and why",
        takes="Query: limit",
    )
    def list_queue(limit: int = 50) -> list[QueueEntry]:
        return get_context().selection.queue(read_int(limit, "limit", 1, MAX_QUEUE))

    @endpoints.get(
        "/progidiff/worklist",
        READ,
        tags=["ProGiDiff"],
        summary="All images with what is done on each, in the order of the strategy",
        takes="Query: state (all, todo, started, done), search, offset, limit",
    )
    def list_work(
        request: Request,
        state: str = ALL,
        search: str = "",
        offset: int = 0,
        limit: int = 50,
        user: User = CALLER,
    ) -> Worklist:
        context = get_context()
        found = context.selection.worklist(
            read_choice(state, "state", STATES),
            search[:_MAX_SEARCH],
            read_int(offset, "offset", 0, 10**9),
            read_int(limit, "limit", 1, MAX_QUEUE),
            user.name,
        )
        folder = show_paths(request.scope, {"folder": str(context.app.studies)}, "folder")["folder"]
        return found.model_copy(update={"folder": folder})

    @endpoints.get(
        "/progidiff/scoring",
        READ,
        tags=["ProGiDiff"],
        summary="How far the background scoring of the pool is, and which files are in no pool",
    )
    def describe_scoring() -> ScoringAnswer:
        left_out = getattr(get_context().app.datastore(), "left_out", ())
        return ScoringAnswer(**dict(get_context().scorer.progress()), left_out=tuple(left_out))

    @endpoints.get(
        "/progidiff/report",
        READ,
        tags=["ProGiDiff"],
        summary="What annotating has brought, as JSON, or as a page with format=html",
        takes="Query: format (json, html), limit",
        response_model=Report,
    )
    def describe_progress(format: str = "json", limit: int = 20) -> Response | Report:
        context = get_context()
        kind = read_choice(format, "format", ("json", "html"))
        queue = context.selection.queue(read_int(limit, "limit", 1, MAX_QUEUE))
        textdiff = context.textdiff.engine.find_store()
        report = build_report(
            context.annotations, context.infer.engine.adapters, queue, context.options.retrain_after or BATCH, textdiff
        )
        return HTMLResponse(format_html(report)) if kind == "html" else report

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
