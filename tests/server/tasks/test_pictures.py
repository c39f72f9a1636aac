"""The task `textdiff`, its training's choice of images and its scorer, without a network: an engine that draws what it
is told.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from progidiff.active_learning.scores import SliceScoreStore
from progidiff.errors import CancelledError, ImageError, MemoryFullError, ModelError, NotFoundError, RequestError
from progidiff.images.pictures import PICTURE
from progidiff.proposals.device_queue import JobState
from progidiff.proposals.request import DEFAULT_NUM_PROPOSALS
from progidiff.server.background.scorers import PictureScorer
from progidiff.server.families import Family
from progidiff.server.options import ServerOptions
from progidiff.server.picture_trainings import collect
from progidiff.server.tasks.picture_engine import SentenceTable, TextDiffEngine
from progidiff.server.tasks.pictures import TextDiffInferTask, TextDiffOptions, open_picture
from progidiff.server.tasks.volumes import ProposalInferTask, build_task
from progidiff.textdiff.accepted import _write_cases, choose, judge
from progidiff.textdiff.data import read_classes
from progidiff.textdiff.features import FeatureOptions
from progidiff.textdiff.model import TextDiffCard, TextDiffResult
from progidiff.textdiff.network import HeadConfig
from progidiff.textdiff.versions import TextDiffStore
from progidiff.training.slice_cache import Case
from progidiff.training_runs.options import TrainingOptions
from support.phantoms import write_phantom

SIDE = 24
CARD = TextDiffCard(
    "nuclei",
    1,
    ("nuclei", "stroma"),
    "denoiser",
    "d",
    "",
    "e",
    FeatureOptions(),
    HeadConfig((8,), (1,), classes=2),
    sha256="s",
)


class DrawingEngine(TextDiffEngine):
    """Draws a square of nuclei that grows with the number of the draw, and a stripe of stroma."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.card: TextDiffCard | None = CARD
        self.calls: list[tuple[str | None, int]] = []
        self.before: Callable[[], None] = lambda: None
        self.refuse_longer_than = 1000

    def names(self) -> list[str]:
        return [] if self.card is None else [self.card.name]

    def pick(self, wanted: str | None = None) -> TextDiffCard:
        if self.card is None:
            raise ModelError("There are no weights for textdiff.")
        return self.card

    def predict(
        self,
        picture: Any,
        sentence: str | None,
        draws: int,
        card: TextDiffCard,
        on_progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        device: str = "",
    ) -> TextDiffResult:
        if len(sentence or "") > self.refuse_longer_than:
            raise RequestError("The sentence is too long.")
        self.calls.append((sentence, draws))
        height, width = picture.size
        masks = np.zeros((draws, height, width), np.uint8)
        for draw in range(draws):
            self.before()
            if is_cancelled is not None and is_cancelled():
                raise CancelledError("The segmentation was stopped on request.")
            masks[draw, 2 : 6 + draw, 2 : 6 + draw] = 1
            masks[draw, -3:] = 2
            if on_progress is not None:
                on_progress(draw + 1, draws)
        mean = np.stack([(masks == value).mean(axis=0) for value in (1, 2)]).astype(np.float32)
        return TextDiffResult(mean, masks[0], masks, 0.2, mean[0], tuple(picture.notes), sentence, 0.5)


@dataclass
class Place:
    """A studies folder, a task on it and its parts."""

    studies: Path
    engine: DrawingEngine
    whole: ProposalInferTask
    task: TextDiffInferTask
    saved: list[Any] = field(default_factory=list)

    def ask(self, image: str, **params: Any) -> tuple[Path, dict[str, Any]]:
        file, answer = self.task(
            {"image": str(self.studies / image), "image_id": image.split(".")[0], "params": params}
        )
        return Path(file), json.loads(json.dumps(answer))

    def read(self, image: str, **params: Any) -> tuple[np.ndarray, dict[str, Any]]:
        file, answer = self.ask(image, **params)
        mask = np.asarray(Image.open(file)).copy()
        file.unlink()
        return mask, answer


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    studies = tmp_path / "studies"
    studies.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE + 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(studies / "one.png")
    write_phantom(studies / "volume.nii.gz", shape=(32, 24, 6))
    (studies / "text.csv").write_text("image,text\none.png,Dense on the left.\n", encoding="utf-8")
    options = ServerOptions.from_conf(
        {"model_dir": str(tiny_model), "store": str(tmp_path / "store"), "device": "cpu"}, str(studies)
    )
    whole = build_task(options, tiny_model, lambda: None)  # type: ignore[arg-type,return-value]
    engine = DrawingEngine(tmp_path / "heads")
    return Place(studies, engine, whole, TextDiffInferTask(engine, whole, SentenceTable(studies), lambda: None))  # type: ignore[arg-type,return-value]


# Answers


def test_the_consensus_of_the_draws_is_shown_and_counted(place: Place):
    mask, answer = place.read("one.png", num_proposals=3)
    assert mask.shape == (SIDE, SIDE + 6)
    expected = np.zeros_like(mask)
    expected[2:7, 2:7] = 1  # The middle one of three squares is what two of three draw.
    expected[-3:] = 2
    assert np.array_equal(mask, expected)
    assert answer["label_names"] == {"nuclei": 1, "stroma": 2}
    assert answer["structures"]["nuclei"]["proposals_pixels"] == [16, 25, 36]
    assert answer["structures"]["nuclei"]["consensus_pixels"] == 25
    assert answer["structures"]["stroma"] | {"best": 0, "ranking": []} == {
        "consensus_pixels": 90, "proposals_pixels": [90, 90, 90], "agreement": 1.0, "disagreement": 0.0, "best": 0,
        "ranking": [],
    }  # fmt: skip
    # By hand: Dice of 16 and 25 pixels that lie in each other, and so on.
    pairs = [2 * 16 / 41, 2 * 16 / 52, 2 * 25 / 61]
    assert answer["disagreement"] == pytest.approx(1 - sum(pairs) / 3, abs=1e-3)
    assert answer["structures"]["nuclei"]["agreement"] == pytest.approx((16 * 3 + 9 * 2 + 11) / 3 / 36, abs=1e-3)


def test_another_draw_is_shown_without_computing_again_also_after_a_restart(place: Place):
    place.read("one.png", num_proposals=3)
    mask, answer = place.read("one.png", num_proposals=3, show="3")
    assert (mask == 1).sum() == 36
    assert (answer["cached"], answer["job"]) == (True, None)
    again = TextDiffInferTask(place.engine, place.whole, SentenceTable(place.studies), place.task._datastore)
    place.whole.store._open.clear()
    os.unlink(again({"image": str(place.studies / "one.png"), "image_id": "one", "params": {"num_proposals": 3}})[0])
    assert place.engine.calls == [("Dense on the left.", 3)]


def test_another_sentence_another_number_of_draws_or_other_pixels_are_computed(place: Place):
    place.read("one.png")
    place.read("one.png", sentence="Sparse.")
    place.read("one.png", num_proposals=2)
    Image.new("RGB", (SIDE, SIDE)).save(place.studies / "one.png")
    place.read("one.png")
    assert place.engine.calls == [
        ("Dense on the left.", 4),
        ("Sparse.", 4),
        ("Dense on the left.", 2),
        ("Dense on the left.", 4),
    ]


def test_agreement_and_disagreement_come_as_four_bands(place: Place):
    agreeing, answer = place.read("one.png", num_proposals=4, show="agreement")
    assert answer["label_names"] == {
        "agreement up to 25 %": 1,
        "agreement 25 to 50 %": 2,
        "agreement 50 to 75 %": 3,
        "agreement over 75 %": 4,
    }
    assert (agreeing == 4).sum() == 16 + 90
    differing, _ = place.read("one.png", num_proposals=4, show="disagreement")
    assert np.array_equal(differing > 0, (agreeing > 0) & (agreeing < 4))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".png"])
def test_a_picture_is_answered_in_the_format_that_is_asked_for(place: Place, suffix: str):
    file, _ = place.ask("one.png", result_extension=suffix)
    assert file.name.endswith(suffix)
    file.unlink()


def test_a_slice_is_drawn_as_a_radiologist_sees_it_and_only_there(place: Place):
    file, answer = place.ask("volume.nii.gz", slice="4", num_proposals=2, sentence="A ball.")
    stack = place.whole.open_volume(str(place.studies / "volume.nii.gz")).arrange(
        np.asarray(nibabel.load(file).dataobj)
    )
    file.unlink()
    assert set(np.flatnonzero(stack.any(axis=(1, 2)))) == {4}
    expected = np.zeros(stack.shape[1:], np.uint8)
    expected[2:7, 2:7] = 1  # Two draws: both count as half.
    expected[-3:] = 2
    assert np.array_equal(stack[4], expected)
    assert (answer["slice"], answer["proposals"], answer["modality"]) == (4, None, "CT")
    assert place.ask("volume.nii.gz", slice=4, num_proposals=2, sentence="A ball.")[1]["cached"] is True
    assert place.whole.store.list("volume") == []


def test_saving_one_slice_as_the_original_label_of_a_volume_is_refused(place: Place):
    with pytest.raises(RequestError, match="save_original is for pictures"):
        place.ask("volume.nii.gz", slice=4, save_original=True)


# Sentences


def test_the_request_wins_over_the_table_and_the_table_is_read_again_when_it_changes(place: Place):
    assert place.task.find_sentence(place.studies / "one.png", "Mine.") == ("Mine.", "request")
    assert place.task.find_sentence(place.studies / "one.png", None) == ("Dense on the left.", "text.csv")
    (place.studies / "text.csv").write_text("image,text\none.png,Sparse everywhere.\n", encoding="utf-8")
    assert place.task.find_sentence(place.studies / "one.png", None) == ("Sparse everywhere.", "text.csv")
    (place.studies / "text.csv").unlink()
    assert place.task.find_sentence(place.studies / "one.png", None) == (None, "none")
    assert SentenceTable(None).find("one.png") is None


def test_widgets_that_were_not_touched_mean_the_default():
    options = TextDiffOptions.from_params(
        {
            "prompt": "",
            "slice": -1,
            "num_proposals": 4,
            "show": ["consensus", "best", "1"],
            "version": ["auto", "nuclei"],
            "modality": ["auto", "CT"],
        },
        16,
    )
    assert (options.sentence, options.slice, options.show, options.version, options.modality) == (
        None,
        None,
        "consensus",
        None,
        None,
    )
    assert TextDiffOptions.from_params({"strange": 1}, 16).ignored == ("strange",)


# The queue


def test_a_running_request_reports_its_progress_and_can_be_cancelled(place: Place):
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert leave.wait(30)

    place.engine.before = wait
    failures: list[Exception] = []

    def ask() -> None:
        try:
            place.ask("one.png", job_id="mine")
        except CancelledError as err:
            failures.append(err)

    thread = threading.Thread(target=ask)
    thread.start()
    assert entered.wait(30)
    job = place.whole.queue.get("mine")
    assert (job.info().kind, job.state) == ("textdiff", JobState.RUNNING)
    job.cancel()
    leave.set()
    thread.join(30)
    assert "stopped on request" in str(failures[0])
    assert job.state is JobState.CANCELLED
    place.engine.before = lambda: None
    assert place.ask("one.png", job_id="again")[1]["job"] == "again"
    assert place.whole.queue.get("again").info().percent == 100


def test_a_full_memory_is_a_reason_to_try_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full:
        def predict(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    engine = TextDiffEngine(tmp_path)
    monkeypatch.setattr(engine, "_load", lambda card, device: Full())
    with pytest.raises(MemoryFullError, match="no memory left for this picture"):
        engine.predict(np.zeros((4, 4)), None, 1, CARD)


def test_without_a_folder_of_models_nothing_is_imported_and_the_cure_is_named(tmp_path: Path):
    engine = TextDiffEngine(tmp_path / "nothing")
    assert (engine.names(), engine.label_ids()) == ([], {})
    with pytest.raises(
        ModelError, match="There are no weights for textdiff in .* --conf textdiff; progidiff works without"
    ):
        engine.pick()


# Scores


@pytest.fixture
def scorer(place: Place, tmp_path: Path) -> PictureScorer:
    return PictureScorer(place.task, SliceScoreStore(tmp_path / "scores"))


def test_a_picture_is_scored_by_how_far_its_draws_disagree_and_the_draws_are_kept(place: Place, scorer: PictureScorer):
    assert scorer.score(
        "one", place.studies / "one.png", "fingerprint", partial(place.whole.queue.background_job, "score", "one")
    )
    entry = scorer._scores.load("one", "nuclei@1")
    assert entry is not None
    assert (entry.modality, entry.scores.structures, entry.scores.num_slices) == (PICTURE, ("nuclei", "stroma"), 1)
    assert entry.scores.disagreement[0, 0] > 0 == entry.scores.disagreement[1, 0]
    _, answer = place.read("one.png", num_proposals=DEFAULT_NUM_PROPOSALS)
    assert answer["cached"] is True
    assert answer["structures"]["nuclei"]["disagreement"] == pytest.approx(
        float(entry.scores.disagreement[0, 0]), abs=1e-3
    )


def test_somebody_who_uses_the_device_comes_first(place: Place, scorer: PictureScorer):
    with place.whole.queue.job("infer", "another"):
        assert (
            scorer.score(
                "one", place.studies / "one.png", "", partial(place.whole.queue.background_job, "score", "one")
            )
            is False
        )
    assert place.engine.calls == []


def test_a_sentence_that_is_too_long_does_not_keep_a_picture_from_being_scored(place: Place, scorer: PictureScorer):
    place.engine.refuse_longer_than = 5
    for _ in range(2):  # The second time from what was kept.
        assert scorer.score(
            "one", place.studies / "one.png", "", partial(place.whole.queue.background_job, "score", "one")
        )
    assert place.engine.calls == [(None, DEFAULT_NUM_PROPOSALS)]
    # The draws without the sentence are no answer to a request with it.
    with pytest.raises(RequestError, match="The sentence is too long"):
        place.ask("one.png", num_proposals=DEFAULT_NUM_PROPOSALS)
    (place.studies / "text.csv").unlink()
    assert place.ask("one.png", num_proposals=DEFAULT_NUM_PROPOSALS)[1]["cached"] is True


def test_another_sentence_or_version_asks_for_new_scores(place: Place, scorer: PictureScorer):
    path = place.studies / "one.png"
    first = scorer.fingerprint(path, "file")
    assert scorer.fingerprint(path, "file") == first
    assert scorer.fingerprint(path, "other") != first
    (place.studies / "text.csv").write_text("image,text\none.png,Sparse.\n", encoding="utf-8")
    second = scorer.fingerprint(path, "file")
    place.engine.card = TextDiffCard(**{**{f: getattr(CARD, f) for f in CARD.__dataclass_fields__}, "version": 2})
    assert len({first, second, scorer.fingerprint(path, "file")}) == 3
    place.engine.card = None
    assert scorer.version() == ""


# What a training learns from


def make_case(folder: Path, name: str, names: dict[int, str] | None = None, values: tuple[int, ...] = (1,)) -> Case:
    picture = np.random.default_rng(len(name)).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / f"{name}.png")
    label = np.zeros((16, 16), np.uint8)
    for row, value in enumerate(values):
        label[row * 2 : row * 2 + 2] = value
    Image.fromarray(label).save(folder / f"{name}.label.png")
    return Case(name, folder / f"{name}.png", folder / f"{name}.label.png", {1: "nuclei"} if names is None else names)


def pick(store: TextDiffStore, cases: list[Case], **changes: Any) -> Any:
    options = {"name": "nuclei", "structures": (), "wanted": (), "held_out": (), "shots": None, "seed": 0, **changes}
    return choose(store, cases, **options)


def test_whole_images_are_held_back_and_always_the_same(tmp_path: Path):
    store = TextDiffStore(tmp_path / "heads")
    cases = [make_case(tmp_path, f"case{k}") for k in range(6)]
    chosen = pick(store, cases)
    assert (len(chosen.training), len(chosen.held_out), chosen.classes) == (4, 2, ("nuclei",))
    assert not {c.name for c in chosen.training} & {c.name for c in chosen.held_out}
    assert [c.name for c in pick(store, cases[::-1]).held_out] == [c.name for c in chosen.held_out]
    named = pick(store, cases, held_out=("case3",), shots=2)
    assert ([c.name for c in named.held_out], len(named.training)) == (["case3"], 2)


def test_what_cannot_be_trained_is_refused_with_what_to_do(tmp_path: Path):
    store = TextDiffStore(tmp_path / "heads")
    one, two = make_case(tmp_path, "one"), make_case(tmp_path, "two")
    with pytest.raises(RequestError, match="Label a second image, then train"):
        pick(store, [one])
    with pytest.raises(RequestError, match="The accepted labels name nuclei, and none of them glands"):
        pick(store, [one, two], structures=("glands",))
    with pytest.raises(RequestError, match="two cannot be trained on and held back at once"):
        pick(store, [one, two], held_out=("two",), wanted=("two",))
    with pytest.raises(RequestError, match="9 images were asked for, but 1 are labelled"):
        pick(store, [one, two], shots=9)
    with pytest.raises(RequestError, match="there is no image three"):
        pick(store, [one, two], held_out=("three",))


def test_masks_are_written_as_class_numbers_with_their_sentences(tmp_path: Path):
    cases = [make_case(tmp_path, name, {7: "stroma", 2: "nuclei", 3: "ink"}, (2, 7, 3)) for name in ("one", "two")]
    chosen = pick(TextDiffStore(tmp_path / "heads"), cases, structures=("nuclei", "stroma"))
    training, held_out = _write_cases(chosen, {"one": "Dense."}, tmp_path / "cases")
    written = {case.name: case for case in (*training, *held_out)}
    assert (written["one"].sentence, written["two"].sentence) == ("Dense.", None)
    classes = read_classes(written["one"], (16, 16), 2)
    assert (classes[0, 0], classes[2, 0], classes[4, 0], classes[8, 0]) == (1, 2, 0, 0)


def test_ids_that_nothing_names_are_refused(tmp_path: Path):
    cases = [make_case(tmp_path, name, values=(1, 9)) for name in ("one", "two")]
    with pytest.raises(ImageError, match="holds the ids 9, which nothing names"):
        _write_cases(pick(TextDiffStore(tmp_path / "heads"), cases), {}, tmp_path / "cases")


def test_of_a_volume_only_annotated_slices_are_learned_from(tmp_path: Path):
    write_phantom(tmp_path / "volume.nii.gz", shape=(32, 24, 6))
    image = nibabel.load(tmp_path / "volume.nii.gz")
    label = np.zeros(image.shape, np.uint8)
    label[4:10, 4:10, 1:5] = 1
    nibabel.save(nibabel.Nifti1Image(label, image.affine), tmp_path / "volume.label.nii.gz")
    volume = Case(
        "volume",
        tmp_path / "volume.nii.gz",
        tmp_path / "volume.label.nii.gz",
        {1: "nuclei"},
        {"nuclei": frozenset({2, 3, 5})},
    )
    chosen = pick(TextDiffStore(tmp_path / "heads"), [volume, make_case(tmp_path, "one")], held_out=("one",))
    training, _ = _write_cases(chosen, {"volume": "A ball."}, tmp_path / "cases")
    assert [case.name for case in training] == ["volume-0002", "volume-0003"]
    assert {case.sentence for case in training} == {"A ball."}
    assert Image.open(training[0].image).size == (32, 24)
    assert read_classes(training[0], (24, 32), 1).sum() == 36


def test_a_label_that_was_put_into_the_folder_by_hand_counts_as_the_first_class(place: Place):
    nameless = Case(
        "one", place.studies / "one.png", place.studies / "one.png", {1: "spleen", 2: "liver"}, names_all=False
    )
    named = Case("two", place.studies / "one.png", place.studies / "one.png", {3: "gland"})
    options, _ = TrainingOptions.from_params("textdiff", {"steps": "5"})
    place.engine.label_ids = lambda: {"nuclei": 1, "stroma": 2}  # type: ignore[method-assign]
    collected = collect(place.task, options, [nameless, named], "cpu")
    assert [case["structures"] for case in collected["cases"]] == [{"1": "nuclei", "2": "stroma"}, {"3": "gland"}]
    assert collected["sentences"] == {"one": "Dense on the left.", "two": "Dense on the left."}
    place.engine.label_ids = dict  # type: ignore[method-assign,assignment]
    options, _ = TrainingOptions.from_params("textdiff", {"name": "cells"})
    assert collect(place.task, options, [nameless], None)["cases"][0]["structures"] == {"1": "cells"}


def test_an_unnamed_id_of_a_tissue_picture_is_no_lung_whichever_model_was_published_last(place: Place):
    chest = replace(CARD, name="chest", classes=("right lung", "left lung"), gray=True)
    place.engine.list_served = lambda: [chest, CARD]  # type: ignore[method-assign]
    place.engine.label_ids = lambda: {"right lung": 1, "left lung": 2}  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    for name, shape in (("tissue", (SIDE, SIDE, 3)), ("xray", (SIDE, SIDE))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(place.studies / f"{name}.png")
    cases = [
        Case(name, place.studies / f"{name}.png", place.studies / f"{name}.png", {}, names_all=False)
        for name in ("tissue", "xray")
    ]

    def find_names(**params: str) -> list[dict[str, str]]:
        options, _ = TrainingOptions.from_params("textdiff", params)
        return [case["structures"] for case in collect(place.task, options, cases, None)["cases"]]

    nuclei, lungs = {"1": "nuclei", "2": "stroma"}, {"1": "right lung", "2": "left lung"}
    assert find_names() == [nuclei, lungs]
    assert find_names(name="nuclei") == [nuclei, nuclei]
    assert find_names(structures="gland") == [{"1": "gland"}, {"1": "gland"}]


def test_a_first_version_must_find_something_and_a_later_one_beat_the_served_one():
    assert judge({"adapted": {"dice": 0.0}}, None)[0] is False
    assert judge({"adapted": {"dice": 0.1}}, None) == (
        True,
        "Dice 0.100 on the held-back images; there was no version before.",
    )
    assert judge({"adapted": {"dice": 0.5}, "current": {"dice": 0.5}}, "nuclei@1")[0] is False


def test_without_models_no_versions_are_listed(place: Place):
    assert Family("textdiff", place.engine.find_store).list_versions() == []


def test_a_picture_that_is_gone_is_not_found(tmp_path: Path):
    with pytest.raises(NotFoundError, match="There is no image at"):
        open_picture(tmp_path / "gone.png")
