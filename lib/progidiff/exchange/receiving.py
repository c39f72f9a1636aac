"""A DICOM node that takes images from scanners and PACS (C-STORE) into a folder of studies.

What arrives lies in quarantine first, below the server's own folder, one folder per series. When a series has been
quiet for a while it is converted (`dicom_folders`), and the image appears in the studies by rename; a server that
watches them lists it then. A series that cannot be converted stays in `refused/` beside the reason. Nothing in an
object's header names a file here: files are called by digests. Files are read in a process of their own
(`images.decoding`).

AE titles are names and no passwords: keep the port to a network of machines that may send.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.uid import (
    JPEG2000,
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    RLELossless,
)
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from progidiff.errors import BusyError, ProGiDiffError, RequestError, StoreError
from progidiff.exchange.dicom_folders import find_series, import_series
from progidiff.exchange.importing import CaseOutcome
from progidiff.storage.atomic import atomic_file

logger = logging.getLogger(__name__)

_SUCCESS, _FULL, _NO_MATCH, _CANNOT = 0x0000, 0xA700, 0xA900, 0xC000
"""Answers of a storage service (PS3.4 B.2.3)."""

_CLASSES = (
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MRImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
)
_SYNTAXES = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
    RLELossless,
]
_CONVERTING = ".converting-"
_REFUSED = "refused"
_REASON = "reason.txt"


@dataclass(frozen=True)
class ReceiveSettings:
    """How a node listens.

    Attributes:
        host: Interface; 127.0.0.1 for this machine alone.
        port: TCP port; 0 for any that is free.
        ae_title: Its own, up to 16 characters.
        allowed: Calling AE titles; empty for any, on this machine alone.
        quiet_seconds: Without a new object after which a series is complete.
        max_associations: At a time.
        max_gb: Of objects in quarantine; more are refused.
        max_files: Of one series.
        timeout: Seconds that a peer may be silent.
    """

    host: str = "127.0.0.1"
    port: int = 11112
    ae_title: str = "PROGIDIFF"
    allowed: tuple[str, ...] = ()
    quiet_seconds: float = 30.0
    max_associations: int = 4
    max_gb: float = 20.0
    max_files: int = 10_000
    timeout: float = 60.0

    def check(self) -> None:
        """Refuse what cannot be, or would let anybody in.

        Raises:
            RequestError: saying what to write instead.
        """
        for title in (self.ae_title, *self.allowed):
            if not title.strip() or len(title) > 16 or not title.isascii() or not title.isprintable() or "\\" in title:
                raise RequestError(f"'{title[:40]}' is no AE title: up to 16 ASCII characters without a backslash.")
        if not self.allowed and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise RequestError(
                f"Anybody who reaches {self.host} could send images. Name who may with --allow, for example --allow "
                "CT1."
            )


class Receiver:
    """Listens, keeps, and converts what is complete.

    Args:
        studies: Where images appear.
        state: The server's own folder; `incoming` below it is the quarantine.
        settings: How.
        report: Called with what became of each series, from the converting thread.
    """

    def __init__(
        self, studies: Path, state: Path, settings: ReceiveSettings, report: Callable[[CaseOutcome], None]
    ) -> None:
        settings.check()
        self._studies = studies
        self._incoming = state / "incoming"
        self._settings = settings
        self._report = report
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._server: Any = None
        self._worker = threading.Thread(target=self._work, name="dicom-convert", daemon=True)

    def start(self) -> int:
        """Listen, in threads of their own.

        Returns:
            The port.

        Raises:
            BusyError: if the port is taken.
            StoreError: if the quarantine cannot be made.
        """
        settings = self._settings
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            for path in self._incoming.glob(f"{_CONVERTING}*"):  # What a crash cut off is converted again.
                os.replace(path, self._incoming / path.name.removeprefix(_CONVERTING))
        except OSError as err:
            raise StoreError(f"'{self._incoming}' cannot be used ({err}). Check who may write there.") from err
        node = AE(ae_title=settings.ae_title)
        node.require_called_aet = True
        node.require_calling_aet = list(settings.allowed)
        node.maximum_associations = settings.max_associations
        node.acse_timeout = node.dimse_timeout = node.network_timeout = settings.timeout
        node.add_supported_context(Verification)
        for storage in _CLASSES:
            node.add_supported_context(storage, _SYNTAXES)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_REJECTED, _note_rejected)]
        try:
            self._server = node.start_server((settings.host, settings.port), block=False, evt_handlers=handlers)
        except OSError as err:
            raise BusyError(
                f"Port {settings.port} of {settings.host} cannot be listened on ({err}). Another program may have it; "
                "choose another with --port.",
                retry_after=60,
            ) from err
        self._worker.start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Take nothing more; what is in quarantine stays for the next start."""
        self._stop.set()
        if self._server is not None:
            self._server.shutdown()
        if self._worker.is_alive():
            self._worker.join(timeout=self._settings.timeout)

    def _store(self, event: Any) -> int:
        """Keep one object; the answer is sent when it is on the disk."""
        try:
            series, instance = str(event.dataset.SeriesInstanceUID), str(event.request.AffectedSOPInstanceUID)
            content = event.encoded_dataset()
        except Exception as err:  # Whatever the parser raises on bytes that somebody sent, the object is at fault.
            logger.warning("An object could not be read: %s", err)
            return _CANNOT
        if not UID(series).is_valid or not UID(instance).is_valid:
            return _NO_MATCH
        folder = self._incoming / _digest(series)
        try:
            with self._lock:
                if self._measure() + len(content) > self._settings.max_gb * 1e9:
                    logger.error("The quarantine holds %s GB; objects are refused", self._settings.max_gb)
                    return _FULL
                folder.mkdir(exist_ok=True)
                if len(os.listdir(folder)) >= self._settings.max_files:
                    return _FULL
                with atomic_file(folder / f"{_digest(instance)}.dcm", durable=False) as scratch:
                    scratch.write_bytes(content)
        except OSError as err:
            logger.error("An object could not be kept: %s", err)
            return _FULL
        return _SUCCESS

    def _measure(self) -> int:
        """Bytes in quarantine, without what was refused."""
        total = 0
        for folder in self._incoming.iterdir():
            if folder.name != _REFUSED and folder.is_dir():
                total += sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
        return total

    def _work(self) -> None:
        """Convert what is quiet, until the end."""
        while not self._stop.wait(min(1.0, self._settings.quiet_seconds / 2)):
            for folder in self._find_quiet():
                try:
                    self._bring_in(folder)
                except (OSError, ProGiDiffError) as err:  # The disk may be full: tried again at the next start.
                    logger.error("A series could not be brought in: %s", err)

    def _find_quiet(self) -> list[Path]:
        now = time.time()
        found = []
        with self._lock:
            for folder in sorted(self._incoming.iterdir()):
                if folder.is_dir() and folder.name != _REFUSED and not folder.name.startswith("."):
                    last = max((entry.stat().st_mtime for entry in os.scandir(folder)), default=folder.stat().st_mtime)
                    if now - last >= self._settings.quiet_seconds:
                        taken = self._incoming / f"{_CONVERTING}{folder.name}"
                        os.replace(folder, taken)  # What comes later is another folder.
                        found.append(taken)
        return found

    def _bring_in(self, folder: Path) -> None:
        found = find_series(folder)
        outcomes = [import_series(series, self._studies) for series in found.series]
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        if failed or not outcomes:
            reasons = [note for outcome in failed for note in outcome.notes] or [*found.notes, "It holds no image."]
            self._refuse(folder, "\n".join(reasons))
        else:
            shutil.rmtree(folder)
        for outcome in outcomes:
            self._report(outcome)

    def _refuse(self, folder: Path, reason: str) -> None:
        target = self._incoming / _REFUSED / f"{folder.name.removeprefix(_CONVERTING)}-{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        os.replace(folder, target)
        (target / _REASON).write_text(f"{reason}\n", encoding="utf-8")
        logger.warning("Refused, and kept in '%s': %s", target, reason)


def _note_rejected(event: Any) -> None:
    logger.warning(
        "An association was rejected: '%s' called '%s' from %s",
        event.assoc.requestor.ae_title,
        event.assoc.requestor.primitive.called_ae_title if event.assoc.requestor.primitive else "",
        event.assoc.requestor.address,
    )


def _digest(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:32]
