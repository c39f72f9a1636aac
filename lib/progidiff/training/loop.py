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
from progidiff.training.device_batches import Prefetcher
from progidiff.training.objective import ComputeLoss, DrawnWithin, Figures, Objective
from progidiff.training.processes import Team, find_team
from progidiff.training.run_log import RunLog
from progidiff.training.settings import Range, flatten

logger = logging.getLogger(__name__)

Precision = Literal["auto", "bf16", "fp16", "fp32"]

Gradients = Literal["auto", "exact", "overlapped"]

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
        compile: Have PyTorch compile the networks; the first steps take minutes, and rounding differs.
        gradients: How several processes sum theirs: "exact", after the backward pass and in one order; "overlapped",
            while it runs (`DistributedDataParallel`); or "auto", overlapped on CUDA and exact elsewhere.
    """

    seed: Annotated[int, Range(0, 2**62)] = 0
    precision: Precision = "bf16"
    accumulate: Annotated[int, Range(1, 1024)] = 1
    log_every: Annotated[int, Range(1, 1_000_000)] = 10
    tensorboard: bool = True
    compile: bool = False
    gradients: Gradients = "auto"


@dataclass(frozen=True)
class LoopConfig(RunConfig, Schedule):
    """One stage of a run."""

    @classmethod
    def of(cls, schedule: Schedule, run: RunConfig) -> LoopConfig:
        """The schedule of a stage with what all stages share."""
        parts = ((schedule, Schedule), (run, RunConfig))
        return cls(**{f.name: getattr(part, f.name) for part, kind in parts for f in fields(kind)})


_NO_MATTER = ("checkpoint_every", "log_every", "tensorboard", "gradients")
"""Settings that may differ between a run and its resumption: they do not change a weight, or by rounding alone, as the
number of processes does.
"""


def is_asynchronous(device: torch.device) -> bool:
    """Whether a device computes while the CPU goes on, so that looking at a number means waiting for it."""
    return device.type == "cuda"


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
    objective: Objective | ComputeLoss,
    config: LoopConfig,
    folder: Path,
    validate: Callable[[], dict[str, float]] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
    draw: Callable[[], dict[str, NDArray[Any]]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train until `config.steps`, resuming from `folder` if it holds a checkpoint of the same configuration.

    Started by ``accelerate launch``, every process calls this with the same arguments. Only the first one reports and
    writes; the others need to see the same `folder`. When one is lost, the others end within a minute.

    On CUDA nothing waits for the device but log entries, validations and checkpoints: micro-batches are drawn ahead by
    a thread, and a step with a loss or gradients that are not finite changes no weight and is told at the next entry.

    Args:
        modules: What is trained. On return they hold the averaged weights.
        objective: The loss of a micro-batch; or a function (step, generator) -> (loss, figures to log). All randomness
            must come from the generator or from torch's global state, which is seeded before each call.
        config: Length, rate, precision.
        folder: Checkpoint, ``log.jsonl`` and TensorBoard's files.
        validate: Called with the averaged weights in place, in all processes, which may share the work; the figures of
            the first go into the log.
        is_cancelled: Asked before every step, by several processes on CUDA before those that follow a log entry; a
            clean checkpoint is written before `CancelledError` is raised.
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
    with team.together():
        run = _Run(modules, config, folder, team, settings or {})
        watcher = _Watcher(run, draw, report) if team.is_first else None
        with contextlib.ExitStack() as stack:
            if watcher is not None:
                stack.callback(watcher.close)
            source = run.open_source(objective if isinstance(objective, Objective) else DrawnWithin(objective))
            stack.callback(source.close)
            while run.step < config.steps:
                if run.is_asked and team.agree(is_cancelled is not None and is_cancelled(), run.device):
                    run.look()
                    run.save()
                    team.wait()
                    raise CancelledError(
                        f"Training stopped on request at step {run.step} of {config.steps}; start "
                        "it again with the same folder to continue."
                    )
                run.train_step(source)
                if run.is_looked_at:
                    figures = run.look()
                    if watcher is not None:
                        watcher.note(figures)
                if validate is not None and _is_due(run.step, config.validate_every, config.steps):
                    _validate(run, validate, watcher)
                if _is_due(run.step, config.checkpoint_every, config.steps):
                    run.save()
            # Nobody leaves before the first one has written everything.
            team.wait()
        run.finish()
    return run.history


def _validate(run: _Run, validate: Callable[[], dict[str, float]], watcher: _Watcher | None) -> None:
    """Measure the averaged weights; every process may do its part, the first one tells."""
    with run.averaged():
        found = {"step": run.step, **validate()}
        if watcher is not None:
            run.history.append(found)
            watcher.note_validation(found)


class _Watcher:
    """What the first process does between two steps: log and report.

    Args:
        run: At its first step, or where it resumes.
        draw, report: See `run_loop`.
    """

    def __init__(
        self,
        run: _Run,
        draw: Callable[[], dict[str, NDArray[Any]]] | None,
        report: Report | None,
    ) -> None:
        config = run.config
        self._run, self._first = run, run.step
        self._draw, self._report = draw, report
        self._log = RunLog(run.folder, run.step, config.tensorboard)
        self._bar = tqdm(
            initial=run.step, total=config.steps, unit="step", dynamic_ncols=True, mininterval=5.0, disable=None
        )  # disable=None: only where a terminal shows it
        self._smoothed: dict[str, float] = {}
        self._noted = run.step
        self._started = time.monotonic()

    def note(self, figures: Mapping[str, float]) -> None:
        """Take the means of the steps into account that were done since the last time."""
        run, config = self._run, self._run.config
        steps, self._noted = run.step - self._noted, run.step
        kept = 0.98**steps
        self._smoothed = {k: kept * self._smoothed.get(k, v) + (1 - kept) * v for k, v in figures.items()}
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in self._smoothed.items()}, refresh=False)
        self._bar.update(steps)
        if _is_due(run.step, config.log_every, config.steps):
            entry = self._describe()
            self._log.add(entry)
            if self._report is not None:
                self._report(entry)

    def note_validation(self, found: dict[str, float]) -> None:
        """Write a validation down, and what it looks like; the averaged weights are in place."""
        pictures = self._draw() if self._draw is not None and self._run.config.tensorboard else None
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


def _compile(module: nn.Module) -> None:
    """Compile a network, or the parts of one that has no forward pass of its own."""
    if type(module).forward is nn.Module.forward:
        for part in module.children():
            _compile(part)
    else:
        module.compile()


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether something that is done every so many steps (0: never), and at the end, is done now."""
    return bool(every) and (step % every == 0 or step == last)


_Source = Prefetcher[tuple[int, int], tuple[Any, torch.Generator]]


class _Loss(nn.Module):
    """The loss as the answer of one network: how `DistributedDataParallel` hears of everything that is trained.

    Args:
        modules: What is trained, however the objective calls it.
        objective: Computes the loss.
    """

    def __init__(self, modules: Mapping[str, nn.Module], objective: Objective) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(modules)
        self._objective = objective

    def forward(self, drawn: Any, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Loss and figures of a micro-batch."""
        return self._objective.compute(drawn, step, generator)


class _Pending:
    """What steps said that nobody has looked at yet; numbers of the device stay there.

    Args:
        device: Of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._nothing = torch.zeros((), device=device)
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._norms = (self._nothing, self._nothing)  # sum and count of those that are finite
        self._trouble = (self._nothing - 1, self._nothing)  # first step whose numbers are not finite, and its norm

    def add_figures(self, figures: Figures) -> None:
        """Take a micro-batch into account."""
        for name, value in figures.items():
            total, count = self._sums.get(name, (self._nothing, 0))
            self._sums[name] = (total + value, count + 1)

    def add_step(self, step: int, norm: Tensor, is_bad: Tensor) -> None:
        """Take the gradient norm of a step into account, and that it was in trouble."""
        is_finite = torch.isfinite(norm)
        self._norms = (self._norms[0] + torch.where(is_finite, norm, 0.0), self._norms[1] + is_finite)
        first, then = self._trouble
        is_first = is_bad & (first < 0)
        self._trouble = (torch.where(is_first, step, first), torch.where(is_first, norm, then))

    def take(self) -> tuple[dict[str, tuple[float, int]], float | None, tuple[int, float] | None]:
        """Look, and begin anew.

        Returns:
            Sum and count of every figure; mean gradient norm, None if no step had a finite one; first step in trouble
            and its norm.
        """
        names, numbers = list(self._sums), [total for total, _ in self._sums.values()]
        # One wait for all of them.
        found = torch.stack([n.double() for n in (*self._norms, *self._trouble, *numbers)]).tolist()
        norms, count, step, norm, *sums = found
        counts = [n for _, n in self._sums.values()]
        self._clear()
        figures = {name: (total, n) for name, total, n in zip(names, sums, counts, strict=True)}
        return figures, norms / count if count else None, (int(step), norm) if step >= 0 else None


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
        self._stride = config.log_every if is_asynchronous(self.device) else 1
        team.share_weights(self.parameters.values())
        if config.compile:
            for module in modules.values():
                _compile(module)
        # The fused update leaves a step out without anybody waiting to hear why, and is one kernel.
        self._is_fused = is_asynchronous(self.device)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            fused=self._is_fused,
        )
        self._pending = _Pending(self.device)
        self._loss: nn.Module = nn.Identity()
        self._shared_loss: nn.parallel.DistributedDataParallel | None = None
        self.average = AveragedWeights(modules, config.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._settings = json.loads(json.dumps(dict(settings)))
        self._resume()
        team.check_same(self.step, "checkpoint", self.device)

    @property
    def is_asked(self) -> bool:
        """Whether a request to stop is looked for now: it must not make processes wait for each other's device."""
        return self.team.count == 1 or self.step % self._stride == 0

    @property
    def is_looked_at(self) -> bool:
        """Whether the figures of the last step are needed now."""
        config, last = self.config, self.config.steps
        every = (config.checkpoint_every, config.validate_every)
        return self.step % self._stride == 0 or any(_is_due(self.step, n, last) for n in every)

    def open_source(self, objective: Objective) -> _Source:
        """Where the micro-batches of this process come from, from the next step on."""
        self._loss = _Loss(self.modules, objective)
        is_overlapped = {"auto": is_asynchronous(self.device), "exact": False, "overlapped": True}
        if self.team.count > 1 and is_overlapped[self.config.gradients]:
            # Parts of a network that a micro-batch does not use are found.
            self._shared_loss = nn.parallel.DistributedDataParallel(self._loss, find_unused_parameters=True)
        places = (
            (step, micro)
            for step in range(self.step, self.config.steps)
            for micro in range(self.team.index, self.micro_batches, self.team.count)
        )

        def draw(place: tuple[int, int]) -> tuple[Any, torch.Generator]:
            step, micro = place
            generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, micro=micro))
            return objective.draw(generator), generator

        return Prefetcher(draw, places, ahead=2 if is_asynchronous(self.device) else 0)

    def train_step(self, source: _Source) -> None:
        """One optimizer step; its figures wait for `look`."""
        config, step = self.config, self.step
        for module in self.modules.values():
            module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, config)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(source)
        if self._shared_loss is None:
            self.team.sum_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip)
        is_finite, has_loss = torch.isfinite(norm), torch.isfinite(loss)
        scale = self._read_scale()
        self._update(is_finite & has_loss)
        # In fp16 gradients overflow now and then: the step is left out and the next loss scaled less. Everywhere else
        # one step with such gradients would end up in every weight, and in the next checkpoint.
        smaller = self._read_scale()
        self._pending.add_step(step, norm, ~has_loss | (~is_finite & ~((smaller < scale) & (smaller >= 1))))
        self.step += 1

    def _update(self, is_finite: Tensor) -> None:
        """Step, unless loss or gradients are not finite."""
        if self._is_fused:
            # Read by the kernel, on the device; in fp16 `GradScaler` puts its own in the place.
            vars(self.optimizer).update(found_inf=(~is_finite).float(), grad_scale=None)
        if self._is_fused or bool(is_finite):
            self.scaler.step(self.optimizer)
            self.average.update(self.parameters, self.step)
        self.scaler.update()

    def _read_scale(self) -> Tensor:
        """By what losses are multiplied in fp16, as a scalar on the device; 1 elsewhere."""
        scaled = self.scaler.scale(torch.ones((), device=self.device))
        assert isinstance(scaled, Tensor)
        return scaled

    def look(self) -> dict[str, float]:
        """Mean loss, its parts and gradient norm of the steps since the last time, over all processes.

        Raises:
            ModelError: if one of them had a loss or gradients that are not finite; in all processes.
        """
        own, norm, trouble = self._pending.take()
        sums: dict[str, tuple[float, int]] = {}
        for part in self.team.gather(own):
            for name, (total, count) in part.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = (before[0] + total, before[1] + count)
        figures = {name: total / count for name, (total, count) in sums.items()}
        at, gradients = trouble or (self.step - 1, norm)
        has_loss = math.isfinite(figures.get("loss", 0.0))
        if trouble is not None or not has_loss:
            what = f"gradients became {gradients}" if has_loss else f"loss became {figures['loss']}"
            raise ModelError(
                f"The {what} at step {at}; lower the learning rate or use fp32. The last checkpoint is kept in "
                f"'{self.folder}'."
            )
        if not figures:
            return {}
        return {"loss": figures.pop("loss"), **({} if norm is None else {"norm": norm}), **figures}

    def _accumulate(self, source: _Source) -> Tensor:
        """Gradients of this process's micro-batches. Returns its part of the mean loss, a scalar on the device."""
        dtype = _AUTOCAST.get(self.precision)
        part = torch.zeros((), device=self.device)
        own = range(self.team.index, self.micro_batches, self.team.count)
        for micro in own:
            drawn, generator = source.take()
            torch.manual_seed(derive_seed(self.config.seed, self.step, "global", micro))
            loss_of, share = self._loss, self.micro_batches
            waiting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if self._shared_loss is not None:
                # It takes the mean over the processes, and needs to do so once per step.
                loss_of, share = self._shared_loss, self.config.accumulate
                if micro != own[-1]:
                    waiting = self._shared_loss.no_sync()
            with waiting:
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    loss, figures = loss_of(drawn, self.step, generator)
                self.scaler.scale(loss / share).backward()
            part += loss.detach() / self.micro_batches
            self._pending.add_figures({"loss": loss.detach(), **figures})
        return part

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
            # The step counter stays on the CPU, where AdamW keeps it unless it is fused.
            state = {
                key: value.to("cpu" if key == "step" and not self._is_fused else parameter.device, copy=True)
                for key, value in found.items()
                if value is not None
            }
            if state:
                self.optimizer.state[parameter] = state
