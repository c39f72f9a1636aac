"""JSON of strangers: what is read can always be written again."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progidiff.errors import RequestError, TooLargeError
from progidiff.storage.json_text import MAX_DEPTH, read_json, read_json_object, write_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r'{"client_id": "\ud800"}', "half of a character"),
        (r'{"\udfff": 1}', "half of a character"),
        ('{"a": "\ud800"}', "half of a character"),
        ('{"a": NaN}', "NaN is no number"),
        ("[Infinity, -Infinity]", "Infinity is no number"),
        ("1e999", "too large a number"),
        ("[" + "9" * 65 + "]", "too long a number"),
        ("0." + "1" * 65, "too long or too large"),
        ("[" * 65 + "]" * 65, f"more than {MAX_DEPTH} deep"),
        ('{"a":' * 65 + "1" + "}" * 65, f"more than {MAX_DEPTH} deep"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'"\xed\xa0\x80"', "not JSON"),
        ("{'a': 1}", "not JSON"),
    ],
)
def test_what_could_not_be_sent_back_is_refused(text: str | bytes, reason: str):
    with pytest.raises(RequestError, match=reason):
        read_json(text, "The body")


def test_a_long_text_is_refused_by_its_length():
    with pytest.raises(TooLargeError, match="at most 10 are read"):
        read_json("[" + " " * 20 + "]", "The body", most=10)


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"x"', "true"])
def test_only_an_object_is_an_object(text: str):
    with pytest.raises(RequestError, match="Send an object"):
        read_json_object(text, "The form field params")


def test_whole_text_and_ordinary_numbers_are_read_as_they_are():
    value = {"name": "Müller \U0001f600", "seed": 2**63, "share": 0.1, "none": None, "list": [[1, 2], []]}
    assert read_json(json.dumps(value), "The body") == value
    assert read_json(("\ufeff" + json.dumps(value, ensure_ascii=False)).encode(), "The body") == value
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "The body")
    assert read_json(" \n", "The body") is None


def test_what_an_older_version_let_in_is_written_as_something_every_reader_takes():
    written = write_json({"half": ["\ud800", "ü"], "score": [float("inf"), 1.5]})
    assert written.decode("utf-8") == r'{"half":["\ud800","ü"],"score":[null,1.5]}'
    assert json.loads(written)["half"][0] == "\ud800"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None, exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
)


@given(value=JSON, ascii_only=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_whatever_is_read_can_be_written_and_read_again(value: object, ascii_only: bool):
    write_json(value).decode("utf-8")
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        read = read_json(text, "The body")
    except RequestError:
        return
    assert read_json(write_json(read), "The body") == read
