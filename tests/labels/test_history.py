"""The history of labels: nothing acknowledged is ever lost, whatever happens to the last bytes, the clock or the
disk.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progidiff.errors import NotFoundError, RequestError, StoreError
from progidiff.labels import history as module
from progidiff.labels.audit import AUDIT_COLUMNS, format_audit, list_audit
from progidiff.labels.history import Annotation, AnnotationStore, Source

SOURCE = Source("f" * 64, "2", "ct-base@1", "mr@3", 7)


@pytest.fixture
def store(tmp_path: Path) -> AnnotationStore:
    return AnnotationStore(tmp_path / "annotations")


def write(folder: Path, content: bytes = b"label", name: str = "label.nii.gz") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_save_comes_back_as_it_was_recorded_also_in_another_process(store: AnnotationStore, tmp_path: Path):
    saved = store.record(
        "case_1", write(tmp_path), user="ada", client="slicer", slices=[5, 3, 5], structures=["liver"], source=SOURCE,
        edited=True, seconds=12.5,
        num_slices=8, label_ids={"liver": 6},
    )  # fmt: skip
    assert (saved.sequence, saved.slices, saved.structures, saved.source) == (1, (3, 5), ("liver",), SOURCE)
    assert (saved.edited, saved.seconds, saved.user, saved.client, saved.tag) == (True, 12.5, "ada", "slicer", "final")
    assert saved.time.endswith("+00:00")
    assert store.label_file(saved).read_bytes() == b"label"
    assert AnnotationStore(store.root).list() == [saved]
    assert AnnotationStore(store.root).verify() == []


def test_slices_add_up_and_a_whole_volume_takes_their_place(store: AnnotationStore, tmp_path: Path):
    label = write(tmp_path)
    store.record("x", label, slices=[1, 2], num_slices=10)
    second = store.record("x", label, slices=[2, 7], num_slices=10)
    assert store.annotated_slices("x") == {1, 2, 7}
    assert store.annotated_slices("y") == frozenset()
    whole = store.record("x", label, num_slices=10)
    assert store.annotated_slices("x") is None
    assert store.in_force("x") == [whole]
    assert store.count_slices_since(second.sequence) == 7
    assert store.undo("x") == second
    assert store.annotated_slices("x") == {1, 2, 7}
    assert store.count_slices_since(0) == 3
    assert store.count_slices_since(1) == 1
    assert store.annotated_images() == {"x": frozenset({1, 2, 7})}


def test_a_whole_volume_of_one_structure_leaves_those_of_others_in_force(store: AnnotationStore, tmp_path: Path):
    label = write(tmp_path)
    liver = store.record("x", label, structures=["liver"])
    spleen = store.record("x", label, structures=["spleen"])
    assert store.in_force("x") == [liver, spleen]
    both = store.record("x", label, structures=["spleen", "liver"])
    assert store.in_force("x") == [both]


def test_other_tags_are_kept_and_do_not_count_as_annotated(store: AnnotationStore, tmp_path: Path):
    store.record("x", write(tmp_path), tag="version_1")
    assert len(store.list("x")) == 1
    assert store.annotated_images() == {}
    assert store.current("x") is None
    assert store.current("x", "version_1") is not None


def test_a_delete_is_an_event_and_the_file_stays(store: AnnotationStore, tmp_path: Path):
    saved = store.record("x", write(tmp_path))
    store.delete("x", "ada")
    assert store.current("x") is None
    assert store.annotated_images() == {}
    assert store.label_file(saved).read_bytes() == b"label"
    assert store.undo("x") == saved
    assert store.undo("x") is None
    with pytest.raises(NotFoundError, match="nothing to undo"):
        store.undo("x")


def test_restore_goes_back_to_what_counted_right_after_a_save(store: AnnotationStore, tmp_path: Path):
    first = store.record("x", write(tmp_path, b"1"), slices=[1])
    second = store.record("x", write(tmp_path, b"2"), slices=[2])
    store.record("x", write(tmp_path, b"3"))
    assert store.restore("x", second.sequence) == second
    assert store.annotated_slices("x") == {1, 2}
    assert store.restore("x", first.sequence) == first
    assert store.annotated_slices("x") == {1}
    assert store.undo("x") == second
    with pytest.raises(NotFoundError, match="no saved label 99"):
        store.restore("x", 99)


def test_order_is_by_sequence_when_the_clock_goes_back(
    store: AnnotationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    times = iter(["2030-01-01T00:00:00.000+00:00", "1999-01-01T00:00:00.000+00:00", "2010-01-01T00:00:00.000+00:00"])
    monkeypatch.setattr(module, "_now", lambda: next(times))
    saves = [store.record("x", write(tmp_path, bytes([k]))) for k in range(3)]
    assert AnnotationStore(store.root).list() == saves
    assert store.current("x") == saves[2]


@pytest.mark.parametrize(
    "image", ["../../etc/passwd", "..", ".hidden", "a/b", "with space", "1.2.840.1", "ümlaut", "a\\b"]
)
def test_no_id_leads_out_of_the_folder(store: AnnotationStore, tmp_path: Path, image: str):
    saved = store.record(image, write(tmp_path))
    assert store.label_file(saved).resolve().parent.parent == (store.root / "labels").resolve()
    assert AnnotationStore(store.root).list(image) == [saved]


@pytest.mark.parametrize("slices", [[-1], [8], [1.5], ["1"], [True]])
def test_slices_that_are_none_are_refused(store: AnnotationStore, tmp_path: Path, slices: list[Any]):
    with pytest.raises(RequestError, match="from 0 to 7"):
        store.record("x", write(tmp_path), slices=slices, num_slices=8)
    assert store.list() == []


def test_a_file_that_is_no_label_is_refused(store: AnnotationStore, tmp_path: Path):
    with pytest.raises(RequestError, match="suffix must be one of"):
        store.record("x", write(tmp_path, name="evil.py"))


def build_log(folder: Path, count: int) -> list[Annotation]:
    store = AnnotationStore(folder / "annotations")
    label = write(folder)
    return [store.record(f"image {k % 2}", label, slices=[k], user="ada \n \u2028 \r") for k in range(count)]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 2000))
def test_bytes_cut_off_the_end_never_touch_an_earlier_event(cut: int):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saves = build_log(folder, 3)
        log = folder / "annotations/log.jsonl"
        content = log.read_bytes()
        kept = content[: max(0, len(content) - cut)]
        log.write_bytes(kept)
        whole = sum(
            1
            for line in content.splitlines(keepends=True)
            if kept.startswith(content[: content.index(line) + len(line)])
        )
        again = AnnotationStore(folder / "annotations")
        assert again.list()[:whole] == saves[:whole]
        if kept and not kept.endswith(b"\n"):
            assert any("never finished" in problem for problem in again.verify())
        added = again.record("image 0", folder / "label.nii.gz", slices=[9])
        assert added.sequence > whole
        after = AnnotationStore(folder / "annotations").list()
        assert after[:whole] == saves[:whole]
        assert after[-1] == added
        assert not any("damaged (" in problem or "never finished" in problem for problem in again.verify())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_in_the_middle_costs_one_event_and_is_named(data: st.DataObject):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saves = build_log(folder, 3)
        log = folder / "annotations/log.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        place = data.draw(st.integers(0, len(lines[1]) - 2))
        value = data.draw(st.integers(0, 255).filter(lambda value: value not in (lines[1][place], 10)))
        original = lines[1]
        lines[1] = original[:place] + bytes([value]) + original[place + 1 :]
        log.write_bytes(b"".join(lines))
        again = AnnotationStore(folder / "annotations")
        problems = again.verify()
        assert any("Line 2" in problem and "damaged" in problem for problem in problems)
        if value in b"\t\r " and says_the_same(original, lines[1]):
            assert again.list() == saves, "no save is given up for another space between two values"
        else:
            assert [label.sequence for label in again.list()] == [1, 3]
            assert again.list() == [saves[0], saves[2]]
            assert any("2.nii.gz" in problem and "no event speaks of" in problem for problem in problems)
        assert again.record("image 1", folder / "label.nii.gz").sequence == 4


def says_the_same(line: bytes, other: bytes) -> bool:
    """Whether two lines hold the same JSON."""
    try:
        return bool(json.loads(line) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("other", [b"\t", b"\r"])
def test_another_space_between_two_values_costs_no_event_and_is_named(tmp_path: Path, other: bytes):
    """The checksum speaks of the values; it cannot see what stands between them."""
    saves = build_log(tmp_path, 3)
    log = tmp_path / "annotations/log.jsonl"
    assert AnnotationStore(log.parent).verify() == []
    lines = log.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b", ", b"," + other, 1)
    log.write_bytes(b"\n".join(lines))
    again = AnnotationStore(log.parent)
    assert again.list() == saves
    (problem,) = again.verify()
    assert "Line 2" in problem
    assert "between its values only" in problem
    assert again.find_losses() == []


def test_a_line_taken_out_and_a_changed_file_are_named(store: AnnotationStore, tmp_path: Path):
    saves = [store.record("x", write(tmp_path, bytes([k])), slices=[k]) for k in range(3)]
    log = store.root / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[2])
    store.label_file(saves[0]).write_bytes(b"other")
    problems = " ".join(AnnotationStore(store.root).verify())
    assert "Lines before line 2" in problems
    assert "save 1 of 'x' is not what was saved" in problems
    store.label_file(saves[2]).unlink()
    assert "save 3 of 'x' cannot be read" in " ".join(AnnotationStore(store.root).verify())


def test_a_sequence_is_never_given_twice_even_if_the_log_is_lost(store: AnnotationStore, tmp_path: Path):
    first = store.record("x", write(tmp_path, b"first"))
    (store.root / "log.jsonl").unlink()
    second = store.record("x", write(tmp_path, b"second"))
    assert second.sequence == 2
    assert store.label_file(first).read_bytes() == b"first"


def test_a_disk_that_fills_up_in_mid_line_leaves_the_log_as_it_was(
    store: AnnotationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved = store.record("x", write(tmp_path))
    before = (store.root / "log.jsonl").read_bytes()
    real = os.write

    calls = iter([True])

    def fail(handle: int, data: bytes) -> int:
        if next(calls, False):
            return real(handle, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StoreError, match="nothing was saved"):
        store.record("x", write(tmp_path, b"more"))
    monkeypatch.undo()
    assert (store.root / "log.jsonl").read_bytes() == before
    assert store.list() == [saved]
    assert store.verify() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start as copies")
def test_the_file_of_a_save_that_was_cut_off_is_set_aside_and_nothing_else_is(store: AnnotationStore, tmp_path: Path):
    assert store.set_aside_unfinished() is None
    first = store.record("x", write(tmp_path))
    folder = store.label_file(first).parent
    (folder / "2.nii.gz").write_bytes(b"never acknowledged")
    assert "no event speaks of" in store.verify()[0]
    aside = AnnotationStore(store.root).set_aside_unfinished()
    assert aside is not None
    assert aside.read_bytes() == b"never acknowledged"
    assert store.verify() == []
    assert store.set_aside_unfinished() is None

    # A label that the log spoke of once is not taken for one that nobody was told about.
    for _ in range(3):
        store.record("x", write(tmp_path))
    log = store.root / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for damaged in (lines[:2], [*lines[:2], b"{}\n", lines[3]], [*lines[:2], lines[3]]):
        log.write_bytes(b"".join(damaged))
        again = AnnotationStore(store.root)
        assert again.set_aside_unfinished() is None
        assert sorted(path.name for path in folder.iterdir()) == ["1.nii.gz", "2.nii.gz", "3.nii.gz", "4.nii.gz"]


def test_processes_that_write_at_once_lose_nothing(store: AnnotationStore, tmp_path: Path):
    label = write(tmp_path)
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                mine = AnnotationStore(store.root)
                for k in range(15):
                    mine.record(f"image_{number}", label, slices=[k])
                os._exit(0)
            os._exit(1)
        children.append(child)
    for k in range(15):
        store.record("image_3", label, slices=[k])
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    events = store.events()
    assert [event.sequence for event in events] == list(range(1, 61))
    assert store.annotated_images() == {f"image_{number}": frozenset(range(15)) for number in range(4)}
    assert store.verify() == []


def test_the_audit_says_who_saved_what_from_which_proposal(store: AnnotationStore, tmp_path: Path):
    store.record(
        "x",
        write(tmp_path),
        user="=cmd()",
        client="ohif",
        slices=[1, 2],
        structures=["liver"],
        source=SOURCE,
        edited=False,
        seconds=3,
    )
    store.skip("y", "bob", "too noisy")
    store.delete("x", "ada", reason="wrong patient")
    rows = list(csv.DictReader(io.StringIO(format_audit(list_audit(store), "csv"))))
    assert tuple(rows[0]) == AUDIT_COLUMNS
    assert [row["event"] for row in rows] == ["label", "skip", "delete"]
    first = rows[0]
    assert (first["slices"], first["structures"], first["seed"], first["model"], first["adapter"]) == (
        "1 2",
        "liver",
        "7",
        "ct-base@1",
        "mr@3",
    )
    assert (first["proposals"], first["shown"], first["edited"], first["seconds"], first["in_force"]) == (
        "f" * 64,
        "2",
        "False",
        "3.0",
        "False",
    )
    assert first["user"] == "'=cmd()"  # A spreadsheet would run it.
    assert (rows[1]["user"], rows[1]["reason"], rows[2]["reason"]) == ("bob", "too noisy", "wrong patient")
    values = [json.loads(line) for line in format_audit(list_audit(store, "x"), "jsonl").splitlines()]
    assert [value["event"] for value in values] == ["label", "delete"]
    assert values[0]["user"] == "=cmd()"
    with pytest.raises(RequestError, match="csv or jsonl"):
        format_audit([], "xlsx")


@pytest.mark.parametrize("torn", [False, True])
def test_a_history_that_a_newer_version_went_on_with_is_refused_and_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torn: bool
):
    root = tmp_path / "annotations"
    AnnotationStore(root).record("scan", write(tmp_path))
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    AnnotationStore(root).record("scan", write(tmp_path, b"newer label"))
    monkeypatch.undo()
    log = root / "log.jsonl"
    if torn:
        log.write_bytes(log.read_bytes().rstrip(b"\n"))
    before = log.read_bytes()
    with pytest.raises(StoreError, match="A newer version .* format 2, version .* reads 1.*Install that version again"):
        AnnotationStore(root).record("scan", write(tmp_path, b"older label"))
    assert log.read_bytes() == before


def test_what_a_crash_left_stays_listed_after_the_log_is_mended(store: AnnotationStore, tmp_path: Path):
    from typer.testing import CliRunner

    from progidiff.cli.main import app

    store = AnnotationStore(tmp_path / "studies/.progidiff/annotations")
    store.record("x", write(tmp_path))
    log = store.root / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"half')
    assert store.list_torn() == []
    store.record("x", write(tmp_path))  # sets it aside
    (told,) = AnnotationStore(store.root).list_torn()
    assert "(6 bytes) is what a crash left of a save that was never acknowledged" in told
    assert store.verify() == []
    result = CliRunner().invoke(app, ["audit", "verify", "--studies", str(tmp_path / "studies")])
    assert (result.exit_code, "never acknowledged" in result.output, "as they were written" in result.output) == (
        0,
        True,
        True,
    )


def test_the_command_line_writes_the_audit_and_finds_damage(tmp_path: Path):
    from typer.testing import CliRunner

    from progidiff.cli.main import app

    store = AnnotationStore(tmp_path / "studies/.progidiff/annotations")
    run = CliRunner()
    missing = run.invoke(app, ["audit", "verify", "--studies", str(tmp_path / "studies")])
    assert missing.exit_code == 2
    assert "no label was saved yet" in missing.output
    saved = store.record("x", write(tmp_path), user="ada")
    out = tmp_path / "audit.csv"
    result = run.invoke(app, ["audit", "export", "--studies", str(tmp_path / "studies"), "--out", str(out)])
    assert (result.exit_code, out.read_text().count(",ada,")) == (0, 1)
    assert (
        run.invoke(
            app, ["audit", "export", "--studies", str(tmp_path / "studies"), "--out", str(tmp_path / "audit.pdf")]
        ).exit_code
        == 2
    )
    good = run.invoke(app, ["audit", "verify", "--studies", str(tmp_path / "studies")])
    assert (good.exit_code, "as they were written" in good.output) == (0, True)
    store.label_file(saved).write_bytes(b"other")
    bad = run.invoke(app, ["audit", "verify", "--studies", str(tmp_path / "studies")])
    assert (bad.exit_code, "is not what was saved" in bad.output) == (1, True)


def test_a_log_that_lost_its_end_is_said_at_once_and_for_good_and_gives_no_number_twice(
    store: AnnotationStore, tmp_path: Path
):
    label = write(tmp_path)
    for _ in range(6):
        store.record("x", label)
    log = store.root / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert store.find_losses() == []
    for kept in (0, 4):
        log.write_bytes(b"".join(lines[:kept]))
        again = AnnotationStore(store.root)
        (loss,) = again.find_losses()
        assert f"it went to event 6 and ends with {kept}" in loss
        assert loss in again.verify()
        assert again.set_aside_unfinished() is None
    assert again.record("y", label).sequence == 7  # Of another image: its folder does not show what is used.
    again = AnnotationStore(store.root)
    assert any("Lines before line 5" in loss for loss in again.find_losses())
    assert any("Lines before line 5" in problem for problem in again.verify())


def test_a_log_of_an_older_version_that_was_emptied_is_said_by_the_label_versions(
    store: AnnotationStore, tmp_path: Path
):
    label = write(tmp_path)
    for image in ("x", "y", "x"):
        store.record(image, label)
    (store.root / "head.json").unlink()
    assert AnnotationStore(store.root).find_losses() == []
    (store.root / "log.jsonl").write_bytes(b"")
    again = AnnotationStore(store.root)
    (loss,) = again.find_losses()
    assert "3 label versions" in loss
    assert again.record("z", label).sequence == 4


@pytest.mark.parametrize("content", [b"", b"{", b'{"sequence": 1}'])
def test_a_damaged_head_is_set_aside_and_the_log_goes_on(store: AnnotationStore, tmp_path: Path, content: bytes):
    store.record("x", write(tmp_path))
    (store.root / "head.json").write_bytes(content)
    again = AnnotationStore(store.root)
    assert again.find_losses() == []
    assert again.record("x", write(tmp_path)).sequence == 2
    assert AnnotationStore(store.root).verify() == []
    assert len(list(store.root.glob("head.json.damaged-*"))) == 1


def test_text_that_no_answer_can_hold_is_mended_when_the_log_is_read(store: AnnotationStore, tmp_path: Path):
    store.record("x", write(tmp_path), user="ada")
    log = store.root / "log.jsonl"
    values = json.loads(log.read_text(encoding="utf-8"))
    values |= {"client": "\ud800", "seconds": float("nan")}  # As version 0.1.0 let it in.
    values["check"] = module._compute_check(values)
    (store.root / "head.json").unlink()
    line = (json.dumps(values) + "\n").encode()
    log.write_bytes(line)
    again = AnnotationStore(store.root)
    (label,) = again.list()
    assert (label.client, label.seconds) == ("\ufffd", None)
    format_audit(list_audit(again), "csv").encode()
    json.dumps(label.to_dict(), allow_nan=False, ensure_ascii=False).encode()
    assert again.record("x", write(tmp_path), client="\udcff", seconds=float("inf")).sequence == 2
    assert AnnotationStore(store.root).list()[1].client == "\ufffd"
    assert AnnotationStore(store.root).verify() == []
    assert log.read_bytes().startswith(line)


def test_what_the_folder_refused_is_taken_back(store: AnnotationStore, tmp_path: Path):
    first = store.record("x", write(tmp_path, b"1"))
    second = store.record("x", write(tmp_path, b"2"))
    store.take_back("x", "final", "disk")
    assert store.current("x") == first
    store.restore("x", second.sequence)
    store.take_back("x", "final", "disk")
    assert store.current("x") == first
    assert store.find_undone("x") is None
    store.undo("x")
    store.take_back("x", "final", "disk")
    assert store.current("x") == first
    store.delete("x")
    assert store.find_undone("x") == first
    store.take_back("x", "final", "disk")
    assert store.current("x") == first
    assert AnnotationStore(store.root).verify() == []


def test_labels_in_the_folder_are_found_by_every_suffix_in_any_case(tmp_path: Path):
    final = tmp_path / "final"
    final.mkdir()
    for name in ("a.seg.nrrd", "b.NII.GZ", "c.Mha", "d.txt", ".writing-e.nii.gz"):
        write(final, name=name)
    with contextlib.suppress(OSError):  # Some disks take no such name.
        (final / os.fsdecode(b"\xff.nii.gz")).write_bytes(b"label")
    assert set(AnnotationStore(tmp_path / "annotations", final).annotated_images()) == {"a", "b", "c"}
