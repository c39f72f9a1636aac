"""How far clicks go: a simulated person corrects slices, and every answer is measured.

    python benchmarks/interactive.py --model <model folder> --studies <folder> --evidence <work folder of folds.py>
    python benchmarks/interactive.py --model <model folder> --studies <folder> --out benchmarks/results/interactive.json

On each slice the person clicks the middle of the largest wrong piece, as inside or outside, up to ten times. Three
answers to the same kind of person: *edits* (the close-up draws given the clicks), *choose* (of K proposals drawn
without clicks those that agree are kept: the former behaviour) and a *random walker* from the clicks (Grady 2006,
scikit-image; the border of the window is outside). Each has its own errors and so its own clicks. With `--evidence`
windows and first answers come from out-of-fold evidence; without it nothing was found before, and clicks alone say what
is meant, as for a structure that no model knows. The contour is what a hand would have to draw: pixels of the truth's
outline.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import random_walker

from progidiff.evaluation.metrics import compute_dice
from progidiff.images.close_up import CloseUpWindow
from progidiff.images.working_grid import WorkingGrid
from progidiff.model.backbone import Backbone
from progidiff.model.close_up_folder import load_close_up
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.folder import load_card
from progidiff.model.pipeline import EncodedPrompts
from progidiff.proposals.clicks import choose_by_clicks
from progidiff.proposals.close_ups import Subject, look
from progidiff.proposals.edit_maps import draw_edit_maps
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.out_of_fold import load_pooled_volume
from progidiff.training.simulated_edits import find_wrong_piece, place_click
from progidiff.training.slice_cache import list_cases
from progidiff.training.window_pool import PooledVolume, plan_sight

AFTER = (0, 1, 3, 5, 10)
"""Numbers of clicks that are reported."""

Mask = NDArray[np.bool_]
Answer = Callable[[Mask, Mask], Mask]
"""Pixels clicked as inside and as outside, each (S, S) -> the mask (S, S)."""


@dataclass(frozen=True)
class Scene:
    """One slice of a structure in its window.

    Attributes:
        image: (S, S) in [0, 1].
        truth: (S, S).
        proposals: (K, S, S) drawn without clicks, in [0, 1].
        draw: Draws (K, S, S) given edit maps.
    """

    image: NDArray[np.float32]
    truth: Mask
    proposals: NDArray[np.float32]
    draw: Callable[[torch.Tensor], NDArray[np.float32]]


def correct(truth: Mask, answer: Answer, most: int = max(AFTER)) -> list[float]:
    """Dice after 0, 1, ... `most` clicks; a person who sees nothing wrong stops."""
    wanted, unwanted = np.zeros_like(truth), np.zeros_like(truth)
    drawn = answer(wanted, unwanted)
    scores = [compute_dice(drawn, truth)]
    for _ in range(most):
        found = find_wrong_piece(truth, drawn)
        if found is None:
            scores += [scores[-1]] * (most + 1 - len(scores))
            break
        piece, is_missing = found
        (wanted if is_missing else unwanted)[place_click(piece)] = True
        drawn = answer(wanted, unwanted)
        scores.append(compute_dice(drawn, truth))
    return scores


def answer_by_edits(scene: Scene) -> Answer:
    """Proposals drawn given the clicks; their majority, and what was clicked."""

    def answer(wanted: Mask, unwanted: Mask) -> Mask:
        if not (wanted.any() or unwanted.any()):
            return np.asarray((scene.proposals >= 0.5).mean(0) >= 0.5)
        maps = draw_edit_maps(len(wanted), wanted, unwanted)
        return np.asarray(((scene.draw(maps) >= 0.5).mean(0) >= 0.5) & ~unwanted | wanted)

    return answer


def answer_by_choice(scene: Scene) -> Answer:
    """Of the first proposals those that agree."""
    quantised = (scene.proposals * 255).round().astype(np.uint8)

    def answer(wanted: Mask, unwanted: Mask) -> Mask:
        places = [[(int(y), int(x)) for y, x in np.argwhere(clicks)] for clicks in (wanted, unwanted)]
        return np.asarray(choose_by_clicks(quantised, quantised >= 128, places[0], places[1]).mask)

    return answer


def answer_by_walker(scene: Scene) -> Answer:
    """A random walker from the clicks; the border of the window is outside."""

    def answer(wanted: Mask, unwanted: Mask) -> Mask:
        if not wanted.any():
            return np.zeros_like(wanted)
        seeds = np.zeros(wanted.shape, np.int32)
        seeds[[0, -1]], seeds[:, [0, -1]] = 2, 2
        # A click is as large as a fingertip: a single pixel of a noisy image says little.
        seeds[ndimage.binary_dilation(unwanted)] = 2
        seeds[ndimage.binary_dilation(wanted)] = 1
        return np.asarray(random_walker(scene.image, seeds, beta=400, mode="cg_j") == 1)

    return answer


ANSWERS: dict[str, Callable[[Scene], Answer]] = {
    "edits": answer_by_edits,
    "choose": answer_by_choice,
    "random walker": answer_by_walker,
}


def make_scene(
    pipeline: CloseUpPipeline,
    volume: PooledVolume,
    label: int,
    window: CloseUpWindow,
    z: int,
    prompts: EncodedPrompts | None,
    num_proposals: int,
) -> Scene:
    """Look at a slice of a structure; without prompts nothing is known but what is clicked."""
    is_found = volume.evidence is not None and volume.grid is not None and prompts is not None
    if is_found:
        assert volume.evidence is not None
        assert volume.grid is not None
        assert prompts is not None
        evidence, grid = np.ascontiguousarray(volume.evidence[:, label - 1]), volume.grid
        pooled, tokens = prompts.pooled[label - 1], prompts.tokens[label - 1]
        mask = None if prompts.mask is None else prompts.mask[label - 1]
    else:
        depth, rows, columns = volume.image.shape
        grid = WorkingGrid((depth, rows, columns), volume.spacing, (0.0, 0.0), 1.0, 8, 8)
        evidence = np.zeros((depth, 8, 8), np.uint8)
        width = pipeline.network.config.text_features
        pooled, tokens, mask = torch.zeros(width), torch.zeros(1, width), None
    subject = Subject(volume.image, (0.0, 255.0), evidence, grid, pooled, tokens, mask, is_found=is_found)
    noise, levels = pipeline.draw_noise(num_proposals, 0), pipeline.draw_levels(num_proposals, 0)
    batch = look(pipeline, subject, window, np.array([z]))

    def draw(maps: torch.Tensor | None) -> NDArray[np.float32]:
        batch.edits = None if maps is None else maps[None]
        token_mask = None if mask is None else mask[None]
        return pipeline.propose(batch, tokens[None], token_mask, noise, levels)[1][0].numpy()

    first = draw(None) if is_found else np.zeros((num_proposals, window.size, window.size), np.float32)
    truth = window.extract((volume.labels == label)[z : z + 1].astype(np.float32), [0])[0].numpy() >= 0.5
    image = batch.images[0, pipeline.network.config.num_neighbours].numpy() / 2 + 0.5
    return Scene(image, truth, first, draw)


def pick_slices(shown: NDArray[np.int64], window: CloseUpWindow, count: int) -> list[int]:
    """Evenly spaced slices that show the structure in the window."""
    inside = shown[(shown >= window.first) & (shown <= window.last)]
    if not len(inside):
        return []
    return sorted({int(inside[round((n + 0.5) / count * len(inside) - 0.5)]) for n in range(min(count, len(inside)))})


def summarise(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means after some numbers of clicks, what one click does for the worst tenth, and clicks to a Dice."""
    table = np.asarray(scores)
    worst = np.argsort(table[:, 0], kind="stable")[: max(1, len(table) // 10)]
    result: dict[str, Any] = {str(clicks): round(float(table[:, clicks].mean()), 4) for clicks in AFTER}
    result["worst tenth, gain of one click"] = round(float((table[worst, 1] - table[worst, 0]).mean()), 4)
    for wanted in (0.85, 0.90):
        reached = table >= wanted
        needed = np.where(reached.any(1), reached.argmax(1), table.shape[1])
        result[f"clicks to {wanted:.2f}"] = round(float(needed.mean()), 2)
        result[f"reach {wanted:.2f}"] = round(float(reached.any(1).mean()), 4)
    return result


def main() -> None:
    """Correct slices of all cases and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--studies", type=Path, required=True)
    parser.add_argument("--evidence", type=Path, help="work folder with out-of-fold evidence; without it clicks alone")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--most-cases", type=int, default=20)
    parser.add_argument("--slices", type=int, default=4, help="of every structure of every case")
    parser.add_argument("--num-proposals", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu")
    close_up, network = load_close_up(options.model, device)
    pipeline, rules = CloseUpPipeline(network, torch.bfloat16), close_up.rules
    card, backbone = load_card(options.model), Backbone(options.model / "backbone", "cpu", dtype="fp32")
    cases = list_cases(options.studies, options.cases)
    cases = cases[:: max(1, len(cases) // options.most_cases)][: options.most_cases]
    names = tuple(card.structures) if options.evidence else tuple(dict.fromkeys(cases[0].structures.values()))
    prompts = PhraseTable(backbone, names).pick_canonical() if options.evidence else None
    scores: dict[str, dict[str, list[list[float]]]] = {name: {kind: [] for kind in ANSWERS} for name in names}
    contours: list[int] = []
    for case in cases:
        volume = load_pooled_volume(case, names, card.conditioning, options.evidence)
        for label in volume.known:
            windows = plan_sight(volume, label, card.gate, rules)
            shown = np.flatnonzero((volume.labels == label).any(axis=(1, 2)))
            for z in pick_slices(shown, windows[0], options.slices) if windows else []:
                scene = make_scene(pipeline, volume, label, windows[0], z, prompts, options.num_proposals)
                if not scene.truth.any():
                    continue
                contours.append(int((scene.truth & ~ndimage.binary_erosion(scene.truth)).sum()))
                for kind, make in ANSWERS.items():
                    scores[names[label - 1]][kind].append(correct(scene.truth, make(scene)))
        print(case.name, flush=True)
    report = {
        "command": " ".join(sys.argv),
        "cases": [case.name for case in cases],
        "contour pixels per slice": round(float(np.mean(contours)), 1),
        "all": {kind: summarise([row for name in names for row in scores[name][kind]]) for kind in ANSWERS},
        "structures": {
            name: {kind: summarise(rows) for kind, rows in kinds.items()}
            for name, kinds in scores.items()
            if kinds["edits"]
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
