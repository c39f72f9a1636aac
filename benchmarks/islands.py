"""What dropping islands (parts of a mask that hang together with nothing) does to Dice and HD95 of whole volumes.

    python benchmarks/islands.py --studies ../shared/data/ct --cases img0024 img0033 img0039 --out
    benchmarks/results/islands_ct.json python benchmarks/islands.py --studies ../shared/data/mr --cases t2spir01
    t2spir19 t2spir33 t2spir36 t2spir38 \
        --out benchmarks/results/islands_mr.json

Every volume is proposed once, without a clean-up; then the same proposals are cleaned (`progidiff.proposals.islands`)
by several rules and scored as `progidiff evaluate` does. `--keep FOLDER` keeps the proposals between runs. "consensus
largest" keeps the largest part of the consensus itself, not of the proposals: what
`progidiff evaluate --largest-component` reports.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from progidiff.evaluation.evaluate import match_structures, save_report, score_case, summarise
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.labels.cases import list_labelled, load_label_names
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.islands import APART_MM, LARGEST, OFF, SMALL, SMALL_SHARE, drop_islands
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.storage.provenance import describe_versions

ROOT = Path(__file__).resolve().parents[1]

RULES: dict[str, tuple[str, float, float]] = {
    "off": (OFF, 0.0, 0.0),
    "under 5 %": (SMALL, 0.05, 0.0),
    "under 10 %": (SMALL, 0.1, 0.0),
    "under 10 %, over 10 mm apart (small)": (SMALL, SMALL_SHARE, APART_MM),
    "under 20 %, over 20 mm apart": (SMALL, 0.2, 20.0),
    "largest": (LARGEST, 0.0, 0.0),
    "consensus largest": (OFF, 0.0, 0.0),
}


def take_first(proposals: VolumeProposals, count: int) -> VolumeProposals:
    """The first K proposals, a copy: proposal k is the same whatever K."""
    return replace(proposals, probabilities=proposals.probabilities[:, :count].copy())


def score_rules(
    volume: Volume, labels: np.ndarray, proposals: VolumeProposals, structures: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What `score_case` says of every structure under every rule; equal masks are scored once."""
    grid = proposals.grid
    spacing = (grid.stack_spacing[0], grid.spacing, grid.spacing)
    scored: dict[str, dict[str, dict[str, Any]]] = {rule: {} for rule in RULES}
    for name, ids in structures.items():
        index = proposals.structures.index(name)
        known: dict[tuple[bytes, bool], dict[str, Any]] = {}
        for rule, (clean_up, share, apart_mm) in RULES.items():
            one = replace(
                proposals, structures=(name,), probabilities=proposals.probabilities[index : index + 1].copy()
            )
            drop_islands(one.probabilities, clean_up, spacing, grid.covered, share, apart_mm)
            key = hashlib.sha256(one.probabilities.tobytes()).digest(), rule == "consensus largest"
            if key not in known:
                known[key] = score_case(volume, labels, one, {name: ids}, largest_component=key[1])[name]
            scored[rule][name] = known[key]
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True, help="local datastore with labels/final and labels.json")
    parser.add_argument("--cases", nargs="*", help="only these cases (default: all)")
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument(
        "--keep", type=Path, help="folder to keep proposals in, and to take them from; they may hold more proposals"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    engine = Engine(options.model)
    matched, notes = match_structures(load_label_names(options.studies), engine.structures)
    queries = [Query(name, name) for name in matched]
    scored: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
    settings: dict[str, Any] = {}
    for case in list_labelled(options.studies, options.cases):
        volume = load_volume(case.image)
        labels = load_label(case.label, like=volume.grid)
        folder = options.keep / case.name if options.keep else None
        if folder is not None and (folder / "proposals.json").is_file():
            proposals = VolumeProposals.from_files(folder)
        else:
            proposals = engine.propose(
                ProposalRequest(queries=queries, num_proposals=options.num_proposals), volume, Work(remember=False)
            )
            if folder is not None:
                proposals.to_files(folder)
        settings = {
            "model": proposals.model_version,
            "adapter": proposals.adapter,
            "steps": proposals.num_inference_steps,
            "seed": proposals.seed,
        }
        for rule, entry in score_rules(volume, labels, take_first(proposals, options.num_proposals), matched).items():
            scored[rule].append({"case": case.name, "structures": entry})
        print(f"{case.name}: scored", flush=True)
    report = {
        "command": f"python benchmarks/islands.py --studies {options.studies} --num-proposals {options.num_proposals} "
        f"--cases {' '.join(case['case'] for case in scored['off'])}",
        **settings,
        "num_proposals": options.num_proposals,
        "notes": notes,
        "versions": describe_versions(),
        "rules": {rule: summarise(cases, list(matched)) for rule, cases in scored.items()},
    }
    print_tables(report)
    if options.out:
        # NaN (no value) becomes null.
        save_report(json.loads(json.dumps(report), parse_constant=lambda _: None), options.out)


def print_tables(report: dict[str, Any]) -> None:
    """Markdown: means by rule, then the consensus of every structure."""
    print(
        "\n| clean-up | single Dice | consensus Dice | best Dice | consensus HD95, mm | "
        "best HD95, mm | drawn on slices without |"
    )
    print("|---|---|---|---|---|---|---|")
    for rule, summary in report["rules"].items():
        mean = summary["mean"]
        cells = [
            f"{mean[kind]['dice']['transunet_8']:.3f} ({mean[kind]['dice']['all']:.3f})"
            for kind in ("single", "consensus", "best")
        ]
        cells += [
            f"{mean[kind]['hd95']['transunet_8']:.1f} ({mean[kind]['hd95']['all']:.1f})"
            for kind in ("consensus", "best")
        ]
        print(f"| {rule} | {' | '.join(cells)} | {100 * summary['false_positives']['consensus']['all_slices']:.1f} % |")
    names = list(report["rules"]["off"]["consensus"]["dice"])
    print(f"\n| structure | {' | '.join(report['rules'])} |\n|---{'|---' * len(report['rules'])}|")
    for name in names:
        cells = [
            f"{summary['consensus']['dice'][name]:.3f}, {summary['consensus']['hd95'][name]:.1f}"
            for summary in report["rules"].values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
