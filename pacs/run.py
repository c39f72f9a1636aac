#!/usr/bin/env python3
"""Start Orthanc on this computer only, as a PACS to try things with, and fill it with the sample images as DICOM
series.

Debian: apt-get install orthanc orthanc-dicomweb. Orthanc listens on 127.0.0.1, takes no DICOM connections, runs no
scripts, and keeps everything in one folder, which can be deleted. It has no password: everybody who is logged in on
this computer can read it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

from progidiff.dicomweb.catalogue import describe_file
from progidiff.dicomweb.export import export_series
from progidiff.dicomweb.frames import Series
from progidiff.errors import ImageError, ProGiDiffError
from progidiff.images.formats import find_kind, strip_suffix
from progidiff.images.reading import load_volume

HERE = Path(__file__).resolve().parent
PLUGIN_FOLDERS = ("/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins")
START_S = 60


def find_lack() -> str:
    """Why no Orthanc can be started here; "" if it can."""
    if shutil.which("Orthanc") is None:
        return "There is no Orthanc: apt-get install orthanc orthanc-dicomweb."
    if find_plugin() is None:
        return (
            "Orthanc has no DICOMweb plugin (libOrthancDicomWeb.so in "
            f"{' or '.join(PLUGIN_FOLDERS)}): apt-get install orthanc-dicomweb."
        )
    return ""


def find_plugin() -> Path | None:
    """The DICOMweb plugin."""
    files = (Path(folder) / "libOrthancDicomWeb.so" for folder in PLUGIN_FOLDERS)
    return next((file for file in files if file.exists()), None)


def write_config(storage: Path, port: int) -> Path:
    """The settings of orthanc.json with what depends on this computer."""
    storage.mkdir(parents=True, exist_ok=True)
    config = json.loads((HERE / "orthanc.json").read_text(encoding="utf-8"))
    config |= {
        "HttpPort": port,
        "StorageDirectory": str(storage),
        "IndexDirectory": str(storage),
        "Plugins": [str(find_plugin())],
    }
    path = storage / "orthanc.json"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def upload(url: str, images: list[Path]) -> None:
    """Send images as DICOM series, those that are not there yet; the UIDs say which."""
    known = {
        uid["MainDicomTags"]["SeriesInstanceUID"] for uid in requests.get(f"{url}/series?expand", timeout=60).json()
    }
    for image in images:
        try:
            entry = describe_file(strip_suffix(image), image)
            if entry.refused:
                raise ImageError(entry.refused)
            if entry.identity.series_uid in known:
                continue
            with tempfile.TemporaryDirectory() as folder:
                files = export_series(
                    Series.of(entry.identity, load_volume(image, entry.identity.modality)), Path(folder) / "series"
                )
                for file in files:
                    requests.post(f"{url}/instances", data=file.read_bytes(), timeout=60).raise_for_status()
            print(f"{entry.identity.image}: {entry.identity.modality}, {len(files)} slices", flush=True)
        except ProGiDiffError as err:
            print(f"{image.name} is left out: {err}", flush=True)


def main() -> int:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8042)
    parser.add_argument(
        "--storage", type=Path, default=HERE.parent / "cache" / "orthanc", help="where Orthanc keeps its files"
    )
    parser.add_argument(
        "--images", type=Path, default=HERE.parent / "sample_datastore", help="folder of NIfTI images to put in"
    )
    given = parser.parse_args()
    lack = find_lack()
    if lack:
        print(lack, file=sys.stderr)
        return 2
    url = f"http://127.0.0.1:{given.port}"
    if _answers(url):
        print(f"Something answers at {url} already. Stop it, or choose another --port.", file=sys.stderr)
        return 1
    command = ["Orthanc", str(write_config(given.storage.resolve(), given.port))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return serve(process, url, sorted(path for path in given.images.glob("*") if find_kind(path) == "volume"))


def serve(process: subprocess.Popen[bytes], url: str, images: list[Path]) -> int:
    """Wait for Orthanc, fill it, and stay until it ends or is told to."""
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                print(f"Orthanc did not start. To see why: {shlex.join(map(str, process.args))}", file=sys.stderr)  # type: ignore[arg-type]
                return 1
            time.sleep(0.2)
        upload(url, images)
        print(
            f"Orthanc is at {url}. In another terminal: make serve STUDIES={url}/dicom-web (stop with Ctrl-C)",
            flush=True,
        )
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
    return 0


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/system", timeout=2).status_code == 200
    except requests.RequestException:
        return False


if __name__ == "__main__":
    sys.exit(main())
