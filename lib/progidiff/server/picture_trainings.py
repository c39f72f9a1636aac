"""What the server adds to a textdiff training: which labels it learns from, and its versions for clients."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from progidiff.errors import ModelError, NotFoundError
from progidiff.images.formats import is_picture
from progidiff.server.tasks.picture_engine import TextDiffEngine, number_classes
from progidiff.server.tasks.pictures import NAME, TextDiffInferTask
from progidiff.server.version_answers import NamedVersions, VersionAnswer, describe_version, list_events
from progidiff.training.accepted_labels import to_json
from progidiff.training.slice_cache import Case
from progidiff.training_runs.options import TrainingOptions

logger = logging.getLogger(__name__)

_UNNAMED = "foreground"


def collect(
    task: TextDiffInferTask, options: TrainingOptions, cases: Sequence[Case], device: str | None
) -> dict[str, Any]:
    """What a run needs to know: the accepted labels with their sentences, and where the models are.

    Args:
        task: With the models and the sentences.
        options: Of the run.
        cases: Labelled images, see `training.labels.build_cases`.
        device: As the server was started.

    Raises:
        RequestError: if text.csv cannot be read.
    """
    # What a label without names means: somebody put it into the folder by hand.
    classes = options.structures or tuple(task.engine.label_ids()) or (options.name or _UNNAMED,)
    ids = {value: name for name, value in number_classes(classes).items()}
    named = [
        replace(case, structures=ids, names_all=True) if is_picture(case.image) and not case.names_all else case
        for case in cases
    ]
    sentences = {case.name: task.find_sentence(case.image, None)[0] for case in named}
    return {
        "cases": to_json(named),
        "sentences": {name: text for name, text in sentences.items() if text},
        "textdiff": str(task.engine.root),
        "device": device,
    }


def list_versions(engine: TextDiffEngine) -> list[NamedVersions]:
    """All textdiff models with their versions; "trainer" tells them from adapters."""
    return [
        NamedVersions(
            name=entry.name,
            trainer=NAME,
            current=entry.current,
            published=entry.published,
            problem=entry.problem,
            history=list_events(engine.store.history(entry.name)),
            versions=[_describe(engine, entry.name, version) for version in reversed(entry.versions)],
        )
        for entry in engine.entries()
    ]


def use_version(engine: TextDiffEngine, name: str, version: int) -> str:
    """Serve a version. Returns its full name.

    Raises:
        NotFoundError: if there is no such version.
        ModelError: if it is damaged; the served one stays.
    """
    return engine.store.publish(name, version).full_name


def roll_back(engine: TextDiffEngine, name: str) -> str:
    """Serve what was served before. Returns its full name, "" if nothing was.

    Raises:
        NotFoundError: if there is nothing to go back to.
        ModelError: if it is damaged; the served one stays.
    """
    version = engine.store.rollback(name)
    return "" if version is None else f"{name}@{version}"


def _describe(engine: TextDiffEngine, name: str, version: int) -> VersionAnswer:
    try:
        card = engine.store.card(name, version)
        run: Mapping[str, Any] = engine.store.run(card)
    except (ModelError, NotFoundError) as err:
        return VersionAnswer(version=version, problem=str(err))
    values = {
        "kind": "head",
        "modality": "picture",
        "structures": list(card.classes),
        "created": card.created,
        "base": card.denoiser,
        "fits": True,
    }
    return describe_version(version, values, run, _describe_dice(run.get("validation")))


def _describe_dice(figures: Any) -> dict[str, dict[str, float]]:
    """Dice as adapters have it, "base" being the version before: the review page shows both in the same table.

    Example:
        >>> _describe_dice({"current": {"dice": 0.5, "iou": 0.4}, "adapted": {"dice": 0.6, "iou": 0.5}})
        {'base': {'consensus': 0.5}, 'adapted': {'consensus': 0.6}}
        >>> _describe_dice({"dice": 0.7, "iou": 0.6, "threshold": 0.5})
        {'adapted': {'consensus': 0.7}}
    """
    if not isinstance(figures, Mapping):
        return {}
    parts = {"base": figures.get("current"), "adapted": figures.get("adapted", figures)}
    return {
        kind: {"consensus": float(values["dice"])}
        for kind, values in parts.items()
        if isinstance(values, Mapping) and "dice" in values
    }
