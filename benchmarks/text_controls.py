"""Does the prompt decide what is drawn? The right name against wrong, empty, swapped and never-seen ones.

    python benchmarks/text_controls.py --studies ../shared/data/ct --cases img0024 img0033 img0039 --out
    benchmarks/results/text_controls.json

Every text is drawn on every sixth slice (K = 4, consensus, no clean-up), and its mask is scored against the structure
that was *meant*: Dice pooled over the slices of a case, mean over cases, mean over structures.

* **right**: the structure's name. **training synonyms**: other phrases that training showed
  (`prompts.training_phrases`).
* **unseen synonyms**: phrases that training never showed (`prompts.heldout_phrases`). **descriptions**: a plain
  sentence that does not name the structure, written for this test before it was run once.
* **shuffled**: the name of another structure, by one permutation without a fixed point (seed 0). **any other name**:
  the mean over all other names. **swapped**: "left" for "right" of the four structures that have a side; "swapped,
  other side" scores the same masks against the side that the text names, which is what right scores on these four.
* **empty**: no name in the template that every prompt goes through. **unrelated**: things that are not in an abdominal
  CT or not structures of the model; what counts is the share of slices on which anything is drawn.

The server reads prompts before the model does (`progidiff.prompts.parser`): synonyms that it knows, the unseen ones
here among them, become the structure's name and give exactly its masks, an empty prompt is refused, and so is an
unknown one unless `allow_free_text` is set. Here all texts go to the text encoder as they are, as free text does.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from progidiff.evaluation.evaluate import TRANSUNET_STRUCTURES, match_structures, save_report
from progidiff.images.reading import load_label, load_volume
from progidiff.labels.cases import list_labelled, load_label_names
from progidiff.prompts.parser import Query, heldout_phrases, training_phrases
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import NONE, ProposalRequest
from progidiff.storage.provenance import describe_versions

ROOT = Path(__file__).resolve().parents[1]

EMPTY = ""
UNRELATED = ("lung", "heart", "urinary bladder", "lumbar vertebra", "bicycle", "the quick brown fox")
DESCRIPTIONS = {
    "spleen": "organ of the left upper abdomen that filters blood and stores platelets",
    "right kidney": "bean-shaped organ on the right that makes urine",
    "left kidney": "bean-shaped organ on the left that makes urine",
    "gallbladder": "small sac under the largest abdominal organ that stores bile",
    "esophagus": "muscular tube that carries food down from the throat",
    "liver": "largest organ of the right upper abdomen, it makes bile",
    "stomach": "hollow organ where food is digested first",
    "aorta": "the largest artery in front of the spine",
    "inferior vena cava": "the largest vein, it returns blood from the legs to the heart",
    "portal and splenic veins": "vessels that carry blood from the gut to the largest abdominal organ",
    "pancreas": "gland behind the belly that makes insulin",
    "right adrenal gland": "small hormone gland on top of the bean-shaped organ on the right",
    "left adrenal gland": "small hormone gland on top of the bean-shaped organ on the left",
}
SIDES = {"right kidney": "left kidney", "right adrenal gland": "left adrenal gland"}
SIDES |= {other: name for name, other in SIDES.items()}


def list_texts(structures: Sequence[str]) -> list[str]:
    """Every text that is drawn, once."""
    texts = [*structures, EMPTY, *UNRELATED]
    for name in structures:
        texts += [
            *training_phrases(name)[1:],
            *heldout_phrases(name),
            *([DESCRIPTIONS[name]] if name in DESCRIPTIONS else []),
        ]
    return list(dict.fromkeys(texts))


def derange(names: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Another name for every name, each used once.

    Example:
        >>> sorted(derange(["a", "b", "c"]).items()) != [("a", "a"), ("b", "b"), ("c", "c")]
        True
    """
    if len(names) < 2:
        raise ValueError("One name alone cannot be shuffled; name at least two structures.")
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(names))
        if (order != np.arange(len(names))).all():
            return {name: names[other] for name, other in zip(names, order, strict=True)}


def measure_case(
    masks: Mapping[str, np.ndarray], truths: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, float | None]], dict[str, float]]:
    """Dice of every text against every structure (None where the truth is empty), and the share of slices that each
    text draws on.

    Args:
        masks: Text -> bool of shape (slices, Y, X).
        truths: Structure -> the same.
    """
    dice: dict[str, dict[str, float | None]] = {}
    for text, mask in masks.items():
        size = int(np.count_nonzero(mask))
        dice[text] = {}
        for name, truth in truths.items():
            total = int(np.count_nonzero(truth))
            dice[text][name] = 2 * int(np.count_nonzero(mask & truth)) / (size + total) if total else None
    return dice, {text: float(mask.any(axis=(1, 2)).mean()) for text, mask in masks.items()}


def summarise(cases: Mapping[str, Mapping[str, Any]], structures: Sequence[str]) -> dict[str, Any]:
    """The table: Dice against the structure that was meant, per control.

    Args:
        cases: Case -> {"dice": text -> structure -> Dice, "drawn": text -> share of slices}.
        structures: In the order of the model.

    Returns:
        Per control the means over structures ("all", "transunet_8", and "with a side": kidneys and adrenal glands) and
        `structures`.
    """
    other = derange(structures)

    def score(texts: Iterable[str], name: str) -> float:
        values = [case["dice"][text][name] for case in cases.values() for text in texts]
        return _mean(value for value in values if value is not None)

    controls: dict[str, dict[str, float]] = {
        "right": {name: score([name], name) for name in structures},
        "training synonyms": {name: score(training_phrases(name)[1:], name) for name in structures},
        "unseen synonyms": {name: score(heldout_phrases(name), name) for name in structures},
        "descriptions": {name: score([DESCRIPTIONS[name]], name) for name in structures if name in DESCRIPTIONS},
        "empty": {name: score([EMPTY], name) for name in structures},
        "shuffled": {name: score([other[name]], name) for name in structures},
        "any other name": {name: score([wrong for wrong in structures if wrong != name], name) for name in structures},
        "swapped": {name: score([SIDES[name]], name) for name in structures if SIDES.get(name) in structures},
        "swapped, other side": {
            name: score([SIDES[name]], SIDES[name]) for name in structures if SIDES.get(name) in structures
        },
    }
    table: dict[str, Any] = {}
    for control, values in controls.items():
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        table[control] = {
            "all": _mean(values.values()),
            "transunet_8": _mean(value for name, value in values.items() if name in TRANSUNET_STRUCTURES),
            "with a side": _mean(value for name, value in values.items() if name in SIDES),
            "structures": values,
        }
    phrases = {
        name: {
            text: score([text], name)
            for text in (
                *training_phrases(name),
                *heldout_phrases(name),
                *([DESCRIPTIONS[name]] if name in DESCRIPTIONS else []),
            )
        }
        for name in structures
    }
    return {
        "controls": table,
        "right above shuffled": table["right"]["all"] - table["shuffled"]["all"],
        "shuffled to": other,
        "phrases": phrases,
        "drawn": {
            text: _mean(case["drawn"][text] for case in cases.values()) for text in (*structures, EMPTY, *UNRELATED)
        },
    }


def _mean(values: Iterable[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _plain(value: Any) -> Any:
    """Rounded, and null where there is no value: JSON has no NaN."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 5), parse_constant=lambda _: None)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cases; the report is written after every one, and a report by the same model and settings is continued."""
    engine = Engine(options.model, device=options.device)
    matched, notes = match_structures(load_label_names(options.studies), engine.structures, options.structures or ())
    structures = list(matched)
    texts = list_texts(structures)
    settings = {
        "model": engine.model_version,
        "num_proposals": options.num_proposals,
        "seed": 0,
        "steps": engine.card.num_inference_steps,
        "stride": options.stride,
        "texts": texts,
    }
    cases = _read_cases(options.out, settings)
    started = time.monotonic()
    report: dict[str, Any] = {}
    for case in list_labelled(options.studies, options.cases):
        if case.name not in cases:
            volume = load_volume(case.image)
            stack = volume.arrange(load_label(case.label, like=volume.grid))
            chosen = list(range(options.stride // 2, len(stack), options.stride))
            masks = {}
            for start in range(0, len(texts), options.at_once):
                part = texts[start : start + options.at_once]
                queries = [Query(f"text {start + index}", text, known=False) for index, text in enumerate(part)]
                request = ProposalRequest(
                    queries=queries, num_proposals=options.num_proposals, adapter=NONE, slices=chosen
                )
                proposals = engine.propose(request, volume)
                for query in queries:
                    drawn = [proposals.slice_masks(query.name, z) for z in chosen]
                    masks[query.text] = np.stack([mask.sum(axis=0) * 2 >= len(mask) for mask in drawn])
            dice, share = measure_case(
                masks, {name: np.isin(stack[chosen], list(ids)) for name, ids in matched.items()}
            )
            cases[case.name] = {"slices": len(chosen), "dice": dice, "drawn": share}
            print(f"{case.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        report = {
            "command": options.command,
            **settings,
            "notes": notes,
            "versions": describe_versions(),
            "summary": summarise(cases, structures),
            "cases": cases,
        }
        if options.out:
            save_report(_plain(report), options.out)
    return report


def _read_cases(out: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run with these settings has measured."""
    if out is None or not out.is_file():
        return {}
    report = json.loads(out.read_text(encoding="utf-8"))
    return dict(report["cases"]) if all(report.get(key) == value for key, value in settings.items()) else {}


def print_tables(report: Mapping[str, Any]) -> None:
    """Markdown."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    summary = report["summary"]
    print("| prompt | all structures | 8 structures | kidneys and adrenal glands |\n|---|---|---|---|")
    for control, values in summary["controls"].items():
        print(f"| {control} | {' | '.join(cell(values[group]) for group in ('all', 'transunet_8', 'with a side'))} |")
    shown = ("right", "training synonyms", "unseen synonyms", "descriptions", "empty", "shuffled")
    print(f"\n| structure | {' | '.join(shown)} |\n|---{'|---' * len(shown)}|")
    for name in summary["shuffled to"]:
        print(
            f"| {name} | "
            f"{' | '.join(cell(summary['controls'][control]['structures'].get(name)) for control in shown)} |"
        )
    print("\n| text | drawn on so many of the slices |\n|---|---|")
    for text in (EMPTY, *UNRELATED):
        print(f"| {text or '(empty)'} | {100 * summary['drawn'][text]:.0f} % |")
    print(f"\nright above shuffled: {cell(summary['right above shuffled'])}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True, help="local datastore with labels/final and labels.json")
    parser.add_argument("--cases", nargs="*", help="only these cases (default: all)")
    parser.add_argument("--structures", nargs="*", help="only these structures (default: all)")
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument("--stride", type=int, default=6, help="every so many slices")
    parser.add_argument("--at-once", type=int, default=26, help="texts drawn together; more takes more memory")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--device")
    parser.add_argument("--smoke", action="store_true", help="K = 2 on every fourth slice: does it run?")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_proposals, options.stride = 2, 4
    named = ["--studies", str(options.studies), *(["--cases", *options.cases] if options.cases else [])]
    options.command = shlex.join(["python", "benchmarks/text_controls.py", *named, "--stride", str(options.stride)])
    print_tables(_plain(run(options)))


if __name__ == "__main__":
    main()
