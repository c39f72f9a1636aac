"""A toy denoiser, toy pictures with sentences, and a head trained on them for a few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from progidiff.testing import build_tiny_denoiser, write_blob_pictures
from progidiff.textdiff.data import PictureCase, find_cases
from progidiff.textdiff.features import DiffusionFeatures
from progidiff.textdiff.model import TextDiffModel
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.train import TextDiffTraining, train_textdiff
from support.toy_textdiff import TOY


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_denoiser(tmp_path_factory.mktemp("textdiff") / "denoiser")


@pytest.fixture(scope="session")
def extractor(denoiser: Path) -> DiffusionFeatures:
    return DiffusionFeatures.load(denoiser, TOY.features, "cpu")


@pytest.fixture(scope="session")
def encoder() -> SentenceEncoder:
    return SentenceEncoder.load(device="cpu")


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blob_pictures(tmp_path_factory.mktemp("blobs"), 4)


@pytest.fixture(scope="session")
def cases(blobs: Path) -> list[PictureCase]:
    return find_cases(blobs / "images")


@pytest.fixture(scope="session")
def training(
    cases: list[PictureCase], denoiser: Path, encoder: SentenceEncoder, tmp_path_factory: pytest.TempPathFactory
) -> TextDiffTraining:
    """Trained on three pictures, the fourth held out; written to a version folder."""
    folder = tmp_path_factory.mktemp("trained")
    return train_textdiff(
        cases[:3],
        cases[3:],
        denoiser=denoiser,
        encoder=encoder,
        out=folder / "model",
        work=folder / "work",
        config=TOY,
        device="cpu",
    )


@pytest.fixture(scope="session")
def model(training: TextDiffTraining) -> TextDiffModel:
    return training.model
