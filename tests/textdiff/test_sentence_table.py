"""One sentence of text.csv changes, and nothing else of the file."""

from __future__ import annotations

import pytest

from progidiff.errors import RequestError
from progidiff.textdiff.sentence_table import MAX_LETTERS, NEW_TABLE, change_sentence, check_sentence
from progidiff.textdiff.sentences import find_sentence, read_sentences


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("image,text\na.png,Old.\nb.png,Other.\n", "image,text\na.png,New.\nb.png,Other.\n"),
        ("image,text\nb.png,Other.", "image,text\nb.png,Other.\na.png,New.\n"),
        ("image,text\r\nb.png,Other.\r\n", "image,text\r\nb.png,Other.\r\na.png,New.\r\n"),
        ("\ufeffimage;text\r\na;Old, long.\r\n", "\ufeffimage;text\r\na;New.\r\n"),
        ('id\tImage\tDescription\n1\ta.png\t"Old"\n2\tb.png\t"x ""y"""\n',
         'id\tImage\tDescription\n1\ta.png\tNew.\n2\tb.png\t"x ""y"""\n'),
        ('image,text,who\n"a.png","two\nlines","me"\n\n', "image,text,who\na.png,New.,me\n\n"),
        ("image,text\nA.PNG,Old.\n", "image,text\nA.PNG,New.\n"),
        ("text,image\n,a.png\n", "text,image\nNew.,a.png\n"),
        ("image,note,text\na.png\n", "image,note,text\na.png,,New.\n"),
        ("image,text\na.png,Old.\na.png,Old.\n", "image,text\na.png,New.\na.png,New.\n"),
    ],
)  # fmt: skip
def test_only_the_row_of_the_picture_changes(tmp_path, before: str, after: str):
    changed = change_sentence(before.encode(), "text.csv", "a.png", "New.")
    assert changed.decode() == after
    (tmp_path / "text.csv").write_bytes(changed)
    assert find_sentence(read_sentences(tmp_path / "text.csv"), "a.png") == "New."


def test_a_new_table_has_a_header_and_quotes_what_needs_it(tmp_path):
    changed = change_sentence(NEW_TABLE, "text.csv", "a, b.png", 'Dense, "very".')
    assert changed.decode() == 'image,text\n"a, b.png","Dense, ""very""."\n'


def test_a_sentence_that_is_taken_away_stays_away_whatever_name_it_had(tmp_path):
    changed = change_sentence(b"image,text\na.png,One.\na,Two.\nb.png,Other.\n", "text.csv", "a.png", None)
    assert changed == b"image,text\na.png,\na,\nb.png,Other.\n"
    (tmp_path / "text.csv").write_bytes(changed)
    assert find_sentence(read_sentences(tmp_path / "text.csv"), "a.png") is None
    assert change_sentence(b"image,text\n", "text.csv", "a.png", None) == b"image,text\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no column 'image'"),
        (b"a,b\n1,2\n", "no column 'image'.*its columns: a, b"),
        (b"image,note\n1,2\n", "no column 'text'"),
        ("image,text\na.png,Dichte hoch f\u00fcr alle.\n".encode("latin-1"), "save it as CSV in UTF-8"),
        ("image,text\n".encode("utf-16"), "save it as CSV in UTF-8"),
        (b'image,text\n"a.png,x\n', "is no CSV"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused_with_a_cure(content: bytes, told: str):
    with pytest.raises(RequestError, match=told):
        change_sentence(content, "text.csv", "a.png", "New.")


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("", "is empty"),
        (" \n\t ", "is empty"),
        ("x" * (MAX_LETTERS + 1), "has 2,001 letters; at most 2,000"),
        ("bell\a rings", r"control character U\+0007"),
        ("nul\0", r"control character U\+0000"),
        ("half \ud800", r"U\+D800"),
        ("=HYPERLINK(1)", "take for a formula"),
    ],
)
def test_what_is_no_sentence_is_refused_with_a_cure(sentence: str, told: str):
    with pytest.raises(RequestError, match=told):
        check_sentence(sentence)


def test_a_sentence_of_the_full_length_in_any_language_is_taken():
    text = "\u6838" * (MAX_LETTERS - 1) + "."
    assert check_sentence(f" {text}\n") == text
