"""TextDiff as a user does it: the stock client against a real server process on a folder of pictures, a real child
process that trains.

The tests follow one story and run in order: nothing but a denoiser is there; labels are saved, a version is trained and
served, pictures are segmented and ranked, a worse version is refused, versions go back and forth, the training is
killed and goes on. The denoiser is of toy width with random weights, which is enough to tell dark from bright.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException
from PIL import Image

from progidiff.testing import build_tiny_model
from support.chests import CLASSES, PHRASES, write_chests
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server
from support.tissue import SENTENCES, SIDE, build_denoiser, draw_tissue, write_tissue

PICTURES = {
    "tissue_a.png": "left",
    "tissue_b.png": "right",
    "tissue_c.jpg": "left",
    "tissue_d.tif": "right",
    "tissue_e.png": "left",
    "tissue_f.png": "",
    "tissue_g.png": "right",
}
LABELLED = ("tissue_a", "tissue_b", "tissue_c")
LEARNS = {
    "name": "nuclei",
    "structures": "nuclei",
    "steps": 60,
    "batch_size": 4,
    "crop": 32,
    "learning_rate": 5e-3,
    "views": 1,
}
UNLEARNS = {"steps": 20, "batch_size": 1, "crop": 32, "learning_rate": 0.5, "views": 1}
LONG = {"steps": 20_000, "batch_size": 2, "crop": 32, "learning_rate": 1e-4, "views": 1}
INFO = {"label_info": [{"name": "nuclei", "idx": 1}]}
PATIENCE_SECONDS = 900.0


class World:
    """The folder that everything happens in, and the server that runs on it now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.studies, self.model, self.drawn, self.heads = (
            folder / name for name in ("studies", "model", "drawn", "textdiff")
        )
        build_tiny_model(self.model)
        build_denoiser(self.heads / "denoiser")
        self.studies.mkdir()
        write_tissue(self.studies, PICTURES, self.drawn)
        write_phantom(self.studies / "volume.nii.gz")
        picture, _ = draw_tissue(20)
        alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
        Image.fromarray(np.concatenate([picture, alpha], axis=2)).save(self.studies / "with_alpha.png")
        Image.fromarray(picture.mean(axis=2).astype(np.uint8)).save(self.studies / "gray.png")
        Image.fromarray(picture.mean(axis=2).astype(np.uint16) * 200).save(self.studies / "sixteen_bit.png")
        Image.fromarray(picture[:10, :7]).save(self.studies / "small.png")
        (self.studies / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing follows")
        self.app = copy_app(folder)
        self._stack = ExitStack()
        self.server: Server | None = None

    def start(self) -> Server:
        """A server on this folder; the one before must be gone."""
        self._stack = ExitStack()
        options = ("model_dir", str(self.model), "device", "cpu", "textdiff", str(self.heads), "training_nice", "0")
        options += (
            "score_pool",
            "on",
            "score_prompt",
            "liver",
            "acquisition",
            "cover=off,noise=off",
            "next_strategy",
            "proposal_disagreement",
        )
        self.server = self._stack.enter_context(
            run_server(self.studies, self.app, self.folder / "server.log", *options)
        )
        return self.server

    def close(self) -> None:
        """End the server."""
        self._stack.close()

    @property
    def client(self) -> MONAILabelClient:
        """The stock client."""
        assert self.server is not None
        return MONAILabelClient(self.server.url, tmpdir=str(self.folder), client_id="somebody")

    def get(self, path: str) -> Any:
        assert self.server is not None
        return self.server.get(path).json()

    def post(self, path: str) -> requests.Response:
        assert self.server is not None
        return requests.post(self.server.url + path, timeout=30)

    def ask(self, image: str, params: dict[str, Any]) -> requests.Response:
        """What any other client gets."""
        assert self.server is not None
        return self.server.infer(image, params, output="json", model="textdiff")

    def segment(self, image: str, params: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The mask as rows and columns, and the parameters of the answer."""
        file, answer = self.client.infer("textdiff", image, dict(params or {}))
        assert Path(file).suffix == ".png"
        mask = np.asarray(Image.open(file)).copy()
        os.unlink(file)
        return mask, answer

    def truth(self, image: str) -> np.ndarray:
        """What was drawn."""
        return np.asarray(Image.open(self.drawn / f"{image}.png"))

    def poll(self, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The task as the client polls it, once something is true of it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            task: dict[str, Any] = self.client.train_status()
            if until(task):
                return task
            assert time.monotonic() < deadline, task
            time.sleep(0.3)

    def train(self, params: dict[str, Any]) -> dict[str, Any]:
        """Start, wait for the end."""
        self.client.train_start("textdiff", dict(params))
        return self.poll(lambda task: task["status"] != "RUNNING")

    def wait_for_scores(self, count: int) -> None:
        """Until so many images are scored by the versions that are served."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (told := self.get("/progidiff/scoring"))["scored"] < count:
            assert time.monotonic() < deadline, told
            time.sleep(0.5)

    def child(self) -> psutil.Process:
        """The process that trains."""
        assert self.server is not None
        for process in psutil.Process(self.server.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "progidiff.training_runs.child" in process.cmdline():
                    return process
        raise AssertionError("No training process is there.")


def compute_dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("textdiff"))
    world.start()
    yield world
    world.close()


def test_the_server_lists_textdiff_and_loads_nothing_before_somebody_asks(world: World):
    info = world.client.info()
    assert info["models"]["textdiff"]["type"] == "segmentation"
    assert info["models"]["textdiff"]["dimension"] == 2
    assert info["models"]["textdiff"]["config"]["prompt"] == ""
    assert "textdiff" in info["trainers"]
    assert info["trainers"]["textdiff"]["config"]["crop"] == 128
    assert "Loaded textdiff" not in world.server.log.read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert set(world.client.datastore()["objects"]) >= {Path(name).stem for name in PICTURES}


def test_without_weights_a_request_says_what_is_missing_and_the_rest_works(world: World):
    answer = world.ask("tissue_a", {})
    assert answer.status_code == 503
    assert "There are no weights for textdiff in" in answer.json()["detail"]
    assert "--conf textdiff" in answer.json()["detail"]
    file, params = world.client.infer("progidiff", "volume", {"prompt": "liver", "num_proposals": 1, "steps": 1})
    os.unlink(file)
    assert params["model_version"]
    sample = world.client.next_sample("proposal_disagreement", {})
    assert "id" in sample


def test_a_picture_asked_for_as_a_volume_is_refused_with_the_model_that_takes_it(world: World):
    answer = world.server.infer("tissue_a", {"prompt": "liver"}, output="json")  # type: ignore[union-attr]
    assert answer.status_code == 422
    assert "Ask the model textdiff" in answer.json()["detail"]


def test_without_accepted_labels_training_is_refused_with_what_to_do(world: World):
    with pytest.raises(MONAILabelClientException) as refusal:
        world.client.train_start("textdiff", dict(LEARNS))
    assert "Status: 422" in refusal.value.msg
    assert "No image has an accepted label yet" in refusal.value.msg


def test_labels_of_pictures_are_saved_and_read_back_byte_for_byte(world: World):
    world.client.save_label("tissue_a", str(world.drawn / "tissue_a.png"), "final", dict(INFO))
    task = world.train(LEARNS)
    assert task["status"] == "ERROR"
    assert "Label a second image, then train" in task["reason"]
    for name in LABELLED[1:]:
        answer = world.client.save_label(name, str(world.drawn / f"{name}.png"), "final", dict(INFO))
        assert answer["annotation"]["structures"] == ["nuclei"]
    back = world.client.download_label("tissue_b", "final")
    # Without a model of its own the server gave the structure the next free id of its vocabulary.
    assert np.array_equal(np.asarray(Image.open(back)) > 0, world.truth("tissue_b") > 0)
    assert set(world.client.datastore()["objects"]["tissue_b"]["labels"]) == {"final"}


def test_accepted_labels_become_a_version_that_is_served(world: World):
    started = world.client.train_start("textdiff", dict(LEARNS))
    assert started["status"] == "RUNNING"
    assert started["request"]["model"] == "textdiff"
    second = requests.post(world.server.url + "/train/textdiff", json={}, timeout=30)  # type: ignore[union-attr]
    assert second.status_code == 503
    assert "One training at a time" in second.json()["detail"]
    task = world.poll(lambda task: task["status"] != "RUNNING")
    assert task["status"] == "DONE", task
    assert (task["published"], task["version"]) == (True, "nuclei@1")
    assert "nuclei@1 is published: Dice" in task["result"]
    assert task["best_metric"] > 0.5
    assert len(task["data"]["held_out_cases"]) == 1
    assert set(task["data"]["held_out_cases"] + task["data"]["training_cases"]) == set(LABELLED)
    (model,) = [entry for entry in world.get("/progidiff/versions") if entry.get("trainer") == "textdiff"]
    assert (model["name"], model["current"]) == ("nuclei", 1)
    assert model["versions"][0]["accepted"] is True
    assert world.client.info()["models"]["textdiff"]["labels"] == {"nuclei": 1}


def test_a_picture_gets_a_mask_on_its_own_grid_with_agreement_and_disagreement(world: World):
    mask, answer = world.segment("tissue_e", {"num_proposals": 3})
    assert (mask.shape, mask.dtype) == ((SIDE, SIDE), np.uint8)
    assert set(np.unique(mask)) <= {0, 1}
    assert compute_dice(mask > 0, world.truth("tissue_e") > 0) > 0.5
    assert answer["model_version"] == "nuclei@1"
    assert answer["label_names"] == {"nuclei": 1}
    assert (answer["sentence"], answer["sentence_from"]) == (SENTENCES["left"], "text.csv")
    assert answer["num_proposals"] == 3
    assert len(answer["structures"]["nuclei"]["proposals_pixels"]) == 3
    assert 0 <= answer["disagreement"] <= 1
    assert 0 < answer["structures"]["nuclei"]["agreement"] <= 1
    assert answer["shown_pixels"]["nuclei"] == int((mask > 0).sum())

    draws = []
    for number in (1, 2, 3):
        drawn, shown = world.segment("tissue_e", {"num_proposals": 3, "show": number})
        assert shown["cached"] is True
        draws.append(drawn > 0)
    assert np.array_equal(mask > 0, np.sum(draws, axis=0) * 2 >= 3)
    differing, _ = world.segment("tissue_e", {"num_proposals": 3, "show": "disagreement"})
    assert np.array_equal(differing > 0, np.any(draws, axis=0) & ~np.all(draws, axis=0))
    agreeing, _ = world.segment("tissue_e", {"num_proposals": 3, "show": "agreement"})
    assert np.array_equal(agreeing == 4, np.all(draws, axis=0))


def test_the_sentence_of_the_request_wins_and_a_picture_without_one_is_answered_without(world: World):
    _, asked = world.segment("tissue_e", {"prompt": "The nuclei are evenly distributed."})
    assert (asked["sentence"], asked["sentence_from"]) == ("The nuclei are evenly distributed.", "request")
    mask, answer = world.segment("tissue_f")
    assert (answer["sentence"], answer["sentence_from"]) == ("", "none")
    assert any("no sentence" in note.lower() for note in answer["warnings"])
    assert mask.shape == (SIDE, SIDE)


@pytest.mark.parametrize("image", ["tissue_c", "tissue_d"])
def test_jpeg_and_tiff_are_answered_too(world: World, image: str):
    mask, _ = world.segment(image, {"num_proposals": 1})
    assert compute_dice(mask > 0, world.truth(image) > 0) > 0.5


@pytest.mark.parametrize(
    ("image", "note"),
    [
        ("with_alpha", "alpha channel was blended over white"),
        ("gray", "gray"),
        ("sixteen_bit", "scaled to 0..255"),
        ("small", "no sentence"),
    ],
)
def test_unusual_pictures_are_answered_and_what_was_done_is_said(world: World, image: str, note: str):
    size = Image.open(world.studies / f"{image}.png").size
    for _ in range(2):  # The second time from what was kept.
        mask, answer = world.segment(image, {"num_proposals": 1})
        assert mask.shape == size[::-1]
        assert any(note in text for text in answer["warnings"]), answer["warnings"]


@pytest.mark.parametrize(
    ("image", "params", "status", "told"),
    [
        ("tissue_e", {"sentence": "nuclei " * 2000}, 422, "(?i)sentence .*(long|tokens)"),
        ("tissue_e", {"sentence": "n" * 30_000}, 422, "Option sentence has 30000 letters"),
        ("tissue_e", {"sentence": 7}, 422, "Option sentence is '7'; it must be text"),
        ("tissue_e", {"slice": 3}, 422, "is a picture of one slice. and slice 3 was asked for"),
        ("tissue_e", {"num_proposals": 0}, 422, "Option num_proposals is 0"),
        ("tissue_e", {"show": 9}, 422, "Draw 9 cannot be shown, only 4 are asked for"),
        ("tissue_e", {"show": "nothing"}, 422, "Option show is 'nothing'"),
        ("tissue_e", {"version": "glands"}, 404, "glands"),
        ("tissue_e", {"version": "nuclei@7"}, 404, "has no version 7; there are: 1"),
        ("tissue_e", {"device": "cuda"}, 422, "Option device cannot be set by a request"),
        ("tissue_e", {"result_extension": ".bmp"}, 422, "Option result_extension"),
        ("volume", {}, 422, "is a volume of 8 axial slices"),
        ("volume", {"slice": 8}, 422, "There is no slice 8"),
        ("volume", {"slice": 3, "result_extension": ".png"}, 422, "result_extension .png is for pictures"),
        ("damaged", {}, 422, "'damaged.png' cannot be read as a picture"),
        ("unknown", {}, 404, "There is no image 'unknown' in the datastore"),
    ],
)
def test_bad_input_is_refused_with_the_reason_and_a_cure(
    world: World, image: str, params: dict[str, Any], status: int, told: str
):
    import re

    answer = world.ask(image, params)
    assert answer.status_code == status, answer.text
    assert re.search(told, answer.json()["detail"]), answer.json()["detail"]


def test_a_table_of_sentences_that_cannot_be_read_is_named(world: World):
    table = world.studies / "text.csv"
    good = table.read_bytes()
    try:
        table.write_text("a,b\n1,2\n", encoding="utf-8")
        answer = world.ask("tissue_e", {})
        assert answer.status_code == 422
        assert "text.csv" in answer.json()["detail"]
    finally:
        table.write_bytes(good)
    assert world.ask("tissue_e", {}).status_code == 200


def test_a_slice_of_a_volume_comes_back_on_the_volumes_grid_and_can_be_saved(world: World):
    file, answer = world.client.infer(
        "textdiff", "volume", {"slice": 3, "sentence": "A bright ball.", "num_proposals": 2}
    )
    mask, image = nibabel.load(file), nibabel.load(world.studies / "volume.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
    drawn = np.flatnonzero(np.asarray(mask.dataobj).any(axis=(0, 1)))
    assert set(drawn) <= {3}
    assert (answer["slice"], answer["slices"], answer["proposals"]) == (3, [3], None)
    saved = world.client.save_label(
        "volume", str(file), "final", {"slices": answer["slices"], "label_info": [{"name": "ball", "idx": 1}]}
    )
    assert saved["annotation"]["slices"] == [3]
    os.unlink(file)
    assert world.client.datastore()["objects"]["volume"]["labels"]


def test_an_answer_saved_as_it_is_counts_as_unedited_and_a_changed_one_as_edited(world: World):
    file, answer = world.client.infer("textdiff", "tissue_g", {})
    saved = world.client.save_label(
        "tissue_g", str(file), "final", {"proposals": answer["proposals"], "label_names": answer["label_names"]}
    )
    assert saved["annotation"]["edited"] is False
    pixels = np.asarray(Image.open(file)).copy()
    os.unlink(file)
    pixels[:5, :5] = 1 - pixels[:5, :5]
    changed = world.folder / "changed.png"
    Image.fromarray(pixels).save(changed)
    saved = world.client.save_label(
        "tissue_g", str(changed), "final", {"proposals": answer["proposals"], "label_names": answer["label_names"]}
    )
    assert saved["annotation"]["edited"] is True
    assert np.array_equal(np.asarray(Image.open(world.client.download_label("tissue_g", "final"))), pixels)


def test_the_next_sample_is_the_picture_whose_draws_disagree_most_and_says_so(world: World):
    open_pictures = {"tissue_d", "tissue_e", "tissue_f", "with_alpha", "gray", "sixteen_bit", "small"}
    world.wait_for_scores(
        len(open_pictures) + len(LABELLED) + 2
    )  # tissue_g and the volume are labelled, damaged cannot be scored
    assert "damaged" in world.get("/progidiff/scoring")["failed"]
    queue = [entry for entry in world.get("/progidiff/queue") if entry["image"] in open_pictures]
    assert {entry["image"] for entry in queue} == open_pictures
    ranked = [entry["slices"][0]["score"] for entry in queue]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[0] > 0
    sample = world.client.next_sample("proposal_disagreement", {})
    assert sample["id"] == queue[0]["image"]
    assert sample["scores_from"] == "nuclei@1"
    assert sample["modality"] == "picture"
    assert sample["reason"].startswith("Proposals for nuclei disagree (by 0.")
    assert [entry["index"] for entry in sample["slices"]] == [0]
    # What the scorer drew is there for the first look, and as the label that viewers load with the image.
    assert "original" in world.client.datastore()["objects"][sample["id"]]["labels"]
    _, answer = world.segment(sample["id"])
    assert answer["cached"] is True


def test_a_worse_version_is_kept_but_not_served_and_the_client_is_told(world: World):
    task = world.train(UNLEARNS)
    assert task["status"] == "DONE", task
    assert (task["published"], task["version"]) == (False, "nuclei@2")
    assert "nuclei@2 is kept but not published: Dice" in task["result"]
    assert "nuclei@1 has" in task["result"]
    assert task["figures"]["adapted"]["dice"] < task["figures"]["current"]["dice"]
    assert world.segment("tissue_e")[1]["model_version"] == "nuclei@1"
    assert world.segment("tissue_e", {"version": "nuclei@2"})[1]["model_version"] == "nuclei@2"


def test_versions_go_back_and_forth_and_requests_and_scores_follow(world: World):
    assert world.post("/progidiff/versions/nuclei/2/use").json() == {"name": "nuclei", "served": "nuclei@2"}
    assert world.segment("tissue_e")[1]["model_version"] == "nuclei@2"
    assert world.post("/progidiff/versions/nuclei/rollback").json() == {"name": "nuclei", "served": "nuclei@1"}
    assert world.segment("tissue_e")[1]["model_version"] == "nuclei@1"
    assert world.post("/progidiff/versions/nuclei/rollback").json() == {"name": "nuclei", "served": ""}
    answer = world.ask("tissue_e", {})
    assert answer.status_code == 503
    assert "No textdiff model is published" in answer.json()["detail"]
    refused = world.post("/progidiff/versions/nuclei/9/use")
    assert refused.status_code == 404
    assert "has no version 9; there are: 1, 2" in refused.json()["detail"]
    assert world.post("/progidiff/versions/nuclei/1/use").status_code == 200
    assert world.segment("tissue_e")[1]["model_version"] == "nuclei@1"


def test_a_training_that_was_killed_says_so_and_continues_where_it_was(world: World):
    world.client.train_start("textdiff", dict(LONG))
    step = world.poll(lambda task: task["stage"] == "head" and task["step"] >= 60)["step"]
    assert world.segment("tissue_e")[1]["model_version"] == "nuclei@1"
    world.child().send_signal(signal.SIGKILL)
    task = world.poll(lambda task: task["status"] != "RUNNING")
    assert task["status"] == "ERROR"
    assert "was killed (signal 9, SIGKILL) at head" in task["reason"]

    world.client.train_start("textdiff", dict(LONG))
    task = world.poll(lambda task: task["stage"] == "head" and task["step"] > 0)
    assert task["step"] > step - step % 50  # From the checkpoint, not from the beginning.


def test_stopping_makes_a_checkpoint_and_says_so(world: World):
    world.client.train_stop()
    task = world.poll(lambda task: task["status"] != "RUNNING")
    assert task["status"] == "STOPPED"
    assert "Stopped on request at head" in task["result"]
    assert [version["version"] for version in _textdiff(world)["versions"]] == [2, 1]


def test_after_a_restart_versions_labels_and_scores_are_there(world: World):
    world.close()
    world.start()
    assert _textdiff(world)["current"] == 1
    mask, answer = world.segment("tissue_e", {"num_proposals": 3})
    assert answer["cached"] is True
    assert mask.any()
    assert json.loads((world.heads / "nuclei" / "1" / "run.json").read_text(encoding="utf-8"))["accepted"] is True


def test_a_head_trained_with_a_table_of_phrases_draws_what_the_sentence_asks_for(world: World):
    folder = world.folder / "chests"
    cases = write_chests(folder, 4)
    rows = [f"{phrase.text},{'; '.join(CLASSES[value - 1] for value in phrase.classes)}" for phrase in PHRASES]
    (world.studies / "phrases.csv").write_text("text,structures\n" + "\n".join(rows) + "\n", encoding="utf-8")
    info = {"label_info": [{"name": name, "idx": number} for number, name in enumerate(CLASSES, start=1)]}
    for case in cases:
        world.client.upload_image(str(case.image), case.name)
    for case in cases[:3]:
        world.client.save_label(case.name, str(case.label), "final", dict(info))
    task = world.train(
        {"name": "chest", "structures": ", ".join(CLASSES), "steps": 80, "batch_size": 2, "crop": 64, "views": 1}
    )
    assert task["status"] == "DONE", task
    assert task["version"] == "chest@1"
    truth = np.asarray(Image.open(str(cases[3].label)))
    for sentence, value in (("right lung", 1), ("Opacity in the left lower zone", 2)):
        mask, answer = world.segment("chest_3", {"version": "chest", "prompt": sentence, "num_proposals": 2})
        assert compute_dice(mask > 0, truth == value) > 0.6
        assert answer["label_names"] == {CLASSES[value - 1]: value}
        assert answer["model_version"] == "chest@1"
    mask, answer = world.segment("chest_3", {"version": "chest"})
    assert not mask.any()
    assert "draws what a sentence asks for" in " ".join(answer["warnings"])


def _textdiff(world: World) -> dict[str, Any]:
    (model,) = [entry for entry in world.get("/progidiff/versions") if entry.get("trainer") == "textdiff"]
    return model  # type: ignore[no-any-return]
