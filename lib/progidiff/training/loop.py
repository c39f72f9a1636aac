"""One training loop for every recipe: micro-batches -> backward -> sum over processes -> clip -> step -> average.

The randomness of micro-batch m of step i is a function of (run seed, i, m) alone, so a run that was killed and resumed
is the run that was not, and a step is the same whether one process computes all its micro-batches or several share them
(micro-batch m goes to process m mod count). A checkpoint is one safetensors file, written to a temporary name and
renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from progidiff.errors import CancelledError, ModelError, RequestError, StoreError
from progidiff.storage.atomic import atomic_file
from progidiff.training.processes import Team, find_team
from progidiff.training.run_log import RunLog
from progidiff.training.settings import Range, flatten

logger = logging.getLogger(__name__)

Precision = Literal["auto", "bf16", "fp16", "fp32"]

ComputeLoss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]

Report = Callable[[dict[str, Any]], None]
"""Receives log entries, for a status that clients poll."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Schedule:
    """How long a stage is and how fast it learns.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak, reached after `warmup` steps, then a cosine down to `final_share` of it.
        weight_decay: AdamW's.
        clip: Largest gradient norm.
        ema_decay: Of the averaged weights, which are what is saved and validated.
        checkpoint_every: Steps between resumable checkpoints.
        validate_every: Steps between validations; 0 for never.
    """

    steps: Annotated[int, Range(0, 10_000_000)] = 1000
    learning_rate: Annotated[float, Range(1e-8, 1)] = 1e-3
    warmup: Annotated[int, Range(0, 1_000_000)] = 100
    final_share: Annotated[float, Range(0, 1)] = 0.02
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4
    clip: Annotated[float, Range(1e-6, 1e6)] = 1.0
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.999
    checkpoint_every: Annotated[int, Range(1, 1_000_000)] = 250
    validate_every: Annotated[int, Range(0, 1_000_000)] = 0


@dataclass(frozen=True)
class RunConfig:
    """What all stages of a run share.

    Attributes:
        seed: Run seed.
        precision: Of the networks under autocast: "bf16"; "fp16" with a loss that is scaled so that small gradients
            survive; "fp32"; or "auto", bf16 where the hardware is fast at it and fp32 elsewhere.
        accumulate: Micro-batches per step and process; their gradients are averaged.
        log_every: Steps between log entries.
        tensorboard: Write curves and pictures beside the log.
    """

    seed: Annotated[int, Range(0, 2**62)] = 0
    precision: Precision = "bf16"
    accumulate: Annotated[int, Range(1, 1024)] = 1
    log_every: Annotated[int, Range(1, 1_000_000)] = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class LoopConfig(RunConfig, Schedule):
    """One stage of a run."""

    @classmethod
    def of(cls, schedule: Schedule, run: RunConfig) -> LoopConfig:
        """The schedule of a stage with what all stages share."""
        parts = ((schedule, Schedule), (run, RunConfig))
        return cls(**{f.name: getattr(part, f.name) for part, kind in parts for f in fields(kind)})


_NO_MATTER = ("checkpoint_every", "log_every", "tensorboard")
"""Settings that may differ between a run and its resumption: they do not change a weight."""


def derive_seed(run_seed: int, step: int, stream: str = "", micro: int = 0) -> int:
    """A 63-bit seed for a micro-batch of step i of a run; streams are independent of each other."""
    place = f"{run_seed}:{step}:{stream}" + (f":{micro}" if micro else "")
    digest = hashlib.sha256(place.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def compute_learning_rate(step: int, config: Schedule) -> float:
    """Linear warm-up, then half a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (
        config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    )


def pick_precision(precision: Precision, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """What "auto" means on a device: bf16 on CUDA and on CPUs with units for it, else fp32."""
    if precision != "auto":
        return precision
    fast = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if fast else "fp32"


def find_autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """What the networks compute in under a precision; None for their weights' own."""
    return _AUTOCAST.get(pick_precision(precision, device))


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
    compute_loss: ComputeLoss,
    config: LoopConfig,
    folder: Path,
    validate: Callable[[], dict[str, float]] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
    draw: Callable[[], dict[str, NDArray[Any]]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train until `config.steps`, resuming from `folder` if it holds a checkpoint of the same configuration.

    Started by ``accelerate launch``, every process calls this with the same arguments. Only the first one validates,
    reports and writes; the others need to see the same `folder`.

    Args:
        modules: What is trained. On return they hold the averaged weights.
        compute_loss: (step, generator) -> (loss, figures to log), once per micro-batch. All randomness must come from
            the generator or from torch's global state, which is seeded before each call.
        config: Length, rate, precision.
        folder: Checkpoint, ``log.jsonl`` and TensorBoard's files.
        validate: Called with the averaged weights in place; its figures go into the log.
        is_cancelled: Asked before every step; a clean checkpoint is written before `CancelledError` is raised.
        report: Receives every log entry, with "step", "total" and "eta_seconds", for a status that clients poll.
        draw: Pictures, name -> (H, W, 3) uint8, asked for after every validation.
        settings: What else the result depends on, as JSON values; a checkpoint made with others is refused.

    Returns:
        The validation entries, oldest first; in the first process.

    Raises:
        RequestError: if `folder` holds a run with another configuration or of another network.
        ModelError: if loss or gradients are not finite, or the checkpoint is damaged.
        StoreError: if a checkpoint cannot be written; the one before stays.
        CancelledError: if `is_cancelled` said so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    team = find_team()
    run = _Run(modules, config, folder, team, settings or {})
    watcher = _Watcher(run, validate, draw, report) if team.is_first else None
    try:
        while run.step < config.steps:
            if team.agree(is_cancelled is not None and is_cancelled(), run.device):
                run.save()
                raise CancelledError(
                    f"Training stopped on request at step {run.step} of {config.steps}; start "
                    "it again with the same folder to continue."
                )
            figures = run.train_step(compute_loss)
            if watcher is not None:
                watcher.note(figures)
            if _is_due(run.step, config.checkpoint_every, config.steps):
                run.save()
    finally:
        if watcher is not None:
            watcher.close()
    run.finish()
    return run.history


class _Watcher:
    """What the first process does between two steps: log, report and validate.

    Args:
        run: At its first step, or where it resumes.
        validate, draw, report: See `run_loop`.
    """

    def __init__(
        self,
        run: _Run,
        validate: Callable[[], dict[str, float]] | None,
        draw: Callable[[], dict[str, NDArray[Any]]] | None,
        report: Report | None,
    ) -> None:
        config = run.config
        self._run, self._first = run, run.step
        self._validate, self._draw, self._report = validate, draw, report
        self._log = RunLog(run.folder, run.step, config.tensorboard)
        self._bar = tqdm(
            initial=run.step, total=config.steps, unit="step", dynamic_ncols=True, mininterval=5.0, disable=None
        )  # disable=None: only where a terminal shows it
        self._smoothed: dict[str, float] = {}
        self._started = time.monotonic()

    def note(self, figures: Mapping[str, float]) -> None:
        """Take the figures of a step into account that was just done."""
        run, config = self._run, self._run.config
        self._smoothed = {k: 0.98 * self._smoothed.get(k, v) + 0.02 * v for k, v in figures.items()}
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in self._smoothed.items()}, refresh=False)
        self._bar.update()
        if _is_due(run.step, config.log_every, config.steps):
            entry = self._describe()
            self._log.add(entry)
            if self._report is not None:
                self._report(entry)
        if self._validate is not None and _is_due(run.step, config.validate_every, config.steps):
            with run.averaged():
                found = {"step": run.step, **self._validate()}
                pictures = self._draw() if self._draw is not None and config.tensorboard else None
            run.history.append(found)
            self._log.add_validation(found, pictures)
            tqdm.write(json.dumps({k: round(v, 4) for k, v in found.items()}), file=sys.stderr)

    def close(self) -> None:
        """Write out what is still buffered."""
        self._log.close()
        self._bar.close()

    def _describe(self) -> dict[str, Any]:
        """The log entry of the step that was just done."""
        run, total = self._run, self._run.config.steps
        seconds = time.monotonic() - self._started
        return {
            "step": run.step,
            "total": total,
            "rate": compute_learning_rate(run.step - 1, run.config),
            "seconds": round(seconds, 1),
            "eta_seconds": round(seconds / (run.step - self._first) * (total - run.step), 1),
            **{k: round(v, 5) for k, v in self._smoothed.items()},
        }


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether something that is done every so many steps (0: never), and at the end, is done now."""
    return bool(every) and (step % every == 0 or step == last)


class _Run:
    """Networks, optimizer and position of a run: what a checkpoint holds.

    Attributes:
        step: Steps done.
        history: Validations so far.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: LoopConfig,
        folder: Path,
        team: Team,
        settings: Mapping[str, Any],
    ) -> None:
        self.modules, self.config, self.folder, self.team = modules, config, folder, team
        self.parameters = named_parameters(modules)
        if not self.parameters:
            raise RequestError(
                "Nothing would be trained: all parameters are frozen. Unfreeze a part, or leave this stage out."
            )
        self.device = next(iter(self.parameters.values())).device
        self.precision = pick_precision(config.precision, self.device)
        # A step's weights follow from its micro-batches, whoever computes them.
        self.micro_batches = config.accumulate * team.count
        team.share_weights(self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.average = AveragedWeights(modules, config.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._settings = json.loads(json.dumps(dict(settings)))
        self._resume()
        team.check_same(self.step, "checkpoint", self.device)

    def train_step(self, compute_loss: ComputeLoss) -> dict[str, float]:
        """One optimizer step. Returns the loss, its parts and the gradient norm, averaged over the micro-batches."""
        config, step = self.config, self.step
        for module in self.modules.values():
            module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, config)
        self.optimizer.zero_grad(set_to_none=True)
        figures = self._accumulate(compute_loss)
        kept = f"The last checkpoint is kept in '{self.folder}'."
        if not math.isfinite(figures["loss"]):
            raise ModelError(
                f"The loss became {figures['loss']} at step {step}; lower the learning rate or use fp32. {kept}"
            )
        self.team.sum_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip))
        finite, scale = math.isfinite(norm), self.scaler.get_scale()
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        # In fp16 gradients overflow now and then: the step is left out and the next loss scaled less. Everywhere else
        # one step with such gradients would end up in every weight, and in the next checkpoint.
        if not finite and not 1 <= self.scaler.get_scale() < scale:
            raise ModelError(f"The gradients became {norm} at step {step}; lower the learning rate or use fp32. {kept}")
        if finite:
            self.average.update(self.parameters, step)
        self.step += 1
        return {"loss": figures.pop("loss"), **({"norm": norm} if finite else {}), **figures}

    def _accumulate(self, compute_loss: ComputeLoss) -> dict[str, float]:
        """Gradients of this process's micro-batches, and figures of everybody's."""
        dtype = _AUTOCAST.get(self.precision)
        means: dict[str, float] = {}
        for micro in range(self.team.index, self.micro_batches, self.team.count):
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, self.step, micro=micro))
            torch.manual_seed(derive_seed(self.config.seed, self.step, "global", micro))
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                loss, figures = compute_loss(self.step, generator)
            self.scaler.scale(loss / self.micro_batches).backward()
            for name, value in {"loss": float(loss.detach()), **figures}.items():
                means[name] = means.get(name, 0.0) + value / self.micro_batches
        return dict(zip(means, self.team.sum_numbers(list(means.values()), self.device), strict=True))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place and the networks in evaluation mode, for a validation."""
        self.average.swap(self.parameters)
        try:
            for module in self.modules.values():
                module.eval()
            yield
        finally:
            self.average.swap(self.parameters)

    def finish(self) -> None:
        """Leave the averaged weights in the networks."""
        self.average.swap(self.parameters)
        for module in self.modules.values():
            module.eval()

    def save(self) -> None:
        """Replace the checkpoint.

        Raises:
            StoreError: if it cannot be written; the one before stays.
        """
        if not self.team.is_first:
            return
        tensors = {f"live.{n}": p.detach().contiguous() for n, p in self.parameters.items()}
        tensors.update({f"average.{n}": t.contiguous() for n, t in self.average.shadow.items()})
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().clone().contiguous()
        # One file holds weights, optimizer and position, so that a kill between two renames cannot mix two steps.
        metadata = {"step": str(self.step), "config": json.dumps(self._identity()), "history": json.dumps(self.history)}
        metadata |= {"scaler": json.dumps(self.scaler.state_dict()), "settings": json.dumps(self._settings)}
        target = self.folder / "state.safetensors"
        try:
            with atomic_file(target) as scratch:
                save_file(tensors, scratch, metadata=metadata)
        except Exception as err:  # safetensors raises its own untyped error for a full disk
            before = "The checkpoint before it is untouched, and the" if target.is_file() else "The"
            raise StoreError(
                f"The checkpoint of step {self.step} cannot be written to '{self.folder}' "
                f"({err}). Free some disk space there. {before} same command continues the training."
            ) from err

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a run and its resumption."""
        shared = {"precision": self.precision, "accumulate": self.micro_batches}
        return {k: v for k, v in {**asdict(self.config), **shared}.items() if k not in _NO_MATTER}

    def _resume(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            # Checkpoints of before a setting existed were made with what is its default now.
            saved = {**asdict(LoopConfig()), **json.loads(metadata["config"])}
            settings = json.loads(metadata.get("settings", "null"))
            step, history, scaler = (
                int(metadata["step"]),
                json.loads(metadata["history"]),
                json.loads(metadata.get("scaler", "{}")),
            )
        except Exception as err:  # safetensors raises its own untyped error for a truncated file
            raise ModelError(f"'{path}' is damaged ({err}); remove it to start this run again.") from err
        changed = [k for k, v in self._identity().items() if saved.get(k) != v]
        if settings is not None:
            now, then = flatten(self._settings), flatten(settings)
            changed += [k for k in {**now, **then} if now.get(k) != then.get(k)]
        if changed:
            raise RequestError(
                f"'{self.folder}' holds a run with other settings ({', '.join(sorted(changed))} differ); use another "
                "folder, or the same settings to resume."
            )
        self._restore(tensors)
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.step, self.history = step, history
        logger.info("Resumed '%s' at step %d of %d", self.folder, step, self.config.steps)

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put live weights, averaged weights and the optimizer's moments back."""
        stored = {n.removeprefix("live."): t for n, t in tensors.items() if n.startswith("live.")}
        parameters = self.parameters
        other = sorted(
            n
            for n in {*stored, *parameters}
            if n not in stored or n not in parameters or stored[n].shape != parameters[n].shape
        )
        if other:
            raise RequestError(
                f"'{self.folder}' holds a run of another network ({other[0]} does not fit); use another folder."
            )
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"live.{name}"])
            self.average.shadow[name].copy_(tensors[f"average.{name}"])
            found = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            # The step counter stays on the CPU, where AdamW keeps it.
            state = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in found.items()
                if value is not None
            }
            if state:
                self.optimizer.state[parameter] = state
