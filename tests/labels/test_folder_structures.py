import json

import pytest

from progidiff.errors import ConflictError, NotFoundError, PromptError, RequestError
from progidiff.labels.audit import list_audit
from progidiff.labels.folder_structures import FolderStructures, find_near
from progidiff.labels.history import AnnotationStore
from progidiff.prompts.parser import parse_prompt
from progidiff.prompts.structures import Code


@pytest.fixture
def folder(tmp_path):
    return FolderStructures(tmp_path, tmp_path / ".progidiff", AnnotationStore(tmp_path / ".progidiff" / "annotations"))


def read_ids(tmp_path):
    return json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))


def test_a_structure_of_a_folder_gets_an_id_that_is_free_and_the_known_ones_keep_theirs(folder, tmp_path):
    added = folder.add("left ventricle", words=("LV",), code="87878005")
    assert (added.label_id, added.code) == (14, Code("87878005", "left ventricle"))
    ids = read_ids(tmp_path)
    assert ids["6"] == "liver"
    assert ids["14"] == "left ventricle"
    assert FolderStructures(tmp_path, tmp_path / ".progidiff").find("lv").name == "left ventricle"
    assert folder.adds_to_table


def test_labels_json_of_a_folder_goes_on_with_its_own_ids(folder, tmp_path):
    (tmp_path / "labels.json").write_text('{"1": "Anterior", "2": "Posterior"}')
    assert [row.name for row in folder.own()] == ["Anterior", "Posterior"]
    folder.add("fornix")
    assert read_ids(tmp_path) == {"1": "Anterior", "2": "Posterior", "14": "fornix"}
    assert not folder.adds_to_table


@pytest.mark.parametrize(
    "name, message, suggestion",
    [
        ("livr", "nearly 'liver'.*insist", ("liver",)),
        ("Leber", "is 'liver'", ("liver",)),
        ("kidney_left", "is 'left kidney'", ("left kidney",)),
        ("gallblader", "nearly 'gallbladder'", ("gallbladder",)),
        ("  ", "is empty", ()),
        ("Segment_1", "does not say", ()),
        ("left", "names no structure", ()),
        ("?!", "names no structure", ()),
    ],
)
def test_a_name_that_is_known_or_nearly_or_none_is_asked_back(folder, name, message, suggestion):
    with pytest.raises(PromptError, match=message) as caught:
        folder.add(name)
    assert caught.value.suggestions == suggestion
    assert folder.own() == ()


def test_who_insists_gets_the_name(folder):
    assert folder.add("livr", insist=True).name == "livr"


@pytest.mark.parametrize("name", ["左心室", "ιππόκαμπος", "гиппокамп", "left ventricle", "liver tumour", "tumour 1"])
def test_any_script_is_a_name_and_a_prompt(folder, name):
    folder.add(name)
    assert [query.name for query in parse_prompt(f"liver, {name}", ("liver", name))] == ["liver", name]
    assert folder.find(name.upper()).name == name


def test_two_names_for_one_thing_are_refused(folder):
    folder.add("left ventricle", words=("LV",))
    for name in ("Left-Ventricle", "lv"):
        with pytest.raises(ConflictError, match="'left ventricle'"):
            folder.add(name)
    with pytest.raises(ConflictError, match="choose another word"):
        folder.add("right ventricle", words=("LV",))
    folder.add("right ventricle")


def test_an_id_is_given_once(folder):
    folder.add("left ventricle", label_id=20)
    with pytest.raises(ConflictError, match="Id 20 is 'left ventricle'"):
        folder.add("right ventricle", label_id=20)
    with pytest.raises(ConflictError, match="Id 6 is 'liver'"):
        folder.add("right ventricle", label_id=6)
    for label_id in (0, 256):
        with pytest.raises(RequestError, match="outside 1 to 255"):
            folder.add("right ventricle", label_id=label_id)


def test_a_rename_keeps_the_id_and_the_old_name_goes_on_being_understood(folder, tmp_path):
    folder.add("ventricle", color="#112233")
    renamed = folder.rename("ventricle", "left ventricle", user="anna")
    assert (renamed.name, renamed.label_id, renamed.color, renamed.words) == (
        "left ventricle",
        14,
        "#112233",
        ("ventricle",),
    )
    assert read_ids(tmp_path)["14"] == "left ventricle"
    assert [q.name for q in parse_prompt("ventricle", ("left ventricle",), words=folder.words())] == ["left ventricle"]
    assert folder.rename("left ventricle", "Left ventricle").label_id == 14
    with pytest.raises(NotFoundError, match="It has Left ventricle"):
        folder.rename("liver", "hepar")


def test_what_became_of_structures_is_in_the_audit(folder, tmp_path):
    folder.add("ventricle", user="anna")
    folder.rename("ventricle", "left ventricle")
    rows = list_audit(AnnotationStore(tmp_path / ".progidiff" / "annotations"))
    assert [(row["event"], row["user"], row["image"]) for row in rows] == [
        ("structure", "anna", ""),
        ("structure", "", ""),
    ]
    assert rows[1]["reason"] == "'ventricle' is called 'left ventricle' now, with the same id 14"
    assert AnnotationStore(tmp_path / ".progidiff" / "annotations").changed_since(0) == set()


def test_what_a_saved_label_names_is_taken_over_and_a_slip_is_asked_back(folder):
    told = folder.declare({"liver": 6, "left ventricle": 14, "livr": 15, "Segment_1": 16})
    assert [row.name for row in folder.own()] == ["left ventricle"]
    assert folder.declared() == ("left ventricle",)
    assert len(told) == 1
    assert "'livr' is nearly 'liver'" in told[0]
    assert folder.declare({"left ventricle": 14}) == []


def test_answers_number_own_structures_beyond_the_known_ones(folder, tmp_path):
    (tmp_path / "labels.json").write_text('{"1": "Anterior", "20": "Posterior"}')
    assert folder.answer_ids() == {"Posterior": 20, "Anterior": 21}


def test_a_damaged_table_loses_colours_and_no_ids(folder, tmp_path):
    folder.add("left ventricle", color="#112233")
    (tmp_path / ".progidiff" / "structures.json").write_text("{")
    assert [(row.name, row.label_id) for row in folder.own()] == [("left ventricle", 14)]


@pytest.mark.parametrize("code", ["heart", "12"])
def test_a_code_that_is_none_is_refused(folder, code):
    with pytest.raises(RequestError, match="SNOMED"):
        folder.add("left ventricle", code=code)


def test_a_code_of_a_known_structure_is_not_given_to_another(folder):
    with pytest.raises(ConflictError, match="'liver'"):
        folder.add("left ventricle", code="10200004")


def test_sides_numbers_and_signs_are_no_slips():
    known = ["left ventricle", "tumour 1", "左心室壁", "anterior hippocampus"]
    for name in ("right ventricle", "tumour 2", "右心室壁", "posterior hippocampus", "left ventricle wall"):
        assert find_near(name, known) is None
    assert find_near("left ventricel", known) == "left ventricle"
