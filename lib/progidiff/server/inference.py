"""An inference on an image of the datastore, through the same checks for everybody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask

from progidiff.errors import NotFoundError, RequestError
from progidiff.proposals.device_queue import NOBODY
from progidiff.proposals.request import OPTION_NAMES
from progidiff.server.datastores.images import find_image
from progidiff.server.tasks import pictures

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def infer(app: MONAILabelApp, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a task on an image of the datastore; what `MONAILabelApp.infer` does, without its way to any file of the
    server.

    Args:
        app: The app.
        request: "model" (task name), "image" (id in the datastore), "params" (dict), and optionally, never from a
            client, "path" (the file of a session or upload, which then has no id), "label" (the file of a mask that
            came along) and "asker" (an `Asker`).

    Returns:
        "file" (path of the mask), "label" (the same), "tag", "params" (dict).

    Raises:
        NotFoundError: if there is no such model or image.
        ProGiDiffError: whatever the task finds wrong.
    """
    name = str(request.get("model", ""))
    task = find_model(app, name)
    image_id = str(request.get("image", ""))
    path, info = request.get("path"), {}
    if path is None:
        path = find_image(app, image_id)
        info = app.datastore().get_image_info(image_id)
    file, params = task(
        {
            "model": name,
            "image": path,
            "image_id": image_id,
            "image_info": info,
            "params": request.get("params", {}),
            "label": request.get("label"),
            "asker": request.get("asker", NOBODY),
        }
    )
    return {"file": file, "label": file, "tag": "original", "params": params}


def find_model(app: MONAILabelApp, name: str) -> InferTask:
    """The task of this name.

    Raises:
        NotFoundError: if the app has none; the message lists what there is.
    """
    task = app._infers.get(name)
    if task is None:
        raise NotFoundError(
            f"There is no model '{name}'; this server has "
            f"{', '.join(sorted(app._infers)) or 'none'}. GET /info/ lists them."
        )
    return task


def pick_options(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a flat request is meant for the task."""
    return {name: value for name, value in request.items() if name in OPTION_NAMES or name in pictures.OPTION_NAMES}


def check_tag(tag: object) -> str:
    """The tag as text.

    Raises:
        RequestError: if it could not stand in a file's name.
    """
    text = str(getattr(tag, "value", tag))  # The host's own tags are an enumeration.
    if not _TAG.fullmatch(text):
        raise RequestError(
            f"Option label_tag is '{text[:40]}'; it must be letters, digits, '.', '_' or '-', for example original."
        )
    return text
