"""Kills a process that drives the stores, again and again, and checks after every kill what the next process finds.

    python store_rounds.py <folder> <seed> <rounds>

Every round forks a writer that saves labels (some slices, whole volumes, undo), adapters, scores and proposals, and
says over a pipe what was acknowledged. It is killed with SIGKILL: half of the times after a random time, half of the
times before its n-th step on the disk, where a step that writes is torn in the middle. Then a fresh process opens
everything and compares. Time apart, all randomness comes from the seed. The last line of the output is a JSON object:
rounds, acknowledged, problems.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.active_learning.strategies import ImageScores
from progidiff.errors import NotFoundError
from progidiff.model.adapters import AdapterCard, AdapterStore
from progidiff.model.lora import LoraSettings
from progidiff.proposals.store import ProposalStore
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations
from support.phantoms import write_phantom
from support.proposals import make_proposals, make_request

IMAGES = ("one", "two", "three")
SHAPE = (20, 16, 6)
LIVER, SPLEEN = 6, 1
BASE = "f" * 64
VERSION = "toy@1"
MAX_STEPS = 120
PATIENCE_SECONDS = 120.0

Ack = dict[str, Any]


class Stores:
    """Everything that keeps state, as a server opens it."""

    def __init__(self, studies: Path) -> None:
        state = studies / ".progidiff"
        self.proposals = ProposalStore(state / "proposals")
        self.annotations = open_annotations(state, str(studies))
        self.labels = SafeLocalDatastore(str(studies), state, self.annotations, self.proposals, serves=True)
        self.adapters = AdapterStore(state / "adapters")
        self.scores = SliceScoreStore(state / "scores")


def draw_mask(seed: int) -> np.ndarray:
    """A label with both structures on every slice."""
    return np.random.default_rng(seed).choice(np.array([0, LIVER, SPLEEN], np.uint8), SHAPE)


def add_adapter(stores: Stores, tensors: dict[str, torch.Tensor]) -> AdapterCard:
    """A version whose tensors fit no network, which nobody asks for here."""
    about = {
        "modality": "MR",
        "structures": ("liver",),
        "base": BASE,
        "base_name": VERSION,
        "run": {},
        "readme": lambda card: "#",
    }
    return stores.adapters.add("mr", "lora", tensors, lora=LoraSettings(2, 4.0, ("encoder",)), **about)


def write(studies: Path, scratch: Path, random_: random.Random, acknowledge: Callable[[Ack], None]) -> None:
    """What a busy server does, until it is killed."""
    stores = Stores(studies)
    affine = nibabel.load(studies / "one.nii.gz").affine
    while True:
        image, seed = random_.choice(IMAGES), random_.randrange(2**31)
        kind = random_.choices(("slices", "whole", "undo", "adapter", "scores", "proposals"), (6, 3, 1, 2, 2, 2))[0]
        if kind in ("slices", "whole"):
            file = scratch / f"{seed}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(draw_mask(seed), affine), file)
            slices = sorted(random_.sample(range(SHAPE[2]), random_.randint(1, 4))) if kind == "slices" else None
            saved = stores.labels.save_annotated(image, file, "final", {} if slices is None else {"slices": slices})
            content = hashlib.sha256(file.read_bytes()).hexdigest() if slices is None else ""
            ack = {
                "image": image,
                "sequence": saved.annotation.sequence,
                "seed": seed,
                "slices": slices,
                "sent": content,
            }
            acknowledge({"kind": "label", "sha256": saved.annotation.sha256, **ack})
            file.unlink()
        elif kind == "undo":
            with contextlib.suppress(NotFoundError):
                stores.labels.undo(image)
                acknowledge({"kind": "undo", "image": image, "sequence": stores.annotations.last_sequence()})
        elif kind == "adapter":
            card = add_adapter(stores, {"branch.x": torch.full((64, 64), float(seed))})
            acknowledge({"kind": "adapter", "version": card.version, "seed": seed})
            if random_.random() < 0.5:
                stores.adapters.publish("mr", card.version)
                acknowledge({"kind": "publish", "version": card.version})
        elif kind == "scores":
            arrays = np.random.default_rng(seed).random((3, 1, SHAPE[2])).astype(np.float32)
            scores = ImageScores(image, ("liver",), *arrays, slice_mm=5.0, version=VERSION)
            stores.scores.save(ScoredImage(scores, "f00", "CT", time.time()))
            acknowledge({"kind": "scores", "image": image, "seed": seed})
        else:
            key = make_request(seed=seed).key(image, "00", VERSION)
            stores.proposals.save(key, replace(make_proposals(), seed=seed), image)
            acknowledge({"kind": "proposals", "key": key})


def die_at_step(step: int, root: Path, torn: bool) -> None:
    """Have this process killed before its n-th opening for writing, rename, removal, copy, write or flush below `root`.

    Args:
        step: From 1.
        root: Steps elsewhere do not count; writes and flushes all do.
        torn: Whether a write at which it dies still gets half of its bytes onto the disk.
    """
    left = step
    real_write, real_fsync = os.write, os.fsync

    def is_last() -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in (
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "shutil.copyfile",
            "shutil.move",
            "tempfile.mkdtemp",
        )
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and any(str(argument).startswith(str(root)) for argument in arguments[:2]) and is_last():
            die()

    def write_(handle: int, data: bytes) -> int:
        if is_last():
            if torn:
                real_write(handle, data[: len(data) // 2])
            die()
        return real_write(handle, data)

    def fsync(handle: int) -> None:
        if is_last():
            die()
        real_fsync(handle)

    os.write, os.fsync = write_, fsync  # type: ignore[assignment]
    sys.addaudithook(watch)


def run_writer(studies: Path, scratch: Path, name: str) -> tuple[str, list[Ack]]:
    """One writer from its start to its death; how it died, and what it had acknowledged."""
    random_ = random.Random(name)
    seconds = random_.uniform(0.02, 0.7) if random_.random() < 0.5 else None
    step = random_.randint(1, MAX_STEPS)
    torn = random_.random() < 0.5
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        real_write = os.write
        try:
            os.close(reader)
            if seconds is None:
                die_at_step(step, studies, torn)
            write(studies, scratch, random_, lambda ack: real_write(writer, json.dumps(ack).encode() + b"\n") and None)
        except BaseException as err:
            real_write(writer, json.dumps({"kind": "error", "text": f"{type(err).__name__}: {err}"}).encode() + b"\n")
        os._exit(1)
    os.close(writer)
    how = f"after {seconds:.3f} s" if seconds is not None else f"at step {step}{', torn' if torn else ''}"
    deadline = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    content = b""
    while True:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + PATIENCE_SECONDS
            continue
        part = os.read(reader, 1 << 16)
        if not part:
            break
        content += part
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.waitpid(child, 0)
    whole = content[: content.rfind(b"\n") + 1]
    return how, [json.loads(line) for line in whole.splitlines()]


def check(studies: Path, new: list[Ack], all_acks: list[Ack], rounds: int) -> list[str]:
    """Open everything as the next server would, and compare with what was acknowledged."""
    problems = [ack["text"] for ack in new if ack["kind"] == "error"]
    stores = Stores(studies)
    log = stores.annotations
    if sorted(stores.labels.list_images()) != sorted(IMAGES):
        problems.append(f"images: {stores.labels.list_images()}")
    problems += log.verify()
    events = {event.sequence: event for event in log.events()}
    told = {ack["sequence"]: ack for ack in all_acks if ack["kind"] in ("label", "undo")}
    for sequence, ack in told.items():
        event = events.get(sequence)
        if event is None or (event.kind, event.image) != (ack["kind"], ack["image"]):
            problems.append(f"event {sequence} is lost: {ack}")
        elif event.label is not None and event.label.sha256 != ack["sha256"]:
            problems.append(f"label {sequence} is another one")
        elif event.label is not None and ack["sent"] not in ("", ack["sha256"]):
            problems.append(f"label {sequence} is not byte for byte what was sent")
    if len(events) - len(told) > rounds:
        problems.append(f"{len(events) - len(told)} events nobody asked for after {rounds} rounds")
    for ack in new:
        if ack["kind"] == "label" and ack["sequence"] in events:
            kept = np.asarray(nibabel.load(log.label_file(log.get(ack["image"], ack["sequence"]))).dataobj)
            slices = range(SHAPE[2]) if ack["slices"] is None else ack["slices"]
            if any(not np.array_equal(kept[..., z], draw_mask(ack["seed"])[..., z]) for z in slices):
                problems.append(f"label {ack['sequence']} has other voxels")
    for image in IMAGES:
        current = log.current(image)
        final = studies / "labels" / "final" / f"{image}.nii.gz"
        if (current is None) == final.exists():
            problems.append(f"{image}: in force {current}, file there: {final.exists()}")
        elif current is not None and final.read_bytes() != log.label_file(current).read_bytes():
            problems.append(f"{image}: the file is not the label in force")
        if ("final" in stores.labels.get_labels_by_image_id(image)) != final.exists():
            problems.append(f"{image}: the list and the folder differ")
    return problems + check_others(stores, all_acks)


def check_others(stores: Stores, all_acks: list[Ack]) -> list[str]:
    """Adapters, scores and proposals."""
    problems = []
    for entry in stores.adapters.entries():
        problems += [entry.problem] if entry.problem else []
        for version in entry.versions:
            stores.adapters.load(stores.adapters.card(entry.name, version), BASE)
        published = [ack["version"] for ack in all_acks if ack["kind"] == "publish"]
        if published and (entry.current or 0) < published[-1]:
            problems.append(f"version {published[-1]} was published, {entry.current} is served")
    for ack in all_acks:
        if ack["kind"] == "adapter":
            tensors = stores.adapters.load(stores.adapters.card("mr", ack["version"]), BASE)
            if float(tensors["branch.x"][0, 0]) != np.float32(ack["seed"]):
                problems.append(f"adapter {ack['version']} is another one")
        if ack["kind"] == "scores" and stores.scores.load(ack["image"], VERSION) is None:
            problems.append(f"scores of {ack['image']} are lost")
        if ack["kind"] == "proposals" and stores.proposals.load(ack["key"]) is None:
            problems.append(f"proposals {ack['key']} are lost")
    return problems


def find_half_files(studies: Path) -> list[str]:
    """What killed processes leave behind goes when it is an hour old; what was found damaged would be named so."""
    for path in studies.rglob(".writing-*"):
        os.utime(path, (time.time() - 7200,) * 2)
    stores = Stores(studies)
    affine = nibabel.load(studies / "one.nii.gz").affine
    file = studies.parent / "last.nii.gz"
    nibabel.save(nibabel.Nifti1Image(draw_mask(0), affine), file)
    stores.labels.save_annotated("one", file, "final", {})
    stores.scores.save(
        ScoredImage(
            ImageScores("one", ("liver",), *np.zeros((3, 1, 6), np.float32), 5.0, VERSION), "f00", "CT", time.time()
        )
    )
    add_adapter(stores, {"branch.x": torch.zeros(1)})
    found = [*studies.rglob(".writing-*"), *studies.rglob("*damaged*"), *studies.rglob("*.tmp")]
    return [f"half file: {path.relative_to(studies)}" for path in found]


def in_a_fresh_process(work: Callable[[], list[str]]) -> list[str]:
    """Call it in a fork, which leaves no lock and no cache in this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            problems = work()
        except BaseException as err:
            problems = [f"{type(err).__name__}: {err}"]
        with os.fdopen(writer, "w") as pipe:
            json.dump(problems, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return list(json.loads(content)) if content else ["the process that checks died"]


def main(folder: Path, seed: str, rounds: int) -> int:
    """All rounds; ends at the first problem and leaves the folder as it is then."""
    studies, scratch = folder / "studies", folder / "scratch"
    studies.mkdir(parents=True)
    for number, name in enumerate(IMAGES):
        write_phantom(studies / f"{name}.nii.gz", SHAPE, number)
    acks: list[Ack] = []
    problems: list[str] = []
    done = 0
    for done in range(1, rounds + 1):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        how, new = run_writer(studies, scratch, f"{seed}:{done}")
        acks += new
        problems = in_a_fresh_process(partial(check, studies, new, acks, done))
        print(
            f"round {done}, seed {seed}:{done}: killed {how}, {len(new)} acknowledged, {len(problems)} problems",
            flush=True,
        )
        if problems:
            break
    else:
        problems = in_a_fresh_process(lambda: find_half_files(studies))
    print(json.dumps({"rounds": done, "acknowledged": Counter(ack["kind"] for ack in acks), "problems": problems}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
