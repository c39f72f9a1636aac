"""Every error a user can cause or meet, as one tree.

::

    ProGiDiffError            500
    +-- RequestError          422   an option is missing, of the wrong type or out of range
    |   +-- PromptError       422   the prompt names no known structure
    |   +-- TooLargeError     413   more bytes, files or voxels than are taken
    +-- ImageError            422   an image or label cannot be read or used
    |   +-- GeometryError     422   two things that must share a grid or a shape do not
    +-- NotFoundError         404   no such image, result, job or version
    +-- ClosedError           410   a route of the host that this server does not offer
    +-- AccessError           403   this user, address or page may not do this
    |   +-- LoginError        401   no login, or a wrong or expired one
    +-- CancelledError        409   the work was cancelled on request
    +-- ConflictError         409   somebody else changed the same thing meanwhile
    +-- BusyError             503   try again later (`retry_after` seconds)
    |   +-- TooManyTriesError 429   too many failed logins
    |   +-- MemoryFullError   503   the device has not even memory for one slice
    |   +-- NotReadyError     503   the server cannot answer prompts now
    +-- ModelError            503   weights are missing, incomplete or do not fit together
    |   +-- BackboneError     503   the Stable-Diffusion folder cannot be loaded
    +-- StoreError            507   a result could not be kept on disk

A message says what happened, why, and what to do about it, in that order. The number is the HTTP status that the
server answers with; the mapping happens once, in `progidiff.server.gate.answers`.
"""

from __future__ import annotations

from collections.abc import Sequence


class ProGiDiffError(Exception):
    """Base of all errors raised on purpose by this package."""

    status = 500


class RequestError(ProGiDiffError):
    """An option is missing, of the wrong type or out of range."""

    status = 422


class PromptError(RequestError):
    """The prompt names no known structure.

    Attributes:
        suggestions: The nearest known structure names, best first; empty if nothing is near.
    """

    def __init__(self, message: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.suggestions = tuple(suggestions)


class TooLargeError(RequestError):
    """More bytes, files or voxels than this server takes."""

    status = 413


class ImageError(ProGiDiffError):
    """An image or label cannot be read or used."""

    status = 422


class GeometryError(ImageError):
    """Two things that must share a grid or a shape do not."""


class NotFoundError(ProGiDiffError):
    """No such image, result, job or version."""

    status = 404


class ClosedError(ProGiDiffError):
    """A route of the host that this server does not offer, with the reason and what to use instead."""

    status = 410


class AccessError(ProGiDiffError):
    """This user, address or page may not do this."""

    status = 403


class LoginError(AccessError):
    """There is no login, or a wrong or expired one."""

    status = 401


class CancelledError(ProGiDiffError):
    """The work was cancelled on request; nothing of it was kept."""

    status = 409


class ConflictError(ProGiDiffError):
    """Somebody else changed the same thing meanwhile."""

    status = 409


class BusyError(ProGiDiffError):
    """The device or the queue is full.

    Attributes:
        retry_after: Seconds after which another try makes sense.
    """

    status = 503

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyTriesError(BusyError):
    """Too many failed logins, from one address or for one name."""

    status = 429


class MemoryFullError(BusyError):
    """The device has not even memory for one proposal of one slice; others may be using it."""


class NotReadyError(BusyError):
    """The server cannot answer prompts now, see ``GET /readyz``."""


class ModelError(ProGiDiffError):
    """Weights are missing, incomplete or do not fit together."""

    status = 503


class BackboneError(ModelError):
    """The Stable-Diffusion folder cannot be loaded."""


class StoreError(ProGiDiffError):
    """A result could not be kept on disk."""

    status = 507
