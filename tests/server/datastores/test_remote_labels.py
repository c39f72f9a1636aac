"""Labels behind an address: the same checks and history, also when the other side fails. The host's plain class stands
for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore

from progidiff.errors import ImageError, NotFoundError, RequestError
from progidiff.labels.history import AnnotationStore
from progidiff.proposals.store import ProposalStore
from progidiff.server.datastores.remote_labels import RemoteLabels
from support.phantoms import write_phantom

SHAPE = (32, 24, 8)


class Remote(LocalDatastore):
    """Refuses labels while `is_down`."""

    is_down = False

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        if self.is_down:
            raise ConnectionError("the archive does not answer")
        return str(super().save_label(image_id, label_filename, label_tag, label_info))


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    folder = tmp_path / "cache"
    folder.mkdir()
    write_phantom(folder / "1.2.3.nii.gz", shape=SHAPE)
    return Remote(str(folder))


@pytest.fixture
def labels(tmp_path: Path, remote: Remote) -> RemoteLabels:
    def find_image(image_id: str) -> str:
        path = remote.get_image_uri(image_id)
        if not path:
            raise NotFoundError(f"There is no image '{image_id}'.")
        return path

    state = tmp_path / "state"
    return RemoteLabels(
        lambda: remote, find_image, state, AnnotationStore(state / "annotations"), ProposalStore(state / "proposals")
    )


def write_label(tmp_path: Path, remote: Remote, values: dict[int, int]) -> Path:
    array = np.zeros(SHAPE, np.uint8)
    for k, value in values.items():
        array[3:6, 3:6, k] = value
    path = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, nibabel.load(remote.get_image_uri("1.2.3")).affine), path)
    return path


def read_sent(remote: Remote) -> set[int]:
    array = np.asarray(nibabel.load(remote.get_label_uri("1.2.3", "final")).dataobj)
    return set(np.flatnonzero(array[4, 4]).tolist())


def test_slices_add_up_and_the_whole_label_is_sent(labels: RemoteLabels, remote: Remote, tmp_path: Path):
    labels.save_annotated("1.2.3", write_label(tmp_path, remote, {2: 6}), "final", {"slices": [2]}, "ada")
    labels.save_annotated("1.2.3", write_label(tmp_path, remote, {5: 6}), "final", {"slices": [5]}, "ada")
    assert read_sent(remote) == {2, 5}
    assert labels.annotations.annotated_slices("1.2.3") == {2, 5}
    assert labels.save_annotated("1.2.3", write_label(tmp_path, remote, {5: 6}), "final", {"slices": [5]}).repeated
    labels.undo("1.2.3")
    assert read_sent(remote) == {2}
    labels.restore("1.2.3", 2)
    assert read_sent(remote) == {2, 5}
    labels.remove_label("1.2.3", "final", "ada")
    assert remote.get_labeled_images() == []
    assert labels.annotations.annotated_images() == {}
    with pytest.raises(NotFoundError, match="no label with tag"):
        labels.remove_label("1.2.4", "final")
    with pytest.raises(NotFoundError, match="no label with tag"):
        labels.remove_label("../..", "final")


def test_a_label_that_could_not_be_sent_is_kept_and_does_not_count(
    labels: RemoteLabels, remote: Remote, tmp_path: Path
):
    first = labels.save_annotated("1.2.3", write_label(tmp_path, remote, {2: 6}), "final", {}).annotation
    remote.is_down = True
    with pytest.raises(ConnectionError):
        labels.save_annotated("1.2.3", write_label(tmp_path, remote, {4: 6}), "final", {})
    assert labels.annotations.current("1.2.3") == first
    assert len(labels.annotations.list()) == 2
    remote.is_down = False
    labels.save_annotated("1.2.3", write_label(tmp_path, remote, {4: 6}), "final", {})
    assert read_sent(remote) == {4}


def test_the_same_checks_hold(labels: RemoteLabels, remote: Remote, tmp_path: Path):
    good = write_label(tmp_path, remote, {2: 6})
    with pytest.raises(RequestError, match="is no tag"):
        labels.save_annotated("1.2.3", good, "../x", {})
    with pytest.raises(NotFoundError):
        labels.save_annotated("9.9.9", good, "final", {})
    text = tmp_path / "text.nii.gz"
    text.write_text("no label")
    with pytest.raises(ImageError, match="cannot be read"):
        labels.save_annotated("1.2.3", text, "final", {})
    assert remote.get_labeled_images() == []


def test_a_structure_without_a_code_is_told_of_and_renamed(labels: RemoteLabels, remote: Remote, tmp_path: Path):
    info = {"label_info": [{"name": "Tumour", "idx": 1}, {"name": "liver", "idx": 2}]}
    saved = labels.save_annotated("1.2.3", write_label(tmp_path, remote, {2: 1, 4: 2}), "final", info)
    (warning,) = saved.warnings
    assert warning.startswith("No code is known for 'Tumour': the DICOM segmentation says 'Anatomical structure'")
    renamed = labels.rename_structure("1.2.3", "tumour", "pancreas", "ada")
    assert dict(renamed.label_ids) == {"liver": 6, "pancreas": 11}
    array = np.asarray(nibabel.load(remote.get_label_uri("1.2.3", "final")).dataobj)
    assert {k: int(array[4, 4, k]) for k in (2, 4)} == {2: 11, 4: 6}
    assert not labels.save_annotated("1.2.3", write_label(tmp_path, remote, {2: 6}), "final", {}).warnings
