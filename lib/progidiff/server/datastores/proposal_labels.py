"""Kept proposals as labels of the datastore, for clients that know only labels.

The consensus becomes the label of tag `original`, which 3D Slicer loads with Next Sample, and proposal k the label of
tag `proposal_<k>`, which Slicer's Reviewer module lists as a version. Neither tag says that a person has seen the
image: only `final` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore

from progidiff.images.geometry import Grid
from progidiff.images.pictures import PICTURE
from progidiff.prompts.structures import number_structures
from progidiff.proposals.request import CONSENSUS
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.answer_files import write_temporary

ORIGINAL = "original"
PROPOSAL_TAG = "proposal_{}"

_PROPOSAL = re.compile(r"proposal_(\d+)")


def save_as_labels(
    datastore: Datastore,
    image_id: str,
    result: VolumeProposals,
    grid: Grid,
    label_ids: Mapping[str, int],
    key: str,
    with_proposals: bool,
) -> list[str]:
    """Write the consensus, and if asked every proposal, as labels of an image.

    Args:
        datastore: Where the image is.
        image_id: Its id.
        result: The proposals.
        grid: Of the image.
        label_ids: Structure -> label id.
        key: Of the result in the proposal store; kept beside the labels.
        with_proposals: Write the tags `proposal_1` .. `proposal_K` too. Those of an earlier result with more proposals
            go.

    Returns:
        The tags written.
    """
    shown = {ORIGINAL: CONSENSUS}
    if with_proposals:
        shown |= {PROPOSAL_TAG.format(k + 1): str(k + 1) for k in range(result.num_proposals)}
        _remove_proposals_beyond(datastore, image_id, result.num_proposals)
    for tag, show in shown.items():
        _save_label(datastore, image_id, result, grid, dict(label_ids), key, tag, show)
    return list(shown)


def refresh_original(datastore: Datastore, image_id: str, store: ProposalStore, open_grid: Callable[[], Grid]) -> bool:
    """Make the consensus of the newest kept proposals the label `original` of an image, unless it is that already.

    Called when somebody gets the image: 3D Slicer then shows it with its proposals, and no network has to run.

    Args:
        datastore: Where the image is.
        image_id: Its id.
        store: Where proposals are kept.
        open_grid: Opens the grid of the image; asked only if there is something to write.

    Returns:
        Whether a label was written.
    """
    entry = store.latest(image_id)
    if entry is None:
        return False
    if ORIGINAL in datastore.get_labels_by_image_id(image_id):
        params = datastore.get_label_info(image_id, ORIGINAL).get("params", {})
        if params.get("proposals") == entry.key:
            return False
    result = store.load(entry.key)
    if result is None:
        return False
    if result.modality == PICTURE:
        label_ids = {name: number for number, name in enumerate(result.structures, start=1)}
    else:
        label_ids = number_structures(result.structures)
    save_as_labels(datastore, image_id, result, open_grid(), label_ids, entry.key, with_proposals=False)
    return True


def _remove_proposals_beyond(datastore: Datastore, image_id: str, count: int) -> None:
    matches = [_PROPOSAL.fullmatch(str(tag)) for tag in datastore.get_labels_by_image_id(image_id)]
    surplus = [match.group() for match in matches if match and int(match.group(1)) > count]
    for tag in surplus:
        datastore.remove_label(image_id, tag)
    if surplus:
        datastore.refresh()  # The host's folder watcher does not look at tags that are younger than the server.


def _save_label(
    datastore: Datastore,
    image_id: str,
    result: VolumeProposals,
    grid: Grid,
    label_ids: dict[str, int],
    key: str,
    tag: str,
    show: str,
) -> None:
    labels = result.label_map(grid, show, label_ids)
    present = set(np.unique(labels).tolist())
    # Slicer names the segments of a label map by position, in this order: only what is drawn, ascending.
    names = {name: value for name, value in sorted(label_ids.items(), key=lambda item: item[1]) if value in present}
    info: dict[str, Any] = {
        "label_info": [{"name": name, "idx": value} for name, value in names.items()],
        "model": "textdiff" if result.modality == PICTURE else "progidiff",
        "params": {**result.summary(), "label_names": names, "show": show, "proposals": key},
    }
    file = write_temporary(labels, grid, ".png" if result.modality == PICTURE else ".nii.gz", names)
    try:
        datastore.save_label(image_id, str(file), tag, info)
    finally:
        Path(file).unlink(missing_ok=True)
