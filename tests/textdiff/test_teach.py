"""Teaching a head other phrases: its gate alone changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from progidiff.errors import CancelledError, RequestError
from progidiff.textdiff.features import DiffusionFeatures
from progidiff.textdiff.model import TextDiffCard, TextDiffModel
from progidiff.textdiff.network import HeadConfig, TextDiffHead
from progidiff.textdiff.phrases import Phrase
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.teach import TeachConfig, read_asked, teach_phrases
from support.chests import CLASSES

TWO_SIDED = (
    Phrase("right lung clear, left lung opaque", (2,)),
    Phrase("left lung clear, right lung opaque", (1,)),
    Phrase("both lungs", (1, 2)),
    Phrase("right kidney", ()),
)


@pytest.fixture
def selecting(extractor: DiffusionFeatures, encoder: SentenceEncoder) -> TextDiffModel:
    """A head with a gate that was taught nothing yet."""
    torch.manual_seed(0)
    shapes = HeadConfig(
        extractor.channels, extractor.strides, 2, encoder.features, width=16, base=8, heads=2, gate=True
    )
    card = TextDiffCard("chest", 1, CLASSES, "", "d", "", "e", extractor.options, shapes, figures={"dice": 0.9})
    return TextDiffModel(extractor, encoder, TextDiffHead(shapes).eval(), replace(card, phrases=TWO_SIDED[:1]))


def test_the_gate_learns_the_phrases_and_nothing_else_changes(selecting: TextDiffModel):
    before = {name: value.clone() for name, value in selecting.head.state_dict().items()}
    told: list[int] = []
    config = TeachConfig(steps=200, batch_size=16)
    taught, run = teach_phrases(selecting, TWO_SIDED, config, report=lambda entry: told.append(entry["step"]))
    assert read_asked(taught, [phrase.text for phrase in TWO_SIDED]) == [phrase.classes for phrase in TWO_SIDED]
    assert run["misread"] == []
    assert told[-1] == 200
    assert taught.card.phrases == TWO_SIDED
    assert taught.card.figures == {}
    for name, value in taught.head.state_dict().items():
        assert name.startswith("gate.") or torch.equal(value, before[name]), name
    for name, value in selecting.head.state_dict().items():
        assert torch.equal(value, before[name]), name
    again, _ = teach_phrases(selecting, TWO_SIDED, config)
    assert taught.pack_weights() == again.pack_weights()


def test_what_cannot_be_taught_is_refused(selecting: TextDiffModel):
    with pytest.raises(RequestError, match="'spleen' asks for a class there is not; the classes are right lung"):
        teach_phrases(selecting, [Phrase("spleen", (3,))])
    with pytest.raises(RequestError, match="There are no phrases"):
        teach_phrases(selecting, [])
    with pytest.raises(CancelledError, match="after 0 of"):
        teach_phrases(selecting, TWO_SIDED, is_cancelled=lambda: True)
    plain = TextDiffHead(replace(selecting.head.config, gate=False))
    with pytest.raises(RequestError, match="selects nothing in 'chest@1'"):
        teach_phrases(TextDiffModel(selecting.extractor, selecting.encoder, plain, selecting.card), TWO_SIDED)
