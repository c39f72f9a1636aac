"""The loop of annotating and training, put together: scores -> what is next -> saved labels -> training -> new
scores.
"""

from __future__ import annotations

import threading
from typing import Any

from progidiff.active_learning.reservations import Reservations
from progidiff.active_learning.scores import SliceScoreStore
from progidiff.active_learning.settings import STRATEGIES, AcquisitionConfig
from progidiff.errors import RequestError
from progidiff.images.formats import is_picture
from progidiff.labels.drawn_slices import DrawnSlices
from progidiff.labels.history import Annotation
from progidiff.server import counting
from progidiff.server.background.next_sample import Selection
from progidiff.server.background.pool_state import is_whole
from progidiff.server.background.retraining import Retraining
from progidiff.server.background.scorers import PictureScorer
from progidiff.server.background.scoring import PoolScorer
from progidiff.server.datastores.images import find_image
from progidiff.server.datastores.local import is_folder
from progidiff.server.datastores.remote_labels import RemoteLabels
from progidiff.server.metrics import build_registry
from progidiff.server.parts import Context
from progidiff.server.readiness import Readiness
from progidiff.users import read_tokens

_running: list[PoolScorer] = []


def build(context: Context) -> None:
    """Fill `context.scorer`, `context.selection`, `context.retraining` and what watches over the server; nothing runs
    yet.

    Raises:
        RequestError: if the server's options name no strategy or setting, or a token file that is none.
    """
    options = context.options
    if options.next_strategy not in STRATEGIES:
        raise RequestError(
            f"--conf next_strategy {options.next_strategy[:60]}: there is no such "
            f"strategy; there are {', '.join(STRATEGIES)}."
        )
    config = AcquisitionConfig.from_text(options.acquisition)
    scores = SliceScoreStore(options.store / "scores")

    def find_labelled() -> set[str]:
        def count(image: str) -> int | None:
            label = context.annotations.current(image)
            return label.num_slices if label else None

        return {
            image for image, slices in context.annotations.annotated_images().items() if is_whole(slices, count(image))
        }

    context.scorer = PoolScorer(
        context.app,
        context.infer,
        scores,
        options.score_prompt,
        find_labelled,
        lambda: context.training.is_running(),
        PictureScorer(context.textdiff, scores),
        len(context.infer.queue.devices),
    )
    context.drawn = DrawnSlices(context.annotations, lambda image: find_image(context.app, image))
    context.selection = Selection(
        context.app,
        context.infer,
        scores,
        context.annotations,
        Reservations(options.store / "reservations.json", options.reserve_minutes),
        context.scorer.wanted_version,
        context.scorer.failures,
        context.scorer.fingerprint,
        config,
        options.next_strategy,
        options.reserve_minutes,
        context.textdiff.engine.find_store,
        context.readings,
    )
    context.retraining = Retraining(
        options,
        context.annotations,
        context.training,
        lambda image: is_folder(context.app.studies) and is_picture(context.app.datastore().get_image_uri(image) or ""),
        context.scorer.wake,
    )
    context.on_saved += [lambda annotation: _release(context, annotation), context.retraining.on_saved]
    context.on_published.append(context.retraining.on_published)
    context.on_ended += [context.retraining.on_ended, counting.note_training]
    counting.watch_queue(context.infer.queue)
    context.readiness = Readiness(context.app, context.infer, warms_up=options.warm_up)
    context.registry = build_registry(context)
    if options.metrics_token_file is not None:
        context.metrics_tokens = read_tokens(options.metrics_token_file)


def start(context: Context, studies: str) -> None:
    """Begin to warm up and to score in the background, and continue an interrupted training, if the options say so. The
    scorer of a reloaded app ends.

    Scores that are on disk are read ahead of the first request, in the background too: the server is ready without
    them.
    """
    if context.options.warm_up:
        context.readiness.begin()
    for scorer in _running:
        scorer.stop()
    _running[:] = [context.scorer]
    if context.options.score_pool == "on" or (context.options.score_pool == "auto" and is_folder(studies)):
        context.scorer.start(first=context.selection.prepare)  # in one thread: both read the same files
    else:
        threading.Thread(target=context.selection.prepare, name="progidiff-first-look", daemon=True).start()
    context.retraining.resume()


def build_remote_labels(context: Context) -> RemoteLabels:
    """The labels of an app whose studies are behind an address."""
    app, store = context.app, context.options.store
    context.annotations.set_aside_unfinished()
    return RemoteLabels(
        app.datastore, lambda image_id: find_image(app, image_id), store, context.annotations, context.infer.store
    )


def _release(context: Context, annotation: Annotation) -> dict[str, Any]:
    context.selection.release(annotation.image)
    return {}
