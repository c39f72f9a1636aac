"""What a client may ask of a training, read tolerantly and checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from progidiff.errors import RequestError
from progidiff.images.modality import list_modalities
from progidiff.params import read_bool, read_choice, read_float, read_int
from progidiff.proposals.request import AUTO

TRAINERS = {"progidiff": "full", "progidiff_adapt": "lora", "textdiff": "head"}
"""The server's trainers, and the kind of version that each one makes."""

FamilyName = Literal["adapters", "textdiff"]
"""What a trainer makes versions of."""

DESCRIPTIONS = {
    "progidiff": (
        "Continue the training of image encoder and query head on all accepted labels; the better version is served"
    ),
    "progidiff_adapt": (
        "Low-rank adapter (LoRA) for another modality or site from a few accepted labels; the better version is served"
    ),
    "textdiff": (
        "Head on frozen diffusion features for pictures with a sentence, from a few "
        "accepted labels; the better version is served"
    ),
}

_HEAD_DEFAULTS = {"steps": 300, "learning_rate": 5e-3, "batch_size": 8}
"""Where `textdiff` differs."""

_HOST_NAMES = ("model", "client_id", "device", "pretrained", "multi_gpu", "gpus", "bundle_path")
"""What viewers and the host send along; it means nothing here."""


@dataclass(frozen=True)
class TrainingOptions:
    """One request to train.

    Attributes:
        trainer: One of `TRAINERS`.
        name: Of the adapter; None for the modality in lower case.
        modality: "CT", "MR", or None for that of the label saved last.
        steps, learning_rate, batch_size, validate_every, patience, augmentation, proposal_steps, seed: See
            `progidiff.training.recipe_settings.AdaptConfig`; "auto" is None there.
        rank: Of the low-rank updates; alpha is twice the rank.
        crop, views, mirror: See `progidiff.textdiff.accepted.AcceptedConfig`.
        shots, slices: Train on so many volumes or labelled slices; None for all.
        structures, cases, held_out: Names; empty for all or for having them picked.
        publish: Serve the new version if it is better.
    """

    trainer: str
    name: str | None = None
    modality: str | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 12
    validate_every: int = 25
    patience: int = 4
    augmentation: float | None = None
    proposal_steps: int = 0
    seed: int = 0
    rank: int = 8
    crop: int = 128
    views: int = 2
    mirror: bool | None = None
    shots: int | None = None
    slices: int | None = None
    structures: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    publish: bool = True

    @classmethod
    def from_params(cls, trainer: str, params: Mapping[str, Any]) -> tuple[TrainingOptions, tuple[str, ...]]:
        """Read the parameters of a request.

        Returns:
            The options, and the names of parameters that mean nothing to this trainer.

        Raises:
            RequestError: if there is no such trainer, or a parameter is malformed or out of range.

        Example:
            >>> options, ignored = TrainingOptions.from_params("progidiff_adapt", {"steps": "50", "slices": 0,
            ...     "max_epochs": 3})
            >>> options.steps, options.slices, options.learning_rate, ignored
            (50, None, None, ('max_epochs',))
        """
        if trainer not in TRAINERS:
            raise RequestError(f"There is no trainer '{trainer[:64]}'; this server has {', '.join(TRAINERS)}.")
        defaults = {
            **get_defaults(next(iter(TRAINERS))),
            **get_defaults(trainer),
        }  # What a trainer does not offer has a value all the same.
        values = {**defaults, **{k: v for k, v in params.items() if v is not None}}
        name = str(values["name"]).strip()
        modality = read_choice(values["modality"], "modality", (AUTO, *list_modalities()))
        mirror = values.get("mirror", AUTO)
        mirror = read_choice(
            "on" if mirror is True else "off" if mirror is False else mirror, "mirror", (AUTO, "on", "off")
        )
        options = cls(
            trainer=trainer,
            name=None if name.lower() in ("", AUTO) else name,
            modality=None if modality == AUTO else modality,
            steps=None if _is_auto(values["steps"]) else read_int(values["steps"], "steps", 1, 100_000),
            learning_rate=_read_float_or_auto(values["learning_rate"], "learning_rate", 1e-7, 1.0),
            batch_size=read_int(values["batch_size"], "batch_size", 1, 256),
            validate_every=read_int(values["validate_every"], "validate_every", 1, 10_000),
            patience=read_int(values["patience"], "patience", 1, 1000),
            augmentation=_read_float_or_auto(values["augmentation"], "augmentation", 0.0, 3.0),
            proposal_steps=read_int(values["proposal_steps"], "proposal_steps", 0, 100_000),
            seed=read_int(values["seed"], "seed", 0, 2**62),
            rank=read_int(values.get("rank", cls.rank), "rank", 1, 128),
            crop=read_int(values.get("crop", cls.crop), "crop", 8, 4096),
            views=read_int(values.get("views", cls.views), "views", 1, 64),
            mirror=None if mirror == AUTO else mirror == "on",
            shots=read_int(values["shots"], "shots", 0, 100_000) or None,
            slices=read_int(values["slices"], "slices", 0, 10_000_000) or None,
            structures=_read_names(values["structures"], "structures"),
            cases=_read_names(values["cases"], "cases"),
            held_out=_read_names(values["held_out"], "held_out"),
            publish=read_bool(values["publish"], "publish"),
        )
        known = {*cls.__dataclass_fields__, *_HOST_NAMES}
        return options, tuple(sorted(str(k) for k in params if k not in known))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingOptions:
        """The inverse of `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def find_family(trainer: str) -> FamilyName:
    """What a trainer makes versions of.

    Example:
        >>> find_family("progidiff_adapt"), find_family("textdiff")
        ('adapters', 'textdiff')
    """
    return "textdiff" if TRAINERS[trainer] == "head" else "adapters"


def get_defaults(trainer: str) -> dict[str, Any]:
    """The options as viewers draw them: text and numbers as cells, booleans as boxes, lists as menus; 0 and "" stand
    for "all".
    """
    if TRAINERS[trainer] == "head":
        return {
            "name": AUTO,
            **_HEAD_DEFAULTS,
            "crop": TrainingOptions.crop,
            "views": TrainingOptions.views,
            "mirror": [AUTO, "on", "off"],
            "shots": 0,
            "structures": "",
            "cases": "",
            "held_out": "",
            "seed": TrainingOptions.seed,
            "publish": True,
        }
    return {
        "name": AUTO,
        "modality": [AUTO, *list_modalities()],
        "steps": AUTO,
        "learning_rate": AUTO,
        "batch_size": TrainingOptions.batch_size,
        "validate_every": TrainingOptions.validate_every,
        "patience": TrainingOptions.patience,
        "augmentation": AUTO,
        **({"rank": TrainingOptions.rank} if TRAINERS[trainer] == "lora" else {}),
        "proposal_steps": TrainingOptions.proposal_steps,
        "shots": 0,
        "slices": 0,
        "structures": "",
        "cases": "",
        "held_out": "",
        "seed": TrainingOptions.seed,
        "publish": True,
    }


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() == AUTO


def _read_float_or_auto(value: object, option: str, low: float, high: float) -> float | None:
    return None if _is_auto(value) else read_float(value, option, low, high)


def _read_names(value: object, option: str) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise RequestError(f"Option {option} must be names in a list or separated by commas.")
    return tuple(item.strip() for item in items if item.strip())
