"""What each part of the close-up is worth: the same trained network with one thing taken from it when it answers.

    python benchmarks/close_up_parts.py --studies <BTCV folder> --model <folder> --cases img0024 img0033 img0039 \
        --work <folder> --out benchmarks/results/close_up_parts.json

Dice of the sharpened evidence (that is the consensus) per patient, at the scanner's own pixels, and the paired
difference from the network with everything. Nothing is trained anew, so a part that another could have replaced in
training looks dearer here than it is: `benchmarks/folds.py close-up --settings` trains without one.

* **no text**: the prompt is hidden. **no evidence**: the windows are placed by it, the network does not see it.
  **no evidence nearby**: that of the slice alone. **one slice**: the slice alone, in place of its four neighbours.
* **coarse pixels**: windows of 1.8 mm at least, in place of 0.9. **no ends**: only slices on which something was found.
  **one size**: windows of 96 pixels, as coarse as they must be, in place of 128 for what is large.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folds import EIGHT, draw_structures
from progidiff.evaluation.metrics import compute_dice
from progidiff.images.close_up import WindowRules
from progidiff.model.backbone import Backbone
from progidiff.model.close_up import WindowBatch
from progidiff.model.close_up_folder import load_close_up
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.folder import find_backbone, load_pipeline
from progidiff.model.pipeline import EncodedPrompts
from progidiff.proposals.close_ups import place_on_stack
from progidiff.storage.atomic import atomic_file
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.out_of_fold import keep_evidence, load_pooled_volume
from progidiff.training.slice_cache import list_cases
from progidiff.training.window_pool import PooledVolume

Hide = Callable[[WindowBatch], WindowBatch]


@dataclass(frozen=True)
class Form:
    """How the network is asked.

    Attributes:
        hide: What it does not see.
        rules: Where its windows are.
    """

    hide: Hide = lambda batch: batch
    rules: WindowRules = field(default_factory=WindowRules)


def hide_text(batch: WindowBatch) -> WindowBatch:
    """No prompt."""
    return replace(batch, pooled=torch.zeros_like(batch.pooled))


def hide_evidence(batch: WindowBatch) -> WindowBatch:
    """As where nothing looked before."""
    return replace(batch, evidence=torch.zeros_like(batch.evidence), is_found=torch.zeros_like(batch.is_found))


def repeat_middle(stack: Tensor) -> Tensor:
    """(N, C, S, S) with the middle channel in place of all."""
    middle = stack.shape[1] // 2
    return stack[:, middle : middle + 1].expand_as(stack).contiguous()


def hide_nearby_evidence(batch: WindowBatch) -> WindowBatch:
    """That of the slice, three times."""
    return replace(batch, evidence=repeat_middle(batch.evidence))


def hide_nearby_slices(batch: WindowBatch) -> WindowBatch:
    """The slice, five times."""
    return replace(batch, images=repeat_middle(batch.images))


ALL = "everything"
FORMS = {
    ALL: Form(),
    "no text": Form(hide_text),
    "no evidence": Form(hide_evidence),
    "no evidence nearby": Form(hide_nearby_evidence),
    "one slice": Form(hide_nearby_slices),
    "coarse pixels": Form(rules=WindowRules(finest_mm=1.8)),
    "no ends": Form(rules=WindowRules(beyond_mm=0.0)),
    "one size": Form(rules=WindowRules(large_size=96)),
}


class Blinkered(CloseUpPipeline):
    """A close-up that does not see everything.

    Args:
        inner: The close-up.
        hide: What it does not see.
    """

    def __init__(self, inner: CloseUpPipeline, hide: Hide) -> None:
        super().__init__(inner.network, torch.bfloat16)
        self._hide = hide

    def propose(self, batch: WindowBatch, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """See `CloseUpPipeline.propose`."""
        return super().propose(self._hide(batch), *rest, **options)


def measure_form(
    pipeline: CloseUpPipeline, form: Form, volume: PooledVolume, prompts: EncodedPrompts, structures: Sequence[str]
) -> dict[str, float]:
    """Dice of every structure that the volume has."""
    seeing, found = Blinkered(pipeline, form.hide), {}
    for _, name, truth, drawings in draw_structures(seeing, volume, prompts, structures, 1, form.rules):
        drawn = np.zeros(truth.shape, bool)
        for z, ((rows, columns), maps) in place_on_stack(drawings, lambda drawing: drawing.sharpened).items():
            drawn[z, rows, columns] = (maps >= 0.5).numpy()
        found[name] = compute_dice(drawn, truth)
    return found


def summarise(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Form -> means of 13 and 8 structures, the paired difference from everything, its standard error, and how many
    patients lost.

    Args:
        cells: Form -> patient -> structure -> Dice.
    """
    rows: dict[str, Any] = {}
    whole = {patient: float(np.mean(list(found.values()))) for patient, found in cells[ALL].items()}
    for form, patients in cells.items():
        means = {patient: float(np.mean(list(found.values()))) for patient, found in patients.items()}
        eight = [np.mean([d for name, d in found.items() if name in EIGHT]) for found in patients.values()]
        difference = np.array([means[patient] - whole[patient] for patient in means])
        rows[form] = {
            "13": float(np.mean(list(means.values()))),
            "8": float(np.mean(eight)),
            "difference": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else None,
            "worse": int((difference < 0).sum()),
            "of": len(difference),
        }
    return rows


def main() -> None:
    """Measure all forms; what is measured is kept in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with a close-up")
    parser.add_argument("--cases", nargs="+", required=True, help="that it has not seen")
    parser.add_argument("--work", type=Path, required=True, help="keeps what is measured")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    card, inner = load_pipeline(options.model, Backbone(find_backbone(options.model), "cpu", dtype="fp32"))
    _, network = load_close_up(options.model, torch.device("cpu"), inner.backbone)
    pipeline = CloseUpPipeline(network, torch.bfloat16)
    cases = [case for case in list_cases(options.studies) if case.name in options.cases]
    for _ in keep_evidence(inner.branch, inner.backbone, cases, card.structures, options.work):
        pass
    prompts = PhraseTable(inner.backbone, card.structures).pick_canonical()
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        volume = None
        for name in dict.fromkeys([ALL, *options.forms]):
            path = options.work / f"{case.name}-{name.replace(' ', '-')}.json"
            if not path.is_file():
                volume = volume or load_pooled_volume(case, card.structures, card.conditioning, options.work)
                found = measure_form(pipeline, FORMS[name], volume, prompts, card.structures)
                with atomic_file(path) as target:
                    target.write_text(json.dumps(found), encoding="utf-8")
            cells.setdefault(name, {})[case.name] = json.loads(path.read_text(encoding="utf-8"))
            print(case.name, name, round(float(np.mean(list(cells[name][case.name].values()))), 4), flush=True)
    report = {"command": " ".join(sys.argv), "summary": summarise(cells), "cells": cells}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, row in report["summary"].items():
        print(
            f"| {name} | {row['13']:.3f} | {row['8']:.3f} | {row['difference']:+.3f} | {row['worse']} of {row['of']} |"
        )


if __name__ == "__main__":
    main()
