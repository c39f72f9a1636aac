"""What the host itself calls: batches, and what it says about the app."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.app import MONAILabelApp

from progidiff.errors import ProGiDiffError
from progidiff.server.inference import check_tag, infer, pick_options

logger = logging.getLogger(__name__)


def infer_for_host(app: MONAILabelApp, request: Mapping[str, Any]) -> dict[str, Any]:
    """`infer` for calls that the host makes itself (batches), whose options lie flat in the request.

    Args:
        app: The app.
        request: "model", "image" (id), options of the task, and "save_label" and "label_tag" to save the mask.

    Returns:
        As `infer`; "label" is the image id if the mask was saved.
    """
    tag = check_tag(request.get("label_tag") or "original")
    result = infer(app, {"model": request.get("model"), "image": request.get("image"), "params": pick_options(request)})
    if request.get("save_label"):
        info = {"model": request.get("model"), "params": result["params"]}
        result["label"] = app.datastore().save_label(str(request.get("image")), result["file"], tag, info)
        result["tag"] = tag
    return result


def batch_infer(app: MONAILabelApp, request: Mapping[str, Any]) -> dict[str, Any]:
    """The host's batch over the images of the datastore, one after the other, each mask saved as a label.

    Args:
        app: The app.
        request: "model", "images" ("all", "labeled", "unlabeled" or ids), "max_batch_size", "label_tag", and options of
            the task.

    Returns:
        Image id -> what `infer_for_host` gives, or {"error": reason}: an image that fails does not end the batch.
    """

    def infer_one(request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        try:
            return infer_for_host(app, request)
        except ProGiDiffError as err:
            logger.warning("Batch: '%s' is left out: %s", request.get("image"), err)
            return {"error": str(err)}

    # The host deals images to GPUs, in threads, and divides by their number. Here the device has a queue of its own.
    return dict(app._batch_infer({**request, "multi_gpu": False, "max_workers": 1}, app.datastore(), infer_one))


def get_info(app: MONAILabelApp) -> dict[str, Any]:
    """What `MONAILabelApp.info` returns; if the datastore cannot be asked, its part says so instead of failing the
    whole request.
    """
    try:
        found: dict[str, Any] = MONAILabelApp.info(app)
        return found
    except Exception as err:
        logger.exception("info() without the datastore's part")
        return {
            "name": app.name,
            "description": app.description,
            "version": app.version,
            "labels": app.labels or [],
            "models": {name: task.info() for name, task in app._infers.items()},
            "trainers": {},
            "strategies": {name: strategy.info() for name, strategy in app._strategies.items()},
            "scoring": {},
            "train_stats": {},
            "datastore": {
                "total": 0,
                "completed": 0,
                "label_tags": {},
                "error": f"The datastore does not answer: {err}",
            },
        }
