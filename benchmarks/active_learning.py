"""Which slices next: strategies against each other where the comparison has the power to decide.

    python benchmarks/active_learning.py --data ../shared/data --out benchmarks/results/active_learning.json \
        --picture docs/images/active_learning.png

**The comparison that decides, written down before it was run.** Area under Dice against annotated slices, coverage
(`proposal_disagreement` as a server has it) minus foreground-random 33 %, paired over the 30 pools of a task, two-
sided Wilcoxon, on each of the tasks `heart`, `hippocampus` and `lidc`. Success is a difference of at least 0.01
with p < 0.05 on two of the three. Everything else in the table is description. Settings were chosen on the pilot
patients (`--pilot`), whom no pool and no test has.

What is learned: structures that the shipped model never saw, from its frozen image encoder (`frozen_features.py`),
by a multinomial logistic regression that is solved to its end. It is convex, so there is no training noise: two
runs on the same slices give the same model, and a difference of Dice is a difference of slices.
`active_learning_tuning.py` trains the real model instead, which costs minutes a round; its ordering of a few
strategies is compared with this one in docs/results.md.

Pools: patients are shared out anew `repetitions` times, into `groups` pools with no patient in common; the test is
on patients outside the pool. Ten repetitions of three pools make 30 pairs. Pools of different repetitions share
patients, so the table has a second p: signs of the means of repetitions are flipped (all 1024 ways).

Every pool has one start set, the same for all strategies, with a slice of every structure, the rest by chance. Then
a strategy chooses `QUERY` slices, of all that are left, by what the present model says of them; their true labels
are added, and the head is solved again, until `--budget` slices are annotated. Reported: area against slices, area
against outline length (what a person draws), Dice at the end, the Dice of the head that has all slices of the pool
(the ceiling), the share of uniform random's slices at which its final Dice is reached, and whether the expected
gain that `progidiff.active_learning.advice` gives came true.

A run that is stopped goes on where it was: every pool is kept in `--work` when it is done. Other weights, sizes or
settings begin a new folder there.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from frozen_features import TASKS, Patient, Patients, Task
from progidiff.active_learning.advice import CurvePoint, predict_gain
from progidiff.active_learning.settings import AcquisitionConfig
from progidiff.active_learning.strategies import ImageScores, Pool, build_pool, pick_slices
from progidiff.proposals.agreement import compute_disagreement_per_slice

ROOT = Path(__file__).resolve().parents[1]

QUERY = 5
"""Slices per query, and in the start set."""

BUDGET = 60
"""Slices at the end, where nobody says another number."""

TEST_PIXELS = 120_000
"""At most about so many; of more, every second, third, ... is measured."""

CEILINGS = 10
"""Pools whose whole is learned from."""

FOLDS = 4
"""Heads that each leave out a part of the annotated slices: the proposals, and what corrections are learned from."""

VALIDATION = 4
"""Patients of the test whose Dice stands for what a server measures on slices that it held back: the advice sees it."""

PENALTY = 1e-3
BALANCE = 0.75
"""Structures are weighed by their pixels to the power of this: 1 as they are, 0 all alike."""

ITERATIONS = 80


# ---------------------------------------------------------------- the head


def fit_head(
    pixels: NDArray[np.float32],
    labels: NDArray[np.uint8],
    weights: NDArray[np.float32],
    classes: int,
    start: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Multinomial logistic regression, solved to its end.

    Args:
        pixels: (n, D), the last feature is 1.
        labels: (n,), 0 for the background.
        weights: (n,), how many pixels each stands for.
        classes: C, structures and background.
        start: Weights to begin at; the answer does not depend on them.

    Returns:
        (D, C).
    """
    mass = np.bincount(labels, weights, classes)
    present = mass > 0
    factor = np.zeros(classes)
    factor[present] = (mass[present] / mass.sum()) ** BALANCE
    factor[present] /= factor.sum() * mass[present]
    share = (weights * factor[labels]).astype(np.float32)
    shape = (pixels.shape[1], classes)
    rows = np.arange(len(labels))

    def measure(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        head = flat.reshape(shape).astype(np.float32)
        logits = pixels @ head
        logits -= logits.max(axis=1, keepdims=True)
        own = logits[rows, labels]
        np.exp(logits, out=logits)
        total = logits.sum(axis=1)
        loss = float(share @ (np.log(total) - own)) + PENALTY / 2 * float((head[:-1] ** 2).sum())
        logits /= total[:, None]
        logits[rows, labels] -= 1
        logits *= share[:, None]
        gradient = pixels.T @ logits
        gradient[:-1] += PENALTY * head[:-1]
        return loss, gradient.ravel().astype(np.float64)

    first = np.zeros(shape) if start is None else start
    options = {"maxiter": ITERATIONS, "gtol": 2e-5, "ftol": 1e-7}
    found = minimize(measure, first.ravel().astype(np.float64), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(shape).astype(np.float32)


def predict(pixels: NDArray[np.float32], head: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities (..., C)."""
    logits = pixels @ head
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


# ---------------------------------------------------------------- a pool and its test


class World:
    """One pool with its start set, and the test.

    Args:
        task: Which.
        pool: Its patients.
        test: Other patients; the first `VALIDATION` are what the advice sees.
        seed: Of the start set and of strategies.
        budget: Slices at the end.
    """

    def __init__(
        self, task: Task, pool: Sequence[Patient], test: Sequence[Patient], seed: int, budget: int = BUDGET
    ) -> None:
        self.task, self.seed = task, seed
        self.classes = len(task.structures) + 1
        self.train = np.concatenate([_with_one(patient.train) for patient in pool])
        self.labels = np.concatenate([patient.train_labels for patient in pool])
        self.weights = np.concatenate([patient.train_weights for patient in pool])
        self.grid = np.concatenate([_with_one(patient.grid) for patient in pool])
        self.areas = np.concatenate([patient.areas for patient in pool])
        self.contours = np.concatenate([patient.contours for patient in pool])
        depths = [len(patient.areas) for patient in pool]
        self.slice_mm = np.repeat([patient.slice_mm for patient in pool], depths if task.pictures else 1)
        self.starts = np.arange(sum(depths) + 1) if task.pictures else np.cumsum([0, *depths])
        self.budget = min(budget, len(self))
        step = -(-sum(len(patient.test) for patient in test) // TEST_PIXELS)
        self.test = np.concatenate([_with_one(patient.test[::step]) for patient in test])
        self.truth = np.concatenate([patient.test_labels[::step] for patient in test])
        self.test_weights = np.concatenate([patient.test_weights[::step] for patient in test])
        self.test_owner = np.repeat(np.arange(len(test)), [len(patient.test[::step]) for patient in test])
        self.num_test = len(test)
        self.num_validation = min(VALIDATION, len(test) // 3)
        self.start = self._pick_start()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _pick_start(self) -> list[int]:
        """A slice of every structure, the rest by chance."""
        rng = np.random.default_rng(self.seed)
        rows: list[int] = []
        for s in range(self.classes - 1):
            showing = [int(row) for row in np.flatnonzero(self.areas[:, s] > 0) if row not in rows]
            if showing and not any(self.areas[row, s] > 0 for row in rows):
                rows.append(showing[rng.integers(len(showing))])
        rest = [int(row) for row in rng.permutation(len(self)) if row not in rows]
        return rows + rest[: QUERY - len(rows)]

    def fit(self, rows: Sequence[int], start: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The head of some annotated slices."""
        weights = self.weights[rows].ravel()
        used = weights > 0
        pixels = self.train[rows].reshape(-1, self.train.shape[-1])
        return fit_head(pixels[used], self.labels[rows].ravel()[used], weights[used], self.classes, start)

    def measure(self, head: NDArray[np.float32]) -> dict[str, float]:
        """Dice by volume, mean over structures and patients: of the test, and of its part that the advice sees."""
        found = (self.test @ head).argmax(axis=1)
        dice = np.full((self.num_test, self.classes - 1), np.nan)
        for s in range(1, self.classes):
            mine, true = found == s, self.truth == s
            sums = [
                np.bincount(self.test_owner[mask], self.test_weights[mask], self.num_test)
                for mask in (mine & true, mine, true)
            ]
            shown = sums[2] > 0
            dice[shown, s - 1] = 2 * sums[0][shown] / (sums[1] + sums[2])[shown]
        seen = self.num_validation
        return {"dice": _mean_over_patients(dice[seen:]), "validation": _mean_over_patients(dice[: max(1, seen)])}


def _mean_over_patients(dice: NDArray[np.float64]) -> float:
    """Mean over the patients that show anything, (n, P) with NaN where a patient does not show a structure; 0 if none
    does.
    """
    shown = dice[~np.isnan(dice).all(axis=1)]
    return float(np.nanmean(shown, axis=1).mean()) if len(shown) else 0.0


def _with_one(pixels: NDArray[np.float16]) -> NDArray[np.float32]:
    return np.concatenate([pixels, np.ones((*pixels.shape[:-1], 1), np.float16)], axis=-1).astype(np.float32)


# ---------------------------------------------------------------- what a strategy sees


@dataclass(frozen=True, eq=False)
class Look:
    """The pool as the present model sees it; N slices, P structures.

    Attributes:
        world: The pool. Strategies read neither its areas nor its labels, but on annotated slices.
        done: Rows that are annotated.
        round_index: 0 for the first query.
        head: The present model.
        rng: Of this strategy in this round.
        pool: Scores as a server has them.
    """

    world: World
    done: list[int]
    round_index: int
    head: NDArray[np.float32]
    rng: np.random.Generator
    _kept: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value that several strategies ask for."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """(N, G, C) of the present model, on the grid."""
        found: NDArray[np.float32] = self.keep("probabilities", lambda: predict(self.world.grid, self.head))
        return found

    @property
    def folds(self) -> tuple[NDArray[np.int64], list[NDArray[np.float32]]]:
        """Which part every annotated slice belongs to, and the heads without each part."""
        return self.keep("folds", self._fit_folds)

    def _fit_folds(self) -> tuple[NDArray[np.int64], list[NDArray[np.float32]]]:
        parts = np.random.default_rng([self.world.seed, self.round_index]).permutation(len(self.done)) % FOLDS
        rest = [[row for row, part in zip(self.done, parts, strict=True) if part != k] for k in range(FOLDS)]
        return parts, [self.world.fit(rows, self.head) for rows in rest]

    @property
    def fold_probabilities(self) -> NDArray[np.float32]:
        """(K, N, G, C): what is proposed."""
        found: NDArray[np.float32] = self.keep(
            "fold_probabilities", lambda: np.stack([predict(self.world.grid, head) for head in self.folds[1]])
        )
        return found

    def pool(self, proposals: bool) -> Pool:
        """Scores of every slice: of K proposals, or of the present model alone, whose disagreement is 0."""
        return self.keep(f"pool {proposals}", lambda: self._build_pool(proposals))

    def _build_pool(self, proposals: bool) -> Pool:
        world = self.world
        maps = self.fold_probabilities if proposals else self.probabilities[None]
        mean = maps.mean(axis=0)[..., 1:]
        drawn = maps[..., 1:] >= 0.5
        entropy = _entropy(mean).mean(axis=1).T
        foreground = drawn.mean(axis=(0, 2), dtype=np.float32).T
        disagreement = np.zeros_like(foreground)
        if proposals:
            for s in range(world.classes - 1):
                masks = torch.from_numpy(np.ascontiguousarray(drawn[..., s]))[:, :, None]
                disagreement[s] = compute_disagreement_per_slice(masks).numpy()
        # What is annotated is known: nothing to disagree about, and its true size.
        share = world.areas[self.done].T / float(np.prod(world.task.canvas))
        disagreement[:, self.done], entropy[:, self.done], foreground[:, self.done] = 0, 0, share
        return build_pool(
            [
                ImageScores(
                    f"{v:03d}", world.task.structures, *(t[:, a:b] for t in (disagreement, entropy, foreground)), mm
                )
                for v, (a, b, mm) in enumerate(zip(world.starts, world.starts[1:], world.slice_mm, strict=False))
            ]
        )

    @property
    def owners(self) -> NDArray[np.int64]:
        """Image of every row."""
        return np.repeat(np.arange(len(self.world.starts) - 1), np.diff(self.world.starts))

    @property
    def free(self) -> NDArray[np.bool_]:
        """Rows that can be chosen."""
        free = np.ones(len(self.world), bool)
        free[self.done] = False
        return free

    @property
    def embedding(self) -> NDArray[np.float32]:
        """(N, E): mean features of a slice, of everything and of what is predicted to be a structure."""

        def compute() -> NDArray[np.float32]:
            grid, shown = self.world.grid[..., :-1], 1 - self.probabilities[..., :1]
            inside = (grid * shown).sum(1) / (shown.sum(1) + 1)
            found = np.concatenate([grid.mean(1), inside], 1)
            return (found - found.mean(0)) / (found.std() + 1e-6)

        return self.keep("embedding", compute)

    def sketch(self, patient: float = 0.5, place: float = 1.0) -> NDArray[np.float32]:
        """(N, E): the same from scores alone, as a server has them: sizes of structures, place in the volume."""
        pool = self.pool(False)
        size = np.sqrt(pool.foreground / (pool.foreground.max(axis=1, keepdims=True) + 1e-9)).T
        along = np.concatenate([np.linspace(-1, 1, b - a) for a, b in pairwise(pool.starts)]) * place / 2
        other = (self.owners[:, None] == np.arange(len(self.world.starts) - 1)) * patient / 2**0.5
        return np.concatenate([size, along[:, None], other], 1).astype(np.float32)

    @property
    def corrections(self) -> NDArray[np.float32]:
        """(P, N): pixels that are expected to need a correction, learned from annotated slices by heads that had not
        seen them.
        """
        return self.keep("corrections", self._expect_corrections)

    def _expect_corrections(self) -> NDArray[np.float32]:
        world, (parts, heads) = self.world, self.folds
        count = world.classes - 1
        maps = self.fold_probabilities[..., 1:]
        doubt = (maps * (1 - maps)).mean(axis=2)  # K, N, P
        smooth = np.stack([_mean_of_three(fold, world.starts) for fold in doubt])
        area = (maps >= 0.5).mean(axis=2)
        place = np.concatenate([np.linspace(-1, 1, b - a) for a, b in pairwise(world.starts)])

        def describe(k: Any, rows: Any) -> NDArray[np.float64]:
            e, a = np.log(smooth[k, rows] + 1e-5), np.log(area[k, rows] + 1e-4)
            z = np.broadcast_to(place[rows][:, None], e.shape)
            plain = np.stack([e, a, e - a, z, z**2, np.ones_like(e)], -1)
            which = np.broadcast_to(np.eye(count), (*e.shape, count))
            return np.concatenate([plain, which], -1).reshape(-1, plain.shape[-1] + count)

        inputs, targets = [], []
        for k, head in enumerate(heads):
            rows = np.array([row for row, part in zip(self.done, parts, strict=True) if part == k], int)
            if len(rows):
                found = (world.train[rows] @ head).argmax(-1)
                wrong = [
                    (world.weights[rows] * ((found == s) != (world.labels[rows] == s))).sum(1)
                    for s in range(1, count + 1)
                ]
                inputs.append(describe(k, rows))
                targets.append(np.log1p(np.stack(wrong, 1)).ravel())
        x, y = np.concatenate(inputs), np.concatenate(targets)
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        every = np.arange(len(world))
        expected = np.mean([describe(k, every) @ weights for k in range(FOLDS)], 0).reshape(len(world), count)
        return np.expm1(np.clip(expected, 0, 12)).T.astype(np.float32)


def _entropy(p: NDArray[np.float32]) -> NDArray[np.float32]:
    """In bits."""
    q = np.clip(p, 1e-6, 1 - 1e-6)
    return -(q * np.log2(q) + (1 - q) * np.log2(1 - q))


def _mean_of_three(values: NDArray[Any], starts: NDArray[Any]) -> NDArray[Any]:
    """Over a slice and its neighbours in the volume; values (N, P)."""
    found = np.empty_like(values)
    for a, b in pairwise(starts):
        padded = np.pad(values[a:b], ((1, 1), (0, 0)), mode="edge")
        found[a:b] = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return found


# ---------------------------------------------------------------- strategies


def choose_by_library(look: Look, count: int, strategy: str, proposals: bool = False, **settings: Any) -> list[int]:
    """A strategy that the server has."""
    rounds = (look.world.budget - QUERY) // QUERY
    config = replace(AcquisitionConfig(rounds=rounds), **settings)
    pool = look.pool(proposals)
    annotated: dict[str, list[int]] = {image: [] for image in pool.images}
    for row in look.done:
        owner = pool.owner(row)
        annotated[pool.images[owner]].append(row - int(pool.starts[owner]))
    picks = pick_slices(
        pool, count, strategy, config, annotated=annotated, round_index=look.round_index, seed=look.world.seed
    )
    return [pool.rows(pick.image).start + pick.index for pick in picks]


def choose_herd(
    look: Look, count: int, where: str, weight: str, patient: float = 0.5, place: float = 1.0, radius: float = 1.0
) -> list[int]:
    """Uncertainty herding: slices that cover the pool, weighted by uncertainty, in a radius that shrinks as slices are
    annotated.

    Args:
        where: "features" or "scores": what slices are near each other by.
        weight: What a slice counts that is covered: "entropy", "size", "root size" or "even".
        patient, place: How far two slices are apart for being of two patients, and of two ends of a volume.
        radius: In medians of the distance to the nearest annotated slice.
    """
    points = look.embedding if where == "features" else look.sketch(patient, place)
    pool = look.pool(False)
    value = {
        "entropy": pool.entropy.sum(0),
        "size": pool.foreground.sum(0),
        "root size": np.sqrt(pool.foreground / (pool.foreground.max(axis=1, keepdims=True) + 1e-9)).sum(0),
        "even": np.ones(len(pool)),
    }[weight]
    squares = (points**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0))
    done, free, picks = list(look.done), look.free, []
    reach = radius * max(float(np.median(distance[:, done].min(1))), 1e-6)
    near = np.exp(-((distance / reach) ** 2))
    covered = near[:, done].max(1)
    while len(picks) < count and free.any():
        gains = value @ np.maximum(near - covered[:, None], 0)
        row = int(np.argmax(np.where(free, gains, -1)))
        picks.append(row)
        free[row] = False
        covered = np.maximum(covered, near[:, row])
    return picks


def choose_spread(
    look: Look,
    count: int,
    share: float = 0.66,
    value: str = "even",
    beta: float = 1.0,
    spread: bool = True,
    turns: str = "least",
    background: str = "uniform",
    apart: float = 0.0,
) -> list[int]:
    """Foreground by power noise, the rest of the quota elsewhere.

    Args:
        share: Of the choices, in the foreground of one structure.
        value: What the noise is added to: "even", "size", "entropy" of three slices, "corrections".
        beta: Inverse strength of the noise.
        spread: Only images with the fewest annotated slices.
        turns: The structure: "random", or "least" for the one with the fewest annotated slices.
        background: "uniform", or "islands": slices that `find_islands` finds something on, while there are any.
        apart: In mm; closer slices are left out while there are others.
    """
    pool = look.pool(False)
    free, done, picks = look.free, list(look.done), []
    per_image = np.bincount(look.owners[done], minlength=len(pool.images))
    seen = (look.world.areas[done] > 0).sum(0)
    values = {
        "even": lambda: (pool.foreground > 0).astype(np.float32),
        "size": lambda: pool.foreground,
        "entropy": lambda: _mean_of_three(pool.entropy.T, pool.starts).T,
        "corrections": lambda: look.corrections,
    }[value]()
    islands = find_islands(pool) if background == "islands" else np.zeros(len(pool), np.float32)
    reach = [max(0, int(np.ceil(apart / mm)) - 1) for mm in pool.slice_mm]
    while len(picks) < count and free.any():
        allowed = free.copy()
        if apart:
            for row in done:
                owner = look.owners[row]
                low = max(int(pool.starts[owner]), row - reach[owner])
                allowed[low : min(int(pool.starts[owner + 1]), row + reach[owner] + 1)] = False
            allowed = allowed if allowed.any() else free
        if spread:
            least = per_image[look.owners[allowed]].min()
            allowed &= per_image[look.owners] <= least
        row = None
        if look.rng.random() < share:
            shown = [s for s in range(len(values)) if (pool.foreground[s, allowed] > 0).any()]
            if shown:
                s = (
                    min(shown, key=lambda s: (seen[s], look.rng.random()))
                    if turns == "least"
                    else look.rng.choice(shown)
                )
                rows = np.flatnonzero(allowed & (pool.foreground[s] > 0))
                logs = beta * np.log(values[s, rows] + 1e-9) + look.rng.gumbel(size=len(rows))
                row = int(rows[np.argmax(logs)])
        if row is None:
            rows = np.flatnonzero(allowed)
            strange = rows[islands[rows] > 0]
            row = int(look.rng.choice(strange if len(strange) else rows))
        picks.append(row)
        done.append(row)
        free[row] = False
        per_image[look.owners[row]] += 1
        seen = seen + (pool.foreground[:, row] > 0)
    return picks


def find_islands(pool: Pool) -> NDArray[np.float32]:
    """(N,): what is predicted on a slice apart from the run of slices that holds most of its structure."""
    found = np.zeros(len(pool), np.float32)
    for area in pool.foreground:
        for a, b in pairwise(pool.starts):
            own = area[a:b]
            edges = np.flatnonzero(np.diff(np.r_[0, own > 0, 0]))
            runs = list(zip(edges[::2], edges[1::2], strict=True))
            if len(runs) > 1:
                main = max(runs, key=lambda run: own[run[0] : run[1]].sum())
                for low, high in runs:
                    if (low, high) != main:
                        found[a + low : a + high] += own[low:high]
    return found


def choose_typical(look: Look, count: int, first: int = 2, beta: tuple[float, float] = (1.0, 100.0)) -> list[int]:
    """Typical slices first, structure by structure; then power noise on the entropy of a structure, structure by
    structure.
    """
    pool = look.pool(False)
    free, picks = look.free, []
    seen = (look.world.areas[look.done] > 0).sum(0).astype(float)
    points = look.sketch()
    distance = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    nearest = distance[:, look.done].min(1)
    progress = min(1.0, look.round_index / max(1, (look.world.budget - QUERY) // QUERY - 1))
    strength = beta[0] * (beta[1] / beta[0]) ** progress
    entropy = _mean_of_three(pool.entropy.T, pool.starts).T
    while len(picks) < count and free.any():
        shown = [s for s in range(len(seen)) if (pool.foreground[s, free] > 0).any()]
        if not shown:
            row = int(look.rng.choice(np.flatnonzero(free)))
        else:
            s = min(shown, key=lambda s: (seen[s], look.rng.random()))
            rows = np.flatnonzero(free & (pool.foreground[s] > 0))
            if look.round_index < first:  # the next medoid: the slice that brings most others of the structure closer
                gain = np.maximum(nearest[rows][:, None] - distance[np.ix_(rows, rows)], 0).sum(0)
                row = int(rows[np.argmax(gain)])
            else:
                logs = strength * np.log(entropy[s, rows] + 1e-9) + look.rng.gumbel(size=len(rows))
                row = int(rows[np.argmax(logs)])
            seen[s] += 1
        nearest = np.minimum(nearest, distance[:, row])
        free[row] = False
        picks.append(row)
    return picks


def choose_corrections(look: Look, count: int) -> list[int]:
    """Most expected corrections first."""
    value = np.where(look.free, look.corrections.sum(0), -1)
    return [int(row) for row in np.argsort(-value, kind="stable")[:count]]


Choice = Callable[[Look, int], list[int]]

BASELINE = "foreground random 33 %"
PRIMARY = "coverage (proposal_disagreement)"
"""The proposed strategy, see above."""

STRATEGIES: Mapping[str, Choice] = {
    "uniform random": partial(choose_by_library, strategy="uniform_random"),
    BASELINE: partial(choose_by_library, strategy="foreground_random", foreground_share=0.33),
    "foreground random 66 %": partial(choose_by_library, strategy="foreground_random", foreground_share=0.66),
    "evenly spaced": partial(choose_by_library, strategy="evenly_spaced"),
    "entropy": partial(choose_by_library, strategy="entropy"),
    "former proposal_disagreement": partial(
        choose_by_library, strategy="proposal_disagreement", proposals=True, cover=False
    ),
    PRIMARY: partial(choose_by_library, strategy="proposal_disagreement"),
    "herding by features": partial(choose_herd, where="features", weight="entropy"),
    "typical, then power noise": choose_typical,
    "expected corrections": choose_corrections,
    "foreground 33 %, corrections": partial(
        choose_spread, share=0.33, turns="random", spread=False, value="corrections"
    ),
    "foreground 33 %, islands": partial(choose_spread, share=0.33, turns="random", spread=False, background="islands"),
}
"""Name in the tables -> how it chooses. Those that go by the library are what a server does."""

PILOT: Mapping[str, Choice] = {
    "uniform random": STRATEGIES["uniform random"],
    BASELINE: STRATEGIES[BASELINE],
    "evenly spaced": STRATEGIES["evenly spaced"],
    "typical, then power noise": choose_typical,
    "foreground 33 %, islands": STRATEGIES["foreground 33 %, islands"],
    **{
        f"herding, {where}, {weight}": partial(choose_herd, where=where, weight=weight)
        for where, weight in product(("features", "scores"), ("entropy", "even", "root size"))
    },
    **{
        f"herding, {where}, entropy, {name} {value}": partial(
            choose_herd, where=where, weight="entropy", **{name: value}
        )
        for where, name, value in (
            ("features", "radius", 0.5),
            ("scores", "radius", 0.5),
            ("scores", "patient", 1.0),
            ("scores", "place", 0.0),
            ("scores", "place", 2.0),
        )
    },
    **{
        f"spread, foreground {share:.0%}, {value}": partial(choose_spread, share=share, value=value)
        for share, value in ((0.66, "even"), (1.0, "even"), (0.66, "size"), (0.66, "entropy"), (0.66, "corrections"))
    },
    "foreground 66 %, size": partial(choose_spread, share=0.66, value="size", spread=False),
}
"""What settings were chosen from, on the pilot patients."""


# ---------------------------------------------------------------- running


def run_strategy(world: World, choose: Choice, name: str, first: NDArray[np.float32]) -> dict[str, Any]:
    """One curve: at every number of slices, Dice, the validation that the advice sees, and outline length."""
    done, head = list(world.start), first
    points = [describe_point(world, done, head)]
    while len(done) < world.budget:
        round_index = (len(done) - QUERY) // QUERY
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        look = Look(world, done, round_index, head, np.random.default_rng([world.seed, round_index, seed]))
        picks = choose(look, min(QUERY, world.budget - len(done)))
        if len(set(picks) | set(done)) != len(picks) + len(done):
            raise RuntimeError(f"'{name}' chose a slice twice.")
        done = done + picks
        head = world.fit(done, head)
        points.append(describe_point(world, done, head))
    return {"points": points}


def describe_point(world: World, done: Sequence[int], head: NDArray[np.float32]) -> dict[str, float]:
    measured = {name: round(value, 5) for name, value in world.measure(head).items()}
    return {"slices": len(done), "contour": float(world.contours[list(done)].sum()), **measured}


def build_world(patients: Patients, names: Sequence[str], number: int, budget: int = BUDGET) -> World:
    """Pool and test of a pair.

    Args:
        patients: Of the task.
        names: Whom to share out; two thirds at most are the pool.
        number: Of the pair: repetition * groups + group.
    """
    task = patients.task
    repetition, group = divmod(number, task.groups)
    order = [names[i] for i in np.random.default_rng([repetition, 7]).permutation(len(names))]
    size = min(task.patients, 2 * len(order) // 3)
    pool = [order[(group * size + i) % len(order)] for i in range(size)]
    test = [name for name in order if name not in pool][: task.test_patients]
    return World(task, [patients.load(name) for name in pool], [patients.load(name) for name in test], number, budget)


def run_pair(world: World, strategies: Mapping[str, Choice], kept: dict[str, Any]) -> None:
    """Complete a pair with the strategies that it lacks."""
    missing = [name for name in strategies if name not in kept["curves"]]
    first = world.fit(world.start)
    kept["pool_slices"] = len(world)
    if "ceiling" not in kept and kept["number"] < CEILINGS:
        kept["ceiling"] = world.measure(world.fit(range(len(world)), first))["dice"]
    for name in missing:
        started = time.process_time()
        kept["curves"][name] = run_strategy(world, strategies[name], name, first)
        kept["curves"][name]["processor_seconds"] = round(time.process_time() - started, 2)


def find_folder(work: Path, patients: Patients, budget: int, is_pilot: bool) -> Path:
    """Where pairs are kept, by what they depend on."""
    settings = [
        QUERY,
        budget,
        FOLDS,
        VALIDATION,
        TEST_PIXELS,
        PENALTY,
        BALANCE,
        ITERATIONS,
    ]
    parts = json.dumps([patients.key, patients.task.describe(), settings])
    kind = "pilot" if is_pilot else "pairs"
    return work / f"{kind}-{patients.task.name}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def find_version(choose: Choice) -> str:
    """Of a strategy: its settings and the code that chooses, so that a changed one does not continue an old curve."""
    is_partial = isinstance(choose, partial)
    code = inspect.getsource(choose.func if is_partial else choose)
    settings = sorted(choose.keywords.items()) if is_partial else []
    return hashlib.sha256(repr((code, settings)).encode()).hexdigest()[:12]


def run_task(
    patients: Patients,
    strategies: Mapping[str, Choice],
    folder: Path,
    numbers: Sequence[int],
    budget: int,
    is_pilot: bool,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All pairs of a task; what is kept is not computed again."""
    names = patients.pilot if is_pilot else patients.measured
    found = []
    for number in numbers:
        file = folder / f"{number:02d}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"number": number, "curves": {}}
        versions = {name: find_version(choose) for name, choose in strategies.items()}
        kept["curves"] = {
            name: curve
            for name, curve in kept["curves"].items()
            if name not in versions or curve.get("version") == versions[name]
        }
        if any(name not in kept["curves"] for name in strategies):
            run_pair(build_world(patients, names, number, budget), strategies, kept)
            for name in strategies:
                kept["curves"][name]["version"] = versions[name]
            folder.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(".part")
            scratch.write_text(json.dumps(kept), encoding="utf-8")
            scratch.replace(file)
            tell(
                f"{patients.task.name} {number}: "
                + ", ".join(f"{n} {compute_area(c):.3f}" for n, c in kept["curves"].items())
            )
        found.append({**kept, "curves": {name: kept["curves"][name] for name in strategies}})
    return found


# ---------------------------------------------------------------- what came of it


def compute_area(curve: Mapping[str, Any]) -> float:
    """Mean Dice over the budget: the area under Dice against slices, divided by the range of slices."""
    x, y = ([float(point[name]) for point in curve["points"]] for name in ("slices", "dice"))
    return float(np.trapezoid(y, x)) / max(1e-9, x[-1] - x[0])


def compare_by_contour(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Difference of mean Dice over the outline length that both drew."""
    x, y = ([[float(p[name]) for p in curve["points"]] for curve in (one, other)] for name in ("contour", "dice"))
    places = np.linspace(x[0][0], min(x[0][-1], x[1][-1]), 200)
    return float(np.mean(np.interp(places, x[0], y[0]) - np.interp(places, x[1], y[1])))


def find_slices_for(curve: Mapping[str, Any], dice: float) -> float | None:
    """Slices at which a curve first reaches a Dice, between its points by a straight line; None if it never does."""
    before: Mapping[str, float] | None = None
    for after in curve["points"]:
        if after["dice"] >= dice:
            if before is None:
                return float(after["slices"])
            share = (dice - before["dice"]) / (after["dice"] - before["dice"])
            return float(before["slices"] + share * (after["slices"] - before["slices"]))
        before = after
    return None


def flip_signs(gaps: NDArray[np.float64], groups: int) -> float:
    """Two-sided p of a mean difference: the share of the ways to flip the signs of whole repetitions that give one as
    large.
    """
    means = gaps[: len(gaps) // groups * groups].reshape(-1, groups).mean(1)
    if len(means) == 0:
        return 1.0
    signs = np.array(list(product((-1, 1), repeat=len(means))))
    return float((np.abs(signs @ means) >= abs(means.sum()) - 1e-12).mean())


def summarise_task(task: Task, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the pairs, and every strategy against the baseline."""
    from scipy.stats import wilcoxon

    rows: dict[str, Any] = {}
    for name in pairs[0]["curves"]:
        curves = [pair["curves"][name] for pair in pairs]
        bases = [pair["curves"][BASELINE] for pair in pairs]
        gaps = np.array([compute_area(a) - compute_area(b) for a, b in zip(curves, bases, strict=True)])
        by_contour = np.array([compare_by_contour(a, b) for a, b in zip(curves, bases, strict=True)])
        rows[name] = {
            "area": float(np.mean([compute_area(curve) for curve in curves])),
            "final_dice": float(np.mean([curve["points"][-1]["dice"] for curve in curves])),
            "contour": float(np.mean([curve["points"][-1]["contour"] for curve in curves])),
            "gap": float(gaps.mean()),
            "gap_deviation": float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0,
            "wins": int((gaps > 0).sum()),
            "gap_by_contour": float(by_contour.mean()),
            "p": float(wilcoxon(gaps).pvalue) if np.abs(gaps).max() > 0 else 1.0,
            "p_by_repetition": flip_signs(gaps, task.groups),
            "p_by_contour": float(wilcoxon(by_contour).pvalue) if np.abs(by_contour).max() > 0 else 1.0,
        }
        if all("uniform random" in pair["curves"] for pair in pairs):
            ends = [pair["curves"]["uniform random"]["points"][-1] for pair in pairs]
            needed = [find_slices_for(curve, end["dice"]) for curve, end in zip(curves, ends, strict=True)]
            shares = [(n or np.inf) / end["slices"] for n, end in zip(needed, ends, strict=True)]
            rows[name]["uniform_end_at"] = float(np.median(shares)) if np.isfinite(np.median(shares)) else None
            rows[name]["uniform_end_reached"] = sum(n is not None for n in needed)
    return {
        "task": task.name,
        "pairs": len(pairs),
        "pool_slices": float(np.mean([pair["pool_slices"] for pair in pairs])),
        "start": float(np.mean([pair["curves"][BASELINE]["points"][0]["dice"] for pair in pairs])),
        "ceiling": float(np.mean([pair["ceiling"] for pair in pairs if "ceiling" in pair])),
        "strategies": rows,
        "advice": check_advice(
            [pair["curves"][name] for pair in pairs for name in (BASELINE, PRIMARY) if name in pair["curves"]]
        ),
    }


def check_advice(curves: Sequence[Mapping[str, Any]], more: int = 10) -> dict[str, float]:
    """What the stopping advice expected of the next slices, by the validation that it saw, against what then came on
    the rest of the test.
    """
    errors, inside, expected, came = [], [], [], []
    for curve in curves:
        points = curve["points"]
        for at in range(1, len(points)):
            later = [p for p in points[at:] if p["slices"] == points[at]["slices"] + more]
            if not later:
                continue
            seen = [CurvePoint(f"{p['slices']}", int(p["slices"]), p["validation"]) for p in points[: at + 1]]
            gain = predict_gain(seen, more)
            if gain is None:
                continue
            truth = later[0]["dice"] - points[at]["dice"]
            errors.append(abs(gain.expected - truth))
            inside.append(gain.low <= truth <= gain.high)
            expected.append(gain.expected)
            came.append(truth)
    return {
        "predictions": len(errors),
        "mean_expected": float(np.mean(expected)),
        "mean_gain": float(np.mean(came)),
        "mean_error": float(np.mean(errors)),
        "mean_error_of_no_change": float(np.mean(np.abs(came))),
        "coverage": float(np.mean(inside)),
    }


def format_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = []
    for summary in summaries:
        lines += [
            f"`{summary['task']}`: {summary['pairs']} pairs, pools of {summary['pool_slices']:.0f} slices, Dice "
            f"{summary['start']:.3f} with {QUERY} slices, {summary['ceiling']:.3f} with all of the pool.",
            "",
            "| strategy | area | minus foreground-random 33 %: mean ± deviation, wins, p, p by repetition | "
            "by outline length: mean, p | Dice at the end | outline length | uniform's end at |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in summary["strategies"].items():
            title = f"**{name}**" if name == PRIMARY else name
            gap = (
                ""
                if name == BASELINE
                else f"{row['gap']:+.4f} ± {row['gap_deviation']:.4f}, {row['wins']} of {summary['pairs']}, "
                f"{row['p']:.2g}, {row['p_by_repetition']:.2g}"
            )
            contour = "" if name == BASELINE else f"{row['gap_by_contour']:+.4f}, {row['p_by_contour']:.2g}"
            reached = ""
            if "uniform_end_reached" in row:
                share = "not reached" if row["uniform_end_at"] is None else f"{100 * row['uniform_end_at']:.0f} %"
                reached = f"{share} ({row['uniform_end_reached']} of {summary['pairs']})"
            lines.append(
                f"| {title} | {row['area']:.4f} | {gap} | {contour} | {row['final_dice']:.3f} "
                f"| {row['contour']:.0f} | {reached} |"
            )
        lines.append("")
    lines += [
        "| advice on | predictions | gain expected, mean | gain that came, mean | mean error | "
        "error if no gain is expected | in the interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for summary in summaries:
        a = summary["advice"]
        lines.append(
            f"| {summary['task']} | {a['predictions']} | {a['mean_expected']:.3f} | {a['mean_gain']:.3f} "
            f"| {a['mean_error']:.3f} | {a['mean_error_of_no_change']:.3f} | {100 * a['coverage']:.0f} % |"
        )
    return "\n".join(lines)


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Mean Dice against slices, and against outline length, one column per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(4.6 * len(results), 7.4), squeeze=False)
    names = list(dict.fromkeys(name for pairs in results.values() for name in pairs[0]["curves"]))
    styles = {name: (f"C{n % 10}", "-" if n < 10 else "--") for n, name in enumerate(names)}
    lines = {}
    for column, (task, pairs) in enumerate(results.items()):
        for name in pairs[0]["curves"]:
            points = [pair["curves"][name]["points"] for pair in pairs]
            mean = {key: np.mean([[p[key] for p in row] for row in points], 0) for key in ("slices", "contour", "dice")}
            strong = name in (PRIMARY, BASELINE)
            for row, key in enumerate(("slices", "contour")):
                (lines[name],) = axes[row][column].plot(
                    mean[key],
                    mean["dice"],
                    color=styles[name][0],
                    linestyle=styles[name][1],
                    linewidth=2.6 if strong else 1.0,
                    zorder=3 if strong else 2,
                )
        ceiling = float(np.mean([pair["ceiling"] for pair in pairs if "ceiling" in pair]))
        for row, text in enumerate(("annotated slices", "outline drawn, pixels")):
            axes[row][column].axhline(ceiling, color="grey", linewidth=0.8, linestyle=":")
            axes[row][column].set(xlabel=text, ylabel="Dice on test patients")
            axes[row][column].grid(alpha=0.3)
        axes[0][column].set_title(f"{task}, mean of {len(pairs)} pools; dotted: the whole pool", fontsize=9)
    figure.legend(lines.values(), lines.keys(), ncol=4, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_results(path: Path, budget: int, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """All curves and their summary, as far as they are."""
    tasks = [TASKS[name] for name in results]
    content = {
        "command": shlex.join(sys.argv),
        "settings": {"query": QUERY, "budget": budget, "folds": FOLDS, "tasks": [task.describe() for task in tasks]},
        "summary": [summarise_task(task, results[task.name]) for task in tasks],
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with heart/, hippocampus/ and lidc/, each as its set comes")
    parser.add_argument("--tasks", nargs="*", choices=sorted(TASKS), default=["heart", "hippocampus", "lidc"])
    parser.add_argument("--strategies", nargs="*", help="names as in the tables (default: all)")
    parser.add_argument("--pairs", type=int, help="so many, from the first (default: all of the task)")
    parser.add_argument("--budget", type=int, default=BUDGET, help="slices at the end")
    parser.add_argument("--pilot", action="store_true", help="on the pilot patients, with more strategies")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "active_learning")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summarise", type=Path, help="only the table (and --picture) from this JSON file")
    options = parser.parse_args(arguments)

    if options.summarise:
        results = json.loads(options.summarise.read_text(encoding="utf-8"))["results"]
    else:
        if options.data is None:
            parser.error("--data is needed, or --summarise")
        known = PILOT if options.pilot else STRATEGIES
        unknown = set(options.strategies or ()) - known.keys()
        if unknown:
            parser.error(f"no such strategy: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        chosen = {name: known[name] for name in known if not options.strategies or name in options.strategies}
        chosen = {BASELINE: known[BASELINE], **chosen}
        torch.set_num_threads(options.threads)
        results = {}
        for name in options.tasks:
            task = TASKS[name]
            patients = Patients(task, options.data, options.model, options.work)
            patients.prepare(patients.pilot if options.pilot else patients.measured)
            folder = find_folder(options.work, patients, options.budget, options.pilot)
            count = task.groups * task.repetitions if options.pairs is None else options.pairs
            tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
            results[name] = run_task(patients, chosen, folder, range(count), options.budget, options.pilot, tell)
            if options.out:
                write_results(options.out, options.budget, results)
    print(format_table([summarise_task(TASKS[name], pairs) for name, pairs in results.items()]))
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
