#!/usr/bin/env python3
"""Fill this folder with real CT and MR volumes, in MONAI Label's local layout.

The volumes come from the source distribution of TotalSegmentator 2.18.0 on PyPI (Apache-2.0, about 38 MB). The archive
and every file taken from it must have the SHA-256 written below, or nothing of it is kept. pip's own settings are
honoured: index-url, extra-index-url, cert and proxy, from its configuration files or from PIP_INDEX_URL and its like.

Running it again does nothing when all volumes are in place. Labels are never touched. If no index can be reached, a
small generated phantom CT takes their place, so that a server still starts, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import shlex
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path

PACKAGE = "totalsegmentator"
VERSION = "2.18.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03"
DEFAULT_INDEX = "https://pypi.org/simple"
PHANTOM = "sample_phantom_ct"
TIMEOUT_S = 30


@dataclass(frozen=True)
class Sample:
    """One volume of the archive.

    Attributes:
        name: Image id in the datastore.
        member: Path inside the archive: a NIfTI file, or a folder with one DICOM series.
        sha256: Of the file; for a folder, of its files' contents one after the other, by name.
        modality: Goes into the sidecar `<name>.json`.
        shows: One line for people.
    """

    name: str
    member: str
    sha256: str
    modality: str
    shows: str


REFERENCE = "tests/reference_files"
SAMPLES = (
    Sample(
        "sample_ct_abdomen",
        f"{REFERENCE}/example_ct.nii.gz",
        "dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1",
        "CT",
        "abdomen and pelvis without contrast, 3 mm",
    ),
    Sample(
        "sample_ct_aorta",
        f"{REFERENCE}/aorta_report/example_ct.nii.gz",
        "372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12",
        "CT",
        "chest and upper abdomen, arterial phase, 1.5 mm",
    ),
    Sample(
        "sample_mr",
        f"{REFERENCE}/example_mr_sm.nii.gz",
        "209b46efaff595dd54a9332872e17a722b62654bbb68dbd89acd5090701bbd4f",
        "MR",
        "20 slices of the upper abdomen, fat bright and organs dark, 3 mm",
    ),
    Sample(
        "sample_ct_dicom",
        f"{REFERENCE}/example_ct_dicom",
        "8029e094aa3e24ca7c39b5acf697af594b8f56a959a35241c32e5b225bc9277a",
        "CT",
        "20 slices of the upper abdomen with contrast, 2 mm, converted from a JPEG 2000 DICOM series",
    ),
)


class UnavailableError(Exception):
    """The archive cannot be had, or is not the one that was checked."""


def main(arguments: list[str] | None = None) -> int:
    """Fill the folder; see the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="where the images go (default: the script's own folder)",
    )
    parser.add_argument(
        "--index-url", help="simple index to use instead of pip's configured ones, for example https://pypi.org/simple"
    )
    parser.add_argument(
        "--offline", action="store_true", help="do not look for an index; make the phantom if there are no images"
    )
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    missing = [sample for sample in SAMPLES if not is_in_place(folder, sample)]
    if not missing:
        print(f"All {len(SAMPLES)} sample volumes are in {folder}.")
        return 0
    try:
        if options.offline:
            raise UnavailableError("--offline was given")
        archive = fetch_archive([options.index_url] if options.index_url else None)
        for sample in missing:
            write_sample(archive, sample, folder)
            print(f"Wrote {sample.name}.nii.gz: {sample.modality}, {sample.shows}.")
    except UnavailableError as err:
        write_phantom_instead(folder, str(err))
        return 0
    remove_phantom(folder)
    print(f"The sample volumes in {folder} come from {ARCHIVE} (Apache-2.0).")
    return 0


def is_in_place(folder: Path, sample: Sample) -> bool:
    """Whether image and sidecar are there and the image is the one the sidecar was written for."""
    image, sidecar = folder / f"{sample.name}.nii.gz", folder / f"{sample.name}.json"
    try:
        stated = json.loads(sidecar.read_text(encoding="utf-8"))
        return bool(
            stated["source_sha256"] == sample.sha256
            and stated["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch_archive(indexes: list[str] | None = None) -> bytes:
    """The source distribution, from the first index that has it.

    Args:
        indexes: Simple indexes to ask; pip's configured ones if None.

    Raises:
        UnavailableError: with one reason per index.
    """
    settings = read_pip_settings()
    if indexes is None:
        indexes = [*settings.get("index-url", DEFAULT_INDEX).split(), *settings.get("extra-index-url", "").split()]
    opener = make_opener(settings)
    reasons = []
    for index in indexes:
        shown = without_credentials(index)
        try:
            address = find_archive(opener, index)
            print(f"Downloading {ARCHIVE} (38 MB) from {urllib.parse.urlsplit(address).hostname or address}")
            with opener.open(make_request(address, index), timeout=TIMEOUT_S) as answer:
                archive: bytes = answer.read()
        except (OSError, ValueError, HTTPException) as err:
            reasons.append(f"{shown}: {getattr(err, 'reason', None) or err or type(err).__name__}")
            continue
        found = hashlib.sha256(archive).hexdigest()
        if found == ARCHIVE_SHA256:
            return archive
        reasons.append(f"{shown}: {ARCHIVE} has the SHA-256 {found} instead of {ARCHIVE_SHA256}, so it was thrown away")
    raise UnavailableError("; ".join(reasons))


def read_pip_settings() -> dict[str, str]:
    """pip's index-url, extra-index-url, cert and proxy; the environment wins over files, as in pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        listing = ""
    settings: dict[str, str] = {}
    for scope in ("global", "download", ":env:"):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(f"{scope}.") and value:
                settings[key[len(scope) + 1 :]] = " ".join(" ".join(shlex.split(value)).replace("\\n", " ").split())
    for key in ("index-url", "extra-index-url", "cert", "proxy"):
        value = os.environ.get("PIP_" + key.upper().replace("-", "_"))
        if value:
            settings[key] = value
    return settings


def make_opener(settings: dict[str, str]) -> urllib.request.OpenerDirector:
    """urllib with pip's certificates and proxy."""
    context = ssl.create_default_context(cafile=settings["cert"] if Path(settings.get("cert", "")).is_file() else None)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if "proxy" in settings:
        handlers.append(urllib.request.ProxyHandler({"http": settings["proxy"], "https": settings["proxy"]}))
    return urllib.request.build_opener(*handlers)


def make_request(address: str, index: str) -> urllib.request.Request:
    """A request; the user name and password of the index's address are sent to its own host only."""
    parts, home = urllib.parse.urlsplit(address), urllib.parse.urlsplit(index)
    request = urllib.request.Request(
        without_credentials(address),
        headers={"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5, */*;q=0.1"},
    )
    if home.username and parts.hostname == home.hostname:
        secret = f"{urllib.parse.unquote(home.username)}:{urllib.parse.unquote(home.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(secret.encode()).decode())
    return request


def without_credentials(address: str) -> str:
    """The address as it may be shown and requested."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class LinkParser(HTMLParser):
    """Collects the targets of all links of a simple index page (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.extend(value for key, value in attrs if key == "href" and value)


def find_archive(opener: urllib.request.OpenerDirector, index: str) -> str:
    """The archive's address on a simple index, JSON (PEP 691) or HTML (PEP 503).

    Raises:
        OSError, ValueError: if the index cannot be read or does not list it.
    """
    page = f"{index.rstrip('/')}/{PACKAGE}/"
    if urllib.parse.urlsplit(page).scheme == "file":
        page += "index.html"
    with opener.open(make_request(page, index), timeout=TIMEOUT_S) as answer:
        content = answer.read().decode("utf-8", "replace")
        base = answer.geturl()
        is_json = "json" in (answer.headers.get("Content-Type") or "")
    links: Iterable[str]
    if is_json:
        links = [str(file["url"]) for file in json.loads(content)["files"]]
    else:
        parser = LinkParser()
        parser.feed(content)
        links = parser.links
    for link in links:
        address = urllib.parse.urldefrag(urllib.parse.urljoin(base, link)).url
        if urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2].lower() == ARCHIVE:
            return address
    raise ValueError(f"{ARCHIVE} is not listed")


def write_sample(archive: bytes, sample: Sample, folder: Path) -> None:
    """Take one volume out of the archive, check it, and put it into the folder: the sidecar first, then the image.

    Raises:
        UnavailableError: if it is not there or not the one that was checked.
    """
    files = read_members(archive, sample.member)
    found = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    if not files or found != sample.sha256:
        raise UnavailableError(f"{sample.member} in {ARCHIVE} has the SHA-256 {found} instead of {sample.sha256}")
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as temporary:
        image = Path(temporary) / f"{sample.name}.nii.gz"
        if sample.member.endswith(".nii.gz"):
            image.write_bytes(files[sample.member.rpartition("/")[2]])
        else:
            convert_series(files, Path(temporary) / "series", image)
        publish(
            image,
            sample.modality,
            folder,
            {"source": f"{ARCHIVE}: {sample.member}", "source_sha256": sample.sha256, "shows": sample.shows},
        )


def read_members(archive: bytes, member: str) -> dict[str, bytes]:
    """File name -> content of one file, or of all files directly in a folder, of the archive."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for entry in tar:
            inner = entry.name.partition("/")[2]
            if entry.isfile() and (inner == member or inner.rpartition("/")[0] == member):
                content = tar.extractfile(entry)
                files[inner.rpartition("/")[2]] = content.read() if content else b""
    return files


def convert_series(files: dict[str, bytes], series: Path, image: Path) -> None:
    """One DICOM series -> NIfTI, rescaled to HU."""
    find_package()
    from progidiff.images.reading import load_volume
    from progidiff.images.writing import save_array

    series.mkdir()
    for name, content in files.items():
        (series / name).write_bytes(content)
    loaded = load_volume(series)
    save_array(loaded.array, loaded.affine, image)


def publish(image: Path, modality: str, folder: Path, info: dict[str, str]) -> None:
    """Move a finished image from its temporary folder into the datastore, after its sidecar."""
    sidecar = image.with_name(image.name.removesuffix(".nii.gz") + ".json")
    content = {"modality": modality, **info, "sha256": hashlib.sha256(image.read_bytes()).hexdigest()}
    sidecar.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(sidecar, folder / sidecar.name)
    os.replace(image, folder / image.name)


def write_phantom_instead(folder: Path, reason: str) -> None:
    """Say why there are no (or not all) real volumes, and make the phantom unless another image is there."""
    print(f"The real sample volumes could not be fetched ({reason}).")
    images = sorted(path.name for pattern in ("*.nii.gz", "*.nii") for path in folder.glob(pattern))
    if images:
        print(f"{folder} holds {', '.join(images)}; the server can start with that.")
    else:
        write_phantom(folder)
        print(
            f"Wrote {PHANTOM}.nii.gz instead: a generated drawing of an abdomen, no patient and no measure of quality."
        )
    print(
        "With a network, or PIP_INDEX_URL set to an index that can be reached, run "
        "`python sample_datastore/prepare.py` again."
    )


def write_phantom(folder: Path) -> None:
    """A small abdomen of ellipsoids in HU with noise: 128 x 96 x 44 voxels of 3 x 3 x 5 mm, LPS order, the same every
    time.
    """
    find_package()
    import numpy as np

    from progidiff.images.writing import save_array

    shape, edges = (128, 96, 44), (3.0, 3.0, 5.0)
    x, y, z = (np.float32((np.arange(size) - (size - 1) / 2) * edge) for size, edge in zip(shape, edges, strict=True))
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]  # mm to Left, Posterior, Superior of the middle

    def ellipsoid(center: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        return ((x - center[0]) / radii[0]) ** 2 + ((y - center[1]) / radii[1]) ** 2 + (
            (z - center[2]) / radii[2]
        ) ** 2 <= 1

    endless = 1e6
    hu = np.full(shape, -1000.0, np.float32)
    for center, radii, value in (
        ((0, 0, 0), (165, 115, endless), -100),  # skin and fat
        ((0, 0, 0), (148, 98, endless), 55),  # muscle
        ((0, -8, 0), (134, 84, endless), -95),  # fat between the organs
        ((0, 62, 0), (24, 24, endless), 180),  # vertebrae
        ((0, 92, 0), (9, 20, endless), 250),  # spinous processes
        ((-60, -8, 30), (76, 68, 72), 105),  # liver
        ((92, 30, 38), (28, 40, 50), 115),  # spleen
        ((52, -22, 38), (44, 34, 46), 40),  # stomach
        ((52, -40, 38), (26, 12, 30), -900),  # gas in the stomach
        ((-50, 44, -34), (27, 24, 52), 165),  # right kidney
        ((56, 42, -20), (27, 24, 54), 165),  # left kidney
        ((16, 32, 0), (11, 11, endless), 150),  # aorta
        ((-20, 30, 0), (12, 10, endless), 130),  # inferior vena cava
        ((4, 4, 6), (56, 11, 13), 95),  # pancreas
        ((-46, -42, -8), (17, 15, 26), 12),  # gallbladder
    ):
        hu[ellipsoid(center, radii)] = value
    hu += np.random.default_rng(0).normal(0, 12, shape).astype(np.float32)
    affine = np.diag([-edges[0], -edges[1], edges[2], 1.0])
    affine[:3, 3] = [edges[0] * (shape[0] - 1) / 2, edges[1] * (shape[1] - 1) / 2, -edges[2] * (shape[2] - 1) / 2]
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as temporary:
        image = Path(temporary) / f"{PHANTOM}.nii.gz"
        save_array(np.rint(hu).astype(np.int16), affine, image)
        publish(image, "CT", folder, {"source": "generated", "shows": "a drawing of an abdomen, no patient"})


def remove_phantom(folder: Path) -> None:
    """Take the phantom away once real volumes are there, unless somebody has labelled it."""
    image = folder / f"{PHANTOM}.nii.gz"
    if image.exists() and not any(folder.glob(f"labels/*/{PHANTOM}.*")):
        image.unlink()
        (folder / f"{PHANTOM}.json").unlink(missing_ok=True)
        print(f"Removed {image.name}, which is no longer needed.")


def find_package() -> None:
    """Make progidiff importable, installed or from this checkout."""
    try:
        import progidiff.images
    except ImportError:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
        try:
            import progidiff.images  # noqa: F401
        except ImportError as err:
            raise SystemExit(f"{err}. Run `make setup`, then `.venv/bin/python sample_datastore/prepare.py`.") from err


if __name__ == "__main__":
    sys.exit(main())
