"""Model cards, read by the model hub's own reader."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id


def read_hub_card(readme: Path) -> ModelCardData:
    """The head of a README.md: complete, and valid as far as the hub's library can tell without asking the hub."""
    card = ModelCard.load(readme)
    data: ModelCardData = card.data
    assert data.license == "other"
    assert data.license_name
    assert data.pipeline_tag == "image-segmentation"
    assert data.library_name
    assert "progidiff" in data.tags
    for repository in filter(None, [data.get("base_model"), *(data.get("datasets") or [])]):
        validate_repo_id(repository)
    assert all(result.dataset_name for result in data.eval_results or [])
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    return data
