"""Dice and IoU per image at the label's own resolution, with the controls that a claim about text needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import CancelledError, RequestError
from progidiff.textdiff.data import PictureCase, read_classes
from progidiff.textdiff.model import TextDiffModel
from progidiff.textdiff.phrases import find_asked, keep_classes
from progidiff.textdiff.pictures import read_picture

Control = Literal["none", "empty", "shuffled", "no-text"]
CONTROLS: tuple[Control, ...] = ("none", "empty", "shuffled", "no-text")


def evaluate(
    model: TextDiffModel,
    cases: Sequence[PictureCase],
    control: Control = "none",
    *,
    draws: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Measure a model on labelled pictures.

    Args:
        model: What answers.
        cases: With labels.
        control: "none": each image with its own sentence; "empty": without one; "shuffled": with the sentence of
            another image that says something else where there is one (a derangement); "no-text": the text's
            contribution left out of the network.
        draws: Noises to average over; None for the model's.
        seed: Of the shuffling.
        on_progress: (images done, images in all).
        is_cancelled: Asked before every image.

    Returns:
        {"summary": {"dice", "iou", "images", "per_class"}, "images": [{"name", "dice", "iou", "sentence",
        "empty_label"}], "control", "model", "reads_text" (whether the head has a text branch), "settings", "notes"}. An
        image whose label and answer are both empty counts 1; empty label and non-empty answer 0. Classes that a label
        says nothing about count neither way. Where the sentence selects, what an image's own sentence asks for is the
        right answer under every control.

    Raises:
        RequestError: if there is no labelled case, "shuffled" has fewer than two sentences, or the model selects and
            was not taught what an image's sentence asks for.
    """
    if control not in CONTROLS:
        raise RequestError(f"The control '{control}' is unknown; use one of {', '.join(CONTROLS)}.")
    labelled = [case for case in cases if case.label is not None]
    if not labelled:
        raise RequestError("There is no labelled picture to measure on; name the folder of the masks with --labels.")
    sentences = _pick_sentences(labelled, control, seed)
    images: list[dict[str, Any]] = []
    per_class: dict[str, list[float]] = {name: [] for name in model.card.classes}
    reads_text = bool(model.card.head.text_features)
    notes = [f"{case.name} has no label and was left out." for case in cases if case.label is None]
    if control != "none" and not reads_text:
        notes.insert(
            0,
            f"'{model.card.full_name}' reads no text, so control {control} gives the figures of control none and says "
            "nothing about text. Name a head that reads it with --model; of the shipped ones that is nuclei@1 (--model "
            "apps/progidiff/model/textdiff/nuclei/1).",
        )
    for number, (case, sentence) in enumerate(zip(labelled, sentences, strict=True)):
        if is_cancelled is not None and is_cancelled():
            raise CancelledError(f"The evaluation was stopped on request after {number} of {len(labelled)} pictures.")
        entry, scores, said = _measure(model, case, sentence, draws, control, is_cancelled)
        images.append(entry)
        notes += [f"{case.name}: {note}" for note in said if control == "none" or "no sentence" not in note]
        for name, score in scores.items():
            per_class[name].append(score)
        if on_progress is not None:
            on_progress(number + 1, len(labelled))
    return {
        "summary": {
            "dice": float(np.mean([entry["dice"] for entry in images])),
            "iou": float(np.mean([entry["iou"] for entry in images])),
            "images": len(images),
            "per_class": {name: float(np.mean(values)) for name, values in per_class.items() if values},
        },
        "images": images,
        "control": control,
        "model": model.card.full_name,
        "reads_text": reads_text,
        "settings": {"draws": draws or model.card.features.draws, "threshold": model.card.threshold, "seed": seed},
        "notes": notes,
    }


def _pick_sentences(cases: Sequence[PictureCase], control: Control, seed: int) -> list[str | None]:
    """What each picture is shown with."""
    if control in ("empty", "no-text"):
        return [None] * len(cases)
    sentences = [case.sentence for case in cases]
    return shuffle_sentences(sentences, seed) if control == "shuffled" else sentences


def _measure(
    model: TextDiffModel,
    case: PictureCase,
    sentence: str | None,
    draws: int | None,
    control: Control,
    is_cancelled: Callable[[], bool] | None,
) -> tuple[dict[str, Any], dict[str, float], tuple[str, ...]]:
    """One picture: its entry of the report, the Dice of every class that its label speaks about, and notes."""
    picture = read_picture(case.image)
    truth = read_classes(case, picture.size, len(model.card.classes))
    if model.card.phrases:
        truth = keep_classes(truth, _find_asked(model, case))
    result = model.predict(picture, sentence, draws, attend=control != "no-text", is_cancelled=is_cancelled)
    mask = result.mask
    if case.unknown:  # Nobody knows better where these are: they count neither as found nor as missed.
        mask, truth = (np.where(np.isin(values, case.unknown), 0, values) for values in (mask, truth))
    dice, iou = compute_scores(mask > 0, truth > 0)
    entry = {
        "name": case.name,
        "dice": dice,
        "iou": iou,
        "sentence": sentence,
        "empty_label": not bool((truth > 0).any()),
        "disagreement": result.disagreement,
        "seconds": round(result.seconds, 2),
    }
    scores = {
        name: compute_scores(mask == value, truth == value)[0]
        for value, name in enumerate(model.card.classes, start=1)
        if value not in case.unknown
    }
    return entry, scores, tuple(result.notes)


def _find_asked(model: TextDiffModel, case: PictureCase) -> tuple[int, ...]:
    """What the own sentence of a picture asks for."""
    asked = find_asked(model.card.phrases, case.sentence)
    if asked is None:
        raise RequestError(
            f"'{model.card.full_name}' draws what a sentence asks for, and what {case.sentence or 'no sentence'!r} of "
            f"'{case.name}' asks for is not known. Give every picture one of its phrases, for example "
            f"'{model.card.phrases[0].text}'."
        )
    return asked


def compute_scores(found: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float]:
    """Dice and IoU of two binary masks of one shape; 1 where both are empty.

    Example:
        >>> compute_scores(np.array([True, True]), np.array([True, False]))
        (0.6666666666666666, 0.5)
    """
    found, truth = np.asarray(found, bool), np.asarray(truth, bool)
    both, total = int((found & truth).sum()), int(found.sum()) + int(truth.sum())
    return (2 * both / total, both / (total - both)) if total else (1.0, 1.0)


def shuffle_sentences(sentences: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """A derangement: every image gets another one's sentence, one with other words where that is possible.

    Images without a sentence stay without.

    Raises:
        RequestError: if there are fewer than two sentences.
    """
    spoken = [i for i, sentence in enumerate(sentences) if sentence]
    if len(spoken) < 2:
        raise RequestError(f"The control 'shuffled' needs at least two pictures with sentences, got {len(spoken)}.")
    order = list(spoken)
    random.Random(seed).shuffle(order)
    # Sorted by words, half a turn apart: as few images as possible meet their own words again, and none its own
    # sentence.
    order.sort(key=lambda i: str(sentences[i]))
    groups = [str(sentences[i]) for i in order]
    turn = max(1, min(len(order) - 1, max(groups.count(words) for words in groups)))
    shuffled: list[str | None] = list(sentences)
    for place, image in enumerate(order):
        shuffled[image] = sentences[order[(place + turn) % len(order)]]
    return shuffled
