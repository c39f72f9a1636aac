"""Names and settings of the choice of slices; light, because the command line reads them at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from progidiff.errors import RequestError


@dataclass(frozen=True)
class AcquisitionConfig:
    """The parts of `proposal_disagreement`; each can be switched off to see what it is worth.

    Attributes:
        cover: Choose slices that stand for uncertain ones which nothing annotated is like, see
            `progidiff.active_learning.coverage`; none of the settings below plays a part then. Switched off, slices are
            ranked by a score, as up to version 0.1.
        score: What is uncertain: "disagreement" of the proposals, or "entropy" of their mean.
        score_power: Exponent of it; 0 leaves the predicted size alone to decide.
        foreground_weight: Weigh by the predicted size of the structure, see `weigh_by_foreground`.
        stratified_share: Share of the choices made for one structure at a time; 0 switches it off.
        spread_over_images: Choose from the images with the fewest annotated slices while they show anything.
        min_distance_mm: Of two slices of a volume; 0 switches it off. Given up where nothing else is left.
        noise: Gumbel noise on the logarithm of the score.
        beta_first, beta_last: Its inverse strength in the first and in the last round.
        rounds: Rounds until `beta_last`.
        foreground_share: Of `foreground_random`: choices among slices where something is predicted.
    """

    cover: bool = True
    score: Literal["disagreement", "entropy"] = "disagreement"
    score_power: float = 0.5
    foreground_weight: bool = True
    stratified_share: float = 0.66
    spread_over_images: bool = True
    min_distance_mm: float = 15.0
    noise: bool = True
    beta_first: float = 1.0
    beta_last: float = 10.0
    rounds: int = 5
    foreground_share: float = 0.33

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            RequestError: naming the setting and its range.
        """
        if self.score not in ("disagreement", "entropy"):
            raise RequestError(f"Setting score is '{self.score}'; it must be disagreement or entropy.")
        ranges = {
            "score_power": (0, 10), "stratified_share": (0, 1),
            "min_distance_mm": (0, 1000), "beta_first": (1e-3, 1e6), "beta_last": (1e-3, 1e6), "rounds": (1, 1000),
            "foreground_share": (0, 1),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise RequestError(f"Setting {name} must lie in {low:g}..{high:g}, got {getattr(self, name)}.")

    @classmethod
    def from_text(cls, text: str) -> AcquisitionConfig:
        """Read ``name=value,name=value``, as a command line gives it; what is not named keeps its default.

        Raises:
            RequestError: if a name or a value makes no sense.

        Example:
            >>> AcquisitionConfig.from_text("noise=off, stratified_share=0").noise
            False
        """
        known: dict[str, Any] = {name: getattr(cls, name) for name in cls.__dataclass_fields__}
        values: dict[str, Any] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in entry.partition("="))
            if not equals or name not in known:
                raise RequestError(
                    f"'{entry[:60]}' is no setting of the choice of slices; write "
                    f"name=value, with one of {', '.join(known)}."
                )
            default = known[name]
            if isinstance(default, bool):
                if value.lower() not in ("on", "off", "true", "false"):
                    raise RequestError(f"Setting {name} is '{value[:60]}'; it must be on or off.")
                values[name] = value.lower() in ("on", "true")
            elif isinstance(default, str):
                values[name] = value
            else:
                try:
                    values[name] = type(default)(value)
                except ValueError as err:
                    raise RequestError(f"Setting {name} is '{value[:60]}'; it must be a number.") from err
        config = cls(**values)
        config.check()
        return config

    def beta(self, round_index: int) -> float:
        """The inverse strength of the noise in a round: geometric from `beta_first` to `beta_last`.

        Example:
            >>> [round(AcquisitionConfig().beta(r), 1) for r in range(6)]
            [1.0, 1.8, 3.2, 5.6, 10.0, 10.0]
        """
        progress = 1.0 if self.rounds == 1 else min(1.0, max(0, round_index) / (self.rounds - 1))
        return float(self.beta_first * (self.beta_last / self.beta_first) ** progress)


DEFAULT_STRATEGY = "foreground_random"
"""How slices are chosen where nobody says how: what did best when measured, see docs/results.md."""


STRATEGIES: Mapping[str, str] = {
    "proposal_disagreement": (
        "Slices that stand for many on which the model's own proposals are unsure, and that nothing annotated is like"
    ),
    "uniform_random": "Any slice, with equal chances",
    "foreground_random": "A third of the slices among those where a structure is predicted, the rest anywhere",
    "evenly_spaced": "As far as possible from what is annotated, volume by volume",
    "entropy": "Largest entropy of the mean proposal",
}
"""Names that `pick_slices` knows, and what they do."""


HEADINGS: Mapping[str, str] = {
    "proposal_disagreement": "What stands for most open doubts first",
    "uniform_random": "Random choice",
    "foreground_random": "Random choice, a third of it where structures are predicted",
    "evenly_spaced": "Evenly spaced slices",
    "entropy": "Most uncertain first",
}
"""What stands over a list that a strategy ordered, in a few words."""


BY_SCORE = ("proposal_disagreement", "entropy")
"""Those that rank slices by a score; the others go by chance or place."""
