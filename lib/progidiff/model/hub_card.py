"""What the model hub reads at the head of a README.md: licence, tags, base, data sets, figures.

The words are huggingface_hub's, which writes them (`ModelCardData`) and reads them back (`ModelCard.load`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TASK = "image-segmentation"
"""The hub's word for what all models here do."""

AS_DATA = "as-the-training-data"
"""Name of the licence of weights about which nobody has said more than that they learned from somebody's data."""

_FRONT = re.compile(r"\A---\n.*?\n---\n+", flags=re.DOTALL)
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class HubFacts:
    """What is known of a model.

    Attributes:
        name: ``name@version``.
        library: What loads it: "diffusers", "peft" or "progidiff".
        tags: Words to find it by.
        licence: Short name of the terms of the weights, free words; "" for those of the data it learned from.
        base_model: What it changes, a hub id or ``name@version``; "" for none.
        datasets: Names of the data it learned from, as far as known.
        measured_on: Name of the data of the figures.
        dice: "" (the mean) or a structure -> Dice, 0 to 1; NaN where nothing was measured.
    """

    name: str
    library: str
    tags: Sequence[str]
    measured_on: str
    dice: Mapping[str, float]
    licence: str = ""
    base_model: str = ""
    datasets: Sequence[str] = ()


def write_front_matter(facts: HubFacts) -> str:
    """The head of a README.md, YAML between two lines of dashes.

    Example:
        >>> facts = HubFacts("mr@1", "peft", ("medical",), "held-back slices", {"": 0.5}, base_model="ct-base@2")
        >>> "base_model: ct-base" in write_front_matter(facts)
        True
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=_make_id(facts.measured_on).lower(),
            dataset_name=facts.measured_on,
            metric_type="dice",
            metric_name=f"Dice, {structure}" if structure else "Dice, mean",
            metric_value=round(float(value), 4),
        )
        for structure, value in facts.dice.items()
        if math.isfinite(value)
    ]
    data = ModelCardData(
        license="other",
        license_name=_make_id(facts.licence).lower() or AS_DATA,
        library_name=facts.library,
        pipeline_tag=TASK,
        tags=["progidiff", *facts.tags],
        base_model=_make_base(facts.base_model) or None,
        datasets=[_make_id(name).lower() for name in facts.datasets] or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml(line_break=chr(10)).rstrip()}\n---\n\n"


def strip_front_matter(text: str) -> str:
    """A README.md as people read it, without what the hub reads.

    Example:
        >>> strip_front_matter("---\\nlicense: other\\n---\\n\\n# mr@1\\n")
        '# mr@1\\n'
    """
    return _FRONT.sub("", text)


def _make_base(base: str) -> str:
    """An id that a repository may have: those of the hub are left as they are; a version is left out, and where a
    folder lies.
    """
    owner, _, name = base.partition("@")[0].rpartition("/")
    is_hub_id = "/" not in owner and not owner.startswith((".", "~"))
    return "/".join(part for part in (_make_id(owner) if is_hub_id else "", _make_id(name)) if part)


def _make_id(text: str) -> str:
    """Letters, digits, dot, underscore and hyphen, at most 60 of them."""
    return _UNFIT.sub("-", text).strip("-.")[:60].rstrip("-.")
