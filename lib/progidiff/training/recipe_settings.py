"""All settings of `progidiff pretrain` and `progidiff train` with their defaults; ``configs/*.yaml`` say what they are
for.

Those of `progidiff adapt` are in `progidiff.training.adapt`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from progidiff.errors import RequestError
from progidiff.prompts.structures import STRUCTURES
from progidiff.training.backbone_stages import CodecOptions, TextToImageOptions
from progidiff.training.build_model import BackboneWidths
from progidiff.training.evidence_stage import EvidenceOptions
from progidiff.training.loop import RunConfig, Schedule
from progidiff.training.proposal_stage import ProposalOptions
from progidiff.training.settings import Range

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
        evidence, proposals: The stages.
    """

    stages: tuple[Literal["evidence", "proposals"], ...] = ("evidence", "proposals")
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

    def check(self) -> None:
        """Refuse a list of stages that says nothing.

        Raises:
            RequestError: naming the setting.
        """
        if not self.stages or list(self.stages) != [s for s in ("evidence", "proposals") if s in self.stages]:
            raise RequestError(
                f"Setting stages must be [evidence], [proposals] or [evidence, proposals], got {list(self.stages)}."
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
