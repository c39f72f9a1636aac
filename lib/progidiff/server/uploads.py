"""Images that come with a request: uploaded for one inference, or kept in a session."""

from __future__ import annotations

import re
import shutil
from contextlib import ExitStack

from fastapi import UploadFile
from monailabel.interfaces.app import MONAILabelApp

from progidiff.errors import NotFoundError, RequestError
from progidiff.images.formats import Use, find_format, list_suffixes
from progidiff.logs import note_texts
from progidiff.storage.atomic import scratch_folder

_SESSION_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def keep_upload(file: UploadFile, uploads: ExitStack) -> str:
    """Write an uploaded image to a temporary folder that goes when `uploads` is closed, also if the request fails."""
    note_texts([file.filename or ""])
    row = find_format(file.filename or "", Use.UPLOAD)
    if row is None:
        name = (file.filename or "")[-40:]
        *most, last = list_suffixes(Use.UPLOAD, "volume")
        raise RequestError(
            f"An upload named '{name}' is not read. Send {', '.join(most)} or {last}, or "
            "a picture; a DICOM series goes to PUT /session/."
        )
    folder = uploads.enter_context(scratch_folder("upload"))
    path = folder / f"image{row.suffix}"
    with path.open("wb") as target:
        shutil.copyfileobj(file.file, target)
    return str(path)


def find_session(app: MONAILabelApp, session_id: str) -> str:
    """The path of the image that a session keeps.

    Raises:
        NotFoundError: if there is no such session, or it has expired.
    """
    sessions = app.sessions()
    session = sessions.get_session(session_id) if sessions is not None and _SESSION_ID.fullmatch(session_id) else None
    if session is None:
        raise NotFoundError(
            f"There is no session '{session_id[:64]}'; it may have expired. Upload the image again with PUT /session/."
        )
    return str(session.image)
