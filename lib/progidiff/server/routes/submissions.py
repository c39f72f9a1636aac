"""Decisions of the review page as saves: read, compared with what others saved meanwhile, drawn together, kept apart.

One submission may be about several structures, of several results, each decided on slices of its own. The voxels are
made at once, so that structures which overlap share them out, and what was drawn by hand lies on top; then there is one
save for all structures that were decided on the same slices of the same proposals, so that the history never says of a
structure what nobody decided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ConflictError, GeometryError, ImageError, NotFoundError, RequestError
from progidiff.images.geometry import Grid
from progidiff.images.pictures import PICTURE
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from progidiff.labels.decisions import DrawnPick, MaskPick, Plan, compose_labels
from progidiff.labels.history import FINAL, Annotation
from progidiff.labels.paintings import Painting, Paintings
from progidiff.labels.saving import MAX_LABEL_ID, REVIEW_PAGE, read_effort
from progidiff.labels.segments import load_label_map
from progidiff.params import read_bool, read_float, read_int
from progidiff.prompts.structures import number_structures
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.parts import Context
from progidiff.server.routes import labels
from progidiff.server.routes.label_answers import SaveAnswer, SubmissionAnswer
from progidiff.storage.atomic import scratch_folder

_MAX_SECONDS = 7 * 24 * 3600.0
_MAX_PARTS = 32
_TRIES = 5


@dataclass(frozen=True)
class Part:
    """What was decided about one result.

    Attributes:
        key: Of the result; "" for structures that were drawn by hand and are in no result.
        result: The proposals; None for those.
        plan: The decisions.
    """

    key: str
    result: VolumeProposals | None
    plan: Plan


def submit(context: Context, image: str, volume: Volume, decisions: Mapping[str, Any], user: str) -> SubmissionAnswer:
    """Save decisions.

    Args:
        context: Of the app.
        image: Its id.
        volume: The image.
        decisions: As sent: proposals, volume and slices (see `decisions.Plan`), or parts, a list of objects with these;
            painted (see `labels.paintings`); base (the newest save the page knows), seconds, effort (structure ->
            seconds and clicks), confirm (names that are nearly known ones are meant as they stand).
        user: Who decided.

    Raises:
        RequestError: if something of it makes no sense.
        PromptError: if something new is called nearly as something known; nothing is saved then.
        GeometryError: if something was drawn on another grid.
        NotFoundError: if proposals are no longer kept.
        ConflictError: if somebody else saved the same meanwhile.
    """
    paintings = Paintings.from_params(decisions.get("painted"), volume.grid.stack_shape, image)
    decided = read_parts(context, image, decisions, is_painted=bool(paintings.structures))
    parts = _add_paintings(context, image, decided, paintings)
    confirm = read_bool(decisions.get("confirm", False), "confirm")
    if not confirm and volume.modality != PICTURE:
        _check_names(context, paintings)
    ids = _number(parts)
    label = _draw(parts, paintings, volume.grid, ids)
    tag = context.readings.find_tag(image, user)
    portions = [Part(part.key, part.result, plan) for part in parts for plan in part.plan.split()]
    base = decisions.get("base")
    replaces = None if base is None else _find_last(context, image, tag)
    for portion in portions:
        _check_conflict(context, image, tag, portion.plan, base, volume, label, ids)
    spent = _share_effort(decisions, portions)
    with scratch_folder("review") as folder:
        answers: list[SaveAnswer] = []
        for portion, effort in zip(portions, spent, strict=True):
            own = label if len(portions) == 1 else _keep_only(label, portion.plan.structures, ids)
            file = save_mask(own, volume.grid, folder / ("label.png" if volume.modality == PICTURE else "label.nii.gz"))
            params = {**_describe(portion, ids, paintings), **effort, "confirm": confirm}
            check = partial(_check_conflict, context, image, tag, portion.plan, base, volume, label, ids)
            own_saves = [answer.annotation.sequence for answer in answers]
            answer = _save_checked(context, image, file, tag, params, user, replaces, partial(check, own_saves))
            answers.append(answer)
            replaces = None if base is None else answer.annotation.sequence
    return SubmissionAnswer(**{**dict(answers[-1]), "saves": [answer.annotation for answer in answers]})


def _check_names(context: Context, paintings: Paintings) -> None:
    """Ask back what is misspelt before the first of several saves."""
    table = context.labels.structures
    for name in paintings.structures:
        if table.is_new(name):
            table.check_name(name)


def _save_checked(
    context: Context,
    image: str,
    file: Path,
    tag: str,
    params: Mapping[str, Any],
    user: str,
    replaces: int | None,
    check: Callable[[], None],
) -> SaveAnswer:
    """Save what was compared with the label in force; if that is another one by now, it is compared with that first.

    Args:
        replaces: The save that it was compared with, 0 for none; None if it was not.
        check: Compares.

    Raises:
        ConflictError: if somebody saved the same meanwhile, or others keep saving.
    """
    for _ in range(_TRIES):
        try:
            return labels.save_as(context, image, file, tag, params, user, replaces)
        except ConflictError:
            now = _find_last(context, image, tag)
            if replaces is None or now == replaces:
                raise
            replaces = now
            check()
    raise ConflictError(f"Others keep saving image '{image}'. Submit again; nothing of yours is lost.")


def _find_last(context: Context, image: str, tag: str) -> int:
    """The newest save in force; 0 for none."""
    current = context.annotations.current(image, tag)
    return 0 if current is None else current.sequence


def read_parts(context: Context, image: str, decisions: Mapping[str, Any], is_painted: bool = False) -> list[Part]:
    """The results that decisions are about.

    Args:
        is_painted: Whether something was drawn by hand: then nothing else has to be decided, and no result is needed.

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
        is_decided = bool(part.get("volume") or part.get("slices"))
        if is_painted and not is_decided:
            continue
        result = find_result(context, image, key)
        parts.append(Part(key, result, Plan.from_params(part, result)))
    names = [name for part in parts for name in part.plan.structures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"'{twice[0]}' is decided in two parts. Decide each structure by one result.")
    return parts


def _add_paintings(context: Context, image: str, parts: Sequence[Part], paintings: Paintings) -> list[Part]:
    """The decisions with what was drawn by hand, each structure in the part that decides it, else in that of the result
    it was drawn on; if there is none, or it is no longer kept, in one without proposals.
    """
    named = {painting.proposals for _, painting in paintings} - {part.key for part in parts}
    kept = {entry.key for entry in context.infer.store.list(image)} & named
    results = [Part(key, find_result(context, image, key), Plan({}, {})) for key in sorted(kept)]
    extended = [*parts, *results, Part("", None, Plan({}, {}))]
    homes: dict[str, int] = {}
    drawn: list[dict[int, dict[str, DrawnPick]]] = [{} for _ in extended]
    for z, painting in paintings:
        home = homes.setdefault(painting.structure, _find_home(painting, extended))
        drawn[home].setdefault(z, {})[painting.structure] = _read_start(painting, extended[home])
    return [Part(part.key, part.result, part.plan.draw(more)) for part, more in zip(extended, drawn, strict=True)]


def _find_home(painting: Painting, parts: Sequence[Part]) -> int:
    """Index of the part that a structure belongs to; the last one is for those that belong to none."""
    name = painting.structure
    deciding = [place for place, part in enumerate(parts) if name in part.plan.structures]
    holding = [
        place
        for place, part in enumerate(parts)
        if part.result is not None and part.key == painting.proposals and name in part.result.structures
    ]
    return [*deciding, *holding, len(parts) - 1][0]


def _read_start(painting: Painting, part: Part) -> DrawnPick:
    if painting.start is None or part.result is None or part.key != painting.proposals:
        return DrawnPick("union")
    start = MaskPick.from_params(painting.start, part.result.num_proposals)
    return DrawnPick(start.rule, start.members, start.threshold)


def _list_names(parts: Sequence[Part]) -> list[str]:
    return [
        name for part in parts for name in (*(part.result.structures if part.result else ()), *part.plan.structures)
    ]


def _number(parts: Sequence[Part]) -> dict[str, int]:
    """Structure -> id in the label.

    Raises:
        RequestError: if there are more than a label has ids.
    """
    ids = number_structures(_list_names(parts))
    if max(ids.values(), default=0) > MAX_LABEL_ID:
        raise RequestError(
            f"{len(ids)} structures are decided or drawn at once, more than the {MAX_LABEL_ID} ids of a label hold. "
            "Submit fewer structures."
        )
    return ids


def _draw(parts: Sequence[Part], paintings: Paintings, grid: Grid, ids: Mapping[str, int]) -> NDArray[Any]:
    plans = [(part.result, part.plan) for part in parts if part.result is not None]
    label = compose_labels(plans, grid, ids) if plans else np.zeros(grid.shape, dtype=np.uint8)
    paintings.draw_on(grid.arrange(label), ids)  # A view, as in `compose_labels`.
    return label


def _keep_only(label: NDArray[Any], structures: Sequence[str], ids: Mapping[str, int]) -> NDArray[Any]:
    """A save names the structures that it speaks about, and its file holds no other."""
    kept: NDArray[Any] = np.where(np.isin(label, [ids[name] for name in structures]), label, np.uint8(0))
    return kept


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


def load_current(context: Context, image: str, volume: Volume, tag: str = FINAL) -> NDArray[Any] | None:
    """The label in force; None if there is none.

    Raises:
        ImageError: if it cannot be read.
    """
    current = context.annotations.current(image, tag)
    if current is None:
        return None
    try:
        return load_label_map(context.annotations.label_file(current), volume.grid).array
    except (GeometryError, ImageError, NotFoundError) as err:
        raise ImageError(f"The saved label of '{image}' cannot be shown ({err})") from err


def _describe(portion: Part, ids: Mapping[str, int], paintings: Paintings) -> dict[str, Any]:
    plan = portion.plan
    edits = sum(paintings.count_edits(plan.structures).values()) if plan.is_drawn else None
    return {
        "slices": None if plan.decided_slices is None else list(plan.decided_slices),
        "structures": list(plan.structures),
        "label_info": [{"name": name, "idx": ids[name]} for name in plan.structures],
        "proposals": portion.key,
        "shown": plan.shown,
        "edited": plan.is_drawn,
        "as_proposed": not plan.is_drawn,
        "edits": edits,
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
    context: Context,
    image: str,
    tag: str,
    plan: Plan,
    base: object,
    volume: Volume,
    label: NDArray[Any],
    ids: Mapping[str, int],
    own_saves: Collection[int] = (),
) -> None:
    """Refuse to overwrite what somebody saved since the page looked, unless it is the very same: a second try of a save
    that arrived.
    """
    if base is None:
        return
    known = read_int(base, "base", 0, 2**53)
    in_force = context.annotations.in_force(image, tag)
    touched = [saved for saved in in_force if saved.sequence > known and _overlaps(saved, plan)]
    touched = [saved for saved in touched if saved.sequence not in own_saves]
    if touched and not _is_in_force(context, image, tag, plan, volume, label, ids):
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
    context: Context, image: str, tag: str, plan: Plan, volume: Volume, label: NDArray[Any], ids: Mapping[str, int]
) -> bool:
    current = context.annotations.current(image, tag)
    kept = load_current(context, image, volume, tag)
    if current is None or kept is None:
        return False
    mine, theirs, theirs_ids = volume.arrange(label), volume.arrange(kept), dict(current.label_ids)
    chosen = slice(None) if plan.decided_slices is None else list(plan.decided_slices)
    return all(
        np.array_equal(mine[chosen] == ids[name], theirs[chosen] == theirs_ids.get(name, -1))
        for name in plan.structures
    )
