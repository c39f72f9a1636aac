"""Few-shot adaptation: the model itself against a low-rank adapter trained on a few volumes, on volumes that neither has seen.

    python benchmarks/adapt.py --studies ../shared/data/mr --shots 3 --out benchmarks/results/adapt_mr.json

The volumes are split by name and seed: some to train on, 1 or 2 held back to choose the number of steps, the rest for this table.
Dice is of whole volumes on the grid of the input: "single" the mean over K proposals, "consensus" what at least half of them draw.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from progidiff.engine import Engine
from progidiff.evaluation import evaluate
from progidiff.model_files import load_card
from progidiff.training.adapt import AdaptConfig, run_adapt
from progidiff.training.selection import prepare_data

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True, help="local datastore with labels/final and labels.json")
    parser.add_argument("--shots", type=int, default=3, help="volumes to train on")
    parser.add_argument("--hold-out", nargs="*", default=[], help="cases for validation (default: 1, of 5 or more 2)")
    parser.add_argument("--seed", type=int, default=0, help="of split, training and proposals")
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument("--name", default="benchmark", help="name of the adapter; it is not published")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "adapt")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    config = AdaptConfig(seed=options.seed)
    adapters = options.work / "adapters"
    started = time.monotonic()
    split = {"held_out": options.hold_out, "shots": options.shots}
    trained = run_adapt(options.studies, options.model, options.name, options.work, config, adapters=adapters, publish=False, **split)
    seconds = time.monotonic() - started
    data = prepare_data(options.studies, load_card(options.model), options.work / "cache", seed=options.seed, **split)
    engine = Engine(options.model, adapters=adapters)
    reports = {
        name: evaluate(
            engine, options.studies, structures=list(data.training.structures), cases=data.unused, adapter=name, num_proposals=options.num_proposals,
            seed=options.seed, hd95=True,
        )
        for name in ("none", trained.card.full_name)
    }  # fmt: skip
    base, adapted = (reports[name]["summary"] for name in reports)
    rows = {
        structure: {
            f"{who} {kind}": summary[kind]["dice"][structure]
            for who, summary in (("base", base), ("adapted", adapted))
            for kind in ("single", "consensus")
        }
        for structure in base["consensus"]["dice"]
    }
    rows["mean"] = {key: sum(row[key] for row in rows.values()) / len(rows) for key in next(iter(rows.values()))}
    print(
        f"Trained on {', '.join(data.training.names)} in {seconds:.0f} s; held back {', '.join(data.held_out)}; tested on {', '.join(data.unused)}."
    )
    print(f"| structure | {' | '.join(rows['mean'])} |\n|---|{'---|' * len(rows['mean'])}")
    for structure, row in rows.items():
        print(f"| {structure} | {' | '.join(f'{value:.3f}' for value in row.values())} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": shlex.join(sys.argv),
            "model": engine.model_version,
            "training": data.training.names,
            "held_out": data.held_out,
            "test": data.unused,
            "seconds": round(seconds),
            "dice": rows,
            "hd95": {name: report["summary"]["mean"]["consensus"]["hd95"] for name, report in reports.items()},
            "validation": trained.figures,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
