"""Uploaded archives: what is unpacked, and what is refused without a trace."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from progidiff.errors import RequestError, TooLargeError
from progidiff.images.archives import Limits, extract_archive


def make_zip(path: Path, members: dict[str, bytes], link: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if link:
            entry = zipfile.ZipInfo("link")
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, link)
    return path


def make_tar(
    path: Path, members: dict[str, bytes], link: str = "", kind: bytes = tarfile.SYMTYPE, mode: str = "w:gz"
) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo("link")
            entry.type, entry.linkname = kind, link
            archive.addfile(entry)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "outer" / "target"
    target.mkdir(parents=True)
    return target


@pytest.mark.parametrize("make", [make_zip, make_tar, lambda path, members: make_tar(path, members, mode="w:xz")])
def test_files_come_out_as_they_went_in(make: Callable[..., Path], folder: Path, tmp_path: Path):
    members = {"a.dcm": b"first", "series/b.dcm": b"second" * 1000}
    assert extract_archive(make(tmp_path / "archive", members), folder) == 2
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == members


def test_the_folder_itself_as_a_member_is_passed_over(folder: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "archive", "w") as archive:
        entry = tarfile.TarInfo("./")
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        archive.addfile(tarfile.TarInfo("./a"), io.BytesIO())
    assert extract_archive(tmp_path / "archive", folder) == 1


def assert_refused(
    archive: Path, folder: Path, reason: str, error: type[Exception] = RequestError, limits: Limits | None = None
) -> None:
    with pytest.raises(error, match=reason):
        extract_archive(archive, folder, limits)
    assert list(folder.iterdir()) == []  # Nothing stays of what came before the bad member,
    assert list(folder.parent.iterdir()) == [folder]  # and nothing was written outside.


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py",
        "a/../../evil.py",
        "/tmp/evil.py",
        "..\\evil.py",
        "C:\\evil.py",
        "a/./../../evil",
        "x" * 300,
        "a/" * 40 + "b",
    ],
)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_member_outside_of_the_archive_is_refused(make: Callable[..., Path], name: str, folder: Path, tmp_path: Path):
    assert_refused(
        make(tmp_path / "archive", {"good": b"x", name: b"import os"}), folder, "lies outside|name that is too long"
    )


def test_links_and_devices_are_refused(folder: Path, tmp_path: Path):
    assert_refused(make_zip(tmp_path / "1", {"good": b"x"}, link="/etc/passwd"), folder, "has a link")
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), start=2):
        assert_refused(
            make_tar(tmp_path / str(number), {"good": b"x"}, link="/etc/passwd", kind=kind),
            folder,
            "a link or a device",
        )


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_bomb_stops_at_the_limit(make: Callable[..., Path], folder: Path, tmp_path: Path):
    bomb = make(tmp_path / "archive", {"zeros": bytes(5_000_000)})
    assert bomb.stat().st_size < 50_000
    assert_refused(bomb, folder, "more than 0.001 GB", TooLargeError, Limits(size=1_000_000))
    many = make(tmp_path / "many", {str(number): b"x" for number in range(20)})
    assert_refused(many, folder, "more than 10 members", TooLargeError, Limits(members=10))


def test_the_same_name_twice_is_refused(folder: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "archive", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    assert_refused(tmp_path / "archive", folder, "cannot be unpacked")


def test_what_is_no_whole_archive_is_refused(folder: Path, tmp_path: Path):
    text = tmp_path / "text"
    text.write_bytes(b"this is no archive")
    assert_refused(text, folder, "no archive that is read here")
    empty = make_zip(tmp_path / "empty", {})
    assert_refused(empty, folder, "holds no file")
    for name, make in (("zip", make_zip), ("tar", make_tar)):
        whole = make(tmp_path / name, {"a": bytes(range(256)) * 100}).read_bytes()
        for cut in (len(whole) // 3, len(whole) // 2, len(whole) - 30):
            (tmp_path / "cut").write_bytes(whole[:cut])
            assert_refused(tmp_path / "cut", folder, "no archive|cannot be unpacked|holds no file")


def test_a_member_without_a_name_is_refused(tmp_path: Path):
    archive = make_zip(tmp_path / "archive.zip", {"a": b"a"})
    archive.write_bytes(archive.read_bytes().replace(b"\x01\x00\x00\x00a", b"\x00\x00\x00\x00a"))
    content = bytearray(archive.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 28 : place + 30] = b"\0\0"  # The length of the name, in the list of members.
    archive.write_bytes(content)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError):
        extract_archive(archive, tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())
