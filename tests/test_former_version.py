"""What version 0.1.0 left on disk opens unchanged: studies, history, proposals, scores, models, trainings,
accounts.

`tests/data/former_0_1_0` was written by that version (`tests/data/make_former_store.py` says how), with
`facts.json`: what its servers answered. Every test works on a copy, whose images get the modification times that
they had: a checkout keeps none.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from progidiff.active_learning.reservations import Reservations
from progidiff.active_learning.scores import SliceScoreStore
from progidiff.dicomweb.catalogue import Catalogue
from progidiff.dicomweb.frames import FrameStore
from progidiff.errors import CancelledError
from progidiff.evaluation.prelabel import Prelabeller, PrelabelSettings, list_images, run_here
from progidiff.images.reading import load_volume
from progidiff.labels.audit import list_audit
from progidiff.labels.history import AnnotationStore

# Everything that may move is imported here and nowhere else.
from progidiff.model.adapters import AdapterStore, build_networks, compute_base_digest
from progidiff.model.lora import LoraSettings
from progidiff.proposals.engine import Engine
from progidiff.proposals.store import ProposalStore
from progidiff.server.datastores.local import SafeLocalDatastore
from progidiff.server.gate.auth import Authenticator
from progidiff.server.options import ServerOptions
from progidiff.server.tasks.pictures import TextDiffInferTask, build_textdiff
from progidiff.server.tasks.volumes import ProposalInferTask, build_task
from progidiff.textdiff.pictures import read_picture
from progidiff.textdiff.versions import TextDiffStore
from progidiff.training.accepted_labels import from_json
from progidiff.training.adapt import run_adapt
from progidiff.training.loop import pick_precision
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training_runs.mark import MarkFile
from progidiff.training_runs.options import TrainingOptions
from progidiff.training_runs.runner import TrainingRunner
from progidiff.users import UsersFile, find_token, read_tokens
from support.servers import Server, copy_app, run_server

FORMER = Path(__file__).parent / "data" / "former_0_1_0"
THERE = "/data/former"
"""Where the former version ran; run records name files in it."""

FACTS: dict[str, Any] = json.loads((FORMER / "facts.json").read_text(encoding="utf-8"))
VOLUMES, PICTURES = FACTS["volumes"], FACTS["pictures"]
IMAGES = ("ct_one", "mr_one", "mr_two")


def copy_former(target: Path) -> Path:
    """A copy that may be changed: with the images' times, and secrets that only their owner can read."""
    shutil.copytree(FORMER, target)
    for folder in ("studies", "pictures"):
        for path in (target / folder).iterdir():
            if path.name.startswith((*IMAGES, "tissue_", "text.csv", "labels.json")):
                os.utime(path, ns=(FACTS["mtime_ns"],) * 2)
    for secret in ("users.json", "tokens"):
        (target / secret).chmod(0o600)
    return target


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return copy_former(tmp_path / "former")


def build_infer(former: Path, studies: str = "studies") -> ProposalInferTask:
    conf = {"model_dir": str(former / "model"), "textdiff": str(former / "textdiff"), "device": "cpu"}
    options = ServerOptions.from_conf(conf, str(former / studies))
    return build_task(options, former / "model", lambda: None)


def build_pictures(former: Path) -> TextDiffInferTask:
    whole = build_infer(former, "pictures")
    return build_textdiff(whole.options, former / "model", whole, str(former / "pictures"), lambda: None)


def open_history(former: Path, studies: str = "studies") -> AnnotationStore:
    return AnnotationStore(former / studies / ".progidiff" / "annotations", former / studies / "labels" / "final")


# A server on the former version's folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = copy_former(tmp_path_factory.mktemp("server") / "former")
    conf = [
        "model_dir",
        str(folder / "model"),
        "device",
        "cpu",
        "users_file",
        str(folder / "users.json"),
        "token_file",
        str(folder / "tokens"),
    ]
    conf += ["score_pool", "on", "score_prompt", "liver"]
    with run_server(folder / "studies", copy_app(folder), folder / "server.log", *conf) as running:
        yield running


@pytest.fixture(scope="module")
def ask(server: Server) -> Callable[..., Any]:
    """The JSON of an answer, asked by the administrator of the former version's users file."""
    form = {"username": "adam", "password": FACTS["password"], "grant_type": "password"}
    token = requests.post(f"{server.url}/auth/token", data=form, timeout=30).json()["access_token"]

    def ask(path: str, method: str = "GET", **arguments: Any) -> Any:
        answer = requests.request(
            method, server.url + path, headers={"Authorization": f"Bearer {token}"}, timeout=60, **arguments
        )
        assert answer.status_code == 200, answer.text
        return answer.json() if answer.headers["Content-Type"].startswith("application/json") else answer.text

    return ask


def includes(found: Any, expected: Any) -> bool:
    """Whether everything that was there is there; new fields do not matter."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            name in found and includes(found[name], value) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(includes, found, expected))
    return bool(found == expected)


def test_a_server_lists_the_same_images_and_labels(ask: Callable[..., Any]):
    objects = ask("/datastore/?output=all")["objects"]
    assert tuple(sorted(objects)) == IMAGES
    assert includes(objects, VOLUMES["datastore"])
    assert all(
        "first" in record["labels"] for record in objects.values()
    )  # By `progidiff prelabel`, after the server had ended.


def test_a_server_tells_the_same_history(ask: Callable[..., Any]):
    assert includes(ask("/progidiff/annotations"), VOLUMES["annotations"])
    rows = ask("/progidiff/annotations/export?format=jsonl").splitlines()
    # Fields that came later may be added; those that were there are what they were.
    assert includes([json.loads(row) for row in rows], [json.loads(row) for row in VOLUMES["audit"]])


def test_a_server_answers_from_what_was_kept_and_scores_nothing_again(ask: Callable[..., Any]):
    deadline = time.monotonic() + 120
    while (told := ask("/progidiff/scoring"))["state"] != "done":
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    assert includes(told, VOLUMES["scoring"])
    for request in VOLUMES["asked"]:
        params = {
            **request["params"],
            "adapter": request["adapter"] or "none",
        }  # Some were asked for before there was an adapter.
        answer = ask(
            f"/infer/progidiff?image={request['image']}&output=json",
            "POST",
            files={"params": (None, json.dumps(params))},
        )
        assert answer["cached"] is True
        assert includes(answer, {name: value for name, value in request.items() if name not in ("image", "params")})
    assert ask("/progidiff/jobs") == []  # Nothing was computed, by a request or in the background.
    for image, kept in VOLUMES["kept"].items():
        found = {entry["proposals"]: entry for entry in ask(f"/progidiff/proposals/{image}")["kept"]}
        assert all(includes(found[entry["proposals"]], entry) for entry in kept)


def test_a_server_gives_the_same_next(ask: Callable[..., Any]):
    queue = [{name: value for name, value in entry.items() if name != "reserved_by"} for entry in VOLUMES["queue"]]
    assert includes(ask("/progidiff/queue"), queue)


def test_a_server_knows_the_same_trainings_and_versions_and_goes_back(ask: Callable[..., Any]):
    assert includes(ask("/progidiff/training")["history"], VOLUMES["runs"])
    assert includes(ask("/progidiff/versions")[0], VOLUMES["versions"][0])
    assert ask("/progidiff/versions/mr/rollback", "POST") == {"name": "mr", "served": "mr@1"}
    assert ask("/progidiff/versions/mr/2/use", "POST") == {"name": "mr", "served": "mr@2"}


def test_a_server_shows_the_same_dicom_series(ask: Callable[..., Any]):
    answer = ask("/progidiff/ohif/images/ct_one")
    assert {name: answer[name] for name in VOLUMES["dicom"]} == VOLUMES["dicom"]  # fields may be added


def test_the_former_token_and_a_wrong_one(server: Server):
    assert server.get("/progidiff/jobs", headers={"Authorization": f"Bearer {FACTS['token']}"}).status_code == 200
    assert server.get("/progidiff/jobs", headers={"Authorization": f"Bearer {FACTS['token']}x"}).status_code == 401


def test_undo_goes_back_from_where_the_former_version_stopped(ask: Callable[..., Any], server: Server):
    """The last of these tests on the server: it changes the history."""
    kept = server.studies / ".progidiff" / "annotations" / "labels"
    assert ask("/progidiff/annotations/mr_two/undo", "POST")["annotation"]["sequence"] == 6
    assert (server.studies / "labels" / "final" / "mr_two.nii.gz").read_bytes() == (
        kept / "mr_two" / "6.nii.gz"
    ).read_bytes()
    assert ask("/progidiff/annotations/ct_one/undo", "POST")["annotation"]["sequence"] == 1
    assert ask("/progidiff/annotations?image=ct_one")["annotated_slices"] == {"ct_one": [2, 3]}


# The folder's parts, each by itself


def test_the_datastore_opens_and_what_is_in_force_is_what_lies_in_the_folder(former: Path):
    history = open_history(former)
    store = SafeLocalDatastore(str(former / "studies"), former / "studies" / ".progidiff", history, serves=False)
    assert tuple(sorted(store.list_images())) == IMAGES
    assert sorted(store.get_labeled_images()) == list(IMAGES)
    for image in IMAGES:
        current = history.current(image)
        assert current is not None
        assert history.label_file(current).read_bytes() == Path(store.get_label_uri(image, "final")).read_bytes()


def test_the_history_has_every_event_and_the_same_head(former: Path):
    history = open_history(former)
    kinds = ["label", "label", "label", "undo", "label", "label", "skip", "delete", "label", "restore", "label"]
    assert [event.kind for event in history.events()] == kinds
    assert [event.sequence for event in history.events()] == list(range(1, 12))
    assert history.last_sequence() == 11
    assert history.verify() == []
    assert history.list_torn() == []
    assert history.annotated_images() == {"ct_one": frozenset({2, 3, 4}), "mr_one": None, "mr_two": None}
    assert history.counting() == {1, 2, 5, 11}
    first, second = history.in_force("ct_one")
    assert (first.user, first.client, first.seconds, first.label_ids) == (
        "anna",
        "review",
        12.5,
        (("liver", 1), ("left kidney", 2)),
    )
    assert (first.sequence, second.sequence, second.slices, second.structures) == (1, 2, (4,), ("liver",))
    assert first.source is not None
    assert (first.source.proposals, first.source.seed, first.source.model) == (
        VOLUMES["asked"][0]["proposals"],
        7,
        "tiny@1",
    )
    assert includes([dict(row) for row in list_audit(history)], [json.loads(row) for row in VOLUMES["audit"]])


def test_undo_and_a_new_save_follow_the_former_log(former: Path):
    history = open_history(former)
    undone = history.undo("ct_one", "anna")
    assert undone is not None
    assert undone.sequence == 1
    saved = history.record(
        "ct_one", former / "studies" / "labels" / "first" / "ct_one.nii.gz", slices=[0], user="anna", num_slices=6
    )
    assert (saved.sequence, saved.file) == (13, "labels/ct_one/13.nii.gz")
    assert open_history(former).verify() == []


@pytest.mark.parametrize("number", range(len(VOLUMES["asked"])))
def test_the_key_of_a_request_finds_the_kept_proposals_and_nothing_is_loaded(former: Path, number: int):
    request = VOLUMES["asked"][number]
    task = build_infer(former)
    image = former / "studies" / f"{request['image']}.nii.gz"
    params = {**request["params"], "adapter": request["adapter"] or "none", "save_original": False}
    file, answer = task({"image": str(image), "image_id": request["image"], "params": params})
    os.unlink(file)
    assert answer["proposals"] == request["proposals"]
    assert answer["cached"] is True
    assert task.queue.list() == []
    assert task.engine.info()["loaded"] is False
    assert includes(
        answer,
        {name: request[name] for name in ("structures", "label_names", "shown_ml", "adapter", "model_version")},
    )


def test_other_requests_have_other_keys_and_are_computed(former: Path):
    task = build_infer(former)
    request = VOLUMES["asked"][0]
    params = {"prompt": "liver", "num_proposals": 1, "steps": 1, "seed": 8}
    file, answer = task({"image": str(former / "studies" / "ct_one.nii.gz"), "image_id": "ct_one", "params": params})
    os.unlink(file)
    assert answer["cached"] is False
    assert answer["proposals"] != request["proposals"]


def test_every_kept_result_can_be_read(former: Path):
    for folder, facts in (("studies", VOLUMES), ("pictures", PICTURES)):
        store = ProposalStore(former / folder / ".progidiff")
        listed = {entry.key: entry for entry in store.list()}
        expected = {entry["proposals"]: (image, entry) for image, kept in facts["kept"].items() for entry in kept}
        assert expected.keys() <= listed.keys()
        for key, (image, entry) in expected.items():
            assert (listed[key].image_id, list(listed[key].structures)) == (image, entry["structures"])
            result = store.load(key)
            assert result is not None
            assert list(result.structures) == entry["structures"]
        assert not list(store.root.glob(".damaged-*"))


def test_what_prelabel_made_is_not_made_again(former: Path):
    settings = PrelabelSettings(prompt="left kidney", tag="first", num_proposals=2, steps=1)
    make = lambda: Prelabeller(Engine(former / "model", device="cpu"), former / "studies", settings)  # noqa: E731
    outcomes = list(run_here(list_images(former / "studies"), make))
    assert [(outcome.image, outcome.state) for outcome in outcomes] == [(image, "there") for image in IMAGES]


def test_slice_scores_of_every_version_are_there(former: Path):
    store = SliceScoreStore(former / "studies" / ".progidiff" / "scores")
    assert len(store.load_all()) == 7
    for version, images in (
        ("tiny@1", IMAGES),
        ("tiny@1+mr@1", ("mr_one", "mr_two")),
        ("tiny@1+mr@2", ("mr_one", "mr_two")),
    ):
        for image in images:
            entry = store.load(image, version)
            assert entry is not None
            assert (entry.modality, entry.scores.structures, entry.scores.slice_mm) == (
                image[:2].upper(),
                ("liver",),
                5.0,
            )
            assert entry.scores.disagreement.shape == (1, 6)
            assert 0 < entry.scores.disagreement.mean() < 1
    pictures = SliceScoreStore(former / "pictures" / ".progidiff" / "scores")
    assert {entry.scores.image for entry in pictures.load_all()} == {"tissue_a", "tissue_b", "tissue_c"}


def test_a_reservation_holds_for_its_time(former: Path):
    file = former / "studies" / ".progidiff" / "reservations.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    until = kept[VOLUMES["next"]][1]
    assert Reservations(file, 1440, clock=lambda: until - 60).all() == {VOLUMES["next"]: "anna at home"}
    assert Reservations(file, 1440, clock=lambda: until + 60).all() == {}


def test_the_mark_of_what_was_trained_on_is_read(former: Path):
    mark = MarkFile(former / "studies" / ".progidiff" / "retrain.json").load()
    assert (mark.adapters, mark.textdiff) == (11, 0)
    assert open_history(former).count_slices_since(mark.adapters) == 0
    assert MarkFile(former / "pictures" / ".progidiff" / "retrain.json").load().textdiff == 4


def test_the_dicom_cache_is_used(former: Path):
    root = former / "studies" / ".progidiff" / "dicom"
    path = former / "studies" / "ct_one.nii.gz"
    before = {file.name: file.read_bytes() for file in (root / "entries").iterdir()}
    entry = Catalogue(root / "entries").describe("ct_one", path)
    assert (entry.identity.study_uid, entry.identity.series_uid) == (
        VOLUMES["dicom"]["study"],
        VOLUMES["dicom"]["series"],
    )
    assert {file.name: file.read_bytes() for file in (root / "entries").iterdir()} == before
    series = FrameStore(root / "frames").open(
        entry.identity, lambda: pytest.fail("The slices are kept; they need not be read again.")
    )
    assert np.array_equal(series.stored, load_volume(path).to_stack()[0])


# Accounts


def test_users_tokens_and_sessions_are_still_good(former: Path, monkeypatch: pytest.MonkeyPatch):
    users = UsersFile(former / "users.json")
    assert {name: str(account.role) for name, account in users.read().items()} == {
        "adam": "administer",
        "anna": "annotate",
    }
    assert str(users.check("anna", FACTS["password"])) == "annotate"
    token = find_token(read_tokens(former / "tokens"), FACTS["token"])
    assert token is not None
    assert (token.name, str(token.role)) == ("reader", "read")
    conf = {"users_file": str(former / "users.json"), "token_file": str(former / "tokens")}
    auth = Authenticator.from_options(ServerOptions.from_conf(conf, str(former / "studies")), {})
    monkeypatch.setattr(time, "time", lambda: VOLUMES["session_time"] + 60)
    user = auth.read_session(VOLUMES["session"])
    assert user is not None
    assert (user.name, str(user.role)) == ("anna", "annotate")
    assert auth.read_session(VOLUMES["ended_session"]) is None
    monkeypatch.setattr(time, "time", lambda: VOLUMES["session_time"] + 13 * 3600)
    assert auth.read_session(VOLUMES["session"]) is None


# Models and trainings


def test_adapters_load_with_the_current_version_and_roll_back(former: Path):
    store = AdapterStore(former / "model" / "adapters")
    base = compute_base_digest(former / "model")
    served = store.pick_for("MR", base)
    assert served is not None
    assert served.full_name == "mr@2"
    assert [event["event"] for event in store.history("mr")] == ["added", "published", "added", "published"]
    pipeline = Engine(former / "model", device="cpu").load()
    for version in (1, 2):
        card = store.card("mr", version)
        branch, _ = build_networks(card, store.load(card, base), pipeline.branch, pipeline.unet, store.folder(card))
        assert sum(parameter.numel() for parameter in branch.parameters()) == sum(
            p.numel() for p in pipeline.branch.parameters()
        )
    assert store.rollback("mr") == 1
    assert store.rollback("mr") is None
    assert store.pick_for("MR", base) is None
    assert store.publish("mr", 2).full_name == "mr@2"


@pytest.mark.parametrize(("studies", "facts"), [("studies", VOLUMES), ("pictures", PICTURES)])
def test_the_state_of_trainings_is_read(former: Path, studies: str, facts: dict[str, Any]):
    runner = TrainingRunner(former / studies / ".progidiff" / "training", lambda options: {})
    assert includes([run.model_dump() for run in runner.history()], facts["runs"])
    assert runner.status().state == facts["runs"][0]["state"]
    for run in runner.history():
        TrainingOptions.from_dict(read_request(former, run.id, studies)["options"])


def read_request(former: Path, run_id: str, studies: str = "studies") -> dict[str, Any]:
    """The request of a run, with its files in the copy."""
    text = (former / studies / ".progidiff" / "training" / "runs" / run_id / "request.json").read_text(encoding="utf-8")
    assert THERE in text
    return dict(json.loads(text.replace(THERE, str(former))))


def repeat_training(
    former: Path, run: dict[str, Any], report: Callable[[dict[str, Any]], None], is_cancelled: Callable[[], bool]
) -> Any:
    """What the process of a training does with a request."""
    request = read_request(former, run["id"])
    options = TrainingOptions.from_dict(request["options"])
    names = (
        "steps",
        "learning_rate",
        "batch_size",
        "validate_every",
        "patience",
        "augmentation",
        "proposal_steps",
        "seed",
    )
    config = AdaptConfig(
        kind="lora",
        lora=LoraSettings(options.rank, 2.0 * options.rank, ("encoder", "query_head")),
        **{name: getattr(options, name) for name in names},
    )
    return run_adapt(
        from_json(request["cases"]),
        former / "model",
        options.name,
        former / "studies" / ".progidiff" / "training" / "work",
        config,
        cases=options.cases,
        modality="MR",
        device="cpu",
        is_cancelled=is_cancelled,
        report=report,
    )


def test_a_training_that_is_done_is_not_repeated(former: Path):
    done = next(run for run in VOLUMES["runs"] if run["version"] == "mr@2")
    stages: list[str] = []
    result = repeat_training(former, done, lambda entry: stages.append(entry["stage"]), lambda: False)
    assert result.card.full_name == "mr@2"
    assert set(stages) == {"prepare"}
    assert AdapterStore(former / "model" / "adapters").entry("mr").versions == (1, 2)


def test_a_training_that_was_stopped_goes_on_at_its_checkpoint(former: Path):
    import torch

    (checkpoint,) = (former / "studies" / ".progidiff" / "training" / "work").glob("mr-*/evidence/state.safetensors")
    header = json.loads(checkpoint.read_bytes()[8 : 8 + int.from_bytes(checkpoint.read_bytes()[:8], "little")])[
        "__metadata__"
    ]
    precision = json.loads(header["config"])["precision"]
    if pick_precision("auto", torch.device("cpu")) != precision:
        pytest.skip(
            f"The checkpoint is in {precision}; this processor trains in another precision and cannot continue it."
        )
    stages: list[str] = []
    with pytest.raises(CancelledError, match=f"at step {header['step']} of 5000"):
        repeat_training(
            former, VOLUMES["runs"][0], lambda entry: stages.append(entry["stage"]), lambda: "evidence" in stages
        )


# Pictures


def test_heads_load_predict_and_roll_back(former: Path):
    store = TextDiffStore(former / "textdiff")
    assert store.find("nuclei").full_name == "nuclei@2"
    picture = read_picture(former / "pictures" / "tissue_c.png")
    asked = PICTURES["asked"][0]
    for version in (1, 2):
        model = store.load_model(store.card("nuclei", version), "cpu")
        result = model.predict(picture, asked["sentence"], 2)
        assert result.mask.shape == (48, 40)
    drawn = [int((mask > 0).sum()) for mask in result.masks]
    assert drawn == pytest.approx(asked["structures"]["nuclei"]["proposals_pixels"], rel=0.01)
    assert store.rollback("nuclei") == 1
    assert store.rollback("nuclei") is None
    assert store.publish("nuclei", 2).full_name == "nuclei@2"


@pytest.mark.parametrize("number", range(len(PICTURES["asked"])))
def test_the_kept_draws_of_a_picture_are_found(former: Path, number: int):
    request = PICTURES["asked"][number]
    task = build_pictures(former)
    params = {**request["params"], "save_original": False}
    path = former / "pictures" / f"{request['image']}.png"
    file, answer = task({"image": str(path), "image_id": request["image"], "params": params})
    os.unlink(file)
    assert answer["cached"] is True
    assert answer["proposals"] == request["proposals"]
    assert includes(
        answer, {name: request[name] for name in ("structures", "label_names", "shown_pixels", "model", "sentence")}
    )


def test_the_history_of_pictures_is_read_and_undone(former: Path):
    history = open_history(former, "pictures")
    assert [event.kind for event in history.events()] == ["label", "label", "undo", "label"]
    assert history.verify() == []
    assert history.undo("tissue_b") is None
    assert set(history.annotated_images()) == {"tissue_a"}
