"""One row per structure: whatever speaks of it reads the row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from progidiff.dicomweb.codes import describe_segment, read_coded, warn_uncoded
from progidiff.errors import PromptError
from progidiff.prompts import structures
from progidiff.prompts.hints import suggest
from progidiff.prompts.parser import canonical_name, contradicts, describe, parse_prompt
from progidiff.prompts.structures import STRUCTURES, TABLE, Structure, fixed_ids, number_structures

KIDNEYS = ["right kidney", "left kidney"]


def names(text: str) -> list[str]:
    return [query.name for query in parse_prompt(text)]


def make_segment(row: Structure) -> Dataset:
    """As another program writes the row's codes."""
    written = describe_segment(row.name, row.label_id)
    segment, kind = Dataset(), Dataset()
    for target, keyword in ((segment, "Type"), (kind, "TypeModifier")):
        code = written.get(f"SegmentedProperty{keyword}CodeSequence")
        if code is not None:
            item = kind if keyword == "Type" else Dataset()
            item.CodeValue, item.CodingSchemeDesignator = code["CodeValue"], code["CodingSchemeDesignator"]
            setattr(target, f"SegmentedProperty{keyword}CodeSequence", [item])
    return segment


def test_ids_colours_and_codes_are_given_once():
    ids = [row.label_id for row in TABLE]
    assert ids == sorted(set(ids))
    assert min(ids) >= 1
    assert max(ids) <= 255
    assert len({row.color for row in TABLE}) == len({row.totalsegmentator for row in TABLE}) == len(TABLE)
    assert len({(row.code.value, row.laterality) for row in TABLE}) == len(TABLE)
    assert fixed_ids() == dict(zip(STRUCTURES, range(1, 14), strict=True))  # as stored labels have them


@pytest.mark.parametrize("row", TABLE, ids=STRUCTURES)
def test_every_fact_of_a_row_leads_back_to_it(row: Structure):
    assert canonical_name(row.totalsegmentator) == row.name
    assert set(row.languages) == {"de", "fr", "es", "it", "zh"}
    for phrase in row.phrases:
        assert names(phrase) == [row.name], phrase
    for noun in row.nouns:
        assert names(noun) == [f"right {row.organ}", f"left {row.organ}"], noun
    coded = read_coded(make_segment(row))
    assert coded == ((row.name,) if row.has_own_code else ())
    assert not contradicts(row.name, coded)
    entry = next(entry for entry in describe() if entry["structure"] == row.name)
    assert entry["color"] == row.color
    assert warn_uncoded([row.name]) == []


def test_each_of_a_pair_has_the_organs_code_and_its_side():
    for organ, code in (("kidney", "64033007"), ("adrenal gland", "23451007")):
        for side, laterality in (("right", "24028007"), ("left", "7771000")):
            segment = describe_segment(f"{side} {organ}", 1)
            assert segment["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == code
            assert segment["SegmentedPropertyTypeModifierCodeSequence"]["CodeValue"] == laterality
    assert "SegmentedPropertyTypeModifierCodeSequence" not in describe_segment("liver", 6)


def test_two_veins_in_one_segment_are_not_coded_as_one_of_them():
    code = describe_segment("portal and splenic veins", 10)["SegmentedPropertyTypeCodeSequence"]
    assert (code["CodeValue"], code["CodeMeaning"]) == ("29092000", "Vein")


def test_a_structure_without_a_code_keeps_its_name_and_is_told_of():
    segment = describe_segment("tumour", 14, "Save 3")
    assert segment["SegmentLabel"] == "tumour"
    assert segment["SegmentDescription"] == "tumour. Save 3"
    assert segment["SegmentedPropertyTypeCodeSequence"]["CodeMeaning"] == "Anatomical structure"
    (sentence,) = warn_uncoded(["liver", "tumour"])
    assert "'tumour'" in sentence
    assert "liver" not in sentence


def test_codes_of_other_programs_are_understood():
    assert structures.find_coded("9846003") == ("right kidney",)
    assert structures.find_coded("32764006") == ("portal and splenic veins",)
    assert structures.find_coded("64033007") == ("right kidney", "left kidney")
    assert contradicts("Liver", ("spleen",))
    assert not contradicts("kidney_left", ("right kidney", "left kidney"))
    assert not contradicts("tumour", ("liver",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("foie", ["liver"]),
        ("Nieren", KIDNEYS),
        ("livers", ["liver"]),
        ("RK", ["right kidney"]),
        ("LK and RK", ["left kidney", "right kidney"]),
        ("linke Niere und Milz", ["left kidney", "spleen"]),
        ("Niere links, Leber", ["left kidney", "liver"]),
        ("beide Nebennieren", ["right adrenal gland", "left adrenal gland"]),
        ("le foie et la rate", ["liver", "spleen"]),
        ("rein gauche", ["left kidney"]),
        ("l'estomac et l'œsophage", ["stomach", "esophagus"]),
        ("riñón derecho y páncreas", ["right kidney", "pancreas"]),
        ("HÍGADO", ["liver"]),
        ("fegato e milza", ["liver", "spleen"]),
        ("rene sinistro", ["left kidney"]),
        ("vena porta e vena splenica", ["portal and splenic veins"]),
        ("Bauchspeicheldrüse", ["pancreas"]),
        ("肝脏和脾脏", ["liver", "spleen"]),
        ("左肾、右肾上腺", ["left kidney", "right adrenal gland"]),
        ("双肾", KIDNEYS),
        ("门静脉和脾静脉", ["portal and splenic veins"]),
    ],
)
def test_structures_are_named_in_several_languages(text: str, expected: list[str]):
    assert names(text) == expected


@pytest.mark.parametrize(("text", "message"), [("ohne Leber", "says 'ohne'"), ("sin hígado", "says 'sin'")])
def test_what_is_not_wanted_is_refused_in_other_languages_too(text: str, message: str):
    with pytest.raises(PromptError, match=message):
        parse_prompt(text)


@pytest.mark.parametrize(("text", "hint"), [("Lebber", "liver"), ("fegatto", "liver"), ("Nierren", "right kidney")])
def test_a_typing_error_in_another_language_has_the_right_hint(text: str, hint: str):
    assert suggest(text, STRUCTURES)[0] == hint


@pytest.mark.parametrize("text", ["hepatic vein", "foot", "coeur", "Lunge", "hueso"])
def test_other_languages_give_no_hint_by_chance(text: str):
    assert not {"right kidney", "left kidney", "esophagus", "spleen"} & set(suggest(text, STRUCTURES))


def test_structures_that_the_table_does_not_know_are_numbered_after_it():
    assert number_structures(["tumour", "liver", "cyst"]) == {"tumour": 14, "liver": 6, "cyst": 15}


NEW_ROW = """
    Structure(
        "duodenum", 14, "#123456", Code("38848004", "Duodenum"), "duodenum",
        parsing=("duodenal",), languages={"de": ("Zwölffingerdarm",)},
    ),
"""
USE = """
from progidiff.dicomweb.codes import describe_segment, warn_uncoded
from progidiff.prompts.parser import compute_label_ids, describe, parse_prompt
from progidiff.prompts.structures import STRUCTURES, pick_color
queries = parse_prompt("Zwölffingerdarm und Leber")
assert compute_label_ids(queries) == {"duodenum": 14, "liver": 6}, queries
assert parse_prompt("all")[-1].name == "duodenum"
assert pick_color("duodenum") == "#123456"
assert describe()[-1] == {"structure": "duodenum", "synonyms": ["duodenal", "Zwölffingerdarm"], "color": "#123456"}
assert describe_segment("duodenum", 14)["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == "38848004"
assert warn_uncoded(STRUCTURES) == []
"""


def test_a_new_structure_is_one_row():
    path = Path(structures.__file__)
    source = path.read_text(encoding="utf-8")
    end = source.index(')  # fmt: skip\n"""The 13 structures')
    changed = source[:end] + NEW_ROW + source[end:]
    load = (
        "import sys, types; import progidiff.prompts; m = types.ModuleType('progidiff.prompts.structures'); "
        "sys.modules[m.__name__] = progidiff.prompts.structures = m; exec(sys.stdin.read(), m.__dict__);" + USE
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", load],
        input=changed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
