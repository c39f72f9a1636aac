"""Everything HTTP: our routes in the host's web application, and errors as JSON with a status, a reason and a cure.

Concurrency: the host runs an inference inside an `async` route, which freezes the whole server for as long as it lasts. The
route ``POST /infer/{model}`` here comes before the host's, takes the same form and gives the same answers, and is a plain
function: the web framework runs it in its thread pool, and `progidiff.jobs.DeviceQueue` lets one at a time onto the device.

Trust: an image is only ever named by its id in the datastore, by a session, or uploaded with the request. A request can
name no file of the server.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, cast

from fastapi import APIRouter, BackgroundTasks, FastAPI, File, Form, UploadFile
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.endpoints.batch_infer import run as start_batch
from monailabel.endpoints.infer import ResultType, send_response
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.utils.app import app_instance

from progidiff.errors import BusyError, NotFoundError, ProGiDiffError, RequestError
from progidiff.options import OPTION_NAMES, read_choice, read_int
from progidiff.server import answers, guard, memory, textdiff_task
from progidiff.server.auth import CAN_ADMINISTER, CAN_ANNOTATE, CAN_READ, User
from progidiff.server.context import get_context
from progidiff.server.infer_task import ProposalInferTask
from progidiff.server.slice_task import SliceInferTask
from progidiff.server.textdiff_task import TextDiffInferTask

logger = logging.getLogger(__name__)

_OURS = "is_progidiff"
"""Attribute that marks our routes among the host's, to find them again at a reload."""

_SESSION_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_SERIES_UID = re.compile(r"\d+(\.\d+)+")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UPLOAD_SUFFIX = re.compile(r"(\.nii\.gz|\.nii|\.nrrd|\.mha|\.png|\.jpe?g|\.tiff?)$", re.IGNORECASE)

_DOWNLOADS = threading.Lock()
"""The host takes a DICOM folder that another thread is still filling for a whole series."""

_closers: list[Callable[[], None]] = []


def install(web: FastAPI, app: MONAILabelApp, routers: Sequence[APIRouter]) -> None:
    """Put our routes before the host's, our error answers in place, and end running jobs when the server is told to stop.

    Safe to call again after a reload of the app.

    Args:
        web: The host's web application.
        app: The app that it serves.
        routers: Of `routes.build_routers`; what comes first answers first.
    """
    router = web.router
    router.routes[:] = [route for route in router.routes if not getattr(route, _OURS, False)]
    ours = [route for part in routers for route in part.routes]
    for route in ours:
        setattr(route, _OURS, True)
    router.routes[:0] = ours
    web.openapi_schema = None
    memory.use_one_arena()
    answers.install_handlers(web)
    context = cast(Any, app).context
    guard.install(web, context.auth, context.options)
    web.middleware_stack = None  # Built again with these handlers at the next request.
    queues = [task.queue for task in app._infers.values() if isinstance(task, ProposalInferTask)]
    _end_jobs_on_signals([queue.close for queue in queues] + [context.training.close])


def infer(app: MONAILabelApp, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a task on an image of the datastore; what `MONAILabelApp.infer` does, without its way to any file of the server.

    Args:
        app: The app.
        request: "model" (task name), "image" (id in the datastore), "params" (dict), and optionally "path", set only by this
            module: the file of a session or upload, which then has no id.

    Returns:
        "file" (path of the mask), "label" (the same), "tag", "params" (dict).

    Raises:
        NotFoundError: if there is no such model or image.
        ProGiDiffError: whatever the task finds wrong.
    """
    name = str(request.get("model", ""))
    task = _find_model(app, name)
    image_id = str(request.get("image", ""))
    path, info = request.get("path"), {}
    if path is None:
        path = find_image(app, image_id)
        info = app.datastore().get_image_info(image_id)
    file, params = task({"model": name, "image": path, "image_id": image_id, "image_info": info, "params": request.get("params", {})})
    return {"file": file, "label": file, "tag": "original", "params": params}


def _find_model(app: MONAILabelApp, name: str) -> InferTask:
    task = app._infers.get(name)
    if task is None:
        raise NotFoundError(f"There is no model '{name}'; this server has {', '.join(sorted(app._infers)) or 'none'}. GET /info/ lists them.")
    return task


def infer_for_host(app: MONAILabelApp, request: Mapping[str, Any]) -> dict[str, Any]:
    """`infer` for calls that the host makes itself (batches), whose options lie flat in the request.

    Args:
        app: The app.
        request: "model", "image" (id), options of the task, and "save_label" and "label_tag" to save the mask.

    Returns:
        As `infer`; "label" is the image id if the mask was saved.
    """
    tag = _check_tag(request.get("label_tag") or "original")
    result = infer(app, {"model": request.get("model"), "image": request.get("image"), "params": _pick_options(request)})
    if request.get("save_label"):
        info = {"model": request.get("model"), "params": result["params"]}
        result["label"] = app.datastore().save_label(str(request.get("image")), result["file"], tag, info)
        result["tag"] = tag
    return result


def _pick_options(request: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name in OPTION_NAMES or name in textdiff_task.OPTION_NAMES}


def batch_infer(app: MONAILabelApp, request: Mapping[str, Any]) -> dict[str, Any]:
    """The host's batch over the images of the datastore, one after the other, each mask saved as a label.

    Args:
        app: The app.
        request: "model", "images" ("all", "labeled", "unlabeled" or ids), "max_batch_size", "label_tag", and options of the task.

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


def find_image(app: MONAILabelApp, image_id: str) -> str:
    """The path of an image of the datastore.

    Raises:
        NotFoundError: if the datastore has no image of this id, or its file is gone.
        BusyError: if a DICOMweb server does not answer.
    """
    datastore = app.datastore()
    try:
        known = bool(image_id) and (image_id in datastore.list_images() or _is_series(datastore, image_id))
        with _DOWNLOADS:
            path = datastore.get_image_uri(image_id) if known else ""
    except (IndexError, KeyError):
        known = False  # How the host's DICOMweb datastore says that the server has no such series.
    except OSError as err:
        raise BusyError(f"The datastore does not answer ({err}). See that the DICOMweb server or the studies folder is there; try again.") from err
    if not known:
        raise NotFoundError(
            f"There is no image '{image_id[:100]}' in the datastore. GET /datastore/?output=all lists the ids; PUT /session/ takes other images."
        )
    if not path or not Path(path).exists():
        raise NotFoundError(f"The file of image '{image_id}' is gone from the studies folder. Put it back, or remove the image from the datastore.")
    return str(path)


def _is_series(datastore: Datastore, image_id: str) -> bool:
    """Whether the id may name a series that a DICOMweb server has and the host's list leaves out: new since it was asked, or not CT."""
    return isinstance(datastore, DICOMWebDatastore) and len(image_id) <= 64 and _SERIES_UID.fullmatch(image_id) is not None


def get_info(app: MONAILabelApp) -> dict[str, Any]:
    """What `MONAILabelApp.info` returns; if the datastore cannot be asked, its part says so instead of failing the whole request."""
    try:
        return MONAILabelApp.info(app)
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
            "datastore": {"total": 0, "completed": 0, "label_tags": {}, "error": f"The datastore does not answer: {err}"},
        }


def _end_jobs_on_signals(closers: list[Callable[[], None]]) -> None:
    """On Ctrl-C or SIGTERM cancel all jobs and the training before the web server, which waits for open requests, sees the signal."""
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


def build_router() -> APIRouter:
    """Inference, batches, jobs and kept proposals."""
    router = APIRouter(prefix=settings.MONAI_LABEL_API_STR)

    @router.post("/infer/{model}", tags=["Infer"], summary="Proposals for a prompt; see /progidiff/jobs for progress")
    def run_infer(
        background_tasks: BackgroundTasks,
        model: str,
        image: str = "",
        session_id: str = "",
        params: str = Form("{}"),
        file: UploadFile | None = File(None),
        label: UploadFile | None = File(None),
        output: ResultType | None = None,
        user: User = CAN_ANNOTATE,
    ) -> Any:
        app = app_instance()
        request: dict[str, Any] = {"model": model, "image": image, "params": _read_params(params)}
        if output is ResultType.dicom_seg:
            raise RequestError("output=dicom_seg is not offered. Use output=all or output=image and convert the mask, for example with dcmqi.")
        with ExitStack() as uploads:
            if file is not None:
                request |= {"image": "", "path": _keep_upload(file, uploads)}
            elif session_id:
                request |= {"image": "", "path": _find_session(app, session_id)}
            elif not image:
                raise RequestError("The request names no image. Add ?image=<id of the datastore>, ?session_id=<id>, or upload a file.")
            series = get_context().served.find_named(request["image"])
            if series is not None:
                if isinstance(app._infers.get(model), SliceInferTask):
                    raise RequestError(
                        "Clicks in OHIF count the voxels of its DICOM slices, which lie in another order than the file's. Click in 3D Slicer, or use "
                        "the panel's prompt here."
                    )
                request["image"] = series.identity.image
            try:
                result = infer(app, request)
                if series is not None:
                    get_context().served.to_series_grid(Path(result["file"]), series)
            except ProGiDiffError:
                raise
            except Exception as err:
                incident = uuid.uuid4().hex[:8]
                logger.exception("Incident %s in /infer/%s", incident, model)
                raise ProGiDiffError(
                    f"The inference broke unexpectedly ({type(err).__name__}, incident {incident}). The server's log has the details under this "
                    "number; please report them."
                ) from err
        return send_response(app.datastore(), result, output, background_tasks)

    @router.post("/batch/infer/{model}", tags=["Infer"], summary="The same prompt on many images")
    def run_batch(
        model: str,
        images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        user: User = CAN_ADMINISTER,
    ) -> Any:
        task = _find_model(app_instance(), model)
        options = _read_batch(params or {})
        if isinstance(task, (ProposalInferTask, TextDiffInferTask)):  # A wrong option is told now, not in the log of a process.
            task.read_request(_pick_options(options))
        return start_batch(model, images, options, run_sync)

    @router.get("/progidiff/jobs", tags=["ProGiDiff"], summary="Waiting, running and recent jobs, newest first")
    async def list_jobs(image: str | None = None, user: User = CAN_READ) -> list[dict[str, Any]]:
        return [job.info() for job in _task().queue.list(image)]

    @router.get("/progidiff/jobs/{job_id}", tags=["ProGiDiff"], summary="State and progress of one job")
    async def get_job(job_id: str, user: User = CAN_READ) -> dict[str, Any]:
        return _task().queue.get(job_id).info()

    @router.delete("/progidiff/jobs/{job_id}", tags=["ProGiDiff"], summary="Cancel a job")
    async def cancel_job(job_id: str, user: User = CAN_ANNOTATE) -> dict[str, Any]:
        job = _task().queue.get(job_id)
        job.cancel()
        return job.info()

    @router.get("/progidiff/proposals/{image}", tags=["ProGiDiff"], summary="Kept proposals of an image")
    def describe_proposals(image: str, proposals: str | None = None, user: User = CAN_READ) -> dict[str, Any]:
        find_image(app_instance(), image)
        return _task().describe_proposals(image, proposals)

    @router.get("/progidiff/prompts", tags=["ProGiDiff"], summary="Structures, their label ids and synonyms")
    async def list_prompts(user: User = CAN_READ) -> list[dict[str, Any]]:
        return _task().list_prompts()

    return router


def _read_batch(params: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch's parameters goes on to its process: options of the task, and which images; the host would take any name from it."""
    options = _pick_options(params)
    if params.get("max_batch_size"):
        options["max_batch_size"] = read_int(params["max_batch_size"], "max_batch_size", 0, 10**6)
    if params.get("label_tag"):
        options["label_tag"] = _check_tag(params["label_tag"])
    images = params.get("images")
    if isinstance(images, list):
        app = app_instance()
        for image in images:
            find_image(app, str(image))
        options["images"] = [str(image) for image in images]
    elif images:
        options["images"] = read_choice(images, "images", [str(kind.value) for kind in BatchInferImageType])
    return options


def _check_tag(tag: object) -> str:
    text = str(getattr(tag, "value", tag))  # The host's own tags are an enumeration.
    if not _TAG.fullmatch(text):
        raise RequestError(f"Option label_tag is '{text[:40]}'; it must be letters, digits, '.', '_' or '-', for example original.")
    return text


def _task() -> ProposalInferTask:
    for task in app_instance()._infers.values():
        if isinstance(task, ProposalInferTask):
            return task
    raise NotFoundError("This server has no proposal task. Start it with --app apps/progidiff.")


def _read_params(text: str) -> dict[str, Any]:
    try:
        params = json.loads(text) if text and text.strip() else {}
    except (json.JSONDecodeError, RecursionError) as err:
        raise RequestError(f'The form field params is not JSON ({err}). Send an object, for example {{"prompt": "liver"}}.') from err
    if not isinstance(params, dict):
        raise RequestError(f'The form field params is a JSON {type(params).__name__}. Send an object, for example {{"prompt": "liver"}}.')
    return params


def _keep_upload(file: UploadFile, uploads: ExitStack) -> str:
    """Write an uploaded image to a temporary folder that goes when `uploads` is closed, also if the request fails."""
    match = _UPLOAD_SUFFIX.search(file.filename or "")
    if match is None:
        name = (file.filename or "")[-40:]
        raise RequestError(
            f"An upload named '{name}' is not read. Send .nii.gz, .nii, .nrrd or .mha, or a picture; a DICOM series goes to PUT /session/."
        )
    folder = uploads.enter_context(tempfile.TemporaryDirectory(prefix="progidiff-upload-"))
    path = Path(folder) / f"image{match.group(1).lower()}"
    with path.open("wb") as target:
        shutil.copyfileobj(file.file, target)
    return str(path)


def _find_session(app: MONAILabelApp, session_id: str) -> str:
    sessions = app.sessions()
    session = sessions.get_session(session_id) if sessions is not None and _SESSION_ID.fullmatch(session_id) else None
    if session is None:
        raise NotFoundError(f"There is no session '{session_id[:64]}'; it may have expired. Upload the image again with PUT /session/.")
    return str(session.image)
