"""Where a sentence decides: one head that draws what it is asked for, from a few labelled pictures.

    python benchmarks/text_selection.py --task chest --data ../shared/data/cxr --out
    benchmarks/results/text_selection_chest.json
    python benchmarks/text_selection.py --task organs --data ../shared/data/ct --out
    benchmarks/results/text_selection_ct.json
    python benchmarks/text_selection.py --task organs --data ../shared/data/mr --held-out t2spir03 t2spir08 --out
    benchmarks/results/text_selection_mr.json
    python benchmarks/text_selection.py --task chest --data ../shared/data/cxr --head
    apps/progidiff/model/textdiff/chest --unseen-every 4 --out benchmarks/results/text_selection_shipped.json
    python benchmarks/text_selection.py --summarise benchmarks/results/text_selection_chest.json

For every seed the training pictures are shuffled once and the first 1, 5, 12, 40 are a training set, so that smaller
sets lie in larger ones. Phrases are texts and no labels, so every training reads all of them. What is measured are the
held-out pictures, at their own resolution and at threshold 0.5, which was fixed before; settings were tried on the
first 24 of them with one training set of 12.

* **right**: the first phrase of each selection ("left lung"). **unseen**: sentences of another table, none of which any
  training shows, each in every `--unseen-every`th picture.
* **empty**: no sentence. **swapped**: the sentence of the other side against the side that was meant; "swapped, other
  side" scores the same masks against the side that they were asked for. **another picture's**: every picture is given
  one phrase by lot, and is asked that of another one.
* **left out**: the text's contribution is left out of the network, so all classes are drawn: the best that can be done
  without reading.
* **multi-class**: the class map of the same network before the gate, each class by its number. The gate learns from
  phrases alone and the map from labels alone.
* **no text: multi-class**: a second training, on the same pictures with the same recipe, of a head that has neither
  gate nor text branch; each class by its number. **no text: right**: what such a head can answer to a sentence, which
  it does not read: all classes (`--no-text` sizes).
* **attention**: the head as the TextDiff paper has it: image tokens attend to the words, no gate; the same phrases,
  drawn anew for every crop. For `--attention` sizes only.
* **volume model** (organs): the server's model for volumes, asked by name, on the same slices (the consensus of two
  proposals), with the adapter that the server takes for the modality by itself. `--held-out` must name volumes that
  neither learned from.

`organs` takes slices of a datastore as pictures: for every seed and size training slices come from the volumes that are
not held out, evenly spread through them, one volume after the other.

`--head` trains nothing and measures a head that is there, at its own threshold; `--picture` writes what it draws on
three held-out pictures, asked for each selection and without a sentence.

Each training is kept in the work folder when it is done; a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from progidiff.images.reading import load_label, load_volume
from progidiff.labels.cases import list_labelled, load_label_names
from progidiff.prompts.parser import heldout_phrases
from progidiff.textdiff.data import PictureCase, find_cases, read_classes
from progidiff.textdiff.evaluate import compute_scores, shuffle_sentences
from progidiff.textdiff.feature_cache import FeatureCache
from progidiff.textdiff.features import DiffusionFeatures, FeatureOptions
from progidiff.textdiff.model import TextDiffModel, default_folder, load_textdiff
from progidiff.textdiff.phrases import Phrase, compose_phrases, group_phrases, keep_classes, read_phrases
from progidiff.textdiff.pictures import read_picture, resize, to_working
from progidiff.textdiff.sentences import SentenceEncoder, mirror_sentence
from progidiff.textdiff.slices import render_slice
from progidiff.textdiff.teach import read_asked
from progidiff.textdiff.train import HeadOptions, TextDiffTrainConfig, train_textdiff
from progidiff.textdiff.weights import read_json
from progidiff.training.loop import Schedule, find_autocast_dtype

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent

CHEST = ("right lung", "left lung")
READ_TABLES = ("unseen", "two_sided", "last")
"""Sentences that no training reads. On "two_sided" one list of training phrases was tried before the last one was
made; "last" was written then and asked once.
"""

ARMS = ("gate", "attention", "no text")

HELD_OUT_VOLUMES = ("img0024", "img0033", "img0039")
"""Those that the server's volume model held back."""


@dataclass(frozen=True)
class Task:
    """What is asked of which pictures.

    Attributes:
        classes: Names, label value 1 first.
        training, held_out: Pictures with class numbers as masks.
        phrases: That trainings read.
        unseen: That none reads.
    """

    classes: tuple[str, ...]
    training: list[PictureCase]
    held_out: list[PictureCase]
    phrases: tuple[Phrase, ...]
    unseen: tuple[Phrase, ...]


class Memory(SentenceEncoder):
    """An encoder that reads each sentence once: all trainings of a run read the same ones."""

    @classmethod
    def of(cls, encoder: SentenceEncoder) -> Memory:
        """The same encoder, with a memory."""
        found = cls.__new__(cls)
        found.__dict__.update(encoder.__dict__)
        found._known = {}
        return found

    def encode(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `SentenceEncoder.encode`."""
        new = sorted({text for text in sentences if text not in self._known}, key=len)
        for start in range(0, len(new), 32):
            part = new[start : start + 32]
            for text, tokens, mask in zip(part, *super().encode(part), strict=True):
                self._known[text] = tokens[mask].clone()
        longest = max(len(self._known[text]) for text in sentences)
        tokens = torch.zeros(len(sentences), longest, self.features)
        mask = torch.zeros(len(sentences), longest, dtype=torch.bool)
        for row, text in enumerate(sentences):
            words = self._known[text]
            tokens[row, : len(words)], mask[row, : len(words)] = words, True
        return tokens, mask


def open_chest(data: Path) -> Task:
    """The chest X-rays, 1 the right lung, which lies on the image's left, 2 the left one."""
    training, held_out = (
        [replace(case, sentence=None) for case in find_cases(data / part)] for part in ("train", "val")
    )
    tables = (read_phrases(HERE / f"chest_phrases{kind}.csv", CHEST) for kind in ("", "_unseen"))
    return Task(CHEST, training, held_out, *tables)


def open_organs(data: Path, work: Path, per_volume: int, held_out: Sequence[str]) -> Task:
    """Axial slices of a datastore as pictures; written once."""
    names = load_label_names(data)
    classes = tuple(names[value] for value in sorted(names))
    training: list[list[PictureCase]] = []
    kept: list[PictureCase] = []
    for case in list_labelled(data, None):
        slices = _write_slices(case, work / data.name, per_volume)
        if case.name in held_out:
            kept += slices
        else:
            training.append(slices)
    texts = [Phrase(text, (number,)) for number, name in enumerate(classes, start=1) for text in heldout_phrases(name)]
    mixed = [slices[k] for k in range(per_volume) for slices in training if k < len(slices)]
    return Task(classes, mixed, kept, compose_phrases(classes), tuple(texts))


def _write_slices(case: Any, folder: Path, count: int) -> list[PictureCase]:
    """Slices that show something, evenly spread, the middle ones first."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{case.name}.json"
    if not kept.is_file():
        volume = load_volume(case.image)
        label = volume.arrange(load_label(case.label, like=volume.grid))
        shown = np.flatnonzero((label > 0).any(axis=(1, 2)))
        chosen = shown[np.linspace(0, len(shown) - 1, count + 2).round().astype(int)[1:-1]]
        order = sorted(chosen.tolist(), key=lambda z: abs(z - float(np.median(chosen))))
        for z in order:
            Image.fromarray(render_slice(volume, z)).save(folder / f"{case.name}-{z:03d}.png")
            Image.fromarray(label[z].astype(np.uint8)).save(folder / f"{case.name}-{z:03d}.label.png")
        kept.write_text(json.dumps(order), encoding="utf-8")
    return [
        PictureCase(
            f"{case.name}-{z:03d}", folder / f"{case.name}-{z:03d}.png", folder / f"{case.name}-{z:03d}.label.png"
        )
        for z in json.loads(kept.read_text(encoding="utf-8"))
    ]


def make_config(task: Task, options: argparse.Namespace) -> TextDiffTrainConfig:
    """The recipe of a head."""
    return TextDiffTrainConfig(
        name=options.task,
        classes=task.classes,
        tensorboard=False,
        features=FeatureOptions(
            timesteps=(50, 150),
            blocks=tuple(options.blocks),
            scale=None,
            size=options.size,
            picture=3 in options.blocks,
            tone=(0.0, 0.0, 0.0, 0.5, 0.5, 0.5) if options.task == "chest" else None,
            mirror=False,
            own_scale=True,
            draws=options.draws,
        ),
        head=HeadOptions(width=64, base=16, gate=True),
        crop=options.size,
        batch_size=4,
        views=1,
        move=0.12,
        color=0.2,
        sentence_dropout=0.1,
        one_piece=options.task == "chest",
        schedule=Schedule(
            steps=options.steps,
            learning_rate=options.learning_rate,
            warmup=20,
            ema_decay=0.97,
            checkpoint_every=100_000,
        ),
    )


def count_views(size: int, most: int) -> int:
    """Of each picture: `most` of one, fewer with more pictures, about twice as many in all."""
    return max(1, min(most, 2 * most // size))


@torch.no_grad()
def draw(
    model: TextDiffModel, cache: FeatureCache, case: PictureCase, texts: Sequence[str | None], attend: bool = True
) -> NDArray[Any]:
    """Class numbers (texts, H, W) that a picture gets for each text, as `TextDiffModel.predict` draws them; the
    features are computed once.
    """
    picture, options = read_picture(case.image), model.card.features
    working = to_working(picture.pixels, options.scale, options.size, options.tone)
    tokens = mask = None
    if model.encoder is not None:
        tokens, mask = model.encoder.encode([text or "nothing" for text in texts])
        mask &= torch.tensor([text is not None for text in texts])[:, None]
    dtype = find_autocast_dtype("auto", torch.device("cpu"))
    height, width = working.shape[1:]
    answers = []
    for number in range(options.draws):
        features = [maps.expand(len(texts), -1, -1, -1).float() for maps in cache.get(model.extractor, working, number)]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model.head(features, tokens, mask, attend=attend)
        found = logits.float().softmax(dim=1)[:, 1:, :height, :width]
        answers.append(resize(found, picture.size).clamp(0, 1).numpy())
    return np.stack([model.draw_mask(p) for p in np.mean(answers, axis=0)])


def measure(model: TextDiffModel, cache: FeatureCache, task: Task, unseen_every: int, seed: int) -> dict[str, Any]:
    """Dice of every held-out picture, per control and selection.

    Returns:
        control -> selection -> one Dice per picture. Pictures whose label shows nothing of a selection are left out of
        it; "drawn" holds the share of the picture that is drawn where nothing of it is there.
    """
    groups = {classes: texts[0] for classes, texts in group_phrases(task.phrases).items() if classes}
    names = {classes: ", ".join(task.classes[n - 1] for n in classes) for classes in groups}
    lots = np.random.default_rng(seed).integers(len(groups), size=len(task.held_out))
    own = [list(groups.values())[lot] for lot in lots]
    others = shuffle_sentences(own, seed)
    asked = {text: classes for classes, text in groups.items()}
    found: dict[str, dict[str, list[float]]] = {}

    def note(control: str, name: str, mask: NDArray[Any], truth: NDArray[Any], wanted: Sequence[int]) -> None:
        meant = keep_classes(truth, wanted) > 0
        if meant.any() or not wanted:
            score = compute_scores(mask > 0, meant)[0]
            found.setdefault(control, {}).setdefault(name, []).append(score)

    for number, case in enumerate(task.held_out):
        truth = read_classes(case, read_picture(case.image).size, len(task.classes))
        unseen = task.unseen if number % unseen_every == 0 else ()
        texts = [*groups.values(), None, *(phrase.text for phrase in unseen)]
        masks = {} if model.encoder is None else dict(zip(texts, draw(model, cache, case, texts), strict=True))
        everything = draw(model, cache, case, [None], attend=False)[0]
        if model.encoder is None:  # It draws the same whatever it is asked.
            for classes in groups:
                note("right", names[classes], everything, truth, classes)
                note("multi-class", names[classes], keep_classes(everything, classes), truth, classes)
            continue
        for classes, text in groups.items():
            note("right", names[classes], masks[text], truth, classes)
            note("empty", names[classes], masks[None], truth, classes)
            if model.head.gate is not None:
                note("left out", names[classes], everything, truth, classes)
                note("multi-class", names[classes], keep_classes(everything, classes), truth, classes)
            other = _find_other_side(groups, text)
            if other is not None:
                note("swapped", names[classes], masks[groups[other]], truth, classes)
                note("swapped, other side", names[classes], masks[groups[other]], truth, other)
        note("another picture's", names[asked[own[number]]], masks[others[number]], truth, asked[own[number]])
        for phrase in unseen:
            note("unseen", names.get(phrase.classes, "nothing"), masks[phrase.text], truth, phrase.classes)
            note("each unseen", phrase.text, masks[phrase.text], truth, phrase.classes)
    return found


def _find_other_side(groups: Mapping[tuple[int, ...], str], text: str) -> tuple[int, ...] | None:
    other = mirror_sentence(text, horizontal=True)
    return next((classes for classes, name in groups.items() if name == other and other != text), None)


def train(task: Task, cases: Sequence[PictureCase], config: TextDiffTrainConfig, tools: Tools) -> TextDiffModel:
    """A head on these pictures."""
    return train_textdiff(
        cases,
        denoiser=tools.extractor,
        encoder=tools.encoder,
        phrases=task.phrases if config.use_text else (),
        work=tools.work / "runs" / hashlib.sha256(repr((config, [c.name for c in cases])).encode()).hexdigest()[:12],
        cache=tools.cache.folder,
        config=config,
    ).model


@dataclass(frozen=True)
class Tools:
    """What all trainings share."""

    extractor: DiffusionFeatures
    encoder: Memory
    cache: FeatureCache
    work: Path


def run(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """All trainings, each kept when it is done."""
    config = make_config(task, options)
    tools = Tools(
        DiffusionFeatures.load(options.denoiser, config.features),
        Memory.of(SentenceEncoder.load()),
        FeatureCache(options.work / "features", 40),
        options.work,
    )
    cells = [("gate", size, seed) for seed in options.seeds for size in options.sizes]
    cells += [("attention", size, seed) for seed in options.seeds for size in options.attention]
    cells += [("no text", size, seed) for seed in options.seeds for size in options.no_text]
    results = []
    for arm, size, seed in cells:
        setting = replace(
            config,
            seed=seed,
            views=count_views(size, options.views),
            use_text=arm != "no text",
            head=replace(config.head, gate=arm == "gate"),
        )
        name = f"{options.task}-{options.data.name}-{arm.replace(' ', '-')}-{size}-{seed}-{_digest(setting)}.json"
        path = options.work / "cells" / name
        if not path.is_file():
            cases = pick_training(task, size, seed)
            started = time.process_time()
            model = train(task, cases, setting, tools)
            seconds = time.process_time() - started
            scores = measure(model, tools.cache, task, options.unseen_every, seed)
            cell = {"arm": arm, "size": size, "seed": seed, "seconds": round(seconds, 1), "scores": scores}
            cell["cases"] = [case.name for case in cases]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(f".{os.getpid()}").write_text(json.dumps(cell), encoding="utf-8")
            os.replace(path.with_suffix(f".{os.getpid()}"), path)
            right = mean(mean(values) for values in scores["right"].values())
            print(f"{path.stem}: {right:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        results.append(json.loads(path.read_text(encoding="utf-8")))
    report = {
        "command": options.command,
        "config": asdict(config),
        "denoiser": tools.extractor.digest,
        "cells": results,
    }
    if options.volume_model:
        report["volume model"] = measure_volume_model(task, options)
    return {**report, "summary": summarise(report)}


def measure_head(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """A head that is there, under every control."""
    model = load_textdiff(options.head, "cpu")
    assert model.encoder is not None
    model.encoder = Memory.of(model.encoder)
    cache = FeatureCache(options.work / "features", 40)
    if options.picture:
        write_panels(model, cache, task, options.picture)
    scores = measure(model, cache, task, options.unseen_every, 0)
    size = len(read_json(model.folder / "run.json")["training_cases"]) if model.folder else 0
    report = {
        "command": options.command,
        "head": model.card.full_name,
        "sha256": model.card.sha256,
        "threshold": model.card.threshold,
        "read": {} if options.task != "chest" else measure_reading(model),
        "cells": [{"arm": "gate", "size": size, "seed": 0, "scores": scores}],
    }
    return {**report, "summary": summarise(report)}


def measure_reading(model: TextDiffModel) -> dict[str, Any]:
    """How many sentences of each table that no training reads open the right gates and no other; no picture is
    needed.
    """
    found: dict[str, Any] = {}
    for kind in READ_TABLES:
        table = read_phrases(HERE / f"chest_phrases_{kind}.csv", CHEST)
        read = read_asked(model, [phrase.text for phrase in table])
        wrong = [phrase.text for phrase, asked in zip(table, read, strict=True) if asked != phrase.classes]
        found[kind] = {"right": len(table) - len(wrong), "of": len(table), "wrong": wrong}
    return found


def write_panels(model: TextDiffModel, cache: FeatureCache, task: Task, path: Path) -> None:
    """Three pictures, each plain, then as it is drawn for each selection, then without a sentence."""
    texts = [*(texts[0] for classes, texts in group_phrases(task.phrases).items() if classes), None]
    rows = []
    for case in task.held_out[:: max(1, len(task.held_out) // 3)][:3]:
        plain = read_picture(case.image).pixels.permute(1, 2, 0).numpy()
        panels = [plain]
        for mask in draw(model, cache, case, texts):
            panel = plain.copy()
            for value in range(1, 1 + len(task.classes)):
                panel[mask == value, value % 3] = 255
            panels.append(panel)
        rows.append(np.concatenate(panels, axis=1))
    width = min(row.shape[1] for row in rows)
    Image.fromarray(np.concatenate([row[:, :width] for row in rows])).save(path)


def pick_training(task: Task, size: int, seed: int) -> list[PictureCase]:
    """The training pictures of a seed, smaller sets within larger ones. Slices come from one volume after the other,
    those of its middle first.
    """
    if not any("-" in case.name for case in task.training):
        ordered = sorted(task.training, key=lambda case: hashlib.sha256(f"{seed}:{case.name}".encode()).digest())
        return ordered[:size]
    volumes: dict[str, list[PictureCase]] = {}
    for case in task.training:
        volumes.setdefault(case.name.rpartition("-")[0], []).append(case)
    order = sorted(volumes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return [volumes[name][(k + number) % len(volumes[name])] for k in range(9) for number, name in enumerate(order)][
        :size
    ]


def measure_volume_model(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """The server's model for volumes on the same slices: selection -> one Dice per slice that shows it."""
    from progidiff.prompts.parser import Query
    from progidiff.proposals.engine import Engine
    from progidiff.proposals.request import ProposalRequest

    engine = Engine(options.model, device="cpu")
    found: dict[str, list[float]] = {}
    volumes: dict[str, list[PictureCase]] = {}
    for case in task.held_out:
        volumes.setdefault(case.name.rpartition("-")[0], []).append(case)
    known = [name for name in task.classes if name in engine.structures]
    for name, slices in volumes.items():
        image = next(path for path in options.data.iterdir() if path.name.startswith(f"{name}."))
        numbers = [int(case.name.rpartition("-")[2]) for case in slices]
        request = ProposalRequest(
            queries=[Query(text, text, known=True) for text in known], num_proposals=2, slices=numbers
        )
        proposals = engine.propose(request, load_volume(image))
        for case, z in zip(slices, numbers, strict=True):
            truth = read_classes(case, read_picture(case.image).size, len(task.classes))
            for text in known:
                meant = truth == task.classes.index(text) + 1
                if meant.any():
                    drawn = proposals.slice_masks(text, z)
                    score = compute_scores(drawn.sum(axis=0) * 2 >= len(drawn), meant)[0]
                    found.setdefault(text, []).append(score)
    return found


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """arm and control -> size -> mean Dice of single classes ("one"), of several at once ("several"), and the standard
    deviation over seeds of "one".
    """
    rows: dict[str, dict[str, Any]] = {}
    for size in sorted({cell["size"] for cell in report["cells"]}):
        for arm in ARMS:
            cells = [cell for cell in report["cells"] if cell["arm"] == arm and cell["size"] == size]
            for control in dict.fromkeys(control for cell in cells for control in cell["scores"]):
                if control == "each unseen":
                    continue
                one = [_mean_of(cell["scores"][control], several=False) for cell in cells]
                several = [_mean_of(cell["scores"][control], several=True) for cell in cells]
                rows.setdefault(f"{arm}: {control}", {})[str(size)] = {
                    "one": mean(one),
                    "sd": stdev(one) if len(one) > 1 else 0.0,
                    "several": None if None in several else mean(several),
                    "nothing": _mean_values(cell["scores"][control].get("nothing", []) for cell in cells),
                }
    worst = {
        text: mean(mean(cell["scores"]["each unseen"][text]) for cell in report["cells"] if cell["arm"] == "gate")
        for text in (report["cells"][0]["scores"].get("each unseen") or {})
    }
    found: dict[str, Any] = {"rows": rows, "unseen": dict(sorted(worst.items(), key=lambda item: item[1]))}
    if "volume model" in report:
        found["volume model"] = mean(mean(values) for values in report["volume model"].values())
    return found


def _mean_of(scores: Mapping[str, Sequence[float]], several: bool) -> Any:
    values = [mean(v) for name, v in scores.items() if (", " in name) == several and name != "nothing"]
    return mean(values) if values else None


def _mean_values(lists: Iterable[Sequence[float]]) -> float | None:
    values = [value for part in lists for value in part]
    return mean(values) if values else None


def format_table(summary: Mapping[str, Any]) -> str:
    """Markdown."""
    sizes = sorted({size for row in summary["rows"].values() for size in row}, key=int)
    lines = [f"| Dice with so many labelled pictures | {' | '.join(sizes)} |", f"|---{'|---' * len(sizes)}|"]
    for name, row in summary["rows"].items():
        for kind in ("one", "several", "nothing"):
            cells = ["" if s not in row or row[s][kind] is None else f"{row[s][kind]:.3f}" for s in sizes]
            if any(cells):
                if kind == "one":
                    cells = [
                        f"{cell} ± {row[s]['sd']:.3f}" if cell else "" for cell, s in zip(cells, sizes, strict=True)
                    ]
                lines.append(f"| {name}, {kind} | {' | '.join(cells)} |")
    if "volume model" in summary:
        lines.append(f"\nvolume model: {summary['volume model']:.3f}")
    lines += ["\nunseen sentences below 0.8:"]
    lines += [f"{value:.2f} {text}" for text, value in summary["unseen"].items() if value < 0.8]
    return "\n".join(lines)


def _digest(config: Any) -> str:
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True, default=str).encode()).hexdigest()[:8]


def _round(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 4))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("chest", "organs"), default="chest")
    parser.add_argument("--data", type=Path, help="chest: folder with train/ and val/; organs: a datastore")
    parser.add_argument("--held-out", nargs="+", default=list(HELD_OUT_VOLUMES), help="organs: volumes to measure on")
    parser.add_argument("--per-volume", type=int, default=8, help="organs: slices of a volume")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 5, 12, 40])
    parser.add_argument("--attention", type=int, nargs="*", default=[], help="sizes at which attention is trained too")
    parser.add_argument(
        "--no-text", type=int, nargs="*", default=[], help="sizes at which a head without text is trained"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64, help="working pixels along a side")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1, 2, 3], help="decoder blocks, 0 is the coarsest")
    parser.add_argument("--draws", type=int, default=1, help="noises of the views, and that an answer averages over")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--views", type=int, default=12, help="of one picture; fewer with more pictures")
    parser.add_argument("--unseen-every", type=int, default=20, help="unseen sentences on every so many pictures")
    parser.add_argument("--volume-model", action="store_true", help="organs: the volume model on the same slices")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--denoiser", type=Path, default=default_folder() / "denoiser")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "text_selection")
    parser.add_argument("--head", type=Path, help="measure this version, or served version, and train nothing")
    parser.add_argument("--picture", type=Path, help="with --head: PNG of what it draws")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summarise", type=Path, help="only the table of this JSON file")
    options = parser.parse_args(arguments)
    if options.summarise:
        print(format_table(summarise(json.loads(options.summarise.read_text(encoding="utf-8")))))
        return
    if options.data is None:
        parser.error("--data is needed, or --summarise")
    torch.set_num_threads(options.threads)
    options.command = shlex.join(["python", "benchmarks/text_selection.py", *(arguments or sys.argv[1:])])
    if options.task == "chest":
        task = open_chest(options.data)
    else:
        task = open_organs(options.data, options.work / "slices", options.per_volume, options.held_out)
    report = measure_head(task, options) if options.head else run(task, options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(_round(report), indent=1) + "\n", encoding="utf-8")
    print(format_table(report["summary"]))


if __name__ == "__main__":
    main()
