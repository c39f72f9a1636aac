"""Images in an object store, labels and report in it, too; and what it says when it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.errors import NotFoundError, RequestError, StoreError
from progidiff.evaluation.prelabel import Item
from progidiff.prelabelling.report import read_report
from progidiff.prelabelling.sources import find_images
from progidiff.storage import addresses
from support.s3 import BUCKET, S3, run_s3
from support.series import write_series


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with run_s3() as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    addresses.open_filesystem.cache_clear()
    yield f"s3://{BUCKET}"
    addresses.open_filesystem.cache_clear()


def test_volumes_and_series_of_a_bucket_are_labelled_into_it_and_not_made_again(
    bucket: str, tiny_model: Path, tmp_path: Path, phantom_writer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = f"{bucket}/pool"
    addresses.put_bytes(f"{root}/p1/ct.nii.gz", phantom_writer(tmp_path / "ct.nii.gz", shape=(32, 32, 4)).read_bytes())
    addresses.put_bytes(f"{root}/p1/ct.json", b'{"modality": "MR"}')
    addresses.put_bytes(f"{root}/broken.nii.gz", b"this is no image")
    for file in write_series(tmp_path / "series", shape=(24, 24, 4)).iterdir():
        addresses.put_bytes(f"{root}/p2/series/{file.name}", file.read_bytes())
    assert find_images(root, root) == [
        Item("broken", f"{root}/broken.nii.gz"),
        Item("p1__ct", f"{root}/p1/ct.nii.gz", sidecar=f"{root}/p1/ct.json"),
        Item("p2__series", f"{root}/p2/series"),
    ]
    options = ["--prompt", "liver", "-k", "2", "--steps", "1", "--model", str(tiny_model), "--device", "cpu"]
    for attempt in range(2):
        done = CliRunner().invoke(app, ["prelabel", "--studies", root, "--out", root, *options])
        assert done.exit_code == 1, done.output
        assert done.output.count(": made") == (2 if attempt == 0 else 0)
        assert done.output.count(": there") == (0 if attempt == 0 else 2)
    [report] = {file.address.rpartition("/")[0] for file in addresses.find_files(f"{root}/reports")}
    rows = read_report(report)
    assert {image: (row["state"], row["modality"]) for image, row in rows.items()} == {
        "broken": ("failed", ""),
        "p1__ct": ("made", "MR"),
        "p2__series": ("made", "CT"),
    }
    assert rows["p2__series"]["bytes_read"] == sum(file.stat().st_size for file in (tmp_path / "series").iterdir())
    label = addresses.read_bytes(f"{root}/labels/original/p1__ct.nii.gz")
    assert len(label) == rows["p1__ct"]["bytes_written"]
    assert not list(tmp_path.rglob("*fetched*"))


def test_a_bucket_that_is_missing_or_refuses_is_named(s3: S3, bucket: str):
    addresses.put_bytes(f"{bucket}/some/a.txt", b"text")
    for address in (f"{bucket}/none", "s3://nosuchbucket/none"):
        with pytest.raises(NotFoundError, match=address):
            list(addresses.find_files(address))
    with pytest.raises(StoreError, match="s3://nosuchbucket/a.txt' cannot be written"):
        addresses.put_bytes("s3://nosuchbucket/a.txt", b"text")
    with pytest.raises(RequestError, match="names no bucket"):
        list(addresses.find_files("s3://"))
    s3.require_rights(True)
    try:
        with pytest.raises(RequestError, match="cannot be read .*Check the address, the credentials"):
            list(addresses.find_files(f"{bucket}/some"))
        with pytest.raises(StoreError, match="check who may write there"):
            addresses.put_bytes(f"{bucket}/some/b.txt", b"text")
    finally:
        s3.require_rights(False)
    assert addresses.read_bytes(f"{bucket}/some/a.txt") == b"text"


def test_an_object_appears_whole_or_not_at_all(s3: S3, bucket: str):
    script = (
        "import os, signal, sys\nfrom progidiff.storage import addresses\n"
        "filesystem, path = addresses.open_address(sys.argv[1])\nstream = filesystem.open(path, 'wb')\n"
        "stream.write(b'x' * (6 << 20))\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, f"{bucket}/killed/label.nii.gz"]
    killed = subprocess.run(command, env={**os.environ, **s3.environment}, timeout=120, check=False)
    assert killed.returncode < 0
    assert not addresses.exists(f"{bucket}/killed/label.nii.gz")
