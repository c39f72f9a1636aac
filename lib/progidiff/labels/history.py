"""Who labelled what, when and from which proposal: slice state, all label versions and the audit, append-only.

::

    <root>/
      log.jsonl                        one JSON object per line and event; only ever appended to
      labels/<image>/<sequence>.<ext>  every label that was saved, byte for byte; written once, never changed or removed
      head.json                        how far the log went when it was last written; tells whether its end is missing
      torn/                            what a crash left of a save never acknowledged: its file, part of its line

Order is by sequence number, never by clock. A label's file is on disk (flushed, renamed) before the line that speaks of
it, and a call returns only after that line is flushed: what was acknowledged is there after a power cut. Every line
carries a checksum of itself and the checksum of the line before it, so damage and missing lines are found and named by
`verify`; what can be read is used.

Of each image and tag some saves are *in force*. A save of the whole volume replaces those before it that speak about
nothing but its structures, one that names slices adds to them, a delete ends them all, an undo goes back one step, and
a restore goes back to the state right after an earlier save. The file of the last save in force is the whole label as
it is: who saves a few slices joins them with the label in force first. Deleting or undoing removes nothing from this
folder.
"""

from __future__ import annotations

import bisect
import builtins
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

import progidiff
from progidiff.errors import NotFoundError, RequestError, StoreError
from progidiff.images.formats import Use, find_format, list_suffixes
from progidiff.storage.atomic import flush, locked, make_scratch_name, remove_leftovers, replace_text
from progidiff.storage.folder_watch import FolderWatch
from progidiff.storage.json_text import is_whole, mend
from progidiff.storage.state_files import load_state

logger = logging.getLogger(__name__)

FORMAT = 1
FINAL = "final"
"""The tag whose labels count as annotated."""

_MAX_FOLDER_NAME = 255
"""Bytes of a file name, on every usual disk."""

Kind = Literal["label", "delete", "undo", "restore", "skip", "export", "done", "reopen", "decide", "structure"]

_WITHOUT_EFFECT = ("skip", "export", "done", "reopen", "decide", "structure")
"""Kinds of events that change nothing of what is in force."""

_NOT_KEPT = (
    "The label could not be kept in '{}' ({}); nothing was saved. Free some disk space, or check who may write there, "
    "and save again."
)
_NOTHING_TO_UNDO = (
    "There is nothing to undo: no label of '{}' with tag '{}' was saved, or every save is undone already."
)

_MAX_TEXT = 200
_NUMBER = re.compile(r"(\d+)\.")


@dataclass(frozen=True)
class Source:
    """Where an accepted mask came from.

    Attributes:
        proposals: Key of the stored result.
        shown: "consensus", "best", "1".."K", or "merged".
        model: Name and version, for example "ct-base@1".
        adapter: Name and version, "" for none.
        seed: Of the noise.
        steering: What a person drew that the proposals were drawn given, counted in words; "" for nothing.
    """

    proposals: str
    shown: str
    model: str
    adapter: str
    seed: int
    steering: str = ""


@dataclass(frozen=True)
class Annotation:
    """One saved label.

    Attributes:
        sequence: Counts up over all events of a store; never given twice.
        time: UTC, ISO 8601; for people, nothing is sorted by it.
        image: Id in the datastore.
        tag: Of the datastore; only `FINAL` counts as annotated.
        user: Who saved it, "" if nobody had to log in.
        client: What saved it, as far as known.
        slices: Axial slices (inferior to superior, from 0) annotated by this save, ascending; None for the whole
            volume.
        structures: The structures it speaks about; one that is not drawn is stated to be absent.
        source: The proposal it was made from; None if not known.
        edited: Whether it differs from that proposal; None if not known.
        seconds: Time a person spent on it; None if not known.
        sha256: Of the file.
        file: The label version, relative to the store's root.
        num_slices: Axial slices of the volume; None if not known.
        label_ids: (structure, id) of what the file may draw; empty if not known.
        effort: (structure, seconds, clicks) that a person spent; empty if not known.
        edits: Strokes and other changes with which it was drawn by hand; None if it was not, or if that is not known.
    """

    sequence: int
    time: str
    image: str
    tag: str
    user: str
    client: str
    slices: tuple[int, ...] | None
    structures: tuple[str, ...]
    source: Source | None
    edited: bool | None
    seconds: float | None
    sha256: str
    file: str
    num_slices: int | None = None
    label_ids: tuple[tuple[str, int], ...] = ()
    effort: tuple[tuple[str, float, int], ...] = ()
    edits: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def rename(self, names: Mapping[str, str]) -> Annotation:
        """The same with other names for structures; two that become one are one.

        Args:
            names: Former name -> the one of now.
        """
        said = {*self.structures, *(name for name, _ in self.label_ids), *(name for name, _, _ in self.effort)}
        if said.isdisjoint(names):
            return self
        return replace(
            self,
            structures=tuple(dict.fromkeys(names.get(name, name) for name in self.structures)),
            label_ids=tuple((names.get(name, name), value) for name, value in self.label_ids),
            effort=tuple((names.get(name, name), seconds, clicks) for name, seconds, clicks in self.effort),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Annotation:
        """The inverse of `to_dict`; names it does not know are left out."""
        plain = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        source = plain["source"]
        slices = plain["slices"]
        return cls(
            **{
                **plain,
                "sequence": int(plain["sequence"]),
                "slices": None if slices is None else tuple(int(z) for z in slices),
                "structures": tuple(map(str, plain["structures"])),
                "label_ids": tuple((str(name), int(value)) for name, value in plain.get("label_ids", ())),
                "effort": tuple(
                    (str(name), float(seconds), int(clicks)) for name, seconds, clicks in plain.get("effort", ())
                ),
                "source": None
                if source is None
                else Source(**{name: source[name] for name in Source.__dataclass_fields__ if name in source}),
            }
        )


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Attributes:
        sequence, time, image, tag, user: As in `Annotation`.
        kind: "label", "delete", "undo", "restore", "skip" or "export"; "done" and "reopen" say that an image is
            finished, and that it is not; "decide" that somebody decided between two
            readings, whose result is the save before it; "structure" that the folder has a structure of its own, or
            another name for one, and speaks of no image ("").
        reason: Of a skip or a delete; of an export, what it was a part of; of a decision, what was taken from whom; of
            a structure, what was said of it.
        target: The save that a restore goes back to; None otherwise.
        label: What was saved; None unless `kind` is "label".
    """

    sequence: int
    time: str
    kind: Kind
    image: str
    tag: str
    user: str
    reason: str = ""
    target: int | None = None
    label: Annotation | None = None


@dataclass
class _Track:
    """The saves in force of one image and tag, and how it came to them.

    Attributes:
        states: One entry per step that can be undone: sequences in force, oldest first. The first is empty.
        timeline: (event, sequences in force after it), in order.
    """

    states: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    timeline: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def apply(self, event: Event, labels: Mapping[int, Annotation]) -> None:
        """Take the next event into account; `labels` are all saves so far."""
        label = event.label
        if label is not None:
            kept = self.states[-1]
            if label.slices is None:
                about = set(label.structures)
                kept = tuple(number for number in kept if about and not about.issuperset(labels[number].structures))
            self.states.append((*kept, event.sequence))
        elif event.kind == "delete":
            self.states.append(())
        elif event.kind == "restore":
            self.states.append(self.after(event.target or 0))
        elif event.kind == "undo" and len(self.states) > 1:
            self.states.pop()
        self.timeline.append((event.sequence, self.states[-1]))

    def after(self, sequence: int) -> tuple[int, ...]:
        """What was in force right after an event."""
        return next((state for number, state in reversed(self.timeline) if number <= sequence), ())


class _Head(BaseModel):
    """How far the log went when its last line was written.

    Attributes:
        sequence: Of the last event.
        check: Of its line.
    """

    model_config = ConfigDict(frozen=True)

    sequence: int
    check: str


@dataclass(frozen=True)
class _Line:
    """One line as read: the event, or why it cannot be read."""

    number: int
    event: Event | None
    check: str = ""
    after: str = ""
    problem: str = ""


class AnnotationStore:
    """A folder of label versions and their log; safe for threads and for several processes on one folder.

    Args:
        root: The folder; made at the first event.
        final_labels: The datastore's folder of labels of tag `FINAL`. Labels in it that have no event were made
            elsewhere and count as annotated on the whole volume. None to go by the events alone.

    Attributes:
        misfits: Images whose label there, made elsewhere, does not fit them and does not count; whoever looks at the
            files sets it.
        final_watch: Whether somebody else changed that folder; told by whoever puts the labels in force into it.
        find_renamed: Former name of a structure -> what the folder calls it now. What is in force has the names of now;
            `list` and `events` tell what was written then.
    """

    def __init__(self, root: str | os.PathLike[str], final_labels: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root)
        self.final_labels = None if final_labels is None else Path(final_labels)
        self.misfits: frozenset[str] = frozenset()
        self.find_renamed: Callable[[], Mapping[str, str]] = dict
        self.final_watch = FolderWatch(self.final_labels or Path(os.devnull))
        self._final_names: frozenset[str] = frozenset()
        self._final_images: dict[str, str] = {}
        self._foreign: tuple[object, object, frozenset[str]] = (None, None, frozenset())
        self._log = self.root / "log.jsonl"
        self._head_file = self.root / "head.json"
        self._mutex = threading.RLock()
        self._is_locked = False
        self._reset()

    def record(
        self,
        image: str,
        label_file: str | os.PathLike[str],
        *,
        tag: str = FINAL,
        user: str = "",
        client: str = "",
        slices: Sequence[int] | None = None,
        structures: Sequence[str] = (),
        source: Source | None = None,
        edited: bool | None = None,
        seconds: float | None = None,
        num_slices: int | None = None,
        label_ids: Mapping[str, int] | None = None,
        effort: Sequence[tuple[str, float, int]] = (),
        edits: int | None = None,
    ) -> Annotation:
        """Keep a label version and say what it is; both are on disk when this returns.

        Args:
            image: Id in the datastore.
            label_file: The label, which is copied.
            tag, user, client, structures, source, edited, seconds, num_slices, label_ids, effort, edits: See
                `Annotation`.
            slices: Axial slices that this save annotates, in any order; None for the whole volume.

        Raises:
            RequestError: if a slice is none, or the label's file is of no format for labels.
            StoreError: if the disk refuses; then nothing was recorded.
            BusyError: if another process holds the store for too long.
        """
        label_file = Path(label_file)
        suffix = _label_suffix(label_file)
        chosen = None if slices is None else _check_slices(slices, num_slices)
        with self._staged(label_file) as (staged, sha256), self._locked():
            lines = self._lines()
            folder = self.root / "labels" / _folder_name(image)
            sequence = self._next_sequence(lines, folder)
            file = self._keep(staged, folder / f"{sequence}{suffix}")
            label = Annotation(
                sequence=sequence,
                time=_now(),
                image=image,
                tag=tag,
                user=user[:_MAX_TEXT],
                client=client[:_MAX_TEXT],
                slices=chosen,
                structures=tuple(structures),
                source=source,
                edited=edited,
                seconds=None if seconds is None else float(seconds),
                sha256=sha256,
                file=file.relative_to(self.root).as_posix(),
                num_slices=num_slices,
                label_ids=tuple((label_ids or {}).items()),
                effort=tuple(effort),
                edits=edits,
            )
            try:
                self._append(Event(sequence, label.time, "label", image, tag, label.user, label=label))
            except BaseException:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
                raise
            return label

    def delete(self, image: str, user: str = "", tag: str = FINAL, reason: str = "") -> Event:
        """Say that an image has no label of this tag any more; its versions stay."""
        return self._record_event("delete", image, user, tag, reason)

    def skip(self, image: str, user: str = "", reason: str = "") -> Event:
        """Say that somebody looked at an image and left it."""
        return self._record_event("skip", image, user, FINAL, reason)

    def note_export(self, image: str, user: str = "", reason: str = "") -> Event:
        """Say that a copy of an image went out, and as a part of what."""
        return self._record_event("export", image, user, FINAL, reason)

    def finish(self, image: str, user: str = "", is_done: bool = True, tag: str = FINAL) -> Event:
        """Say that nothing is left to do on an image, or on a reading of it, or that there is again."""
        return self._record_event("done" if is_done else "reopen", image, user, tag)

    def decide(self, image: str, user: str, reason: str) -> Event:
        """Say that somebody decided between two readings of an image, and what was taken from whom."""
        return self._record_event("decide", image, user, FINAL, reason)

    def note_structure(self, reason: str, user: str = "") -> Event:
        """Say what became of a structure of the folder's own."""
        return self._record_event("structure", "", user, "", reason)

    def find_finished(self, is_meant: Callable[[str], bool] = FINAL.__eq__) -> dict[str, bool]:
        """Image -> whether somebody said last that it is done; only of those of which somebody said anything, under a
        tag that is meant.
        """
        with self._mutex:
            self._refresh()
            last: dict[str, tuple[int, bool]] = {}
            for (image, tag), entry in self._said.items():
                if is_meant(tag) and (image not in last or entry > last[image]):
                    last[image] = entry
            return {image: is_done for image, (_, is_done) in last.items()}

    def is_finished(self, image: str, tag: str = FINAL) -> bool | None:
        """Whether somebody said last that an image is done; None if nobody said anything of it."""
        with self._mutex:
            self._refresh()
            return self._said.get((image, tag), (0, None))[1]

    def find_skipped(self, user: str) -> set[str]:
        """The images that a person, or somebody without a name, set aside and nobody labelled since."""
        with self._mutex:
            self._refresh()
            return {image for image, users in self._skips.items() if users & {"", user}}

    def changed_since(self, sequence: int) -> set[str]:
        """The images that anything happened to after an event."""
        with self._mutex:
            self._refresh()
            return {event.image for event in self._after(sequence) if event.image}

    def _after(self, sequence: int) -> builtins.list[Event]:
        first = bisect.bisect_right(self._events, sequence, key=lambda event: event.sequence)
        return self._events[first:]

    def undo(self, image: str, user: str = "", tag: str = FINAL) -> Annotation | None:
        """Go back one step: to what was in force before the last save, delete or restore.

        Returns:
            The save that is in force now; None if none is.

        Raises:
            NotFoundError: if there is no step to go back.
        """
        with self._locked():
            self._refresh()
            if len(self._track(image, tag).states) < 2:
                raise NotFoundError(_NOTHING_TO_UNDO.format(image[:100], tag))
            self._record_event("undo", image, user, tag)
            return self.current(image, tag)

    def find_undone(self, image: str, tag: str = FINAL) -> Annotation | None:
        """The save that would be in force after an `undo`; None if none would be.

        Raises:
            NotFoundError: if there is no step to go back.
        """
        with self._mutex:
            self._refresh()
            states = self._track(image, tag).states
            if len(states) < 2:
                raise NotFoundError(_NOTHING_TO_UNDO.format(image[:100], tag))
            return self._labels[states[-2][-1]] if states[-2] else None

    def take_back(self, image: str, tag: str, reason: str) -> None:
        """Say that the last event of an image had no effect, because the folder with the labels refused it: what was in
        force before counts again.
        """
        with self._locked():
            self._lines()
            timeline = self._track(image, tag).timeline
            last = next(event for event in reversed(self._events) if event.sequence == timeline[-1][0])
            if last.kind == "undo":
                self._record_event("restore", image, "", tag, reason, target=timeline[-2][0])
            else:
                self._record_event("undo", image, "", tag, reason)

    def restore(self, image: str, sequence: int, user: str = "") -> Annotation:
        """Go back to the state right after an earlier save.

        Raises:
            NotFoundError: if this image has no such save.
        """
        with self._locked():
            label = self.get(image, sequence)
            self._record_event("restore", image, user, label.tag, target=sequence)
            return label

    def get(self, image: str, sequence: int) -> Annotation:
        """One save.

        Raises:
            NotFoundError: if this image has no such save.
        """
        for label in self.list(image):
            if label.sequence == sequence:
                return label
        numbers = ", ".join(str(label.sequence) for label in self.list(image)[-10:]) or "none"
        raise NotFoundError(
            f"Image '{image[:100]}' has no saved label {sequence}; there are {numbers}. "
            "GET /progidiff/annotations lists them."
        )

    def list(self, image: str | None = None) -> builtins.list[Annotation]:
        """All saves of an image (or of all), oldest first, those in force and those superseded."""
        return [event.label for event in self.events(image) if event.label is not None]

    def events(self, image: str | None = None) -> builtins.list[Event]:
        """Everything that happened, oldest first."""
        with self._mutex:
            self._refresh()
            return [event for event in self._events if image in (None, event.image)]

    def last_sequence(self) -> int:
        """Of the newest event; 0 if there is none."""
        with self._mutex:
            self._refresh()
            return self._events[-1].sequence if self._events else 0

    def in_force(self, image: str, tag: str = FINAL) -> builtins.list[Annotation]:
        """The saves that count now, oldest first; the last one's file is the label as it is."""
        renamed = self.find_renamed()
        with self._mutex:
            self._refresh()
            saves = [self._labels[number] for number in self._track(image, tag).states[-1]]
        return [save.rename(renamed) for save in saves] if renamed else saves

    def counting(self) -> frozenset[int]:
        """The sequences of all saves in force, of every image and tag."""
        with self._mutex:
            self._refresh()
            return frozenset(number for track in self._tracks.values() for number in track.states[-1])

    def current(self, image: str, tag: str = FINAL) -> Annotation | None:
        """The newest save in force; None if there is none."""
        return next(reversed(self.in_force(image, tag)), None)

    def annotated_slices(self, image: str, tag: str = FINAL) -> frozenset[int] | None:
        """The union over saves in force; None for the whole volume, empty for nothing."""
        with self._mutex:
            self._refresh()
            if (image, tag) not in self._tracks:
                return None if tag == FINAL and image in self._foreign_labels() else frozenset()
            return _unite(self.in_force(image, tag))

    def annotated_images(self) -> dict[str, frozenset[int] | None]:
        """Image -> `annotated_slices`, of every image that has any."""
        with self._mutex:
            self._refresh()
            images = {image for image, tag in self._tracks if tag == FINAL}
            found = {image: _unite(self.in_force(image)) for image in sorted(images)}
            foreign: dict[str, frozenset[int] | None] = dict.fromkeys(sorted(self._foreign_labels() - images))
            return {image: slices for image, slices in {**found, **foreign}.items() if slices is None or slices}

    def find_annotated(self, image: str, tag: str = FINAL) -> dict[str, frozenset[int] | None]:
        """Structure -> axial slices on which it is annotated; None for the whole volume. Labels that were made
        elsewhere and adopted name no structure.
        """
        saves = self.in_force(image, tag)
        names = dict.fromkeys(name for save in saves for name in save.structures)
        return {name: _unite(save for save in saves if name in save.structures) for name in names}

    def list_tracked(self) -> set[tuple[str, str]]:
        """Every image and tag that anything was ever saved for."""
        with self._mutex:
            self._refresh()
            return set(self._tracks)

    def find_tags(self, image: str) -> frozenset[str]:
        """Every tag under which anything of an image was ever saved."""
        with self._mutex:
            self._refresh()
            return frozenset(self._tags.get(image, ()))

    def label_file(self, annotation: Annotation) -> Path:
        """The kept bytes of a save."""
        return self.root / annotation.file

    def count_slices_since(self, sequence: int, is_meant: Callable[[str], bool] | None = None) -> int:
        """Slices that are annotated now and were not at that event, of all images or of those that are meant.

        A save of a whole volume of unknown depth counts as one slice.
        """
        with self._mutex:
            self._refresh()
            total = 0
            for image in {event.image for event in self._after(sequence) if event.tag == FINAL}:
                track = self._tracks.get((image, FINAL))
                if track is not None and (is_meant is None or is_meant(image)):
                    before = self._expand(track.after(sequence))
                    total += len(self._expand(track.states[-1]) - before)
            return total

    def verify(self) -> builtins.list[str]:
        """Read everything again and compare.

        Returns:
            Problems found, one sentence each; empty if there are none.
        """
        with self._locked() if self.root.is_dir() else contextlib.nullcontext():
            problems: builtins.list[str] = []
            content = self._read_log(0)
            whole, _, torn = content.rpartition(b"\n")
            if torn:
                problems.append(
                    f"The last {len(torn)} bytes of '{self._log}' are a line that was "
                    "never finished; the next save sets them aside."
                )
            last_check, damaged_before = "", False
            known: set[str] = set()
            written = whole.split(b"\n")
            for line in _parse(whole + b"\n" if whole else b"", 1):
                if line.event is None:
                    problems.append(
                        f"Line {line.number} of '{self._log}' is damaged "
                        f"({line.problem}); its event is lost, the others are used."
                    )
                    damaged_before = True
                    continue
                if not _is_as_written(written[line.number - 1]):
                    problems.append(
                        f"Line {line.number} of '{self._log}' is damaged between its values only: its checksum fits "
                        "and its event is used, but something else wrote there; check the disk, and keep a backup."
                    )
                if line.after != last_check and not damaged_before:
                    problems.append(
                        f"Lines before line {line.number} of '{self._log}' are missing: "
                        f"event {line.event.sequence} does not follow."
                    )
                last_check, damaged_before = line.check, False
                if line.event.label is not None:
                    known.add(line.event.label.file)
                    problems += self._check_file(line.event.label)
            kept = sorted((self.root / "labels").glob("*/*")) if (self.root / "labels").is_dir() else []
            problems += [
                f"'{path}' is a label version that no event speaks of: a save that was "
                "never acknowledged, or whose line is damaged."
                for path in kept
                if path.is_file() and path.relative_to(self.root).as_posix() not in known
            ]
            self._refresh()
            return problems + self._find_lost_end()

    def find_losses(self) -> builtins.list[str]:
        """What the log itself says to be missing, one sentence each, without reading label versions; see `verify`."""
        with self._mutex:
            self._refresh()
            return [*self._gaps, *self._find_lost_end()]

    def _find_lost_end(self) -> builtins.list[str]:
        head = self._read_head()
        if head is not None and not self._reaches(head):
            last = self._events[-1].sequence if self._events else 0
            return [
                f"The end of '{self._log}' is missing: it went to event {head.sequence} and ends with {last}. "
                "The label versions are kept; restore the log from a backup."
            ]
        unknown = self._find_unknown_versions() if head is None else []
        if unknown:
            return [
                f"{len(unknown)} label versions up to '{unknown[-1][1]}' have no line in '{self._log}'; its end may "
                "be missing. Restore it from a backup."
            ]
        return []

    def _find_unknown_versions(self) -> builtins.list[tuple[int, Path]]:
        """Numbers and files of label versions beyond the last event, but for one that a crash may have left; see
        `set_aside_unfinished`.
        """
        last = self._events[-1].sequence if self._events else 0
        found = [
            (int(number.group(1)), path)
            for path in (self.root / "labels").glob("*/*")
            if (number := _NUMBER.match(path.name)) and int(number.group(1)) > last
        ]
        return sorted(found) if len(found) > 1 else []

    def _read_head(self) -> _Head | None:
        meaning = "Whether the end of the history's log is missing cannot be told."
        return load_state(self._head_file, _Head.model_validate_json, lambda: None, meaning)

    def _reaches(self, head: _Head) -> bool:
        return self._checks.get(head.sequence) == head.check

    def list_torn(self) -> builtins.list[str]:
        """What crashes left of saves that nobody was told about, one sentence each: no damage, but somebody may miss a
        click.
        """
        found = sorted(path for path in (self.root / "torn").glob("*") if path.is_file())
        return [
            f"'{path}' ({path.stat().st_size} bytes) is what a crash left of a save that was never acknowledged; the "
            "history goes on from the last good state. Save the label again if it is missed, then delete the file."
            for path in found
        ]

    def set_aside_unfinished(self) -> Path | None:
        """Put away the label version of a save that was cut off before its line was written: nobody was told that it
        was saved.

        It goes into `torn`. It is numbered right after the last event, or its number was given again to the next one.
        Files with other numbers, more than one of the first kind, or such a one beside a log with damaged lines, mean
        that lines were lost: they stay, and `verify` names them.

        Returns:
            Where it is now; None if there was none.
        """
        if not (self.root / "labels").is_dir():
            return None
        with self._locked():
            lines = self._lines()
            known = {label.file for label in self._labels.values()}
            unknown = {
                path: int(number[1])
                for path in (self.root / "labels").glob("*/*")
                if path.relative_to(self.root).as_posix() not in known and (number := _NUMBER.match(path.name))
            }
            unfinished = [path for path, number in unknown.items() if number in self._checks]
            others = {path: number for path, number in unknown.items() if number not in self._checks}
            head = self._read_head()
            is_whole_log = lines == len(self._events) and (head is None or self._reaches(head))
            if is_whole_log and list(others.values()) == [self._next_sequence(lines, None)]:
                unfinished += others
            return next(iter([self._set_aside_version(path) for path in unfinished]), None)

    def _set_aside_version(self, file: Path) -> Path:
        target = self.root / "torn" / f"{file.parent.name}-{time.time_ns()}-{file.name}"
        try:
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
            flush(target.parent)
            flush(file.parent)
        except OSError as err:
            raise StoreError(f"'{file}' could not be moved to '{target}' ({err}). Check who may write there.") from err
        logger.warning("Set aside '%s' as '%s': its save was cut off and never acknowledged", file, target.name)
        return target

    def _check_file(self, label: Annotation) -> builtins.list[str]:
        try:
            found = hash_file(self.root / label.file)
        except OSError as err:
            return [
                f"The file of save {label.sequence} of '{label.image}' cannot be read "
                f"({err}); restore '{label.file}' from a backup."
            ]
        if found != label.sha256:
            return [
                f"The file of save {label.sequence} of '{label.image}' is not what was "
                f"saved; restore '{label.file}' from a backup."
            ]
        return []

    def _record_event(
        self, kind: Kind, image: str, user: str, tag: str, reason: str = "", target: int | None = None
    ) -> Event:
        with self._locked():
            sequence = self._next_sequence(self._lines(), None)
            event = Event(sequence, _now(), kind, image, tag, user[:_MAX_TEXT], reason[:_MAX_TEXT], target)
            self._append(event)
            return event

    def _lines(self) -> int:
        """Lines of the log, also damaged ones, after setting a torn last line aside. Needs the lock."""
        self._mend_tail()
        self._refresh()
        return self._num_lines

    def _next_sequence(self, lines: int, folder: Path | None) -> int:
        """Above every number ever given, also to events whose line is damaged and to files that no event speaks of."""
        head = self._read_head()
        used = [lines, self._events[-1].sequence if self._events else 0, 0 if head is None else head.sequence]
        if head is None:
            used += [number for number, _ in self._find_unknown_versions()]
        if folder is not None and folder.is_dir():
            used += [int(match.group(1)) for match in map(_NUMBER.match, os.listdir(folder)) if match]
        return max(used) + 1

    @contextlib.contextmanager
    def _staged(self, label_file: Path) -> Iterator[tuple[Path, str]]:
        """A copy of a label in the history's folder, before any lock, and its SHA-256."""
        scratch = self.root / make_scratch_name()
        try:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(label_file, scratch)
                flush(scratch)
                sha256 = hash_file(scratch)
            except OSError as err:
                raise StoreError(_NOT_KEPT.format(self.root, err)) from err
            yield scratch, sha256
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def _keep(self, staged: Path, file: Path) -> Path:
        """Rename a copy to a label version. Needs the lock."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, file)
            for changed in (file.parent, file.parent.parent, self.root):
                flush(changed)
        except OSError as err:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            raise StoreError(_NOT_KEPT.format(file.parent, err)) from err
        return file

    def _append(self, event: Event) -> None:
        """Write one line and flush it; if the disk refuses, the log is as it was."""
        head = self._read_head()
        # Where the end of the log is missing, the line follows what is lost: `verify` finds the gap for good.
        line = _encode(event, self._last_check if head is None or self._reaches(head) else head.check)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(handle).st_size
                try:
                    written = 0
                    while written < len(line):
                        written += os.write(handle, line[written:])
                    os.fsync(handle)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.ftruncate(handle, size)
                        os.fsync(handle)
                    raise
            finally:
                os.close(handle)
            if size == 0:
                flush(self.root)
        except OSError as err:
            raise StoreError(
                f"'{self._log}' could not be written ({err}); nothing was saved. Free some disk space and save again."
            ) from err
        self._refresh()
        try:
            replace_text(self._head_file, _Head(sequence=event.sequence, check=self._last_check).model_dump_json())
        except OSError as err:  # The event is kept. An older head is one that the log reaches.
            logger.warning("'%s' could not be written: %s", self._head_file, err)

    def _mend_tail(self) -> None:
        """Finish or set aside a last line that a crash left without its end. Needs the lock."""
        try:
            with self._log.open("rb+") as file:
                size = file.seek(0, os.SEEK_END)
                if size == 0:
                    return
                file.seek(size - 1)
                if file.read(1) == b"\n":
                    return
                file.seek(0)
                start = file.read().rfind(b"\n") + 1
                file.seek(start)
                torn = file.read()
                if next(_parse(torn + b"\n", 1)).event is not None:  # Only the newline is missing.
                    file.write(b"\n")
                else:
                    aside = self.root / "torn"
                    aside.mkdir(exist_ok=True)
                    (aside / f"{time.time_ns()}.txt").write_bytes(torn)
                    file.truncate(start)
                    logger.warning(
                        "Set aside the last %d bytes of '%s': a line that was never finished or acknowledged",
                        len(torn),
                        self._log,
                    )
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            return
        except OSError as err:
            raise StoreError(
                f"'{self._log}' could not be mended ({err}); nothing was saved. Free some disk space and save again."
            ) from err

    def _reset(self) -> None:
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self._num_lines = 0
        self._last_check = ""
        self._checks: dict[int, str] = {}
        self._gaps: builtins.list[str] = []
        self._is_after_damage = False
        self._events: builtins.list[Event] = []
        self._labels: dict[int, Annotation] = {}
        self._tracks: dict[tuple[str, str], _Track] = {}
        self._tags: dict[str, set[str]] = {}
        self._said: dict[tuple[str, str], tuple[int, bool]] = {}
        self._skips: dict[str, set[str]] = {}

    def _refresh(self) -> None:
        """Read the lines that came since the last time, whichever process wrote them."""
        try:
            state = self._log.stat()
        except FileNotFoundError:
            self._reset()
            return
        except OSError as err:
            raise StoreError(f"'{self._log}' cannot be read ({err}). Check who may read there.") from err
        if (state.st_dev, state.st_ino) != self._identity or state.st_size < self._offset:
            self._reset()
            self._identity = (state.st_dev, state.st_ino)
        if state.st_size == self._offset:
            return
        content = self._read_log(self._offset)
        end = content.rfind(b"\n") + 1  # What follows is being written by another process, or torn.
        for line in list(_parse(content[:end], self._num_lines + 1)):  # All or, if one is refused, none.
            self._num_lines = line.number
            if line.event is None:
                logger.error("Line %d of '%s' is damaged and left out: %s", line.number, self._log, line.problem)
                self._gaps.append(
                    f"Line {line.number} of '{self._log}' is damaged ({line.problem}); its event is lost."
                )
                self._is_after_damage = True
                continue
            if line.after != self._last_check and not self._is_after_damage:
                self._gaps.append(f"Lines before line {line.number} of '{self._log}' are missing.")
            self._is_after_damage = False
            self._last_check = self._checks[line.event.sequence] = line.check
            self._note(line.event)
        self._offset += end

    def _note(self, event: Event) -> None:
        self._events.append(event)
        key = (event.image, event.tag)
        if event.label is not None:
            self._labels[event.sequence] = event.label
            self._skips.pop(event.image, None)
        if event.kind not in _WITHOUT_EFFECT:
            self._tracks.setdefault(key, _Track()).apply(event, self._labels)
            self._tags.setdefault(event.image, set()).add(event.tag)
        elif event.kind in ("done", "reopen"):
            self._said[key] = (event.sequence, event.kind == "done")
        elif event.kind == "skip":
            self._skips.setdefault(event.image, set()).add(event.user)

    def _read_log(self, offset: int) -> bytes:
        try:
            with self._log.open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as err:
            raise StoreError(f"'{self._log}' cannot be read ({err}). Check who may read there.") from err

    def _track(self, image: str, tag: str) -> _Track:
        return self._tracks.get((image, tag), _Track())

    def _expand(self, sequences: Iterable[int]) -> frozenset[int]:
        """The slices of some saves, with whole volumes spelled out."""
        found: set[int] = set()
        for label in (self._labels[number] for number in sequences):
            found.update(range(label.num_slices or 1) if label.slices is None else label.slices)
        return frozenset(found)

    def foreign_labels(self) -> frozenset[str]:
        """Ids of the files among the final labels that fit, those of this program's own labels among them; the very
        same set until the folder or `misfits` changes.
        """
        with self._mutex:
            return self._foreign_labels()

    def _foreign_labels(self) -> frozenset[str]:
        if self.final_labels is None or not self.final_labels.is_dir():
            return frozenset()
        if not self.final_watch.is_as_seen():
            with self.final_watch.look():
                names = frozenset(os.listdir(self.final_labels))
            if names != self._final_names:  # Names are taken apart once: there may be very many.
                for name in self._final_names - names:
                    self._final_images.pop(name, None)
                for name in names - self._final_names:
                    parts = split_label_name(name) if not name.startswith(".") and is_whole(name) else None
                    if parts is not None:
                        self._final_images[name] = parts[0]
                self._final_names = names
        names_then, misfits, found = self._foreign
        if names_then is not self._final_names or misfits is not self.misfits:
            found = frozenset(self._final_images.values()) - self.misfits
            self._foreign = (self._final_names, self.misfits, found)
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            if self._is_locked:
                yield
                return
            with locked(self.root / ".lock", f"Another process has been writing to '{self.root}'"):
                self._is_locked = True
                try:
                    remove_leftovers(self.root)
                    yield
                finally:
                    self._is_locked = False


def split_label_name(name: str) -> tuple[str, str] | None:
    """A label's file name as the id of its image and a suffix, as it is written; None if it is no label's.

    Example:
        >>> split_label_name("case.01.SEG.nrrd"), split_label_name("notes.txt")
        (('case.01', '.SEG.nrrd'), None)
    """
    row = find_format(name, Use.LABEL)
    return None if row is None else (name[: -len(row.suffix)], name[-len(row.suffix) :])


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hexadecimal) of a file's bytes. It does not wait for the other end of a pipe: this runs under locks."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(event: Event, last_check: str) -> bytes:
    values: dict[str, Any] = {
        "format": FORMAT,
        "sequence": event.sequence,
        "time": event.time,
        "event": event.kind,
        "image": event.image,
    }
    values |= {"tag": event.tag, "user": event.user}
    if event.reason:
        values["reason"] = event.reason
    if event.target is not None:
        values["target"] = event.target
    if event.label is not None:
        values |= {name: value for name, value in event.label.to_dict().items() if name not in values}
    values = mend(values)
    values["after"] = last_check
    values["check"] = _compute_check(values)
    return (json.dumps(values) + "\n").encode()


def _compute_check(values: Mapping[str, Any]) -> str:
    body = json.dumps(
        {name: value for name, value in values.items() if name != "check"}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def _parse(content: bytes, first: int) -> Iterator[_Line]:
    """The events of whole lines.

    Raises:
        StoreError: if a newer version wrote one. Left out as if it were damaged, it would be a label that is not in
            force any more.
    """
    for number, line in enumerate(content.split(b"\n")[:-1], first):
        try:
            values = json.loads(line)
            if values["check"] != _compute_check(values):
                raise ValueError("its checksum does not fit")
            if isinstance(values["format"], int) and values["format"] > FORMAT:
                raise StoreError(
                    f"A newer version of ProGiDiff Label saved labels here (line {number} of the history has format "
                    f"{values['format']}, version {progidiff.__version__} reads {FORMAT}). Nothing was changed. "
                    "Install that version again, or restore a backup of the store from before, or name another one "
                    "with --conf store."
                )
            if values["format"] != FORMAT:
                raise ValueError(f"it has format {values['format']}, this version reads {FORMAT}")
            values = mend(values)  # An older version took text that no answer can hold. The line stays as it is.
            label = Annotation.from_dict(values) if values["event"] == "label" else None
            event = Event(
                sequence=int(values["sequence"]),
                time=str(values["time"]),
                kind=values["event"],
                image=str(values["image"]),
                tag=str(values["tag"]),
                user=str(values["user"]),
                reason=str(values.get("reason", "")),
                target=values.get("target"),
                label=label,
            )
            yield _Line(number, event, values["check"], values["after"])
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            yield _Line(number, None, problem=str(err)[:200] or type(err).__name__)


def _is_as_written(line: bytes) -> bool:
    """Whether a line that can be read has the very bytes of `_encode`. The checksum speaks of the values and cannot see
    a tab or a carriage return in place of a space between them; no save is given up for that.
    """
    return json.dumps(json.loads(line)).encode() == line


def _unite(labels: Iterable[Annotation]) -> frozenset[int] | None:
    found: set[int] = set()
    for label in labels:
        if label.slices is None:
            return None
        found.update(label.slices)
    return frozenset(found)


def _check_slices(slices: Iterable[int], num_slices: int | None) -> tuple[int, ...]:
    chosen = set()
    for z in slices:
        if isinstance(z, bool) or not isinstance(z, int) or z < 0 or (num_slices is not None and z >= num_slices):
            last = "" if num_slices is None else f" to {num_slices - 1}"
            raise RequestError(
                f"Slice {str(z)[:40]} is not one of the image's; axial slices are whole "
                f"numbers from 0{last}, inferior to superior."
            )
        chosen.add(z)
    return tuple(sorted(chosen))


def _label_suffix(path: Path) -> str:
    row = find_format(path, Use.LABEL)
    if row is None:
        raise RequestError(
            f"A label named '{path.name[-40:]}' is not kept; its suffix must be one of "
            f"{', '.join(list_suffixes(Use.LABEL))}."
        )
    return row.suffix


def _folder_name(image: str) -> str:
    """A file name for any id: ids may hold spaces and any letters, and must not leave the folder.

    Example:
        >>> _folder_name("Größe 1"), len(_folder_name("ä" * 100))
        ('Gr%C3%B6%C3%9Fe%201', 255)
    """
    name = quote(image, safe="")
    name = "%2E" + name[1:] if name.startswith(".") else name
    if len(name) <= _MAX_FOLDER_NAME:
        return name
    digest = hashlib.sha256(image.encode(errors="surrogatepass")).hexdigest()
    return f"{name[: _MAX_FOLDER_NAME - len(digest) - 1]}-{digest}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
