"""A real Orthanc."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.servers import ROOT, free_port

sys.path.insert(0, str(ROOT / "pacs"))
from run import find_lack

__all__ = ["find_lack", "run_orthanc"]


@contextlib.contextmanager
def run_orthanc(folder: Path, images: Path) -> Iterator[str]:
    """`pacs/run.py` in a process of its own; gives the address of its DICOMweb."""
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "pacs" / "run.py"),
        "--port",
        str(port),
        "--storage",
        str(folder / "orthanc"),
        "--images",
        str(images),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    try:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("Orthanc is at"):
                break
        else:
            raise AssertionError("".join(lines))
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait(20)
