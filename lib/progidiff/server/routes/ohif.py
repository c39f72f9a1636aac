"""What the bundled OHIF needs beside DICOMweb: its configuration with our panel in it, the panel's files, and masks for
it.

OHIF itself is the host's and stays as it is. Its configuration is the host's file with a few lines after it: they
correct the data source and load ``apps/progidiff/web/ohif/panel.js``, which finds out what the viewer offers and stays
away if that has changed. Behind a proxy with a sub-path the addresses that its build has in it are moved below that.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import monailabel.endpoints
import numpy as np
from fastapi import Request
from fastapi.responses import FileResponse, Response
from monailabel.endpoints.ohif import get_ohif
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from progidiff.dicomweb.geometry import ServedGrid
from progidiff.errors import NotFoundError
from progidiff.images.formats import is_picture
from progidiff.images.volume import Volume
from progidiff.prompts.structures import number_structures
from progidiff.proposals.request import DISAGREEMENT
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.gate.endpoints import READ, Endpoints
from progidiff.server.gate.paths import find_root
from progidiff.server.parts import Context, get_context
from progidiff.server.routes.dicomweb import open_named
from progidiff.server.tasks.answers import BANDS

HEAT_LABELS = tuple(range(201, 201 + len(BANDS)))
"""Label ids of the disagreement bands in the panel's masks: beside the structures, which come from 1."""

_CONFIG = Path(monailabel.endpoints.__file__).parent / "static" / "ohif" / "app-config.js"
_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}
_WITH_ADDRESSES = (".html", ".js")
_ADDRESS = re.compile(r"""["'](?=/ohif/)""")
"""What stands before the address of the viewer in its build: in its page, and where its scripts look for each other."""

_PATCH = """
/* Added by ProGiDiff Label. */
(() => {
  const facts = %s;
  for (const source of (window.config && window.config.dataSources) || []) {
    const configuration = Object.assign(source.configuration || {}, facts.dataSource);
    for (const [name, value] of Object.entries(configuration)) {
      if (typeof value === 'string' && value.startsWith('/')) configuration[name] = facts.prefix + value;
    }
  }
  if (window.config) window.config.routerBasename = facts.prefix + (window.config.routerBasename || '/ohif/');
  const style = document.createElement('link');
  style.rel = 'stylesheet';
  style.href = facts.prefix + '/progidiff/ohif/files/panel.css';
  const script = document.createElement('script');
  script.type = 'module';
  script.src = facts.prefix + '/progidiff/ohif/files/panel.js';
  document.head.append(style, script);
})();
"""


class ServedSeries(BaseModel):
    """An image as OHIF calls it.

    Attributes:
        image: Its id.
        study, series: UIDs.
        axial_slices: For every slice of the series the axial index that the server counts with; null if the series is
            not axial.
        listens_to_edits: Whether the model draws by edits; their points count columns, rows and slices of the series.
    """

    model_config = ConfigDict(frozen=True)

    image: str
    study: str
    series: str
    axial_slices: list[int] | None
    listens_to_edits: bool


def build_endpoints() -> Endpoints:
    """Configuration, panel and masks."""
    endpoints = Endpoints()

    @endpoints.get("/ohif/app-config.js", READ, include_in_schema=False, summary="How OHIF reaches this server")
    def get_config(request: Request) -> Response:
        context = get_context()
        source: dict[str, bool | str] = {"supportsReject": False, "dicomUploadEnabled": False}
        if not context.served.is_remote:
            source["friendlyName"] = "Folder of images"
        facts = json.dumps({"dataSource": source, "prefix": find_root(request.scope)})
        text = _CONFIG.read_text(encoding="utf-8") + _PATCH % facts
        return Response(text, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    @endpoints.get("/ohif/{path:path}", READ, include_in_schema=False, summary="OHIF")
    def get_viewer(request: Request, path: str) -> Response:
        answer: FileResponse = get_ohif(path)
        root = find_root(request.scope)
        if not root or Path(answer.path).suffix not in _WITH_ADDRESSES:
            return answer
        text = Path(answer.path).read_text(encoding="utf-8")
        return Response(move_below(text, root), media_type=answer.media_type)

    @endpoints.get("/progidiff/ohif/files/{name}", READ, include_in_schema=False, summary="Files of the panel in OHIF")
    def get_file(name: str) -> Response:
        folder = Path(get_context().app.app_dir) / "web" / "ohif"
        files = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
        path = files.get(name)
        if path is None or path.suffix not in _MEDIA_TYPES:
            raise NotFoundError(f"The panel has no file '{name[:60]}'.")
        return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers={"Cache-Control": "no-cache"})

    @endpoints.get(
        "/progidiff/ohif/images/{image}",
        READ,
        tags=["OHIF"],
        summary="How an image is called in OHIF, and which of its slices are axial",
    )
    def describe_image(image: str) -> ServedSeries:
        context = get_context()
        _refuse_picture(context, image)
        image_id, volume = open_named(context, image)
        study, series = _find_uids(context, image_id)
        return ServedSeries(
            image=image_id,
            study=study,
            series=series,
            axial_slices=_list_axial(context, volume),
            listens_to_edits=context.infer.listens_to_edits,
        )

    @endpoints.get(
        "/progidiff/ohif/masks/{image}",
        READ,
        tags=["OHIF"],
        summary="One proposal as voxels of the series, cropped",
        takes="Query: proposals (a key) or job, show",
    )
    def get_mask(image: str, proposals: str = "", job: str = "", show: str = "consensus") -> Response:
        """uint8, slice by slice and row by row, gzip; the header X-Box says where: z0,z1,y0,y1,x0,x1, half open, of
        Z,Y,X in X-Shape.
        """
        context = get_context()
        image_id, volume = open_named(context, image)
        result = _find_result(context, image_id, proposals, job)
        labels = context.served.arrange(volume, _draw(result, volume, show))
        box = _find_box(labels)
        crop = np.ascontiguousarray(labels[tuple(slice(low, high) for low, high in box)])
        return Response(
            gzip.compress(crop.tobytes(), compresslevel=1, mtime=0),
            media_type="application/octet-stream",
            headers={
                "Content-Encoding": "gzip",
                "X-Box": ",".join(f"{low},{high}" for low, high in box),
                "X-Shape": ",".join(map(str, labels.shape)),
                "Cache-Control": "no-store" if job else "private, max-age=3600",
            },
        )

    return endpoints


def move_below(text: str, root: str) -> str:
    """A file of OHIF's build with the addresses in it below the prefix of a proxy.

    Example:
        >>> move_below('<link href="/ohif/app.css">', "/labels")
        '<link href="/labels/ohif/app.css">'
    """
    return _ADDRESS.sub(rf"\g<0>{root}", text)


def _refuse_picture(context: Context, image: str) -> None:
    """Say where a picture is labelled; what is no image, or a series, is left to who opens it."""
    datastore = context.app.datastore()
    if not context.served.is_remote and is_picture(str(datastore.get_image_uri(image))):
        raise NotFoundError(
            f"Image '{image}' is a picture, and OHIF shows series of slices. Label it on the review page: "
            f"/progidiff/#image={quote(image)}."
        )


def _find_uids(context: Context, image_id: str) -> tuple[str, str]:
    if context.served.is_remote:
        info = context.app.datastore().get_image_info(image_id)
        return str(info.get("StudyInstanceUID", "")), image_id
    entry = context.served.describe(image_id)
    if entry is None or entry.refused:
        raise NotFoundError(
            f"Image '{image_id}' cannot be shown in OHIF. {entry.refused if entry is not None else 'Its file is gone.'}"
        )
    return entry.identity.study_uid, entry.identity.series_uid


def _list_axial(context: Context, volume: Volume) -> list[int] | None:
    """For every slice of the series the axial index z that the server counts with; None if the series is not axial."""
    if not context.served.is_remote:
        return list(range(ServedGrid.of(volume.grid).shape[0]))
    if volume.grid.axial_axis != 2:
        return None
    return [volume.grid.locate((0, 0, index))[0] for index in range(volume.array.shape[2])]


def _find_result(context: Context, image_id: str, key: str, job: str) -> VolumeProposals:
    if job:
        unfinished = context.infer.find_unfinished(job)
        if unfinished is None or unfinished.image != image_id:
            raise NotFoundError("This job has proposed nothing yet, or has ended. Ask for its result by `proposals`.")
        return unfinished.proposals
    known = {entry.key for entry in context.infer.store.list(image_id)}
    result = context.infer.store.load(key) if key in known else None
    if result is None:
        raise NotFoundError(f"No proposals {key[:64]} of image '{image_id}' are kept any more. Run the prompt again.")
    return result


def _draw(result: VolumeProposals, volume: Volume, show: str) -> NDArray[Any]:
    if show == DISAGREEMENT:
        percent = result.disagreement_map(volume.grid)
        found: NDArray[Any] = np.array([0, *HEAT_LABELS], dtype=np.uint8)[(percent.astype(np.uint16) + 24) // 25]
        return found
    ids = number_structures(result.structures)
    return result.label_map(volume.grid, show, ids)


def _find_box(labels: NDArray[Any]) -> list[tuple[int, int]]:
    """Where anything is drawn, half open per axis; empty if nothing is."""
    slices = labels.any(axis=(1, 2))
    rows, columns = labels.any(axis=(0, 2)), labels.any(axis=(0, 1))
    box = []
    for occupied in (slices, rows, columns):
        where = np.flatnonzero(occupied)
        box.append((int(where[0]), int(where[-1]) + 1) if where.size else (0, 0))
    return box
