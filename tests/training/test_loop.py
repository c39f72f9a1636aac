"""The loop: resuming is rerunning, refusals keep the last checkpoint, averaged weights come back."""

from __future__ import annotations

import contextlib
import json
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from progidiff.errors import CancelledError, ModelError, RequestError, StoreError
from progidiff.training import loop
from progidiff.training.device_batches import move
from progidiff.training.loop import AveragedWeights, LoopConfig, compute_learning_rate, derive_seed, run_loop
from progidiff.training.objective import Objective
from progidiff.training.processes import Team

CONFIG = LoopConfig(steps=12, learning_rate=0.05, warmup=3, precision="fp32", checkpoint_every=4, ema_decay=0.9, seed=7)

Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


def build_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))


def build_loss(module: nn.Module) -> Loss:
    """Draws from the generator and, through dropout, from torch's global state."""

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        inputs = torch.randn(16, 4, generator=generator)
        error = (module(inputs)[:, 0] - inputs.sum(1)).square().mean()
        return error, {"error": float(error.detach())}

    return compute_loss


def train(folder: Path, config: LoopConfig = CONFIG, **options: object) -> nn.Module:
    module = build_module()
    run_loop({"net": module}, build_loss(module), config, folder, **options)  # type: ignore[arg-type]
    return module


def read_metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "state.safetensors", "pt") as file:
        return file.metadata()


def read_step(folder: Path) -> int:
    return int(read_metadata(folder)["step"])


def read_board(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_two_runs_with_the_same_seed_are_equal_bit_for_bit(tmp_path: Path):
    assert_equal(train(tmp_path / "a"), train(tmp_path / "b"))


def test_another_seed_gives_other_weights(tmp_path: Path):
    first, second = train(tmp_path / "a"), train(tmp_path / "b", replace(CONFIG, seed=8))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


@pytest.mark.parametrize("stop", [0, 4, 5, 11])
def test_cancelling_leaves_a_checkpoint_from_which_the_run_ends_as_if_it_had_not_stopped(tmp_path: Path, stop: int):
    asked = iter(range(100))
    with pytest.raises(CancelledError, match=rf"at step {stop} of 12; start it again with the same folder"):
        train(tmp_path / "stopped", is_cancelled=lambda: next(asked) >= stop)
    assert read_step(tmp_path / "stopped") == stop
    assert_equal(train(tmp_path / "stopped"), train(tmp_path / "whole"))


def test_a_run_that_was_killed_between_checkpoints_ends_as_if_it_had_not_been(tmp_path: Path):
    module = build_module()
    loss = build_loss(module)

    def killed(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if step == 6:
            raise KeyboardInterrupt
        return loss(step, generator)

    with pytest.raises(KeyboardInterrupt):
        run_loop({"net": module}, killed, CONFIG, tmp_path / "killed")
    assert read_step(tmp_path / "killed") == 4
    assert_equal(train(tmp_path / "killed"), train(tmp_path / "whole"))


def test_a_validation_that_fails_leaves_the_weights_that_are_trained_in_the_networks(tmp_path: Path):
    module, other = build_module(), build_module()
    seen: list[Tensor] = []

    def fail() -> dict[str, float]:
        seen.append(next(module.parameters()).detach().clone())
        raise RequestError("The validation failed.")

    with pytest.raises(RequestError, match="The validation failed"):
        run_loop({"net": module}, build_loss(module), replace(CONFIG, validate_every=4), tmp_path / "failed", fail)
    asked = iter(range(100))
    with pytest.raises(CancelledError, match="at step 4"):
        run_loop({"net": other}, build_loss(other), CONFIG, tmp_path / "other", is_cancelled=lambda: next(asked) >= 4)
    assert_equal(module, other)
    assert not torch.equal(seen[0], next(other.parameters()))  # The validation saw the average.


def test_a_finished_run_is_loaded_and_not_repeated(tmp_path: Path):
    first = train(tmp_path)
    module = build_module()
    run_loop({"net": module}, lambda step, generator: pytest.fail("must not train again"), CONFIG, tmp_path)
    assert_equal(first, module)
    assert not module.training


def test_validations_of_before_a_stop_are_in_the_history_of_the_resumed_run(tmp_path: Path):
    config = replace(CONFIG, validate_every=4)
    calls = iter(range(100))

    def validate() -> dict[str, float]:
        return {"dice": 0.5}

    module = build_module()
    with pytest.raises(CancelledError, match="start it again"):
        run_loop({"net": module}, build_loss(module), config, tmp_path, validate, is_cancelled=lambda: next(calls) >= 9)
    module = build_module()
    history = run_loop({"net": module}, build_loss(module), config, tmp_path, validate)
    assert [h["step"] for h in history] == [4, 8, 12]


def test_validation_sees_the_averaged_weights_in_eval_mode_and_does_not_disturb_training(tmp_path: Path):
    module, seen = build_module(), []

    def validate() -> dict[str, float]:
        assert not module.training
        seen.append({n: p.detach().clone() for n, p in module.named_parameters()})
        return {}

    run_loop({"net": module}, build_loss(module), replace(CONFIG, validate_every=6), tmp_path / "a", validate)
    assert_equal(module, train(tmp_path / "b", replace(CONFIG, validate_every=6)))
    assert all(torch.equal(seen[-1][n], p) for n, p in module.named_parameters())


def test_the_averaged_weights_are_returned(tmp_path: Path):
    live: list[Tensor] = []
    module = nn.Linear(1, 1, bias=False)
    start = module.weight.detach().clone()

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        live.append(module.weight.detach().clone())
        return module.weight.sum(), {}

    run_loop({"net": module}, compute_loss, CONFIG, tmp_path)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        live.append(file.get_tensor("live.net.weight"))
    average = start
    for step, weight in enumerate(live[1:]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(module.weight.detach(), average)
    assert not torch.equal(module.weight, live[-1])


def test_swapping_averaged_and_live_weights_twice_changes_nothing():
    module = build_module()
    parameters = {f"net.{n}": p for n, p in module.named_parameters()}
    average = AveragedWeights({"net": module}, 0.9)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    average.swap(parameters)
    assert all(torch.equal(p, before[n] - 1) or torch.allclose(p, before[n] - 1) for n, p in parameters.items())
    average.swap(parameters)
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())


def test_other_settings_are_refused_by_name(tmp_path: Path):
    train(tmp_path)
    with pytest.raises(
        RequestError, match=r"other settings \(learning_rate, seed differ\); use another folder, or the same settings"
    ):
        train(tmp_path, replace(CONFIG, learning_rate=0.1, seed=1))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path):
    train(tmp_path)
    module = nn.Linear(3, 3)
    with pytest.raises(RequestError, match=r"holds a run of another network \(net\.0\.bias does not fit\)"):
        run_loop({"net": module}, lambda step, generator: (module.weight.sum(), {}), CONFIG, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    train(tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"state\.safetensors' is damaged .*remove it"):
        train(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, value: float):
    module = build_module()
    loss = build_loss(module)

    def breaks(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        error, figures = loss(step, generator)
        return (error * value if step == 6 else error), figures

    with pytest.raises(ModelError, match=rf"The loss became {value} at step 6; .*The last checkpoint is kept in"):
        run_loop({"net": module}, breaks, CONFIG, tmp_path)
    assert read_step(tmp_path) == 4


def test_gradients_that_are_not_finite_stop_the_run_before_they_reach_the_weights(tmp_path: Path):
    module = build_module()
    loss = build_loss(module)

    def breaks(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        error, figures = loss(step, generator)
        # 0 * inf: the loss is finite, its gradient is not.
        return (error + (0 * error).sqrt() if step == 7 else error), figures

    with pytest.raises(ModelError, match=r"The gradients became nan at step 7; .*The last checkpoint is kept in"):
        run_loop({"net": module}, breaks, CONFIG, tmp_path)
    assert read_step(tmp_path) == 4
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_log_and_report_agree_and_are_json(tmp_path: Path):
    told: list[dict[str, object]] = []
    train(tmp_path, report=told.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == told
    assert lines[-1]["step"] == 12
    assert {"loss", "norm", "error", "rate", "seconds"} <= set(lines[-1])


def test_frozen_parameters_are_neither_trained_nor_stored(tmp_path: Path):
    module = build_module()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    run_loop({"net": module}, build_loss(module), CONFIG, tmp_path)
    assert torch.equal(module[0].weight, before)
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert not [n for n in file.keys() if ".net.0." in n]  # noqa: SIM118 (safe_open is no mapping)


def test_no_temporary_file_is_left(tmp_path: Path):
    train(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "state.safetensors", "tensorboard"]


def test_the_rate_warms_up_and_falls_to_its_final_share():
    config = LoopConfig(steps=100, learning_rate=1.0, warmup=10, final_share=0.1)
    rates = [compute_learning_rate(s, config) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_every_step_and_stream_has_its_own_seed():
    seeds = [derive_seed(r, s, n) for r in range(3) for s in range(50) for n in ("", "global")]
    assert len(set(seeds)) == 300
    assert all(0 <= s < 2**63 for s in seeds)


def test_the_first_micro_batch_of_a_step_has_the_seed_it_had_when_there_was_one():
    assert derive_seed(7, 3) == 4105813266559527971
    assert derive_seed(7, 3, "global") == derive_seed(7, 3, "global", 0)
    assert len({derive_seed(7, 3, stream, micro) for stream in ("", "global") for micro in range(50)}) == 100


def test_gradients_of_micro_batches_are_averaged(tmp_path: Path):
    accumulated = train(tmp_path / "a", replace(CONFIG, accumulate=3))
    module = build_module()
    loss = build_loss(module)

    def compute_all(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        total = torch.zeros(())
        for micro in range(3):
            torch.manual_seed(derive_seed(CONFIG.seed, step, "global", micro))
            total = (
                total + loss(step, torch.Generator().manual_seed(derive_seed(CONFIG.seed, step, micro=micro)))[0] / 3
            )
        return total, {}

    run_loop({"net": module}, compute_all, CONFIG, tmp_path / "b")
    for name, tensor in accumulated.state_dict().items():
        torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-5, atol=1e-6)
    entry = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])
    assert entry["loss"] == pytest.approx(
        json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[-1])["loss"], rel=1e-4
    )


def test_the_networks_run_in_the_precision_that_was_asked_for(tmp_path: Path):
    seen = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        module = build_module()

        def compute_loss(
            step: int, generator: torch.Generator, module: nn.Module = module, precision: str = precision
        ) -> Any:
            answer = module(torch.randn(16, 4, generator=generator))
            seen[precision] = answer.dtype
            return answer.float().square().mean(), {}

        run_loop({"net": module}, compute_loss, replace(CONFIG, precision=precision), tmp_path / precision)  # type: ignore[arg-type]
        assert seen[precision] == dtype
        assert all(p.dtype == torch.float32 for p in module.parameters())


def test_a_run_in_fp16_learns_what_one_in_fp32_does(tmp_path: Path):
    errors = {}
    for precision in ("fp16", "fp32"):
        told: list[dict[str, Any]] = []
        train(tmp_path / precision, replace(CONFIG, steps=80, precision=precision, log_every=1), report=told.append)
        errors[precision] = [entry["error"] for entry in told]
    assert errors["fp16"][-1] < 0.5 * errors["fp16"][0]
    assert errors["fp16"][-1] == pytest.approx(errors["fp32"][-1], rel=0.1)


def test_gradients_that_overflow_in_fp16_leave_a_step_out_and_scale_the_next_less(tmp_path: Path):
    config = replace(CONFIG, precision="fp16")
    train(tmp_path / "usual", config)
    module = build_module()
    loss = build_loss(module)
    live: list[Tensor] = []

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        live.append(module[0].weight.detach().clone())
        error, figures = loss(step, generator)
        return (error * 1e35 if step == 6 else error), figures

    run_loop({"net": module}, compute_loss, config, tmp_path / "overflowing")
    assert torch.equal(live[7], live[6])
    assert not torch.equal(live[8], live[7])
    assert all(torch.isfinite(p).all() for p in module.parameters())
    scales = [json.loads(read_metadata(tmp_path / name)["scaler"])["scale"] for name in ("usual", "overflowing")]
    assert scales[1] == scales[0] / 2


def test_gradients_that_overflow_at_every_scale_end_a_run_in_fp16(tmp_path: Path):
    module = build_module()
    loss = build_loss(module)
    config = replace(CONFIG, precision="fp16", steps=40)
    with pytest.raises(
        ModelError, match=r"The gradients became (inf|nan) at step 16; lower the learning rate or use fp32"
    ):
        run_loop(
            {"net": module},
            lambda step, generator: (loss(step, generator)[0] + (0 * module[0].weight.sum()).sqrt(), {}),
            config,
            tmp_path,
        )


def test_a_resumed_run_in_fp16_ends_as_if_it_had_not_stopped(tmp_path: Path):
    config = replace(CONFIG, precision="fp16")
    asked = iter(range(100))
    with pytest.raises(CancelledError, match="step 5 of 12"):
        train(tmp_path / "stopped", config, is_cancelled=lambda: next(asked) >= 5)
    assert_equal(train(tmp_path / "stopped", config), train(tmp_path / "whole", config))


def test_every_entry_says_how_far_the_run_is_and_how_long_it_will_take(tmp_path: Path):
    told: list[dict[str, Any]] = []
    train(tmp_path, replace(CONFIG, log_every=4), report=told.append)
    assert [(e["step"], e["total"]) for e in told] == [(4, 12), (8, 12), (12, 12)]
    assert told[-1]["eta_seconds"] == 0
    assert all(0 <= e["eta_seconds"] < 60 for e in told)


def test_curves_and_pictures_are_written_for_tensorboard(tmp_path: Path):
    module = build_module()
    config = replace(CONFIG, validate_every=6, log_every=4)
    picture = np.zeros((6, 9, 3), np.uint8)
    run_loop(
        {"net": module}, build_loss(module), config, tmp_path, lambda: {"consensus": 0.25},
        draw=lambda: {"slices/one 3": picture}
    )  # fmt: skip
    board = read_board(tmp_path)
    assert [e.step for e in board.Scalars("training/loss")] == [4, 8, 12]
    assert board.Scalars("training/rate")[-1].value == pytest.approx(compute_learning_rate(11, config))
    assert [(e.step, e.value) for e in board.Scalars("validation/consensus")] == [(6, 0.25), (12, 0.25)]
    shown = board.Images("slices/one 3")
    assert [(e.step, e.height, e.width) for e in shown] == [(6, 6, 9), (12, 6, 9)]


def test_curves_of_a_killed_run_go_on_where_it_resumed(tmp_path: Path):
    module = build_module()
    loss = build_loss(module)

    def killed(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if step == 7:
            raise KeyboardInterrupt
        return loss(step, generator)

    config = replace(CONFIG, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        run_loop({"net": module}, killed, config, tmp_path)
    train(tmp_path, config)
    assert [e.step for e in read_board(tmp_path).Scalars("training/loss")] == list(range(1, 13))


def test_without_tensorboard_no_picture_is_drawn(tmp_path: Path):
    module = build_module()
    config = replace(CONFIG, validate_every=6, tensorboard=False)
    run_loop(
        {"net": module},
        build_loss(module),
        config,
        tmp_path,
        lambda: {},
        draw=lambda: pytest.fail("nobody would see it"),
    )
    assert not (tmp_path / "tensorboard").exists()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_from_it(tmp_path: Path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, 1))

    module = build()
    loss = build_loss(module)
    with contextlib.ExitStack() as stack:

        def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            if step == 5:
                stack.enter_context(file_size_limit(100_000))
            return loss(step, generator)

        with pytest.raises(
            StoreError,
            match=r"checkpoint of step 8 cannot be written .* Free some disk space there\. The checkpoint before",
        ):
            run_loop({"net": module}, compute_loss, CONFIG, tmp_path / "full")
    assert read_step(tmp_path / "full") == 4
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["state.safetensors", "tensorboard"]
    resumed, whole = build(), build()
    run_loop({"net": resumed}, build_loss(resumed), CONFIG, tmp_path / "full")
    run_loop({"net": whole}, build_loss(whole), CONFIG, tmp_path / "whole")
    assert_equal(resumed, whole)


def test_a_log_that_cannot_be_written_is_an_error_with_a_cure(tmp_path: Path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"log\.jsonl' cannot be written .*continues at its last checkpoint"):
        train(tmp_path)


def test_curves_that_cannot_be_written_do_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    assert_equal(train(tmp_path), train(tmp_path.parent / "whole"))
    assert "the training goes on without them" in caplog.text


def test_a_checkpoint_of_before_a_setting_existed_is_resumed(tmp_path: Path):
    asked = iter(range(100))
    with pytest.raises(CancelledError, match="step 5"):
        train(tmp_path / "old", is_cancelled=lambda: next(asked) >= 5)
    path = tmp_path / "old" / "state.safetensors"
    metadata, tensors = read_metadata(tmp_path / "old"), load_file(path)
    config = {k: v for k, v in json.loads(metadata["config"]).items() if k != "accumulate"}
    save_file(
        tensors,
        path,
        {
            "step": metadata["step"],
            "history": metadata["history"],
            "config": json.dumps({**config, "checkpoint_every": 4}),
        },
    )
    assert_equal(train(tmp_path / "old"), train(tmp_path / "whole"))


def test_what_changes_no_weight_may_differ_when_a_run_is_resumed(tmp_path: Path):
    asked = iter(range(100))
    with pytest.raises(CancelledError, match="step 5"):
        train(tmp_path / "a", is_cancelled=lambda: next(asked) >= 5)
    changed = replace(CONFIG, checkpoint_every=1, log_every=1, tensorboard=False)
    assert_equal(train(tmp_path / "a", changed), train(tmp_path / "b"))


def test_a_run_that_depends_on_something_else_is_refused_by_name(tmp_path: Path):
    train(tmp_path, settings={"losses": {"dice": 1.0, "mask": 0.3}, "data": {"one": "abc"}})
    with pytest.raises(RequestError, match=r"other settings \(data.two, losses.mask differ\)"):
        train(tmp_path, settings={"losses": {"dice": 1.0, "mask": 0.4}, "data": {"one": "abc", "two": "def"}})
    train(tmp_path, settings={"losses": {"mask": 0.3, "dice": 1.0}, "data": {"one": "abc"}})


def test_a_run_that_would_train_nothing_is_refused(tmp_path: Path):
    module = build_module().requires_grad_(False)
    with pytest.raises(RequestError, match="Nothing would be trained"):
        run_loop({"net": module}, build_loss(module), CONFIG, tmp_path)


class Drawn(Objective):
    """The toy loss in two parts."""

    def __init__(self, module: nn.Module, break_at: int | None = None) -> None:
        self.module, self.break_at, self.threads = module, break_at, set[str]()

    def draw(self, generator: torch.Generator) -> Tensor:
        self.threads.add(threading.current_thread().name)
        return torch.randn(16, 4, generator=generator)

    def compute(self, drawn: Tensor, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.module(drawn)[:, 0] - drawn.sum(1)).square().mean()
        if step == self.break_at:
            error = error * float("nan")
        return error, {"error": error.detach()}


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop as on a device that computes while the CPU goes on; the fused optimizer works on CPUs too."""
    monkeypatch.setattr(loop, "is_asynchronous", lambda device: True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("asynchronous")
def test_drawing_ahead_and_looking_seldom_changes_nothing_but_rounding(tmp_path: Path):
    module = build_module()
    objective = Drawn(module)
    run_loop({"net": module}, objective, replace(CONFIG, log_every=5), tmp_path / "ahead")
    assert objective.threads == {"prefetch"}
    other = build_module()
    with pytest.MonkeyPatch.context() as usual:
        usual.setattr(loop, "is_asynchronous", lambda device: False)
        run_loop({"net": other}, build_loss(other), replace(CONFIG, log_every=5), tmp_path / "usual")
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
    assert [entry["step"] for entry in read_log(tmp_path / "ahead")] == [5, 10, 12]
    assert {"loss", "norm", "error"} < set(read_log(tmp_path / "ahead")[0])


@pytest.mark.usefixtures("asynchronous")
def test_a_loss_that_breaks_between_two_looks_changes_no_weight_and_names_its_step(tmp_path: Path):
    module = build_module()
    config = replace(CONFIG, log_every=5, checkpoint_every=100)
    with pytest.raises(ModelError, match=r"The loss became nan at step 6; lower the learning rate or use fp32"):
        run_loop({"net": module}, Drawn(module, break_at=6), config, tmp_path)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.usefixtures("asynchronous")
def test_a_run_that_looks_seldom_is_stopped_and_continued(tmp_path: Path):
    module, whole = build_module(), build_module()
    asked = iter(range(100))
    with pytest.raises(CancelledError, match="at step 7"):
        run_loop({"net": module}, Drawn(module), CONFIG, tmp_path / "a", is_cancelled=lambda: next(asked) >= 7)
    run_loop({"net": module}, Drawn(module), CONFIG, tmp_path / "a")
    run_loop({"net": whole}, Drawn(whole), CONFIG, tmp_path / "b")
    assert_equal(module, whole)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_figures_that_only_some_micro_batches_have_are_means_over_those(tmp_path: Path):
    module = build_module()
    loss, calls = build_loss(module), iter(range(100))

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return loss(step, generator)[0], {"rare": 3.0} if next(calls) % 2 else {"usual": 2.0}

    run_loop({"net": module}, compute_loss, replace(CONFIG, steps=2, accumulate=2, log_every=1), tmp_path)
    assert [(e["rare"], e["usual"]) for e in read_log(tmp_path)] == [(3.0, 2.0)] * 2


def test_what_is_compiled_is_what_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A network of methods has no forward pass: its parts are compiled. The compiler itself is PyTorch's matter."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    net, parts = (
        build_module(),
        nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.ModuleDict({"three": nn.Linear(2, 2)})}),
    )
    config = replace(CONFIG, steps=0, compile=True)
    run_loop({"net": net, "parts": parts}, build_loss(net), config, tmp_path)
    assert compiled == [net, parts["one"], parts["two"]["three"]]  # type: ignore[index]
    with pytest.raises(RequestError, match=r"other settings \(compile differ\)"):
        run_loop({"net": net, "parts": parts}, build_loss(net), CONFIG, tmp_path / "steps")
        run_loop({"net": net, "parts": parts}, build_loss(net), replace(CONFIG, compile=True), tmp_path / "steps")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
def test_a_step_on_cuda_waits_for_nothing(tmp_path: Path):
    module = build_module().cuda()
    objective = Drawn(module)
    run = loop._Run({"net": module}, replace(CONFIG, log_every=100), tmp_path, Team(), {})
    source = run.open_source(MovedFirst(objective))
    run.train_step(source)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.train_step(source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        source.close()
    assert run.look()["loss"] > 0


class MovedFirst(Objective):
    """An objective on CUDA."""

    def __init__(self, inner: Objective) -> None:
        self._inner = inner

    def draw(self, generator: torch.Generator) -> Any:
        return self._inner.draw(generator)

    def compute(self, drawn: Any, step: int, generator: torch.Generator) -> tuple[Tensor, Any]:
        return self._inner.compute(move(drawn, torch.device("cuda")), step, generator)
