"""The infer task `progidiff_scribbles`: a volume, steered by scribbles, as 3D Slicer's scribbles section asks for it.

Slicer sends all segments of the scene as one label map (form field `label`), their names and numbers as `label_info`,
the segment that is drawn as `selected_label_name`, and a box as `roi`, in voxels. Two of the segments are the
scribbles: `foreground_scribbles` and `background_scribbles`. It replaces the selected segment by the one label of the
answer. The scribbles become edits of a request, so only a model with a close-up answers; every proposal keeps the
voxels that a scribble touched.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from numpy.typing import NDArray

from progidiff.errors import GeometryError, RequestError
from progidiff.images.geometry import Grid
from progidiff.labels.segments import is_unnamed, load_label_map
from progidiff.proposals.device_queue import NOBODY
from progidiff.proposals.edits import Edit
from progidiff.proposals.request import CONSENSUS
from progidiff.proposals.work import Work
from progidiff.server.answer_files import write_temporary
from progidiff.server.tasks.answers import VolumeAnswer, describe_answer, draw_shown
from progidiff.server.tasks.volumes import UNNAMED, ProposalInferTask, find_contradictions

FOREGROUND, BACKGROUND = "foreground_scribbles", "background_scribbles"
"""What Slicer calls the two segments that are scribbles."""

_USUAL_IDS = {BACKGROUND: 2, FOREGROUND: 3}
"""Of the host's own scribbles methods, where `label_info` says nothing."""

_OWN_OPTIONS = ("label_info", "selected_label_name", "roi")

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open ranges of voxels along i, j and k."""


class ScribbleInferTask(InferTask):
    """Proposals for a volume, given scribbles.

    Args:
        proposals: The task for whole volumes, whose engine, queue and open images are shared.
    """

    def __init__(self, proposals: ProposalInferTask) -> None:
        self._proposals = proposals
        super().__init__(
            type=InferType.SCRIBBLES,
            labels=None,
            dimension=3,
            description=(
                "The segment's name is the prompt; proposals are drawn given the scribbles and the box. Needs a model "
                "with a close-up"
            ),
        )

    def config(self) -> dict[str, Any]:
        """Options with their defaults. An empty `prompt` stands for the segment's name."""
        whole = self._proposals.config()
        names = ("num_proposals", "steps", "seed", "adapter", "modality", "allow_free_text", "clean_up")
        return {"prompt": "", **{name: whole[name] for name in names}}

    def is_valid(self) -> bool:
        """Always offered: if the model does not draw by edits, the request says so."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Answer scribbles.

        Args:
            request: As for `ProposalInferTask`, and "label" (path of the label map). In "params" also: "label_info"
                (name and id of every segment), "selected_label_name", and "roi" (six voxel indices, i, j and k from
                and to).

        Returns:
            Path of a new temporary file with the mask, which the caller removes, and the result parameters.

        Raises:
            ProGiDiffError: whatever is wrong with the request, the scribbles, the image or the model.
        """
        started = time.monotonic()
        params = dict(request.get("params", {}))
        own = {name: params.pop(name, None) for name in _OWN_OPTIONS}
        segment = str(own["selected_label_name"] or "")
        prompt = str(params.get("prompt") or ("" if is_unnamed(segment) else segment))
        options, queries = self._proposals.read_request({**self.config(), **params, "prompt": prompt}, is_steered=True)
        volume = self._proposals.open_volume(str(request["image"]), options.modality, request.get("image_info") or {})
        grid = volume.grid
        if not request.get("label"):
            raise RequestError(
                "The request holds no scribbles. Send the segments as a label map in the form field label, as 3D "
                "Slicer does."
            )
        box = read_roi(own["roi"], grid)
        array = load_label_map(Path(str(request["label"])), grid).array
        edits = (*options.edits, *read_scribbles(array, read_scribble_ids(own["label_info"]), box, grid))
        image_id = str(request.get("image_id", ""))
        adapter = self._proposals.pick_adapter(options.adapter, volume, queries)
        asked = options.to_request(queries).model_copy(update={"edits": edits})
        found = self._proposals.answer(
            self._proposals.ask(asked, volume, image_id, adapter),
            volume,
            lambda: self._proposals.queue.job(
                "scribbles", image_id or volume.name, options.job_id, request.get("asker", NOBODY)
            ),
            Work(first=next((edit.slice for edit in edits if edit.slice is not None), None)),
        )
        labels, _, _ = draw_shown(
            found.proposals, grid, self._proposals.number(query.name for query in queries), CONSENSUS
        )
        value = self._proposals.number([queries[0].name])[queries[0].name] if queries[0].known else 1
        mask = np.where(labels > 0, np.uint8(value), np.uint8(0))
        if box is not None:
            mask = _keep_inside(mask, box)
        count = int(np.count_nonzero(mask))
        names = {segment or queries[0].name: value} if count else {}
        file = write_temporary(mask, grid, options.result_extension, names)
        warnings = self._proposals.engine.find_warnings(volume, queries, adapter)
        warnings += find_contradictions(edits, [query.name for query in queries], grid)
        answer = VolumeAnswer(
            **{
                **found.proposals.summary(),
                **describe_answer(found, options, image_id, [], grid, warnings, time.monotonic() - started),
            },
            label_names=names,
            shown_ml={name: round(count * volume.voxel_ml, 3) for name in names},
            prompt=options.prompt or UNNAMED,
            slice_axis="disagreement_per_slice counts axial slices from inferior to superior",
        )
        return str(file), answer.model_dump()


def read_scribble_ids(label_info: object) -> dict[str, int]:
    """Which ids the scribbles have in the label map.

    Args:
        label_info: A list of {"name", "id"} (or "idx"); None for the host's usual ids.

    Raises:
        RequestError: if it is something else.

    Example:
        >>> read_scribble_ids([{"name": "liver", "id": 1}, {"name": "foreground_scribbles", "id": 2}])
        {'foreground_scribbles': 2}
    """
    if not label_info:
        return dict(_USUAL_IDS)
    entries = label_info if isinstance(label_info, Sequence) and not isinstance(label_info, str) else [label_info]
    found = {}
    for entry in entries:
        fields = entry if isinstance(entry, Mapping) else {}
        number = fields.get("id", fields.get("idx"))
        if not isinstance(number, int) or isinstance(number, bool):
            raise RequestError(
                "Option label_info must be a list of the segments, each with name and id, as 3D Slicer sends it."
            )
        if str(fields.get("name")) in _USUAL_IDS:
            found[str(fields["name"])] = number
    return found


def read_roi(value: object, grid: Grid) -> Box | None:
    """The box of a region of interest, clipped to the image.

    Args:
        value: Six voxel indices, i, j and k from and to, in either order; None or an empty list for no box.
        grid: Of the image.

    Raises:
        RequestError: if it is something else.
        GeometryError: if nothing of it is inside of the image.
    """
    if not value:
        return None
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 6 or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e9 for number in numbers
    ):
        raise RequestError("Option roi must be six voxel indices: i from, i to, j from, j to, k from, k to.")
    ranges = []
    for axis, size in enumerate(grid.shape):
        low, high = sorted(round(number) for number in numbers[2 * axis : 2 * axis + 2])
        ranges.append((max(0, low), min(size, high)))
    if any(low >= high for low, high in ranges):
        raise GeometryError(f"The region of interest lies outside of '{grid.name}'. Place it on the image.")
    return ranges[0], ranges[1], ranges[2]


def read_scribbles(array: NDArray[Any], ids: Mapping[str, int], box: Box | None, grid: Grid) -> list[Edit]:
    """Scribbles and the box as edits, slice by slice.

    Args:
        array: The label map, in file order.
        ids: Of the scribbles, see `read_scribble_ids`.
        box: What lies outside of it is no part of the structure.
        grid: Of the image.

    Raises:
        RequestError: if nothing was drawn.
    """
    stack = grid.arrange(array)
    edits = []
    for name, positive in ((FOREGROUND, True), (BACKGROUND, False)):
        drawn = stack == ids[name] if name in ids else np.zeros(stack.shape, bool)
        for z in np.flatnonzero(drawn.any(axis=(1, 2))).tolist():
            text = base64.b64encode(np.packbits(drawn[z]).tobytes()).decode()
            edits.append(Edit(kind="scribble", positive=positive, slice=int(z), mask=text))
    if box is not None:
        edits += _frame(box, grid)
    if not any(edit.positive for edit in edits):
        raise RequestError(
            "There is neither a foreground scribble nor a region of interest. Draw over the structure first, on one "
            "slice at least."
        )
    return edits


def _frame(box: Box, grid: Grid) -> list[Edit]:
    """A box on every axial slice that it meets."""
    axis = grid.axial_axis
    corners = []
    for at in range(*box[axis]):
        low, high = ([side[end] - end for side in box] for end in (0, 1))
        low[axis] = high[axis] = at
        corners.append(((low[0], low[1], low[2]), (high[0], high[1], high[2])))
    return [Edit(kind="box", points=pair) for pair in corners]


def _keep_inside(mask: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    inside = tuple(slice(*side) for side in box)
    kept = np.zeros_like(mask)
    kept[inside] = mask[inside]
    return kept
