"""Results on disk."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.errors import StoreError
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.edits import Edit
from progidiff.proposals.keeper import DiskShelf, Question
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.store import MAX_STEERED, ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from support.proposals import make_key, make_proposals, make_request, make_volume


@pytest.fixture
def store(tmp_path) -> ProposalStore:
    return ProposalStore(tmp_path / "results")


def test_a_result_is_the_same_after_a_round_trip_and_a_restart(store):
    proposals = make_proposals()
    store.save(make_key(), proposals, "image")
    again = ProposalStore(store.root).load(make_key())
    assert again is not None
    np.testing.assert_array_equal(again.probabilities, proposals.probabilities)
    assert again.summary() == proposals.summary()
    volume = make_volume("sagittal")
    for shown in ("consensus", "best", 1, 4):
        np.testing.assert_array_equal(again.label_map(volume.grid, shown), proposals.label_map(volume.grid, shown))


def test_a_shorter_request_is_answered_from_a_longer_one_with_the_same_settings(store):
    proposals = make_proposals()
    queries = parse_prompt(" and ".join(proposals.structures))
    assert tuple(query.name for query in queries) == proposals.structures
    request, other = (make_request(" and ".join(proposals.structures), seed=seed) for seed in (0, 1))
    whole, other_seed = (asked.whole_key("image", "00", "toy@1") for asked in (request, other))
    store.save(request.key("image", "00", "toy@1"), proposals, "image", queries, whole)
    fresh = ProposalStore(store.root)  # what answers it survives a restart
    last = queries[-1:]
    part = fresh.find_part("image", last, whole)
    assert part is not None
    assert part.structures == (last[0].name,)
    np.testing.assert_array_equal(part.probabilities, proposals.probabilities[-1:])
    turned = fresh.find_part("image", queries[::-1], whole)
    assert turned is not None
    np.testing.assert_array_equal(turned.probabilities, proposals.probabilities[::-1])
    assert turned.summary()["structures"] == proposals.summary()["structures"]
    assert fresh.find_part("other", last, whole) is None
    assert fresh.find_part("image", last, other_seed) is None
    assert fresh.find_part("image", parse_prompt("aorta"), whole) is None
    assert fresh.find_part("image", [replace(last[0], text="another text")], whole) is None


def test_a_result_kept_before_texts_were_answers_no_shorter_request(store):
    store.save(make_key(), make_proposals(), "image")
    entry = store.root / make_key() / "entry.json"
    card = json.loads(entry.read_text(encoding="utf-8"))
    entry.write_text(
        json.dumps({name: value for name, value in card.items() if name not in ("whole", "texts")}), encoding="utf-8"
    )
    fresh = ProposalStore(store.root)
    assert fresh.find_part("image", parse_prompt("liver"), "") is None
    assert fresh.load(make_key()) is not None


def test_an_unknown_key_is_absent(store):
    assert store.load(make_key()) is None
    assert store.load("../../etc/passwd") is None
    assert store.latest("image") is None
    assert store.list() == []


def test_everything_that_a_result_depends_on_is_in_its_key():
    base = {
        "image_id": "image", "image_digest": "00", "queries": parse_prompt("liver"), "num_proposals": 4,
        "num_inference_steps": 4, "seed": 0,
        "guidance_scale": 1.0, "model_version": "toy@1", "adapter": "none", "clean_up": "off", "slices": None,
    }  # fmt: skip
    changes = {
        "image_id": "other", "image_digest": "01", "queries": parse_prompt("spleen"), "num_proposals": 5,
        "num_inference_steps": 2, "seed": 1,
        "guidance_scale": 2.0, "model_version": "toy@2", "adapter": "mr@1", "clean_up": "small", "slices": (3,),
    }  # fmt: skip

    def key(image_id: str, image_digest: str, model_version: str, **settings: Any) -> str:
        return ProposalRequest(**settings).key(image_id, image_digest, model_version)

    keys = {key(**base)} | {key(**{**base, name: value}) for name, value in changes.items()}
    assert len(keys) == len(changes) + 1


def test_results_kept_before_there_was_a_clean_up_are_still_found_without_one():
    assert (
        make_key() == "fc7a882fd6a44e72bb2586768bc09e9f7c50fa85ea8c08f2452eadd141dcb316"
    )  # as the version before made it


def test_the_order_of_structures_is_in_the_key():
    assert make_key(prompt="liver, spleen") != make_key(prompt="spleen, liver")


def test_the_latest_result_of_an_image_is_the_one_saved_last(store):
    for seed in range(3):
        store.save(make_key(seed), make_proposals(seed=seed), "image")
    store.save(make_key(9), make_proposals(), "other")
    latest = store.latest("image")
    assert latest is not None
    assert latest.key == make_key(2)
    assert latest.structures == ("liver", "spleen", "pancreas")
    assert [entry.key for entry in ProposalStore(store.root).list("image")] == [make_key(2), make_key(1), make_key(0)]
    assert len(store.list()) == 4


def test_saving_again_replaces(store):
    store.save(make_key(), make_proposals(seed=1), "image")
    newer = make_proposals(seed=2)
    store.save(make_key(), newer, "image")
    again = ProposalStore(store.root).load(make_key())
    assert again is not None
    np.testing.assert_array_equal(again.probabilities, newer.probabilities)
    assert [path.name for path in store.root.iterdir()] == [make_key()]


@pytest.mark.parametrize("name", ["probabilities.npz", "proposals.json"])
def test_a_damaged_result_is_absent_moved_aside_and_logged(store, caplog, name):
    store.save(make_key(), make_proposals(), "image")
    file = store.root / make_key() / name
    file.write_bytes(file.read_bytes()[:100])
    fresh = ProposalStore(store.root)
    assert fresh.load(make_key()) is None
    assert "damaged" in caplog.text
    assert fresh.list() == []
    assert list(store.root.glob(".damaged-*"))
    fresh.save(make_key(), make_proposals(), "image")
    assert fresh.load(make_key()) is not None


def test_a_damaged_entry_does_not_stop_the_list(store):
    store.save(make_key(0), make_proposals(), "image")
    store.save(make_key(1), make_proposals(), "image")
    (store.root / make_key(0) / "entry.json").write_text("{")
    assert [entry.key for entry in ProposalStore(store.root).list()] == [make_key(1)]


def test_a_pickle_in_the_place_of_an_array_is_not_executed(store, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    store.save(make_key(), make_proposals(), "image")
    np.savez(
        store.root / make_key() / "probabilities.npz",
        structure_0=np.array([Evil()], dtype=object),
        structure_1=np.array([Evil()], dtype=object),
    )
    assert ProposalStore(store.root).load(make_key()) is None
    assert not (tmp_path / "executed").exists()


def test_the_store_stays_under_its_limit_and_drops_what_was_not_used_for_longest(tmp_path):
    size = ProposalStore(tmp_path / "probe").save(make_key(), make_proposals(), "image").num_bytes
    store = ProposalStore(tmp_path / "results", max_bytes=int(2.5 * size))
    for seed in range(2):
        store.save(make_key(seed), make_proposals(), "image")
        os.utime(store.root / make_key(seed), (seed, seed))
    assert store.load(make_key(0)) is not None  # used again, so number 1 is the oldest
    store.save(make_key(2), make_proposals(), "image")
    assert {entry.key for entry in store.list()} == {make_key(0), make_key(2)}


def test_of_a_chain_of_edits_the_last_results_stay(store):
    base = make_request()
    store.save(base.key("image", "00", "toy@1"), make_proposals(), "image")
    keys = []
    for count in range(1, MAX_STEERED + 3):
        edits = tuple(Edit(kind="click", points=((place, 1, 1),)) for place in range(count))
        question = Question(base.model_copy(update={"edits": edits}), "image", "00", "toy@1")
        assert question.steered == base.key("image", "00", "toy@1")
        DiskShelf(store).keep(question, make_proposals())
        os.utime(store.root / question.key, (count, count))  # clocks are coarse
        keys.append(question.key)
    other = Question(base.model_copy(update={"seed": 5, "edits": edits[:1]}), "image", "00", "toy@1")
    DiskShelf(store).keep(other, make_proposals())  # another question has a chain of its own
    kept = {entry.key for entry in ProposalStore(store.root).list("image")}
    assert kept == {base.key("image", "00", "toy@1"), *keys[-MAX_STEERED:], other.key}


def test_a_result_larger_than_the_limit_is_kept_until_the_next_one(tmp_path):
    store = ProposalStore(tmp_path, max_bytes=1)
    store.save(make_key(0), make_proposals(), "image")
    assert store.load(make_key(0)) is not None
    store.save(make_key(1), make_proposals(), "image")
    assert [entry.key for entry in store.list()] == [make_key(1)]


def test_a_failed_write_leaves_nothing_behind_and_says_what_to_do(store, monkeypatch):
    def fail(self, folder):
        (Path(folder) / "probabilities.npz").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VolumeProposals, "to_files", fail)
    with pytest.raises(StoreError, match="Free some disk space"):
        store.save(make_key(), make_proposals(), "image")
    assert list(store.root.iterdir()) == []


def test_a_store_killed_while_writing_shows_only_whole_results(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); import progidiff.storage.atomic as atomic\n"
        "from progidiff.proposals.store import ProposalStore\n"
        "from support.proposals import make_key, make_proposals\n"
        "store = ProposalStore(sys.argv[1]); store.save(make_key(0), make_proposals(), 'image')\n"
        "atomic.flush = lambda path: os._exit(9)\n"
        "store.save(make_key(1), make_proposals(), 'image')\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[1])], check=False
    )
    assert finished.returncode == 9
    leftover = next(tmp_path.glob(".writing-*"))
    os.utime(leftover, (0, 0))
    store = ProposalStore(tmp_path)
    assert [entry.key for entry in store.list()] == [make_key(0)]
    assert not leftover.exists()


def test_a_result_removed_by_another_process_is_absent(store):
    store.save(make_key(), make_proposals(), "image")
    shutil.rmtree(store.root / make_key())
    assert store.load(make_key()) is None
    assert store.list() == []


def test_the_last_results_stay_open(store):
    store.save(make_key(), make_proposals(), "image")
    assert store.load(make_key()) is store.load(make_key())
    for seed in (1, 2):
        store.save(make_key(seed), replace(make_proposals(), seed=seed), "image")
    reopened = store.load(make_key())
    assert reopened is not None
    assert reopened.summary() == make_proposals().summary()


def test_a_key_of_another_kind_is_refused(store):
    with pytest.raises(StoreError, match="make one with ProposalRequest.key"):
        store.save("../escape", make_proposals(), "image")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        ProposalStore(tmp_path / "file" / "results")
