"""How far clicks go: a simulated person corrects slices and volumes, and every answer is measured.

    python benchmarks/interactive.py --model <model folder> --data <folder of ct, mr, heart, hippocampus> \\
        --work <folder> --out benchmarks/results/interactive.json

The person clicks the middle of the largest wrong piece, as inside or outside, up to ten times. Of CT and MR, volumes
that the model was not trained on are prompted first; of heart and hippocampus, which have no name for it, clicks alone
say what is meant. Three answers, each with its own errors and so its own clicks:

edits          the close-up draws given the clicks, as on the review page: windows, blending, clicked voxels kept
choose         of K proposals drawn without clicks those that agree are kept: what models without a close-up do
random walker  from the clicks (Grady 2006, scikit-image) in the same window and intensities; its border is outside, a
               click is a cross of five pixels; beta and smoothing are chosen on other cases of the same data

Also the length of the outline that a hand would draw instead. On volumes one click goes to the worst slice of all.

What is finished is kept in the work folder by the digest of the weights that it depends on, so that other weights of
the close-up use what was found and walked before, and a stopped run goes on. After `--minutes` of the processor no
further case is begun; the report says which cases it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import random_walker

from progidiff.evaluation.metrics import compute_dice
from progidiff.images.close_up import CloseUpWindow, WindowRules, plan_windows, window_at
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.reading import load_volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.segments import load_label_map
from progidiff.model.close_up_folder import load_close_up
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.clicks import choose_by_clicks
from progidiff.proposals.close_ups import Subject, draw_close_ups, place_on_stack
from progidiff.proposals.engine import Engine, find_autocast
from progidiff.proposals.placed_edits import CLICK_EXTENT_MM, NEIGHBOUR_REACH_MM, PlacedEdits, SliceEdits
from progidiff.proposals.request import ProposalRequest
from progidiff.storage.atomic import atomic_file
from progidiff.training.simulated_edits import find_wrong_piece, place_click
from progidiff.training.slice_cache import Case, list_cases

AFTER = (0, 1, 3, 5, 10)
"""Numbers of clicks that are reported."""

MOST = max(AFTER)
WALKERS = tuple((beta, smooth) for smooth in (0.0, 1.0) for beta in (130.0, 500.0, 2000.0))
"""Settings that the random walker chooses from: beta, and the smoothing of the image before, in pixels."""

Mask = NDArray[np.bool_]
Click = tuple[int, int, bool]
"""(y, x, whether inside) on a slice of the stack."""

Answer = Callable[[Sequence[Click]], Mask]


@dataclass(frozen=True)
class Study:
    """What is measured on.

    Attributes:
        name: Of the folder.
        modality: Of its images.
        cases: What is reported.
        others: Where the random walker's settings are chosen.
        slices: Of every structure of every case.
        is_named: Whether the model is asked by name before anybody clicks.
    """

    name: str
    modality: str
    cases: tuple[str, ...]
    others: tuple[str, ...]
    slices: int
    is_named: bool


STUDIES = (
    Study("ct", "CT", ("img0024", "img0033", "img0039"), ("img0005", "img0021"), 2, True),
    Study("mr", "MR", ("t2spir03", "t2spir08"), ("t2spir01", "t2spir19"), 3, True),
    Study("heart", "MR", (), (), 2, False),
    Study("hippocampus", "MR", (), (), 2, False),
)
UNNAMED_CASES = 8
"""Cases of a study that names none: evenly spaced; those between them are the others."""


@dataclass(frozen=True)
class Known:
    """What a model needs to draw close-ups.

    Attributes:
        engine: Finds.
        pipeline: Draws.
        rules: Of its windows.
        noise, levels: Of the K proposals.
        finder, drawer: Digests of the weights that find, and of those that draw.
    """

    engine: Engine
    pipeline: CloseUpPipeline
    rules: WindowRules
    noise: torch.Tensor
    levels: torch.Tensor
    finder: str
    drawer: str

    @classmethod
    def load(cls, folder: Path, num_proposals: int) -> Known:
        """Load a model folder that has a close-up."""
        engine = Engine(folder, device="cpu")
        card, network = load_close_up(folder, torch.device("cpu"), engine.load().backbone)
        pipeline = CloseUpPipeline(network, find_autocast(torch.device("cpu")), card.presence)
        noise, levels = pipeline.draw_noise(num_proposals, 0), pipeline.draw_levels(num_proposals, 0)
        finder = digest_files(folder / "conditioning", folder / "adapters")
        return cls(engine, pipeline, card.rules, noise, levels, finder, digest_files(folder / "close_up"))

    def plan(self, subject: Subject) -> tuple[CloseUpWindow, ...]:
        """The windows around what was found."""
        threshold = round(self.engine.card.gate * 255)
        return tuple(plan_windows(subject.evidence >= threshold, subject.grid, self.rules))


def digest_files(*folders: Path) -> str:
    """Sixteen digits that other weights have others of."""
    found = hashlib.sha256()
    for path in sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")
    ):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Scene:
    """One structure of a volume.

    Attributes:
        known: The model.
        structure: Its name.
        truth: (Z, Y, X).
        shades: float32 (Z, Y, X), the intensity window in 0..1.
        subject: What the close-up draws.
        windows: Where it was found; none without a name.
    """

    known: Known
    structure: str
    truth: Mask
    shades: NDArray[np.float32]
    subject: Subject
    windows: tuple[CloseUpWindow, ...]
    _first: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(dz, dy, dx) in mm."""
        return self.subject.grid.stack_spacing

    def draw(self, slices: Sequence[int], clicks: Sequence[Click] = ()) -> dict[int, NDArray[np.float32]]:
        """Axial index -> proposals (K, Y, X) in 0..1; clicks are on one slice alone."""
        known, shape = self.known, self.truth.shape
        subject, windows, placed = self.subject, self.windows, place(clicks, slices[0], self.spacing)
        if clicks:
            windows = tuple(placed.plan_windows(windows, shape, known.rules))
            subject = replace(subject, edits=placed.draw)
        card = known.engine.card
        drawings = draw_close_ups(
            known.pipeline,
            subject,
            windows,
            known.noise,
            known.levels,
            known.engine.num_inference_steps,
            np.asarray(slices, np.int64),
            guidance_scale=card.guidance_scale,
        )
        found = {z: np.zeros((len(known.levels), *shape[1:]), np.float32) for z in slices}
        for z, ((rows, columns), maps) in place_on_stack(list(drawings), lambda one: one.probabilities).items():
            found[z][:, rows, columns] = maps.numpy()
        return found

    def first(self, z: int) -> NDArray[np.float32]:
        """The proposals (K, Y, X) before any click."""
        if z not in self._first:
            self._first.update(self.draw([z]))
        return self._first[z]

    def draw_first(self) -> None:
        """Draw all slices, in large batches."""
        shown = sorted({int(z) for window in self.windows for z in window.slices})
        if shown:
            self._first.update(self.draw(shown))

    def crop(self, z: int, clicks: Sequence[Click]) -> CloseUpWindow:
        """The window that a random walker works in: that of the close-up, or one around all clicks."""
        places = np.array([((y + 0.5) * self.spacing[1], (x + 0.5) * self.spacing[2]) for y, x, _ in clicks])
        for window in self.windows:
            reach = 0.45 * window.size * window.spacing
            if window.first <= z <= window.last and (np.abs(places - window.center) <= reach).all():
                return window
        extent = max(CLICK_EXTENT_MM, float(np.ptp(places, axis=0).max()) * 1.3 + 2 * self.known.rules.margin_mm)
        middle = (places.max(0) + places.min(0)) / 2
        at = (z, float(middle[0]), float(middle[1]))
        return window_at(at, extent, self.truth.shape, self.spacing, self.known.rules, reach_mm=NEIGHBOUR_REACH_MM)


def place(clicks: Sequence[Click], z: int, spacing: tuple[float, float, float]) -> PlacedEdits:
    """Clicks on a slice, as a request has them."""
    wanted, unwanted = ([[(y, x)] for y, x, inside in clicks if inside is sign] for sign in (True, False))
    return PlacedEdits({z: SliceEdits(wanted, unwanted)} if clicks else {}, {}, spacing)


def agree(proposals: NDArray[np.float32], clicks: Sequence[Click] = ()) -> Mask:
    """The consensus (Y, X), in which clicked voxels are what was said of them."""
    mask = np.asarray((proposals >= 0.5).mean(0) >= 0.5)
    for y, x, inside in clicks:
        mask[y, x] = inside
    return mask


def answer_by_edits(scene: Scene, z: int) -> Answer:
    """Proposals drawn given the clicks."""
    return lambda clicks: agree(scene.draw([z], clicks)[z] if clicks else scene.first(z), clicks)


def answer_by_choice(scene: Scene, z: int) -> Answer:
    """Of the first proposals those that agree."""
    quantised = (scene.first(z) * 255).round().astype(np.uint8)

    def answer(clicks: Sequence[Click]) -> Mask:
        wanted, unwanted = ([(y, x) for y, x, inside in clicks if inside is sign] for sign in (True, False))
        return np.asarray(choose_by_clicks(quantised, quantised >= 128, wanted, unwanted).mask)

    return answer


def answer_by_walker(scene: Scene, z: int, beta: float, smooth: float) -> Answer:
    """A random walker from the clicks."""

    def answer(clicks: Sequence[Click]) -> Mask:
        mask = np.zeros(scene.truth.shape[1:], bool)
        if not any(inside for _, _, inside in clicks):
            return mask
        window = scene.crop(z, clicks)
        image = window.extract(scene.shades[z : z + 1], [0])[0].numpy()
        marked = {sign: np.zeros(image.shape, bool) for sign in (True, False)}
        for y, x, inside in clicks:
            at = [
                int((index + 0.5) * step / window.spacing - middle / window.spacing + window.size / 2)
                for index, step, middle in zip((y, x), scene.spacing[1:], window.center, strict=True)
            ]
            marked[inside][tuple(np.clip(at, 0, window.size - 1))] = True
        seeds = np.zeros(image.shape, np.int32)
        seeds[[0, -1]], seeds[:, [0, -1]] = 2, 2
        for sign, label in ((False, 2), (True, 1)):  # A cross, but no click is overwritten by another one's.
            seeds[ndimage.binary_dilation(marked[sign])] = label
        seeds[marked[False]] = 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That a solution is not exact to the last digit, and about its solvers.
            shades = ndimage.gaussian_filter(image, smooth) if smooth else image
            share = random_walker(shades, seeds, beta=beta, mode="cg_j", return_full_prob=True)[0]
        mask[window.box] = window.restore(torch.from_numpy(np.asarray(share, np.float32))).numpy() >= 0.5
        return agree(mask[None].astype(np.float32), clicks)

    return answer


def correct(truth: Mask, answer: Answer, most: int = MOST) -> list[float]:
    """Dice after 0, 1, ... `most` clicks on a slice; a person who sees nothing wrong stops."""
    clicks: list[Click] = []
    drawn = answer(clicks)
    scores = [compute_dice(drawn, truth)]
    while len(scores) <= most and (found := find_wrong_piece(truth, drawn)) is not None:
        clicks.append((*place_click(found[0]), found[1]))
        drawn = answer(clicks)
        scores.append(compute_dice(drawn, truth))
    return scores + [scores[-1]] * (most + 1 - len(scores))


def correct_volume(scene: Scene, make: Callable[[Scene, int], Answer], most: int = MOST) -> list[float]:
    """Dice of the volume after 0, 1, ... `most` clicks in all, each where the largest piece of a slice is wrong."""
    drawn = np.stack([agree(scene.first(z)) for z in range(len(scene.truth))])
    clicks: dict[int, list[Click]] = {}
    wrong = {z: find_wrong_piece(scene.truth[z], drawn[z]) for z in range(len(drawn))}
    scores = [compute_dice(drawn, scene.truth)]
    for _ in range(most):
        sizes = {z: int(found[0].sum()) for z, found in wrong.items() if found is not None}
        if not sizes:
            break
        z = max(sizes, key=lambda one: sizes[one])
        piece, is_missing = wrong[z] or (np.zeros((1, 1), bool), False)
        clicks.setdefault(z, []).append((*place_click(piece), is_missing))
        drawn[z] = make(scene, z)(clicks[z])
        wrong[z] = find_wrong_piece(scene.truth[z], drawn[z])
        scores.append(compute_dice(drawn, scene.truth))
    return scores + [scores[-1]] * (most + 1 - len(scores))


def open_scenes(known: Known, study: Study, case: Case, work: Path) -> Iterator[Scene]:
    """The structures of a case; what the model finds is looked for once."""
    volume = load_volume(case.image, study.modality, case.info)
    stack, spacing = volume.to_stack()
    config = known.engine.card.conditioning
    threshold = compute_body_threshold(volume)
    grid = plan_working_grid(stack, spacing, threshold, config.height, config.width, config.spacing_range)
    low, high = compute_window(volume, config.mr_headroom)
    shades = np.clip((stack.astype(np.float32) - low) / (high - low), 0, 1)
    labels = volume.arrange(load_label_map(case.label, volume.grid).array)
    names = sorted(set(case.structures.values()))
    queries = [Query(name, name if study.is_named else "", known=study.is_named) for name in names]
    prompts = known.engine.load().encode_prompts(tuple(query.text for query in queries))
    found: dict[str, NDArray[np.uint8]] = {}
    if study.is_named:
        file = work / "evidence" / f"{known.finder}-{study.name}-{case.name}.npz"
        if not file.is_file():
            request = ProposalRequest(queries=queries, num_proposals=1, slices=(0,))
            known.engine.propose(request, volume)
            evidence = known.engine.recall_evidence(volume, names)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as path, path.open("wb") as handle:
                np.savez_compressed(handle, **{name: evidence[name] for name in names})
        found = dict(np.load(file))
    for p, query in enumerate(queries):
        ids = [value for value, name in case.structures.items() if name == query.name]
        row = p if study.is_named else 0
        tokens, mask = (prompts.tokens, prompts.mask) if study.is_named else (prompts.empty_tokens, prompts.empty_mask)
        subject = Subject(
            stack,
            (low, high),
            found.get(query.name, np.zeros((len(stack), grid.height, grid.width), np.uint8)),
            grid,
            prompts.pooled[p] if study.is_named else torch.zeros_like(prompts.pooled[p]),
            tokens[row],
            None if mask is None else mask[row],
            (prompts.empty_tokens, prompts.empty_mask),
            is_found=study.is_named,
        )
        truth = np.isin(labels, ids)
        if truth.any():
            yield Scene(known, query.name, truth, shades, subject, known.plan(subject))


def pick_slices(scene: Scene, count: int) -> list[int]:
    """Evenly spaced slices that show the structure."""
    shown = np.flatnonzero(scene.truth.any(axis=(1, 2)))
    return sorted({int(shown[int((n + 0.5) / count * len(shown))]) for n in range(min(count, len(shown)))})


def measure_drawing(scenes: Sequence[Scene], study: Study) -> dict[str, Any]:
    """Edits and choice on some slices of a case, on its worst tenth of all slices, and on its volumes."""
    rows: dict[str, Any] = {"slices": [], "volumes": [], "worst": []}
    first: list[tuple[float, Scene, int]] = []
    for scene in scenes:
        if study.is_named:
            scene.draw_first()
            first += [
                (compute_dice(agree(scene.first(z)), scene.truth[z]), scene, int(z))
                for z in np.flatnonzero(scene.truth.any(axis=(1, 2)))
            ]
        for z in pick_slices(scene, study.slices):
            truth = scene.truth[z]
            outline = truth & ~ndimage.binary_erosion(truth)
            row = {"structure": scene.structure, "z": z, "contour": int(outline.sum())}
            for kind, make in (("edits", answer_by_edits), ("choose", answer_by_choice)):
                row[kind] = correct(truth, make(scene, z))
            rows["slices"].append(row)
        if study.is_named:
            makers = {"edits": answer_by_edits, "choose": answer_by_choice}
            scores = {kind: correct_volume(scene, make) for kind, make in makers.items()}
            rows["volumes"].append({"structure": scene.structure, **scores})
    first.sort(key=lambda one: one[0])
    for before, scene, z in first[: max(1, len(first) // 10)] if first else []:
        after = correct(scene.truth[z], answer_by_edits(scene, z), most=1)[1]
        rows["worst"].append({"structure": scene.structure, "z": z, "before": before, "after": after})
    return rows


def measure_walker(scenes: Sequence[Scene], study: Study, setting: tuple[float, float]) -> dict[str, Any]:
    """The random walker on the same slices."""
    rows = [
        {
            "structure": scene.structure,
            "z": z,
            "random walker": correct(scene.truth[z], answer_by_walker(scene, z, *setting)),
        }
        for scene in scenes
        for z in pick_slices(scene, study.slices)
    ]
    return {"slices": rows}


def choose_walker(known: Known, study: Study, cases: Sequence[Case], work: Path) -> dict[str, float]:
    """Mean Dice over 1 to 5 clicks of each setting, on one slice of every structure of some cases."""
    scenes = [scene for case in cases for scene in open_scenes(known, study, case, work)]
    scores: dict[str, float] = {}
    for beta, smooth in WALKERS:
        found = [
            np.mean(correct(scene.truth[z], answer_by_walker(scene, z, beta, smooth), most=5)[1:])
            for scene in scenes
            for z in pick_slices(scene, 1)
        ]
        scores[json.dumps([beta, smooth])] = float(np.mean(found))
    return scores


def measure_case(known: Known, study: Study, case: Case, setting: Sequence[float], work: Path) -> dict[str, Any]:
    """All answers on a case, kept or measured now."""
    name = f"{known.finder}-{study.name}-{case.name}-{study.slices}"
    walked_file = work / "walked" / f"{name}-{setting[0]:g}-{setting[1]:g}.json"
    drawn_file = work / "drawn" / f"{known.drawer}-{len(known.levels)}-{name}.json"
    scenes = [] if walked_file.is_file() and drawn_file.is_file() else list(open_scenes(known, study, case, work))
    walked = remember(walked_file, partial(measure_walker, scenes, study, (setting[0], setting[1])))
    drawn = remember(drawn_file, partial(measure_drawing, scenes, study))
    for row, walk in zip(drawn["slices"], walked["slices"], strict=True):
        row["random walker"] = walk["random walker"]
    return drawn


def summarise(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean Dice after some numbers of clicks, mean clicks to a Dice (one more than the most if never), and how many
    reach it.
    """
    table = np.asarray(scores)
    result = {str(clicks): round(float(table[:, clicks].mean()), 4) for clicks in AFTER}
    for wanted in (0.85, 0.90):
        reached = table >= wanted
        needed = np.where(reached.any(1), reached.argmax(1), table.shape[1])
        result[f"clicks to {wanted:.2f}"] = round(float(needed.mean()), 2)
        result[f"reach {wanted:.2f}"] = round(float(reached.any(1).mean()), 4)
    return result


def report_study(study: Study, parts: dict[str, dict[str, Any]], settings: Sequence[float]) -> dict[str, Any]:
    """The figures of a study from those of its cases."""
    rows = [row for part in parts.values() for row in part["slices"]]
    volumes = [row for part in parts.values() for row in part["volumes"]]
    worst = [row for part in parts.values() for row in part["worst"]]
    kinds = ("edits", "choose", "random walker")
    report: dict[str, Any] = {
        "cases": sorted(parts),
        "slices": len(rows),
        "contour pixels per slice": round(float(np.mean([row["contour"] for row in rows])), 1),
        "random walker": {"beta": settings[0], "smoothing px": settings[1]},
        "per slice": {kind: summarise([row[kind] for row in rows]) for kind in kinds},
        "structures": {
            name: {kind: summarise([row[kind] for row in rows if row["structure"] == name]) for kind in kinds}
            for name in sorted({row["structure"] for row in rows})
        },
    }
    if volumes:
        report["per volume"] = {kind: summarise([row[kind] for row in volumes]) for kind in kinds[:2]}
    if worst:
        gains = [row["after"] - row["before"] for row in worst]
        report["worst tenth of all slices"] = {
            "slices": len(worst),
            "before": round(float(np.mean([row["before"] for row in worst])), 4),
            "gain of one click": round(float(np.mean(gains)), 4),
        }
    return report


def remember(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before, or now."""
    if not file.is_file():
        rows = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as path:
            path.write_text(json.dumps(rows), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def list_study(study: Study, data: Path) -> tuple[list[Case], list[Case]]:
    """The cases that are reported, and those on which settings are chosen."""
    if study.cases:
        return list_cases(data / study.name, study.cases), list_cases(data / study.name, study.others)
    cases = list_cases(data / study.name)
    step = max(2, len(cases) // UNNAMED_CASES)
    return cases[::step][:UNNAMED_CASES], cases[1::step][:3]


def main() -> None:
    """Correct slices of all cases, in turns round the studies, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder that has a close-up")
    parser.add_argument("--data", type=Path, required=True, help="folder of the folders ct, mr, heart, hippocampus")
    parser.add_argument("--work", type=Path, required=True, help="keeps what is finished")
    parser.add_argument("--studies", nargs="*", choices=[study.name for study in STUDIES], help="only these")
    parser.add_argument("--cases", type=int, help="of each study at most so many")
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=15.0, help="of the processor, after which no case is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = Known.load(options.model, options.num_proposals)
    studies = [study for study in STUDIES if not options.studies or study.name in options.studies]
    listed = {study.name: list_study(study, options.data) for study in studies}
    turns = zip_longest(*([(study, case) for case in listed[study.name][0][: options.cases]] for study in studies))
    parts: dict[str, dict[str, Any]] = {study.name: {} for study in studies}
    settings: dict[str, list[float]] = {}
    left_out = []
    for study, case in (turn for group in turns for turn in group if turn is not None):
        if time.process_time() > options.minutes * 60:
            left_out.append(f"{study.name}/{case.name}")
            continue
        if study.name not in settings:
            file = options.work / "walkers" / f"{known.finder}-{study.name}.json"
            scores = remember(file, partial(choose_walker, known, study, listed[study.name][1], options.work))
            settings[study.name] = json.loads(max(scores, key=scores.__getitem__))
        parts[study.name][case.name] = measure_case(known, study, case, settings[study.name], options.work)
        print(f"{study.name}/{case.name}: {time.process_time():.0f} s of the processor", flush=True)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "model": known.engine.model_version,
        "close-up": known.drawer,
        "processor seconds": round(time.process_time()),
        "left out": left_out,
        **{s.name: report_study(s, parts[s.name], settings[s.name]) for s in studies if parts[s.name]},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
