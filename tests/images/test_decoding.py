"""What reads untrusted files can do nothing else, and what goes wrong there is said and over."""

from __future__ import annotations

import gzip
import io
import os
import resource
import signal
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from progidiff.dicomweb.segmentation import open_instance, open_segmentation
from progidiff.errors import BusyError, GeometryError, ImageError, ProGiDiffError, RequestError
from progidiff.images import decoding
from progidiff.images.archives import Limits, extract_archive
from progidiff.images.decoding import Budget, Decoder, apart, describe_reading
from progidiff.images.decoding_wire import Packer, Unpacker, WireError
from progidiff.images.geometry import Grid
from progidiff.images.pictures import check_picture, read_pixels
from progidiff.images.raw import Raw
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.labels.segments import LabelMap, load_label_map
from support import decoding_jobs as jobs
from support.phantoms import write_phantom

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each job takes seconds to start")

MEGABYTES_OF_A_BOMB = 2400
LEAST = 64 << 20
MOST_MEGABYTES = 900
"""Of a child that reads a small file: unpacked 64 MiB, copies of them, and the decoders."""


@pytest.fixture(scope="module", autouse=True)
def _apart() -> Iterator[None]:
    decoding.read_apart()
    yield
    decoding.read_apart(False)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    """One of its own, with small budgets."""
    monkeypatch.setattr(decoding, "MIN_DECODED", LEAST)
    own = Decoder(forks=True, together=2)
    monkeypatch.setattr(decoding, "_decoder", own)
    yield own
    own.close()


def test_a_child_opens_its_input_and_nothing_else_and_reaches_nobody(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "input.bin"
    path.write_bytes(b"x")
    found = apart(jobs.attempt, reads=[path])(path)
    confinement = describe_reading().confinement
    allowed = {"read its input", "write in its own folder"}
    if not confinement.files:
        allowed |= {name for name in found if "read" in name or "list" in name or "write" in name or "remove" in name}
    assert {name for name, ended in found.items() if ended == "done"} <= allowed
    assert found["read its input"] == found["write in its own folder"] == "done"
    assert path.read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["input.bin", "secret.txt"]
    assert confinement.limits
    if os.uname().machine in ("x86_64", "aarch64"):
        assert confinement.calls


def test_a_child_makes_files_only_where_it_was_told_to(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert apart(jobs.touch, writes=[tmp_path / "a"])(tmp_path / "a") == ["made.txt"]
    with pytest.raises(ImageError, match="Permission denied"):
        apart(jobs.touch, writes=[tmp_path / "a"])(tmp_path / "b")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["int16", ">i4", "float32", "uint8", "bool"])
def test_arrays_come_back_as_they_were_and_can_be_written(order: str, dtype: str):
    array = apart(jobs.give)((3, 4, 5), dtype, order)
    assert np.array_equal(array, jobs.give((3, 4, 5), dtype, order))
    assert array.flags.f_contiguous == (order == "F")
    array[0] = 1


@pytest.mark.parametrize(
    ("job", "arguments", "error", "message"),
    [
        (jobs.refuse, ("not on the grid",), GeometryError, "^not on the grid$"),
        (jobs.fail, (), ImageError, "by a decoder"),
        (jobs.lie, (), ImageError, "cannot be read"),
        (jobs.crash, (), ImageError, "its decoder crashes"),
        (jobs.fill, (6000,), ImageError, "unpacks to more than 256 MiB"),
        (jobs.give, ((36 << 20,), "int64", "C"), ImageError, "unpacks to more than 256 MiB"),
    ],
)
def test_what_goes_wrong_in_a_child_is_an_error_here_and_the_next_one_works(
    job: Callable[..., object], arguments: tuple[object, ...], error: type[ProGiDiffError], message: str
):
    with pytest.raises(error, match=message):
        apart(job)(*arguments)
    assert apart(jobs.sleep)(0) == "slept"


@pytest.mark.parametrize("job", [jobs.sleep, jobs.count])
def test_a_child_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch, job: Callable[[float], str]):
    monkeypatch.setattr(decoding, "_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(ImageError, match="takes more than 0 s"):
        apart(job)(30.0)
    assert time.monotonic() - started < 15


def list_children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_child_that_the_system_ends_is_said_to_be_tried_again(decoder: Decoder):
    outcome: list[Exception] = []

    def read() -> None:
        try:
            apart(jobs.sleep)(30.0)
        except ProGiDiffError as err:
            outcome.append(err)

    apart(jobs.sleep)(0)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    time.sleep(1)
    assert decoder._helper is not None
    os.kill(list_children(decoder._helper.process.pid)[0], signal.SIGKILL)  # The other waits for the next job.
    thread.join(20)
    assert isinstance(outcome[0], BusyError)
    assert "stopped by the system" in str(outcome[0])
    assert apart(jobs.sleep)(0) == "slept"


def test_the_process_that_forks_is_started_again_when_it_is_gone(decoder: Decoder):
    assert apart(jobs.sleep)(0) == "slept"
    first = decoder._helper
    assert first is not None
    first.process.kill()
    first.process.wait()
    assert apart(jobs.sleep)(0) == "slept"
    assert decoder._helper is not first


def test_jobs_end_with_the_process_that_asked_and_leave_no_files(decoder: Decoder):
    apart(jobs.sleep)(0)
    helper = decoder._helper
    assert helper is not None
    folder = Path(os.readlink(f"/proc/{helper.process.pid}/cwd"))
    decoder.close()
    assert helper.process.poll() is not None
    assert not folder.exists()


def test_no_more_files_are_read_at_once_than_there_are_places(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "_WAIT_SECONDS", 0.2)
    apart(jobs.sleep)(0)
    threads = [threading.Thread(target=lambda: apart(jobs.sleep)(3.0), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    with pytest.raises(BusyError, match="Too many files"):
        apart(jobs.sleep)(0)
    for thread in threads:
        thread.join(20)
    assert apart(jobs.sleep)(0) == "slept"


def test_a_system_without_a_forking_helper_starts_a_fresh_one_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = Decoder(forks=False)
    monkeypatch.setattr(decoding, "_decoder", own)
    path = write_phantom(tmp_path / "image.nii.gz", shape=(12, 10, 5))
    assert read_grid(path).shape == (12, 10, 5)
    with pytest.raises(ImageError, match="its decoder crashes"):
        apart(jobs.crash)()
    own.close()


def test_what_is_not_read_apart_is_a_plain_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PROGIDIFF_READ_APART")
    with pytest.raises(ZeroDivisionError):
        apart(jobs.fail)()
    assert describe_reading().describe() == "Files are read in this process, with all that it may do."


def pack(value: object) -> tuple[object, bytes]:
    content = io.BytesIO()
    return Packer(content.write).pack(value), content.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(extra=1),
        lambda tree: tree.pop("names"),
        lambda tree: tree.update(names={"x": "liver"}),
        lambda tree: tree.update(notes="text"),
        lambda tree: tree.update(is_as_stored=1),
        lambda tree: tree["array"].update(dtype="O8"),
        lambda tree: tree["array"].update(dtype="|O"),
        lambda tree: tree["array"].update(shape=[1 << 30, 1 << 30]),
        lambda tree: tree["array"].update(shape=[-1, 2, 2]),
        lambda tree: tree["array"].update(at=-8),
        lambda tree: tree["array"].update(at=1 << 40),
        lambda tree: tree["array"].update(order=[]) or tree["array"].pop("at"),
    ],
)
def test_nothing_that_a_child_sends_is_believed(change: Callable[[dict[str, object]], object]):
    tree, content = pack(LabelMap(np.ones((2, 2, 2), np.uint8), {1: "liver"}))
    assert Unpacker(content).unpack(tree, LabelMap).names == {1: "liver"}
    assert isinstance(tree, dict)
    change(tree)
    with pytest.raises(WireError):
        Unpacker(content).unpack(tree, LabelMap)
    with pytest.raises(WireError):
        pack(Raw(np.array([object()]), np.eye(4)))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("drawn", [np.s_[0:0], np.s_[5:9, 100:120, 3:4], np.s_[:, :, :]], ids=["none", "some", "all"])
def test_of_a_label_only_what_is_drawn_is_sent(order: str, drawn: tuple[slice, ...]):
    labels = np.zeros((128, 128, 80), np.uint8, order=order)  # type: ignore[call-overload]
    labels[drawn] = 7
    tree, content = pack(LabelMap(labels, {}))
    assert len(content) in (0, 4 * 20 * 1, labels.nbytes)
    back = Unpacker(bytearray(content)).unpack(tree, LabelMap).array
    assert np.array_equal(back, labels)
    assert back.flags.f_contiguous == labels.flags.f_contiguous
    back[0] = 1
    assert isinstance(tree, dict)
    if "box" in tree["array"]:
        for wrong in ([[0, 1]] * 3, [[-1, 3], [0, 20], [0, 1]], [[0, 999]] * 3, "box"):
            with pytest.raises(WireError):
                Unpacker(content).unpack({**tree, "array": {**tree["array"], "box": wrong}}, LabelMap)
        with pytest.raises(WireError):
            Unpacker(content, 1000).unpack(tree, LabelMap)


# Bombs: a few kilobytes that unpack to gigabytes


def measure(read: Callable[[], object], decoder: Decoder) -> tuple[Exception, int, int]:
    """The refusal, the child's memory and the growth of this process's, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProGiDiffError) as refused:
        read()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return refused.value, decoder.peak_kb // 1024, grown // 1024


def zeros(count: int) -> bytes:
    """gzip of megabytes of zeros, in members of one."""
    return gzip.compress(bytes(1 << 20), 9) * count


def nifti_bomb(path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((1200, 1000, 1000))
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)) + zeros(MEGABYTES_OF_A_BOMB))


def nrrd_bomb(path: Path) -> None:
    text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 1200 1000 1000\nendian: little\nencoding: gzip\n\n"
    path.write_bytes(text.encode() + zeros(MEGABYTES_OF_A_BOMB))


def mha_bomb(path: Path) -> None:
    text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nDimSize = 1200 1000 1000\n"
    path.write_bytes(f"{text}ElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode() + zeros(MEGABYTES_OF_A_BOMB))


def png_bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 8_000
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


BOMBS: dict[str, tuple[Callable[[Path], None], str, tuple[Callable[[Path], object], ...]]] = {
    "NIfTI": (nifti_bomb, "bomb.nii.gz", (load_volume, load_label)),
    "NRRD": (nrrd_bomb, "bomb.nrrd", (load_volume, load_label)),
    "MetaImage": (mha_bomb, "bomb.mha", (load_volume, load_label)),
    "PNG": (png_bomb, "bomb.png", (read_pixels, check_picture, load_label)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_with_little_memory(tmp_path: Path, decoder: Decoder, kind: str):
    write, name, readers = BOMBS[kind]
    path = tmp_path / name
    write(path)
    assert path.stat().st_size < 4 << 20
    for read in readers:
        refused, child, here = measure(lambda read=read: read(path), decoder)  # type: ignore[misc]
        assert isinstance(refused, ImageError)
        assert child < MOST_MEGABYTES
        assert here < 100


def test_a_label_may_unpack_to_what_its_image_has_however_well_it_packs(tmp_path: Path):
    grid = Grid((700, 700, 700), np.diag([1.0, 1.0, 1.0, 1.0]))
    header = nibabel.Nifti1Header()
    header.set_data_shape(grid.shape)
    header.set_data_dtype(np.uint8)
    header.set_sform(grid.affine, 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "empty.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)) + zeros(328))
    assert not load_label_map(path, grid).array.any()
    assert path.stat().st_size < 400 << 10
    with pytest.raises(ImageError, match="unpacks to"):
        load_label(path)


@pytest.mark.parametrize("kind", ["pax header", "long name", "members", "one member", "zip"])
def test_an_archive_that_unpacks_without_end_is_refused_and_leaves_nothing(tmp_path: Path, decoder: Decoder, kind: str):
    archive, folder = tmp_path / "archive", tmp_path / "folder"
    folder.mkdir()
    size = MEGABYTES_OF_A_BOMB << 20
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("a", "w") as member:
            for _ in range(60):
                member.write(bytes(1 << 20))
    else:
        kinds = {"pax header": tarfile.XHDTYPE, "long name": tarfile.GNUTYPE_LONGNAME}
        member_size = {"members": 0, "one member": 60 << 20}.get(kind, size)
        info = tarfile.TarInfo("a")
        info.type, info.size = kinds.get(kind, tarfile.REGTYPE), member_size
        count = 30_000 if kind == "members" else 1
        megabytes = 60 if kind == "one member" else 0 if kind == "members" else MEGABYTES_OF_A_BOMB
        archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) * count) + zeros(megabytes))
    refused, child, here = measure(lambda: extract_archive(archive, folder, Limits(size=20 << 20)), decoder)
    assert isinstance(refused, RequestError | ImageError)
    assert not list(folder.iterdir())
    assert child < 400
    assert here < 100


def test_a_deflated_segmentation_is_refused_with_little_memory(decoder: Decoder):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    target = io.BytesIO()
    dataset.save_as(target, enforce_file_format=True)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)  # Blocks that stand alone can be repeated.
    private = b"\x09\x00\x10\x00OB\x00\x00" + (1 << 30).to_bytes(4, "little")
    start = packer.compress(private) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    written = target.getvalue()
    content = written[: written.rindex(b"1.2.840.10008.1.2.1.99") + 22] + start + block * 700
    grid = Grid((64, 64, 8), np.eye(4))
    for read in (lambda: open_instance(content), lambda: open_segmentation(content, grid)):
        refused, child, here = measure(read, decoder)
        assert isinstance(refused, ImageError)
        assert child < MOST_MEGABYTES
        assert here < 100


def test_a_budget_grows_with_the_file_and_has_an_end():
    assert Budget.of_size(10 << 20).decoded == 1000 << 20
    assert Budget.of_size(1 << 40).decoded == decoding.MAX_DECODED
    assert Budget.of_size(0, decoded=1 << 40).decoded == decoding.MAX_DECODED


@pytest.mark.parametrize("edge", [1e7, 101.0, 0.009])
def test_voxels_of_absurd_sizes_are_refused(tmp_path: Path, edge: float):
    path = tmp_path / "image.nrrd"
    text = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 24 24 6\nspacings: {edge} {edge} {edge}\nencoding: raw\n\n"
    path.write_bytes(text.encode() + bytes(range(256)) * 13 + bytes(128))
    for read in (load_volume, read_grid):
        with pytest.raises(ImageError, match=r"voxels of .* mm; 0.01 to 100 mm"):
            read(path)


def test_a_field_of_view_that_nobody_has_is_refused(tmp_path: Path):
    path = tmp_path / "image.nrrd"
    text = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 600 2 2\nspacings: 20 20 20\nencoding: raw\n\n"
    path.write_bytes(text.encode() + bytes(1200) + b"\1" * 1200)
    with pytest.raises(ImageError, match="12000 mm"):
        load_volume(path)


def test_a_picture_is_no_field_of_view(tmp_path: Path):
    Image.fromarray(np.zeros((4, 12_000), np.uint8)).save(tmp_path / "wide.png")
    assert read_grid(tmp_path / "wide.png").shape == (12_000, 4, 1)
