"""What became of every image, as Parquet that grows while the run goes on.

A report is a folder: part files of up to `ROWS_PER_PART` rows, and ``_run.json`` with the settings. A part appears
whole, by rename or by a single put, and is written anew with more rows until it is full; so the folder can be read at
any moment (``pandas.read_parquet``, DuckDB, Spark), and a crash costs the rows of the last seconds, whose images the
next run finds labelled and reports. Every process writes parts of its own name. An image that failed and was labelled
by a later run has a row of each: the last one (``finished``) counts.
"""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from progidiff.errors import NotFoundError, RequestError
from progidiff.evaluation.prelabel import ImageOutcome
from progidiff.storage import addresses
from progidiff.storage.atomic import name_owner

ROWS_PER_PART = 1024
FLUSH_SECONDS = 10.0
FLUSH_ROWS = 64
RUN = "_run.json"
"""Readers of Parquet folders pass over what begins so."""


class ParquetReport:
    """A report that is being written; safe for threads.

    Args:
        address: Of the folder.
        run: What the run was asked, JSON: two runs of one report must say the same.
        on_flush: Told which outcomes are safe, after every write.

    Raises:
        RequestError: if the folder holds the report of another run.
        StoreError: if it cannot be written.
    """

    def __init__(
        self,
        address: str,
        run: Mapping[str, Any],
        on_flush: Callable[[Sequence[ImageOutcome]], None] = lambda outcomes: None,
    ) -> None:
        self.address = address
        self._on_flush = on_flush
        self._name = name_owner()
        self._part = 0
        self._rows: list[dict[str, Any]] = []
        self._fresh: list[ImageOutcome] = []
        self._written = time.monotonic()
        self._lock = threading.Lock()
        _check_run(address, run)
        self._known = {image: row["state"] for image, row in read_report(address).items()}

    def add(self, outcome: ImageOutcome) -> None:
        """Take a row; what is known to be labelled gets no second one for being found so.

        Raises:
            StoreError: if the place refuses.
        """
        with self._lock:
            self._fresh.append(outcome)
            if outcome.state != "there" or self._known.get(outcome.image) not in ("made", "there"):
                self._rows.append(_make_row(outcome))
                self._known[outcome.image] = outcome.state
            if len(self._fresh) >= FLUSH_ROWS or time.monotonic() - self._written >= FLUSH_SECONDS:
                self._flush()

    def flush(self) -> None:
        """Write what is not written yet.

        Raises:
            StoreError: if the place refuses.
        """
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        self._written = time.monotonic()
        if not self._fresh:
            return
        if self._rows:
            name = f"part-{self._name}-{self._part:05d}.parquet"
            addresses.put_bytes(addresses.join(self.address, name), _encode(self._rows))
        if len(self._rows) >= ROWS_PER_PART:
            self._part, self._rows = self._part + 1, []
        fresh, self._fresh = self._fresh, []
        self._on_flush(fresh)


def read_report(address: str) -> dict[str, dict[str, Any]]:
    """The last row of every image, by id; empty if there is no report yet.

    Raises:
        RequestError: if it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    found: dict[str, dict[str, Any]] = {}
    try:
        files = [file for file in addresses.find_files(address, deep=False) if file.name.endswith(".parquet")]
    except NotFoundError:
        return found
    for file in files:
        try:
            rows = pyarrow.parquet.read_table(io.BytesIO(addresses.read_bytes(file.address))).to_pylist()
        except (OSError, pyarrow.ArrowException) as err:
            raise RequestError(
                f"'{file.address}' is no part of a report ({err}). Move it away, or name another folder with --report."
            ) from err
        for row in rows:
            before = found.get(row["image"])
            if before is None or before["finished"] <= row["finished"]:
                found[row["image"]] = row
    return found


def _check_run(address: str, run: Mapping[str, Any]) -> None:
    place = addresses.join(address, RUN)
    wanted = json.loads(json.dumps(run))
    try:
        present = json.loads(addresses.read_bytes(place))
    except NotFoundError:
        addresses.put_bytes(place, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    except (OSError, ValueError) as err:
        raise RequestError(
            f"'{place}' cannot be read ({err}), so that nobody knows which run the report is of. Name another folder "
            "with --report."
        ) from err
    if present == wanted:
        return
    names = sorted(name for name in {*present, *wanted} if present.get(name) != wanted.get(name))
    differences = ", ".join(f"{name} {present.get(name)!r} instead of {wanted.get(name)!r}" for name in names[:4])
    raise RequestError(
        f"The report in '{address}' is of another run: {differences}. Name another folder with --report, or move this "
        "one away."
    )


def _make_row(outcome: ImageOutcome) -> dict[str, Any]:
    return {**asdict(outcome), "host": socket.gethostname(), "finished": datetime.now(UTC)}


def _encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    kinds = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}
    columns = [(field.name, kinds[str(field.type)]) for field in fields(ImageOutcome)]
    columns += [("host", pyarrow.string()), ("finished", pyarrow.timestamp("us", tz="UTC"))]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(columns)), buffer)
    return buffer.getvalue()
