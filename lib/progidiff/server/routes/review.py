"""The review page and what it asks for: single slices and masks as packed bits, and decisions that become a label.

A browser never gets a whole volume. It gets the slice it shows, 16 bits a pixel, and for the same slice every proposal
with one bit a pixel, so that window, level, proposals, merging and heat maps are its own arithmetic and switch at once,
on a phone too. What it sends back are decisions (`labels.decisions.Plan`), a few hundred bytes; the voxels are made
here, on the grid of the image, from the kept proposals.

Masks of a slice, little-endian::

    uint16 P, uint16 K
    P times:  uint16 y0, y1, x0, x1      half-open box that holds all that is drawn; four zeros if nothing is
              K times ceil((y1 - y0) (x1 - x0) / 8) bytes     the box row by row, first pixel in the lowest bit
"""

from __future__ import annotations

import gzip
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from numpy.typing import NDArray

from progidiff.errors import ImageError, NotFoundError, RequestError
from progidiff.images.formats import is_picture
from progidiff.images.geometry import Grid
from progidiff.images.intensities import compute_window
from progidiff.images.modality import get_modality
from progidiff.images.pictures import PICTURE
from progidiff.images.volume import Volume
from progidiff.params import read_int
from progidiff.prompts.structures import COLORS, OTHER_COLORS
from progidiff.proposals.request import MAX_SLICE
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.datastores import images
from progidiff.server.datastores.local import SafeLocalDatastore
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, READ, Content, Endpoints
from progidiff.server.gate.paths import find_root
from progidiff.server.parts import Context, get_context
from progidiff.server.routes import submissions
from progidiff.server.routes.image_id import ImageId
from progidiff.server.routes.label_answers import (
    CurrentLabel,
    GeometryAnswer,
    KeptProposals,
    ReviewedImage,
    SubmissionAnswer,
    VoxelPlaces,
    WindowPreset,
    list_slices,
)
from progidiff.server.routes.submissions import find_result, load_current

logger = logging.getLogger(__name__)

MAX_SLICE_PIXELS = 1 << 24
"""Largest slice that a browser is asked to draw: 4096 x 4096 pixels."""

MOST_PAINTED = 16 << 20
"""Bytes of a submission: what was drawn of an organ on every one of 300 slices takes about one million."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src "
    "'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing inline, nothing evaluated, nothing from anywhere else."""

_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}


def build_endpoints() -> Endpoints:
    """The page, its files, and its data."""
    endpoints = Endpoints()
    _add_page_routes(endpoints)
    _add_data_routes(endpoints)
    _add_submit_route(endpoints)
    return endpoints


def _add_page_routes(endpoints: Endpoints) -> None:
    @endpoints.get("/progidiff", READ, include_in_schema=False, summary="Leads to the review page")
    def redirect(request: Request) -> Response:
        return RedirectResponse(f"{find_root(request.scope)}/progidiff/")

    @endpoints.get("/progidiff/", READ, tags=["Review"], summary="The review page")
    def get_page() -> Response:
        return _send_file("index.html")

    @endpoints.get("/progidiff/static/{name}", READ, include_in_schema=False, summary="Files of the review page")
    def get_file(name: str) -> Response:
        return _send_file(name)


def _add_data_routes(endpoints: Endpoints) -> None:
    @endpoints.get("/progidiff/review/{image}", READ, tags=["Review"], summary="Size, window and state of an image")
    def describe_image(image: ImageId, user: User = CALLER) -> ReviewedImage:
        context = get_context()
        return _describe_image(context, image, context.readings.find_shown_tag(image, user.name))

    @endpoints.get(
        "/progidiff/review/{image}/slices/{z}", READ, tags=["Review"], summary="One axial slice, int16, little-endian"
    )
    def get_slice(request: Request, image: ImageId, z: int) -> Response:
        volume = open_volume(get_context(), image)
        stack, _ = volume.to_stack()
        _check_slice(z, stack.shape)
        return send_bytes(request, to_pixels(stack[z], find_scale(volume)).tobytes())

    @endpoints.get(
        "/progidiff/review/{image}/masks/{z}",
        READ,
        tags=["Review"],
        summary="All proposals on one axial slice; 204 if a job is not there yet",
        takes="Query: proposals (a key) or job",
    )
    def get_masks(request: Request, image: ImageId, z: int, proposals: str = "", job: str = "") -> Response:
        result = _find_unfinished(get_context(), image, job, z) if job else find_result(get_context(), image, proposals)
        if result is None:
            return Response(status_code=204)
        _check_slice(z, result.grid.shape)
        return send_bytes(request, pack_masks(result, z))

    @endpoints.get(
        "/progidiff/review/{image}/label/{z}",
        READ,
        tags=["Review"],
        summary="The saved label on one axial slice, uint8",
    )
    def get_label(request: Request, image: ImageId, z: int, user: User = CALLER) -> Response:
        context = get_context()
        volume = open_volume(context, image)
        _check_slice(z, volume.to_stack()[0].shape)
        label = load_current(context, image, volume, context.readings.find_shown_tag(image, user.name))
        if label is None:
            raise NotFoundError(f"Image '{image}' has no saved label yet.")
        return send_bytes(request, np.ascontiguousarray(volume.arrange(label)[z], dtype=np.uint8).tobytes())


def _add_submit_route(endpoints: Endpoints) -> None:
    @endpoints.post(
        "/progidiff/review/{image}",
        ANNOTATE,
        tags=["Review"],
        summary="Save what was decided about an image",
        takes="JSON: proposals, volume, slices, or parts of these; painted, base, seconds, effort, confirm",
        body=MOST_PAINTED,
        content=Content.JSON,
    )
    def submit(image: ImageId, decisions: dict[str, Any], user: User = CALLER) -> SubmissionAnswer:
        """Body: see `submissions.submit`."""
        context = get_context()
        return submissions.submit(context, image, open_volume(context, image), decisions, user.name)


def find_scale(volume: Volume) -> tuple[float, float]:
    """(slope, intercept) so that intensity = slope * pixel + intercept and every pixel fits into 16 bits with a sign.

    (1, 0) for whole numbers in that range; otherwise 65535 steps from the smallest to the largest value.
    """
    low, high = float(volume.array.min()), float(volume.array.max())
    if low == high and np.issubdtype(volume.array.dtype, np.floating):
        return 1.0, low  # A picture may be of one value.
    if np.issubdtype(volume.array.dtype, np.integer) and low >= -32768 and high <= 32767:
        return 1.0, 0.0
    return (high - low) / 65535, low + 32768 * (high - low) / 65535


def find_window(volume: Volume) -> tuple[float, float]:
    """The intensities that are shown as black and as white at first; of a picture its own 8 bits, or all that there
    are.
    """
    if volume.modality != PICTURE:
        return compute_window(volume)
    if volume.array.dtype == np.uint8:
        return 0.0, 255.0
    return float(volume.array.min()), float(volume.array.max())


def _list_presets(volume: Volume) -> list[WindowPreset]:
    if volume.modality == PICTURE:
        return [WindowPreset(name="as it is", window=find_window(volume))]
    return [WindowPreset.model_validate(preset) for preset in get_modality(volume.modality).presets]


def to_pixels(intensities: NDArray[Any], scale: tuple[float, float]) -> NDArray[Any]:
    """Intensities as int16, little-endian, see `find_scale`."""
    slope, intercept = scale
    plain = scale == (1.0, 0.0)
    pixels = intensities if plain else np.rint((intensities.astype(np.float64) - intercept) / slope)
    return np.ascontiguousarray(pixels, dtype="<i2")


def pack_masks(result: VolumeProposals, z: int) -> bytes:
    """All proposals of all structures on an axial slice, as the module's text draws it."""
    parts = [struct.pack("<HH", len(result.structures), result.num_proposals)]
    for name in result.structures:
        masks = result.slice_masks(name, z)
        drawn = np.asarray(masks.any(axis=0))
        rows, cols = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        if len(rows) == 0:
            parts.append(struct.pack("<HHHH", 0, 0, 0, 0))
            continue
        y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
        parts.append(struct.pack("<HHHH", y0, y1, x0, x1))
        parts.extend(np.packbits(mask[y0:y1, x0:x1].ravel(), bitorder="little").tobytes() for mask in masks)
    return b"".join(parts)


def _describe_image(context: Context, image: str, tag: str) -> ReviewedImage:
    volume = open_volume(context, image)
    stack, spacing = volume.to_stack()
    if stack.shape[1] * stack.shape[2] > MAX_SLICE_PIXELS:
        raise ImageError(
            f"The slices of '{image}' have {stack.shape[2]} x {stack.shape[1]} pixels, more than a browser can draw "
            "quickly. Open it in 3D Slicer, or add a smaller version of it."
        )
    slope, intercept = find_scale(volume)
    annotations = context.annotations
    slices = annotations.annotated_slices(image, tag)
    if slices is None and annotations.current(image) is None and isinstance(context.labels, SafeLocalDatastore):
        context.labels.adopt(image)  # Made elsewhere: without a history there is nothing to show, and it counts.
        slices = annotations.annotated_slices(image, tag)
    current = annotations.current(image, tag)
    return ReviewedImage(
        image=image,
        shape=list(stack.shape),
        spacing=[round(edge, 6) for edge in spacing],
        modality=volume.modality,
        modality_source=volume.modality_source,
        geometry=GeometryAnswer.model_validate(volume.grid.describe()),
        scale=(slope, intercept),
        window=find_window(volume),
        presets=_list_presets(volume),
        range=(float(volume.array.min()), float(volume.array.max())),
        voxel_ml=volume.voxel_ml,
        kept=[
            KeptProposals(proposals=entry.key, created=entry.created, structures=list(entry.structures))
            for entry in context.infer.store.list(image)
        ],
        label=None if current is None else CurrentLabel.model_validate(current),
        label_ids=_find_label_ids(context, image, volume, tag),
        colors={**COLORS, **_find_own_colors(context)},
        other_colors=list(OTHER_COLORS),
        annotated_slices=list_slices(slices),
        annotated=_list_annotated(context, image, tag),
        sequence=max((saved.sequence for saved in annotations.list(image) if saved.tag == tag), default=0),
        is_done=annotations.find_finished(tag.__eq__).get(image, False),
        voxels=find_voxels(volume.grid),
        listens_to_edits=context.infer.listens_to_edits and volume.modality != PICTURE,
    )


def _find_own_colors(context: Context) -> dict[str, str]:
    """Of the folder's own structures. An image can be looked at with a labels.json that is damaged; a save says what is
    wrong with it.
    """
    try:
        return {row.name: row.color for row in context.labels.structures.own()}
    except RequestError as err:
        logger.warning("Structures of this folder have no colours of their own: %s", err)
        return {}


def find_voxels(grid: Grid) -> VoxelPlaces:
    """How voxels of the axial stack are counted in the file.

    Example:
        >>> find_voxels(Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0])))
        VoxelPlaces(origin=(3, 4, 0), steps=((0, 0, 1), (0, -1, 0), (-1, 0, 0)))
    """
    origin = grid.find_voxel((0, 0, 0))

    def step(*at: int) -> tuple[int, int, int]:
        """Along one axis of the stack; an axis of one slice leads nowhere."""
        ends = grid.find_voxel((at[0], at[1], at[2]))
        i, j, k = (int(np.sign(end - start)) for end, start in zip(ends, origin, strict=True))
        return i, j, k

    depth, height, width = grid.stack_shape
    return VoxelPlaces(origin=origin, steps=(step(depth - 1, 0, 0), step(0, height - 1, 0), step(0, 0, width - 1)))


def _list_annotated(context: Context, image: str, tag: str) -> dict[str, list[int] | None]:
    """Structure -> axial slices on which it is annotated; None for the whole volume."""
    found = context.annotations.find_annotated(image, tag)
    return {name: list_slices(slices) for name, slices in found.items()}


def _find_label_ids(context: Context, image: str, volume: Volume, tag: str) -> dict[str, int]:
    """Structure -> id in the saved label. One that was made elsewhere and names nothing goes by the folder's table."""
    current = context.annotations.current(image, tag)
    if current is None:
        return {}
    if current.label_ids or not isinstance(context.labels, SafeLocalDatastore):
        return dict(current.label_ids)
    label = load_current(context, image, volume, tag)
    drawn = set() if label is None else set(np.unique(label).tolist())
    return {name: value for name, value in context.labels.read_label_ids().items() if value in drawn}


def open_volume(context: Context, image: str) -> Volume:
    """An image of the datastore; a picture is a volume of one slice.

    Raises:
        NotFoundError: if there is none of this name.
        ImageError: if it cannot be read.
    """
    path = images.find_image(context.app, image)
    if is_picture(path):
        return context.textdiff.open_view(Path(path)).volume
    return context.infer.open_volume(path, None, context.app.datastore().get_image_info(image))


def _find_unfinished(context: Context, image: str, job: str, z: int) -> VolumeProposals | None:
    """What a running job has for a slice; None before that, and after its end."""
    unfinished = context.infer.find_unfinished(job)
    return (
        unfinished.proposals
        if unfinished is not None and unfinished.image == image and z in unfinished.slices
        else None
    )


def _check_slice(z: int, shape: tuple[int, ...]) -> None:
    read_int(z, "slice", 0, min(MAX_SLICE, shape[0] - 1))


def send_bytes(request: Request, content: bytes) -> Response:
    """Bytes that no browser keeps, compressed for those that take it."""
    headers = {"Cache-Control": "no-store"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        content = gzip.compress(content, compresslevel=1)
        headers["Content-Encoding"] = "gzip"
    return Response(content, media_type="application/octet-stream", headers=headers)


def _send_file(name: str) -> Response:
    folder = Path(get_context().app.app_dir) / "web" / "review"
    names = {path.name: path for path in folder.iterdir() if path.suffix in _MEDIA_TYPES} if folder.is_dir() else {}
    if name not in names:
        raise NotFoundError(f"The review page has no file '{name[:60]}'.")
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "DENY", "Cache-Control": "no-cache"}
    return FileResponse(names[name], media_type=_MEDIA_TYPES[names[name].suffix], headers=headers)
