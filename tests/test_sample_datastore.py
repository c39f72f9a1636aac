"""Filling the sample datastore: with an index, without one, and with one that lies."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest

from progidiff.images.intensities import guess_modality
from progidiff.images.reading import load_volume

SCRIPT = Path(__file__).resolve().parents[1] / "sample_datastore" / "prepare.py"
NOWHERE = "http://127.0.0.1:9/simple"


@pytest.fixture
def prepare() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare_sample_datastore", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, prepare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package index on this machine whose archive holds one small NIfTI file, which the script is told to expect."""
    array = np.random.default_rng(0).integers(-1000, 500, (12, 10, 8)).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.eye(4)).to_bytes()
    compressed = io.BytesIO()
    with tarfile.open(fileobj=compressed, mode="w:gz") as tar:
        for name, content in (
            (f"x/{prepare.REFERENCE}/example.nii.gz", gzip_bytes(image)),
            ("x/setup.py", b"raise SystemExit"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    archive = compressed.getvalue()
    sample = prepare.Sample(
        "sample_one",
        f"{prepare.REFERENCE}/example.nii.gz",
        hashlib.sha256(gzip_bytes(image)).hexdigest(),
        "CT",
        "noise",
    )
    monkeypatch.setattr(prepare, "SAMPLES", (sample,))
    monkeypatch.setattr(prepare, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    folder = tmp_path / "index" / prepare.PACKAGE
    folder.mkdir(parents=True)
    (folder / "TotalSegmentator-2.18.0.tar.gz").write_bytes(archive)
    (folder / "index.html").write_text(
        '<a href="TotalSegmentator-2.17.0.tar.gz">old</a> <a href="TotalSegmentator-2.18.0.tar.gz#sha256=0">new</a>',
        encoding="utf-8",
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(tmp_path / "index")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def gzip_bytes(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content, mtime=0)


def list_images(folder: Path) -> list[str]:
    """What MONAI Label would take for an image."""
    patterns = ("*.nii.gz", "*.nii", "*.nrrd", "*.jpg", "*.png", "*.tif", "*.svs", "*.xml")
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))


def test_without_an_index_there_is_a_phantom_and_the_reason(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["--folder", str(tmp_path), "--index-url", NOWHERE]) == 0
    said = capsys.readouterr().out
    assert "could not be fetched (http://127.0.0.1:9/simple: " in said
    assert "sample_phantom_ct.nii.gz instead" in said
    assert list_images(tmp_path) == ["sample_phantom_ct.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_phantom_ct.json", "sample_phantom_ct.nii.gz"]


def test_the_phantom_loads_as_ct_with_the_liver_on_the_patients_right(prepare: ModuleType, tmp_path: Path) -> None:
    prepare.main(["--folder", str(tmp_path), "--offline"])
    volume = load_volume(tmp_path / "sample_phantom_ct.nii.gz")
    assert (volume.modality, volume.modality_source) == ("CT", "sidecar")
    assert guess_modality(volume.array) == "CT"
    stack, spacing = volume.to_stack()
    assert spacing == (5.0, 3.0, 3.0)
    liver = (stack > 90) & (stack < 125)
    liver[:, stack.shape[1] * 3 // 5 :] = False
    assert np.nonzero(liver)[2].mean() < stack.shape[2] / 2 - 10
    spine = np.nonzero(stack[22] > 150)[0]
    assert np.median(spine) > stack.shape[1] * 0.65


def test_the_phantom_is_the_same_every_time(prepare: ModuleType, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare.main(["--folder", str(tmp_path / name), "--offline"])
    assert (tmp_path / "a" / "sample_phantom_ct.nii.gz").read_bytes() == (
        tmp_path / "b" / "sample_phantom_ct.nii.gz"
    ).read_bytes()


def test_no_phantom_is_put_beside_somebodys_images(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.nii.gz").write_bytes(b"")
    assert prepare.main(["--folder", str(tmp_path), "--offline"]) == 0
    assert list_images(tmp_path) == ["mine.nii.gz"]
    assert "mine.nii.gz; the server can start with that" in capsys.readouterr().out


def test_an_index_fills_the_folder_and_the_phantom_goes(
    prepare: ModuleType, index: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "studies"
    prepare.main(["--folder", str(folder), "--offline"])
    assert prepare.main(["--folder", str(folder), "--index-url", index]) == 0
    assert list_images(folder) == ["sample_one.nii.gz"]
    assert load_volume(folder / "sample_one.nii.gz").modality_source == "sidecar"
    assert "Wrote sample_one.nii.gz: CT, noise." in capsys.readouterr().out
    assert prepare.main(["--folder", str(folder), "--index-url", NOWHERE]) == 0
    assert "All 1 sample volumes are in" in capsys.readouterr().out


def test_pips_configured_index_is_used(
    prepare: ModuleType, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://127.0.0.1:9/other {index}")
    assert prepare.main(["--folder", str(tmp_path / "studies")]) == 0
    assert list_images(tmp_path / "studies") == ["sample_one.nii.gz"]


def test_a_labelled_phantom_stays(prepare: ModuleType, index: str, tmp_path: Path) -> None:
    folder = tmp_path / "studies"
    prepare.main(["--folder", str(folder), "--offline"])
    (folder / "labels" / "final").mkdir(parents=True)
    (folder / "labels" / "final" / "sample_phantom_ct.nii.gz").write_bytes(b"work")
    prepare.main(["--folder", str(folder), "--index-url", index])
    assert list_images(folder) == ["sample_one.nii.gz", "sample_phantom_ct.nii.gz"]


def test_a_damaged_image_is_fetched_again_and_labels_are_left_alone(
    prepare: ModuleType, index: str, tmp_path: Path
) -> None:
    folder = tmp_path / "studies"
    prepare.main(["--folder", str(folder), "--index-url", index])
    good = (folder / "sample_one.nii.gz").read_bytes()
    (folder / "sample_one.nii.gz").write_bytes(b"cut off")
    (folder / "labels" / "final").mkdir(parents=True)
    (folder / "labels" / "final" / "sample_one.nii.gz").write_bytes(b"work")
    prepare.main(["--folder", str(folder), "--index-url", index])
    assert (folder / "sample_one.nii.gz").read_bytes() == good
    assert (folder / "labels" / "final" / "sample_one.nii.gz").read_bytes() == b"work"


def test_an_archive_with_another_checksum_is_thrown_away(
    prepare: ModuleType, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "ARCHIVE_SHA256", "0" * 64)
    assert prepare.main(["--folder", str(tmp_path / "studies"), "--index-url", index]) == 0
    assert "so it was thrown away" in capsys.readouterr().out
    assert list_images(tmp_path / "studies") == ["sample_phantom_ct.nii.gz"]


def test_a_file_with_another_checksum_is_not_kept(
    prepare: ModuleType, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sample,) = prepare.SAMPLES
    monkeypatch.setattr(prepare, "SAMPLES", (prepare.Sample(sample.name, sample.member, "0" * 64, "CT", "noise"),))
    assert prepare.main(["--folder", str(tmp_path / "studies"), "--index-url", index]) == 0
    assert f"instead of {'0' * 64}" in capsys.readouterr().out
    assert list_images(tmp_path / "studies") == ["sample_phantom_ct.nii.gz"]


def test_credentials_of_an_index_go_to_its_host_only_and_are_never_shown(prepare: ModuleType) -> None:
    index = "https://user:secret@index.example/simple"
    home = prepare.make_request("https://user:secret@index.example/simple/p/", index)
    assert home.unredirected_hdrs["Authorization"] == "Basic dXNlcjpzZWNyZXQ="
    assert home.full_url == "https://index.example/simple/p/"
    assert "Authorization" not in prepare.make_request("https://files.example/p.tar.gz", index).unredirected_hdrs
    assert prepare.without_credentials(index) == "https://index.example/simple"


def test_an_index_in_json_is_understood(prepare: ModuleType, index: str, tmp_path: Path) -> None:
    page = tmp_path / "index" / prepare.PACKAGE / "index.html"
    page.write_text(json.dumps({"files": [{"url": "TotalSegmentator-2.18.0.tar.gz"}]}), encoding="utf-8")

    class JsonHandler(QuietHandler):
        extensions_map = {".html": "application/vnd.pypi.simple.v1+json"}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(JsonHandler, directory=str(tmp_path / "index")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert (
        prepare.find_archive(prepare.make_opener({}), address)
        == f"{address}/{prepare.PACKAGE}/TotalSegmentator-2.18.0.tar.gz"
    )
    server.shutdown()
    server.server_close()


def test_the_help_explains_itself(prepare: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        prepare.main(["--help"])
    assert "SHA-256" in capsys.readouterr().out


def test_the_prepared_volumes_are_guessed_as_what_they_are(prepare: ModuleType) -> None:
    folder = SCRIPT.parent
    missing = [sample.name for sample in prepare.SAMPLES if not prepare.is_in_place(folder, sample)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in sample_datastore/: run `make setup` with a network")
    for sample in prepare.SAMPLES:
        volume = load_volume(folder / f"{sample.name}.nii.gz")
        assert (volume.modality, volume.modality_source) == (sample.modality, "sidecar")
        assert guess_modality(volume.array) == sample.modality


@pytest.mark.slow
def test_the_real_archive_gives_four_volumes(prepare: ModuleType, tmp_path: Path) -> None:
    try:
        archive = prepare.fetch_archive()
    except prepare.UnavailableError as err:
        pytest.skip(f"no package index: {err}")
    for sample in prepare.SAMPLES:
        prepare.write_sample(archive, sample, tmp_path)
    shapes = {path.name: load_volume(path).array.shape for path in tmp_path.glob("*.nii.gz")}
    assert shapes == {
        "sample_ct_abdomen.nii.gz": (122, 101, 112),
        "sample_ct_aorta.nii.gz": (233, 167, 191),
        "sample_mr.nii.gz": (117, 91, 20),
        "sample_ct_dicom.nii.gz": (512, 512, 20),
    }
