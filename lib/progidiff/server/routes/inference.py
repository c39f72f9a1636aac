"""Everything HTTP: our routes in the host's web application, and errors as JSON with a status, a reason and a cure.

Concurrency: the host runs an inference inside an `async` route, which freezes the whole server for as long as it lasts.
The route ``POST /infer/{model}`` here comes before the host's, takes the same form and gives the same answers, and is a
plain function: the web framework runs it in its thread pool, and `progidiff.proposals.device_queue.DeviceQueue` lets
one at a time onto the device. A client that closes the connection gives its place up.

Trust: an image is only ever named by its id in the datastore, by a session, or uploaded with the request. A request can
name no file of the server.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from anyio import from_thread
from fastapi import BackgroundTasks, File, Form, Request, UploadFile
from fastapi.responses import Response
from monailabel.endpoints.batch_infer import run as start_batch
from monailabel.endpoints.infer import ResultType, send_response
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.utils.app import app_instance

from progidiff.errors import AccessError, NotFoundError, ProGiDiffError, RequestError, StoreError
from progidiff.params import read_choice, read_int
from progidiff.proposals.device_queue import Asker, JobInfo
from progidiff.proposals.edits import describe_edits, read_edits
from progidiff.proposals.request import AGREEMENT, CONSENSUS
from progidiff.server.datastores.images import find_image
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import (
    ADMINISTER,
    ANNOTATE,
    CALLER,
    LONG,
    MEDIUM,
    READ,
    UPLOAD,
    Content,
    Endpoints,
)
from progidiff.server.inference import check_tag, find_model, infer, pick_options
from progidiff.server.parts import get_context
from progidiff.server.routes.image_id import ImageId
from progidiff.server.routes.segmentations import ALL, load_kept, send_segmentation, write_proposals
from progidiff.server.tasks.answers import KeptProposals, PictureAnswer, PromptEntry, SliceAnswer, VolumeAnswer
from progidiff.server.tasks.pictures import TextDiffInferTask
from progidiff.server.tasks.scribbles import ScribbleInferTask
from progidiff.server.tasks.slices import SliceInferTask
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.server.uploads import find_session, keep_upload
from progidiff.storage.json_text import read_json_object

logger = logging.getLogger(__name__)


# long because it is a table: one endpoint after the other, each a few lines.
def build_endpoints() -> Endpoints:  # noqa: C901
    """Inference, batches, jobs and kept proposals."""
    endpoints = Endpoints()

    @endpoints.post(
        "/infer/{model}",
        ANNOTATE,
        tags=["Infer"],
        summary="Proposals for a prompt; see /progidiff/jobs for progress",
        takes="Query: image (id), session_id, output; form: params (JSON; K, steps, volume size bounded), file (NIfTI, "
        "NRRD, MHA), label (scribbles for progidiff_scribbles)",
        body=UPLOAD,
        deadline=LONG,
        responses={
            200: {
                "model": VolumeAnswer | SliceAnswer | PictureAnswer,
                "description": "output=json: these; output=all: a form of them (`params`) and the mask (`file`); "
                "output=image: the mask.",
            }
        },
    )
    def run_infer(
        http: Request,
        background_tasks: BackgroundTasks,
        model: str,
        image: ImageId = "",
        session_id: str = "",
        params: str = Form("{}"),
        file: UploadFile | None = File(None),
        label: UploadFile | None = File(None),
        output: ResultType | None = None,
        user: User = CALLER,
    ) -> Any:
        app = app_instance()
        request: dict[str, Any] = {
            "model": model,
            "image": image,
            "params": read_json_object(params or "", "The form field params"),
            "asker": Asker(_name_asker(http, user), partial(from_thread.run, http.is_disconnected)),
        }
        if output is ResultType.dicom_seg:
            _check_dicom_seg(app, model, file is not None or bool(session_id))
            seg_shows = request["params"].get("show", CONSENSUS)
            if seg_shows in (ALL, AGREEMENT):  # No mask can show these.
                request["params"] = {**request["params"], "show": CONSENSUS}
        with ExitStack() as uploads:
            if file is not None:
                request |= {"image": "", "path": keep_upload(file, uploads)}
            elif session_id:
                request |= {"image": "", "path": find_session(app, session_id)}
            elif not image:
                raise RequestError(
                    "The request names no image. Add ?image=<id of the datastore>, ?session_id=<id>, or upload a file."
                )
            if label is not None and isinstance(app._infers.get(model), ScribbleInferTask):
                request["label"] = keep_upload(label, uploads)
            series = get_context().served.find_named(request["image"])
            if series is not None:
                if isinstance(app._infers.get(model), (SliceInferTask, ScribbleInferTask)):
                    raise RequestError(
                        "Clicks in OHIF count the voxels of its DICOM slices, which lie in another order than the "
                        "file's. Click in 3D Slicer, or use the panel's prompt and its points here."
                    )
                request["image"] = series.identity.image
                if request["params"].get("edits"):
                    edits = get_context().served.to_file_edits(read_edits(request["params"]["edits"]), series)
                    request["params"] = {**request["params"], "edits": describe_edits(edits)}
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
                    f"The inference broke unexpectedly ({type(err).__name__}, incident {incident}). The server's log "
                    "has the details under this number; please report them."
                ) from err
        if output is ResultType.dicom_seg:
            return _send_dicom_seg(request["image"], result, str(seg_shows))
        return send_response(app.datastore(), result, output, background_tasks)

    @endpoints.post(
        "/batch/infer/{model}",
        ADMINISTER,
        tags=["Infer"],
        summary="The same prompt on many images",
        takes="JSON: options of the task; query: images, run_sync",
        body=MEDIUM,
        content=Content.PARAMS,
        deadline=LONG,
    )
    def run_batch(
        model: str,
        images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
    ) -> Any:
        task = find_model(app_instance(), model)
        options = _read_batch(params or {})
        if isinstance(
            task, (ProposalInferTask, TextDiffInferTask)
        ):  # A wrong option is told now, not in the log of a process.
            task.read_request(pick_options(options))
        return start_batch(model, images, options, run_sync)

    @endpoints.get(
        "/progidiff/jobs",
        READ,
        tags=["ProGiDiff"],
        summary="Waiting, running and recent jobs, newest first",
        takes="Query: image",
    )
    async def list_jobs(image: str | None = None) -> list[JobInfo]:
        return [job.info() for job in _task().queue.list(image)]

    @endpoints.get("/progidiff/jobs/{job_id}", READ, tags=["ProGiDiff"], summary="State and progress of one job")
    async def get_job(job_id: str) -> JobInfo:
        return _task().queue.get(job_id).info()

    @endpoints.delete(
        "/progidiff/jobs/{job_id}",
        ANNOTATE,
        tags=["ProGiDiff"],
        summary="Cancel a job of one's own; administrators any",
    )
    async def cancel_job(http: Request, job_id: str, user: User = CALLER) -> JobInfo:
        job = _task().queue.get(job_id)
        if job.owner != _name_asker(http, user) and not user.role.covers(ADMINISTER):
            raise AccessError(
                f"Job '{job.id}' is somebody else's. You can cancel your own ones; ask an administrator to cancel it."
            )
        job.cancel()
        return job.info()

    @endpoints.get(
        "/progidiff/proposals/{image}",
        READ,
        tags=["ProGiDiff"],
        summary="Kept proposals of an image",
        takes="Query: proposals (a key)",
    )
    def describe_proposals(image: str, proposals: str | None = None) -> KeptProposals:
        find_image(app_instance(), image)
        return _task().describe_proposals(image, proposals)

    @endpoints.get("/progidiff/prompts", READ, tags=["ProGiDiff"], summary="Structures, their label ids and synonyms")
    async def list_prompts() -> list[PromptEntry]:
        return _task().list_prompts()

    return endpoints


def _check_dicom_seg(app: MONAILabelApp, model: str, is_upload: bool) -> None:
    if is_upload:
        raise RequestError(
            "output=dicom_seg needs an image of the datastore, since a DICOM SEG refers to its series. Use output=all "
            "or output=image for an upload or a session."
        )
    if not isinstance(find_model(app, model), ProposalInferTask):
        raise RequestError(
            f"output=dicom_seg is answered by the model progidiff, for whole volumes, not by '{model}'. Use output=all "
            "or output=image."
        )


def _send_dicom_seg(image: str, result: Mapping[str, Any], show: str) -> Response:
    """The proposals of an answer as a DICOM SEG."""
    Path(result["file"]).unlink(missing_ok=True)
    key = result["params"]["proposals"]
    if key is None:
        raise StoreError(
            "The proposals could not be kept on disk, from which a DICOM SEG is made. Free some space, or use "
            "output=all."
        )
    chosen, proposals = load_kept(get_context(), image, key)
    return send_segmentation(write_proposals(get_context(), image, proposals, show), f"{chosen[:12]}-{show}")


def _name_asker(http: Request, user: User) -> str:
    """Whose turn a request is: the user's, or that of the address of somebody without a login."""
    if user.name:
        return f"user {user.name}"
    return f"address {http.client.host if http.client else ''}"


def _read_batch(params: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch's parameters goes on to its process: options of the task, and which images; the host would take
    any name from it.
    """
    options = pick_options(params)
    if params.get("max_batch_size"):
        options["max_batch_size"] = read_int(params["max_batch_size"], "max_batch_size", 0, 10**6)
    if params.get("label_tag"):
        options["label_tag"] = check_tag(params["label_tag"])
    images = params.get("images")
    if isinstance(images, list):
        app = app_instance()
        for image in images:
            find_image(app, str(image))
        options["images"] = [str(image) for image in images]
    elif images:
        options["images"] = read_choice(images, "images", [str(kind.value) for kind in BatchInferImageType])
    return options


def _task() -> ProposalInferTask:
    for task in app_instance()._infers.values():
        if isinstance(task, ProposalInferTask):
            return task
    raise NotFoundError("This server has no proposal task. Start it with --app apps/progidiff.")
