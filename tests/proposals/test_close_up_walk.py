"""The engine with a close-up: one volume, windows by evidence, proposals on twice as many pixels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from progidiff.errors import CancelledError, GeometryError, RequestError
from progidiff.images.close_up import WindowRules, plan_windows
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.model.calibration import Calibration
from progidiff.prompts.parser import Query
from progidiff.proposals.close_up_walk import CloseUpWalk, EvidenceShelf
from progidiff.proposals.close_ups import blend
from progidiff.proposals.edits import Edit
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.testing import add_tiny_close_up

LIVER, SPLEEN, AORTA = (Query(name, name) for name in ("liver", "spleen", "aorta"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("close") / "model"
    shutil.copytree(tiny_model, folder)
    return add_tiny_close_up(folder)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Volume:
    return load_volume(phantom_writer(tmp_path_factory.mktemp("close") / "phantom.nii.gz"), modality="CT")


@pytest.fixture
def engine(model: Path) -> Engine:
    return Engine(model, device="cpu", dtype="fp32")


def differ(first: VolumeProposals, second: VolumeProposals) -> int:
    return int(np.abs(first.probabilities.astype(int) - second.probabilities.astype(int)).max())


def test_proposals_lie_on_twice_as_many_pixels_and_come_back_on_the_grid_of_the_input(engine: Engine, volume: Volume):
    result = engine.propose(ProposalRequest(queries=[LIVER, AORTA], num_proposals=3, seed=7), volume)
    assert result.probabilities.shape == (2, 3, 8, 64, 128)
    assert result.probabilities.any()
    assert result.num_inference_steps == 1
    assert result.mask(volume.grid, "liver", "consensus").shape == volume.array.shape


def test_a_second_prompt_looks_at_no_slice_again(engine: Engine, volume: Volume):
    calls: list[int] = []
    engine.load().branch.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), volume)
    engine.propose(ProposalRequest(queries=[SPLEEN, AORTA], num_proposals=2), volume)
    assert sum(calls) == 8
    engine.propose(ProposalRequest(queries=[Query("kidney stone", "kidney stone")], num_proposals=2), volume)
    assert sum(calls) == 16, "words that nobody looked for yet need another look"


def test_a_name_that_the_drawing_network_never_saw_says_nothing_to_it(engine: Engine, volume: Volume):
    told: list[torch.Tensor] = []
    engine.load()
    assert engine._close_up is not None
    engine._close_up.pipeline.network.condition.register_forward_hook(lambda _, inputs, __: told.append(inputs[0]))

    def read_text(name: str) -> torch.Tensor:
        told.clear()
        engine.propose(ProposalRequest(queries=[Query(name, name)], num_proposals=2), volume)
        return torch.cat(told)[:, : engine.load().branch.config.text_features]

    assert read_text("liver").any()
    unknown = read_text("kidney stone")
    assert len(unknown)
    assert not unknown.any()


def test_proposal_k_does_not_depend_on_k_or_on_what_else_is_asked(engine: Engine, volume: Volume):
    one = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, clean_up="off"), volume)
    more = engine.propose(ProposalRequest(queries=[AORTA, LIVER], num_proposals=4, clean_up="off"), volume)
    assert np.abs(one.probabilities[0].astype(int) - more.probabilities[1, :2].astype(int)).max() <= 1


def test_a_slice_alone_is_what_it_is_in_the_volume(engine: Engine, volume: Volume):
    whole = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, clean_up="off"), volume)
    part = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, slices=(3,), clean_up="off"), volume)
    assert np.abs(whole.probabilities[:, :, 3].astype(int) - part.probabilities[:, :, 3].astype(int)).max() <= 1
    assert not part.probabilities[:, :, [0, 1, 2, 4, 5, 6, 7]].any()


def test_the_same_request_gives_the_same_proposals_and_another_seed_others(engine: Engine, model: Path, volume: Volume):
    request = ProposalRequest(queries=[LIVER], num_proposals=2, seed=3)
    first = engine.propose(request, volume)
    assert differ(first, Engine(model, device="cpu", dtype="fp32").propose(request, volume)) == 0
    assert differ(first, engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, seed=4), volume)) > 0


def test_it_can_be_cancelled_while_it_looks(engine: Engine, volume: Volume):
    with pytest.raises(CancelledError):
        engine.propose(ProposalRequest(queries=[LIVER]), volume, Work(is_cancelled=lambda: True))


def test_progress_reaches_the_end(engine: Engine, volume: Volume):
    seen: list[tuple[int, int]] = []
    engine.propose(
        ProposalRequest(queries=[LIVER]), volume, Work(on_progress=lambda done, total: seen.append((done, total)))
    )
    assert seen[-1] == (8, 8)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_one_slice_is_a_volume(engine: Engine, phantom_writer: Callable[..., Path], tmp_path: Path):
    flat = load_volume(phantom_writer(tmp_path / "flat.nii.gz", shape=(40, 30, 1)), modality="CT")
    result = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), flat)
    assert result.probabilities.shape[2] == 1


def test_two_windows_that_overlap_show_no_seam(engine: Engine, volume: Volume):
    result = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), volume)
    grid = result.grid
    found = np.zeros((8, grid.height, grid.width), bool)
    found[2:5, 8:16, 8:16] = True
    found[2:5, 20:26, 80:120] = True
    rules = WindowRules(size=32, large_size=32, apart_mm=0.0, margin_mm=60.0)
    windows = plan_windows(found, grid, rules)
    assert len(windows) == 2
    flat = [(window, torch.full((1, window.size, window.size), 0.7)) for window in windows]
    (_, _), maps = blend(flat, lambda window, values: window.restore_to(values, grid))
    covered = maps[maps > 0]
    assert covered.min() > 0.699
    assert covered.max() < 0.701


def test_the_shelf_forgets_the_oldest_volume_first():
    shelf = EvidenceShelf(max_bytes=250)
    for name in ("a", "b", "c"):
        shelf.put(("", name), {"liver": np.zeros(100, np.uint8)})
    assert [bool(shelf.get(("", name))) for name in ("a", "b", "c")] == [False, True, True]
    shelf.clear()
    assert not shelf.get(("", "c"))


def edit(*point: int, positive: bool = True) -> Edit:
    return Edit(kind="click", points=(point,), positive=positive)  # type: ignore[arg-type]


def test_clicked_voxels_are_kept_exactly_in_every_proposal_and_after_the_disk(
    engine: Engine, volume: Volume, tmp_path: Path
):
    edits = (edit(3, 4, 2), edit(30, 20, 4), edit(31, 20, 4, positive=False), edit(34, 25, 4, positive=False))
    for clean_up in ("off", "largest"):
        result = engine.propose(
            ProposalRequest(queries=[LIVER], num_proposals=3, edits=edits, clean_up=clean_up), volume
        )
        result.to_files(tmp_path / clean_up)
        for proposals in (result, VolumeProposals.from_files(tmp_path / clean_up)):
            for shown in ("consensus", "1", "2", "3"):
                mask = proposals.mask(volume.grid, "liver", shown)
                assert [mask[one.points[0]] for one in edits] == [1, 1, 0, 0]


def test_edits_change_what_is_drawn_and_only_near_where_they_are(engine: Engine, volume: Volume):
    plain = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, clean_up="off"), volume)
    request = ProposalRequest(queries=[LIVER], num_proposals=2, edits=(edit(30, 20, 4),), clean_up="off")
    edited = engine.propose(request, volume)
    assert differ(plain, edited) > 0
    changed = (plain.probabilities != edited.probabilities).any(axis=(0, 1, 3, 4))
    assert changed.nonzero()[0].tolist() == [volume.grid.locate((30, 20, 4))[0]]


def test_the_slice_that_was_drawn_on_is_shown_before_anything_else_and_changes_no_bit_of_the_result(
    engine: Engine, model: Path, volume: Volume
):
    request = ProposalRequest(queries=[LIVER], num_proposals=2, edits=(edit(30, 20, 4),), clean_up="off")
    z = volume.grid.locate((30, 20, 4))[0]
    looked: list[int] = []
    engine.load().branch.encoder.register_forward_hook(lambda _, inputs, __: looked.append(len(inputs[0])))
    shown: list[tuple[VolumeProposals, int, int]] = []
    told: list[int] = []
    work = Work(
        first=z,
        on_preview=lambda proposals, at: shown.append((proposals, at, sum(looked))),
        on_slices=lambda _, slices: told.extend([len(shown), *slices]),
    )

    result = engine.propose(request, volume, work)
    again = engine.propose(request, volume, work)

    (near, at, slices), (known, _, more) = shown
    assert at == z
    assert slices <= 3, "what is not found yet is looked for around the slice alone"
    assert more == sum(looked)
    assert told[0] == 1
    for preview in (near, known):
        assert preview.slice_masks("liver", z)[:, *volume.grid.locate((30, 20, 4))[1:]].all()
        assert preview.probabilities.any(axis=(0, 1, 3, 4)).nonzero()[0].tolist() == [z]
    assert np.abs(known.probabilities[:, :, z].astype(int) - result.probabilities[:, :, z].astype(int)).max() <= 1
    assert differ(result, again) == 0
    assert differ(result, Engine(model, device="cpu", dtype="fp32").propose(request, volume)) == 0


def test_a_search_that_was_cancelled_goes_on_where_it_was(
    engine: Engine, model: Path, phantom_writer: Callable[..., Path], tmp_path: Path
):
    tall = load_volume(phantom_writer(tmp_path / "tall.nii.gz", shape=(40, 30, 40)), modality="CT")
    request, looked = ProposalRequest(queries=[LIVER], num_proposals=1), list[int]()
    engine.load().branch.encoder.register_forward_hook(lambda _, inputs, __: looked.append(len(inputs[0])))
    with pytest.raises(CancelledError):
        engine.propose(request, tall, Work(is_cancelled=lambda: sum(looked) >= 16))
    assert sum(looked) == 16
    result = engine.propose(request, tall)
    assert sum(looked) == 40
    assert differ(result, Engine(model, device="cpu", dtype="fp32").propose(request, tall)) == 0


def test_edits_are_part_of_the_key():
    plain = ProposalRequest(queries=[LIVER]).settle(1, 1.0, "")
    clicked = ProposalRequest(queries=[LIVER], edits=(edit(1, 2, 3),)).settle(1, 1.0, "")
    against = ProposalRequest(queries=[LIVER], edits=(edit(1, 2, 3, positive=False),)).settle(1, 1.0, "")
    assert len({one.key("a", "00", "m@1") for one in (plain, clicked, against)}) == 3


def test_what_has_no_name_is_drawn_around_its_clicks(engine: Engine, volume: Volume):
    request = ProposalRequest(queries=[Query("cyst", "", known=False)], num_proposals=2, edits=(edit(30, 20, 4),))
    result = engine.propose(request, volume)
    assert result.mask(volume.grid, "cyst")[30, 20, 4] == 1
    nothing = engine.propose(ProposalRequest(queries=[Query("cyst", "", known=False)], num_proposals=2), volume)
    assert not nothing.probabilities.any()


def test_a_click_outside_of_the_image_is_refused(engine: Engine, volume: Volume):
    with pytest.raises(GeometryError, match="outside"):
        engine.propose(ProposalRequest(queries=[LIVER], edits=(edit(300, 0, 0),)), volume)


def test_some_of_the_structures_are_taken_with_their_clicks(engine: Engine, volume: Volume):
    whole = engine.propose(ProposalRequest(queries=[LIVER, AORTA], num_proposals=2, edits=(edit(3, 4, 2),)), volume)
    part = whole.take(["aorta"])
    assert part.structures == ("aorta",)
    assert (part.mask(volume.grid, "aorta", "2") == whole.mask(volume.grid, "aorta", "2")).all()
    assert set(part.pins) == {"aorta"}
    assert part.mask(volume.grid, "aorta")[3, 4, 2] == 1


def test_agreement_becomes_a_probability_where_the_card_says_how(
    tiny_model: Path, tmp_path: Path, volume: Volume, engine: Engine
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    add_tiny_close_up(folder, calibration=Calibration((0.0, 0.5, 1.0), (0.1, 0.3, 0.8)))
    calibrated = Engine(folder, device="cpu", dtype="fp32")
    request = ProposalRequest(queries=[LIVER], num_proposals=4, seed=7)

    result = calibrated.propose(request, volume)
    agreement, probability = result.agreement(volume.grid), result.probability(volume.grid)

    assert calibrated.info()["is_calibrated"]
    assert len(np.unique(agreement)) > 2
    for share, expected in ((0.0, 0.0), (0.25, 0.2), (0.5, 0.3), (0.75, 0.55), (1.0, 0.8)):
        assert np.allclose(probability[agreement == share], expected)
    result.to_files(tmp_path / "kept")
    assert VolumeProposals.from_files(tmp_path / "kept").calibration == result.calibration
    assert result.summary()["calibration"]["probabilities"] == [0.1, 0.3, 0.8]
    assert "calibration" not in engine.propose(request, volume).summary()


def test_agreement_that_nobody_measured_is_no_probability(engine: Engine, volume: Volume):
    result = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), volume)
    assert not engine.info()["is_calibrated"]
    with pytest.raises(RequestError, match="show agreement instead"):
        result.probability(volume.grid)


def test_structures_drawn_in_joint_batches_are_those_drawn_one_by_one(
    engine: Engine, volume: Volume, monkeypatch: pytest.MonkeyPatch
):
    edits = (edit(14, 12, 4).model_copy(update={"structure": "liver"}),)
    request = ProposalRequest(queries=[LIVER, SPLEEN, AORTA], num_proposals=3, num_inference_steps=2, edits=edits)
    apart = engine.propose(request, volume)
    calls: list[int] = []
    engine.load()
    assert engine._close_up is not None
    engine._close_up.pipeline.network.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    engine.propose(request, volume)
    alone, original = len(calls), CloseUpWalk.__init__

    def join(self: CloseUpWalk, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        self._draws_together = True  # As on a device.

    monkeypatch.setattr(CloseUpWalk, "__init__", join)
    calls.clear()
    together = engine.propose(request, volume)
    assert together.probabilities.any()
    assert differ(apart, together) <= 1
    assert 0 < len(calls) < alone
