"""Finding an image of the datastore by its id.

An image is only ever named by its id in the datastore, by a session, or uploaded with the request. A request can name
no file of the server.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore

from progidiff.errors import BusyError, ImageError, NotFoundError, RequestError
from progidiff.images.ids import is_plain_id, make_id
from progidiff.server.datastores.image_locks import ImageLocks
from progidiff.server.datastores.local import SafeLocalDatastore

_SERIES_UID = re.compile(r"\d+(\.\d+)+")

_DOWNLOADS = ImageLocks("fetched", seconds=120.0)
"""The host takes a DICOM folder that another thread is still filling for a whole series."""


def list_ids(datastore: Datastore) -> Collection[str]:
    """The ids of all images, to ask for one: a folder has its own, which are not copied."""
    return datastore.list_names() if isinstance(datastore, SafeLocalDatastore) else datastore.list_images()


def resolve_id(app: MONAILabelApp, name: str) -> str:
    """The id of the image that a client names: by its id, or by the name that it uploaded it under.

    Example: see `make_id`. What names no image comes back as it is, so that whoever looks for it says so.
    """
    if not name or is_plain_id(name):
        return name
    known = list_ids(app.datastore())
    try:
        made = make_id(name)
    except RequestError:
        return name
    return made if name not in known and made in known else name


def find_image(app: MONAILabelApp, image_id: str) -> str:
    """The path of an image of the datastore.

    Raises:
        NotFoundError: if the datastore has no image of this id, or its file is gone.
        ImageError: if the file is a link out of the studies folder, or no plain file.
        BusyError: if a DICOMweb server does not answer.
    """
    datastore = app.datastore()
    try:
        known = bool(image_id) and (image_id in list_ids(datastore) or _is_series(datastore, image_id))
        with _DOWNLOADS.hold(image_id):
            path = datastore.get_image_uri(image_id) if known else ""
    except (IndexError, KeyError):
        known = False  # How the host's DICOMweb datastore says that the server has no such series.
    except OSError as err:
        raise BusyError(
            f"The datastore does not answer ({err}). See that the DICOMweb server or the "
            "studies folder is there; try again."
        ) from err
    if not known:
        reason = datastore.explain_absence(image_id) if isinstance(datastore, SafeLocalDatastore) else None
        if reason is not None:
            raise ImageError(reason)
        raise NotFoundError(
            f"There is no image '{image_id[:100]}' in the datastore. GET /datastore/?output=all lists the ids; PUT "
            "/session/ takes other images."
        )
    if not path or not Path(path).exists():
        raise NotFoundError(
            f"The file of image '{image_id}' is gone from the studies folder. Put it "
            "back, or remove the image from the datastore."
        )
    return str(path)


def _is_series(datastore: Datastore, image_id: str) -> bool:
    """Whether the id may name a series that a DICOMweb server has and the host's list leaves out: new since it was
    asked, or not CT.
    """
    return (
        isinstance(datastore, DICOMWebDatastore) and len(image_id) <= 64 and _SERIES_UID.fullmatch(image_id) is not None
    )
