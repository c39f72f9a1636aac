"""Images sent by dcmtk's and pynetdicom's own senders appear in the studies when their series is quiet."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pynetdicom import AE

from progidiff.errors import ProGiDiffError
from progidiff.exchange.importing import CaseOutcome
from progidiff.exchange.receiving import Receiver, ReceiveSettings
from progidiff.images.reading import load_volume
from support.series import AXIAL, make_volume, write_series

QUIET = 0.6


class Node:
    """A receiver on a free port, and what it reported."""

    def __init__(self, root: Path, **options: object) -> None:
        self.studies = root / "studies"
        self.studies.mkdir(parents=True)
        self.incoming = root / "state" / "incoming"
        self.outcomes: list[CaseOutcome] = []
        settings = ReceiveSettings(port=0, allowed=("CT1",), **{"quiet_seconds": QUIET, **options})  # type: ignore[arg-type]
        self.receiver = Receiver(self.studies, root / "state", settings, self.outcomes.append)
        self.port = self.receiver.start()

    def wait(self, count: int) -> list[CaseOutcome]:
        deadline = time.monotonic() + 30
        while len(self.outcomes) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.outcomes


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.receiver.stop()


def send(port: int, files: Sequence[Path], calling: str = "CT1", called: str = "PROGIDIFF") -> list[int]:
    """Status of each object as pynetdicom's sender got it; empty if the association was refused."""
    scu = AE(ae_title=calling)
    datasets = [pydicom.dcmread(file) for file in files]
    for uid in {dataset.SOPClassUID for dataset in datasets}:
        scu.add_requested_context(uid, datasets[0].file_meta.TransferSyntaxUID)
    association = scu.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return []
    found = [association.send_c_store(dataset).Status for dataset in datasets]
    association.release()
    return found


@pytest.mark.skipif(shutil.which("storescu") is None, reason="dcmtk is not installed (apt-get install dcmtk)")
def test_a_series_of_dcmtk_appears_when_it_is_quiet_and_nothing_stays_in_quarantine(tmp_path: Path):
    node = Node(tmp_path, quiet_seconds=4.0)
    files = sorted(write_series(tmp_path / "in").iterdir())
    command = ["storescu", "-aet", "CT1", "-aec", "PROGIDIFF", "127.0.0.1", str(node.port)]
    subprocess.run([*command, *map(str, files[:2])], check=True, timeout=30)
    assert not list(node.studies.iterdir()), "an unfinished series is seen by nobody"
    subprocess.run([*command, *map(str, files[2:])], check=True, timeout=30)
    (outcome,) = node.wait(1)
    assert outcome.state == "imported"
    made = load_volume(node.studies / f"{outcome.image}.nii.gz")
    np.testing.assert_array_equal(made.to_stack()[0], make_volume(AXIAL).to_stack()[0])
    assert sorted(path.suffix for path in node.studies.iterdir()) == [".gz", ".json"]
    assert not list(node.incoming.rglob("*.dcm"))
    assert subprocess.run([*command[:2], "NOBODY", *command[3:], str(files[0])], timeout=30).returncode != 0
    node.receiver.stop()


def test_only_known_names_may_send_and_others_are_told_no(tmp_path: Path, node: Node):
    files = sorted(write_series(tmp_path / "in").iterdir())
    assert send(node.port, files, calling="OTHER") == []
    assert send(node.port, files, called="ELSEWHERE") == []
    assert send(node.port, files) == [0x0000] * 4
    assert [entry.state for entry in node.wait(1)] == ["imported"]
    assert send(node.port, files) == [0x0000] * 4
    assert [entry.state for entry in node.wait(2)] == ["imported", "there"]


def test_what_cannot_be_converted_is_kept_beside_the_reason(tmp_path: Path, node: Node):
    files = sorted(write_series(tmp_path / "in", shape=(5, 6, 6)).iterdir())
    assert set(send(node.port, [*files[:2], *files[3:]])) == {0x0000}
    (outcome,) = node.wait(1)
    assert outcome.state == "failed"
    (refused,) = (node.incoming / "refused").iterdir()
    assert len(list(refused.glob("*.dcm"))) == 5
    assert "some are missing" in (refused / "reason.txt").read_text()
    assert not list(node.studies.iterdir())


def test_a_full_quarantine_refuses_and_a_crashed_conversion_is_done_again(tmp_path: Path):
    files = sorted(write_series(tmp_path / "in").iterdir())
    full = Node(tmp_path / "full", max_gb=files[0].stat().st_size * 2.5 / 1e9)
    try:
        assert send(full.port, files) == [0x0000, 0x0000, 0xA700, 0xA700]
    finally:
        full.receiver.stop()
    left = tmp_path / "again" / "state" / "incoming" / ".converting-abc"
    shutil.copytree(tmp_path / "in", left)
    again = Node(tmp_path / "again")
    try:
        assert [entry.state for entry in again.wait(1)] == ["imported"]
    finally:
        again.receiver.stop()


def test_a_port_that_is_taken_and_a_door_that_stands_open_are_refused(tmp_path: Path, node: Node):
    other = Receiver(tmp_path, tmp_path / "x", ReceiveSettings(port=node.port), lambda outcome: None)
    with pytest.raises(ProGiDiffError, match=r"cannot be listened on .* --port"):
        other.start()
    with pytest.raises(ProGiDiffError, match="Name who may with --allow"):
        Receiver(tmp_path, tmp_path, ReceiveSettings(host="0.0.0.0"), lambda outcome: None)
    with pytest.raises(ProGiDiffError, match="is no AE title"):
        Receiver(tmp_path, tmp_path, ReceiveSettings(ae_title="much too long a name"), lambda outcome: None)
