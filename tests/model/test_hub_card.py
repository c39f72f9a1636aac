"""What the model hub reads at the head of a card, by its own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from progidiff.model.hub_card import HubFacts, strip_front_matter, write_front_matter
from support.cards import read_hub_card

SHIPPED = Path(__file__).parents[2] / "apps" / "progidiff" / "model"


@pytest.mark.parametrize("card", sorted(SHIPPED.rglob("README.md")), ids=lambda path: str(path.relative_to(SHIPPED)))
def test_every_shipped_model_has_a_card_that_the_hub_can_read(card: Path):
    data = read_hub_card(card)
    assert data.license_name == "research-use-only"
    assert data.datasets
    assert all(result.metric_type == "dice" and 0 < result.metric_value < 1 for result in data.eval_results)


def test_every_shipped_folder_of_weights_has_a_card():
    folders = {path.parent for path in SHIPPED.rglob("run.json")}
    assert len(folders) >= 5
    assert all((folder / "README.md").is_file() for folder in folders)


def test_what_is_written_is_read_back(tmp_path: Path):
    facts = HubFacts(
        "mr@3", "peft", ("medical", "mr"), "Clinic A: two volumes", {"": 0.51234, "left kidney": 0.6},
        "CC BY-NC 4.0", "stable-diffusion-v1-5/stable-diffusion-v1-5", ("Clinic A & B",),
    )  # fmt: skip
    (tmp_path / "README.md").write_text(write_front_matter(facts) + "# mr@3\n\n---\n\nmore\n", encoding="utf-8")
    data = read_hub_card(tmp_path / "README.md")
    assert (data.license, data.license_name, data.library_name) == ("other", "cc-by-nc-4.0", "peft")
    assert data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data.datasets == ["clinic-a-b"]
    assert [(r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("Dice, mean", 0.5123), ("Dice, left kidney", 0.6),
    ]  # fmt: skip
    assert strip_front_matter((tmp_path / "README.md").read_text()) == "# mr@3\n\n---\n\nmore\n"


def test_a_model_of_which_little_is_known_has_a_card_too(tmp_path: Path):
    (tmp_path / "README.md").write_text(write_front_matter(HubFacts("my model@1", "diffusers", (), "", {})) + "# x\n")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name) == ("other", "as-the-training-data")
    assert data.eval_results is None
    assert data.get("base_model") is None


@pytest.mark.parametrize("base", ["ct-base@2", "../some where/model", "owner/name", "/data/ct base"])
def test_a_base_is_named_so_that_the_hub_takes_it(tmp_path: Path, base: str):
    facts = HubFacts("a@1", "peft", (), "x", {}, base_model=base)
    (tmp_path / "README.md").write_text(write_front_matter(facts))
    named = ModelCard.load(tmp_path / "README.md").data.base_model
    validate_repo_id(named)
    assert named.rpartition("/")[2] == facts.base_model.partition("@")[0].rpartition("/")[2].replace(" ", "-")
