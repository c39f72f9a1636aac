"""The infer task `progidiff_slice`: one axial slice, steered by clicks, as 3D Slicer's SmartEdit asks for it.

SmartEdit sends the segment's name as `label`, clicks as voxel indices (i, j, k) of the file, and as `slice` the k of
the last click. It then clears slice k of the segment and adds the one segment of the answer. So the answer is a mask of
one label that draws on slice k only, and only images whose third axis runs from axial slice to axial slice can be
answered: on others SmartEdit would clear voxels of a plane that nobody looked at.

A model with a close-up draws by the clicks: they are edits of the request, and every proposal keeps the clicked voxels.

Into other models the clicks do not enter. They choose: proposals that contain the foreground clicks and avoid the
background clicks are kept, and their consensus is the answer. While none fits, more are drawn from other seeds, up to a
bound; then the one that contradicts the fewest clicks is given, and the answer says so. What was drawn for a slice is
remembered, so the next click on it usually costs no network at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from numpy.typing import NDArray

from progidiff.errors import GeometryError, RequestError
from progidiff.images.volume import Volume
from progidiff.labels.segments import is_unnamed
from progidiff.params import read_int
from progidiff.proposals.clicks import Choice, Pixel, choose_by_clicks
from progidiff.proposals.device_queue import NOBODY
from progidiff.proposals.edits import Edit, check_amount
from progidiff.proposals.islands import OFF
from progidiff.proposals.keeper import Keeper, MemoryShelf, Question, TakeTurn
from progidiff.proposals.request import MAX_SEED, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.answer_files import write_temporary
from progidiff.server.tasks.answers import Geometry, Latencies, SliceAnswer
from progidiff.server.tasks.volumes import UNNAMED, ProposalInferTask
from progidiff.storage.json_text import read_json

logger = logging.getLogger(__name__)

MAX_ROUNDS = 16
"""Largest number of times that proposals are drawn for one slice."""

_OWN_OPTIONS = ("label", "foreground", "background", "slice", "rounds")
_REMEMBERED_ROUNDS = 32
"""Of all slices together; less than a MB each, since nothing but one slice of the working grid is ever written to."""


@dataclass(frozen=True)
class Clicks:
    """Clicks on one slice.

    Attributes:
        k: Index of the slice along the file's third axis.
        z: Its axial index.
        foreground: Pixels (y, x) of the axial stack that belong to the structure.
        background: Pixels that do not.
    """

    k: int
    z: int
    foreground: tuple[Pixel, ...]
    background: tuple[Pixel, ...]

    def to_edits(self, volume: Volume) -> tuple[Edit, ...]:
        """The same as edits of a request.

        Raises:
            RequestError: if there are more than a person places.
        """
        edits = tuple(
            Edit(kind="click", positive=inside, points=(volume.grid.find_voxel((self.z, *pixel)),))
            for pixels, inside in ((self.foreground, True), (self.background, False))
            for pixel in pixels
        )
        check_amount(edits)
        return edits


@dataclass(frozen=True)
class _Drawn:
    """Proposals of one slice, of several rounds: probabilities (uint8, 0 to 255) and masks of shape (K, Y, X)."""

    probabilities: NDArray[np.uint8]
    masks: NDArray[np.bool_]

    @classmethod
    def of(cls, rounds: Sequence[VolumeProposals], names: Sequence[str], z: int) -> _Drawn:
        """Of one segment. A prompt that names several structures ("kidneys") makes one segment of them."""
        probabilities, masks = [], []
        for result in rounds:
            maps = np.max([result.slice_probabilities(name, z) for name in names], axis=0)
            probabilities.append(maps.round().astype(np.uint8))
            masks.append(np.any([result.slice_masks(name, z) for name in names], axis=0))
        return cls(np.concatenate(probabilities), np.concatenate(masks))


class SliceInferTask(InferTask):
    """Proposals for one slice, chosen by clicks.

    Args:
        proposals: The task for whole volumes, whose engine, queue and open images are shared.
    """

    def __init__(self, proposals: ProposalInferTask) -> None:
        self._proposals = proposals
        self._keeper = Keeper(MemoryShelf(_REMEMBERED_ROUNDS))
        super().__init__(
            type=InferType.DEEPGROW,
            labels=None,
            dimension=2,
            description=(
                "The segment's name is the prompt; of the proposals for the clicked slice "
                "those that agree with the clicks are kept"
            ),
        )

    def config(self) -> dict[str, Any]:
        """Options with their defaults. An empty `prompt` stands for the segment's name."""
        whole = self._proposals.config()
        return {
            "prompt": "",
            "num_proposals": min(8, self._proposals.options.max_proposals),
            "rounds": 4,
            **{name: whole[name] for name in ("steps", "seed", "adapter", "modality", "allow_free_text")},
        }

    def is_valid(self) -> bool:
        """Always offered: if weights are missing, the request says so."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Answer one click.

        Args:
            request: As for `ProposalInferTask`. In "params" also: "label" (the segment's name), "foreground" and
                "background" (lists of [i, j, k]), "slice" (k; by default that of the last foreground click) and
                "rounds".

        Returns:
            Path of a new temporary file with the mask, which the caller removes, and the result parameters.

        Raises:
            ProGiDiffError: whatever is wrong with the request, the image or the model.
        """
        started = time.monotonic()
        params = dict(request.get("params", {}))
        own = {name: params.pop(name, None) for name in _OWN_OPTIONS}
        prompt = str(params.get("prompt") or own["label"] or "")
        is_steered = self._proposals.listens_to_edits and bool(own["foreground"] or own["background"])
        if is_steered and is_unnamed(prompt):
            prompt = ""  # A new structure: the clicks alone say what is meant.
        elif not prompt:
            raise RequestError(
                "The request has neither label nor prompt. Name the segment after what it shows, for example 'liver'."
            )
        options, queries = self._proposals.read_request({**self.config(), **params, "prompt": prompt}, is_steered)
        rounds = read_int(self.config()["rounds"] if own["rounds"] is None else own["rounds"], "rounds", 1, MAX_ROUNDS)
        volume = self._proposals.open_volume(str(request["image"]), options.modality, request.get("image_info") or {})
        clicks = read_clicks(own["foreground"], own["background"], own["slice"], volume)
        image_id = str(request.get("image_id", ""))
        asker = request.get("asker", NOBODY)
        # One slice alone is never cleaned of islands: what it holds may hang together on the others.
        asked = options.to_request(queries).model_copy(update={"slices": (clicks.z,), "clean_up": OFF})
        if is_steered:
            asked, rounds = asked.model_copy(update={"edits": (*asked.edits, *clicks.to_edits(volume))}), 1
        choice, drawn, seconds = self._choose(
            volume,
            asked,
            clicks,
            rounds,
            image_id,
            lambda: self._proposals.queue.job("slice", image_id or volume.name, options.job_id, asker),
        )

        labels = np.zeros(volume.to_stack()[0].shape, dtype=np.uint8)
        name = queries[0].name
        value = self._proposals.number([name])[name] if queries[0].known else 1
        labels[clicks.z][choice.mask] = value
        count = int(choice.mask.sum())
        drawn_names = {str(own["label"] or name): value} if count else {}
        file = write_temporary(volume.from_stack(labels), volume.grid, options.result_extension, drawn_names)
        answer = SliceAnswer(
            label_names=drawn_names,
            prompt=options.prompt or UNNAMED,
            structures=[query.name for query in queries],
            slice=clicks.k,
            axial_slice=clicks.z,
            fits=choice.fits,
            missed_clicks=choice.missed,
            kept_proposals=len(choice.kept),
            num_proposals=len(drawn.masks),
            message=_describe_steered(choice, drawn, clicks)
            if is_steered
            else _describe(options.prompt, choice, drawn, clicks, count),
            area_cm2=round(count * volume.voxel_ml / volume.to_stack()[1][0] * 10, 3),
            seed=options.seed,
            model_version=self._proposals.engine.model_version,
            modality=volume.modality,
            geometry=Geometry(**volume.grid.describe()),
            ignored=list(options.ignored),
            latencies=Latencies(total=round(time.monotonic() - started, 3), compute=round(seconds, 3)),
        )
        return str(file), answer.model_dump()

    def _choose(
        self,
        volume: Volume,
        request: ProposalRequest,
        clicks: Clicks,
        rounds: int,
        image_id: str,
        take_turn: TakeTurn,
    ) -> tuple[Choice, _Drawn, float]:
        """Draw until a proposal fits, or `rounds` are drawn; what earlier clicks drew on this slice comes first."""
        adapter = self._proposals.pick_adapter(request.adapter, volume, request.queries)

        def ask(number: int) -> Question:
            """The question of a round: the same with another seed."""
            seed = (request.seed + number) % (MAX_SEED + 1)
            return self._proposals.ask(request.model_copy(update={"seed": seed}), volume, image_id, adapter)

        names = [query.name for query in request.queries]
        results: list[VolumeProposals] = []
        while len(results) < MAX_ROUNDS and (kept := self._keeper.find(ask(len(results)))) is not None:
            results.append(kept)
        seconds = 0.0
        while True:
            if results:
                drawn = _Drawn.of(results, names, clicks.z)
                choice = choose_by_clicks(drawn.probabilities, drawn.masks, clicks.foreground, clicks.background)
                # Nothing at all drawn: the model finds the structure absent here, and no seed changes that.
                if choice.fits or len(results) >= rounds or not drawn.masks.any():
                    return choice, drawn, seconds
            question = ask(len(results))
            compute = partial(self._proposals.propose, question.request, volume)
            answer = self._keeper.find_or_compute(question, compute, take_turn)
            results.append(answer.proposals)
            seconds += answer.proposals.seconds


def read_clicks(foreground: object, background: object, index: object, volume: Volume) -> Clicks:
    """Clicks as SmartEdit sends them, placed on the axial stack; those on other slices are left out.

    Args:
        foreground: Lists [i, j, k] of voxel indices, or their JSON text; None for none.
        background: The same.
        index: k of the slice; None or "" for that of the last foreground click.
        volume: The image.

    Raises:
        RequestError: if they are no voxel indices, or there is neither a slice nor a foreground click.
        GeometryError: if a click or the slice is outside of the image, or the image is not stored in axial slices.
    """
    wanted, unwanted = (
        _read_points(value, name) for value, name in ((foreground, "foreground"), (background, "background"))
    )
    if volume.grid.axial_axis != 2:
        raise GeometryError(
            f"'{volume.name}' is not stored in axial slices, and SmartEdit would clear "
            "voxels of other planes. Use progidiff under Auto Segmentation, or reorient "
            "the image so that its third axis runs along the body."
        )
    if index is None or index == "":
        if not wanted:
            raise RequestError("There is no foreground click and no slice. Place a click on the structure first.")
        k = wanted[-1][2]
    else:
        k = read_int(index, "slice", 0, volume.array.shape[2] - 1)
    z, _, _ = volume.grid.locate((0, 0, k))

    def place(points: Sequence[tuple[int, int, int]]) -> tuple[Pixel, ...]:
        return tuple(volume.grid.locate(point)[1:] for point in points if point[2] == k)

    return Clicks(k, z, place(wanted), place(unwanted))


def _read_points(value: object, name: str) -> list[tuple[int, int, int]]:
    if isinstance(value, str):
        try:
            value = read_json(value, f"Option {name}")
        except RequestError:
            value = [value]
    points: list[tuple[int, int, int]] = []
    for point in value if isinstance(value, list) else [] if value is None else [value]:
        numbers = point if isinstance(point, (list, tuple)) else ()
        whole = [
            round(number)
            for number in numbers
            if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e9
        ]
        if len(numbers) != 3 or len(whole) != 3:
            raise RequestError(
                f"Option {name} holds {str(point)[:60]!r}; it must be a list of clicks, "
                "each three voxel indices [i, j, k]."
            )
        points.append((whole[0], whole[1], whole[2]))
    return points


def _describe_steered(choice: Choice, drawn: _Drawn, clicks: Clicks) -> str:
    clicked = len(clicks.foreground) + len(clicks.background)
    given = f"{len(drawn.masks)} proposals were drawn given {'the click' if clicked == 1 else f'all {clicked} clicks'}"
    if choice.fits:
        return f"{given}; this is their consensus."
    return (
        f"{given}; {choice.missed} of them contradict others on the same voxel, where background counts. Remove one of "
        "each pair if that is not what you mean."
    )


def _describe(prompt: str, choice: Choice, drawn: _Drawn, clicks: Clicks, count: int) -> str:
    clicked = len(clicks.foreground) + len(clicks.background)
    if not drawn.masks.any():
        return (
            f"The model finds no {prompt} on slice {clicks.k + 1}; clicks choose among proposals and cannot change "
            "that. Paint it by hand if it is there."
        )
    if choice.fits:
        return (
            f"{len(choice.kept)} of {len(drawn.masks)} proposals agree with all {clicked} "
            "clicks; this is their consensus."
        )
    nothing = " It draws nothing." if not count else ""
    return (
        f"None of {len(drawn.masks)} proposals agrees with all {clicked} clicks; this is "
        f"the nearest and contradicts {choice.missed}.{nothing} Raise rounds, move a click, or correct it by hand."
    )
