"""Bad requests to every address of one real server: each is refused with a reason and a cure, and nothing on disk
changes.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from progidiff.server.gate.endpoints import build_table
from progidiff.server.routes.table import build_endpoints
from support.images import make_affine, make_image, write_dicom
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server

SHAPE = (32, 28, 5)
LARGEST_UPLOAD = 4_000_000
"""Bytes, `--conf max_upload_gb 0.004`."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bad-input")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / "plain.nii.gz", shape=SHAPE)
    write_phantom(studies / "other.nii.gz", shape=(24, 24, 4), seed=1)
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    Image.fromarray(np.arange(16 * 12, dtype=np.uint8).reshape(12, 16)).save(studies / "photo.png")
    (studies / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing follows")
    (studies / "text.csv").write_text("image,text\nphoto.png,Dense on the left.\n", encoding="utf-8")
    conf = (
        "model_dir",
        str(tiny_model),
        "device",
        "cpu",
        "max_upload_gb",
        str(LARGEST_UPLOAD / 1e9),
        "adapters",
        str(folder / "adapters"),
    )
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as running:
        files = {"label": ("label.nii.gz", GOOD_LABEL)}
        saved = requests.put(
            f"{running.url}/datastore/label", params={"image": "plain", "tag": "final"}, files=files, timeout=60
        )
        assert saved.status_code == 200, saved.text
        wait_until_settled(running)
        yield running


def wait_until_settled(server: Server) -> None:
    """Until the host's list, which is written when nothing has happened for some seconds, tells of the label that was
    saved, and nothing is being written any more: whatever changes after that, a request has changed.
    """
    deadline = time.monotonic() + 60
    listed: dict[str, Any] = {}
    before: dict[str, str] = {}
    while time.monotonic() < deadline:
        time.sleep(0.3)
        objects = json.loads((server.studies / "datastore_v2.json").read_text())["objects"]
        listed = objects.get("plain", {}).get("labels", {})
        now = digest(server)
        if "final" in listed and now == before:
            return
        before = now
    raise AssertionError(f"the list of the host was not written within a minute: {listed}")


def nifti(labels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    if affine is None:
        affine = np.array([[-5.5, 0, 0, 170], [0, 6.5, 0, -160], [0, 0, 5.0, 300], [0, 0, 0, 1.0]])
    return gzip.compress(nibabel.Nifti1Image(labels, affine).to_bytes())


def a_zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"import os")
    return file.getvalue()


def a_tar_with_a_link() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(entry)
    return file.getvalue()


def a_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.nii", bytes(20_000_000))
    return file.getvalue()


def elsewhere(name: str, suffix: str, shape: tuple[int, ...] = (32, 28, 5)) -> tuple[str, bytes]:
    """A file name, and a header of the grid of the image 'plain' whose voxels are another file."""
    sizes = " ".join(map(str, shape))
    if suffix == ".nrrd":
        text = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {sizes}\nspace: RAS\nencoding: raw\nspace directions: "
        text += f"(-5.5,0,0) (0,6.5,0) (0,0,5)\nspace origin: (170,-160,300)\ndata file: {name}\n\n"
    else:
        text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 5.5 6.5 5\nOffset = -170 160 300\n"
        text += f"TransformMatrix = 1 0 0 0 -1 0 0 0 1\nDimSize = {sizes}\nElementType = MET_UCHAR\n"
        text += f"ElementDataFile = {name}\n"
    return f"x{suffix}", text.encode()


GOOD_LABEL = nifti(np.ones(SHAPE, np.uint8))
GOOD_IMAGE = nifti(np.zeros((8, 8, 3), np.int16))
LONG = "x" * 5000


@dataclass(frozen=True)
class Case:
    """One bad request.

    Attributes:
        address: Method and path.
        reason: What the answer's `detail` must contain, whatever its case; several with "|".
        query: Of the address.
        arguments: For `requests.request`.
        status: That are right.
    """

    address: str
    reason: str
    query: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    status: tuple[int, ...] = (422,)

    def __str__(self) -> str:
        sent = {**self.query, **{key: str(value)[:40] for key, value in self.arguments.items()}}
        return f"{self.address} {sent}"[:110]


def infer(reason: str, image: str = "plain", status: int = 422, **params: Any) -> Case:
    return Case(
        "POST /infer/progidiff", reason, {"image": image}, {"files": {"params": (None, json.dumps(params))}}, (status,)
    )


def raw_infer(reason: str, text: str) -> Case:
    return Case("POST /infer/progidiff", reason, {"image": "plain"}, {"files": {"params": (None, text)}})


def upload(
    address: str, reason: str, name: str, content: bytes, part: str = "file", status: int = 422, **query: Any
) -> Case:
    return Case(address, reason, query, {"files": {part: (name, content)}}, (status,))


def label(
    reason: str,
    content: bytes = GOOD_LABEL,
    name: str = "label.nii.gz",
    status: int = 422,
    params: Any = None,
    **query: Any,
) -> Case:
    files: dict[str, Any] = {"label": (name, content)}
    if params is not None:
        files["params"] = (None, params if isinstance(params, str) else json.dumps(params))
    return Case(
        "PUT /datastore/label", reason, {"image": "plain", "tag": "final", **query}, {"files": files}, (status,)
    )


def a_json(address: str, reason: str, body: Any, status: int = 422, **query: Any) -> Case:
    return Case(address, reason, query, {"json": body}, (status,))


def body(
    address: str, reason: str, content: bytes | str, kind: str = "application/json", status: int | tuple[int, ...] = 422
) -> Case:
    return Case(
        address,
        reason,
        {},
        {"data": content, "headers": {"Content-Type": kind}},
        status if isinstance(status, tuple) else (status,),
    )


def get(path: str, reason: str, status: int = 404, **query: Any) -> Case:
    return Case(f"GET {path}", reason, query, {}, (status,))


TRAVERSALS = ("../plain", "/etc/passwd", "..", "a/b", ".hidden", "a\\b", "a\0b", "plain\n", LONG, "")

INFER = [
    *(
        raw_infer("not json|Send an object", text)
        for text in ("{", "[1]", "5", "null", '"liver"', "[" * 5000, "{'a': 1}")
    ),
    *(infer("prompt", prompt=value) for value in ("", "   ", "spline", 5, [5], {"a": 1}, True, "x" * 20_000, "?!")),
    *(
        infer("num_proposals", prompt="liver", num_proposals=value)
        for value in (0, -1, 17, 10**9, "four", 2.5, True, [], {}, "9" * 4000)
    ),
    *(infer("steps", prompt="liver", steps=value) for value in (0, 51, "fast", -3, [], 1e300)),
    *(infer("seed", prompt="liver", seed=value) for value in (-1, 2**32, "x", 1.5)),
    *(infer("guidance_scale", prompt="liver", guidance_scale=value) for value in ("warm", -1, 1e9, [])),
    *(infer("show", prompt="liver", show=value) for value in ("worst", "0", "99", {}, True, "probability")),
    *(infer("modality", prompt="liver", modality=value) for value in ("PET", 3, {})),
    *(infer("adapter", prompt="liver", adapter=value) for value in ("../../etc", "none@x@y", {}, "unknown")),
    *(infer("label_prompt", label_prompt=value) for value in ([0], [99], ["liver"], {}, "a,b")),
    *(infer("result_extension", prompt="liver", result_extension=value) for value in (".py", ".exe", "../x", 5)),
    *(
        infer("allow_free_text|save_original", prompt="liver", **{name: "maybe"})
        for name in ("allow_free_text", "save_original")
    ),
    *(infer("job", prompt="liver", job_id=value) for value in ("../../x", "a b", LONG)),
    *(
        infer(f"{name} cannot be set", prompt="liver", **{name: "/etc/passwd"})
        for name in ("model", "model_dir", "backbone", "store", "adapters")
    ),
    raw_infer("image cannot be set", '{"prompt": "liver", "image": "/etc/passwd"}'),
    *(
        infer("no image|names no image", image=value, status=422 if not value else 404, prompt="liver")
        for value in TRAVERSALS
    ),
    infer("broken", image="broken", prompt="liver"),
    Case("POST /infer/deepedit", "no model", {"image": "plain"}, {"files": {"params": (None, "{}")}}, (404,)),
    Case(
        "POST /infer/progidiff", "no session", {"session_id": "../../etc"}, {"files": {"params": (None, "{}")}}, (404,)
    ),
    Case("POST /infer/progidiff", "output", {"image": "plain", "output": "exe"}, {"files": {"params": (None, "{}")}}),
    Case(
        "POST /infer/progidiff",
        "dicom_seg",
        {"session_id": "0", "output": "dicom_seg"},
        {"files": {"params": (None, "{}")}},
    ),
    upload("POST /infer/progidiff", "is not read", "../../evil.py", b"import os"),
    upload("POST /infer/progidiff", "is not read", "a.nii.gz.exe", b"x"),
    upload("POST /infer/progidiff", "prompt|cannot be read", "a.nii.gz", b"this is no image"),
    upload("POST /infer/progidiff", "larger than", "a.nii", bytes(LARGEST_UPLOAD + 1000), status=413),
    *(
        upload("POST /infer/progidiff", "has its voxels in another file", *elsewhere(name, suffix))
        for name in ("/etc/passwd", "/dev/ptmx", "/dev/zero", "LIST")
        for suffix in (".nrrd", ".mha")
    ),
    body("POST /infer/progidiff", "names no image|cannot be read", "{}"),
    body("POST /infer/progidiff", "boundary|pars|cannot be read", b"--x\r\nbroken", "multipart/form-data", 400),
]

TASKS = [
    *(
        a_json(address, "cannot be set by a request", {name: "/tmp/evil"})
        for address in (
            "POST /batch/infer/progidiff",
            "POST /train/",
            "POST /train/adapt",
            "POST /activelearning/random",
        )
        for name in ("bundle_path", "image", "model_dir")
    ),
    a_json("POST /train/adapt", "cannot be set by a request", {"adapt": {"bundle_path": "/tmp/evil"}}),
    *(
        body(address, "Send an object", content)
        for address in ("POST /batch/infer/progidiff", "POST /train/adapt", "POST /activelearning/random")
        for content in ("{", "[1]", "5", "[" * 9000, b"\xff\xfe\x00")
    ),
    a_json("POST /batch/infer/deepedit", "no model", {}, 404),
    a_json("POST /batch/infer/progidiff", "spleen", {"prompt": "spline"}),
    a_json("POST /batch/infer/progidiff", "label_tag", {"prompt": "liver", "label_tag": "../x"}),
    a_json("POST /batch/infer/progidiff", "images", {"prompt": "liver", "images": "some"}),
    a_json("POST /batch/infer/progidiff", "no image", {"prompt": "liver", "images": ["../plain"]}, 404),
    a_json("POST /batch/infer/progidiff", "max_batch_size", {"prompt": "liver", "max_batch_size": "many"}),
    a_json("POST /batch/infer/progidiff", "images", {"prompt": "liver"}, images="nonsense"),
    body("POST /batch/infer/progidiff", "larger than", b"[" + b" " * 1_100_000 + b"]", status=413),
    a_json("POST /activelearning/nonsense", "strateg", {}),
    a_json("POST /activelearning/..%2F..%2Fetc", "address|strateg|no ", {}),
    a_json("POST /train/nonsense", "nonsense", {}, 404),
    get("/batch/infer", "task"),
]

CLOSED = [
    Case(f"{method} {path}", "is closed on this server", {}, {}, (410,))
    for method, path in (
        ("GET", "/docs"),
        ("POST", "/reload"),
        ("GET", "/model/progidiff"),
        ("GET", "/model/info/progidiff"),
        ("PUT", "/model/progidiff"),
        ("DELETE", "/model/progidiff"),
        ("POST", "/infer/wsi/progidiff"),
        ("POST", "/infer/wsi_v2/progidiff"),
        ("POST", "/scoring/"),
        ("POST", "/scoring/dice"),
        ("DELETE", "/scoring/"),
    )
]

IMAGES = [
    *(
        upload("PUT /datastore/image", "id|name|image", "good.nii.gz", GOOD_IMAGE, image=value)
        for value in ("../evil", "/tmp/evil", "a/b", ".hidden", "a\0b", LONG, "labels/final/x")
    ),
    upload("PUT /datastore/image", "nii", "evil.py", b"import os", image="evil"),
    upload("PUT /datastore/image", "read|image", "a.nii.gz", b"this is no image", image="evil"),
    upload("PUT /datastore/image", "read|image|empty", "a.nii.gz", b"", image="evil"),
    *(
        upload(
            "PUT /datastore/image",
            "has its voxels in another file|is not taken here",
            *elsewhere(name, suffix),
            image="evil",
        )
        for name in ("/etc/passwd", "/dev/ptmx")
        for suffix in (".nrrd", ".mha")
    ),
    upload(
        "PUT /datastore/image",
        "as a picture",
        "a.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        image="evil",
    ),
    upload(
        "PUT /datastore/image", "holds 2 volumes", "a.nii.gz", nifti(np.zeros((4, 4, 3, 2), np.int16)), image="evil"
    ),
    upload("PUT /datastore/image", "field|file", "a.nii.gz", GOOD_IMAGE, part="wrong"),
    upload("PUT /datastore/", "id|name|image", "../../evil.nii.gz", GOOD_IMAGE, image="../evil"),
    upload("PUT /datastore/image", "larger than", "a.nii", bytes(LARGEST_UPLOAD + 1000), status=413, image="evil"),
    Case(
        "PUT /datastore/image",
        "json|object",
        {"image": "evil"},
        {"files": {"file": ("a.nii.gz", GOOD_IMAGE), "params": (None, "[1]")}},
    ),
    *(
        Case("DELETE /datastore/image", "no image|id", {"id": value}, {}, (404, 422))
        for value in ("nobody", "../plain", "/etc/passwd", "")
    ),
    Case("DELETE /datastore/", "no image|id", {"id": "../plain"}, {}, (404, 422)),
    Case("DELETE /datastore/image", "id", {}, {}),
    *(get("/datastore/image", "no image", image=value) for value in ("nobody", "../plain", "/etc/passwd")),
    get("/datastore/image", "image", 422),
    get("/datastore/image/info", "no image", image="nobody"),
    *(
        Case("PUT /datastore/image/info", "json|object", {"image": "plain"}, {"files": {"info": (None, text)}})
        for text in ("{", "[1]", "5", '"x"')
    ),
    Case(
        "PUT /datastore/image/info",
        "no image|not found",
        {"image": "nobody"},
        {"files": {"info": (None, "{}")}},
        (404,),
    ),
    Case("PUT /datastore/image/info", "larger than", {"image": "plain"}, {"data": {"info": "x" * 1_100_000}}, (413,)),
    get("/datastore/", "output", 422, output="everything"),
    get("/datastore/dataset", "limit_cases", 422, limit_cases="many"),
    get("/datastore/dataset", "limit_cases", 422, limit_cases="-1"),
]

LABELS = [
    *(label("tag", tag=value) for value in ("../final", "/tmp/x", "a/b", ".x", "a b", "a\0b", LONG)),
    *(label("image", image=value, status=404) for value in ("nobody", "../plain", "/etc/passwd")),
    label("read|label|image", b"this is no label"),
    label("read|label|image|empty", b""),
    label("read|label|image|nii", b"import os", "evil.py"),
    *(
        label("has its voxels in another file", elsewhere(name, suffix)[1], f"a{kind}{suffix}")
        for name in ("/etc/passwd", "/dev/ptmx", "/dev/zero", "LIST")
        for kind, suffix in (("", ".nrrd"), (".seg", ".nrrd"), ("", ".mha"))
    ),
    label("grid|shape|voxels", nifti(np.ones((9, 9, 3), np.uint8))),
    label("grid|affine|position|place", nifti(np.ones(SHAPE, np.uint8), np.diag([9.0, 9, 9, 1]))),
    label("whole|integer|number", nifti(np.full(SHAPE, 0.5, np.float32))),
    label("label|id|value|negative", nifti(np.full(SHAPE, -1, np.int16))),
    label("label|id|value|structure", nifti(np.full(SHAPE, 999, np.int16))),
    *(label("json|object", params=text) for text in ("{", "[1]", "5")),
    label("slices", params={"slices": "all of them"}),
    label("slices", params={"slices": [99]}),
    label("slices", params={"slices": [-1]}),
    label("structures|structure", params={"slices": [0], "structures": 5}),
    label("seconds", params={"seconds": "long"}),
    label("larger than", bytes(LARGEST_UPLOAD + 1000), "a.nii", 413),
    upload("PUT /datastore/label", "label", "a.nii.gz", GOOD_LABEL, part="wrong", image="plain"),
    *(
        Case("DELETE /datastore/label", "label|tag", {"id": i, "tag": t}, {}, (404, 422))
        for i, t in (("nobody", "final"), ("plain", "../final"), ("plain", "no"))
    ),
    *(
        get("/datastore/label", "label|tag", label=i, tag=t)
        for i, t in (("nobody", "final"), ("plain", "nothing"), ("../plain", "final"))
    ),
    get("/datastore/label/info", "label", label="nobody", tag="final"),
    Case(
        "PUT /datastore/label/info",
        "json|object",
        {"label": "plain", "tag": "final"},
        {"files": {"info": (None, "[1]")}},
    ),
    Case(
        "PUT /datastore/label/info",
        "label",
        {"label": "nobody", "tag": "final"},
        {"files": {"info": (None, "{}")}},
        (404,),
    ),
    Case(
        "PUT /datastore/updatelabelinfo",
        "json|object",
        {"label": "plain", "tag": "final"},
        {"files": {"params": (None, "[1]")}},
    ),
    get("/progidiff/annotations", "limit", 422, limit="many"),
    get("/progidiff/annotations/export", "choose csv", 422, format="exe"),
    Case("POST /progidiff/annotations/nobody/undo", "nobody", {}, {}, (404,)),
    a_json("POST /progidiff/annotations/nobody/rename", "nobody", {"old": "Segment_1", "new": "liver"}, 404),
    a_json("POST /progidiff/annotations/plain/rename", "new", {"old": "Segment_1"}),
    a_json("POST /progidiff/structures", "nearly 'liver'", {"name": "livr"}),
    a_json("POST /progidiff/structures", "name", {}),
    a_json("POST /progidiff/structures", "does not say", {"name": "Segment_1"}),
    a_json("POST /progidiff/structures", "colour", {"name": "left ventricle", "color": "red"}),
    a_json("POST /progidiff/structures/6", "liver", {"name": "hepar"}, 404),
    label("nearly 'spleen'", params={"label_info": [{"name": "spleeen", "idx": 1}]}),
    Case("POST /progidiff/annotations/nobody/skip", "nobody", {}, {}, (404,)),
    Case("POST /progidiff/annotations/nobody/done", "nobody", {}, {}, (404,)),
    Case("POST /progidiff/annotations/plain/99/restore", "99", {}, {}, (404,)),
    Case("POST /progidiff/annotations/plain/x/restore", "sequence", {}, {}),
    get("/progidiff/annotations/plain/99/label", "99"),
]

SESSIONS = [
    upload("PUT /session/", "outside", "a.zip", a_zip("../evil.py"), part="files", uncompress="true"),
    upload("PUT /session/", "outside", "a.zip", a_zip("/tmp/evil.py"), part="files", uncompress="true"),
    upload("PUT /session/", "link", "a.tar.gz", a_tar_with_a_link(), part="files", uncompress="true"),
    upload("PUT /session/", "unpacks to more", "a.zip", a_bomb(), part="files", status=413, uncompress="true"),
    upload("PUT /session/", "no archive", "a.zip", b"this is no archive", part="files", uncompress="true"),
    upload("PUT /session/", "holds no file", "a.zip", a_zip(), part="files", uncompress="true"),
    upload("PUT /session/", "uncompress=true", "a.zip", a_zip("a"), part="files"),
    upload("PUT /session/", "empty", "a.nii.gz", b"", part="files"),
    upload("PUT /session/", "expiry", "a.nii.gz", GOOD_IMAGE, part="files", expiry="-5"),
    upload("PUT /session/", "expiry", "a.nii.gz", GOOD_IMAGE, part="files", expiry="long"),
    upload("PUT /session/", "uncompress", "a.nii.gz", GOOD_IMAGE, part="files", uncompress="maybe"),
    upload("PUT /session/", "files", "a.nii.gz", GOOD_IMAGE, part="wrong"),
    upload("PUT /session/", "larger than", "a.nii", bytes(LARGEST_UPLOAD + 1000), part="files", status=413),
    Case(
        "PUT /session/",
        "one archive",
        {"uncompress": "true"},
        {"files": [("files", ("a", b"1")), ("files", ("b", b"2"))]},
    ),
    *(get(f"/session/{name}", "no session") for name in ("nothing", "a" * 200, "a%20b", "meta.info")),
    Case("DELETE /session/nothing", "no session", {}, {}, (404,)),
]

SENTENCE = "PUT /progidiff/pictures/photo/sentence"
PICTURES = [
    get("/progidiff/pictures/nobody", "nobody"),
    get("/progidiff/pictures/plain", "is a volume", 422),
    get("/progidiff/pictures/torn", "torn.png", 422),
    get("/progidiff/pictures/nobody/pixels", "nobody"),
    get("/progidiff/pictures/plain/pixels", "is a volume", 422),
    get("/progidiff/pictures/torn/pixels", "torn.png", 422),
    get("/progidiff/review/torn", "torn.png", 422),
    get("/progidiff/review/photo/slices/1", "slice", 422),
    a_json("PUT /progidiff/pictures/nobody/sentence", "nobody", {"sentence": "Dense.", "former": ""}, 404),
    a_json("PUT /progidiff/pictures/plain/sentence", "is a volume", {"sentence": "A liver.", "former": ""}),
    *(
        a_json(SENTENCE, reason, {"sentence": sentence, "former": "Dense on the left."})
        for sentence, reason in (
            ("", "is empty"),
            (" \t\n", "is empty"),
            ("x" * 2001, "at most 2,000"),
            ("bell \a", "U+0007"),
            ("nul \0", "U+0000"),
            ("=1+1", "formula"),
            (7, "sentence"),
            (["Dense."], "sentence"),
        )
    ),
    a_json(SENTENCE, "former", {"sentence": "Dense."}),
    a_json(SENTENCE, "sentence", {"former": "Dense on the left."}),
    a_json(SENTENCE, "extra|user", {"sentence": "Dense.", "former": "Dense on the left.", "user": "somebody else"}),
    a_json(SENTENCE, "was changed meanwhile", {"sentence": "Dense.", "former": "Sparse."}, 409),
    a_json(SENTENCE, "was changed meanwhile", {"sentence": None, "former": ""}, 409),
    a_json(SENTENCE, "object|list|dictionary", ["Dense."]),
    body(SENTENCE, "json", "{"),
    body(SENTENCE, "half of a character", r'{"sentence": "\ud800", "former": ""}'),
    a_json("POST /progidiff/review/photo", "proposals", {"slices": {}}),
    a_json(
        "POST /progidiff/review/photo",
        "12|16|size|drawn",
        {"painted": {"shape": [1, 16, 12], "slices": {"0": [{"structure": "a", "box": None, "runs": [], "edits": 1}]}}},
    ),
    *(
        Case("POST /infer/textdiff", reason, {"image": "photo"}, {"files": {"params": (None, json.dumps(params))}})
        for params, reason in (
            ({"without_sentence": "maybe"}, "without_sentence"),
            ({"without_sentence": True, "sentence": "Dense."}, "sent together"),
        )
    ),
]
"""Of a picture and of its sentence."""

HALF = r'{"client_id": "\ud800", "note": 1}'
UNSENDABLE = [
    label("half of a character", params=HALF),
    label("NaN", params='{"seconds": NaN}'),
    raw_infer("half of a character", HALF),
    Case(
        "POST /infer/progidiff_slice",
        "foreground",
        {"image": "plain"},
        {"files": {"params": (None, json.dumps({"prompt": "liver", "foreground": "[" * 9000}))}},
    ),
    raw_infer("nested", '{"prompt": ' + "[" * 90 + "]" * 90 + "}"),
    raw_infer("too long", '{"prompt": "liver", "seed": ' + "9" * 90 + "}"),
    *(body(f"POST {path}", "half of a character", HALF) for path in ("/activelearning/random", "/train/adapt")),
    body("POST /progidiff/review/plain", "half of a character", HALF),
    *(
        Case(address, "half of a character", query, {"files": {name: (None, HALF)}})
        for address, query, name in (
            ("PUT /datastore/image/info", {"image": "plain"}, "info"),
            ("PUT /datastore/label/info", {"label": "plain", "tag": "final"}, "info"),
            ("PUT /datastore/updatelabelinfo", {"label": "plain", "tag": "final"}, "params"),
        )
    ),
    body("PUT /datastore/image/info?image=plain", "UTF-8", b"x", "multipart/form-data; charset=unicode_escape"),
]
"""Texts that no answer could hold: kept once, they would break every list they are in."""

OTHERS = [
    *(get("/logs/", "lines", 422, lines=value) for value in (0, -1, 10**9, "all")),
    get("/progidiff/jobs/nothing", "job"),
    Case("DELETE /progidiff/jobs/nothing", "job", {}, {}, (404,)),
    get("/progidiff/proposals/nobody", "no image"),
    get("/progidiff/proposals/plain", "proposals", proposals="0" * 64),
    get("/progidiff/proposals/plain", "proposals", proposals="../../etc"),
    get("/progidiff/proposals/nobody/dicom-seg", "no image"),
    get("/progidiff/proposals/plain/dicom-seg", "proposals", proposals="../../etc"),
    Case("POST /progidiff/proposals/plain/dicom-seg", "lie in a folder", {"show": "agreement"}),
    get("/progidiff/readings/nobody", "nobody"),
    Case("GET /progidiff/readings/plain/anna/label/0", "2 people have read", {}, {}, (409,)),
    a_json("POST /progidiff/readings/plain/decide", "structures", {}),
    get("/progidiff/review/nobody/overview", "nobody"),
    get("/progidiff/review/plain/overview/mask", "proposals|no ", proposals="../../etc"),
    get("/progidiff/review/nobody", "nobody"),
    get("/progidiff/review/plain/slices/99", "slice", 422),
    get("/progidiff/review/plain/slices/x", "z|slice", 422),
    get("/progidiff/review/plain/label/99", "slice", 422),
    get("/progidiff/static/nothing.js", "nothing.js|no "),
    get("/progidiff/ohif/files/nothing.js", "nothing.js|no "),
    get("/progidiff/ohif/images/nobody", "nobody|no "),
    get("/progidiff/ohif/masks/nobody", "nobody|no "),
    get("/progidiff/ohif/masks/plain", "proposals|no ", proposals="../../etc"),
    get("/progidiff/review/nobody/masks/0", "nobody|no ", proposals="0" * 64),
    get("/progidiff/review/plain/masks/0", "proposals|no ", proposals="../../etc"),
    Case("POST /progidiff/versions/nobody/1/use", "nobody", {}, {}, (404, 422)),
    Case("POST /progidiff/versions/nobody/rollback", "nobody", {}, {}, (404, 422)),
    a_json("POST /progidiff/review/nobody", "nobody|proposals", {}, 404),
    body("POST /progidiff/review/plain", "json", "{"),
    get("/progidiff/queue", "limit", 422, limit="many"),
    get("/proxy/dicom/instances", "DICOMweb"),
    get("/proxy/dicom/stow/instances/..1", "DICOMweb"),
    get("/proxy/dicom/qido/tools/execute-script", "DICOMweb"),
    get("/proxy/dicom/wado/studies/1.2.3/archive", "DICOMweb"),
    get("/proxy/dicom/wado/studies/1.2.3/metadata", "1.2.3|no "),
    get("/proxy/dicom/qido/studies", "StudyDate|date", 422, StudyDate="tomorrow"),
    Case("POST /proxy/dicom/instances", "is closed", {}, {}, (410,)),
    Case("PUT /proxy/dicom/stow/studies", "There is no", {}, {}, (404, 405)),
    *(
        body(f"POST /proxy/dicom/{service}/studies{study}", "dicom|multipart", content, kind, (400, 415, 422))
        for service in ("stow", "wado")
        for study in ("", "/1.2.3")
        for content, kind in (
            (b"x", "text/plain"),
            (b"--x", "multipart/related; type=application/dicom"),
            (b"{}", "application/json"),
        )
    ),
    body("POST /proxy/dicom/other/studies", "DICOMweb", b"x", "text/plain", 404),
    *(
        Case(f"POST /proxy/dicom/{path}", "is closed", {}, {}, (410,))
        for path in ("stow/instances", "wado/tools/reset", "qido/changes")
    ),
    get("/nothing", "There is no GET /nothing"),
    Case("DELETE /info/", "There is no", {}, {}, (404, 405)),
    Case("PATCH /datastore/label", "There is no", {}, {}, (404, 405)),
    Case("GET /info/", "no known name", {}, {"headers": {"Host": "evil.example"}}, (403,)),
    Case("GET /info/", "its own machine only", {}, {"headers": {"X-Forwarded-For": "127.0.0.1"}}, (403,)),
    *(
        Case(address, "another origin", {}, {"headers": {"Origin": "http://evil.example"}}, (403,))
        for address in (
            "POST /infer/progidiff",
            "PUT /datastore/label",
            "DELETE /datastore/image",
            "POST /train/",
            "PUT /session/",
        )
    ),
    Case("POST /infer/progidiff", "another origin", {}, {"headers": {"Sec-Fetch-Site": "cross-site"}}, (403,)),
    body("POST /auth/token", "larger than", b"username=" + b"x" * 70_000, "application/x-www-form-urlencoded", 413),
    body("POST /auth/token", "password", b"username=x&password=" + b"y" * 300, "application/x-www-form-urlencoded"),
]

CASES = [*INFER, *TASKS, *CLOSED, *IMAGES, *LABELS, *SESSIONS, *PICTURES, *UNSENDABLE, *OTHERS]


def digest(server: Server) -> dict[str, str]:
    """Every file of the studies folder and of the app, with what is in it; locks and logs aside."""
    app = server.log.parent / "app"
    files = [path for root in (server.studies, app) for path in root.rglob("*") if path.is_file()]
    kept = [
        path
        for path in files
        if path.suffix not in (".lock", ".log") and not {"__pycache__", "dicom", "scores"} & set(path.parts)
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_request_is_refused_with_a_reason_and_a_cure_and_changes_nothing(server: Server, case: Case):
    before = digest(server)
    method, path = case.address.split(" ")
    response = requests.request(
        method, server.url + path, params=case.query, timeout=60, allow_redirects=False, **case.arguments
    )
    assert response.status_code in case.status, response.text[:500]
    answer = response.json()
    assert set(answer) == {"error", "detail", "suggestions"}
    assert any(word.lower() in answer["detail"].lower() for word in case.reason.split("|")), answer
    assert answer["detail"].rstrip().endswith((".", "!", "?")), answer
    assert len(answer["detail"].split()) >= 6, answer
    assert "Traceback" not in answer["detail"]
    if not path.startswith("/progidiff/versions"):  # Administrators only, who know the folders.
        assert str(server.studies.parent) not in answer["detail"], "no path of the server in an answer"
    assert digest(server) == before


@pytest.mark.parametrize(
    "path",
    [
        "/datastore/../reload",
        "/ohif/../../../../etc/passwd",
        "/ohif/..%2f..%2f..%2fetc/passwd",
        "/static/../app.py",
        "/static/%2e%2e/%2e%2e/app.py",
        "/proxy/dicom/wado/../../instances",
        "/proxy/dicom/wado/..%2f..%2finstances",
        "/proxy/dicom//instances",
        "/session/..%2f..%2fetc",
        "/progidiff/static/..%2fmain.py",
        "/progidiff/proposals/..%5c..%5cetc",
        "/info/%00",
        "/info/%0d%0aX-Evil:1",
    ],
)
def test_an_address_that_means_two_places_is_refused_as_it_stands(server: Server, path: str):
    """Sent as it is: client libraries tidy such addresses up."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert (response.status, answer["error"]) == (422, "RequestError"), answer
    assert "Write it plainly" in answer["detail"]


@pytest.mark.parametrize(
    "query", [{"image": "nobody"}, {"image": "../plain"}, {"image": "plain", "check_sum": "NONE:abc"}, {}]
)
def test_asking_for_an_image_without_its_body_is_refused_too(server: Server, query: dict[str, str]):
    assert requests.head(f"{server.url}/datastore/image", params=query, timeout=30).status_code in (404, 422)


def test_headers_that_name_a_device_stop_no_save(server: Server):
    for suffix in (".nrrd", ".mha"):
        files = {"label": elsewhere("/dev/ptmx", suffix)}
        assert (
            requests.put(
                f"{server.url}/datastore/label", params={"image": "plain"}, files=files, timeout=10
            ).status_code
            == 422
        )
    files = {"label": ("label.nii.gz", GOOD_LABEL)}
    answer = requests.put(f"{server.url}/datastore/label", params={"image": "plain"}, files=files, timeout=10)
    assert answer.json()["annotation"]["repeated"] is True, answer.text


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr", ".mhd"])
def test_a_session_reads_no_file_of_the_server(server: Server, suffix: str):
    name, content = elsewhere("/etc/passwd", {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix))
    sent = requests.put(
        f"{server.url}/session/", files=[("files", (Path(name).with_suffix(suffix).name, content))], timeout=60
    )
    query = {"session_id": sent.json()["session_id"]}
    answer = requests.post(
        f"{server.url}/infer/progidiff", params=query, files={"params": (None, '{"prompt": "liver"}')}, timeout=60
    )
    assert answer.status_code == 422, answer.text[:500]
    assert "has its voxels in another file" in answer.json()["detail"]
    assert requests.delete(f"{server.url}/session/{query['session_id']}", timeout=60).status_code == 200


def test_an_archive_of_a_series_becomes_a_session_whose_answers_name_no_folder(server: Server, tmp_path: Path):
    series = write_dicom(tmp_path / "series", make_image(), make_affine("LPS"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in series.iterdir():
            archive.write(file, f"series/{file.name}")
        for name in ("__MACOSX/series/._000.dcm", "series/.DS_Store", "DICOMDIR", "README.txt"):
            archive.writestr(name, "a companion")
    files = [("files", ("series.zip", packed.getvalue()))]
    answer = requests.put(f"{server.url}/session/", params={"uncompress": "true"}, files=files, timeout=60)
    assert answer.status_code == 200, answer.text
    assert str(server.log.parent) not in answer.text
    session = answer.json()["session_id"]
    request = {"prompt": "liver", "num_proposals": 2, "steps": 1}
    assert server.infer("", request, output="json", session_id=session).status_code == 200
    assert server.get(f"/session/{session}").json()["name"] == session
    assert server.get(f"/session/{session}", params={"image": "true"}).status_code == 422  # A folder.
    assert requests.delete(f"{server.url}/session/{session}", timeout=30).status_code == 200
    assert server.get(f"/session/{session}").status_code == 404


def test_there_are_enough_cases_and_every_address_that_takes_something_has_one():
    table = build_table(build_endpoints())
    assert len(CASES) >= 150
    asked = {(row.method, row.path) for row in (table.find(*case.address.split(" ")) for case in CASES)}
    # The login has tests of its own; files and pages are found or not; STOW is answered where it is stored.
    apart = {"/progidiff/login", "/progidiff/logout", "/ohif/{path:path}", "/static/{path:path}"}
    left = {
        row.path for row in table.endpoints if (row.method, row.path) not in asked and ("{" in row.path or row.body)
    } - apart
    assert not left, "give each a bad request"


NOT_GENERATED = {
    "POST /train/": "an empty object is a good request there and starts a training of minutes",
    "GET /logs/gpu": "starts a program",
}
"""Operations that generated requests leave out, with the reason."""


def send_generated(operation: Any) -> list[str]:
    """Requests to one operation; what was wrong with their answers. At least one is sent."""
    wrong: list[str] = []
    statuses: list[int] = []

    @given(case=operation.as_strategy())
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        statuses.append(response.status_code)
        if response.status_code >= 500 and not (response.status_code == 503 and "Retry-After" in response.headers):
            wrong.append(
                f"{operation.method} {operation.path} {case.query} -> {response.status_code}: {response.text[:300]}"
            )

    send()
    assert statuses
    return wrong


def test_generated_requests_never_meet_an_unexpected_error(server: Server):
    """Requests from the OpenAPI description, fitting and not fitting, to every operation in it."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    chosen = [
        operation for operation in operations if f"{operation.method.upper()} {operation.path}" not in NOT_GENERATED
    ]
    assert len(chosen) > 40
    wrong = [line for operation in chosen for line in send_generated(operation)]
    assert not wrong, "\n".join(wrong[:10])


def test_nothing_of_a_refused_request_stays_in_the_temporary_folder(server: Server):
    # The process that reads files has a folder for as long as it runs; in it are the small files of every format that
    # it made itself at its start, and nothing else.
    (own,) = server.temporary.glob(".progidiff-decoding-*")
    others = [path for path in server.temporary.rglob("*") if own / "warm" not in path.parents]
    assert not [
        path for path in others if path.name.startswith("progidiff-") or path.suffix in (".nii", ".gz", ".zip", ".py")
    ]
    assert not [path for path in others if own in path.parents and path.is_file()]


def test_the_server_still_works_after_all_of_it(server: Server):
    assert server.get("/info/").status_code == 200
    assert server.infer("plain", {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="json").status_code == 200
    assert "Traceback" not in server.log.read_text(errors="replace")
