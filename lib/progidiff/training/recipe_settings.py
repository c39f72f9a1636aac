"""All settings of `progidiff pretrain`, `progidiff train` and `progidiff adapt` with their defaults; ``configs/*.yaml``
say what they are for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from progidiff.errors import RequestError
from progidiff.images.modality import get_modality
from progidiff.model.adapters import Kind
from progidiff.model.close_up_backbone import LARGEST
from progidiff.model.lora import LoraSettings
from progidiff.prompts.structures import STRUCTURES
from progidiff.training.backbone_stages import CodecOptions, TextToImageOptions
from progidiff.training.build_model import BackboneWidths
from progidiff.training.close_up_stage import CloseUpOptions
from progidiff.training.evidence_stage import EvidenceOptions
from progidiff.training.loop import Precision, RunConfig, Schedule
from progidiff.training.proposal_stage import ProposalOptions
from progidiff.training.settings import Range, apply_changes

Modality = Literal["CT", "MR"]


@dataclass(frozen=True)
class GridSettings:
    """The working grid of a new model.

    Attributes:
        height, width: Pixels of a slice; multiples of 32 for the networks as they are.
        spacing_range: Smallest and largest pixel that is chosen so that the body fits, mm.
    """

    height: Annotated[int, Range(32, 1024)] = 128
    width: Annotated[int, Range(32, 1024)] = 160
    spacing_range: tuple[float, float] = (1.8, 3.2)

    def check(self) -> None:
        """Refuse a range of pixel sizes that is none.

        Raises:
            RequestError: naming the setting.
        """
        if not 0 < self.spacing_range[0] <= self.spacing_range[1]:
            raise RequestError(
                f"Setting grid.spacing_range must be two rising numbers above 0, in mm, got {list(self.spacing_range)}."
            )


@dataclass(frozen=True)
class EvidenceStage(EvidenceOptions, Schedule):
    """Image encoder and text-query head."""


@dataclass(frozen=True)
class ProposalStage(ProposalOptions, Schedule):
    """Denoiser and injection."""


@dataclass(frozen=True)
class CloseUpStage(CloseUpOptions, Schedule):
    """Close-ups, on out-of-fold evidence.

    Attributes:
        folds: Networks that find for one another: each answers the cases that it did not see.
        fold_steps: Steps of each of them; None for as many as the evidence stage.
        readers_share: Share of the windows that come from readers' masks, where `--readers` gives some.
        also_share: Share that comes from further labelled folders, where `--also` gives some.
        worn_share: Share of those that show evidence, made from the truth by wearing it down.
        shapes_share: Share that comes from label volumes without images, where `--shapes` gives some.
        denoiser: Whose draws: "own", a small one that is trained with the rest; "backbone", that of the backbone, which
            stays frozen while encoder and injection learn to steer it; None: the backbone's where ``--backbone`` names
            one, else its own. A close-up that is continued keeps what it has.
        pixels: Along both axes of a window of the backbone's denoiser; None for the size that it is made for.
        recompute: Keep less of the backbone's networks for the backward pass and compute it again: less memory, more
            time.
        level_spread, noise_scale: What the written model draws with, see `CloseUpConfig`: how far proposals differ in
            extent, and in shape; None for what they are trained with. Neither changes the sharpened evidence.
        presence: How sure the written model must be on a slice before its consensus draws there, see
            `CloseUpPipeline`; None for what the model that is continued has, 0 of a fresh one.
        then: Further trainings of the same network, one after the other: each entry holds settings of this stage that
            are changed for it and those after it, as ``--set`` writes them, with spaces between.
    """

    folds: Annotated[int, Range(2, 100)] = 6
    fold_steps: Annotated[int, Range(1, 10_000_000)] | None = None
    readers_share: Annotated[float, Range(0, 0.9)] = 0.15
    also_share: Annotated[float, Range(0, 0.9)] = 0.2
    worn_share: Annotated[float, Range(0, 1)] = 0.6
    shapes_share: Annotated[float, Range(0, 0.9)] = 0.1
    denoiser: Literal["own", "backbone"] | None = None
    pixels: Annotated[int, Range(32, LARGEST)] | None = None
    recompute: bool = True
    level_spread: Annotated[float, Range(0, 10)] | None = None
    noise_scale: Annotated[float, Range(0, 20)] | None = None
    presence: Annotated[float, Range(0, 1)] | None = None
    then: tuple[str, ...] = ()

    def list_parts(self) -> list[CloseUpStage]:
        """The first training and those that follow it, each with all its settings.

        Raises:
            RequestError: if an entry of `then` is no setting, or one that all of them share.
        """
        parts = [replace(self, then=())]
        for number, entry in enumerate(self.then):
            source = f"close_up.then[{number}]"
            part = apply_changes(parts[-1], entry.split(), source)
            shared = [name for name in SHARED if getattr(part, name) != getattr(parts[0], name)]
            if shared:
                raise RequestError(f"Setting close_up.{shared[0]} holds for all parts; take it out of {source}.")
            parts.append(part)
        return parts

    def check(self) -> None:
        """Refuse further trainings that make no sense.

        Raises:
            RequestError: see `list_parts`.
        """
        self.list_parts()


SHARED = ("folds", "fold_steps", "denoiser", "pixels", "recompute", "level_spread", "noise_scale", "presence", "then")
"""Settings of a close-up that do not change from one of its trainings to the next."""


@dataclass(frozen=True)
class CodecStage(CodecOptions, Schedule):
    """The mask codec, or its decoder."""


@dataclass(frozen=True)
class TextToImageStage(TextToImageOptions, Schedule):
    """The denoiser as a text-to-image model."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of `progidiff train`.

    Attributes:
        stages: What is trained, in this order.
        name, version: Of the model that is written; shown as ``name@version``.
        modality, structures, grid: Of a new model; one that is continued keeps its own.
        freeze_denoiser: None: frozen if the backbone is given by ``--backbone``, else trained jointly.
        evidence, proposals, close_up: The stages.
    """

    stages: tuple[Literal["evidence", "proposals", "close_up"], ...] = ("evidence", "proposals")
    name: str = "ct-base"
    version: str = "1"
    modality: Modality = "CT"
    structures: tuple[str, ...] = STRUCTURES
    grid: GridSettings = field(default_factory=GridSettings)
    freeze_denoiser: bool | None = None
    evidence: EvidenceStage = field(
        default_factory=lambda: EvidenceStage(steps=3000, learning_rate=2e-3, validate_every=500)
    )
    proposals: ProposalStage = field(
        default_factory=lambda: ProposalStage(
            steps=1000, learning_rate=5e-4, ema_decay=0.998, checkpoint_every=50, validate_every=250
        )
    )
    close_up: CloseUpStage = field(
        default_factory=lambda: CloseUpStage(steps=3000, learning_rate=2e-3, ema_decay=0.998, checkpoint_every=250)
    )

    def check(self) -> None:
        """Refuse a list of stages that says nothing.

        Raises:
            RequestError: naming the setting.
        """
        order = ("evidence", "proposals", "close_up")
        if not self.stages or list(self.stages) != [stage for stage in order if stage in self.stages]:
            raise RequestError(
                "Setting stages must be one or more of evidence, proposals and close_up, in this order, got "
                f"{list(self.stages)}."
            )
        if self.close_up.pixels is not None and self.close_up.denoiser == "own":
            raise RequestError(
                "Setting close_up.pixels is for windows of the backbone's denoiser; leave it out, or set "
                "close_up.denoiser=backbone."
            )
        if not self.structures:
            raise RequestError("Setting structures is empty; name at least one structure, for example [liver].")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings of `progidiff pretrain`.

    Attributes:
        modality, structures, grid: Of the images and labels.
        widths: Sizes of the networks.
        codec, refine, denoiser: The stages; `refine` trains the codec's decoder on the smallest structures, 0 steps
            leave it out.
    """

    modality: Modality = "CT"
    structures: tuple[str, ...] = STRUCTURES
    grid: GridSettings = field(default_factory=GridSettings)
    widths: BackboneWidths = field(default_factory=BackboneWidths)
    codec: CodecStage = field(
        default_factory=lambda: CodecStage(
            steps=1300, learning_rate=1.5e-3, ema_decay=0.998, checkpoint_every=100, validate_every=500
        )
    )
    refine: CodecStage = field(
        default_factory=lambda: CodecStage(
            steps=400, learning_rate=6e-4, ema_decay=0.99, checkpoint_every=100, validate_every=200
        )
    )
    denoiser: TextToImageStage = field(
        default_factory=lambda: TextToImageStage(steps=500, learning_rate=8e-4, ema_decay=0.998, checkpoint_every=100)
    )


@dataclass(frozen=True)
class AdaptConfig:
    """How a version is trained; the defaults are meant for 1 to 10 volumes.

    Attributes:
        kind: "lora": low-rank updates of the targets; "full": all weights of the targets.
        lora: Targets, and for kind "lora" rank and alpha.
        steps: Largest number of steps, validation stops earlier; None: 200, and where something new is learned 250 and
            22.5 more for each annotated slice beyond 20, at most 1000.
        learning_rate: Peak; None: 2e-3 for kind "lora", 3e-4 for kind "full", and 2e-3 for one of that kind that learns
            a structure that is new.
        batch_size: Slices per step.
        validate_every: Steps between validations.
        patience: Validations without a gain after which training stops.
        augmentation: Strength of affine and intensity augmentation; None: 1, the recipe of the base, and 2 for one that
            learns a structure that is new: there are few slices of it, and nothing else that knows its shapes.
        bias_field: Standard deviation of the logarithm of a smooth random shading (coil sensitivity); None: 0.3 for MR,
            0 for CT.
        proposal_steps: Steps of stage 3; 0 leaves it out.
        proposal_rate: Its learning rate.
        num_proposals: K of the consensus that the gate compares.
        random_share: Share of the slices that are drawn from all annotated ones; the others show a structure that is
            drawn first. More of them teach where nothing is.
        seed: Run seed.
        precision, accumulate: See `progidiff.training.loop.RunConfig`.
        ema_decay: Of the averaged weights.
        keep: Weight of the loss that holds the answers for structures that nobody labelled to the base's, on images of
            the base's modality; 0 switches it off. On another modality the base's answers are not worth keeping.
    """

    kind: Kind = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 12
    validate_every: int = 25
    patience: int = 4
    augmentation: float | None = None
    bias_field: float | None = None
    proposal_steps: int = 0
    proposal_rate: float = 1e-3
    num_proposals: int = 4
    random_share: float = 0.15
    seed: int = 0
    precision: Precision = "auto"
    accumulate: int = 1
    ema_decay: float = 0.98
    keep: float = 1.0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            RequestError: naming the setting and its range.
        """
        self.lora.check()
        if self.kind not in ("lora", "full"):
            raise RequestError(f"Setting kind must be lora or full, got {self.kind!r}.")
        ranges: dict[str, tuple[float, float]] = {
            "steps": (1, 100_000), "learning_rate": (1e-7, 1.0), "batch_size": (1, 256), "validate_every": (1,
            10_000), "patience": (1, 1000),
            "augmentation": (0, 3), "bias_field": (0, 2), "proposal_steps": (0, 100_000), "proposal_rate": (1e-7,
            1.0), "num_proposals": (1, 16),
            "keep": (0, 100), "random_share": (0, 1), "seed": (0, 2**62), "accumulate": (1, 1024), "ema_decay": (0,
            0.999999),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"Setting {name} must lie in {low:g}..{high:g}, got {value}.")
        targets = set(self.lora.target_modules)
        if self.kind == "full" and "denoiser" in targets:
            raise RequestError(
                "A version of kind full holds the conditioning branch, not the denoiser; "
                "leave the target denoiser out, or use kind lora."
            )
        if self.proposal_steps and not {"injection", "denoiser"} & targets:
            raise RequestError(
                "proposal_steps train 'injection' or 'denoiser', but neither is a target; "
                "add one, or set proposal_steps to 0."
            )
        if not self.proposal_steps and not {"encoder", "query_head"} & targets:
            raise RequestError(
                "Nothing would be trained: 'injection' and 'denoiser' learn from "
                "proposals only; set proposal_steps, for example 200."
            )

    def complete(self, modality: str, is_new: bool = False, num_slices: int = 0) -> AdaptConfig:
        """The same with every None replaced by what it stands for.

        Args:
            num_slices: Annotated ones.
            is_new: Whether something is learned that the model does not know: the encoder has to learn what it was
                never shown, by larger steps than it takes to get used to another scanner.
        """
        rate = 2e-3 if self.kind == "lora" or is_new else 3e-4
        steps = min(250 + round(22.5 * max(0, num_slices - 20)), 1000) if is_new else 200
        return replace(
            self,
            steps=self.steps or steps,
            learning_rate=self.learning_rate or rate,
            augmentation=(2.0 if is_new else 1.0) if self.augmentation is None else self.augmentation,
            bias_field=get_modality(modality).bias_field if self.bias_field is None else self.bias_field,
        )

    def choose_evidence_options(self) -> EvidenceOptions:
        """What a step of a complete configuration sees."""
        return EvidenceOptions(
            self.batch_size, augmentation=self.augmentation or 0.0, bias_field=self.bias_field or 0.0
        )
