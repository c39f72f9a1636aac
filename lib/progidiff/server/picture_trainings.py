"""What the server adds to a textdiff training: which labels it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from progidiff.images.formats import is_picture
from progidiff.server.tasks.picture_engine import number_classes
from progidiff.server.tasks.pictures import TextDiffInferTask
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
        "phrases": None if task.sentences.phrases is None else str(task.sentences.phrases),
        "textdiff": str(task.engine.root),
        "device": device,
    }
