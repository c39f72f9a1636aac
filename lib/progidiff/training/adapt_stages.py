"""The stages of `progidiff adapt` that train: first image encoder and query head, then on request the proposals."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.errors import CancelledError, ModelError, StoreError
from progidiff.model.conditioning import ConditioningBranch
from progidiff.model.folder import ModelCard
from progidiff.model.lora import (
    INJECTION,
    LoraSettings,
    collect_full,
    collect_tensors,
    copy_full,
    inject_lora,
    load_tensors,
)
from progidiff.model.pipeline import ProposalPipeline
from progidiff.storage.atomic import atomic_file, replace_text
from progidiff.training.device_batches import move
from progidiff.training.evidence_stage import EvidenceDraw, EvidenceObjective, PhraseTable
from progidiff.training.gate import measure_agreement, measure_dice
from progidiff.training.loop import LoopConfig, Report, run_loop
from progidiff.training.objective import Figures, Objective
from progidiff.training.proposal_stage import train_proposals
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training.split import AdaptData

logger = logging.getLogger(__name__)

KEPT_PER_STEP = 4
"""Structures that nobody labelled, of which a training step holds the answers to the base's."""


class KeepingObjective(Objective):
    """The loss of a batch, and beside it how far the answers for structures without labels are from the base's.

    Args:
        objective: Of the structures with labels.
        base: The branch before the training.
        others: Text vectors (P, D) of the structures without labels; None leaves the second part out.
        weight: Of the second part.

    Attributes:
        position: Steps begun.
    """

    def __init__(
        self, objective: EvidenceObjective, base: ConditioningBranch, others: Tensor | None, weight: float
    ) -> None:
        self._objective, self._base, self._others, self._weight = objective, base, others, weight
        self.position = 0

    def draw(self, generator: torch.Generator) -> EvidenceDraw:
        """Slices of the structures with labels."""
        return self._objective.draw(generator)

    def compute(self, drawn: EvidenceDraw, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Loss and figures of slices that were drawn, for `run_loop`."""
        self.position = step + 1
        batch = self._objective.prepare(drawn)
        branch, images = self._objective.branch, batch.images
        features = branch.encode_slices(images)
        loss, figures = self._objective.compare(features, batch, generator)
        if self._others is None:
            return loss, figures
        chosen = torch.from_numpy(batch.rng.permutation(len(self._others))[:KEPT_PER_STEP])
        some = self._others[move(chosen, images.device)]
        with torch.no_grad():
            before = self._base.predict_evidence(self._base.encode_slices(images), some).float().sigmoid()
        kept = F.binary_cross_entropy_with_logits(branch.predict_evidence(features, some).float(), before)
        # The factor is that of the cross-entropy beside it in `compute_evidence_loss`.
        return loss + 10 * self._weight * kept, {**figures, "kept": kept.detach()}


class BestWeights:
    """Keeps the weights of the best validation and says when to stop; both survive a kill.

    Attributes:
        file: The weights.
        history: "step" and "score" of every validation.
    """

    def __init__(self, folder: Path, patience: int) -> None:
        self._patience = patience
        self.file = folder / "best.safetensors"
        self._log = folder / "choice.json"
        folder.mkdir(parents=True, exist_ok=True)
        known = (_read_json(self._log) or {}).get("history", [])
        self.history: list[dict[str, float]] = [{"step": int(e["step"]), "score": float(e["score"])} for e in known]

    @property
    def best(self) -> dict[str, float] | None:
        """The earliest of the best validations."""
        return max(self.history, key=lambda e: (e["score"], -e["step"])) if self.history else None

    def note(self, step: int, score: float, collect: Callable[[], dict[str, Tensor]]) -> None:
        """Take a validation into account; after a resumed run it may be one that was seen before."""
        self.history = sorted(
            [e for e in self.history if e["step"] != step] + [{"step": step, "score": score}], key=lambda e: e["step"]
        )
        if self.best is not None and self.best["step"] == step:
            try:
                with atomic_file(self.file) as scratch:
                    save_file(collect(), scratch)
            except Exception as err:  # safetensors raises its own untyped error for a full disk
                raise StoreError(
                    f"The weights of step {step} cannot be written to '{self.file.parent}' ({err}). Free some disk "
                    "space there; the same command continues from the last checkpoint."
                ) from err
        replace_text(self._log, json.dumps({"history": self.history}, indent=1) + "\n")

    def should_stop(self) -> bool:
        """Whether the last `patience` validations brought no gain; not before there is something to gain on."""
        return (
            self.best is not None
            and self.best["score"] > 0
            and sum(e["step"] > self.best["step"] for e in self.history) >= self._patience
        )

    def load(self) -> dict[str, Tensor]:
        """The best weights."""
        try:
            found: dict[str, Tensor] = load_file(self.file)
            return found
        except Exception as err:  # safetensors raises its own untyped error for a truncated file
            raise ModelError(
                f"'{self.file}' cannot be read ({err}); remove the folder '{self.file.parent}' to train again."
            ) from err


class Trainee:
    """What a version consists of, in networks that are being trained.

    Attributes:
        settings: Of its low-rank updates; None for kind "full".
    """

    def __init__(
        self, config: AdaptConfig, targets: tuple[str, ...], branch: ConditioningBranch, unet: nn.Module
    ) -> None:
        self.branch, self.unet = branch, unet
        self.settings = replace(config.lora, target_modules=targets) if config.kind == "lora" else None
        if self.settings is not None:
            inject_lora(branch, unet, self.settings, config.seed)
            own = [(n, p) for n, p in branch.named_parameters() if p.requires_grad]
            self._of_unet = [p for p in unet.parameters() if p.requires_grad] if "denoiser" in targets else []
        else:
            own, self._of_unet = list(branch.named_parameters()), []
        roots = {"encoder": "encoder", "query_head": "query_head", **dict.fromkeys(INJECTION, "injection")}
        self._parameters = {
            t: [p for n, p in own if roots.get(n.split(".")[0]) == t] for t in targets if t != "denoiser"
        }
        self._parameters["denoiser"] = self._of_unet

    def select(self, targets: Collection[str]) -> None:
        """Let these parts learn and freeze all else."""
        self.branch.requires_grad_(False)
        self.unet.requires_grad_(False)
        for target in targets:
            for parameter in self._parameters.get(target, ()):
                parameter.requires_grad_(True)

    def collect(self) -> dict[str, Tensor]:
        """Its tensors, as they are kept on disk."""
        return (
            collect_full(self.branch)
            if self.settings is None
            else collect_tensors(self.branch, self.unet, self.settings)
        )

    def load(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Put tensors of `collect` back."""
        if self.settings is None:
            copy_full(tensors, self.branch, None, path)
        else:
            load_tensors(tensors, self.branch, self.unet, self.settings, path)


@dataclass
class AdaptStages:
    """One training: stages 2 and 3, and the measurements of the gate."""

    base: ProposalPipeline
    data: AdaptData
    phrases: PhraseTable
    card: ModelCard
    config: AdaptConfig
    folder: Path
    is_cancelled: Callable[[], bool]
    tell: Report

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Structures that the base can do and that are not trained; none on images of another modality."""
        return (
            tuple(s for s in self.card.structures if s not in self.data.training.structures)
            if self.data.modality == self.card.modality
            else ()
        )

    def measure(self, pipeline: ProposalPipeline) -> dict[str, float]:
        """Dice of evidence and consensus on the held-back slices, and "kept", see `measure_agreement`.

        Raises:
            CancelledError: if somebody asks to stop meanwhile.
        """

        def check() -> None:
            if self.is_cancelled():
                raise CancelledError(
                    "Training stopped on request while its result was measured; start it again to continue there."
                )

        figures = measure_dice(
            pipeline, self.data.validation, self.phrases, self.card, self.config.num_proposals, between=check
        )
        if self.unlabelled and pipeline is not self.base:
            kept = measure_agreement(self.base, pipeline, self.data.validation, self.unlabelled, check)
            figures.update({} if kept is None else {"kept": kept})
        return figures

    def train(self) -> tuple[dict[str, Tensor], LoraSettings | None, dict[str, Any]]:
        """Stages 2 and 3. Returns the tensors, the settings that they follow, and how they were chosen."""
        config = self.config
        early = tuple(t for t in config.lora.target_modules if t in ("encoder", "query_head"))
        late = tuple(t for t in config.lora.target_modules if t in ("injection", "denoiser") and config.proposal_steps)
        branch = copy.deepcopy(self.base.branch)
        unet = copy.deepcopy(self.base.unet) if "denoiser" in late else self.base.unet
        # Without stage 3 nothing would train the late targets: they would be zeros on disk.
        trainee = Trainee(config, (*early, *late), branch, unet)
        pipeline = self.base.with_networks(branch, unet)
        choice: dict[str, Any] = {"steps": 0, "history": [], "proposals": False, "targets": list(early)}
        if early:
            best = self._train_evidence(pipeline, trainee, early)
            assert best.best is not None
            choice.update(steps=int(best.best["step"]), history=best.history)
            trainee.load(best.load(), best.file)
        tensors, settings = trainee.collect(), trainee.settings
        if not late:
            return tensors, settings, choice
        without, gained = self._train_proposals(pipeline, trainee, late)
        choice.update(proposals=gained > without, consensus_without_proposals=without, consensus_with_proposals=gained)
        if gained > without or not early:
            choice["targets"] = [*early, *late]
            return trainee.collect(), settings, choice
        if settings is not None:  # The updates that did not pay are left out.
            settings = replace(settings, target_modules=early)
            tensors = {n: t for n, t in tensors.items() if n.startswith(("branch.encoder.", "branch.query_head."))}
        return tensors, settings, choice

    def _train_evidence(self, pipeline: ProposalPipeline, trainee: Trainee, targets: tuple[str, ...]) -> BestWeights:
        config, folder = self.config, self.folder / "evidence"
        steps = config.steps or 0  # `AdaptConfig.complete` has chosen
        best = BestWeights(folder, config.patience)
        objective = KeepingObjective(
            EvidenceObjective(
                pipeline.branch,
                self.phrases,
                self.data.training,
                config.choose_evidence_options(),
                config.random_share,
            ),
            self.base.branch,
            self.base.encode_prompts(self.unlabelled).pooled if self.unlabelled and config.keep else None,
            config.keep,
        )

        def validate() -> dict[str, float]:
            # A stop request waits for the end of a validation: ending it here would lose the steps since the last
            # checkpoint.
            figures = measure_dice(pipeline, self.data.validation, self.phrases, self.card, between=self.is_cancelled)
            best.note(objective.position, figures["evidence"], trainee.collect)
            self.tell({"stage": "validation", "step": objective.position, "total": steps, **figures})
            return figures

        def stop() -> bool:
            self.tell({"stage": "evidence", "step": objective.position, "total": steps})
            return best.should_stop() or self.is_cancelled()

        trainee.select(targets)
        loop = self._loop_config(steps, config.learning_rate or 0.0)
        modules = {"branch": pipeline.branch}
        try:
            run_loop(modules, objective, loop, folder, validate, stop, lambda e: self.tell({"stage": "evidence", **e}))
        except CancelledError:
            if not best.should_stop():
                raise
            logger.info("Stopped early: no gain in %d validations", config.patience)
        if best.best is None:  # killed between the last checkpoint and its validation
            objective.position = steps
            validate()
        return best

    def _train_proposals(
        self, pipeline: ProposalPipeline, trainee: Trainee, targets: tuple[str, ...]
    ) -> tuple[float, float]:
        """Dice of the consensus before and after."""
        config = self.config
        without = self.measure(pipeline)["consensus"]
        trainee.select(targets)
        step = 0

        def stop() -> bool:
            self.tell({"stage": "proposals", "step": step, "total": config.proposal_steps})
            return self.is_cancelled()

        def note(entry: dict[str, Any]) -> None:
            nonlocal step
            step = int(entry["step"])
            self.tell({"stage": "proposals", **entry})

        train_proposals(
            pipeline,
            self.data.training,
            None,
            self._loop_config(config.proposal_steps, config.proposal_rate),
            self.folder / "proposals",
            trained={"branch": trainee.branch, "unet": trainee.unet},
            is_cancelled=stop,
            report=note,
        )
        gained = self.measure(pipeline)["consensus"]
        self.tell(
            {
                "stage": "proposals",
                "step": config.proposal_steps,
                "total": config.proposal_steps,
                "consensus_without": without,
                "consensus": gained,
            }
        )
        return without, gained

    def _loop_config(self, steps: int, rate: float) -> LoopConfig:
        return LoopConfig(
            steps=steps,
            learning_rate=rate,
            warmup=max(1, min(20, steps // 5)),
            ema_decay=self.config.ema_decay,
            seed=self.config.seed,
            precision=self.config.precision,
            accumulate=self.config.accumulate,
            checkpoint_every=min(50, self.config.validate_every),
            validate_every=self.config.validate_every,
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
