"""A TextDiff model: frozen features, frozen sentence encoder, trained head, and the card that ties them together.

::

    <version folder>/
      card.json          what it is; read without loading a weight
      head.safetensors   the trained part, fp16
      run.json           what made it
      README.md          the model card for people

The denoiser lies beside it (``../../denoiser`` of the shipped one) or is a hub id; card.json names it and vouches for its content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from progidiff.textdiff.features import FeatureExtractor, FeatureOptions
from progidiff.textdiff.network import HeadConfig, TextDiffHead
from progidiff.textdiff.pictures import Picture
from progidiff.textdiff.sentences import SentenceEncoder

FORMAT = 1


@dataclass(frozen=True)
class TextDiffCard:
    """``card.json``: what a model is, without its weights.

    Attributes:
        name, version: Shown as ``name@version``; version 0 was not yet given a number.
        classes: Foreground classes by name, label value 1 upwards.
        denoiser: Folder relative to the version's folder, or hub id.
        denoiser_digest: Content of the denoiser.
        encoder: Folder or hub id of the sentence encoder; "" for the offline default.
        encoder_digest: Content of it; "" for a head without the text branch.
        features: Which activations.
        head: Shapes of the head.
        threshold: Foreground probability above which a pixel is drawn.
        gray: It was trained on gray pictures.
        data: What it was trained on, by name.
        licence: Of the weights.
        figures: name -> number, measured on held-out images.
        created: ISO time, UTC.
        sha256: Of head.safetensors.
    """

    name: str
    version: int
    classes: tuple[str, ...]
    denoiser: str
    denoiser_digest: str
    encoder: str
    encoder_digest: str
    features: FeatureOptions
    head: HeadConfig
    threshold: float = 0.5
    gray: bool = False
    data: str = ""
    licence: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    created: str = ""
    sha256: str = ""

    @property
    def full_name(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for card.json."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextDiffCard:
        """The inverse of `to_dict`.

        Raises:
            ModelError: if it has another format.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TextDiffResult:
    """What a picture and a sentence gave.

    Attributes:
        probabilities: (classes, H, W) float32 at the picture's own size, mean over the draws; 0..1, not calibrated.
        mask: (H, W) uint8: 0, or the number of the class (1 upwards).
        masks: (K, H, W) uint8, one per draw.
        disagreement: 1 - mean pairwise Dice of the draws' foregrounds; 0 for one draw.
        disagreement_map: (H, W) float32, standard deviation of the foreground probability over the draws times two: 0..1.
        notes: What the user should know (no sentence, alpha blended, padded ...), one sentence each.
        sentence: What was read; None if there was none.
        seconds: Time it took.
    """

    probabilities: np.ndarray
    mask: np.ndarray
    masks: np.ndarray
    disagreement: float
    disagreement_map: np.ndarray
    notes: tuple[str, ...]
    sentence: str | None
    seconds: float


class TextDiffModel:
    """Everything that answers a picture and a sentence. One prediction at a time; the caller locks the device.

    Args:
        extractor: Frozen features.
        encoder: None for a head without the text branch.
        head: The trained part.
        card: What it is.
        folder: Where it was loaded from; None if it was not saved yet.
    """

    def __init__(
        self, extractor: FeatureExtractor, encoder: SentenceEncoder | None, head: TextDiffHead, card: TextDiffCard, folder: Path | None = None
    ) -> None:
        self.extractor, self.encoder, self.head, self.card, self.folder = extractor, encoder, head, card, folder

    def predict(
        self,
        picture: Picture | np.ndarray | Tensor,
        sentence: str | None = None,
        draws: int | None = None,
        *,
        attend: bool = True,
        tile: int = 512,
        overlap: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> TextDiffResult:
        """Segment a picture of any size.

        Args:
            picture: From `read_picture`, or (H, W), (H, W, 1 to 4) or (3, H, W) values, see `to_picture`.
            sentence: What a report says of it; None or blank for none.
            draws: K noises to average over and compare; None for the card's.
            attend: False leaves the text's contribution out.
            tile: Longest side of a tile in working pixels; larger pictures are cut.
            overlap: Working pixels that neighbouring tiles share, blended.
            on_progress: (tiles done, tiles in all), over all draws.
            is_cancelled: Asked before every tile.

        Raises:
            ImageError: if the picture cannot be used.
            RequestError: if the sentence is longer than the encoder takes, or `draws` is not 1 to 64.
            CancelledError: if `is_cancelled` said so.
        """
        raise NotImplementedError

    def save(self, folder: Path, run: Mapping[str, Any], readme: str | None = None) -> TextDiffModel:
        """Write a version folder by one rename; it must not exist. Returns the model as it lies there.

        Args:
            folder: To be made.
            run: What made it.
            readme: The model card; None to write one from what is known.

        Raises:
            RequestError: if the folder exists.
            StoreError: if the disk refuses; nothing is left behind then.
        """
        raise NotImplementedError


def default_folder() -> Path:
    """``apps/progidiff/model/textdiff`` of this checkout: ``denoiser/`` and the shipped ``nuclei/``."""
    return Path(__file__).resolve().parents[3] / "apps" / "progidiff" / "model" / "textdiff"


def load_textdiff(folder: str | Path | None = None, device: str | None = None, denoiser: str | Path | None = None) -> TextDiffModel:
    """Load a model.

    Args:
        folder: A version's folder (it has card.json), or a folder of versions with a CURRENT pointer, whose served version is taken;
            None for the shipped one.
        device: "cpu", "cuda"; None to pick.
        denoiser: Where the denoiser lies now, if not where the card says; its content must be the same.

    Raises:
        ModelError: if anything is missing, damaged or does not fit together.
    """
    raise NotImplementedError


def load_textdiff_card(folder: str | Path) -> TextDiffCard:
    """Read card.json of a version's folder, or of the served version of a folder of versions.

    Raises:
        ModelError: if it is missing or cannot be read.
    """
    raise NotImplementedError
