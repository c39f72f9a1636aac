"""The host's `/datastore` routes, answered here, and the routes of the label history.

The addresses, forms and answers are the host's, so that its clients notice nothing; what differs is that ids, tags,
images and labels are checked before anything is touched, uploads are gone when the answer is, and everything blocking
runs in the thread pool. An answer to a saved label has more in it: the annotation, and what `Context.on_saved` adds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import File, Form, Header, Request, UploadFile
from fastapi.responses import FileResponse, PlainTextResponse, Response
from monailabel.endpoints import datastore as host
from monailabel.utils.others.generic import get_mime_type
from starlette.background import BackgroundTask

from progidiff.errors import AccessError, NotFoundError, RequestError, StoreError
from progidiff.images.formats import Use, find_format, list_suffixes
from progidiff.images.ids import make_id
from progidiff.images.reading import read_grid
from progidiff.labels.audit import format_audit, list_audit
from progidiff.labels.history import FINAL, Annotation, AnnotationStore
from progidiff.labels.in_force import find_meaning
from progidiff.labels.segments import load_label_map
from progidiff.params import read_choice
from progidiff.server.answer_files import write_temporary
from progidiff.server.datastores import images
from progidiff.server.datastores.local import SafeLocalDatastore, check_tag
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import (
    ADMINISTER,
    ANNOTATE,
    CALLER,
    LONG,
    MEDIUM,
    READ,
    SMALL,
    UPLOAD,
    Content,
    Endpoints,
)
from progidiff.server.gate.folders import show_paths
from progidiff.server.parts import Context, get_context
from progidiff.server.routes.image_archives import is_archive, unpacked_image
from progidiff.server.routes.image_id import ImageId
from progidiff.server.routes.label_answers import (
    AddedImage,
    AnnotationAnswer,
    AnnotationsAnswer,
    FinishAnswer,
    LabelStateAnswer,
    NewLabelAnswer,
    NothingAnswer,
    RenameRequest,
    SaveAnswer,
    SavedLabelAnswer,
    SkipAnswer,
    list_slices,
)
from progidiff.storage.atomic import scratch_folder
from progidiff.storage.json_text import read_json_object
from progidiff.training.accepted_labels import read_label_names

logger = logging.getLogger(__name__)

_CHECKSUM = re.compile(r"(?:(SHA256|SHA512|MD5):)?([0-9a-fA-F]{32,128})")
_VERSION = re.compile(r'(?:W/)?"?(\d{1,12})"?')
_MAX_LISTED = 1000


def build_endpoints() -> Endpoints:
    """Every `/datastore` route, and `/progidiff/annotations`."""
    endpoints = Endpoints()
    _add_datastore_routes(endpoints)
    _add_image_routes(endpoints)
    _add_image_info_routes(endpoints)
    _add_label_routes(endpoints)
    _add_history_routes(endpoints)
    _add_change_routes(endpoints)
    _add_version_routes(endpoints)
    return endpoints


def _add_datastore_routes(endpoints: Endpoints) -> None:
    @endpoints.get(
        "/datastore/",
        READ,
        tags=["Datastore"],
        summary="All images and labels, or their numbers",
        takes="Query: output (stats, all, train)",
    )
    def get_datastore(request: Request, output: host.ResultType | None = None, user: User = CALLER) -> Any:
        answer = host.datastore(output)
        if output is host.ResultType.all:
            return _leave_out_unseen(get_context(), answer, user)
        if output is host.ResultType.train:
            return [show_paths(request.scope, pair, "image", "label") for pair in answer]
        return answer

    @endpoints.get(
        "/datastore/dataset",
        ANNOTATE,
        tags=["Datastore"],
        summary="Images and final labels as a ZIP archive",
        takes="Query: limit_cases",
        deadline=LONG,
    )
    def download_dataset(limit_cases: int | None = None) -> Response:
        if limit_cases is not None and limit_cases < 1:
            raise RequestError("limit_cases must be 1 or more; leave it out for all.")
        try:
            path = get_context().app.datastore().get_dataset_archive(limit_cases)
        except AssertionError as err:  # How the host's own datastore says so.
            raise NotFoundError("No image has a final label yet, so there is nothing to pack.") from err
        return FileResponse(
            path, media_type="application/zip", filename="dataset.zip", background=BackgroundTask(_remove, path)
        )


def _add_image_routes(endpoints: Endpoints) -> None:
    @endpoints.put(
        "/datastore/",
        ANNOTATE,
        include_in_schema=False,
        summary="Add an image",
        takes="As PUT /datastore/image",
        body=UPLOAD,
    )
    @endpoints.put(
        "/datastore/image",
        ANNOTATE,
        tags=["Datastore"],
        summary="Add an image",
        takes="Query: image (id: letters, digits, '.', '_', '-'; of another name one is made); form: file (a readable "
        "volume, or a DICOM series as a zip or tar file), params",
        body=UPLOAD,
    )
    def add_image(
        image: str | None = None, params: str = Form("{}"), file: UploadFile = File(...), user: User = CALLER
    ) -> AddedImage:
        info = with_user(read_object(params, "params"), user.name)
        if is_archive(file.filename or ""):
            with unpacked_image(file, get_context().options.max_upload_gb) as packed:
                modality = {"modality": packed.modality} if packed.modality else {}
                return _add_image(image or packed.name, packed.path, {**modality, **info})
        with _received(file, Use.IMAGE) as (path, suffix):
            name = Path(file.filename or "").name
            return _add_image(image or name[: -len(suffix)], path, info)

    @endpoints.delete(
        "/datastore/",
        ADMINISTER,
        include_in_schema=False,
        summary="Take an image and its labels out",
        takes="As DELETE /datastore/image",
    )
    @endpoints.delete(
        "/datastore/image",
        ADMINISTER,
        tags=["Datastore"],
        summary="Take an image and its labels out; they go to the server's trash",
        takes="Query: id",
    )
    def remove_image(id: ImageId, user: User = CALLER) -> NothingAnswer:
        datastore = get_context().app.datastore()
        if isinstance(datastore, SafeLocalDatastore):
            datastore.remove_image(id, user.name)
        else:
            images.find_image(get_context().app, id)
            datastore.remove_image(id)
        return NothingAnswer()

    @endpoints.head("/datastore/image", tags=["Datastore"], summary="Whether an image is there")
    def check_image(image: ImageId, check_sum: str | None = None) -> NothingAnswer:
        _check_sum(_find_file(images.find_image(get_context().app, image)), check_sum)
        return NothingAnswer()

    @endpoints.get(
        "/datastore/image",
        READ,
        tags=["Datastore"],
        summary="Download an image",
        takes="Query: image (id); HEAD with check_sum",
    )
    def download_image(image: ImageId) -> Response:
        return _send(_find_file(images.find_image(get_context().app, image)))


def _add_image_info_routes(endpoints: Endpoints) -> None:
    @endpoints.get(
        "/datastore/image/info", READ, tags=["Datastore"], summary="What is known about an image", takes="Query: image"
    )
    def get_image_info(request: Request, image: ImageId) -> Any:
        images.find_image(get_context().app, image)
        return show_paths(request.scope, get_context().app.datastore().get_image_info(image), "path")

    @endpoints.put(
        "/datastore/image/info",
        ANNOTATE,
        tags=["Datastore"],
        summary="Add to what is known about an image",
        takes="Query: image; form: info (JSON object)",
        body=MEDIUM,
    )
    def put_image_info(image: ImageId, info: str = Form("{}"), user: User = CALLER) -> Any:
        images.find_image(get_context().app, image)
        return get_context().app.datastore().update_image_info(image, with_user(read_object(info, "info"), user.name))


# long because it is a table: one endpoint after the other, each a few lines.
def _add_label_routes(endpoints: Endpoints) -> None:
    @endpoints.put(
        "/datastore/label",
        ANNOTATE,
        tags=["Datastore"],
        summary="Save a label",
        takes="Query: image, tag; header: If-Match (the save it replaces); form: label (on the image's grid, whole "
        "numbers, known ids), params",
        body=UPLOAD,
    )
    def save_label(
        image: ImageId,
        params: str = Form("{}"),
        tag: str = FINAL,
        label: UploadFile = File(...),
        if_match: str | None = Header(None),
        user: User = CALLER,
    ) -> SaveAnswer:
        context = get_context()
        options = read_object(params, "params")
        replaces = None if if_match is None else read_version(if_match)
        with _received(label, Use.LABEL) as (path, _):
            return save(context, image, path, tag or FINAL, options, user.name, replaces)

    @endpoints.delete(
        "/datastore/label",
        ADMINISTER,
        tags=["Datastore"],
        summary="Take a label out of force; the history keeps it",
        takes="Query: id, tag",
    )
    def remove_label(id: ImageId, tag: str, user: User = CALLER) -> NothingAnswer:
        get_context().labels.remove_label(id, tag, user.name)
        return NothingAnswer()

    @endpoints.head("/datastore/label", tags=["Datastore"], summary="Whether a label is there")
    def check_label(image: ImageId, tag: str, user: User = CALLER) -> NothingAnswer:
        _check_seen(get_context(), image, tag, user)
        _find_label(image, tag)
        return NothingAnswer()

    @endpoints.get(
        "/datastore/label",
        READ,
        tags=["Datastore"],
        summary="Download a label",
        takes="Query: label (image id), tag, format (.nii.gz, .nii, .nrrd, or .seg.nrrd with names and colours; as "
        "kept by default)",
    )
    def download_label(label: ImageId, tag: str, format: str | None = None, user: User = CALLER) -> Response:
        _check_seen(get_context(), label, tag, user)
        path = _find_label(label, tag)
        answer = _send(path) if format is None else _send_as(path, label, tag, format)
        current = get_context().annotations.current(label, tag)
        if current is not None:
            answer.headers["ETag"] = f'"{current.sequence}"'
        return answer

    @endpoints.get(
        "/datastore/label/info",
        READ,
        tags=["Datastore"],
        summary="What is known about a label",
        takes="Query: label, tag",
    )
    def get_label_info(label: ImageId, tag: str, user: User = CALLER) -> Any:
        _check_seen(get_context(), label, tag, user)
        _check_label_name(label, tag)
        return get_context().app.datastore().get_label_info(label, tag)

    @endpoints.put(
        "/datastore/label/info",
        ANNOTATE,
        tags=["Datastore"],
        summary="Add to what is known about a label",
        takes="Query: label, tag; form: info (JSON object)",
        body=MEDIUM,
    )
    def put_label_info(label: ImageId, tag: str, info: str = Form("{}"), user: User = CALLER) -> Any:
        _check_own(get_context(), label, tag, user.name)
        _check_label_name(label, tag)
        return (
            get_context().app.datastore().update_label_info(label, tag, with_user(read_object(info, "info"), user.name))
        )

    @endpoints.put(
        "/datastore/updatelabelinfo",
        ANNOTATE,
        include_in_schema=False,
        summary="Add to what is known about a label",
        takes="As PUT /datastore/label/info, form field params",
        body=MEDIUM,
    )
    def update_label_info(label: ImageId, tag: str, params: str = Form("{}"), user: User = CALLER) -> Any:
        _check_own(get_context(), label, tag, user.name)
        _check_label_name(label, tag)
        return (
            get_context()
            .app.datastore()
            .update_label_info(label, tag, with_user(read_object(params, "params"), user.name))
        )


def _add_history_routes(endpoints: Endpoints) -> None:
    @endpoints.get(
        "/progidiff/annotations",
        READ,
        tags=["ProGiDiff"],
        summary="Saved labels, newest first, and which slices are annotated",
        takes="Query: image, limit",
    )
    def list_annotations(image: ImageId | None = None, limit: int = 100, user: User = CALLER) -> AnnotationsAnswer:
        if not 1 <= limit <= _MAX_LISTED:
            raise RequestError(f"limit must be from 1 to {_MAX_LISTED}; GET /progidiff/annotations/export gives all.")
        store = get_context().annotations
        if image is not None:
            images.find_image(get_context().app, image)
        counting = store.counting()
        labels = _list_seen(get_context(), store.list(image), user)
        annotated = store.annotated_images() if image is None else {image: store.annotated_slices(image)}
        return AnnotationsAnswer(
            total=len(labels),
            annotations=[
                AnnotationAnswer(**label.to_dict(), in_force=label.sequence in counting)
                for label in reversed(labels[-limit:])
            ],
            annotated_slices={name: list_slices(slices) for name, slices in annotated.items()},
        )

    @endpoints.get(
        "/progidiff/annotations/export",
        ADMINISTER,
        tags=["ProGiDiff"],
        summary="The audit: one row per saved label, delete, undo, restore and skip",
        takes="Query: format (csv, jsonl), image",
    )
    def export_annotations(format: str = "csv", image: ImageId | None = None) -> Response:
        text = format_audit(list_audit(get_context().annotations, image), format)
        media = "text/csv" if format == "csv" else "application/x-ndjson"
        return PlainTextResponse(
            text, media_type=media, headers={"Content-Disposition": f'attachment; filename="annotations.{format}"'}
        )


def _add_change_routes(endpoints: Endpoints) -> None:
    @endpoints.post(
        "/progidiff/annotations/{image}/undo",
        ANNOTATE,
        tags=["ProGiDiff"],
        summary="Go back to the label before the last save",
    )
    def undo(image: ImageId, user: User = CALLER) -> LabelStateAnswer:
        images.find_image(get_context().app, image)
        context = get_context()
        tag = context.readings.find_shown_tag(image, user.name)
        return _describe_state(image, context.labels.undo(image, user.name, tag), tag)

    @endpoints.post(
        "/progidiff/annotations/{image}/rename",
        ANNOTATE,
        tags=["ProGiDiff"],
        summary="Give a structure of the label in force another name; a save like any other",
        takes="JSON: old, new",
        body=SMALL,
        content=Content.JSON,
    )
    def rename(image: ImageId, names: RenameRequest, user: User = CALLER) -> LabelStateAnswer:
        images.find_image(get_context().app, image)
        context = get_context()
        tag = context.readings.find_tag(image, user.name)
        label = context.labels.rename_structure(image, names.old, names.new, user.name, tag)
        return _describe_state(image, label, tag)

    @endpoints.post(
        "/progidiff/annotations/{image}/skip",
        ANNOTATE,
        tags=["ProGiDiff"],
        summary="Note that an image was looked at and left",
        takes="Query: reason",
    )
    def skip(image: ImageId, reason: str = "", user: User = CALLER) -> SkipAnswer:
        images.find_image(get_context().app, image)
        event = get_context().annotations.skip(image, user.name, reason)
        return SkipAnswer(image=image, sequence=event.sequence)

    @endpoints.post(
        "/progidiff/annotations/{image}/done",
        ANNOTATE,
        tags=["ProGiDiff"],
        summary="Note that nothing is left to do on an image, or that there is again",
        takes="Query: is_done",
    )
    def finish(image: ImageId, is_done: bool = True, user: User = CALLER) -> FinishAnswer:
        context = get_context()
        images.find_image(context.app, image)
        tag = context.readings.find_shown_tag(image, user.name)
        event = context.annotations.finish(image, user.name, is_done, tag)
        context.selection.release(image)
        return FinishAnswer(image=image, sequence=event.sequence, is_done=is_done)


def _add_version_routes(endpoints: Endpoints) -> None:
    @endpoints.post(
        "/progidiff/annotations/{image}/{sequence}/restore",
        ANNOTATE,
        tags=["ProGiDiff"],
        summary="Put an earlier save in force again",
    )
    def restore(image: ImageId, sequence: int, user: User = CALLER) -> LabelStateAnswer:
        context = get_context()
        images.find_image(context.app, image)
        tag = context.annotations.get(image, sequence).tag
        _check_own(context, image, tag, user.name)
        return _describe_state(image, context.labels.restore(image, sequence, user.name), tag)

    @endpoints.get(
        "/progidiff/annotations/{image}/{sequence}/label",
        READ,
        tags=["ProGiDiff"],
        summary="Download a saved label as it was",
    )
    def download_version(image: ImageId, sequence: int, user: User = CALLER) -> Response:
        store: AnnotationStore = get_context().annotations
        saved = store.get(image, sequence)
        _check_seen(get_context(), image, saved.tag, user)
        path = store.label_file(saved)
        if not path.is_file():
            raise NotFoundError(
                f"The file of save {sequence} is gone from the history. Restore '{path.name}' from a backup."
            )
        return _send(path)


def _add_image(name: str, path: Path, info: dict[str, Any]) -> AddedImage:
    image_id = make_id(name)
    if image_id != name:
        info["original_name"] = name
    return AddedImage(image=get_context().app.datastore().add_image(image_id, str(path), info))


def save(
    context: Context,
    image: str,
    path: Path,
    tag: str,
    params: Mapping[str, Any],
    user: str,
    replaces: int | None = None,
) -> SaveAnswer:
    """Save a label file and describe what that did, as the answer to `PUT /datastore/label`.

    An image that is named by its SeriesInstanceUID has its label on the grid of that series; the file is then rewritten
    in place.

    Args:
        replaces: The save that it was drawn on, 0 for none; None for what `params` says under "replaces", else for any.

    Where images are read twice, a label that would count is the reading of who saves it, see
    `labels.readings.Readings.find_tag`.

    Raises:
        AccessError: if the tag is that of somebody else's reading.
        ConflictError: if another save is in force by now.
        ProGiDiffError: whatever is wrong with the label; nothing has changed then.
    """
    named = context.served.find_named(image)
    image_id = image if named is None else named.identity.image
    if tag == FINAL:
        tag = context.readings.find_tag(image_id, user)
    _check_own(context, image_id, tag, user)
    return save_as(context, image, path, tag, params, user, replaces)


def save_as(
    context: Context,
    image: str,
    path: Path,
    tag: str,
    params: Mapping[str, Any],
    user: str,
    replaces: int | None = None,
) -> SaveAnswer:
    """As `save`, under this very tag."""
    if replaces is None and params.get("replaces") is not None:
        replaces = read_version(str(params["replaces"]))
    series = context.served.find_named(image)
    if series is not None:
        image = series.identity.image
        context.served.to_image_grid(path, series)
    saved = context.labels.save_annotated(image, path, tag, with_user(params, user), user, replaces=replaces)
    if context.readings.is_on and tag != FINAL:
        context.selection.release(image)  # The next person may have it.
    answer = _run_hooks(context, saved.annotation, saved.repeated, saved.label_id)
    annotation = NewLabelAnswer.of(
        saved.annotation,
        repeated=saved.repeated,
        warnings=list(saved.warnings),
        new_structures=list(saved.added),
    )
    return SaveAnswer(**{**answer, "annotation": annotation, "image": image, "label": saved.label_id})


def read_version(text: str) -> int | None:
    """The save that a client's label replaces, as an `If-Match` header or a parameter has it; None for any.

    Raises:
        RequestError: if it is no number of a save.

    Example:
        >>> read_version('"12"'), read_version("W/\\"3\\""), read_version("0"), read_version("*")
        (12, 3, 0, None)
    """
    if text.strip() == "*":
        return None
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise RequestError(
            f"'{text[:40]}' is no save of an image. Send the number that GET /datastore/label gives as ETag, 0 for "
            "none, or leave it out."
        )
    return int(match[1])


def read_object(text: str, field: str) -> dict[str, Any]:
    """A form field that holds a JSON object.

    Raises:
        RequestError: if it is something else, too long, or cannot be sent back.
    """
    return read_json_object(text, f"The form field {field}")


def with_user(info: Mapping[str, Any], user: str) -> dict[str, Any]:
    """What a client says of an image or a label, with who says it; a client cannot say that itself.

    Example:
        >>> with_user({"user": "anna", "note": "x"}, "bob"), with_user({"user": "anna"}, "")
        ({'note': 'x', 'user': 'bob'}, {})
    """
    said = {name: value for name, value in info.items() if name != "user"}
    return {**said, "user": user} if user else said


@contextmanager
def _received(upload: UploadFile, use: Use) -> Iterator[tuple[Path, str]]:
    """An upload as a file, and its suffix; the file is gone afterwards, whatever happens."""
    name = upload.filename or "upload.nii.gz"
    row = find_format(name, use)
    if row is None:
        raise RequestError(f"A file named '{name[-40:]}' is not taken here. Send {', '.join(list_suffixes(use))}.")
    with scratch_folder("upload") as folder:
        path = folder / f"upload{row.suffix}"
        try:
            with path.open("wb") as target:
                shutil.copyfileobj(upload.file, target, 1 << 20)
        except OSError as err:
            raise StoreError(
                f"The upload could not be written ({err}). Free some disk space and send it again."
            ) from err
        yield path, row.suffix


def _run_hooks(context: Context, annotation: Annotation, repeated: bool, label_id: str) -> dict[str, Any]:
    """What the app and other parts add to the answer. The label is saved; nothing that fails here can change that."""
    answer: dict[str, Any] = {}
    try:
        answer |= context.app.on_save_label(annotation.image, label_id) or {}
    except Exception:
        logger.exception("on_save_label failed; the label is saved")
    if annotation.tag == FINAL and not repeated:
        for hook in context.on_saved:
            try:
                answer |= hook(annotation) or {}
            except Exception:
                logger.exception("A hook failed after label %d was saved", annotation.sequence)
    return answer


def _check_seen(context: Context, image: str, tag: str, user: User) -> None:
    """Keep a reading from who is to read the same image without it. Administrators, who could open the files, may look.

    Raises:
        AccessError: if this person may not see it.
    """
    if user.role is not ADMINISTER and not context.readings.may_see(image, tag, user.name):
        raise AccessError(
            f"This label of '{image[:100]}' is somebody else's reading. Whoever has not read the image sees it when "
            "two people have; GET /progidiff/readings/<image> tells how far they are."
        )


def _check_own(context: Context, image: str, tag: str, user: str) -> None:
    """Keep a reading, and what was decided between readings, from everybody whose it is not.

    Raises:
        AccessError: if it is not this person's to change.
    """
    if not context.readings.may_change(image, tag, user):
        raise AccessError(
            f"This label of '{image[:100]}' is not yours to change: images are read twice here, each person changes "
            "the own reading, and a third one what counts. Save without a tag."
        )


def _list_seen(context: Context, saves: Iterable[Annotation], user: User) -> list[Annotation]:
    if user.role is ADMINISTER:
        return list(saves)
    seen: dict[tuple[str, str], bool] = {}
    kept = []
    for save in saves:
        key = (save.image, save.tag)
        if key not in seen:
            seen[key] = context.readings.may_see(save.image, save.tag, user.name)
        if seen[key]:
            kept.append(save)
    return kept


def _leave_out_unseen(context: Context, listed: Any, user: User) -> Any:
    """The host's list of all images, without labels that who asks may not see."""
    if not context.readings.is_on or user.role is ADMINISTER or not isinstance(listed, dict):
        return listed
    objects = {
        image: {
            **entry,
            "labels": {
                tag: label
                for tag, label in (entry.get("labels") or {}).items()
                if context.readings.may_see(image, tag, user.name)
            },
        }
        for image, entry in (listed.get("objects") or {}).items()
    }
    return {**listed, "objects": objects}


def _describe_state(image: str, label: Annotation | None, tag: str) -> LabelStateAnswer:
    return LabelStateAnswer(
        image=image,
        annotation=None if label is None else SavedLabelAnswer.of(label),
        annotated_slices=list_slices(get_context().annotations.annotated_slices(image, tag)),
    )


def _check_label_name(label: str, tag: str) -> None:
    """Both become parts of a path in the host's DICOMweb datastore."""
    check_tag(tag)
    record: Mapping[str, Any] = get_context().app.datastore().get_labels_by_image_id(label) if _is_plain(label) else {}
    if tag not in record:
        raise NotFoundError(
            f"Image '{label[:100]}' has no label with tag '{tag}'. GET /datastore/?output=all lists what there is."
        )


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0") and len(name) < 256


def _find_label(label: str, tag: str) -> Path:
    """The file of a label. Of a datastore that is no folder the history has it; the host would ask for a series of this
    name.
    """
    context = get_context()
    current = (
        None if isinstance(context.labels, SafeLocalDatastore) else context.annotations.current(label, check_tag(tag))
    )
    if current is not None:
        return _find_file(str(context.annotations.label_file(current)))
    _check_label_name(label, tag)
    return _find_file(get_context().app.datastore().get_label_uri(label, tag))


def _find_file(path: str) -> Path:
    if not os.path.isfile(path):
        raise NotFoundError(
            "There is no single file to this name; it may have been removed, or be a DICOM series in a folder."
        )
    return Path(path)


def _send(path: Path) -> Response:
    return FileResponse(path, media_type=get_mime_type(str(path)), filename=path.name)


def _send_as(path: Path, image: str, tag: str, wanted: str) -> Response:
    """A label in another format; `.seg.nrrd` names what it draws."""
    choices = (*list_suffixes(Use.ANSWER, "volume"), *list_suffixes(Use.SEGMENTS))
    suffix = read_choice(wanted, "format", choices)
    context = get_context()
    grid = read_grid(images.find_image(context.app, image))
    label = load_label_map(path, grid)
    ids = context.labels.read_label_ids()
    if isinstance(context.labels, SafeLocalDatastore):  # What the server says of labels that it makes itself.
        told = read_label_names(context.labels.get_label_info(image, tag))
        ids = {name: value for name, value in ids.items() if value not in told}
        ids |= {name: value for value, name in told.items()}
    meaning = find_meaning(label, context.annotations.current(image, tag), ids, context.annotations.find_renamed())
    drawn = {meaning.get(value, f"Segment_{value}"): value for value in np.unique(label.array).tolist() if value}
    file = write_temporary(label.array, grid, suffix, drawn, context.labels.structures.looks())
    name = image + suffix
    return FileResponse(
        file, media_type=get_mime_type(str(file)), filename=name, background=BackgroundTask(_remove, str(file))
    )


def _check_sum(path: Path, check_sum: str | None) -> None:
    if not check_sum:
        return
    match = _CHECKSUM.fullmatch(check_sum)
    if match is None:
        raise RequestError("check_sum must be <SHA256, SHA512 or MD5>:<hexadecimal digits>.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, (match.group(1) or "SHA256").lower()).hexdigest()
    if digest != match.group(2).lower():
        raise NotFoundError("The image is there and has another checksum. Send it again, or use the server's.")


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
