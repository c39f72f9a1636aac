"""Log lines: as JSON, with the request they belong to, and without names of patients."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

import pytest

from progidiff import logs
from progidiff.images.formats import strip_suffix
from progidiff.logs import HiddenLines, JsonLines, Names, RequestNote, begin_request, make_environment, note_account

KEY = b"k" * 32


@pytest.fixture
def names() -> Names:
    made = Names(KEY, ("liver", "final", "labels"), ("/data/studies",), strip_suffix)
    known = {"Doe_Jane-1970": 1, "Li": 1, "O'Neill Tim": 1, "7": 1, "1234567": 1, "Müller": 1}
    made.watch(lambda: known)
    return made


@pytest.fixture
def lines(names: Names) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    logger, stream = logging.getLogger("tests.of.lines"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(names.hide))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger, stream
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "line",
    [
        "'{}' is not scored: the file ends too early",
        'Reading "{}" ended the process for it with -9.',
        "'/data/studies/{}.nii.gz' cannot be read",
        "'/data/studies/labels/final/{}.nii.gz' cannot be read",
        "[Errno 2] No such file or directory: '/elsewhere/{}.nii.gz'",
        "Infer Request (final): {{'image': '{}', 'device': 'cpu'}}",
        "Image ID {} was opened by another package",
        "GET /progidiff/proposals/{} -> 404",
        "{}: 3 slices",
        "Saving {}.nii.gz",
    ],
)
def test_a_name_is_hidden_wherever_it_stands(names: Names, line: str):
    for name in ("Doe_Jane-1970", "1234567", "Müller"):
        hidden = names.hide(line.format(name))
        assert name not in hidden
        assert names.pseudonym(name) in hidden, "of one image there is one pseudonym, whatever its file is called"
        assert hidden.count("#") == line.count("{}") or "device" in line


@pytest.mark.parametrize(
    "line",
    [
        "'Left_Out Smith.nii.gz' is not served",  # No image: known to nobody.
        "PatientName is Smith^Anna and PatientID unknown",
        "Series 1.2.826.0.1.3680043.8.498.123456 cannot be read",
        "`Smith` is a patient",
    ],
)
def test_names_that_nobody_knows_are_hidden_by_what_they_look_like(names: Names, line: str):
    hidden = names.hide(line)
    for name in ("Smith", "Anna", "498"):
        assert name not in hidden


def test_what_is_nobodys_name_stays(names: Names):
    for line in (
        "The server's disk is full; it's 7 GB, and Linda has 70 of them (7.5 s)",  # Image '7' and 'Li' are too short.
        "'liver' on '/data/studies' in '/data/studies/labels/final' takes '3' or '0.5'",
        "Loaded unet of /models/backbone in torch.float32 on cpu",
        "Transfer syntax 1.2.840.10008.1.2.1 of storage",
        "POST /infer/{model}: 200",
    ):
        assert names.hide(line) == line


def test_short_names_and_quotes_in_names_are_hidden_in_quotes(names: Names):
    for text in ("'Li' is gone", "'O'Neill Tim' is gone", '"O\'Neill Tim" is gone'):
        assert "Li'" not in names.hide(text)
        assert "Neill" not in names.hide(text)


def test_a_pseudonym_is_the_same_after_a_restart_and_another_with_another_key(tmp_path: Path):
    file = logs.find_key_file(tmp_path)
    first, again = Names(logs.open_key(file)), Names(logs.open_key(file))
    assert first.pseudonym("a") == again.pseudonym("a") != Names(KEY).pseudonym("a")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"short")
    assert len(logs.open_key(file)) == 32  # Damaged: another one, and it is said.
    assert Names(logs.open_key(file)).pseudonym("a") != first.pseudonym("a")


def test_new_images_are_known_from_the_next_line_on():
    images: dict[str, int] = {}
    names = Names(KEY)
    names.watch(lambda: images)
    assert names.hide("Doe is here") == "Doe is here"
    images = {**images, "Doe": 1}
    assert names.hide("Doe is here") == f"{names.pseudonym('Doe')} is here"
    images = {}
    assert "Doe" not in names.hide("Doe is gone"), "lines about what was removed still come"


def test_a_line_is_one_json_object_with_its_request_and_account(lines: tuple[logging.Logger, io.StringIO]):
    logger, stream = lines

    def answer() -> None:
        begin_request(RequestNote("id-1", texts={"Typed Name"}))
        note_account("anna")
        logger.info("Two\nlines about '%s' and Typed Name", "Doe_Jane-1970")
        worker = threading.Thread(target=copy_context().run, args=(logger.warning, "in a thread"))
        worker.start()
        worker.join()

    copy_context().run(answer)
    logger.error("of nobody", extra={"account": "adam", "color_message": "Doe_Jane-1970"})
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert (first["request"], first["account"], first["level"]) == ("id-1", "anna", "INFO")
    assert first["time"].endswith("+00:00")
    assert first["message"].startswith("Two\nlines about '#")
    assert "Typed Name" not in first["message"]
    assert (second["request"], second["message"]) == ("id-1", "in a thread")
    assert "request" not in third
    assert third["account"] == "adam"
    assert "Doe" not in stream.getvalue()


def test_a_traceback_says_where_and_hides_what(lines: tuple[logging.Logger, io.StringIO]):
    logger, stream = lines

    def fail() -> None:
        try:
            raise ValueError("'Smith_Anna.nii.gz' is broken")
        except ValueError as err:
            raise RuntimeError("cannot read Doe_Jane-1970\nfor\n  'Smith_Anna'") from err

    try:
        fail()
    except RuntimeError:
        logger.exception("Broken")
    told = json.loads(stream.getvalue())["exception"]
    assert "in fail" in told
    assert __file__ in told
    assert "ValueError: '#" in told
    assert "RuntimeError: cannot read #" in told
    assert "direct cause" in told
    raised = [line for line in told.splitlines() if "raise " not in line]  # The code itself names nobody.
    assert "Smith" not in "\n".join(raised)
    assert "Doe" not in "\n".join(raised)


def test_text_lines_keep_their_form_and_lose_the_names(names: Names):
    formatter = HiddenLines(logging.Formatter("[%(levelname)s] %(message)s"), names.hide)
    record = logging.LogRecord("a", logging.INFO, "", 1, "'%s' is %d", ("Doe_Jane-1970", 3), None)
    assert formatter.format(record) == f"[INFO] '{names.pseudonym('Doe_Jane-1970')}' is 3"
    assert record.getMessage() == "'Doe_Jane-1970' is 3", "other handlers see the record as it was"


def test_a_process_that_is_started_writes_as_its_parent_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert make_environment() == {}
    logs.describe_for_child(logs.JSON, logs.HASHED, logs.find_key_file(tmp_path))
    try:

        def start() -> dict[str, str]:
            begin_request(RequestNote("id-2"))
            return make_environment()

        environment = copy_context().run(start)
        assert set(environment) == {logs.ENVIRONMENT}
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        monkeypatch.setattr(logs, "_list_handlers", lambda: iter([handler]))
        monkeypatch.setattr(logs, "_told_by_parent", {})
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        images = {"Doe": 1}
        logs.follow_parent(lambda: images, strip_suffix, environment)
        logging.captureWarnings(False)
        handler.handle(logging.LogRecord("a", logging.INFO, "", 1, "Doe and 'Smith'", (), None))
        line = json.loads(stream.getvalue())
        key = logs.open_key(logs.find_key_file(tmp_path))
        assert line["request"] == "id-2"
        assert line["message"] == f"{Names(key).pseudonym('Doe')} and '{Names(key).pseudonym('Smith')}'"
    finally:
        logs.describe_for_child(logs.TEXT, logs.PLAIN, tmp_path)
