"""What the server adds to a textdiff training: which labels it learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from progidiff.images.formats import is_picture
from progidiff.server.tasks.picture_engine import number_classes
from progidiff.server.tasks.pictures import TextDiffInferTask, open_picture
from progidiff.training.accepted_labels import to_json
from progidiff.training.slice_cache import Case
from progidiff.training_runs.options import TrainingOptions

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
    find_classes = _make_finder(task, options)
    named = [
        replace(case, structures=_number(find_classes(case.image)), names_all=True)
        if is_picture(case.image) and not case.names_all
        else case
        for case in cases
    ]
    sentences = {case.name: task.find_sentence(case.image, None)[0] for case in named}
    return {
        "cases": to_json(named),
        "sentences": {name: text for name, text in sentences.items() if text},
        "phrases": None if task.sentences.phrases is None else str(task.sentences.phrases),
        "textdiff": str(task.engine.root),
        "device": device,
    }


def _make_finder(task: TextDiffInferTask, options: TrainingOptions) -> Callable[[Path], tuple[str, ...]]:
    """What the ids of a label without names mean (somebody put it into the folder by hand), by its picture: the classes
    that are trained; else those of the model that would answer, which for tissue is not the one for X-rays, whichever
    was published last.
    """
    served = task.engine.list_served()
    trained = next((card.classes for card in served if card.name == options.name), ())
    classes = options.structures or trained
    if not classes and len({card.gray for card in served}) > 1:
        return lambda path: task.pick_fitting(open_picture(path)).classes
    fixed = tuple(classes) or tuple(task.engine.label_ids()) or (options.name or _UNNAMED,)
    return lambda path: fixed


def _number(classes: Sequence[str]) -> dict[int, str]:
    return {value: name for name, value in number_classes(classes).items()}
