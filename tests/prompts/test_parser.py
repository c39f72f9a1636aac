"""Free text -> structures."""

import pytest

from progidiff.errors import PromptError
from progidiff.prompts.parser import (
    MAX_PROMPT_CHARACTERS,
    Query,
    describe,
    heldout_phrases,
    parse_prompt,
    synonyms,
    training_phrases,
)
from progidiff.prompts.structures import STRUCTURES
from progidiff.prompts.words import spell_out

KIDNEYS = ["right kidney", "left kidney"]


def names(text: str, **options: object) -> list[str]:
    return [query.name for query in parse_prompt(text, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_synonym_means_its_structure_and_nothing_else(structure):
    for phrase in synonyms(structure):
        assert names(phrase) == [structure], phrase
        assert names(f"Please segment the {phrase.upper()}.") == [structure], phrase


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("left kidney", ["left kidney"]),
        ("hepatic parenchyma", ["liver"]),
        ("both kidneys", KIDNEYS),
        ("kidneys", KIDNEYS),
        ("kidney", KIDNEYS),
        ("bilateral adrenals", ["right adrenal gland", "left adrenal gland"]),
        ("liver and spleen", ["liver", "spleen"]),
        ("spleen, liver; aorta/IVC & pancreas", ["spleen", "liver", "aorta", "inferior vena cava", "pancreas"]),
        ("all", list(STRUCTURES)),
        ("Everything!", list(STRUCTURES)),
        ("all abdominal organs", list(STRUCTURES)),
        ("aorta and all", ["aorta", *[name for name in STRUCTURES if name != "aorta"]]),
        ("liver, liver and hepatic parenchyma", ["liver"]),
        ("kidney_left", ["left kidney"]),
        ("portal_vein_and_splenic_vein", ["portal and splenic veins"]),
        ("portal and splenic veins and liver", ["portal and splenic veins", "liver"]),
        ("\u0152sophagus", ["esophagus"]),
        ("gall-bladder", ["gallbladder"]),
        ("both the liver and the spleen", ["liver", "spleen"]),
        ("Segment the liver in this CT, please.", ["liver"]),
    ],
)
def test_a_prompt_names_its_structures_in_order_and_once(text, expected):
    assert names(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kidney, left", ["left kidney"]),
        ("lt kidney", ["left kidney"]),
        ("left renal", ["left kidney"]),
        ("L. kidney", ["left kidney"]),
        ("kidney (left)", ["left kidney"]),
        ("left-sided kidney", ["left kidney"]),
        ("kidney on the right side", ["right kidney"]),
        ("left and right kidney", ["left kidney", "right kidney"]),
        ("kidney left and right", ["left kidney", "right kidney"]),
        ("left kidney and right", ["left kidney", "right kidney"]),
        ("left kidney right adrenal gland", ["left kidney", "right adrenal gland"]),
        ("kidney, left, adrenal, right", ["left kidney", "right adrenal gland"]),
        ("adrenals left kidney", ["right adrenal gland", "left adrenal gland", "left kidney"]),
    ],
)
def test_a_side_belongs_to_the_structure_it_stands_with(text, expected):
    assert names(text) == expected


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("everything except the liver", ["liver"]),
        ("all but the left kidney", ["left kidney"]),
        ("all organs apart from liver and spleen", ["liver", "spleen"]),
        ("all but not the aorta", ["aorta"]),
    ],
)
def test_all_except_leaves_structures_out(text, missing):
    assert names(text) == [name for name in STRUCTURES if name not in missing]


def test_the_kidneys_except_the_left_are_the_right_one():
    assert names("kidneys except the left") == ["right kidney"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("segment the", "names no structure"),
        ("organ", "names no structure"),
        ("no liver", "says 'no'"),
        ("not the spleen", "says 'not'"),
        ("liver but not spleen", "says 'but'"),
        ("liver, not spleen", "says 'not'"),
        ("liver without spleen", "leaves out 'spleen', which it does not ask for"),
        ("all except", "Say which structure to leave out"),
        ("all except everything", "leaves out everything"),
        ("liver or spleen", "leaves a choice open"),
        ("left right kidney", "contradicts itself"),
        ("bilateral left kidney", "contradicts itself"),
        ("left kidney right", "contradicts itself"),
        ("left liver", "drawn as a whole. Ask for 'liver'"),
        ("spleen left", "drawn as a whole"),
        ("left", "but not of what"),
        ("liver " * MAX_PROMPT_CHARACTERS, "at most 1000 are read"),
    ],
)
def test_a_prompt_that_cannot_be_meant_is_refused_with_a_reason(text, message):
    with pytest.raises(PromptError, match=message):
        parse_prompt(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("spline", "spleen"),
        ("livr and spleen", "liver"),
        ("left kidny", "left kidney"),
        ("leftkidney", "left kidney"),
        ("pancras", "pancreas"),
        ("liver tumour", "liver"),
        ("left kidney cyst", "left kidney"),
        ("left lobe of the liver", "liver"),
        ("adrenal glnd, right", "right adrenal gland"),
    ],
)
def test_an_unknown_prompt_is_an_error_that_names_the_nearest_structure(text, nearest):
    with pytest.raises(PromptError, match="Did you mean") as caught:
        parse_prompt(text)
    assert caught.value.suggestions[0] == nearest
    assert caught.value.status == 422


@pytest.mark.parametrize("text", ["left lung", "\u043f\u0435\u0447\u0435\u043d\u044c", "\u5fc3\u810f", "xyzzy"])
def test_nothing_is_suggested_when_nothing_is_near(text):
    with pytest.raises(PromptError, match="allow_free_text=true") as caught:
        parse_prompt(text)
    assert caught.value.suggestions == ()


def test_free_text_passes_only_the_clauses_that_name_nothing_known():
    queries = parse_prompt("segment the liver tumor and Spleen", allow_free_text=True)
    assert queries == (Query("liver tumor", "liver tumor", known=False), Query("spleen", "spleen"))


def test_free_text_does_not_make_negation_acceptable():
    with pytest.raises(PromptError, match="says 'no'"):
        parse_prompt("no tumour", allow_free_text=True)


def test_a_structure_the_model_was_not_trained_on_is_refused_although_its_name_is_understood():
    with pytest.raises(
        PromptError, match=r"'pancreas', which mr-base@1 was not trained on\. It knows 'liver' and 'spleen'"
    ):
        parse_prompt("pancreatic parenchyma", known=("liver", "spleen"), model="mr-base@1")
    assert parse_prompt("pancreas", known=("liver",), allow_free_text=True) == (
        Query("pancreas", "pancreas", known=False),
    )


def test_all_means_what_the_model_was_trained_on():
    assert names("all", known=("liver", "prostate")) == ["liver", "prostate"]
    assert names("prostate", known=("liver", "prostate")) == ["prostate"]


def test_a_synonym_gives_the_text_encoder_the_canonical_name():
    assert parse_prompt("hepatic parenchyma") == (Query("liver", "liver", known=True),)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_heldout_phrases_are_never_shown_in_training(structure):
    everything_trained = {phrase for name in STRUCTURES for phrase in training_phrases(name)}
    assert training_phrases(structure)[0] == structure
    assert len(training_phrases(structure)) >= 3
    assert len(heldout_phrases(structure)) >= 3
    assert not everything_trained & set(heldout_phrases(structure))


def test_a_structure_without_vocabulary_has_its_name_only():
    assert training_phrases("prostate") == ("prostate",)
    assert heldout_phrases("prostate") == ()
    with pytest.raises(PromptError, match="has no synonyms"):
        synonyms("prostate")


def test_the_description_lists_every_structure_with_its_synonyms():
    entries = describe(("liver", "prostate"))
    assert [entry["structure"] for entry in entries] == ["liver", "prostate"]
    assert "hepatic parenchyma" in entries[0]["synonyms"]
    assert entries[1]["synonyms"] == []


def test_text_of_the_wrong_type_is_a_prompt_error():
    with pytest.raises(PromptError, match="got int"):
        parse_prompt(3)  # type: ignore[arg-type]


def test_names_in_a_script_that_the_text_encoder_cannot_read_stay_apart():
    names = ("左心室", "右心室", "сердце", "ιππόκαμπος")
    assert len({spell_out(name) for name in names}) == len(names)
    assert all(spell_out(name).isascii() for name in names)
    assert all(spell_out(phrase) == phrase for phrase in ("left kidney", "riñón izquierdo", "food pipe"))
