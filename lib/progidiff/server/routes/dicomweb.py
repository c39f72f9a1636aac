"""DICOMweb under the addresses that the bundled OHIF asks, ``/proxy/dicom/{qido,wado,stow}/...``.

For a local folder the app answers itself: searches (QIDO-RS), metadata, frames, pictures and files (WADO-RS), and it
takes DICOM SEGs as labels (STOW-RS). For a DICOMweb server it hands the request on, only addresses that DICOMweb knows
and with their query, which the host's own proxy drops; nothing else of that server can be reached through it.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import requests
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from monailabel.config import settings
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from starlette.concurrency import run_in_threadpool

from progidiff.dicomweb import headers
from progidiff.dicomweb.catalogue import Entry
from progidiff.dicomweb.frames import Series
from progidiff.dicomweb.multipart import Envelope, read_parts
from progidiff.dicomweb.query import Query
from progidiff.dicomweb.segmentation import Instance, Overlap, SegmentLook, open_instance, open_segmentation
from progidiff.errors import BusyError, ImageError, NotFoundError, ProGiDiffError, RequestError
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.labels.history import FINAL
from progidiff.proposals.request import DISAGREEMENT
from progidiff.server.datastores.images import find_image
from progidiff.server.datastores.served_images import ServedImages
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, LARGE, LONG, READ, Endpoint, Endpoints
from progidiff.server.parts import Context, get_context
from progidiff.server.routes.labels import save
from progidiff.storage.atomic import scratch_folder

logger = logging.getLogger(__name__)

DICOM_JSON = "application/dicom+json"

_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_THUMBNAIL_PIXELS = 256
_CANNOT_UNDERSTAND = 0xC000
_COERCED = 0xB000
_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
"""A UID names these bytes and no others."""

_UID = r"[0-9.]{1,64}"
_LEVELS = rf"studies/(?P<study>{_UID})(?:/series/(?P<series>{_UID})(?:/instances/(?P<instance>{_UID}))?)?"
_SEARCH = re.compile(
    rf"(?:studies/(?P<study>{_UID})/)?(?:series/(?P<series>{_UID})/)?(?P<level>studies|series|instances)"
)
_METADATA = re.compile(rf"{_LEVELS}/metadata")
_FRAMES = re.compile(rf"{_LEVELS}/frames/(?P<frames>[0-9]{{1,9}}(?:,[0-9]{{1,9}})*)(?P<picture>/rendered|/thumbnail)?")
_PICTURE = re.compile(rf"{_LEVELS}/(?P<picture>rendered|thumbnail)")
_FILES = re.compile(_LEVELS)
_BULK = re.compile(rf"{_LEVELS}/bulkdata(?:/[A-Za-z0-9_-]+)*")
_KNOWN = (_SEARCH, _METADATA, _FRAMES, _PICTURE, _FILES, _BULK)


def build_endpoints() -> Endpoints:
    """Searching, retrieving and storing."""
    endpoints = Endpoints()
    # The host has a route for each service; the one below answers before them.
    endpoints.of_host(
        Endpoint("GET", "/proxy/dicom/qido/{path:path}", READ, "DICOMweb searches below the configured root"),
        Endpoint("GET", "/proxy/dicom/wado/{path:path}", READ, "DICOMweb retrieval below the configured root"),
        Endpoint("GET", "/proxy/dicom/stow/{path:path}", READ, "The same (OHIF uses one root for both)"),
    )

    @endpoints.get(
        "/proxy/dicom/{path:path}", READ, tags=["DICOMweb"], summary="Search and retrieve studies, series and instances"
    )
    def retrieve(path: str, request: Request) -> Response:
        resource = _strip_service(path)
        served = get_context().served
        if served.is_remote:
            return _forward(path.partition("/")[0], resource, request)
        return _answer(served, resource, request)

    @endpoints.post(
        "/proxy/dicom/{service}/studies",
        ANNOTATE,
        tags=["DICOMweb"],
        summary="Store DICOM segmentations as labels of their images",
        takes="multipart/related: DICOM SEGs; query: overlap (refuse, later)",
        body=LARGE,
        deadline=LONG,
    )
    @endpoints.post(
        "/proxy/dicom/{service}/studies/{study}",
        ANNOTATE,
        include_in_schema=False,
        summary="The same, of one study",
        takes="multipart/related: DICOM SEGs; query: overlap (refuse, later)",
        body=LARGE,
        deadline=LONG,
    )
    async def store(
        request: Request, service: str, study: str = "", overlap: Overlap = "refuse", user: User = CALLER
    ) -> Response:
        _strip_service(f"{service}/")
        parts = read_parts(request.headers.get("content-type", ""), await request.body())
        return await run_in_threadpool(_store, get_context(), parts, study, overlap, user)

    return endpoints


def _strip_service(path: str) -> str:
    """``studies/...`` of ``wado/studies/...``."""
    service, _, resource = path.partition("/")
    if service not in ("qido", "wado", "stow"):
        raise NotFoundError(
            "DICOMweb is at /proxy/dicom/qido, /proxy/dicom/wado and /proxy/dicom/stow, "
            "for example /proxy/dicom/qido/studies."
        )
    return resource.rstrip("/")


def _answer(served: ServedImages, resource: str, request: Request) -> Response:
    for pattern, answer in _ANSWERS:
        match = pattern.fullmatch(resource)
        if match is not None:
            return answer(served, match, request)
    raise _unknown(resource)


def _unknown(resource: str) -> NotFoundError:
    return NotFoundError(
        f"'{resource[:100]}' is no DICOMweb address. Search with studies, series or instances; retrieve with "
        "studies/<uid>/series/<uid>/metadata or .../instances/<uid>/frames/1."
    )


def _search(served: ServedImages, match: re.Match[str], request: Request) -> Response:
    query = Query.read(request.query_params.multi_items())
    if match["study"]:
        query = query.with_equal("StudyInstanceUID", match["study"])
    if match["series"]:
        query = query.with_equal("SeriesInstanceUID", match["series"])
    found = list(query.select(_list_datasets(served, query, match["level"])))
    return JSONResponse(found, media_type=DICOM_JSON)


def _list_datasets(served: ServedImages, query: Query, level: str) -> Iterator[dict[str, Any]]:
    for entry in served.entries():
        if entry.refused:
            continue
        series = headers.to_json(headers.build_series(entry.identity, entry.num_slices))
        if level == "studies":
            yield headers.to_json(headers.build_study(entry.identity, entry.num_slices))
        elif level == "series":
            yield series
        elif query.may_match(series):  # opening a series reads its image
            for own in served.open(entry).metadata:
                yield headers.join_json(series, own)


def _metadata(served: ServedImages, match: re.Match[str], request: Request) -> Response:
    series = _open(served, match)
    metadata = series.metadata
    chosen = [metadata[series.find(match["instance"])]] if match["instance"] else metadata
    return JSONResponse(chosen, media_type=DICOM_JSON, headers=_FOREVER)


def _frames(served: ServedImages, match: re.Match[str], request: Request) -> Response:
    series = _open(served, match)
    if not match["instance"]:
        raise _unknown(match[0])
    index = series.find(match["instance"])
    if set(match["frames"].split(",")) != {"1"}:
        raise NotFoundError(f"Instance {match['instance']} has one frame; ask for frames/1.")
    if match["picture"]:
        return _send_picture(series, index, request, match["picture"] == "/thumbnail")
    envelope = Envelope.of(f"application/octet-stream; transfer-syntax={_EXPLICIT_LITTLE_ENDIAN}")
    body = b"".join(envelope.write([series.frame(index)]))
    return Response(body, media_type=envelope.content_type, headers=_FOREVER)


def _picture(served: ServedImages, match: re.Match[str], request: Request) -> Response:
    series = _open(served, match)
    index = series.find(match["instance"]) if match["instance"] else series.grid.shape[0] // 2
    return _send_picture(series, index, request, match["picture"] == "thumbnail")


def _send_picture(series: Series, index: int, request: Request, is_thumbnail: bool) -> Response:
    kind = "png" if "image/png" in request.headers.get("accept", "") else "jpeg"
    longest = _THUMBNAIL_PIXELS if is_thumbnail else None
    viewport = request.query_params.get("viewport", "").split(",")
    if len(viewport) >= 2:
        sizes = [int(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0 for text in viewport[:2]]
        if min(sizes) < 1:
            raise RequestError(
                f"viewport is '{','.join(viewport)[:40]}'; it must be two whole numbers "
                "from 1 to 9999, for example 256,256."
            )
        longest = min(sizes)
    return Response(series.picture(index, kind.upper(), longest), media_type=f"image/{kind}", headers=_FOREVER)


def _files(served: ServedImages, match: re.Match[str], request: Request) -> Response:
    series = _open(served, match)
    indices = [series.find(match["instance"])] if match["instance"] else range(series.grid.shape[0])
    envelope = Envelope.of(f"application/dicom; transfer-syntax={_EXPLICIT_LITTLE_ENDIAN}")
    return StreamingResponse(
        envelope.write(_write_file(series, index) for index in indices), media_type=envelope.content_type
    )


def _write_file(series: Series, index: int) -> bytes:
    target = io.BytesIO()
    series.dataset(index).save_as(target, enforce_file_format=True)
    return target.getvalue()


def _store(context: Context, parts: list[bytes], study: str, overlap: Overlap, user: User) -> Response:
    """Save every part as a label of its image; what cannot be saved is named with its reason, and an error if that is
    all.

    Raises:
        ProGiDiffError: of the first part, if none could be saved.
    """
    answer = Dataset()
    errors: list[ProGiDiffError] = []
    for part in parts:
        instance: Instance | None = None
        try:
            instance = open_instance(part)
            notes = _save_segmentation(context, part, instance, study, overlap, user)
            stored = _refer(instance)
            if notes:
                stored.WarningReason = _COERCED
                stored.ErrorComment = " ".join(notes)[:64]
            answer.setdefault("ReferencedSOPSequence", DataElement(0x00081199, "SQ", [])).value.append(stored)
        except ProGiDiffError as err:
            logger.info("A DICOM instance is not stored: %s", err)
            errors.append(err)
            failed = _refer(instance)
            failed.FailureReason = _CANNOT_UNDERSTAND
            failed.ErrorComment = str(err)[:64]
            answer.setdefault("FailedSOPSequence", DataElement(0x00081198, "SQ", [])).value.append(failed)
    if not parts:
        raise RequestError("The request holds no DICOM instance. Send at least one part of type application/dicom.")
    if len(errors) == len(parts):
        raise errors[0]
    return JSONResponse(headers.to_json(answer), status_code=202 if errors else 200, media_type=DICOM_JSON)


def _save_segmentation(
    context: Context, content: bytes, instance: Instance, study: str, overlap: Overlap, user: User
) -> list[str]:
    """Save a SEG as a label of its image; what is not as it was drawn, as sentences."""
    if study and instance.study_uid != study:
        raise RequestError(
            f"The segmentation is of study {instance.study_uid[:64] or None}, and was sent to study {study}. Store it "
            "in its own."
        )
    if instance.problem:
        raise ImageError(instance.problem)
    series = instance.series_uid
    try:
        image, volume = open_named(context, series)
    except NotFoundError as err:
        raise NotFoundError(
            f"The segmentation is of series {series[:64]}, which is no image here. Open the image from this server."
        ) from err
    segmentation = open_segmentation(content, volume.grid, overlap)
    for note in segmentation.notes:
        logger.info("Of a DICOM SEG of '%s': %s", image, note)
    bands = [name for name in segmentation.names.values() if name.lower().startswith(DISAGREEMENT)]
    if bands:
        raise RequestError(
            f"Segment '{bands[0]}' shows where proposals differ and is no structure. Show a proposal, then store it."
        )
    with scratch_folder("seg") as folder:
        file = save_mask(segmentation.labels, volume.grid, folder / "label.nii.gz")
        params = {
            "label_info": [
                _describe_segment(name, label, segmentation.looks.get(label, SegmentLook()))
                for label, name in segmentation.names.items()
            ],
            "structures": list(segmentation.names.values()),
            "client_id": "DICOM SEG",
        }
        save(context, image, file, FINAL, params, user.name)
    return segmentation.notes


def _describe_segment(name: str, label: int, look: SegmentLook) -> dict[str, Any]:
    code = None if look.code is None else {"value": look.code.value, "meaning": look.code.meaning}
    return {"name": name, "idx": label, "color": look.color, "code": code}


def open_named(context: Context, image: str) -> tuple[str, Volume]:
    """The id of an image that a client names by id or by SeriesInstanceUID, and the image.

    Raises:
        NotFoundError: if there is none.
    """
    entry = context.served.find_named(image)
    image_id = entry.identity.image if entry is not None else image
    path = find_image(context.app, image_id)
    return image_id, context.infer.open_volume(path, None, context.app.datastore().get_image_info(image_id))


def _refer(instance: Instance | None) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = "" if instance is None else instance.class_uid
    reference.ReferencedSOPInstanceUID = "" if instance is None else instance.instance_uid
    return reference


def _open(served: ServedImages, match: re.Match[str]) -> Series:
    entry: Entry = served.find(match["study"], match["series"])
    return served.open(entry)


_ANSWERS: tuple[tuple[re.Pattern[str], Callable[[ServedImages, re.Match[str], Request], Response]], ...] = (
    (_SEARCH, _search),
    (_METADATA, _metadata),
    (_FRAMES, _frames),
    (_PICTURE, _picture),
    (_FILES, _files),
)


def _forward(service: str, resource: str, request: Request) -> Response:
    """The answer of the DICOMweb server that the images are on."""
    if not any(pattern.fullmatch(resource) for pattern in _KNOWN):
        raise _unknown(resource)
    client = get_context().app.datastore()._client
    # OHIF asks for metadata under the searching service too.
    is_search = service == "qido" and not resource.endswith("/metadata")
    prefix = settings.MONAI_LABEL_QIDO_PREFIX if is_search else settings.MONAI_LABEL_WADO_PREFIX
    url = "/".join(part.strip("/") for part in (settings.MONAI_LABEL_STUDIES, prefix or "", resource) if part)
    query = urlencode(request.query_params.multi_items())
    try:
        answer = client._session.get(
            f"{url}?{query}" if query else url,
            headers={name: request.headers[name] for name in ("accept",) if name in request.headers},
            stream=True,
            timeout=settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT,
        )
    except requests.RequestException as err:
        raise BusyError(
            f"The DICOMweb server does not answer ({type(err).__name__}). See that it runs, and try again.",
            retry_after=10,
        ) from err
    passed = {
        name: answer.headers[name]
        for name in ("Content-Type", "Content-Encoding", "Content-Length")
        if name in answer.headers
    }
    return StreamingResponse(
        answer.raw.stream(1 << 16, decode_content=False), status_code=answer.status_code, headers=passed
    )
