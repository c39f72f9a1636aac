"""The report as Parquet: readable at any time, of one run, with what every step took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest

from progidiff.errors import RequestError, StoreError
from progidiff.evaluation.prelabel import ImageOutcome
from progidiff.prelabelling import report as module
from progidiff.prelabelling.report import ParquetReport, read_report

RUN = {"model": "tiny@1", "prompt": "liver"}
MADE = ImageOutcome("a", "made", read_seconds=0.5, compute_seconds=2.0, write_seconds=0.25, bytes_read=10)


def test_a_report_can_be_read_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FLUSH_ROWS", 2)
    monkeypatch.setattr(module, "ROWS_PER_PART", 4)
    safe: list[str] = []
    report = ParquetReport(str(tmp_path / "r"), RUN, lambda done: safe.extend(outcome.image for outcome in done))
    for number in range(7):
        report.add(replace(MADE, image=f"i{number}"))
        if number:
            table = pyarrow.parquet.read_table(tmp_path / "r")  # Passes _run.json over.
            assert sorted(table["image"].to_pylist()) == safe == [f"i{k}" for k in range((number + 1) // 2 * 2)]
    report.flush()
    assert len(list((tmp_path / "r").glob("part-*.parquet"))) == 2
    row = read_report(str(tmp_path / "r"))["i6"]
    assert (row["read_seconds"], row["compute_seconds"], row["write_seconds"], row["bytes_read"]) == (
        0.5,
        2.0,
        0.25,
        10,
    )
    assert row["finished"].tzinfo is not None


def test_the_same_run_goes_on_and_an_image_that_is_done_gets_no_second_row(tmp_path: Path):
    first = ParquetReport(str(tmp_path), RUN)
    for outcome in (MADE, ImageOutcome("b", "failed", "cut off")):
        first.add(outcome)
    first.flush()
    second = ParquetReport(str(tmp_path), RUN)
    for outcome in (ImageOutcome("a", "there"), replace(MADE, image="b"), ImageOutcome("c", "there")):
        second.add(outcome)
    second.flush()
    assert {image: row["state"] for image, row in read_report(str(tmp_path)).items()} == {
        "a": "made",
        "b": "made",
        "c": "there",
    }
    table = pyarrow.parquet.read_table(tmp_path)
    assert sorted(table["image"].to_pylist()) == ["a", "b", "b", "c"]


def test_a_report_of_another_run_is_refused_with_the_difference(tmp_path: Path):
    ParquetReport(str(tmp_path), RUN)
    with pytest.raises(RequestError, match="prompt 'liver' instead of 'spleen'. Name another folder with --report"):
        ParquetReport(str(tmp_path), {**RUN, "prompt": "spleen"})
    (tmp_path / "_run.json").write_text("{")
    with pytest.raises(RequestError, match="which run"):
        ParquetReport(str(tmp_path), RUN)


def test_a_report_that_cannot_be_written_or_read_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StoreError, RequestError), match=r"file.* cannot be (written|read)"):
        ParquetReport(str(tmp_path / "file"), RUN)
    report = ParquetReport(str(tmp_path / "r"), RUN)
    report.add(MADE)
    report.flush()
    (tmp_path / "r" / "part-x.parquet").write_bytes(b"PAR1")
    with pytest.raises(RequestError, match="no part of a report"):
        ParquetReport(str(tmp_path / "r"), RUN)
