"""A picture and its sentence on the review page in a real browser: what was drawn there is the PNG on disk, pixel by
pixel, and what was written there is the row of text.csv.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from progidiff.textdiff.sentences import read_sentences
from support.browser import drive, needs_browser
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server
from support.tissue import SENTENCES, build_denoiser, draw_tissue, write_tissue
from support.toy_textdiff import add_untrained_head

pytestmark = needs_browser

PLAIN = ["--no-sandbox", "--disable-gpu"]
"""Of Chromium: pictures need no WebGL."""

SENTENCE = 'Dense, "very" dense, in the lower right.'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pictures")
    studies = folder / "studies"
    studies.mkdir()
    write_tissue(studies, {"tissue_a.png": "left", "tissue_b.png": ""}, folder / "drawn")
    picture, _ = draw_tissue(3, size=(80, 120))
    Image.fromarray(picture.mean(axis=2).astype(np.uint8)).save(studies / "gray.png")
    write_phantom(studies / "scan.nii.gz")
    heads = folder / "textdiff"
    build_denoiser(heads / "denoiser")
    add_untrained_head(heads, "chest", ("right lung", "left lung"), gray=True)
    add_untrained_head(heads, "nuclei", ("nucleus",), seed=1)
    conf = ("model_dir", str(tiny_model), "device", "cpu", "score_pool", "off", "textdiff", str(heads))
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as running:
        yield running


def test_a_picture_is_labelled_with_its_sentence_and_what_lies_on_disk_is_what_was_seen(server: Server, tmp_path: Path):
    shots = tmp_path / "shots"
    given = {"image": "tissue_a", "gray": "gray", "volume": "scan", "sentence": SENTENCE}
    said = drive("pictures.mjs", server.url, shots, width=1500, height=900, arguments=PLAIN, **given)
    print({name: value for name, value in said.items() if name not in ("shown", "picked", "drawn")}, shots)
    problems = [problem for problem in said["problems"] if "Failed to load resource" not in problem]
    assert problems == []

    assert {"tissue_a", "tissue_b", "gray", "scan"} <= {name.removesuffix("started") for name in said["listed"]}
    assert (said["ofVolume"], said["ofPicture"]) == ([True, True, True, False], [False] * 7)
    assert "picture · 96 × 96" in said["where"]
    assert said["found"] == SENTENCES["left"]
    colours = np.reshape(said["shown"]["colours"], (said["shown"]["height"], said["shown"]["width"], 3))
    assert np.array_equal(colours, np.asarray(Image.open(server.studies / "tissue_a.png")))
    assert [head.split("@")[0] for head in said["heads"]] == ["nuclei", "chest"]
    assert said["structure"] == "nucleus"
    assert "Not saved yet" in said["state"]

    assert len(set(said["counts"].values())) > 1  # The draws differ.
    assert said["counts"]["2"] == sum(said["picked"])
    assert said["brushed"] > said["counts"]["2"]
    assert said["erased"] < said["brushed"]
    assert (said["undone"], said["again"]) == (said["brushed"], said["brushed"])
    assert said["kept"] == [SENTENCE, said["brushed"]]
    assert "the sentence" in said["decided"]
    assert said["after"][:2] == [SENTENCE, "Saved in text.csv."]
    assert "Saved: nucleus" in said["after"][2]

    (file,) = (server.studies / "labels" / "final").glob("tissue_a.*")
    assert file.suffix == ".png"
    label = np.asarray(Image.open(file))
    assert np.array_equal(label, np.reshape(said["drawn"], label.shape))
    assert np.array_equal(label[20, 20:60], np.ones(40))
    (saved,) = server.get("/progidiff/annotations", params={"image": "tissue_a"}).json()["annotations"]
    assert (saved["structures"], saved["edited"], saved["edits"]) == (["nucleus"], True, 1)
    assert saved["source"]["model"] == "nuclei@1"

    assert (said["theirs"], said["back"]) == (200, "Mine.")
    assert '"without_sentence":true' in said["asked"]
    assert said["changes"] == ["Theirs.", SENTENCE, SENTENCES["left"]]
    assert read_sentences(server.studies / "text.csv") == {"tissue_a.png": "Mine."}
    assert said["grayHead"] == "chest"
    assert "custom" in said["windowed"]
    assert said["zoom"] > 1
    assert "pictures in colour" in said["otherHead"]
    assert said["overflow"] <= 0
    assert said["phone"] >= 300
