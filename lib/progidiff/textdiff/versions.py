"""Versions of TextDiff models on disk: immutable folders and a pointer to the one that is served, see
`progidiff.storage.versions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from progidiff.storage.versions import VersionStore
from progidiff.textdiff.model import (
    CARD_FILE,
    WEIGHTS_FILE,
    TextDiffCard,
    TextDiffModel,
    load_textdiff,
    refer_to,
    write_model_card,
)


class TextDiffStore(VersionStore[TextDiffCard]):
    """``<root>/<name>/1, 2, 3 ...`` with ``CURRENT`` and ``history.jsonl``; safe for several processes.

    Args:
        root: The folder; made when the first version is added. The shipped one is `model.default_folder()`.
    """

    noun = "Model"
    weights_file = WEIGHTS_FILE
    card_file = CARD_FILE
    command = "progidiff textdiff versions"
    trainer = "progidiff textdiff train"
    example = "nuclei"
    reserved = ("auto", "none", "denoiser")

    def read_card(self, values: dict[str, Any]) -> TextDiffCard:
        """See `VersionStore.read_card`."""
        return TextDiffCard.from_dict(values)

    def read_dice(self, run: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
        """See `VersionStore.read_dice`; "base" is the version before.

        Example:
            >>> store = TextDiffStore("")
            >>> store.read_dice({"validation": {"current": {"dice": 0.5}, "adapted": {"dice": 0.6, "iou": 0.5}}})
            {'base': {'consensus': 0.5}, 'adapted': {'consensus': 0.6}}
            >>> store.read_dice({"validation": {"dice": 0.7, "iou": 0.6, "threshold": 0.5}})
            {'adapted': {'consensus': 0.7}}
        """
        figures = run.get("validation")
        if not isinstance(figures, Mapping):
            return {}
        parts = {"base": figures.get("current"), "adapted": figures.get("adapted", figures)}
        return {
            kind: {"consensus": float(values["dice"])}
            for kind, values in parts.items()
            if isinstance(values, Mapping) and "dice" in values
        }

    def count_slices(self, run: Mapping[str, Any]) -> int:
        """See `VersionStore.count_slices`."""
        return len(run.get("training_cases") or ())

    def add(self, name: str, model: TextDiffModel, run: Mapping[str, Any], readme: str | None = None) -> TextDiffCard:
        """Write a model as the next version of `name`. It is not published.

        Args:
            name: Letters, digits, dot, underscore, hyphen.
            model: From `train_textdiff`.
            run: What made it.
            readme: The model card for people; None to write one from what is known.

        Raises:
            RequestError: if the name cannot be used.
            StoreError: if the disk refuses; nothing is left behind then.
        """

        def make_card(version: int, created: str, sha256: str) -> TextDiffCard:
            denoiser = refer_to(model.card.denoiser, model.folder, self.root / name / str(version))
            return replace(model.card, name=name, version=version, created=created, sha256=sha256, denoiser=denoiser)

        weights = {self.weights_file: model.pack_weights()}
        return self._add(name, weights, make_card, run, lambda card: readme or write_model_card(card, run))

    def load_model(
        self, card: TextDiffCard, device: str | None = None, denoiser: str | Path | None = None
    ) -> TextDiffModel:
        """A version, ready to answer.

        Raises:
            ModelError: if anything is missing, damaged or does not fit together.
        """
        return load_textdiff(self.folder(card), device, denoiser)
