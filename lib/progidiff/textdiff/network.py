"""What is trained: a cross-attention block that all scales share, and a pixel classifier; 1 to 3 M parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from progidiff.training.config import Range


@dataclass(frozen=True)
class HeadConfig:
    """Shapes of a head.

    Attributes:
        channels, strides: Of the features, coarse first.
        classes: Foreground classes; background is one more.
        text_features: D of the sentence's tokens; 0 for a head without the text branch.
        width: Features of a token in the attention block.
        heads: Of the attention.
        attend_stride: Finest stride at which image tokens attend; finer scales are pooled to it.
        dropout: Of whole feature channels, in training.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    classes: int = 1
    text_features: int = 384
    width: Annotated[int, Range(8, 2048)] = 128
    heads: Annotated[int, Range(1, 64)] = 4
    attend_stride: Annotated[int, Range(1, 64)] = 8
    dropout: Annotated[float, Range(0, 0.9)] = 0.1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for card.json."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadConfig:
        """The inverse of `to_dict`."""
        raise NotImplementedError


class TextDiffHead(nn.Module):
    """Features of all scales and a sentence in, a class per working pixel out."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config

    def set_statistics(self, mean: Sequence[Tensor], std: Sequence[Tensor]) -> None:
        """Keep what features are standardised with: (C_b,) per scale, of the training pictures."""
        raise NotImplementedError

    def forward(
        self, features: Sequence[Tensor], tokens: Tensor | None = None, mask: Tensor | None = None, boxes: Tensor | None = None, attend: bool = True
    ) -> Tensor:
        """Class scores.

        Args:
            features: (N, C_b, H / s_b, W / s_b) each, coarse first.
            tokens: (N, L, D) of the sentences; None for images without one, which get a learned token instead.
            mask: (N, L) bool, True for real tokens; a row without any is an image without a sentence.
            boxes: (N, 4) top, left, bottom, right of the crop as shares of its picture, so that "upper right" means the
                picture's; None: the crop is the picture.
            attend: False leaves the text's contribution out (the control "no-text").

        Returns:
            (N, 1 + classes, H, W) logits at the working resolution, background first.
        """
        raise NotImplementedError
