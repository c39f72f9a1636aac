"""Which slices a person should look at next: scores of every slice, and strategies that choose by them. Pure functions
on arrays.

`proposal_disagreement` chooses slices that stand for many: by the K proposals that the model makes of every slice, it
covers what is uncertain and what nothing annotated is like (`progidiff.active_learning.coverage`).

With ``cover`` switched off it ranks slices by a score, as version 0.1 did. What a slice is worth is asked per
structure, from its proposals:

1. *disagreement*, 1 - mean pairwise Dice of the proposals: where they differ, a person decides something. Its square
   root: a slice on which they differ four times as much is worth twice as much, not four times
2. times a *foreground weight*, the predicted size: the ends of an organ and three noisy pixels disagree most and teach
   least
3. *stratified* over structures (66 % of the choices, after ClaSP-PE): else the structure that is worst everywhere takes
   them all
4. *spread over images*: those with the fewest annotated slices first, because patients differ more than slices of a
   patient
5. never closer than a *minimum distance* to what is chosen or annotated: neighbouring slices tell the same
6. *Gumbel noise* on the logarithm of the score, strong in the first rounds (beta 1) and fainter in the last (beta 10):
   early models are wrong about what they do not know

Every part can be switched off (`AcquisitionConfig`), and the plain rivals are here too: uniform, foreground-aware
random, evenly spaced, entropy. None of this knows whether a strategy is worth anything;
``benchmarks/active_learning.py`` measures it.

Axial indices z count from inferior to superior.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.active_learning.coverage import Choice, Cover, Sketches, sketch_slices
from progidiff.active_learning.settings import BY_SCORE, STRATEGIES, AcquisitionConfig
from progidiff.errors import GeometryError, RequestError
from progidiff.proposals.agreement import compute_disagreement_per_slice

DRAWN = 128
"""Smallest 8-bit probability that counts as drawn."""

LEAST = np.float32(1e-3)
"""Score of a slice on which all proposals agree about something."""

LANDMARKS = 1024
"""Of a larger pool so many slices, by chance, stand for all of it."""

OFFERED = 1024
"""Of a larger pool so many slices, by chance, are compared at a time."""

Annotated = Mapping[str, Collection[int] | None]
"""Image -> its annotated slices; None: all of them; not there: none."""


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What the proposals of one image say about each of its slices.

    Attributes:
        image: Id.
        structures: P names.
        disagreement: float32 (P, Z), 1 - mean pairwise Dice, 0..1.
        entropy: float32 (P, Z), mean over the pixels of the binary entropy of the mean proposal, in bits, 0..1.
        foreground: float32 (P, Z), share of the slice's pixels that a proposal draws, on average over the K, 0..1.
        slice_mm: Distance of neighbouring slices.
        version: Of the model that made the proposals.
    """

    image: str
    structures: tuple[str, ...]
    disagreement: NDArray[Any]
    entropy: NDArray[Any]
    foreground: NDArray[Any]
    slice_mm: float
    version: str = ""

    def __post_init__(self) -> None:
        shapes = {self.disagreement.shape, self.entropy.shape, self.foreground.shape}
        if len(shapes) != 1 or self.disagreement.ndim != 2 or len(self.disagreement) != len(self.structures):
            raise GeometryError(
                f"The scores of '{self.image}' must all have the shape "
                f"({len(self.structures)}, Z), got {sorted(shapes)}."
            )

    @property
    def num_slices(self) -> int:
        """Z."""
        return int(self.disagreement.shape[1])


def compute_scores(
    image: str,
    structures: Sequence[str],
    probabilities: NDArray[Any],
    slice_mm: float,
    version: str = "",
    covered: NDArray[Any] | None = None,
) -> ImageScores:
    """Score every slice of an image by its proposals.

    Args:
        image: Id.
        structures: P names.
        probabilities: uint8 of shape (P, K, Z, h, w), 255 is probability 1, K >= 2.
        slice_mm: Distance of neighbouring slices.
        version: Of the model.
        covered: bool (h, w): which pixels lie in the image; None for all.

    Raises:
        GeometryError: if K < 2 or the shape is another one.
    """
    if probabilities.ndim != 5 or len(probabilities) != len(structures) or probabilities.dtype != np.uint8:
        raise GeometryError(
            f"Scores need uint8 probabilities of shape ({len(structures)}, K, Z, h, w), "
            f"got {probabilities.dtype} of {probabilities.shape}."
        )
    count, depth = probabilities.shape[1:3]
    inside = np.ones(probabilities.shape[3:], dtype=bool) if covered is None else covered
    pixels = max(1, int(inside.sum()))
    entropy_of_sum = _binary_entropy(np.arange(255 * count + 1) / (255 * count)).astype(np.float32)
    disagreement, entropy, foreground = (np.zeros((len(structures), depth), dtype=np.float32) for _ in range(3))
    for index, structure in enumerate(probabilities):
        occupied = np.flatnonzero(structure.any(axis=(0, 2, 3)))
        if len(occupied) == 0:
            continue
        maps = structure[:, occupied] * inside
        drawn = maps >= DRAWN
        disagreement[index, occupied] = compute_disagreement_per_slice(torch.from_numpy(drawn)).numpy()
        total = maps.sum(axis=0, dtype=np.uint32)
        entropy[index, occupied] = (entropy_of_sum[total] * inside).sum(axis=(1, 2)) / pixels
        foreground[index, occupied] = drawn.sum(axis=(0, 2, 3)) / (count * pixels)
    return ImageScores(image, tuple(structures), disagreement, entropy, foreground, float(slice_mm), version)


@dataclass(frozen=True)
class Pick:
    """One slice that was chosen.

    Attributes:
        image: Id.
        index: Axial slice.
        score: What it was chosen by, before noise; 0 where the strategy has no score.
        structures: The structures it was chosen for, the strongest first.
        reason: A sentence for people, without a full stop.
    """

    image: str
    index: int
    score: float
    structures: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Pool:
    """The slices of many images side by side; make it with `build_pool`.

    Attributes:
        images: V ids, ascending.
        structures: P names, of all images together.
        starts: int (V + 1,): the slices of image v are rows starts[v]..starts[v + 1].
        slice_mm: float (V,).
        disagreement, entropy, foreground: float32 (P, N); as in `ImageScores`.
    """

    images: tuple[str, ...]
    structures: tuple[str, ...]
    starts: NDArray[Any]
    slice_mm: NDArray[Any]
    disagreement: NDArray[Any]
    entropy: NDArray[Any]
    foreground: NDArray[Any]
    _positions: dict[str, int] = field(default_factory=dict, repr=False)
    _noise: dict[tuple[int, int], NDArray[Any]] = field(default_factory=dict, repr=False)
    _values: dict[tuple[str, float, bool], NDArray[Any]] = field(default_factory=dict, repr=False)
    _logs: dict[tuple[AcquisitionConfig, int, int], NDArray[Any]] = field(default_factory=dict, repr=False)
    _kept: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def owner(self, row: int) -> int:
        """Which image a row belongs to."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def rows(self, image: str) -> slice:
        """The rows of an image; none if it is not in the pool."""
        position = self._find(image)
        return slice(0, 0) if position is None else slice(int(self.starts[position]), int(self.starts[position + 1]))

    def _find(self, image: str) -> int | None:
        if not self._positions:
            self._positions.update({name: number for number, name in enumerate(self.images)})
        return self._positions.get(image)

    def values(self, config: AcquisitionConfig) -> NDArray[Any]:
        """What every slice is worth for every structure, float32 (P, N), 0..1, before noise."""
        key = (config.score, config.score_power, config.foreground_weight)
        if key not in self._values:
            values = self.disagreement if config.score == "disagreement" else self.entropy
            if config.score_power != 1:
                # Complete agreement is not worth nothing: proposals that agree can be wrong.
                values = np.where(
                    self.foreground > 0, np.maximum(values, LEAST) ** np.float32(config.score_power), np.float32(0)
                )
            self._values[key] = values * weigh_by_foreground(self.foreground) if config.foreground_weight else values
        return self._values[key]

    def noisy_logs(self, config: AcquisitionConfig, round_index: int, seed: int) -> NDArray[Any]:
        """What slices are compared by, float32 (P + 1, N): the logarithm of their values with noise; the last row is
        for all structures.
        """
        key = (config, round_index, seed)
        logs = self._logs.get(key)
        if logs is None:
            values = self.values(config)
            total = values.mean(axis=0, keepdims=True) if len(values) else np.zeros((1, len(self)), np.float32)
            with np.errstate(divide="ignore"):
                logs = np.log(np.concatenate([values, total]))
            if config.noise:
                logs += self.gumbel(seed, round_index) / np.float32(config.beta(round_index))
            self._logs.clear()  # as with the noise
            self._logs[key] = logs
        return logs

    def total_entropy(self) -> NDArray[Any]:
        """Entropy of all structures together, float32 (N,)."""
        found: NDArray[Any] = self._keep("entropy", lambda: self.entropy.sum(axis=0))
        return found

    def shown(self) -> NDArray[Any]:
        """Rows on which anything is predicted."""
        return self._keep("shown", lambda: np.flatnonzero(self.total_entropy() > 0))

    def owners(self) -> NDArray[Any]:
        """The image of every row, int (N,)."""
        return self._keep("owners", lambda: np.repeat(np.arange(len(self.images)), np.diff(self.starts)))

    def sketch(self, rows: NDArray[Any]) -> Sketches:
        """What these rows are compared by."""
        largest = self._keep("largest", lambda: self.foreground.max(axis=1, initial=0.0))
        own = self.owners()[rows]
        count = np.diff(self.starts)[own]
        places = (rows - self.starts[own]) / np.maximum(1, count - 1)
        return Sketches(sketch_slices(self.foreground[:, rows], largest, places.astype(np.float32)), own)

    def _keep(self, name: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def only(self, image: str, config: AcquisitionConfig) -> Pool:
        """One image with the values that it has in this pool; an empty pool if it is not there."""
        rows = self.rows(image)
        known = rows.stop > rows.start
        position = self._find(image) or 0
        part = Pool(
            self.images[position : position + 1] if known else (),
            self.structures,
            np.array([0, rows.stop - rows.start] if known else [0]),
            self.slice_mm[position : position + 1],
            self.disagreement[:, rows],
            self.entropy[:, rows],
            self.foreground[:, rows],
        )
        part._values[config.score, config.score_power, config.foreground_weight] = self.values(config)[:, rows]
        return part

    def gumbel(self, seed: int, round_index: int) -> NDArray[Any]:
        """Standard Gumbel noise (P + 1, N), the same for a slice whatever else is in the pool; the last row is for all
        structures together.
        """
        key = (seed, round_index)
        noise = self._noise.get(key)
        if noise is None:
            parts = []
            for image, count in zip(self.images, np.diff(self.starts), strict=True):
                digest = hashlib.blake2b(f"{seed}:{round_index}:{image}".encode(), digest_size=8).digest()
                parts.append(
                    np.random.default_rng(int.from_bytes(digest))
                    .gumbel(size=(int(count), len(self.structures) + 1))
                    .astype(np.float32)
                )
            noise = (
                np.ascontiguousarray(np.concatenate(parts).T)
                if parts
                else np.zeros((len(self.structures) + 1, 0), np.float32)
            )
            self._noise.clear()  # one round is asked for again and again, an older one never
            self._noise[key] = noise
        return noise


def build_pool(scores: Sequence[ImageScores], names: Sequence[str] = ()) -> Pool:
    """Put the scores of many images side by side; a structure that an image was not asked for has score 0 there.

    Args:
        scores: Of each image.
        names: Structures that come first, in this order, whether an image has them or not.

    Raises:
        RequestError: if an image is there twice.
    """
    ordered = sorted(scores, key=lambda entry: entry.image)
    images = tuple(entry.image for entry in ordered)
    if len(set(images)) != len(images):
        raise RequestError("An image is in the pool twice; give its newest scores only.")
    structures = tuple(dict.fromkeys([*names, *(name for entry in ordered for name in entry.structures)]))
    starts = np.cumsum([0, *(entry.num_slices for entry in ordered)])
    tables = {
        name: np.zeros((len(structures), int(starts[-1])), dtype=np.float32)
        for name in ("disagreement", "entropy", "foreground")
    }
    positions = {name: index for index, name in enumerate(structures)}
    for entry, start in zip(ordered, starts, strict=False):
        # Structures mostly come in the same order; a range is filled ten times faster than a list of rows.
        rows: slice | list[int] = [positions[name] for name in entry.structures]
        if rows == list(range(len(structures))):
            rows = slice(None)
        for name, table in tables.items():
            table[rows, start : start + entry.num_slices] = getattr(entry, name)
    slice_mm = np.array([entry.slice_mm for entry in ordered], dtype=np.float64)
    return Pool(images, structures, starts, slice_mm, tables["disagreement"], tables["entropy"], tables["foreground"])


def weigh_by_foreground(foreground: NDArray[Any]) -> NDArray[Any]:
    """How far the predicted size of a structure on a slice makes its disagreement worth a look.

    a / r, at most 1, with a the predicted area and r what is large for the structure (the upper quartile over the
    slices that show it): a slice in the middle of an organ weighs 1, its ends and islands next to nothing.

    Args:
        foreground: float (P, N), shares of the slice.

    Returns:
        float32 (P, N), 0..1.

    Example:
        >>> [f"{weight:.2f}" for weight in weigh_by_foreground(np.array([[0.0, 0.01, 0.02, 0.04, 0.04]]))[0]]
        ['0.00', '0.25', '0.50', '1.00', '1.00']
    """
    weight = np.zeros(foreground.shape, dtype=np.float32)
    for row, area in zip(weight, foreground, strict=True):
        shown = area > 0
        if shown.any():
            large = area.dtype.type(np.quantile(area[shown], 0.75))  # Not wider: choices stay those of numpy 1.
            row[shown] = np.minimum(1, area[shown] / large)
    return weight


def pick_slices(
    pool: Pool,
    count: int,
    strategy: str = "proposal_disagreement",
    config: AcquisitionConfig | None = None,
    *,
    annotated: Annotated | None = None,
    within: str | None = None,
    excluded: Collection[str] = (),
    one_per_image: bool = False,
    round_index: int = 0,
    seed: int = 0,
) -> list[Pick]:
    """Choose slices; the same arguments give the same answer.

    Args:
        pool: Everything that is scored.
        count: Slices wanted; fewer come back if there are fewer.
        strategy: One of `STRATEGIES`.
        config: Of the strategies.
        annotated: What is not to be chosen again; chosen slices keep their distance from it.
        within: Only slices of this image.
        excluded: No slices of these images.
        one_per_image: At most one slice of an image: an order of images.
        round_index: How often the model was trained since the beginning, 0, 1, 2...
        seed: Of noise and chance.

    Raises:
        RequestError: if there is no such strategy or a setting is out of range.
    """
    config = config or AcquisitionConfig()
    config.check()
    if strategy not in STRATEGIES:
        raise RequestError(f"There is no strategy '{strategy}'; there are {', '.join(STRATEGIES)}.")
    if strategy == "entropy":  # the plain rival: no weight, no noise, nothing spread
        config = replace(config, score="entropy", score_power=1.0, foreground_weight=False, noise=False)
        config = replace(config, stratified_share=0.0, spread_over_images=False, min_distance_mm=0.0)
    by_cover = strategy == "proposal_disagreement" and config.cover
    if within is not None and not by_cover:
        pool = pool.only(within, config)
        annotated = {within: annotated[within]} if annotated and within in annotated else None
    draft = _Draft(pool, annotated or {}, excluded, one_per_image)
    if by_cover:
        if within is not None:
            draft.keep_only(pool.rows(within))
        return _pick_by_cover(draft, count, config, np.random.default_rng([seed, *strategy.encode()]))
    rng = np.random.default_rng([seed, round_index, *strategy.encode()])
    if strategy in BY_SCORE:
        return _pick_by_score(draft, count, config, round_index, seed, rng)
    if strategy == "evenly_spaced":
        return _pick_evenly(draft, count, seed)
    return _pick_at_random(draft, count, config.foreground_share if strategy == "foreground_random" else 0.0, rng)


class _Draft:
    """Which rows may still be chosen."""

    def __init__(self, pool: Pool, annotated: Annotated, excluded: Collection[str], one_per_image: bool) -> None:
        self.pool = pool
        self.one_per_image = one_per_image
        self.span = slice(0, len(pool))
        self.free = np.ones(len(pool), dtype=bool)
        self.done: list[int] = []
        for image in excluded:
            self.free[pool.rows(image)] = False
        for image, slices in annotated.items():
            rows = pool.rows(image)
            if slices is None:
                self.free[rows] = False
                self.done += range(rows.start, rows.stop)
            else:
                self.done += [rows.start + z for z in slices if 0 <= z < rows.stop - rows.start]
        self.free[self.done] = False
        self.apart = self.free.copy()

    def keep_only(self, rows: slice) -> None:
        """Leave out everything else; what is annotated elsewhere still counts as annotated."""
        self.span = rows
        for allowed in (self.free, self.apart):
            allowed[: rows.start] = False
            allowed[rows.stop :] = False

    def keep_distance(self, min_mm: float) -> None:
        """Leave out what is close to annotated slices."""
        if min_mm > 0:
            for row in self.done:
                self._block_around(row, min_mm)

    def take(self, row: int, min_mm: float = 0.0) -> None:
        """Choose a row."""
        pool = self.pool
        self.free[row] = False
        self.apart[row] = False
        if self.one_per_image:
            owner = pool.owner(row)
            self.free[pool.starts[owner] : pool.starts[owner + 1]] = False
            self.apart &= self.free
        elif min_mm > 0:
            self._block_around(row, min_mm)

    def _block_around(self, row: int, min_mm: float) -> None:
        owner = self.pool.owner(row)
        reach = max(0, math.ceil(min_mm / max(self.pool.slice_mm[owner], 1e-3)) - 1)
        first, last = max(self.pool.starts[owner], row - reach), min(self.pool.starts[owner + 1], row + reach + 1)
        self.apart[first:last] = False


def _pick_by_score(
    draft: _Draft, count: int, config: AcquisitionConfig, round_index: int, seed: int, rng: np.random.Generator
) -> list[Pick]:
    pool = draft.pool
    values = pool.values(config)
    logs = pool.noisy_logs(config, round_index, seed)
    draft.keep_distance(config.min_distance_mm)
    # How often every structure has had its turn: slices that are annotated and show it count.
    turns = (pool.foreground[:, draft.done] > 0).sum(axis=1).astype(np.int64)
    owners = np.repeat(np.arange(len(pool.images)), np.diff(pool.starts))
    done = np.bincount(owners[draft.done], minlength=len(pool.images))
    picks: list[Pick] = []
    while len(picks) < count and draft.free.any():
        number = len(picks)
        stratified = math.floor((number + 1) * config.stratified_share + 1e-9) > math.floor(
            number * config.stratified_share + 1e-9
        )
        row, structure = None, None
        # First the images with least done that have something to offer. The distance yields before an empty slice is
        # chosen.
        for allowed in (
            *(_levels(draft.apart, done, owners) if config.spread_over_images else ()),
            draft.apart,
            draft.free,
        ):
            if stratified:
                for candidate in np.argsort(turns, kind="stable"):
                    row = _best(logs[candidate], allowed)
                    if row is not None:
                        structure = int(candidate)
                        turns[structure] += 1
                        break
            if row is None:
                row = _best(logs[-1], allowed)
            if row is not None:
                break
        else:  # nothing is predicted on any slice that is left
            row = int(rng.choice(np.flatnonzero(draft.apart if draft.apart.any() else draft.free)))
        done[owners[row]] += 1
        draft.take(row, config.min_distance_mm)
        picks.append(_describe(pool, values, row, structure, config))
    return picks


def _pick_by_cover(draft: _Draft, count: int, config: AcquisitionConfig, rng: np.random.Generator) -> list[Pick]:
    """See `progidiff.active_learning.coverage`."""
    pool = draft.pool
    weights = pool.total_entropy()
    landmarks = _sample(pool.shown(), LANDMARKS, rng)
    picks: list[Pick] = []
    if len(landmarks):
        annotated = _sample(np.array(sorted(draft.done), dtype=np.int64), LANDMARKS, rng)
        cover = Cover(pool.sketch(landmarks), weights[landmarks], pool.sketch(annotated))
        values = pool.values(config)
        while len(picks) < count:
            rows = _offer(draft, weights, rng)
            if len(rows) == 0:
                break
            for choice in cover.pick(pool.sketch(rows)):
                row = int(rows[choice.position])
                draft.take(row)
                picks.append(_describe_cover(pool, values, row, choice, landmarks, config))
                if len(picks) == count:
                    break
    while len(picks) < count and draft.free.any():  # nothing is predicted on any slice that is left
        row = int(rng.choice(np.flatnonzero(draft.free)))
        draft.take(row)
        picks.append(_describe(pool, pool.values(config), row, None, config))
    return picks


def _sample(rows: NDArray[Any], most: int, rng: np.random.Generator) -> NDArray[Any]:
    """At most so many of them, by chance, in their order."""
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def _offer(draft: _Draft, weights: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """At most `OFFERED` free rows on which anything is predicted; of an image that gives one slice, its most
    uncertain.
    """
    pool, span = draft.pool, draft.span
    if not draft.one_per_image:
        shown = np.flatnonzero(draft.free[span] & (weights[span] > 0))
        return _sample(span.start + shown, OFFERED, rng)
    free = np.where(draft.free, weights, np.float32(0))
    images = np.flatnonzero(np.diff(pool.starts))
    images = _sample(images[np.maximum.reduceat(free, pool.starts[images]) > 0], OFFERED, rng)
    starts, stops = pool.starts[images], pool.starts[images + 1]
    return np.array([a + int(np.argmax(free[a:b])) for a, b in zip(starts, stops, strict=True)], dtype=np.int64)


def _describe_cover(
    pool: Pool,
    values: NDArray[Any],
    row: int,
    choice: Choice,
    landmarks: NDArray[Any],
    config: AcquisitionConfig,
) -> Pick:
    pick = _describe(pool, values, row, None, config)
    alike = landmarks[choice.stands_for]
    alike = alike[alike != row]
    images = len(np.unique(pool.owners()[alike]))
    if len(alike) == 0:
        others = "nothing else is like it"
    else:
        many = [_count(len(alike), "slice"), _count(images, "image")]
        depth = int(np.diff(pool.starts)[pool.owners()[alike]].max())
        what = many[1] if depth == 1 else f"{many[0]} of {many[1]}"  # a picture is its only slice
        others = f"{what} {'is' if len(alike) == 1 else 'are'} like it and like nothing annotated"
    return replace(pick, score=choice.gain, reason=f"{pick.reason}; {others}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _levels(allowed: NDArray[Any], done: NDArray[Any], owners: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The allowed rows of the images with the fewest annotated slices, then those of images with more as well, and so
    on.
    """
    for most in np.unique(done[owners[allowed]])[:-1]:
        yield allowed & (done <= most)[owners]


def _best(score: NDArray[Any], allowed: NDArray[Any]) -> int | None:
    rows = np.flatnonzero(allowed)
    if len(rows) == 0:
        return None
    best = int(rows[np.argmax(score[rows])])
    return best if np.isfinite(score[best]) else None


def _describe(pool: Pool, values: NDArray[Any], row: int, structure: int | None, config: AcquisitionConfig) -> Pick:
    owner = pool.owner(row)
    start, stop = int(pool.starts[owner]), int(pool.starts[owner + 1])
    order = [int(p) for p in np.argsort(-values[:, row], kind="stable") if values[p, row] > 0]
    if structure is not None:
        order = [structure, *(p for p in order if p != structure)]
    if not order:
        return Pick(pool.images[owner], row - start, 0.0, (), "nothing is predicted here; drawn at random")
    main = order[0]
    here = values[main, start:stop]
    low, high = _find_run(here, row - start)
    # People count from 1, as viewers do; `Pick.index` counts from 0.
    where = f"slice {low + 1}" if low == high else f"slices {low + 1}-{high + 1}"
    name = pool.structures[main]
    # Further structures only if they are about as uncertain: the list is for people.
    strong = [p for p in order if p == main or values[p, row] >= 0.5 * values[order[0], row]][:4]
    if config.score == "disagreement":
        reason = (
            f"proposals for {name} disagree on {where} (by "
            f"{pool.disagreement[main, start + low : start + high + 1].max():.2f} of 1)"
        )
    else:
        reason = f"{name} is uncertain on {where}"
    score = float(values[main, row]) if structure is not None else float(values[:, row].mean())
    return Pick(pool.images[owner], row - start, score, tuple(pool.structures[p] for p in strong), reason)


def _find_run(values: NDArray[Any], z: int) -> tuple[int, int]:
    """First and last slice around z where the value is at least half of that on z."""
    enough = values >= 0.5 * float(values[z])
    low = z
    while low > 0 and enough[low - 1]:
        low -= 1
    high = z
    while high + 1 < len(values) and enough[high + 1]:
        high += 1
    return low, high


def _pick_at_random(draft: _Draft, count: int, foreground_share: float, rng: np.random.Generator) -> list[Pick]:
    pool = draft.pool
    picks: list[Pick] = []
    while len(picks) < count and draft.free.any():
        rows, structure = np.flatnonzero(draft.free), None
        if rng.random() < foreground_share:
            shown = [p for p in range(len(pool.structures)) if (pool.foreground[p, rows] > 0).any()]
            if shown:
                structure = int(rng.choice(shown))
                rows = rows[pool.foreground[structure, rows] > 0]
        row = int(rng.choice(rows))
        draft.take(row)
        owner = pool.owner(row)
        name = None if structure is None else pool.structures[structure]
        reason = "drawn at random" if name is None else f"drawn at random where {name} is predicted"
        picks.append(
            Pick(pool.images[owner], row - int(pool.starts[owner]), 0.0, () if name is None else (name,), reason)
        )
    return picks


def _pick_evenly(draft: _Draft, count: int, seed: int) -> list[Pick]:
    pool = draft.pool
    by_image: dict[int, list[int]] = {}
    for row in draft.done:
        by_image.setdefault(pool.owner(row), []).append(row)
    order = sorted(range(len(pool.images)), key=lambda v: hashlib.sha256(f"{seed}:{pool.images[v]}".encode()).digest())
    picks: list[Pick] = []
    while len(picks) < count and draft.free.any():
        open_images = [v for v in order if draft.free[pool.starts[v] : pool.starts[v + 1]].any()]
        owner = min(open_images, key=lambda v: len(by_image.get(v, ())))
        start, stop = int(pool.starts[owner]), int(pool.starts[owner + 1])
        z = pick_farthest(draft.free[start:stop], [row - start for row in by_image.get(owner, ())])
        draft.take(start + z)
        by_image.setdefault(owner, []).append(start + z)
        picks.append(Pick(pool.images[owner], z, 0.0, (), "as far as possible from annotated slices"))
    return picks


def pick_farthest(free: NDArray[Any], taken: Sequence[int]) -> int:
    """The free slice farthest from all that are taken; of none, the one nearest to the middle.

    Args:
        free: bool (Z,), at least one is True.
        taken: Slices.

    Example:
        >>> pick_farthest(np.array([True] * 9), []), pick_farthest(np.array([True] * 9),
        ...     [4]), pick_farthest(np.array([True] * 9), [4, 0])
        (4, 0, 8)
    """
    rows = np.flatnonzero(free)
    if len(taken) == 0:
        return int(rows[np.argmin(np.abs(rows - (len(free) - 1) / 2))])
    return int(rows[np.argmax(np.abs(rows[:, None] - np.asarray(taken)[None]).min(axis=1))])


def space_evenly(num_slices: int, count: int, annotated: Collection[int] = ()) -> list[int]:
    """Slices of an image of which nothing is known, in the order in which they are worth doing.

    Example:
        >>> space_evenly(9, 3)
        [4, 0, 8]
    """
    taken = sorted(z for z in annotated if 0 <= z < num_slices)
    free = np.ones(num_slices, dtype=bool)
    free[taken] = False
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        z = pick_farthest(free, [*taken, *chosen])
        free[z] = False
        chosen.append(z)
    return chosen


def summarise_reasons(picks: Sequence[Pick], limit: int = 3) -> str:
    """The reasons of the first picks as one sentence; the same structure is not named twice.

    Example:
        >>> summarise_reasons([Pick("a", 64, 0.5, ("pancreas",), "proposals for pancreas disagree on slices 61-67")])
        'Proposals for pancreas disagree on slices 61-67.'
    """
    told: dict[str, str] = {}
    for pick in picks:
        told.setdefault(pick.structures[0] if pick.structures else pick.reason, pick.reason)
    text = "; ".join(list(told.values())[:limit])
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def compute_uncertainty(scores: ImageScores, config: AcquisitionConfig | None = None) -> float:
    """One number for a whole image: the mean value of its three most uncertain slices; what a review is ordered by."""
    values = build_pool([scores]).values(config or AcquisitionConfig())
    if values.size == 0:
        return 0.0
    best = np.sort(values.max(axis=0))[-3:]
    return float(best.mean())


def _binary_entropy(p: NDArray[Any]) -> NDArray[Any]:
    """In bits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[Any] = np.nan_to_num(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)), nan=0.0)
        return found
