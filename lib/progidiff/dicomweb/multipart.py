"""`multipart/related`, the envelope in which DICOMweb sends and takes several parts."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from progidiff.errors import RequestError

_BOUNDARY = re.compile(r'boundary="?([^";]{1,200})"?', re.IGNORECASE)
_TYPE = re.compile(r'type="?([^";]+)"?', re.IGNORECASE)


@dataclass(frozen=True)
class Envelope:
    """How the parts of one answer are kept apart.

    Attributes:
        part_type: Content type of each part, with its parameters.
        boundary: The line between parts.
    """

    part_type: str
    boundary: str

    @classmethod
    def of(cls, part_type: str) -> Envelope:
        """A new one."""
        return cls(part_type, uuid.uuid4().hex)

    @property
    def content_type(self) -> str:
        """Of the whole answer."""
        return f'multipart/related; type="{self.part_type.split(";")[0]}"; boundary={self.boundary}'

    def write(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """The body, part by part."""
        for part in parts:
            yield (
                f"--{self.boundary}\r\nContent-Type: {self.part_type}\r\nContent-Length: {len(part)}\r\n\r\n".encode()
                + part
                + b"\r\n"
            )
        yield f"--{self.boundary}--\r\n".encode()


def read_parts(content_type: str, body: bytes) -> list[bytes]:
    """The parts of a body, without their headers.

    Raises:
        RequestError: if it is no multipart/related.

    Example:
        >>> envelope = Envelope.of("application/dicom")
        >>> read_parts(envelope.content_type, b"".join(envelope.write([b"one", b"two"])))
        [b'one', b'two']
    """
    match = _BOUNDARY.search(content_type)
    if not content_type.lower().lstrip().startswith("multipart/related") or match is None:
        raise RequestError(
            f"The content type is '{content_type[:100]}'; send DICOM files as "
            'multipart/related; type="application/dicom"; boundary=<text>.'
        )
    boundary = b"--" + match.group(1).encode()
    parts: list[bytes] = []
    # The first line has no line break before it; the last one ends in two dashes.
    for piece in (b"\r\n" + body).split(b"\r\n" + boundary)[1:]:
        if piece.startswith(b"--"):
            return parts
        _, found, content = piece.partition(b"\r\n\r\n")
        if not found:
            raise RequestError(
                "A part of the multipart/related body has no empty line after its "
                "headers; it may be cut off. Send it again."
            )
        parts.append(content)
    raise RequestError("The multipart/related body ends before its last boundary; it may be cut off. Send it again.")


def read_type(content_type: str) -> str:
    """The type of the parts that a content type, or an Accept header, names; "" if it names none.

    Example:
        >>> read_type('multipart/related; type="application/dicom"; boundary=x')
        'application/dicom'
    """
    match = _TYPE.search(content_type)
    return match.group(1).strip().lower() if match else ""
