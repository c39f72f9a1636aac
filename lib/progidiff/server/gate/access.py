"""Every address of the server in one table: who may call it, what it takes, how much of it, and for how long.

`progidiff.server.gate.guard` enforces the table before any route runs, and docs/security.md prints it: ``python -m
progidiff.server.gate.access`` writes that part of the page again. What is not in the table is refused to everybody but
administrators.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from progidiff.users import Role

UPLOAD = -1
"""As `Rule.body`: what `--conf max_upload_gb` allows."""

QUICK, LONG = 60, 3600
"""Deadlines in seconds, counted from the last byte of the request. What takes LONG goes on after it and keeps its
result.
"""

_SMALL = 64 << 10
_JSON = 1 << 20
_STOW = 512 << 20  # Read into memory as a whole.

READ, ANNOTATE, ADMINISTER = Role.READ, Role.ANNOTATE, Role.ADMINISTER
OPEN = None
"""As `Rule.role`: before a login too."""

CLOSED = "closed: 410 with the reason"


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        method: GET stands for HEAD too.
        path: As the web framework writes it, ``{name}`` for one part and ``{name:path}`` for the rest.
        role: The least role; OPEN for none.
        accepts: What it takes and does, for people.
        body: Most bytes of the request's body, or `UPLOAD`.
        deadline: Seconds until the answer begins.
        params: Whether the body is a JSON object of parameters of a task, in which no name of a file or another task
            may stand.
    """

    method: str
    path: str
    role: Role | None
    accepts: str
    body: int = 0
    deadline: int = QUICK
    params: bool = False


RULES: tuple[Rule, ...] = (
    # Logging in, and pages
    Rule("GET", "/auth/", OPEN, "Whether a login is needed (Slicer asks this first)"),
    Rule(
        "POST",
        "/auth/token",
        OPEN,
        "Form: username, password (or a token); gives a bearer token; 10 failures in 5 minutes, then 429",
        _SMALL,
    ),
    Rule("GET", "/auth/token/valid", READ, "Whether the bearer token is still good, and whose it is"),
    Rule("GET", "/progidiff/login", OPEN, "The login page"),
    Rule(
        "POST",
        "/progidiff/login",
        OPEN,
        "Form: name, password, next (an address of this server); sets the session cookie",
        _SMALL,
    ),
    Rule("POST", "/progidiff/logout", OPEN, "Ends the session", _SMALL),
    Rule("GET", "/favicon.ico", OPEN, "The icon"),
    Rule("GET", "/", READ, "Start page: links, and who is logged in"),
    Rule("GET", "/openapi.json", READ, "Description of all routes"),
    Rule("GET", "/docs", READ, f"{CLOSED} (its page loads scripts from another site)"),
    Rule("GET", "/static/{path:path}", READ, "Files of the host's wheel (OHIF)"),
    Rule("GET", "/ohif/app-config.js", READ, "How OHIF reaches this server"),
    Rule("GET", "/ohif/{path:path}", READ, "OHIF"),
    # What this app adds
    Rule("GET", "/progidiff/jobs", READ, "Query: image; waiting, running and recent jobs"),
    Rule("GET", "/progidiff/jobs/{job_id}", READ, "State and progress of one job"),
    Rule("DELETE", "/progidiff/jobs/{job_id}", ANNOTATE, "Cancels a job"),
    Rule("GET", "/progidiff/proposals/{image}", READ, "Query: proposals (a key); kept proposals of an image"),
    Rule("GET", "/progidiff/training", READ, "Query: limit; the training under way or the last one, and earlier ones"),
    Rule("GET", "/progidiff/versions", READ, "Adapters, their versions with Dice and verdict, and which are served"),
    Rule("POST", "/progidiff/versions/{name}/{version}/use", ADMINISTER, "Serves this version"),
    Rule("POST", "/progidiff/versions/{name}/rollback", ADMINISTER, "Serves what was served before"),
    Rule("GET", "/progidiff/health", ADMINISTER, "What was found damaged since the start, and what holds instead"),
    Rule("GET", "/progidiff/prompts", READ, "Structures and synonyms"),
    Rule("GET", "/progidiff/queue", READ, "Query: limit; what is to be annotated next, and why"),
    Rule("GET", "/progidiff/report", READ, "What the choice of slices has brought so far"),
    Rule("GET", "/progidiff/scoring", READ, "How far the background scoring of the pool is"),
    Rule("GET", "/progidiff/annotations", READ, "Query: image, limit; saved labels, newest first"),
    Rule("GET", "/progidiff/annotations/export", ADMINISTER, "Query: format (csv, json), image; the audit"),
    Rule("POST", "/progidiff/annotations/{image}/undo", ANNOTATE, "Goes back to the label before the last save"),
    Rule("POST", "/progidiff/annotations/{image}/skip", ANNOTATE, "Query: reason; notes that an image was left"),
    Rule("POST", "/progidiff/annotations/{image}/{sequence}/restore", ANNOTATE, "Puts an earlier save in force again"),
    Rule("GET", "/progidiff/annotations/{image}/{sequence}/label", READ, "A saved label as it was"),
    Rule("GET", "/progidiff", READ, "Leads to the review page"),
    Rule("GET", "/progidiff/", READ, "The review page"),
    Rule("GET", "/progidiff/static/{name}", READ, "Files of the review page"),
    Rule("GET", "/progidiff/ohif/files/{name}", READ, "Files of the panel in OHIF"),
    Rule("GET", "/progidiff/ohif/images/{image}", READ, "How an image is called in OHIF"),
    Rule("GET", "/progidiff/ohif/masks/{image}", READ, "Query: proposals (a key) or job, show; one proposal as voxels"),
    Rule("GET", "/progidiff/review/{image}", READ, "Size, window and state of an image"),
    Rule("GET", "/progidiff/review/{image}/slices/{z}", READ, "One axial slice"),
    Rule(
        "GET",
        "/progidiff/review/{image}/masks/{z}",
        READ,
        "Query: proposals (a key) or job; all proposals on one slice",
    ),
    Rule("GET", "/progidiff/review/{image}/label/{z}", READ, "The saved label on one slice"),
    Rule(
        "POST",
        "/progidiff/review/{image}",
        ANNOTATE,
        "JSON: proposals, volume, slices, base, seconds; makes and saves a label",
        _JSON,
    ),
    # The host's
    Rule("GET", "/info/", READ, "What the server offers"),
    Rule(
        "POST",
        "/infer/{model}",
        ANNOTATE,
        "Query: image (id), session_id, output; form: params (JSON; K, steps, volume size "
        "bounded), file (NIfTI, NRRD, MHA), label (ignored)",
        UPLOAD,
        LONG,
    ),
    Rule("POST", "/infer/wsi/{model}", ANNOTATE, f"{CLOSED} (pathology slides; would read any file)", _JSON),
    Rule("POST", "/infer/wsi_v2/{model}", ANNOTATE, f"{CLOSED} (the same)", _JSON),
    Rule("GET", "/batch/infer", READ, "Status of the batch"),
    Rule(
        "POST",
        "/batch/infer/{model}",
        ADMINISTER,
        "JSON: options of the task; query: images, run_sync",
        _JSON,
        LONG,
        params=True,
    ),
    Rule("DELETE", "/batch/infer", ADMINISTER, "Stops the batch"),
    Rule(
        "POST",
        "/activelearning/{strategy}",
        ANNOTATE,
        "JSON: options of the strategy; the next sample",
        _JSON,
        params=True,
    ),
    Rule("GET", "/scoring/", READ, "Status of the host's scoring"),
    Rule("POST", "/scoring/", ADMINISTER, f"{CLOSED} (starts a process per method)", _JSON),
    Rule("POST", "/scoring/{method}", ADMINISTER, f"{CLOSED} (the same)", _JSON),
    Rule("DELETE", "/scoring/", ADMINISTER, f"{CLOSED} (there is nothing to stop)"),
    Rule("GET", "/train/", READ, "Status of the training"),
    Rule("POST", "/train/", ADMINISTER, "JSON: options of the trainers; starts them", _JSON, params=True),
    Rule("POST", "/train/{model}", ADMINISTER, "JSON: options of the trainer; starts it", _JSON, params=True),
    Rule("DELETE", "/train/", ADMINISTER, "Stops the training"),
    Rule("GET", "/datastore/", READ, "Query: output (stats, all, train); images and labels"),
    Rule("PUT", "/datastore/", ANNOTATE, "As PUT /datastore/image", UPLOAD),
    Rule("DELETE", "/datastore/", ADMINISTER, "As DELETE /datastore/image"),
    Rule("GET", "/datastore/image", READ, "Query: image (id); HEAD with check_sum; the file"),
    Rule(
        "PUT",
        "/datastore/image",
        ANNOTATE,
        "Query: image (id: letters, digits, '.', '_', '-'); form: file (a readable volume), params",
        UPLOAD,
    ),
    Rule("DELETE", "/datastore/image", ADMINISTER, "Query: id; removes an image and its labels"),
    Rule("GET", "/datastore/image/info", READ, "Query: image"),
    Rule("PUT", "/datastore/image/info", ANNOTATE, "Query: image; form: info (JSON object)", _JSON),
    Rule("GET", "/datastore/label", READ, "Query: label (image id), tag; the file"),
    Rule(
        "PUT",
        "/datastore/label",
        ANNOTATE,
        "Query: image, tag; form: label (on the image's grid, whole numbers, known ids), params",
        UPLOAD,
    ),
    Rule("DELETE", "/datastore/label", ADMINISTER, "Query: id, tag; the history keeps every version"),
    Rule("GET", "/datastore/label/info", READ, "Query: label, tag"),
    Rule("PUT", "/datastore/label/info", ANNOTATE, "Query: label, tag; form: info (JSON object)", _JSON),
    Rule("PUT", "/datastore/updatelabelinfo", ANNOTATE, "As PUT /datastore/label/info, form field params", _JSON),
    Rule("GET", "/datastore/dataset", ANNOTATE, "Query: limit_cases; a zip of labelled images", 0, LONG),
    Rule(
        "PUT",
        "/session/",
        ANNOTATE,
        "Form: files (1 to 1000, or one archive with uncompress); query: uncompress, expiry; unpacked within limits",
        UPLOAD,
        LONG,
    ),
    Rule("GET", "/session/{session_id}", ANNOTATE, "Query: image, update_ts; the session's state or file"),
    Rule("DELETE", "/session/{session_id}", ANNOTATE, "Removes an uploaded image"),
    Rule("GET", "/logs/", ADMINISTER, "Query: lines (1 to 10000); the end of the log as text"),
    Rule("GET", "/logs/gpu", ADMINISTER, "What nvidia-smi says"),
    Rule("GET", "/model/{model}", ADMINISTER, f"{CLOSED} (models are folders)"),
    Rule("GET", "/model/info/{model}", ADMINISTER, f"{CLOSED} (the same)"),
    Rule("PUT", "/model/{model}", ADMINISTER, f"{CLOSED} (would load uploaded weights)"),
    Rule("DELETE", "/model/{model}", ADMINISTER, f"{CLOSED} (would remove weights)"),
    Rule("POST", "/reload", ADMINISTER, f"{CLOSED} (could hang the server)"),
    # The DICOMweb server behind this one
    Rule("GET", "/proxy/dicom/qido/{path:path}", READ, "DICOMweb searches below the configured root"),
    Rule("GET", "/proxy/dicom/wado/{path:path}", READ, "DICOMweb retrieval below the configured root"),
    Rule("GET", "/proxy/dicom/stow/{path:path}", READ, "The same (OHIF uses one root for both)"),
    Rule("GET", "/proxy/dicom/{path:path}", READ, "The same"),
    Rule(
        "POST",
        "/proxy/dicom/{service}/studies",
        ANNOTATE,
        "multipart/related: DICOM SEGs, saved as labels of their images",
        _STOW,
        LONG,
    ),
    Rule("POST", "/proxy/dicom/{service}/studies/{study}", ANNOTATE, "The same", _STOW, LONG),
    Rule("POST", "/proxy/dicom/stow/{path:path}", ANNOTATE, f"{CLOSED} (no address to store at)"),
    Rule("POST", "/proxy/dicom/wado/{path:path}", ANNOTATE, f"{CLOSED} (the same)"),
    Rule("POST", "/proxy/dicom/qido/{path:path}", ANNOTATE, f"{CLOSED} (the same)"),
    Rule("POST", "/proxy/dicom/{path:path}", ANNOTATE, f"{CLOSED} (the same)"),
)

UNKNOWN = Rule("*", "*", ADMINISTER, "Whatever is not in this table")


@lru_cache(maxsize=1)
def _compiled() -> tuple[tuple[Rule, re.Pattern[str]], ...]:
    return tuple((rule, _compile(rule.path)) for rule in RULES)


def _compile(path: str) -> re.Pattern[str]:
    """As the web framework reads a path template.

    Example:
        >>> bool(_compile("/a/{b}").fullmatch("/a/x/y")), bool(_compile("/a/{b:path}").fullmatch("/a/x/y"))
        (False, True)
    """
    parts = re.split(r"(\{\w+(?::path)?\})", path)
    return re.compile("".join(_compile_part(part) for part in parts), re.DOTALL)


def _compile_part(part: str) -> str:
    if not part.startswith("{"):
        return re.escape(part)
    return ".*" if part.endswith(":path}") else "[^/]+"


def find_rule(method: str, path: str) -> Rule:
    """The first row that fits; `UNKNOWN` if none does.

    A missing or surplus slash at the end, for which the web framework redirects, does not count.

    Example:
        >>> find_rule("HEAD", "/datastore/image").role, find_rule("POST", "/reload/").path
        (<Role.READ: 'read'>, '/reload')
    """
    method = "GET" if method == "HEAD" else method
    for wanted in (path, path[:-1] if path.endswith("/") else path + "/"):
        for rule, pattern in _compiled():
            if rule.method == method and pattern.fullmatch(wanted):
                return rule
    return UNKNOWN


_BEGIN, _END = "<!-- table of addresses: python -m progidiff.server.gate.access -->", "<!-- end of the table -->"


def render_table(rules: Sequence[Rule] = RULES) -> str:
    """The table in Markdown."""
    lines = ["| address | who | takes | body up to | answers within |", "|---|---|---|---|---|"]
    for rule in (*rules, UNKNOWN):
        who = str(rule.role) if rule.role else "everybody"
        lines.append(
            f"| `{rule.method} {rule.path}` | {who} | {rule.accepts} | {_show_size(rule.body)} | {rule.deadline} s |"
        )
    return "\n".join(lines)


def _show_size(size: int) -> str:
    if size == UPLOAD:
        return "`max_upload_gb`"
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} kB" if size else "nothing"


def insert_table(page: str) -> str:
    """The page with the table of this version between its marks.

    Raises:
        ValueError: if the marks are not there.
    """
    before, after = page.index(_BEGIN) + len(_BEGIN), page.index(_END)
    return f"{page[:before]}\n{render_table()}\n{page[after:]}"


def main(file: str = "docs/security.md") -> None:
    """Write the table into the page."""
    path = Path(file)
    path.write_text(insert_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
