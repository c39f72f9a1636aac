"""Decisions of the review page as saves: read, compared with what others saved meanwhile, drawn together, kept apart.

One submission may be about several structures, of several results, each decided on slices of its own. The voxels are
made at once, so that structures which overlap share them out; then there is one save for all structures that were
decided on the same slices of the same proposals, so that the history never says of a structure what nobody decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ConflictError, GeometryError, ImageError, NotFoundError, RequestError
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.labels.decisions import Plan, compose_labels
from progidiff.labels.history import FINAL, Annotation
from progidiff.labels.saving import REVIEW_PAGE, read_effort
from progidiff.labels.segments import load_label_map
from progidiff.params import read_float, read_int
from progidiff.prompts.structures import number_structures
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.parts import Context
from progidiff.server.routes import labels
from progidiff.server.routes.label_answers import SubmissionAnswer
from progidiff.storage.atomic import scratch_folder

_MAX_SECONDS = 7 * 24 * 3600.0
_MAX_PARTS = 32


@dataclass(frozen=True)
class Part:
    """What was decided about one result.

    Attributes:
        key: Of the result.
        result: The proposals.
        plan: The decisions.
    """

    key: str
    result: VolumeProposals
    plan: Plan


def submit(context: Context, image: str, volume: Volume, decisions: Mapping[str, Any], user: str) -> SubmissionAnswer:
    """Save decisions.

    Args:
        context: Of the app.
        image: Its id.
        volume: The image.
        decisions: As sent: proposals, volume and slices (see `decisions.Plan`), or parts, a list of objects with these;
            base (the newest save the page knows), seconds, effort (structure -> seconds and clicks).
        user: Who decided.

    Raises:
        RequestError: if something of it makes no sense.
        NotFoundError: if proposals are no longer kept.
        ConflictError: if somebody else saved the same meanwhile.
    """
    parts = read_parts(context, image, decisions)
    ids = number_structures(name for part in parts for name in part.result.structures)
    label = compose_labels([(part.result, part.plan) for part in parts], volume.grid, ids)
    portions = [Part(part.key, part.result, plan) for part in parts for plan in part.plan.split()]
    for portion in portions:
        _check_conflict(context, image, portion.plan, decisions.get("base"), volume, label, ids)
    spent = _share_effort(decisions, portions)
    with scratch_folder("review") as folder:
        file = save_mask(label, volume.grid, folder / "label.nii.gz")
        answers = [
            labels.save(context, image, file, FINAL, {**_describe(portion, ids), **effort}, user)
            for portion, effort in zip(portions, spent, strict=True)
        ]
    return SubmissionAnswer(**{**dict(answers[-1]), "saves": [answer.annotation for answer in answers]})


def read_parts(context: Context, image: str, decisions: Mapping[str, Any]) -> list[Part]:
    """The results that decisions are about.

    Raises:
        RequestError: if there are none, or two of them decide the same structure.
        NotFoundError: if proposals are no longer kept.
    """
    sent = decisions.get("parts")
    if sent is None:
        sent = [decisions]
    is_list = isinstance(sent, list) and 1 <= len(sent) <= _MAX_PARTS
    if not is_list or not all(isinstance(part, dict) for part in sent):
        raise RequestError(
            f"parts must be a list of 1 to {_MAX_PARTS} objects, each with proposals and with volume or slices."
        )
    parts = []
    for part in sent:
        key = str(part.get("proposals", ""))
        result = find_result(context, image, key)
        parts.append(Part(key, result, Plan.from_params(part, result)))
    names = [name for part in parts for name in part.plan.structures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"'{twice[0]}' is decided in two parts. Decide each structure by one result.")
    return parts


def find_result(context: Context, image: str, key: str) -> VolumeProposals:
    """Kept proposals of an image.

    Raises:
        RequestError: if no key is given.
        NotFoundError: if there are no such proposals.
    """
    if not key:
        raise RequestError("The request names no proposals. Send the `proposals` of an answer to a prompt.")
    store = context.infer.store
    result = store.load(key) if any(entry.key == key for entry in store.list(image)) else None
    if result is None:
        raise NotFoundError(
            f"The proposals {key[:12]} of image '{image}' are no longer kept. Send the "
            "same prompt again to get them back."
        )
    return result


def load_current(context: Context, image: str, volume: Volume) -> NDArray[Any] | None:
    """The label in force; None if there is none.

    Raises:
        ImageError: if it cannot be read.
    """
    current = context.annotations.current(image)
    if current is None:
        return None
    try:
        return load_label_map(context.annotations.label_file(current), volume.grid).array
    except (GeometryError, ImageError, NotFoundError) as err:
        raise ImageError(f"The saved label of '{image}' cannot be shown ({err})") from err


def _describe(portion: Part, ids: Mapping[str, int]) -> dict[str, Any]:
    plan = portion.plan
    return {
        "slices": None if plan.decided_slices is None else list(plan.decided_slices),
        "structures": list(plan.structures),
        "label_info": [{"name": name, "idx": ids[name]} for name in plan.structures],
        "proposals": portion.key,
        "shown": plan.shown,
        "edited": False,
        "as_proposed": True,
        "client_id": REVIEW_PAGE,
    }


def _share_effort(decisions: Mapping[str, Any], portions: Sequence[Part]) -> list[dict[str, Any]]:
    """What of the seconds and clicks belongs to each save: those of its structures; where nobody measured by structure,
    the seconds in equal parts."""
    seconds = decisions.get("seconds")
    total = None if seconds is None else read_float(seconds, "seconds", 0, _MAX_SECONDS)
    effort = {name: (spent, clicks) for name, spent, clicks in read_effort(decisions.get("effort"))}
    number = sum(len(portion.plan.structures) for portion in portions)
    shares: list[dict[str, Any]] = []
    for portion in portions:
        names = portion.plan.structures
        own = {name: {"seconds": effort[name][0], "clicks": effort[name][1]} for name in names if name in effort}
        share = None if total is None else total * len(names) / number
        if effort and len(portions) > 1:
            share = sum(spent["seconds"] for spent in own.values())
        shares.append({"seconds": share, "effort": own or None})
    return shares


def _check_conflict(
    context: Context, image: str, plan: Plan, base: object, volume: Volume, label: NDArray[Any], ids: Mapping[str, int]
) -> None:
    """Refuse to overwrite what somebody saved since the page looked, unless it is the very same: a second try of a save
    that arrived.
    """
    if base is None:
        return
    known = read_int(base, "base", 0, 2**53)
    in_force = context.annotations.in_force(image)
    touched = [saved for saved in in_force if saved.sequence > known and _overlaps(saved, plan)]
    if touched and not _is_in_force(context, image, plan, volume, label, ids):
        saved = touched[-1]
        who = saved.user or saved.client or "somebody else"
        raise ConflictError(
            f"Image '{image}' was saved meanwhile by {who} (save {saved.sequence}), on slices that you decided too. "
            "Look at that label, then submit again to replace it; nothing of yours is lost."
        )


def _overlaps(saved: Annotation, plan: Plan) -> bool:
    slices = plan.decided_slices
    return (slices is None or saved.slices is None or bool(set(slices) & set(saved.slices))) and bool(
        not saved.structures or set(saved.structures) & set(plan.structures)
    )


def _is_in_force(
    context: Context, image: str, plan: Plan, volume: Volume, label: NDArray[Any], ids: Mapping[str, int]
) -> bool:
    current = context.annotations.current(image)
    kept = load_current(context, image, volume)
    if current is None or kept is None:
        return False
    mine, theirs, theirs_ids = volume.arrange(label), volume.arrange(kept), dict(current.label_ids)
    chosen = slice(None) if plan.decided_slices is None else list(plan.decided_slices)
    return all(
        np.array_equal(mine[chosen] == ids[name], theirs[chosen] == theirs_ids.get(name, -1))
        for name in plan.structures
    )
