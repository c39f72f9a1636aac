"""Adapters on disk: versions with a pointer to the one that is served, see `progidiff.storage.versions`.

``<root>/<name>/1, 2, 3 ...`` hold a PEFT folder (or, if all weights were trained, one of diffusers, see
`progidiff.model.version_files`), and beside it adapter.json, run.json and README.md. Versions up to 0.2 wrote all
tensors into adapter.safetensors; such folders are read as they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from progidiff.errors import ModelError, RequestError
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig
from progidiff.model.folder import compute_conditioning_digest, load_card
from progidiff.model.lora import LoraSettings, load_full, merge_lora
from progidiff.model.version_files import (
    NETWORKS,
    PEFT_WEIGHTS,
    describe_full,
    describe_lora,
    find_networks,
    list_configs,
    list_weights,
    pack_configs,
    pack_weights,
    unpack_weights,
)
from progidiff.storage.versions import VersionStore

logger = logging.getLogger(__name__)

FORMAT = 2

READ = (1, 2)
"""Formats that can be read. In the first, all tensors are in `FORMER_WEIGHTS`."""

FORMER_WEIGHTS = "adapter.safetensors"

RESERVED = ("auto", "none")
"""Words that a request uses for "choose by modality" and "the model itself"; no adapter may be named so."""


Kind = Literal["lora", "full"]


@dataclass(frozen=True)
class AdapterCard:
    """``adapter.json``: what a version is, without its weights.

    Attributes:
        name, version: Shown as ``name@version``; versions count 1, 2, 3.
        kind: "lora": updates of some layers; "full": all weights of the conditioning branch (and maybe of the
            denoiser).
        modality: "CT" or "MR", the images it was trained on and is picked for.
        structures: Names it was trained on.
        base: Content of the model it belongs to, see `compute_base_digest`.
        base_name: The same for people, ``name@version``.
        created: ISO time, UTC.
        sha256: Of the weights, see `progidiff.storage.versions.hash_weights`.
        lora: Rank, alpha and targets; None for kind "full".
        networks: What it changes, "branch" and "unet", in this order.
        grid: In place of the base's settings of the working grid: "spacing_range" and "neighbour_mm" of images that are
            smaller than any of the base's; None for the base's own.
        format: How its files are laid out, see `READ`.
    """

    name: str
    version: int
    kind: Kind
    modality: str
    structures: tuple[str, ...]
    base: str
    base_name: str
    created: str
    sha256: str
    lora: LoraSettings | None = None
    networks: tuple[str, ...] = ("branch",)
    grid: Mapping[str, Any] | None = None
    format: int = FORMAT

    @property
    def full_name(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def find_new(self, base: Sequence[str]) -> tuple[str, ...]:
        """Structures that it knows and the model itself, which knows `base`, does not."""
        return tuple(name for name in self.structures if name not in base)

    def place(self, shapes: ConditioningConfig) -> ConditioningConfig:
        """The base's settings with the working grid of this version."""
        return shapes if self.grid is None else replace(shapes, **self.grid)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for adapter.json."""
        values = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "grid" or self.grid is not None}
        return {
            "format": self.format,
            **values,
            "structures": list(self.structures),
            "networks": list(self.networks),
            "lora": None if self.lora is None else self.lora.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterCard:
        """The inverse of `to_dict`."""
        if values["format"] not in READ:
            raise ModelError(
                f"This adapter has format {values['format']}, this program reads "
                f"{' and '.join(map(str, READ))}; install the version that wrote it."
            )
        plain = {k: values[k] for k in cls.__dataclass_fields__ if k in values or k not in ("networks", "grid")}
        if plain.get("grid") is not None:
            plain["grid"] = read_grid_settings(plain["grid"])
        if plain["kind"] not in ("lora", "full"):
            raise ValueError(f"kind {plain['kind']!r}")
        lora = None if plain["lora"] is None else LoraSettings.from_dict(plain["lora"])
        networks = tuple(plain.get("networks", ("branch",)))
        if not networks or set(networks) - set(NETWORKS):
            raise ValueError(f"networks {networks!r}")
        return cls(
            **{
                **plain,
                "version": int(plain["version"]),
                "structures": tuple(plain["structures"]),
                "lora": lora,
                "networks": networks,
            }
        )


class AdapterStore(VersionStore[AdapterCard]):
    """A folder of adapters; safe for several processes.

    Args:
        root: The folder; made when the first version is added, so that a model folder may be read-only.
    """

    noun = "Adapter"
    weights_file = PEFT_WEIGHTS
    card_file = "adapter.json"
    command = "progidiff adapters"
    trainer = "progidiff adapt"
    example = "mr"
    reserved = RESERVED
    without = "adapter 'none'"

    def read_card(self, values: dict[str, Any]) -> AdapterCard:
        """See `VersionStore.read_card`."""
        return AdapterCard.from_dict(values)

    def weights_files(self, card: AdapterCard) -> tuple[str, ...]:
        """See `VersionStore.weights_files`."""
        return (FORMER_WEIGHTS,) if card.format == 1 else list_weights(card.kind, card.networks)

    def files(self, card: AdapterCard) -> tuple[str, ...]:
        """See `VersionStore.files`."""
        configs = () if card.format == 1 else list_configs(card.kind, card.networks)
        return *configs, *super().files(card)

    def add(
        self,
        name: str,
        kind: Kind,
        tensors: Mapping[str, Tensor],
        *,
        modality: str,
        structures: tuple[str, ...],
        base: str,
        base_name: str,
        run: Mapping[str, Any],
        readme: Callable[[AdapterCard], str],
        lora: LoraSettings | None = None,
        shapes: ConditioningConfig | None = None,
        grid: Mapping[str, Any] | None = None,
    ) -> AdapterCard:
        """Write a new version. It is not published.

        Args:
            name: Letters, digits, dot, underscore, hyphen.
            tensors: From `lora.collect_tensors` or `lora.collect_full`.
            run: Configuration, command, commit, package versions, data hashes, parent version, metrics.
            readme: Makes the card for people.
            lora: Of kind "lora".
            shapes: Of the branch, for kind "full".
            grid: See `AdapterCard`.

        Returns:
            The card, with the number the version got.

        Raises:
            RequestError: if the name cannot be used.
            StoreError: if the disk refuses; nothing is left behind then.
        """
        self.check_name(name)
        if (kind == "lora") == (lora is None):
            raise RequestError(
                f"A version of kind '{kind}' {'needs' if kind == 'lora' else 'has no'} rank, alpha and targets."
            )
        networks = find_networks(tensors)
        if lora is not None:
            configs = describe_lora(tensors, lora, base_name)
        elif shapes is not None and networks == ("branch",):
            configs = describe_full(shapes)
        else:
            raise RequestError("A version of kind 'full' holds the conditioning branch alone, and needs its shapes.")

        def make_card(version: int, created: str, sha256: str) -> AdapterCard:
            return AdapterCard(
                name=name,
                version=version,
                kind=kind,
                modality=modality,
                structures=tuple(structures),
                base=base,
                base_name=base_name,
                created=created,
                sha256=sha256,
                lora=lora,
                networks=networks,
                grid=grid,
            )

        return self._add(name, pack_weights(kind, tensors), make_card, run, readme, pack_configs(configs))

    def load(self, card: AdapterCard, base: str) -> dict[str, Tensor]:
        """The tensors of a version.

        Args:
            base: `compute_base_digest` of the model it is meant for.

        Raises:
            ModelError: if it belongs to another base or is damaged.
        """
        self.check_base(card, base)
        contents = self._read(card)
        if card.format == 1:
            former: dict[str, Tensor] = load_safetensors(contents[FORMER_WEIGHTS])
            return former
        return unpack_weights(card.kind, card.networks, contents)

    def pick_for(
        self, modality: str, base: str, structures: Collection[str] = (), known: Collection[str] | None = None
    ) -> AdapterCard | None:
        """The served version for images of a modality and what is asked of them; None if there is none.

        Of several the one that was trained on most of the structures, and of those the one published last. A version
        that knows only structures which the model itself does not is for these alone: what it was not asked to learn,
        the model answers as before.

        Adapters of another base are passed over with a line in the log: the base was exchanged, and they wait for their
        own.

        Args:
            structures: What is asked for; empty for no wish.
            known: Structures of the model itself; None if it does not matter.

        Raises:
            ModelError: if the one that should be served is damaged.
        """
        candidates: list[tuple[int, float, AdapterCard]] = []
        for time, card in self.list_served(base, modality):
            count = len(set(structures) & set(card.structures))
            if count or known is None or set(card.structures) & set(known):
                candidates.append((count, time, card))
        return max(candidates, key=lambda c: (c[0], c[1], c[2].name))[2] if candidates else None

    def list_served(self, base: str, modality: str | None = None) -> list[tuple[float, AdapterCard]]:
        """The served versions of a base with the time of their publication; see `pick_for`.

        Raises:
            ModelError: if one is damaged.
        """
        found = []
        for name in self._names():
            pointer = self._pointer(name)
            if pointer.version is None:
                continue
            card = self.card(name, pointer.version)
            if modality is not None and card.modality != modality:
                continue
            if card.base != base:
                logger.warning(
                    "Adapter %s is passed over: it was trained for another base (%s)", card.full_name, card.base_name
                )
                continue
            found.append((pointer.time, card))
        return found


def read_grid_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a version says of its working grid, with the types of `ConditioningConfig`.

    Raises:
        ValueError: if it says something else.
    """
    low, high = (float(v) for v in values["spacing_range"])
    if not 0 < low <= high:
        raise ValueError(f"spacing_range {values['spacing_range']!r}")
    return {"spacing_range": (low, high), "neighbour_mm": float(values["neighbour_mm"])}


def check_name(name: str) -> str:
    """Refuse a name that would not do as a folder or is a word of the requests.

    Raises:
        RequestError: saying what a name may hold.

    Example:
        >>> check_name("mr-t2")
        'mr-t2'
    """
    return AdapterStore("").check_name(name)


def compute_base_digest(model_dir: Path) -> str:
    """Identity of the model that an adapter belongs to: content of the conditioning and of the backbone it was trained
    with.

    Raises:
        ModelError: if the model folder holds no conditioning.
    """
    backbone = load_card(model_dir).backbone_digest
    return hashlib.sha256(f"{compute_conditioning_digest(model_dir)} {backbone}".encode()).hexdigest()


def build_networks(
    card: AdapterCard, tensors: Mapping[str, Tensor], branch: ConditioningBranch, unet: nn.Module, path: Path
) -> tuple[ConditioningBranch, nn.Module]:
    """Adapted copies of a base's networks; see `lora.merge_lora` for why they are copies.

    Returns:
        The branch; the denoiser, which is the given one if the adapter leaves it as it is.

    Raises:
        ModelError: if any tensor is missing, left over or of another shape.
    """
    if card.lora is not None:
        adapted, denoiser = merge_lora(tensors, branch, unet, card.lora, path)
    else:
        adapted, denoiser = load_full(tensors, branch, unet, path)
    return adapted, unet if denoiser is None else denoiser
