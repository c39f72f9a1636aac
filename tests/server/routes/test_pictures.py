"""Pictures on the review page, by the real app in this process: pixels, models, sentences and their history, labels."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from progidiff.errors import ModelError
from progidiff.server.parts import get_context
from progidiff.textdiff.sentences import find_sentence, read_sentences
from support.apps import connect, open_app
from support.phantoms import write_phantom
from support.tissue import SENTENCES, build_denoiser, draw_tissue, write_tissue
from support.toy_textdiff import add_untrained_head

PICTURES = {"tissue_a.png": "left", "tissue_b.png": "", "tissue_c.jpg": "right"}
SIZE = (40, 56)
SEEN = SENTENCES["left"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    studies = folder / "studies"
    studies.mkdir()
    write_tissue(studies, PICTURES, folder / "drawn")
    picture, _ = draw_tissue(7, size=SIZE)
    Image.fromarray(picture).save(studies / "wide.png")
    gray = picture.mean(axis=2)
    Image.fromarray(gray.astype(np.uint8)).save(studies / "gray.png")
    Image.fromarray((gray * 200).astype(np.uint16)).save(studies / "deep.png")
    Image.fromarray(np.full(SIZE, 9, np.uint8)).save(studies / "flat.png")
    Image.fromarray(np.full(SIZE, 0.5, np.float32)).save(studies / "flat_float.tif")
    (studies / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing follows")
    write_phantom(studies / "volume.nii.gz", shape=(32, 28, 5))
    heads = folder / "textdiff"
    build_denoiser(heads / "denoiser")
    add_untrained_head(heads, "chest", ("lung",), gray=True)
    add_untrained_head(heads, "nuclei", ("nucleus",), seed=1, reads_text=False)
    with open_app(studies, tiny_model, "textdiff", str(heads), "login", "off"):
        yield studies


@pytest.fixture
def client(studies: Path) -> TestClient:
    return connect()


def describe(client: TestClient, image: str) -> dict[str, Any]:
    answer = client.get(f"/progidiff/pictures/{image}")
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def propose(client: TestClient, image: str, **params: Any) -> Any:
    form = {"params": (None, json.dumps({"num_proposals": 2, **params}))}
    return client.post("/infer/textdiff", params={"image": image, "output": "json"}, files=form)


def change(client: TestClient, image: str, sentence: str | None, former: str) -> Any:
    return client.put(f"/progidiff/pictures/{image}/sentence", json={"sentence": sentence, "former": former})


def test_a_colour_picture_comes_in_its_colours_and_its_brightness_as_the_slice(client: TestClient, studies: Path):
    truth = np.asarray(Image.open(studies / "wide.png"))
    told = describe(client, "wide")
    assert (told["width"], told["height"], told["is_coloured"]) == (SIZE[1], SIZE[0], True)
    answer = client.get("/progidiff/pictures/wide/pixels")
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("image/png", "no-store")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), truth)
    info = client.get("/progidiff/review/wide").json()
    assert (info["shape"], info["modality"], info["scale"]) == ([1, *SIZE], "picture", [1.0, 0.0])
    assert (info["window"], info["presets"]) == ([0.0, 255.0], [{"name": "as it is", "window": [0.0, 255.0]}])
    pixels = np.frombuffer(client.get("/progidiff/review/wide/slices/0").content, "<i2").reshape(SIZE)
    assert np.abs(pixels - truth @ [0.299, 0.587, 0.114]).max() <= 0.5


def test_a_grey_picture_keeps_the_numbers_of_its_file(client: TestClient, studies: Path):
    assert describe(client, "deep")["is_coloured"] is False
    assert any("scaled to 0..255" in note for note in describe(client, "deep")["notes"])
    truth = np.asarray(Image.open(studies / "deep.png"))
    info = client.get("/progidiff/review/deep").json()
    slope, intercept = info["scale"]
    pixels = np.frombuffer(client.get("/progidiff/review/deep/slices/0").content, "<i2").reshape(SIZE)
    assert np.abs(pixels * slope + intercept - truth).max() <= slope
    assert info["window"] == [truth.min(), truth.max()]


@pytest.mark.parametrize(("image", "value"), [("flat", 9.0), ("flat_float", 0.5)])
def test_a_picture_of_one_value_is_shown_too(client: TestClient, image: str, value: float):
    slope, intercept = client.get(f"/progidiff/review/{image}").json()["scale"]
    pixels = np.frombuffer(client.get(f"/progidiff/review/{image}/slices/0").content, "<i2")
    assert set(pixels * slope + intercept) == {value}


def test_the_model_that_fits_the_picture_answers_and_all_are_offered(client: TestClient):
    coloured, gray = describe(client, "tissue_a"), describe(client, "gray")
    assert [head["name"] for head in coloured["heads"]] == ["nuclei", "chest"]
    assert (coloured["head"], gray["head"]) == ("nuclei", "chest")
    assert [(head["classes"], head["reads_text"], head["gray"]) for head in gray["heads"]] == [
        (["nucleus"], False, False),
        (["lung"], True, True),
    ]
    for image, model in (("tissue_a", "nuclei@1"), ("gray", "chest@1"), ("volume", "chest@1")):
        more = {"slice": 2} if image == "volume" else {}
        answer = propose(client, image, sentence="left lung", **more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
    assert propose(client, "gray", version="nuclei").json()["model"] == "nuclei@1"


def test_a_picture_can_be_asked_without_the_sentence_in_the_table(client: TestClient):
    assert propose(client, "tissue_a").json()["sentence_from"] == "text.csv"
    answer = propose(client, "tissue_a", without_sentence=True).json()
    assert (answer["sentence"], answer["sentence_from"]) == ("", "none")
    both = propose(client, "tissue_a", without_sentence=True, sentence="Dense.")
    assert (both.status_code, "sent together" in both.json()["detail"]) == (422, True)


def test_a_sentence_goes_back_into_the_table_and_who_changed_what_is_kept(client: TestClient, studies: Path):
    before = (studies / "text.csv").read_text(encoding="utf-8")
    told = describe(client, "tissue_a")["sentence"]
    assert (told["sentence"], told["problem"], told["changes"]) == (SEEN, "", [])
    new = 'Dense, "very", on the left; \u00e4hnlich rechts.'
    answer = change(client, "tissue_a", f"  {new}\n", SEEN)
    assert answer.status_code == 200, answer.text
    (line,) = answer.json()["changes"]
    assert (line["image"], line["file"], line["user"]) == ("tissue_a", "tissue_a.png", "")
    assert (line["former"], line["sentence"]) == (SEEN, new)
    sentences = read_sentences(studies / "text.csv")
    assert sentences == {"tissue_a.png": new, "tissue_c.jpg": SENTENCES["right"]}
    assert propose(client, "tissue_a").json()["sentence"] == new
    # The same again changes nothing; going back is one more line, and the file is what it was, byte for byte.
    assert len(change(client, "tissue_a", new, "anything").json()["changes"]) == 1
    assert len(change(client, "tissue_a", SEEN, new).json()["changes"]) == 2
    assert (studies / "text.csv").read_text(encoding="utf-8") == before
    log = (studies / ".progidiff" / "sentences" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(entry)["sentence"] for entry in log] == [new, SEEN]


def test_a_picture_without_a_sentence_gets_a_row_and_loses_its_text_again(client: TestClient, studies: Path):
    assert describe(client, "tissue_b")["sentence"]["sentence"] == ""
    assert change(client, "tissue_b", "Few nuclei.", "").status_code == 200
    assert find_sentence(read_sentences(studies / "text.csv"), "tissue_b.png") == "Few nuclei."
    answer = change(client, "tissue_b", None, "Few nuclei.")
    assert (answer.json()["sentence"], answer.json()["changes"][0]["former"]) == ("", "Few nuclei.")
    assert find_sentence(read_sentences(studies / "text.csv"), "tissue_b.png") is None


def test_two_tabs_and_a_spreadsheet_overwrite_nothing_of_each_other(client: TestClient, studies: Path):
    table = studies / "text.csv"
    before = table.read_bytes()
    assert change(client, "tissue_c", "From the first tab.", SENTENCES["right"]).status_code == 200
    late = change(client, "tissue_c", "From the second tab.", SENTENCES["right"])
    assert late.status_code == 409
    assert "It is now: 'From the first tab.'" in late.json()["detail"]
    assert change(client, "tissue_c", "From the second tab.", "From the first tab.").status_code == 200
    table.write_bytes(table.read_bytes().replace(b"From the second tab.", b"From a spreadsheet."))
    assert change(client, "tissue_c", "From the page.", "From the second tab.").status_code == 409
    told = describe(client, "tissue_c")["sentence"]
    assert told["sentence"] == "From a spreadsheet."
    assert [entry["former"] for entry in told["changes"]] == ["From the first tab.", SENTENCES["right"]]
    table.write_bytes(before)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b\n1,2\n", "no column 'image'"),
        ("image,text\na.png,f\u00fcr\n".encode("latin-1"), "save it as CSV in UTF-8"),
        (b"image,text\ntissue_a.png,One.\ntissue_a.png,Two.\n", "two sentences for 'tissue_a.png'"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_and_left_as_it_is(
    client: TestClient, studies: Path, content: bytes, told: str
):
    table = studies / "text.csv"
    before = table.read_bytes()
    table.write_bytes(content)
    try:
        assert told in describe(client, "tissue_b")["sentence"]["problem"]
        answer = change(client, "tissue_b", "New.", "")
        assert (answer.status_code, told in answer.json()["detail"]) == (422, True), answer.text
        assert table.read_bytes() == content
        assert propose(client, "tissue_b", sentence="Asked all the same.").status_code == 200
    finally:
        table.write_bytes(before)


def test_a_table_that_cannot_be_written_leaves_no_line_in_the_history(
    client: TestClient, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    log = studies / ".progidiff" / "sentences" / "log.jsonl"
    before = log.read_bytes() if log.exists() else b""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("progidiff.server.tasks.sentences.replace_bytes", refuse)
    answer = change(client, "tissue_b", "New.", "")
    assert answer.status_code == 507
    assert "the sentence was not saved" in answer.json()["detail"]
    assert (log.read_bytes() if log.exists() else b"") == before


def test_a_line_that_a_crash_cut_off_hides_no_other(client: TestClient, studies: Path):
    log = studies / ".progidiff" / "sentences" / "log.jsonl"
    assert change(client, "tissue_b", "One.", "").status_code == 200
    with log.open("ab") as file:
        file.write(b'{"time": "2026')
    assert change(client, "tissue_b", "Two.", "One.").status_code == 200
    changes = describe(client, "tissue_b")["sentence"]["changes"]
    assert [entry["sentence"] for entry in changes[:2]] == ["Two.", "One."]
    assert change(client, "tissue_b", None, "Two.").status_code == 200


def test_what_is_decided_and_drawn_on_a_picture_is_a_png_of_its_size(client: TestClient, studies: Path):
    answer = propose(client, "wide", num_proposals=3).json()
    key = answer["proposals"]
    masks = []
    for number in (1, 2, 3):
        form = {"params": (None, json.dumps({"num_proposals": 3, "show": number}))}
        shown = client.post("/infer/textdiff", params={"image": "wide", "output": "image"}, files=form)
        masks.append(np.asarray(Image.open(io.BytesIO(shown.content))) > 0)
    pick = {"rule": "union", "members": [1, 3], "threshold": 0.5}
    painted = {
        "shape": [1, *SIZE],
        "slices": {"0": [{"structure": "stroma", "box": [2, 5, 3, 7], "runs": [0, 12], "edits": 1, "start": None,
                          "proposals": ""}]},
    }  # fmt: skip
    decisions = {"proposals": key, "volume": {}, "slices": {"0": {"nucleus": pick}}, "base": 0, "seconds": 3}
    saved = client.post("/progidiff/review/wide", json={**decisions, "painted": painted})
    assert saved.status_code == 200, saved.text
    (file,) = (studies / "labels" / "final").glob("wide.*")
    assert file.suffix == ".png"
    ids = {name: value for entry in saved.json()["saves"] for name, value in entry["label_ids"].items()}
    label = np.asarray(Image.open(file))
    drawn = np.zeros(SIZE, bool)
    drawn[2:5, 3:7] = True
    assert np.array_equal(label == ids["stroma"], drawn)
    assert np.array_equal(label == ids["nucleus"], (masks[0] | masks[2]) & ~drawn)
    shown = np.frombuffer(client.get("/progidiff/review/wide/label/0").content, np.uint8).reshape(SIZE)
    assert np.array_equal(shown, label)
    late = client.post(
        "/progidiff/review/wide", json={**decisions, "slices": {"0": {"nucleus": {**pick, "members": [2]}}}}
    )
    assert late.status_code == 409
    entries = {entry["image"]: entry for entry in client.get("/progidiff/worklist").json()["entries"]}
    assert set(entries["wide"]["annotated"]) == {"nucleus", "stroma"}
    assert {"volume", "tissue_a", "wide"} <= entries.keys()
    assert (entries["tissue_a"]["modality"], entries["tissue_a"]["reason"]) == ("picture", "Not scored yet.")


def test_a_picture_that_cannot_be_read_and_a_volume_are_refused_with_a_cure(client: TestClient):
    for path in ("pictures/damaged", "pictures/damaged/pixels", "review/damaged"):
        answer = client.get(f"/progidiff/{path}")
        assert (answer.status_code, "damaged.png" in answer.json()["detail"]) == (422, True), answer.text
    for answer in (client.get("/progidiff/pictures/volume"), change(client, "volume", "A liver.", "")):
        assert (answer.status_code, "is a volume" in answer.json()["detail"]) == (422, True), answer.text


def test_each_picture_is_scored_by_the_model_that_fits_it(
    client: TestClient, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    scorer = get_context().scorer
    assert scorer.wanted_version("picture") == "chest@1+nuclei@1"
    for image, model in (("gray", "chest@1"), ("tissue_b", "nuclei@1")):
        assert scorer.score(image)
        entry = scorer.scores.pick_newest(scorer.wanted_version)[image]
        assert (entry.scores.version, entry.modality) == ("chest@1+nuclei@1", "picture")
        assert propose(client, image, num_proposals=4).json()["cached"] is True
        assert propose(client, image, num_proposals=4).json()["model"] == model

    def refuse(*_: object) -> None:
        raise ModelError("The weights of chest@1 are damaged.")

    monkeypatch.setattr(get_context().textdiff.engine, "predict", refuse)
    assert scorer.score("deep")
    assert "are damaged" in scorer.failures()["deep"]
    assert scorer.wanted_version("picture") == "chest@1+nuclei@1"


def test_ohif_is_told_where_a_picture_is_labelled(client: TestClient):
    answer = client.get("/progidiff/ohif/images/wide")
    assert (answer.status_code, "review page: /progidiff/#image=wide." in answer.json()["detail"]) == (404, True)


def test_a_picture_too_large_for_a_browser_is_refused_before_it_is_read(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("progidiff.server.tasks.picture_views.MOST_PIXELS", 1000)
    answer = client.get("/progidiff/pictures/flat/pixels")
    assert answer.status_code in (200, 422)  # It may be open already.
    answer = client.get("/progidiff/pictures/tissue_c/pixels")
    assert (answer.status_code, "96 x 96 pixels" in answer.json()["detail"]) == (422, True)
