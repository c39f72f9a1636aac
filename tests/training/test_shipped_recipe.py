"""`apps/progidiff/model/recipe.yaml` says how the weights beside it were trained, as far as these say it themselves."""

from __future__ import annotations

import json

from progidiff.model.close_up_folder import load_close_up_card
from progidiff.model.folder import load_card
from progidiff.training.recipe_settings import TrainConfig
from progidiff.training.settings import load_config, to_values
from support.shipped import MODEL

NO_MATTER = {"checkpoint_every", "fold_steps", "level_spread", "noise_scale", "presence"}
"""Of the training of the weights; the last three are the model's own, see below."""


def test_the_recipe_is_what_the_weights_say_of_themselves():
    recipe, card, close_up = (
        load_config(TrainConfig, MODEL / "recipe.yaml"),
        load_card(MODEL),
        load_close_up_card(MODEL),
    )
    assert (recipe.name, recipe.version) == (card.name, card.version)
    run = json.loads((MODEL / "conditioning" / "run.json").read_text(encoding="utf-8"))["config"]
    assert run["seed"] == recipe.seed
    assert run["evidence"] == to_values(recipe.evidence)
    last = to_values(recipe.close_up.list_parts()[-1])
    told = {name: value for name, value in close_up.facts["settings"].items() if name not in NO_MATTER}
    assert told == {name: last[name] for name in told}
    assert close_up.network.level_spread == recipe.close_up.level_spread
    assert close_up.network.noise_scale == recipe.close_up.noise_scale
    assert close_up.presence == recipe.close_up.presence
