"""Which slices next: strategies against each other, with an annotator who always knows the truth.

    python benchmarks/active_learning.py --task mr --studies ../shared/data/mr --out benchmarks/results/active_learning_mr.json
    python benchmarks/active_learning.py --task ct --studies ../shared/data/ct --out benchmarks/results/active_learning_ct.json
    python benchmarks/active_learning.py --summarise benchmarks/results/active_learning_*.json --picture docs/images/active_learning.png

Volumes are split by patient. Every seed has one start set, the same for all strategies, as large as a query and with a slice of every
structure. Then five rounds: a strategy chooses slices from the pool by what the present model proposes, their true labels are added,
and a new model is trained from the same initial weights with the same fixed number of steps, and measured on the same slices of the
test volumes. Reported: Dice against slices, the area under that curve, final Dice per structure, slices and contour length (mm of the
outlines that somebody would have drawn), and a paired test over the seeds.

Task `mr`: the CT model, which has seen no MR, is adapted to MR slices by low-rank updates of its evidence path.
Task `ct`: CT structures from few slices. The text-query head is reset, so that no structure is known, and learned together with low-rank
updates of the image encoder. The encoder keeps its weights, and those were trained with these structures on the volumes of the pool:
the figures are therefore higher than for structures that nobody ever labelled. Test volumes were held out of that training. All
strategies have the same head start; their differences are what is measured, not their heights.

A run that is stopped goes on where it was: every (seed, strategy) is kept in the work folder when it is done.
"""

import argparse
import copy
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.acquisition import AcquisitionConfig, ImageScores, build_pool, compute_scores, pick_slices
from progidiff.backbone import Backbone
from progidiff.lora import LoraSettings, inject_lora
from progidiff.model_files import ModelCard, load_pipeline
from progidiff.pipeline import ProposalPipeline
from progidiff.training.adapt import measure_dice
from progidiff.training.data import SliceCache, augment, list_cases
from progidiff.training.evidence import PhraseTable
from progidiff.training.losses import compute_evidence_loss
from progidiff.training.scores import one_hot
from progidiff.training.selection import restrict_cache
from progidiff.volume import read_grid

ROOT = Path(__file__).resolve().parents[1]

OURS = "proposal_disagreement"
STRATEGIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ours": (OURS, {}),
    "ours, no foreground weight": (OURS, {"foreground_weight": False}),
    "ours, not stratified": (OURS, {"stratified_share": 0.0}),
    "ours, no distance": (OURS, {"min_distance_mm": 0.0}),
    "ours, no noise": (OURS, {"noise": False}),
    "uniform random": ("uniform_random", {}),
    "foreground random 33 %": ("foreground_random", {"foreground_share": 0.33}),
    "foreground random 66 %": ("foreground_random", {"foreground_share": 0.66}),
    "evenly spaced": ("evenly_spaced", {}),
    "entropy": ("entropy", {}),
}
"""Name in the tables -> strategy and settings of `progidiff.acquisition`."""

CT_TEST = ("img0024", "img0033", "img0039")
"""Held out of the training of the shipped CT model."""


@dataclass(frozen=True)
class Setup:
    """Sizes of a run; everything that a result depends on beside code and data.

    Attributes:
        task: "mr" or "ct".
        structures: What is annotated.
        pool_volumes: Volumes to choose slices from; the others (of `ct`: those held out) are for the test.
        query: Slices per round, and in the start set.
        rounds: Queries after the start set.
        steps: Training steps per round.
        batch_size: Slices per step.
        learning_rate: Peak; it falls to zero as a cosine.
        num_proposals: K of scores and consensus.
        score_steps: Denoising steps of the proposals that slices are scored by; 0 for the model's. The test always has the model's.
        pool_mm: Only slices at least so far apart can be chosen: neighbours at 3 mm are the same picture, and cost time.
        test_slices: At most about so many, evenly spaced.
        bias_field: Simulated shading while training; see `augment`.
    """

    task: str
    structures: tuple[str, ...]
    pool_volumes: int
    query: int
    rounds: int = 5
    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 2e-3
    num_proposals: int = 4
    score_steps: int = 0
    pool_mm: float = 9.0
    test_slices: int = 48
    bias_field: float = 0.0


SETUPS = {
    "mr": Setup("mr", ("liver", "spleen", "right kidney", "left kidney"), pool_volumes=6, query=6, bias_field=0.3),
    "ct": Setup("ct", ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"), pool_volumes=8, query=10),
}


class World:
    """The slices of one seed: pool, test, start set, and the model before anybody labelled anything."""

    def __init__(self, setup: Setup, studies: Path, model_dir: Path, work: Path, seed: int) -> None:
        self.setup = setup
        self.seed = seed
        backbone = Backbone(model_dir / "backbone", "cpu")
        autocast = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
        self.card: ModelCard
        self.card, self.base = load_pipeline(model_dir, backbone, autocast)
        if setup.task == "ct":
            forget_structures(self.base, seed)
        cases = {case.name: case for case in list_cases(studies)}
        shuffled = sorted(cases, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        fixed = [name for name in CT_TEST if setup.task == "ct" and name in cases]
        self.pool_names = [name for name in shuffled if name not in fixed][: setup.pool_volumes]
        self.test_names = fixed or shuffled[setup.pool_volumes :]
        if not self.test_names:
            sys.exit(f"{len(cases)} labelled volumes are too few for a pool of {setup.pool_volumes} and a test; lower --pool-volumes.")
        cache = work / "cache"
        self.pool = SliceCache([cases[name] for name in self.pool_names], setup.structures, self.card.conditioning, cache)
        self.test = SliceCache([cases[name] for name in self.test_names], setup.structures, self.card.conditioning, cache)
        self.phrases = PhraseTable(backbone, setup.structures)
        self.slice_mm = [find_slice_mm(cases[name].image) for name in self.pool_names]
        self.candidates = {name: self._thin(v) for v, name in enumerate(self.pool.names)}
        self.start = self._pick_start()

    def _thin(self, volume: int) -> list[int]:
        """The slices of a volume that may be chosen."""
        step = max(1, round(self.setup.pool_mm / self.slice_mm[volume]))
        return list(range(step // 2, len(self.pool.images[volume]), step))

    def _pick_start(self) -> dict[str, set[int]]:
        """One slice of every structure, the rest at random: the same for all strategies."""
        rng = np.random.default_rng(self.seed)
        everything = [(v, z) for v, name in enumerate(self.pool.names) for z in self.candidates[name]]
        chosen: list[tuple[int, int]] = []
        for s in range(len(self.setup.structures)):
            showing = [(v, z) for v, z in everything if self.pool.pixels[v][z, s] > 0 and (v, z) not in chosen]
            if showing and not any(self.pool.pixels[v][z, s] > 0 for v, z in chosen):
                chosen.append(showing[rng.integers(len(showing))])
        rest = [entry for entry in everything if entry not in chosen]
        missing = max(0, self.setup.query - len(chosen))
        chosen += [rest[i] for i in rng.permutation(len(rest))[:missing]]
        found: dict[str, set[int]] = {name: set() for name in self.pool.names}
        for v, z in chosen:
            found[self.pool.names[v]].add(z)
        return found


def find_slice_mm(image: Path) -> float:
    """Distance of the axial slices of an image, from its header."""
    _, affine = read_grid(image)
    axial = int(np.argmax(np.abs(affine[2, :3])))
    return float(np.linalg.norm(affine[:3, axial]))


def forget_structures(pipeline: ProposalPipeline, seed: int) -> None:
    """Give the text-query head fresh weights, in place."""
    old = pipeline.branch.query_head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.branch.query_head = type(old)(pipeline.branch.config.text_features, old.fine, old.coarse).to(next(old.parameters()))


def train(world: World, annotated: Mapping[str, set[int]], round_index: int) -> ProposalPipeline:
    """From the initial weights, a fixed number of steps on the annotated slices."""
    setup, base = world.setup, world.base
    branch = copy.deepcopy(base.branch)
    targets = ("encoder",) if setup.task == "ct" else ("encoder", "query_head")
    inject_lora(branch, None, LoraSettings(8, 16.0, targets, True), world.seed)
    if setup.task == "ct":
        branch.query_head.requires_grad_(True)
    position = {entry: i for i, entry in enumerate(world.pool.index)}
    names = {name: v for v, name in enumerate(world.pool.names)}
    training = restrict_cache(world.pool, [position[names[name], z] for name, slices in annotated.items() for z in slices])
    parameters = [p for p in branch.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=setup.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, setup.learning_rate, total_steps=setup.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(world.seed * 1000 + round_index)
    rng = np.random.default_rng([world.seed, round_index])
    branch.train()
    for _ in range(setup.steps):
        chosen = training.draw_balanced(setup.batch_size, rng)
        images, labels = augment(*training.read(chosen), generator, bias_field=setup.bias_field)
        with torch.autocast("cpu", torch.bfloat16, enabled=base.autocast_dtype is not None):
            logits = branch.predict_evidence(branch.encode_slices(images), world.phrases.pooled[world.phrases.draw(generator)])
        loss, _ = compute_evidence_loss(logits, one_hot(labels, len(setup.structures)), training.weigh(chosen))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    branch.eval()
    pipeline = copy.copy(base)
    pipeline.branch = branch
    return pipeline


@torch.no_grad()
def score_pool(world: World, pipeline: ProposalPipeline, kind: str) -> list[ImageScores]:
    """What a strategy may look at: nothing, where the evidence is, or proposals.

    The images of the pool are thinned: slice i of the scores is `world.candidates[name][i]`.
    """
    setup, card = world.setup, world.card
    count = len(setup.structures)
    steps = setup.score_steps or card.num_inference_steps
    prompts = world.phrases.pick_canonical()
    noise, offsets = pipeline.draw_noise(setup.num_proposals, 0), pipeline.draw_offsets(setup.num_proposals, 0)
    position = {entry: i for i, entry in enumerate(world.pool.index)}
    found = []
    for v, name in enumerate(world.pool.names):
        slices = world.candidates[name]
        spacing = world.slice_mm[v] * (slices[1] - slices[0] if len(slices) > 1 else 1)
        shape = (count, setup.num_proposals, len(slices), card.conditioning.height, card.conditioning.width)
        drawn = np.zeros(shape, np.uint8)
        if kind != "nothing":
            for start in range(0, len(slices), 8):
                part = slices[start : start + 8]
                images, _ = world.pool.read([position[v, z] for z in part])
                features = pipeline.encode_slices(images)
                evidence = pipeline.predict_evidence(features, prompts)
                if kind == "evidence":
                    drawn[:, :, start : start + len(part)] = (evidence >= 0.5).cpu().numpy().transpose(1, 0, 2, 3)[:, None] * np.uint8(255)
                    continue
                pairs = [(n, p) for n in range(len(part)) for p in range(count) if float(evidence[n, p].max()) >= card.gate]
                for at in range(0, len(pairs), 16):
                    some = pairs[at : at + 16]
                    masks = pipeline.propose(features, evidence, prompts, some, noise, steps, card.guidance_scale, offsets)
                    for (n, p), probabilities in zip(some, (masks * 255).round().to(torch.uint8).numpy(), strict=True):
                        drawn[p, :, start + n] = probabilities * (probabilities >= 128).any(axis=(1, 2), keepdims=True)
        found.append(compute_scores(name, setup.structures, drawn, spacing))
    return found


def choose(world: World, scores: list[ImageScores], annotated: Mapping[str, set[int]], strategy: str, round_index: int) -> dict[str, set[int]]:
    """The annotated slices with those of one query."""
    name, settings = STRATEGIES[strategy]
    config = replace(AcquisitionConfig(rounds=world.setup.rounds), **settings)
    thin = {image: [world.candidates[image].index(z) for z in slices] for image, slices in annotated.items()}
    picks = pick_slices(build_pool(scores), world.setup.query, name, config, annotated=thin, round_index=round_index, seed=world.seed)
    grown = {image: set(slices) for image, slices in annotated.items()}
    for pick in picks:
        grown[pick.image].add(world.candidates[pick.image][pick.index])
    return grown


def measure_contour(world: World, annotated: Mapping[str, set[int]]) -> float:
    """Length of all outlines on the annotated slices, in pixels of the working grid: edges between a structure and what it is not."""
    edges = 0
    for v, name in enumerate(world.pool.names):
        for z in annotated[name]:
            label = np.pad(np.asarray(world.pool.labels[v][z]).astype(np.int16), 1)
            for s in range(1, len(world.setup.structures) + 1):
                mask = label == s
                edges += int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
    return float(edges)


def evaluate(world: World, pipeline: ProposalPipeline, annotated: Mapping[str, set[int]]) -> dict[str, Any]:
    """One point of a curve."""
    figures = measure_dice(pipeline, world.test, world.phrases, world.card, world.setup.num_proposals, world.setup.test_slices)
    return {
        "slices": sum(map(len, annotated.values())),
        "contour": measure_contour(world, annotated),
        "dice": figures["consensus"],
        "evidence": figures["evidence"],
        "structures": {name: figures[f"consensus {name}"] for name in world.setup.structures if f"consensus {name}" in figures},
    }


def look(strategy: str) -> str:
    """What a strategy needs to see of the pool."""
    return {OURS: "proposals", "entropy": "proposals", "foreground_random": "evidence"}.get(STRATEGIES[strategy][0], "nothing")


def run_seed(world: World, strategies: Sequence[str], folder: Path, tell: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """The curves of all strategies for one seed; what is on disk is not computed again."""
    first: tuple[ProposalPipeline, dict[str, Any]] | None = None
    first_scores: dict[str, list[ImageScores]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for strategy in strategies:
        file = folder / f"{hashlib.sha256(strategy.encode()).hexdigest()[:12]}.json"
        if file.is_file():
            curves[strategy] = json.loads(file.read_text(encoding="utf-8"))
            continue
        annotated: dict[str, set[int]] = world.start
        if first is None:
            pipeline = train(world, annotated, 0)
            first = (pipeline, evaluate(world, pipeline, annotated))
        pipeline, point = first
        curve = [point]
        for round_index in range(world.setup.rounds):
            started = time.monotonic()
            kind = look(strategy)
            if round_index == 0:
                if kind not in first_scores:
                    first_scores[kind] = score_pool(world, pipeline, kind)
                scores = first_scores[kind]
            else:
                scores = score_pool(world, pipeline, kind)
            scored = time.monotonic()
            annotated = choose(world, scores, annotated, strategy, round_index)
            pipeline = train(world, annotated, round_index + 1)
            trained = time.monotonic()
            curve.append(evaluate(world, pipeline, annotated))
            seconds = {"score": scored - started, "train": trained - scored, "evaluate": time.monotonic() - trained}
            curve[-1]["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
            tell(f"seed {world.seed}, {strategy}, round {round_index + 1}: {curve[-1]['slices']} slices, Dice {curve[-1]['dice']:.3f}, {seconds}")
        folder.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(curve), encoding="utf-8")
        scratch.replace(file)
        curves[strategy] = curve
    return curves


def compute_area(curve: Sequence[Mapping[str, Any]]) -> float:
    """Mean Dice over the budget: the area under Dice against slices, divided by the range of slices."""
    x, y = [float(p["slices"]) for p in curve], [float(p["dice"]) for p in curve]
    return float(np.trapezoid(y, x) if hasattr(np, "trapezoid") else np.trapz(y, x)) / max(1e-9, x[-1] - x[0])


def find_slices_for(curve: Sequence[Mapping[str, Any]], dice: float) -> float | None:
    """Slices at which a curve first reaches a Dice, between its points by a straight line; None if it never does."""
    for before, after in pairwise(curve):
        if before["dice"] >= dice:
            return float(before["slices"])
        if after["dice"] >= dice:
            share = (dice - before["dice"]) / (after["dice"] - before["dice"])
            return float(before["slices"] + share * (after["slices"] - before["slices"]))
    return float(curve[-1]["slices"]) if curve[-1]["dice"] >= dice else None


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds and tasks, and `ours` against every other strategy, paired over (task, seed)."""
    from scipy.stats import ttest_rel, wilcoxon

    runs = [(result["setup"]["task"], seed, curves) for result in results for seed, curves in result["curves"].items()]
    strategies = [name for name in STRATEGIES if all(name in curves for _, _, curves in runs)]
    rows: dict[str, Any] = {}
    for name in strategies:
        areas = [compute_area(curves[name]) for _, _, curves in runs]
        row: dict[str, Any] = {
            "area": float(np.mean(areas)),
            "final_dice": float(np.mean([curves[name][-1]["dice"] for _, _, curves in runs])),
            "slices": float(np.mean([curves[name][-1]["slices"] for _, _, curves in runs])),
            "contour": float(np.mean([curves[name][-1]["contour"] for _, _, curves in runs])),
            "structures": {},
        }
        for task in dict.fromkeys(task for task, _, _ in runs):
            of_task = [curves[name] for t, _, curves in runs if t == task]
            row[f"area {task}"] = float(np.mean([compute_area(curve) for curve in of_task]))
            finals = [curve[-1]["structures"] for curve in of_task]
            row["structures"][task] = {s: float(np.mean([f[s] for f in finals if s in f])) for s in dict.fromkeys(s for f in finals for s in f)}
        if "ours" in strategies and name != "ours":
            ours = [compute_area(curves["ours"]) for _, _, curves in runs]
            gaps = np.subtract(ours, areas)
            row["ours_minus_this"] = float(gaps.mean())
            row["ours_wins"] = f"{int((gaps > 0).sum())} of {len(gaps)}"
            if len(gaps) > 1 and np.ptp(gaps) > 0:
                row["p_paired_t"] = float(ttest_rel(ours, areas).pvalue)
                row["p_wilcoxon"] = float(wilcoxon(ours, areas).pvalue)
        if "uniform random" in strategies:
            # Slices for the Dice that uniform random ends with, as a share of its slices.
            shares = []
            for _, _, curves in runs:
                rival = curves["uniform random"]
                needed = find_slices_for(curves[name], rival[-1]["dice"])
                shares.append(None if needed is None else needed / rival[-1]["slices"])
            reached = [share for share in shares if share is not None]
            row["slices_for_dice_of_uniform"] = {"reached": f"{len(reached)} of {len(shares)}", "share": float(np.mean(reached)) if reached else None}
        rows[name] = row
    return {"runs": [f"{task}, seed {seed}" for task, seed, _ in runs], "strategies": rows}


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    lines = [
        f"Runs: {'; '.join(summary['runs'])}.",
        "",
        "| strategy | area | final Dice | contour | ours minus this | wins | p (paired t) | p (Wilcoxon) |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, row in summary["strategies"].items():
        gap = f"{row['ours_minus_this']:+.3f}" if "ours_minus_this" in row else ""
        chances = [f"{row[key]:.3f}" if key in row else "" for key in ("p_paired_t", "p_wilcoxon")]
        cells = [name, f"{row['area']:.3f}", f"{row['final_dice']:.3f}", f"{row['contour']:.0f}", gap, row.get("ours_wins", ""), *chances]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean Dice over the seeds against slices, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for name in STRATEGIES:
            curves = [curves[name] for curves in result["curves"].values() if name in curves]
            if curves:
                x = np.mean([[point["slices"] for point in curve] for curve in curves], axis=0)
                y = np.mean([[point["dice"] for point in curve] for curve in curves], axis=0)
                ours = name == "ours"
                axis.plot(
                    x, y, label=name, linewidth=2.5 if ours else 1.2, linestyle=":" if name.startswith("ours,") else "-", zorder=3 if ours else 2
                )
        axis.set(xlabel="annotated slices", ylabel="Dice on test volumes", title=f"{result['setup']['task'].upper()}, {len(result['curves'])} seeds")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(SETUPS))
    parser.add_argument("--studies", type=Path, help="local datastore with labels/final and labels.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), help="names as in the tables (default: all)")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "active_learning")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--query", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pool-volumes", type=int)
    parser.add_argument("--test-slices", type=int)
    parser.add_argument("--score-steps", type=int, help="fewer steps where slices are scored, to save most of the time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a size for tests: 1 round, 2 steps, 1 pool volume")
    parser.add_argument("--summarise", type=Path, nargs="*", help="only tables (and --picture) from these JSON files")
    options = parser.parse_args(arguments)

    if options.summarise:
        results = [json.loads(path.read_text(encoding="utf-8")) for path in options.summarise]
    else:
        if options.task is None or options.studies is None:
            parser.error("--task and --studies are needed, or --summarise")
        unknown = set(options.strategies) - STRATEGIES.keys()
        if unknown:
            parser.error(f"no such strategy: {', '.join(sorted(unknown))}; there are {', '.join(STRATEGIES)}")
        torch.set_num_threads(options.threads)
        setup = SETUPS[options.task]
        if options.smoke:
            setup = replace(setup, pool_volumes=1, query=4, rounds=1, steps=2, batch_size=2, num_proposals=2, test_slices=4)
        sizes = {name: getattr(options, name) for name in ("rounds", "query", "steps", "pool_volumes", "test_slices", "score_steps")}
        setup = replace(setup, **{name: value for name, value in sizes.items() if value is not None})
        curves = {}
        for seed in options.seeds:
            world = World(setup, options.studies, options.model, options.work, seed)
            # What the numbers depend on names the folder, so that another size or other weights do not continue an old run.
            parts = json.dumps([asdict(setup), world.card.full_name, sorted(world.pool.digests.items()), sorted(world.test.digests.items())])
            folder = options.work / f"{setup.task}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}" / f"seed{seed}"
            curves[str(seed)] = run_seed(world, options.strategies, folder, lambda text: print(text, file=sys.stderr, flush=True))
        result = {"command": shlex.join(sys.argv), "model": world.card.full_name, "setup": asdict(setup), "curves": curves}
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({**result, "summary": summarise([result])}, indent=1) + "\n", encoding="utf-8")
        results = [result]
    print(format_table(summarise(results)))
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
