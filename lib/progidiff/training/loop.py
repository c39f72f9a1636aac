"""One training loop for every recipe: forward -> backward -> clip -> step -> average.

The seed of step i is a function of (run seed, i) alone, so a run that was killed and resumed is the run that was not. A
checkpoint is a pair of safetensors and JSON, written to a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from progidiff.errors import CancelledError, ModelError, RequestError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak, reached after `warmup` steps, then a cosine down to `final_share` of it.
        weight_decay: AdamW's.
        clip: Largest gradient norm.
        ema_decay: Of the averaged weights, which are what is saved and validated.
        seed: Run seed.
        precision: "bf16" or "fp32" autocast.
        checkpoint_every: Steps between resumable checkpoints.
        validate_every: Steps between validations; 0 for never.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    final_share: float = 0.02
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    precision: str = "bf16"
    checkpoint_every: int = 250
    validate_every: int = 0


def derive_seed(run_seed: int, step: int, stream: str = "") -> int:
    """A 63-bit seed for step i of a run; streams are independent of each other."""
    digest = hashlib.sha256(f"{run_seed}:{step}:{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def compute_learning_rate(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then half a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class AveragedWeights:
    """Exponential moving average of a module's trainable parameters, with the usual faster start."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.shadow = {n: p.detach().clone() for n, p in named_parameters(modules).items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """shadow <- decay * shadow + (1 - decay) * parameter."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.shadow)
        torch._foreach_lerp_([self.shadow[n] for n in names], [parameters[n].detach() for n in names], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Mapping[str, Tensor]) -> None:
        """Exchange averaged and live weights in place; call it twice to undo."""
        for name, parameter in parameters.items():
            live = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(live)


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Trainable parameters of several modules, named ``module.parameter``."""
    return {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}


def run_loop(
    modules: Mapping[str, nn.Module],
    compute_loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    config: LoopConfig,
    folder: Path,
    validate: Callable[[], dict[str, float]] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, float]]:
    """Train until `config.steps`, resuming from `folder` if it holds a checkpoint of the same configuration.

    Args:
        modules: What is trained. On return they hold the averaged weights.
        compute_loss: (step, generator) -> (loss, figures to log). All randomness must come from the generator or from torch's
            global state, which is seeded before each call.
        config: Length, rate, precision.
        folder: Checkpoints and ``log.jsonl``.
        validate: Called with the averaged weights in place; its figures go into the log.
        is_cancelled: Asked before every step; a clean checkpoint is written before `CancelledError` is raised.
        report: Receives every log entry, for a status that clients poll.

    Returns:
        The validation entries, oldest first.

    Raises:
        RequestError: if `folder` holds a run with another configuration or of another network.
        ModelError: if loss or gradients are not finite, or the checkpoint is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = named_parameters(modules)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    average = AveragedWeights(modules, config.ema_decay)
    first, history = _resume(folder, config, parameters, average, optimizer)
    device_type = next(iter(parameters.values())).device.type
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", dynamic_ncols=True, mininterval=5.0)
    smoothed: dict[str, float] = {}
    started = time.monotonic()
    for step in bar:
        if is_cancelled is not None and is_cancelled():
            _save_checkpoint(folder, config, step, parameters, average, optimizer, history)
            raise CancelledError(f"Training stopped on request at step {step} of {config.steps}; start it again with the same folder to continue.")
        for module in modules.values():
            module.train()
        generator = torch.Generator().manual_seed(derive_seed(config.seed, step))
        torch.manual_seed(derive_seed(config.seed, step, "global"))
        rate = compute_learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, figures = compute_loss(step, generator)
        if not torch.isfinite(loss):
            raise ModelError(
                f"The loss became {float(loss)} at step {step}; lower the learning rate or use fp32. The last checkpoint is kept in '{folder}'."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.clip)
        if not torch.isfinite(norm):
            # One step with such gradients would end up in every weight, and in the next checkpoint.
            raise ModelError(
                f"The gradients became {float(norm)} at step {step}; lower the learning rate or use fp32. The last checkpoint is kept in '{folder}'."
            )
        optimizer.step()
        average.update(parameters, step)
        for name, value in {"loss": float(loss.detach()), "norm": float(norm), **figures}.items():
            smoothed[name] = 0.98 * smoothed.get(name, value) + 0.02 * value
        bar.set_postfix({k: f"{v:.3f}" for k, v in smoothed.items()}, refresh=False)
        done = step + 1
        if done % 50 == 0 or done == config.steps:
            entry = {"step": done, "rate": rate, "seconds": round(time.monotonic() - started, 1), **{k: round(v, 5) for k, v in smoothed.items()}}
            _log(folder, entry)
            if report is not None:
                report(entry)
        if validate is not None and config.validate_every and (done % config.validate_every == 0 or done == config.steps):
            average.swap(parameters)
            for module in modules.values():
                module.eval()
            figures = {"step": done, **validate()}
            average.swap(parameters)
            history.append(figures)
            _log(folder, {"validation": figures})
            tqdm.write(json.dumps({k: round(v, 4) for k, v in figures.items()}))
        if done % config.checkpoint_every == 0 or done == config.steps:
            _save_checkpoint(folder, config, done, parameters, average, optimizer, history)
    average.swap(parameters)
    for module in modules.values():
        module.eval()
    return history


def _save_checkpoint(
    folder: Path,
    config: LoopConfig,
    step: int,
    parameters: Mapping[str, Tensor],
    average: AveragedWeights,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
) -> None:
    tensors = {f"live.{n}": p.detach().contiguous() for n, p in parameters.items()}
    tensors.update({f"average.{n}": t.contiguous() for n, t in average.shadow.items()})
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().clone().contiguous()
    scratch = folder / ".state.safetensors.tmp"
    # One file holds weights, optimizer and position, so that a kill between two renames cannot mix two steps.
    save_file(tensors, scratch, metadata={"step": str(step), "config": json.dumps(asdict(config)), "history": json.dumps(history)})
    os.replace(scratch, folder / "state.safetensors")


def _resume(
    folder: Path, config: LoopConfig, parameters: Mapping[str, nn.Parameter], average: AveragedWeights, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    from safetensors import safe_open

    path = folder / "state.safetensors"
    if not path.is_file():
        return 0, []
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        saved = json.loads(metadata["config"])
    except Exception as err:  # safetensors raises its own untyped error for a truncated file
        raise ModelError(f"'{path}' is damaged ({err}); remove it to start this run again.") from err
    if saved != asdict(config):
        changed = sorted(k for k in saved if saved[k] != asdict(config).get(k))
        raise RequestError(
            f"'{folder}' holds a run with other settings ({', '.join(changed)} differ); use another folder, or the same settings to resume."
        )
    stored = {n.removeprefix("live."): t for n, t in tensors.items() if n.startswith("live.")}
    other = sorted(n for n in {*stored, *parameters} if n not in stored or n not in parameters or stored[n].shape != parameters[n].shape)
    if other:
        raise RequestError(f"'{folder}' holds a run of another network ({other[0]} does not fit); use another folder.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"live.{name}"])
            average.shadow[name].copy_(tensors[f"average.{name}"])
            state = {
                key: tensors[f"optimizer.{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors
            }
            if state:
                # The step counter stays on the CPU, where AdamW keeps it.
                optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}
    step = int(metadata["step"])
    logger.info("Resumed '%s' at step %d of %d", folder, step, config.steps)
    return step, json.loads(metadata["history"])


def _log(folder: Path, entry: Mapping[str, Any]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
