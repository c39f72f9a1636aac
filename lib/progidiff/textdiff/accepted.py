"""From the accepted labels of a folder to the next version of a model, as `training.adapt` does it for adapters.

1. choose    the labelled pictures (or annotated slices of volumes) that name a class of the model; some are held back
2. write     their masks as class numbers, and slices as pictures, into the run's folder
3. train     the served version's head further, or a fresh one, on the frozen features of its denoiser
4. judge     the new and the served version on the held-back images, each at the threshold that suits these images best
5. version   always written; published only if it beats what is served

The threshold of the new version is chosen on the held-back images. So that this does not favour it, the served version
is judged at the one that would be chosen for it on the same images, whatever threshold it is served with.

A label that says nothing about a class (nobody named it for this image, or not on this slice) teaches nothing about it:
its background may be that class there, see `train.compute_segmentation_loss`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError, ModelError, RequestError
from progidiff.images.formats import is_picture
from progidiff.images.reading import load_label, load_volume
from progidiff.labels.history import hash_file
from progidiff.labels.segments import is_unnamed, load_label_map
from progidiff.prompts.parser import canonical_name
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.feature_cache import FeatureCache
from progidiff.textdiff.features import FeatureExtractor, FeatureOptions
from progidiff.textdiff.model import TextDiffCard
from progidiff.textdiff.phrases import Phrase, list_asked, read_phrases
from progidiff.textdiff.sentences import mirror_sentence
from progidiff.textdiff.slices import render_slice
from progidiff.textdiff.train import (
    HeadOptions,
    TextDiffTrainConfig,
    TextDiffTraining,
    choose_threshold,
    train_textdiff,
)
from progidiff.textdiff.versions import TextDiffStore
from progidiff.training.gate import TrainedVersion, conclude, judge_dice
from progidiff.training.loop import Report, Schedule
from progidiff.training.recipes import describe_run
from progidiff.training.slice_cache import Case
from progidiff.training.split import choose_cases

logger = logging.getLogger(__name__)

FEATURES = "features"
"""Cached features in the work folder, shared by all runs."""

DENOISER = "denoiser"
"""Folder of the store with the denoiser that a first version is trained with."""

MAX_SLICES = 24
"""Of one volume: neighbouring slices tell the same."""

JITTER = 0.1
"""Of a first version: draws differ in their timesteps by up to this share, see `FeatureOptions`."""


@dataclass(frozen=True)
class AcceptedConfig:
    """What may be set.

    Attributes:
        steps, learning_rate, batch_size, crop, views, seed: See `train.TextDiffTrainConfig`.
        mirror: Whether views of a training, and draws after the first, are mirrored; None to decide by what is learned,
            see `plan_features`.
    """

    steps: int = 300
    learning_rate: float = 5e-3
    batch_size: int = 8
    crop: int = 128
    views: int = 2
    seed: int = 0
    mirror: bool | None = None


MOVE = 0.12
"""How far views are moved where a sentence selects: what is where decides there."""

STRIDE = 8
"""Crops are multiples of it: of the coarsest features of the usual denoisers."""

SELECTING = FeatureOptions(
    timesteps=(50, 150),
    jitter=JITTER,
    scale=None,
    size=128,
    picture=True,
    tone=(0.0, 0.0, 0.0, 0.5, 0.5, 0.5),
    mirror=False,
    own_scale=True,
)
"""Of a first version whose sentence selects: whole pictures, small, at one brightness and contrast."""

AcceptedResult = TrainedVersion[TextDiffCard]


@dataclass(frozen=True)
class Chosen:
    """What a run learns from.

    Attributes:
        name: Of the model.
        served: The version to beat; None if there is none of this name.
        classes: Foreground classes.
        training, held_out: Labelled images.
        phrases: What sentences ask for, where they select; empty where each picture's own sentence is read.
        unused: Names of labelled images that do not speak about any of the classes, or were not asked for.
    """

    name: str
    served: TextDiffCard | None
    classes: tuple[str, ...]
    training: list[Case]
    held_out: list[Case]
    unused: list[str] = field(default_factory=list)
    phrases: tuple[Phrase, ...] = ()


def run_accepted(
    cases: Sequence[Case],
    sentences: Mapping[str, str],
    root: Path,
    work: Path,
    config: AcceptedConfig | None = None,
    *,
    name: str | None = None,
    structures: Sequence[str] = (),
    wanted: Sequence[str] = (),
    held_out: Sequence[str] = (),
    shots: int | None = None,
    phrases: Path | None = None,
    publish: bool = True,
    device: str | None = None,
    command: str = "",
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> AcceptedResult:
    """Train a version and publish it if it is better than what is served.

    The same call continues a run that was stopped or killed: its checkpoints lie in `work` under a name made of
    everything that the result depends on. A training that is done is not repeated.

    Args:
        cases: Labelled pictures and volumes, see `training.labels.build_cases`.
        sentences: Image -> what the report says; images without one are learned from without.
        root: Folder of the models, see `TextDiffStore`.
        work: Checkpoints and features.
        name: Of the model; None for the one that is served.
        structures: Classes; empty for those of the served version, or all that the labels name.
        wanted: Train on these images; empty for all that are not held back.
        held_out: Hold these back; empty to have 1 or 2 picked.
        shots: Train on so many images.
        phrases: Table of what sentences ask for (see `phrases`), for a first version whose sentence selects, and in
            place of the phrases of a served version that selects. A served version that does not stays as it is, and a
            table that asks for none of the classes is not for this model.
        publish: False to keep the version unpublished whatever the gate says.
        device: "cpu", "cuda"; None to pick.
        command: How the run was started, for its record.
        is_cancelled: Asked before every picture and every step.
        report: Receives log entries with "stage".

    Raises:
        RequestError, ImageError: if the labels cannot be trained on; the message says which and why.
        ModelError: if there is neither a served version nor a denoiser, or one is damaged.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or AcceptedConfig()
    tell: Report = report or (lambda entry: None)
    tell({"stage": "prepare"})
    store = TextDiffStore(root)
    chosen = choose(store, cases, name, structures, wanted, held_out, shots, config.seed)
    chosen = replace(chosen, phrases=_pick_phrases(chosen, phrases))
    features = plan_features(chosen, None if chosen.served is None else chosen.served.features, config.mirror)
    fingerprint = _fingerprint(chosen, config, sentences)
    folder = work / f"textdiff-{chosen.name}-{fingerprint[:12]}"
    training, kept_back = _write_cases(chosen, sentences, folder / "cases")
    tell({"stage": "prepare", **_describe_data(chosen, training, kept_back)})
    written = store.find_run(chosen.name, fingerprint)
    repeated = written is not None
    if written is None:
        trained, figures = _train(
            store, chosen, training, kept_back, config, features, folder, device, is_cancelled, tell
        )
        tell({"stage": "version", **{kind: values["dice"] for kind, values in figures.items()}})
        record = _describe_version(chosen, trained, figures, {"command": command, "fingerprint": fingerprint})
        card = trained.model.card
        trained.model.card = replace(card, figures={**card.figures, **figures["adapted"]})
        written = store.add(chosen.name, trained.model, record, None)
    shutil.rmtree(folder / "cases", ignore_errors=True)
    how = f"POST /progidiff/versions/{written.name}/{written.version}/use serves"
    return conclude(store, written, store.run(written), publish, folder, how, repeated)


def _pick_phrases(chosen: Chosen, table: Path | None) -> tuple[Phrase, ...]:
    """What is taught to select: the table's phrases, if they ask for a class of the model, else those of the served
    version.
    """
    if chosen.served is not None and not chosen.served.phrases:
        return ()
    if table is not None and set(list_asked(table)) & set(chosen.classes):
        return read_phrases(table, chosen.classes)
    return () if chosen.served is None else chosen.served.phrases


def _describe_data(chosen: Chosen, training: Sequence[PictureCase], kept_back: Sequence[PictureCase]) -> dict[str, Any]:
    """How much there is to learn from, for whoever watches."""
    return {
        "name": chosen.name,
        "training_cases": [c.name for c in chosen.training],
        "training_slices": len(training),
        "held_out_cases": [c.name for c in chosen.held_out],
        "held_out_slices": len(kept_back),
        "unused_cases": chosen.unused,
        "structures": list(chosen.classes),
        "without_sentence": sum(c.sentence is None for c in training),
    }


def _train(
    store: TextDiffStore,
    chosen: Chosen,
    training: Sequence[PictureCase],
    kept_back: Sequence[PictureCase],
    config: AcceptedConfig,
    features: FeatureOptions,
    folder: Path,
    device: str | None,
    is_cancelled: Callable[[], bool] | None,
    tell: Report,
) -> tuple[TextDiffTraining, dict[str, dict[str, float]]]:
    """Train a version (3) and measure it and the served one (4)."""
    current = None if chosen.served is None else store.load_model(chosen.served, device)
    cache = folder.parent / FEATURES
    settings = TextDiffTrainConfig(
        name=chosen.name,
        classes=chosen.classes,
        schedule=Schedule(
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup=min(20, config.steps),
            ema_decay=0.98,
            checkpoint_every=max(1, min(50, config.steps // 4)),
        ),
        features=features,
        crop=config.crop if features.size is None else min(config.crop, -(-features.size // STRIDE) * STRIDE),
        batch_size=config.batch_size,
        views=config.views,
        head=HeadOptions(gate=bool(chosen.phrases)),
        move=MOVE if chosen.phrases else 0.0,
        seed=config.seed,
        use_text=current is None or current.encoder is not None,
    )
    trained = train_textdiff(
        training,
        kept_back,
        denoiser=_find_denoiser(store.root) if current is None else _copy_extractor(current.extractor, features),
        encoder=None if current is None else current.encoder,
        start=current,
        phrases=chosen.phrases,
        work=folder / "run",
        cache=cache,
        config=settings,
        device=device,
        is_cancelled=is_cancelled,
        report=tell,
    )
    tell({"stage": "gate"})
    figures = {"adapted": _round(trained.figures)}
    if current is not None:
        found = choose_threshold(current, kept_back, FeatureCache(cache), is_cancelled)[1]
        figures = {"current": _round(found), **figures}
    return trained, figures


def _describe_version(
    chosen: Chosen, trained: TextDiffTraining, figures: dict[str, dict[str, float]], origin: Mapping[str, str]
) -> dict[str, Any]:
    """run.json: what made a version, what it learned from, and the verdict."""
    parent = None if chosen.served is None else chosen.served.full_name
    accepted, verdict = judge(figures, parent)
    return {
        **trained.run,
        **describe_run(),
        **origin,
        "parent": parent,
        "training_cases": [c.name for c in chosen.training],
        "held_out_cases": [c.name for c in chosen.held_out],
        "validation": figures,
        "accepted": accepted,
        "verdict": verdict,
        "notes": list(trained.notes),
    }


def choose(
    store: TextDiffStore,
    cases: Sequence[Case],
    name: str | None,
    structures: Sequence[str],
    wanted: Sequence[str],
    held_out: Sequence[str],
    shots: int | None,
    seed: int,
) -> Chosen:
    """Decide what is trained, on which images, and which are held back; see `run_accepted`.

    Images that the served version held back are held back again, and those that it was trained on are the last to be.

    Raises:
        RequestError: if a name, class or number makes no sense, or fewer than two images can be used.
    """
    served = _find_served(store, name)
    labelled = sorted({text for case in cases for text in case.structures.values() if not is_unnamed(text)})
    classes = tuple(structures) or (served.classes if served is not None else tuple(labelled))
    if served is not None and classes != served.classes:
        raise RequestError(
            f"'{served.full_name}' draws {', '.join(served.classes)}, and {', '.join(classes)} was asked for. Leave "
            "structures out, or give the new model another name."
        )
    usable = [case for case in cases if _speaks(case, classes)]
    if not usable:
        told = (
            f"The accepted labels name {', '.join(labelled) or 'nothing'}, and none of "
            f"them {', '.join(classes) or 'a class'}."
        )
        raise RequestError(
            f"{told} Train a model of another name on them with the options name and "
            "structures, or name the classes when saving labels."
        )
    run = {} if served is None else store.run(served)
    training, kept_back = choose_cases(usable, wanted, held_out, run, seed, "image")
    if not training or not kept_back:
        raise RequestError(
            f"{len(usable)} image has an accepted label of {', '.join(classes)}: one is learned from and another one "
            "decides whether the result is served. Label a second image, then train."
        )
    if shots is not None:
        if shots > len(training):
            raise RequestError(
                f"{shots} images were asked for, but {len(training)} are labelled and not "
                "held back. Label more, or lower shots."
            )
        training = training[:shots]
    used = {c.name for c in (*training, *kept_back)}
    model = served.name if served is not None else name or _make_name(classes[0])
    return Chosen(
        store.check_name(model), served, classes, training, kept_back, [c.name for c in cases if c.name not in used]
    )


def plan_features(chosen: Chosen, served: FeatureOptions | None, mirror: bool | None = None) -> FeatureOptions:
    """How the pictures of a run are looked at.

    Pictures of tissue look the same mirrored, and more views help. A slice of a body does not: its left is always on
    the same side of the picture, and a class like "left kidney" would be taught, and drawn, on both sides. So nothing
    is mirrored if a case is a slice of a volume or a class names a side, and a first version brings such pictures to no
    tone either: the usual one is that of stained tissue. `own_scale`, which was measured on tissue only, is off there
    too.

    Args:
        served: Those of the version that is trained further; None for a first one. All but `mirror` stay: the head
            knows them.
        mirror: As asked for; None to decide so.

    Raises:
        RequestError: if mirroring was asked for although a class names a side.
    """
    sided = [name for name in chosen.classes if names_side(name)]
    if mirror and sided:
        raise RequestError(
            f"Option mirror is on, but {', '.join(sided)} names a side, which a mirrored "
            "picture would teach wrong. Set mirror to auto."
        )
    has_sides = bool(sided) or not all(is_picture(case.image) for case in (*chosen.training, *chosen.held_out))
    if chosen.phrases and mirror:
        raise RequestError(
            "Option mirror is on, and a mirrored picture would teach phrases the other side. Set it to auto."
        )
    if served is not None:
        return replace(served, mirror=(served.mirror and not has_sides) if mirror is None else mirror)
    if chosen.phrases:
        return SELECTING
    options = FeatureOptions(jitter=JITTER)
    return replace(
        options,
        mirror=not has_sides if mirror is None else mirror,
        tone=None if has_sides else options.tone,
        own_scale=not has_sides,
    )


def names_side(name: str) -> bool:
    """Whether a class is another one in a mirrored picture.

    Example:
        >>> [names_side(name) for name in ("left kidney", "kidney_R", "rightVentricle", "upper-lobe", "nuclei",
        ...     "cleft")]
        [True, True, True, True, False, False]
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return any(word.lower() in ("l", "r", "lt", "rt") or mirror_sentence(word, True, True) != word for word in words)


def judge(figures: Mapping[str, Mapping[str, float]], current: str | None) -> tuple[bool, str]:
    """The quality gate: a version must beat what is served on the held-back images; a first one must find anything.

    Returns:
        Whether it may be published, and why in a sentence.

    Example:
        >>> judge({"current": {"dice": 0.5}, "adapted": {"dice": 0.7}}, "nuclei@1")
        (True, 'Dice 0.700 on the held-back images, nuclei@1 has 0.500.')
    """
    rivals = {} if current is None or "current" not in figures else {current: figures["current"]["dice"]}
    return judge_dice(figures["adapted"]["dice"], rivals, "images")


def _round(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}


def _find_served(store: TextDiffStore, name: str | None) -> TextDiffCard | None:
    """The version to continue: of the name, or the one published last; None if there is none."""
    if name is not None:
        store.check_name(name)
        current = store.current(name)
        return None if current is None else store.card(name, current)
    newest = store.find_newest()
    return store.find(newest.name) if newest else None


def _find_denoiser(root: Path) -> Path:
    """Where a first version gets its features from: the folder beside the models."""
    if (root / DENOISER).is_dir():
        return root / DENOISER
    raise ModelError(
        f"There is no textdiff model to continue and no '{DENOISER}' in '{root}' to train "
        "a first one with. Put a denoiser there (`progidiff textdiff pretrain` makes "
        "one), or name another folder with --conf textdiff."
    )


def _copy_extractor(extractor: FeatureExtractor, options: FeatureOptions) -> FeatureExtractor:
    """The same network, asked for otherwise; only what does not change its answers may differ."""
    copied = copy.copy(extractor)
    copied.options = options
    return copied


def _make_name(structure: str) -> str:
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in structure.lower()).strip("-")
    return plain or "model"


def _write_cases(
    chosen: Chosen, sentences: Mapping[str, str], folder: Path
) -> tuple[list[PictureCase], list[PictureCase]]:
    """Masks as class numbers, and slices of volumes as pictures; the same files whenever the run is continued."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(cases: Sequence[Case]) -> list[PictureCase]:
        return [
            found for case in cases for found in _write_case(case, chosen.classes, sentences.get(case.name), folder)
        ]

    return write(chosen.training), write(chosen.held_out)


def _write_case(case: Case, classes: Sequence[str], sentence: str | None, folder: Path) -> list[PictureCase]:
    from PIL import Image

    if is_picture(case.image):
        label = load_label(case.label)[:, :, 0].T[None]
        path = folder / f"{case.name}.label.png"
        spoken = _find_spoken(case, label, classes)[0]
        Image.fromarray(_number_classes(label[0], case, classes, spoken)).save(path)
        return [PictureCase(case.name, case.image, path, sentence, _list_unknown(spoken))]
    volume = load_volume(case.image, info=case.info)
    label = volume.arrange(load_label_map(case.label, volume.grid).array)
    found = []
    table = _find_spoken(case, label, classes)
    for z in _pick_slices(case, label, classes, table):
        name = f"{case.name}-{z:04d}"
        Image.fromarray(render_slice(volume, z)).save(folder / f"{name}.png")
        Image.fromarray(_number_classes(label[z], case, classes, table[z])).save(folder / f"{name}.label.png")
        found.append(
            PictureCase(name, folder / f"{name}.png", folder / f"{name}.label.png", sentence, _list_unknown(table[z]))
        )
    return found


def _speaks(case: Case, classes: Sequence[str]) -> bool:
    """Whether the label of an image may speak about a class; of a volume the slices tell, once it is read."""
    if is_picture(case.image):
        return any(_is_annotated(case, name, 1).any() for name in classes)
    return bool(set(case.structures.values()) & set(classes))


def _is_annotated(case: Case, name: str, count: int) -> NDArray[Any]:
    """`Case.is_annotated` of a name as the label has it, or as the history does, which knows synonyms as one
    structure.
    """
    return np.asarray(case.is_annotated(name, count) | case.is_annotated(canonical_name(name), count), dtype=bool)


def _find_spoken(case: Case, label: NDArray[Any], classes: Sequence[str]) -> NDArray[Any]:
    """Which classes a label (Z, Y, X) speaks about on which slice: bool (Z, classes)."""
    spoken: NDArray[Any] = np.stack([_is_annotated(case, name, len(label)) for name in classes], axis=1)
    if not case.names_all:
        shown = {case.structures.get(int(value)) for value in np.unique(label)}
        said = set(case.annotated or ())
        for number, name in enumerate(classes):
            if name not in shown and not {name, canonical_name(name)} & said:
                spoken[:, number] = False
    return spoken


def _list_unknown(spoken: NDArray[Any]) -> tuple[int, ...]:
    """Numbers of the classes that are not spoken about."""
    return tuple(int(number) + 1 for number in np.flatnonzero(~spoken))


def _pick_slices(case: Case, label: NDArray[Any], classes: Sequence[str], table: NDArray[Any]) -> list[int]:
    """Annotated slices that show a class, at most `MAX_SLICES`, evenly spread; of a volume that shows none, an
    annotated one.
    """
    spoken = table.any(axis=1)
    shown = np.zeros(len(label), dtype=bool)
    for value, name in case.structures.items():
        if name in classes:
            shown |= table[:, classes.index(name)] & (label == value).any(axis=(1, 2))
    chosen = np.flatnonzero(shown if shown.any() else spoken)
    if len(chosen) == 0:
        raise ImageError(
            f"No slice of '{case.name}' is annotated with {', '.join(classes)}. Annotate "
            "one, or leave the image out with option cases."
        )
    return [
        int(z)
        for z in chosen[np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), MAX_SLICES)).round().astype(int))]
    ]


def _number_classes(label: NDArray[Any], case: Case, classes: Sequence[str], spoken: NDArray[Any]) -> NDArray[Any]:
    """Label ids as class numbers: 1 is the first class; other structures, and classes that nobody vouches for here, are
    background.
    """
    strange = sorted({int(value) for value in np.unique(label) if value} - case.structures.keys())
    if strange:
        raise ImageError(
            f"The label of '{case.name}' holds the ids "
            f"{', '.join(map(str, strange[:8]))}, which nothing names. Save it again with "
            "label_info, or name them in labels.json."
        )
    numbers = np.zeros(label.shape, dtype=np.uint8)
    for value, name in case.structures.items():
        if name in classes and spoken[classes.index(name)]:
            numbers[label == value] = classes.index(name) + 1
    return numbers


def _fingerprint(chosen: Chosen, config: AcceptedConfig, sentences: Mapping[str, str]) -> str:
    """Of everything that the result depends on."""
    described = [
        [
            part,
            case.name,
            hash_file(case.image) if case.image.is_file() else "",
            hash_file(case.label),
            sentences.get(case.name),
        ]
        for part, cases in (("training", chosen.training), ("held_out", chosen.held_out))
        for case in cases
    ]
    served = None if chosen.served is None else [chosen.served.full_name, chosen.served.sha256]
    values: list[object] = [chosen.name, served, list(chosen.classes), asdict(config), described]
    if chosen.phrases:
        values.append([[phrase.text, phrase.classes] for phrase in chosen.phrases])
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
