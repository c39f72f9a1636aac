"""The loop: resuming is rerunning, refusals keep the last checkpoint, averaged weights come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from progidiff.errors import CancelledError, ModelError, RequestError
from progidiff.training.loop import AveragedWeights, LoopConfig, compute_learning_rate, derive_seed, run_loop

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


def read_step(folder: Path) -> int:
    with safe_open(folder / "state.safetensors", "pt") as file:
        return int(file.metadata()["step"])


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
    with pytest.raises(RequestError, match=r"other settings \(learning_rate, seed differ\); use another folder, or the same settings"):
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
