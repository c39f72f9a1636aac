#!/usr/bin/env python3
"""Made `tests/data/former_0_1_0/`: what version 0.1.0 leaves on disk, for `tests/test_former_version.py`.

This was run once, with version 0.1.0, and says how the files came about; later versions read them and need not run
this::

    python tests/data/make_former_store.py

Everything was written by two real servers (one on volumes, one on pictures), by the trainings that they started,
and by ``progidiff prelabel`` and ``progidiff textdiff``, on generated images and with models of toy width: no
patient, no research data. Users, tokens and session keys open nothing but this folder. The servers ran in `ROOT`,
so the absolute paths in requests, logs and run records are below it; nothing was rewritten afterwards. Left out of
the copy: locks, the servers' logs and uploads, curves for TensorBoard, and features of pictures, which every
version may compute again.

Version 0.1.0 keeps no proposals of single slices (`progidiff_slice`, `textdiff` on a volume): they live in memory
only.

Modification times do not survive a checkout, and some entries (scores, DICOM catalogue, prelabels) hold those of
the images. So all images have the time `MTIME_NS`, which a reader sets again. ``facts.json`` says what the servers
answered.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import requests

ROOT = Path("/data/former")
TARGET = Path(__file__).resolve().parent / "former_0_1_0"
MTIME_NS = 1_767_225_600_000_000_000
"""2026-01-01, of every image, sidecar and text.csv."""

PASSWORD = "correct horse battery"
TOKEN = "a-token-for-somebody-who-reads"
SHAPE = (32, 24, 6)
AFFINE = np.array([[-5.5, 0, 0, 88], [0, 6.5, 0, -78], [0, 0, 5.0, 0], [0, 0, 0, 1.0]])
BOXES = {
    "ct_one": ((4, 14, 5, 16, 1, 5), (18, 25, 7, 13, 2, 6)),
    "mr_one": ((5, 15, 5, 17, 1, 6), (19, 25, 7, 14, 1, 5)),
    "mr_two": ((4, 13, 6, 17, 1, 5), (18, 24, 8, 14, 2, 6)),
}
"""Half-open boxes of liver and left kidney in file order."""

STRUCTURES = [{"name": "liver", "idx": 1}, {"name": "left kidney", "idx": 2}]
ADAPT = {"steps": 30, "validate_every": 10, "batch_size": 4, "learning_rate": 1e-2, "rank": 2}
LONG = {"steps": 5000, "validate_every": 5, "patience": 1000, "batch_size": 2, "learning_rate": 1e-4, "rank": 1}
HEAD = {"steps": 40, "batch_size": 4, "crop": 32, "learning_rate": 5e-3, "views": 1}
SMALL_HEAD = (
    "head.width=8",
    "head.base=8",
    "head.heads=2",
    "crop=32",
    "batch_size=4",
    "views=1",
    "schedule.steps=40",
    "schedule.warmup=5",
)
PICTURES = {"tissue_a.png": "left", "tissue_b.png": "right", "tissue_c.png": "left"}
LEFT_OUT = (".lock", "lock", ".server.lock", "features", "tensorboard")


class Site:
    """A running server and somebody who is logged in."""

    def __init__(self, server: Any, headers: dict[str, str]) -> None:
        self.server, self.headers = server, headers

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        """The answer's JSON; an error ends the script."""
        answer = requests.request(
            method,
            self.server.url + path,
            timeout=600,
            headers={**self.headers, **arguments.pop("headers", {})},
            **arguments,
        )
        if not answer.ok:
            raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text[:2000]}")
        return (
            answer.json() if answer.headers.get("Content-Type", "").startswith("application/json") else answer.content
        )

    def infer(self, image: str, model: str = "progidiff", **params: Any) -> dict[str, Any]:
        """What a request is told beside the mask."""
        return dict(
            self.ask("POST", f"/infer/{model}?image={image}&output=json", files={"params": (None, json.dumps(params))})
        )

    def save(self, image: str, file: Path, **params: Any) -> dict[str, Any]:
        """Save a label of tag final."""
        with file.open("rb") as label:
            files = {"label": (file.name, label), "params": (None, json.dumps(params))}
            return dict(self.ask("PUT", f"/datastore/label?image={image}&tag=final", files=files))

    def wait(self, until: Callable[[dict[str, Any]], bool], path: str = "/progidiff/training") -> dict[str, Any]:
        """What an address says once something is true of it."""
        while not until(told := self.ask("GET", path)):
            time.sleep(0.2)
        return dict(told)

    def train(self, trainer: str, params: dict[str, Any]) -> dict[str, Any]:
        """A training from its start to its end."""
        self.ask("POST", f"/train/{trainer}", json=params)
        ended = self.wait(lambda told: not told["running"])
        if ended["state"] != "done":
            raise SystemExit(f"{trainer}: {ended['state']}, {ended['reason']}")
        return ended


def main() -> None:
    """Make everything anew in `ROOT`, then copy it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  (one thread, no hub)
    import progidiff

    if progidiff.__version__ != "0.1.0":
        raise SystemExit(f"This is version {progidiff.__version__}; the folder is to be made by 0.1.0.")
    if ROOT.exists():
        raise SystemExit(f"'{ROOT}' is there already. Remove it first.")
    ROOT.mkdir(parents=True)
    write_models()
    write_accounts()
    write_images()
    facts: dict[str, Any] = {
        "version": progidiff.__version__,
        "mtime_ns": MTIME_NS,
        "password": PASSWORD,
        "token": TOKEN,
    }
    facts |= {"volumes": use_volumes(), "prelabel": prelabel(), "pictures": use_pictures()}
    shutil.rmtree(TARGET, ignore_errors=True)
    for name in ("model", "textdiff", "studies", "pictures", "users.json", "tokens"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, TARGET / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy(source, TARGET / name)
    (TARGET / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def write_models() -> None:
    """Smaller than what other tests use, because these are kept: 8 channels, and the conditioning in 16 bits."""
    from dataclasses import replace

    from progidiff import testing

    save = testing.save_conditioning
    testing.save_conditioning = lambda *given, half: save(*given, half=True)
    testing.TOY_WIDTHS = replace(testing.TOY_WIDTHS, denoiser_channels=(8, 8))
    testing.build_tiny_model(ROOT / "model")
    testing.build_tiny_denoiser(ROOT / "textdiff" / "denoiser", channels=(8, 8, 8, 8))


def write_accounts() -> None:
    """Two users, and the token of a third."""
    from progidiff.users import Role, UsersFile

    users = UsersFile(ROOT / "users.json")
    users.put("anna", Role.ANNOTATE, PASSWORD)
    users.put("adam", Role.ADMINISTER, PASSWORD)
    (ROOT / "tokens").touch(mode=0o600)
    (ROOT / "tokens").write_text(f"reader:read:{TOKEN}\n", encoding="utf-8")


def write_images() -> None:
    """Volumes with bright boxes, their labels (outside of the datastore), and pictures of blots with sentences."""
    from PIL import Image
    from tissue import SENTENCES, draw_tissue

    (ROOT / "studies").mkdir()
    (ROOT / "pictures").mkdir()
    (ROOT / "drawn").mkdir()
    for name, boxes in BOXES.items():
        image = np.full(SHAPE, -1000, np.int16)
        image[3:29, 3:21] = 20
        label = np.zeros(SHAPE, np.uint8)
        for value, (i0, i1, j0, j1, k0, k1) in enumerate(boxes, start=1):
            image[i0:i1, j0:j1, k0:k1] = 120 + 30 * value
            label[i0:i1, j0:j1, k0:k1] = value
        write_nifti(ROOT / "studies" / f"{name}.nii.gz", image)
        write_nifti(ROOT / "drawn" / f"{name}.nii.gz", label)
        (ROOT / "studies" / f"{name}.json").write_text(json.dumps({"modality": name[:2].upper()}), encoding="utf-8")
    table = {"1": "liver", "2": "left kidney"}
    (ROOT / "studies" / "labels.json").write_text(json.dumps(table), encoding="utf-8")
    lines = ["image,text"]
    for seed, (name, side) in enumerate(PICTURES.items()):
        picture, mask = draw_tissue(seed, side, (48, 40), count=6)
        Image.fromarray(picture).save(ROOT / "pictures" / name)
        Image.fromarray(mask).save(ROOT / "drawn" / name)
        lines.append(f"{name},{SENTENCES[side]}")
    (ROOT / "pictures" / "text.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for folder in ("studies", "pictures"):
        for path in (ROOT / folder).iterdir():
            os.utime(path, ns=(MTIME_NS, MTIME_NS))


def write_nifti(path: Path, array: np.ndarray) -> None:
    """Through gzip without a time, so that the bytes are the same every time."""
    import nibabel

    path.write_bytes(gzip.compress(nibabel.Nifti1Image(array, AFFINE).to_bytes(), mtime=0))


def use_volumes() -> dict[str, Any]:
    """What people do with volumes, in this order."""
    from conftest import copy_app, run_server

    work = ROOT / "volumes-server"
    work.mkdir()
    conf = [
        "model_dir",
        str(ROOT / "model"),
        "device",
        "cpu",
        "users_file",
        str(ROOT / "users.json"),
        "token_file",
        str(ROOT / "tokens"),
    ]
    conf += ["score_pool", "on", "score_prompt", "liver", "training_nice", "0", "reserve_minutes", "1440"]
    drawn = ROOT / "drawn"
    facts: dict[str, Any] = {}
    with run_server(ROOT / "studies", copy_app(work), work / "server.log", *conf) as server:
        anna, adam = (Site(server, log_in(server.url, name)) for name in ("anna", "adam"))
        # Proposals: asked for, found as a part of a longer prompt, with other settings, by the background scoring.
        ask = {"num_proposals": 2, "steps": 1, "seed": 7}
        anna.wait(lambda told: told["scored"] == len(BOXES), "/progidiff/scoring")
        facts["asked"] = [
            describe(anna, "ct_one", prompt="liver and left kidney", save_original=True, **ask),
            describe(anna, "ct_one", prompt="left kidney", **ask),
            describe(anna, "mr_one", prompt="hepatic parenchyma", clean_up="off", guidance_scale=2, **ask),
            describe(
                anna, "mr_two", prompt="liver"
            ),  # with the server's defaults: what the background scoring has kept
        ]
        anna.infer("ct_one", "progidiff_slice", label="liver", foreground=[[8, 10, 3]], slice=3, **ask)
        key = facts["asked"][0]["proposals"]
        # The history: slices from a proposal, other slices, an undo, whole volumes, a skip, a delete and a restore.
        saved = {"label_info": STRUCTURES, "client_id": "review"}
        anna.save(
            "ct_one", drawn / "ct_one.nii.gz", slices=[2, 3], proposals=key, shown="consensus", seconds=12.5, **saved
        )
        anna.save(
            "ct_one", drawn / "ct_one.nii.gz", slices=[4], structures=["liver"], proposals=key, shown="2", **saved
        )
        anna.save("ct_one", drawn / "mr_one.nii.gz", slices=[5], **saved)
        anna.ask("POST", "/progidiff/annotations/ct_one/undo")
        anna.save("mr_one", drawn / "mr_one.nii.gz", **saved)
        adam.save("mr_two", drawn / "mr_one.nii.gz", **saved)
        anna.ask("POST", "/progidiff/annotations/ct_one/skip?reason=blurred")
        adam.ask("DELETE", "/datastore/label?id=mr_two&tag=final")
        anna.save("mr_two", drawn / "mr_two.nii.gz", **saved)
        adam.ask("POST", "/progidiff/annotations/mr_two/6/restore")
        adam.save("mr_two", drawn / "mr_two.nii.gz", edited=True, **saved)
        # The loop: the next sample is reserved, two versions are trained, a third training is stopped and may go on.
        facts["next"] = anna.ask("POST", "/activelearning/random", json={"client_id": "anna at home"})["id"]
        for seed in (0, 1):
            adam.train("progidiff_adapt", {**ADAPT, "seed": seed})
        adam.ask("POST", "/train/progidiff_adapt", json={**LONG, "cases": "mr_two"})
        adam.wait(lambda told: told["step"] >= 12 and told["stage"] == "evidence")
        adam.ask("DELETE", "/train/")
        adam.wait(lambda told: not told["running"])
        for version in (1, 2):
            adam.ask("POST", f"/progidiff/versions/mr/{version}/use")
        anna.wait(lambda told: told["scored"] == len(BOXES), "/progidiff/scoring")
        facts["asked"].append(describe(anna, "mr_one", prompt="liver", num_proposals=3, steps=1))
        # DICOM: the catalogue of all, the slices of one.
        anna.ask("GET", "/proxy/dicom/qido/studies")
        facts["dicom"] = anna.ask("GET", "/progidiff/ohif/images/ct_one")
        address = f"/proxy/dicom/wado/studies/{facts['dicom']['study']}/series/{facts['dicom']['series']}/metadata"
        anna.ask("GET", address, headers={"Accept": "application/dicom+json"})
        # An image that came and went lies in the trash.
        with (ROOT / "studies" / "ct_one.nii.gz").open("rb") as file:
            anna.ask("PUT", "/datastore/image?image=gone", files={"file": ("gone.nii.gz", file)})
        adam.ask("DELETE", "/datastore/image?id=gone")
        # Sessions: one that goes on, one that was ended by a logout.
        facts["session"] = log_in(server.url, "anna")["Authorization"].partition(" ")[2]
        ended = log_in(server.url, "adam")["Authorization"].partition(" ")[2]
        requests.post(
            f"{server.url}/progidiff/logout", cookies={"progidiff_session": ended}, timeout=30, allow_redirects=False
        )
        facts["ended_session"], facts["session_time"] = ended, time.time()
        facts |= gather(adam, [*BOXES])
        facts["audit"] = adam.ask("GET", "/progidiff/annotations/export?format=jsonl").decode().splitlines()
    return facts


def describe(site: Site, image: str, model: str = "progidiff", **params: Any) -> dict[str, Any]:
    """A request, and what it was told that must not change."""
    told = site.infer(image, model, **params)
    kept = (
        "proposals",
        "structures",
        "model_version",
        "model",
        "adapter",
        "seed",
        "label_names",
        "shown_ml",
        "shown_pixels",
        "sentence",
    )
    return {"image": image, "params": params, **{name: told[name] for name in kept if name in told}}


def gather(site: Site, images: list[str]) -> dict[str, Any]:
    """What the server says about its state at the end."""
    drop = ("log", "eta_seconds")
    return {
        "annotations": site.ask("GET", "/progidiff/annotations"),
        "runs": [
            {k: v for k, v in run.items() if k not in drop} for run in site.ask("GET", "/progidiff/training")["history"]
        ],
        "versions": site.ask("GET", "/progidiff/versions"),
        "scoring": site.ask("GET", "/progidiff/scoring"),
        "queue": site.ask("GET", "/progidiff/queue"),
        "kept": {image: site.ask("GET", f"/progidiff/proposals/{image}")["kept"] for image in images},
        "datastore": site.ask("GET", "/datastore/?output=all")["objects"],
    }


def prelabel() -> dict[str, Any]:
    """Labels made ahead of time, by the command; its report."""
    command = [
        "prelabel",
        "--studies",
        str(ROOT / "studies"),
        "--model",
        str(ROOT / "model"),
        "--prompt",
        "left kidney",
    ]
    run(*command, "--out-tag", "first", "--num-proposals", "2", "--steps", "1", "--device", "cpu")
    return dict(json.loads((ROOT / "studies" / ".progidiff" / "prelabel.json").read_text(encoding="utf-8")))


def train_first_head() -> None:
    """nuclei@1, of toy width: a first head has a million parameters, and what is trained further keeps its shape."""
    options = [text for setting in SMALL_HEAD for text in ("--set", setting)]
    options += [
        "--images",
        str(ROOT / "pictures"),
        "--labels",
        str(ROOT / "drawn"),
        "--hold-out",
        "tissue_c",
        "--name",
        "nuclei",
    ]
    options += ["--classes", "nuclei", "--denoiser", str(ROOT / "textdiff" / "denoiser"), "--device", "cpu"]
    run("textdiff", "train", *options, "--out", str(ROOT / "head"), "--work", str(ROOT / "head-work"))
    run("textdiff", "versions", "add", str(ROOT / "head"), "--store", str(ROOT / "textdiff"))


def run(*command: str) -> None:
    """A command of the command line."""
    subprocess.run([sys.executable, "-m", "progidiff.cli", *command], check=True, cwd=ROOT)


def use_pictures() -> dict[str, Any]:
    """What people do with pictures, in this order."""
    from conftest import copy_app, run_server

    train_first_head()
    work = ROOT / "pictures-server"
    work.mkdir()
    conf = ["model_dir", str(ROOT / "model"), "device", "cpu", "textdiff", str(ROOT / "textdiff")]
    conf += ["score_pool", "on", "score_prompt", "liver", "training_nice", "0"]
    facts: dict[str, Any] = {}
    with run_server(ROOT / "pictures", copy_app(work), work / "server.log", *conf) as server:
        site = Site(server, {})
        info = {"label_info": [{"name": "nuclei", "idx": 1}]}
        site.save("tissue_a", ROOT / "drawn" / "tissue_a.png", **info)
        site.save("tissue_b", ROOT / "drawn" / "tissue_a.png", **info)
        site.ask("POST", "/progidiff/annotations/tissue_b/undo")
        site.save("tissue_b", ROOT / "drawn" / "tissue_b.png", **info)
        site.train("textdiff", HEAD)
        site.ask("POST", "/progidiff/versions/nuclei/2/use")
        facts["asked"] = [
            describe(site, "tissue_c", "textdiff", num_proposals=2, save_original=True),
            describe(
                site, "tissue_a", "textdiff", sentence="The nuclei density in the right is high.", version="nuclei@1"
            ),
        ]
        site.wait(lambda told: told["scored"] == len(PICTURES), "/progidiff/scoring")
        facts |= gather(site, [Path(name).stem for name in PICTURES])
    return facts


def log_in(url: str, name: str) -> dict[str, str]:
    """The header of a new session."""
    answer = requests.post(
        f"{url}/auth/token", data={"username": name, "password": PASSWORD, "grant_type": "password"}, timeout=60
    )
    answer.raise_for_status()
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


if __name__ == "__main__":
    main()
