"""The host's routes that are not safe as they are, closed or written anew under the same address.

Closed ones answer 410 with the reason and what to use instead: an old client then says more than "not found". The table
in docs/security.md has all of them and says what each of them would have done.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import File, Query, UploadFile
from fastapi.responses import FileResponse, PlainTextResponse, Response
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.utils.sessions import SessionInfo, Sessions
from pydantic import BaseModel, ConfigDict

from progidiff.errors import ClosedError, NotFoundError, RequestError
from progidiff.images.archives import SUFFIXES, Limits, extract_archive
from progidiff.images.choosing import is_companion, keep_one_image
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import (
    ADMINISTER,
    ANNOTATE,
    CALLER,
    CLOSED_MARK,
    LONG,
    MEDIUM,
    OPEN,
    READ,
    UPLOAD,
    Endpoint,
    Endpoints,
)
from progidiff.server.parts import get_context
from progidiff.storage.atomic import scratch_folder
from progidiff.users import Role

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Closed:
    """An address of the host that this server does not offer.

    Attributes:
        method: As in `Endpoint`.
        path: As in `Endpoint`.
        role: Who is told the reason; a client that may not even ask learns nothing.
        would: What it would do, in a few words.
        reason: Why it is closed, and what to do instead.
        body: Bytes that are read before the answer.
    """

    method: str
    path: str
    role: Role
    would: str
    reason: str
    body: int = 0


_FOLDERS = "A model is a folder of several files."
_SLIDES = "Pathology slides are not served here. POST /infer/progidiff answers for CT and MR volumes."
_SCORES = "The server scores slices by itself, in the background. Leave the request out."
_STORES = "This is no address to store DICOM at. POST instances to /proxy/dicom/stow/studies, as multipart/related."

CLOSED: tuple[Closed, ...] = (
    Closed(
        "GET",
        "/docs",
        READ,
        "its page loads scripts from another site",
        "Its page would load scripts from another site into this one. GET /openapi.json has the same description.",
    ),
    Closed(
        "POST",
        "/reload",
        ADMINISTER,
        "could hang the server",
        "Reloading a running app can hang the server for good. Stop it and start it again; nothing that was saved is "
        "lost.",
    ),
    Closed(
        "GET",
        "/model/{model}",
        ADMINISTER,
        "models are folders",
        f"{_FOLDERS} Copy it from the server's disk; `progidiff adapters list` shows versions.",
    ),
    Closed("GET", "/model/info/{model}", ADMINISTER, "models are folders", f"{_FOLDERS} GET /info/ names its version."),
    Closed(
        "PUT",
        "/model/{model}",
        ADMINISTER,
        "would load uploaded weights",
        "Weights are not taken over the network. An administrator puts them on the disk and names the folder with "
        "--conf model_dir.",
    ),
    Closed(
        "DELETE",
        "/model/{model}",
        ADMINISTER,
        "would remove weights",
        "Models are not removed over the network. `progidiff adapters rollback` takes a version back.",
    ),
    Closed("POST", "/infer/wsi/{model}", ANNOTATE, "pathology slides; would read any file", _SLIDES, MEDIUM),
    Closed("POST", "/infer/wsi_v2/{model}", ANNOTATE, "pathology slides; would read any file", _SLIDES, MEDIUM),
    Closed("POST", "/scoring/", ADMINISTER, "starts a process per method", _SCORES, MEDIUM),
    Closed("POST", "/scoring/{method}", ADMINISTER, "starts a process per method", _SCORES, MEDIUM),
    Closed(
        "DELETE",
        "/scoring/",
        ADMINISTER,
        "there is nothing to stop",
        "The host's scoring never runs here. Leave the request out.",
    ),
    *(
        Closed("POST", f"/proxy/dicom/{service}{{path:path}}", ANNOTATE, "no address to store at", _STORES)
        for service in ("stow/", "wado/", "qido/", "")
    ),
)

_ANSWERED_BY_HOST = (
    Endpoint("GET", "/favicon.ico", OPEN, "The icon"),
    Endpoint("GET", "/openapi.json", READ, "Description of all addresses"),
    Endpoint("GET", "/static/{path:path}", READ, "Files of the host's wheel (OHIF)"),
    Endpoint("GET", "/info/", READ, "What the server offers"),
    Endpoint("GET", "/batch/infer", READ, "Status of the batch"),
    Endpoint("DELETE", "/batch/infer", ADMINISTER, "Stops the batch"),
    Endpoint("GET", "/scoring/", READ, "Status of the host's scoring"),
)


class SessionState(BaseModel):
    """An uploaded image, as the host describes it, without paths of the server.

    Attributes:
        name: Id of the session.
        path: "".
        image: File name of the image, or of the folder of a series.
        meta: What the host keeps with it.
        create_ts: When it was made, seconds since 1970.
        last_access_ts: When it was last used, seconds since 1970.
        expiry: Seconds without use after which it is removed.
    """

    model_config = ConfigDict(frozen=True, from_attributes=True)

    name: str
    path: str = ""
    image: str
    meta: dict[str, Any] | None
    create_ts: int
    last_access_ts: int
    expiry: int

    @classmethod
    def of(cls, info: SessionInfo) -> SessionState:
        """Of the host's description."""
        return cls.model_validate({**info.to_json(), "path": "", "image": Path(info.image).name})


class NewSession(BaseModel):
    """A session that was made.

    Attributes:
        session_id: Names it in further requests.
        session_info: Its state.
    """

    model_config = ConfigDict(frozen=True)

    session_id: str
    session_info: SessionState


_MAX_LOG_LINES = 10_000
_GPU_SECONDS = 10
_PLAIN_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_META = "meta.info"
"""The host's description of a session, beside the image in its folder."""
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def build_endpoints() -> Endpoints:
    """Sessions and logs anew, what the host answers, and the closed routes."""
    endpoints = Endpoints()
    _add_sessions(endpoints)
    _add_logs(endpoints)
    endpoints.of_host(*_ANSWERED_BY_HOST)
    _add_closed(endpoints)
    return endpoints


def _add_sessions(endpoints: Endpoints) -> None:
    @endpoints.put(
        "/session/",
        ANNOTATE,
        tags=["Session"],
        summary="Upload an image for a while: one file, several DICOM files, or an archive of them",
        takes="Form: files (1 to 1000, or one archive with uncompress); query: uncompress, series (which image of "
        "several), expiry; unpacked within limits",
        body=UPLOAD,
        deadline=LONG,
    )
    def create_session(
        files: list[UploadFile] = File(...),
        uncompress: bool = False,
        series: str = "",
        expiry: int = Query(0, ge=0, le=30 * 86_400),
        user: User = CALLER,
    ) -> NewSession:
        sessions = _sessions()
        with scratch_folder("session") as folder:
            image = _receive(files, folder, uncompress, series)
            session_id, info = sessions.add_session(str(image), expiry, uncompress=False, session_id=str(uuid.uuid4()))
        logger.info("Session %s by '%s': %d files", session_id, user.name, len(files))
        return NewSession(session_id=session_id, session_info=SessionState.of(info))

    @endpoints.get(
        "/session/{session_id}",
        ANNOTATE,
        tags=["Session"],
        summary="State of an uploaded image, or its file",
        takes="Query: image, update_ts",
        response_model=SessionState,
    )
    def get_session(session_id: str, update_ts: bool = False, image: bool = False) -> SessionState | Response:
        info = _find(session_id, update_ts)
        if not image:
            return SessionState.of(info)
        if not Path(info.image).is_file():
            raise RequestError(
                "The session is a folder of DICOM files, which is not sent as one file. "
                "Run POST /infer/progidiff with its session_id."
            )
        return FileResponse(info.image, media_type="application/octet-stream", filename=Path(info.image).name)

    @endpoints.delete("/session/{session_id}", ANNOTATE, tags=["Session"], summary="Remove an uploaded image")
    def remove_session(session_id: str) -> SessionState:
        info = _find(session_id)
        _sessions().remove_session(session_id)
        return SessionState.of(info)


def _add_logs(endpoints: Endpoints) -> None:
    @endpoints.get(
        "/logs/",
        ADMINISTER,
        tags=["Others"],
        summary="The end of the server's log, as text",
        takes="Query: lines (1 to 10000)",
    )
    def get_log(lines: int = Query(300, ge=1, le=_MAX_LOG_LINES)) -> Response:
        file = Path(settings.MONAI_LABEL_APP_DIR) / "logs" / "app.log"
        if not file.is_file():
            raise NotFoundError("This server writes no log file. Look at what it prints where it was started.")
        with file.open(encoding="utf-8", errors="replace") as log:
            return PlainTextResponse("".join(deque(log, lines)))

    @endpoints.get("/logs/gpu", ADMINISTER, tags=["Others"], summary="What nvidia-smi says")
    def get_gpus() -> Response:
        try:
            found = subprocess.run(
                ["nvidia-smi"], capture_output=True, text=True, encoding="utf-8", timeout=_GPU_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError) as err:
            raise NotFoundError(
                f"nvidia-smi gives no answer ({type(err).__name__}). The machine has no "
                "NVIDIA GPU, or its driver is not there."
            ) from err
        return PlainTextResponse(found.stdout)


def _add_closed(endpoints: Endpoints) -> None:
    for closed in CLOSED:
        summary = f"{CLOSED_MARK} ({closed.would})"
        declare = endpoints.add(
            closed.method, closed.path, closed.role, summary=summary, body=closed.body, include_in_schema=False
        )
        declare(_build_closed(closed))


def _build_closed(closed: Closed) -> Callable[[], None]:
    def refuse() -> None:
        raise ClosedError(f"{closed.method} {closed.path} is closed on this server. {closed.reason}")

    return refuse


def _sessions() -> Sessions:
    sessions = get_context().app.sessions()
    if sessions is None:
        raise NotFoundError(
            "Sessions are switched off. An administrator starts the server with MONAI_LABEL_SESSIONS=true."
        )
    return sessions


def _find(session_id: str, update_ts: bool = False) -> SessionInfo:
    info = _sessions().get_session(session_id, update_ts=update_ts) if _ID.fullmatch(session_id) else None
    if info is None:
        raise NotFoundError(
            f"There is no session '{session_id[:64]}'; it may have expired. Upload the image again with PUT /session/."
        )
    return info


def _receive(files: list[UploadFile], folder: Path, uncompress: bool, series: str) -> Path:
    """The uploaded file, or a folder of several, below `folder`, under names that are plain whatever was sent.

    Args:
        files: As sent.
        folder: To write to.
        uncompress: Whether it is one archive.
        series: Which image of several is meant, see `keep_one_image`.
    """
    received = folder / "image"
    received.mkdir()
    if uncompress:
        if len(files) != 1:
            raise RequestError(
                f"uncompress takes one archive, and {len(files)} files were sent. Pack "
                "them into one, or leave uncompress out."
            )
        archive = folder / "archive"
        _write(files[0], archive)
        extract_archive(archive, received, Limits(size=int(get_context().options.max_upload_gb * 1e9) * 2))
        keep_one_image(received, series)
        return _unwrap(received)
    if len(files) == 1:
        name = (files[0].filename or "").lower()
        if name.endswith(SUFFIXES):
            raise RequestError(f"'{name[-40:]}' is an archive. Add ?uncompress=true.")
        return _write(files[0], received / _make_plain(files[0].filename, "image"))
    for number, file in enumerate(files):
        if not is_companion(Path((file.filename or "").replace("\\", "/"))):
            _write(file, received / f"{number:04d}-{_make_plain(file.filename, 'image')}")
    keep_one_image(received, series)
    return _unwrap(received)


def _unwrap(folder: Path) -> Path:
    """The file or the folder of several files that an archive was made of, which mostly lies in a folder or two of its
    own.
    """
    inner = folder
    while inner.is_dir() and len(entries := list(inner.iterdir())) == 1:
        inner = entries[0]
    if inner == folder:
        return folder
    return inner.rename(
        folder.with_name("unpacked") if inner.is_dir() else folder.parent / _make_plain(inner.name, "file")
    )


def _make_plain(name: str | None, default: str) -> str:
    """The last part of a file name with letters, digits, '.', '_' and '-' only, at most 100 of them; no leading dot."""
    plain = _PLAIN_NAME.sub("_", Path((name or "").replace("\\", "/")).name).lstrip(".")
    plain = plain[-100:].lstrip(".")
    return default if plain in ("", _META) else plain


def _write(file: UploadFile, path: Path) -> Path:
    with path.open("xb") as target:
        shutil.copyfileobj(file.file, target)
    if path.stat().st_size == 0:
        raise RequestError("One of the files is empty. Send the image.")
    return path


def remove_expired_sessions(app: MONAILabelApp) -> int:
    """Remove uploaded images that have expired, also those of earlier runs and those whose description was never
    written.

    The host's own round looks at nothing until a session was made in this run, and stops for good at a folder that it
    cannot read.

    Returns:
        How many were removed.
    """
    sessions = app.sessions()
    root = Path(sessions.store_path) if sessions is not None else None
    if root is None or not root.is_dir():
        return 0
    removed = 0
    for folder in root.iterdir():
        try:
            info = (
                sessions.get_session(folder.name, update_ts=False, fetch_cache=False)
                if (folder / _META).is_file()
                else None
            )
            last, expiry = (
                (info.last_access_ts, info.expiry) if info is not None else (folder.stat().st_mtime, sessions.expiry)
            )
            if last + expiry < time.time():
                sessions.remove_session(folder.name)
                removed += 1
        except (OSError, ValueError, TypeError, AttributeError) as err:  # Half written, or somebody else's.
            logger.warning("Session %s cannot be read (%s); it is left alone", folder.name, err)
    return removed
