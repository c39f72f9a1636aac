"""Options as they arrive, checked and typed: of the server (`--conf name value`) and of one request (form field
`params`).

Viewers send what their widgets hold: numbers as text, a choice as text or as the whole list of choices, booleans as
text. Everything is read tolerantly where the meaning is clear and refused with a cure where it is not.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from progidiff import logs
from progidiff.active_learning.settings import DEFAULT_STRATEGY
from progidiff.errors import RequestError
from progidiff.params import read_bool, read_choice, read_float, read_int
from progidiff.proposals.islands import CLEAN_UPS
from progidiff.proposals.request import AUTO, DEFAULT_CLEAN_UP, MAX_PROPOSALS
from progidiff.storage.state import default_store
from progidiff.users import Role

_HOST_CONF = ("server_mode",)
"""Names of `--conf` that MONAI Label's base class reads. Others that it knows belong to its bundles, which this app has
none of.
"""

TOKEN, OFF = "token", "off"
"""Choices of `--conf login`."""

ADMINISTRATORS, EVERYBODY = "administrators", "open"
"""Choices of `--conf metrics`, with `OFF`."""

_ORIGIN = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class ServerOptions:
    """What `--conf` sets for the life of the server.

    Attributes:
        store: Folder of the kept proposals. Default: `.progidiff` in the studies folder, where MONAI Label does not
            look for images, or `~/.cache/progidiff/<hash>` if the studies are behind a DICOMweb address.
        model_dir: Folder of backbone and conditioning weights; None for the embedded ones.
        backbone: A Stable-Diffusion folder or hub id to use instead of the backbone in `model_dir`; None for that one.
        device: "cpu", "cuda", "cuda:<n>" or "mps"; None to take the best there is.
        devices: Several devices that answer side by side, in the place of `device`; "cpu" may be named several times.
        at_once: Latents that a CUDA device denoises together; None for the usual number.
        warm_up: Whether weights are loaded and every network runs once at start, before anybody asks.
        cpu_fallback: Whether a request that does not fit into the device's memory, one slice at a time, is answered by
            the processor.
        max_proposals: Largest K of a request, 1..64.
        max_waiting: Requests that may wait for the device, 0..30.
        adapters: Folder of adapters; None for `adapters` in the model folder.
        textdiff: Folder of textdiff models; None for `textdiff` in the model folder.
        store_gb: Size that the store may grow to before the oldest proposals go, in GB.
        token_file: Tokens that open the server to other hosts, see `progidiff.users.read_tokens`.
        users_file: Users with hashed passwords, see `progidiff.users.UsersFile`.
        oidc_file: A login provider, see `progidiff.server.gate.oidc.ProviderSettings`.
        login: Whether this machine logs in where neither tokens nor users are configured: "token", with a token that
            the server makes, keeps in its state folder and prints as a link; or "off": whoever reaches the loop-back
            address administers.
        allow_anonymous: What somebody without a login may do from another host; None for nothing. "true" means
            annotate.
        session_hours: How long a login lasts, in hours, 0.1..720.
        hosts: Names, without a port, that browsers may call this server by, beside localhost and addresses.
        cors_origins: Pages of these origins ("https://viewer.example.org") may call this server from a browser;
            otherwise only its own.
        header_seconds: How long a connection may take to send the header of a request, 0.1..300.
        connections_per_address: Connections of one address at a time, 8..10000.
        max_upload_gb: Largest body of a request that brings an image or a label, in GB.
        score_pool: Whether images are scored in the background: "on", "off", or "auto": if they lie in a folder (behind
            a DICOMweb address all of them would have to be fetched).
        score_prompt: The structures to score, as a request names them.
        reserve_minutes: How long an image stays with the client that got it as next sample, 0.1..1440.
        training_nice: How far trainings step back from requests on the processor, 0 (not at all) to 19.
        next_strategy: What the strategy `random` stands for, see `progidiff.active_learning.settings.STRATEGIES`.
        acquisition: Settings of the choice of slices, "name=value,name=value", see
            `progidiff.active_learning.settings.AcquisitionConfig`.
        retrain_after: Newly annotated slices after which a training starts by itself; 0 for never.
        retrain_task: The trainer that starts then; "auto" for textdiff where pictures and progidiff_adapt where volumes
            were labelled.
        clean_up: How islands are dropped from proposals where a request does not say, see
            `progidiff.proposals.islands`.
        retrain_params: Its parameters, "name=value,name=value", see `progidiff.training_runs.options.TrainingOptions`.
        read_apart: Whether files are read in a process of their own, see `progidiff.images.decoding`.
        log: How log lines are written: "text", or "json" with one object per line.
        log_names: How names of images and files are written there: "hashed", as pseudonyms, or "plain"; None for hashed
            with "json" and plain with "text".
        metrics: Who may read `GET /metrics` without the token for it: "administrators", "open" for everybody, or "off"
            for nobody at all.
        metrics_token_file: A file with tokens that open `GET /metrics` and nothing else, see `token_file`.
        double_reading: Whether two people label each image without seeing each other's label, and a third one decides;
            see `progidiff.labels.readings`.
        detached_data: Whether .nhdr and .mhd in the studies folder may have their voxels in a plain file beside them.
    """

    store: Path
    model_dir: Path | None = None
    backbone: str | None = None
    device: str | None = None
    devices: tuple[str, ...] = ()
    at_once: int | None = None
    warm_up: bool = False
    cpu_fallback: bool = False
    max_proposals: int = 16
    max_waiting: int = 8
    store_gb: float = 10.0
    adapters: Path | None = None
    textdiff: Path | None = None
    token_file: Path | None = None
    users_file: Path | None = None
    oidc_file: Path | None = None
    login: str = TOKEN
    allow_anonymous: Role | None = None
    session_hours: float = 12.0
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    header_seconds: float = 10.0
    connections_per_address: int = 256
    max_upload_gb: float = 4.0
    score_pool: str = "auto"
    score_prompt: str = "all"
    reserve_minutes: float = 30.0
    next_strategy: str = DEFAULT_STRATEGY
    training_nice: int = 5
    acquisition: str = ""
    retrain_after: int = 0
    retrain_task: str = AUTO
    retrain_params: str = ""
    clean_up: str = DEFAULT_CLEAN_UP
    read_apart: bool = True
    detached_data: bool = False
    log: str = logs.TEXT
    log_names: str | None = None
    double_reading: bool = False
    metrics: str = ADMINISTRATORS
    metrics_token_file: Path | None = None

    def list_devices(self) -> dict[str, str | None]:
        """What computes: what it is called in messages -> what torch calls it, None for the best there is.

        Example:
            >>> ServerOptions(Path("store"), devices=("cuda:0", "cpu", "cpu")).list_devices()
            {'cuda:0': 'cuda:0', 'cpu': 'cpu', 'cpu (2)': 'cpu'}
        """
        if not self.devices:
            return {self.device or "the device": self.device}
        named: dict[str, str | None] = {}
        for device in self.devices:
            count = sum(other == device for other in named.values())
            named[f"{device} ({count + 1})" if count else device] = device
        return named

    @property
    def training_device(self) -> str | None:
        """What trainings run on: of several devices the last one, since requests take the first that is idle."""
        return self.devices[-1] if self.devices else self.device

    @classmethod
    # long because it is a table: one option after the other
    def from_conf(cls, conf: Mapping[str, str], studies: str) -> ServerOptions:
        """Read the strings of `--conf name value`.

        Raises:
            RequestError: if a name is neither ours nor MONAI Label's, or a value makes no sense; the message names the
                option.
        """
        _check_names(conf, [field.name for field in dataclasses.fields(cls)])
        given = {name: str(value).strip() for name, value in conf.items() if str(value).strip()}
        device = given.get("device", "auto").lower()
        if device != "auto" and not _DEVICE.fullmatch(device):
            raise RequestError(f"--conf device {device}: it must be auto, cpu, mps, cuda or cuda:<number>.")
        model_dir = _read_path(given, "model_dir")
        if model_dir is not None and not model_dir.is_dir():
            raise RequestError(
                f"--conf model_dir {model_dir}: no such folder. `progidiff train` writes "
                "one; leave it out for the embedded model."
            )
        return cls(
            store=_read_path(given, "store") or default_store(studies),
            model_dir=model_dir,
            backbone=given.get("backbone"),
            device=None if device == "auto" else device,
            devices=_read_devices(given),
            at_once=read_int(given["at_once"], "--conf at_once", 1, 16_384) if "at_once" in given else None,
            warm_up=read_bool(given.get("warm_up", cls.warm_up), "--conf warm_up"),
            cpu_fallback=read_bool(given.get("cpu_fallback", cls.cpu_fallback), "--conf cpu_fallback"),
            max_proposals=read_int(
                given.get("max_proposals", cls.max_proposals), "--conf max_proposals", 1, MAX_PROPOSALS
            ),
            max_waiting=read_int(given.get("max_waiting", cls.max_waiting), "--conf max_waiting", 0, 30),
            adapters=_read_path(given, "adapters"),
            textdiff=_read_path(given, "textdiff"),
            store_gb=read_float(given.get("store_gb", cls.store_gb), "--conf store_gb", 0.01, 1e6),
            token_file=_read_path(given, "token_file"),
            users_file=_read_path(given, "users_file"),
            oidc_file=_read_path(given, "oidc_file"),
            login=read_choice(given.get("login", cls.login), "--conf login", (TOKEN, OFF)),
            allow_anonymous=_read_anonymous(given.get("allow_anonymous", "false")),
            session_hours=read_float(given.get("session_hours", cls.session_hours), "--conf session_hours", 0.1, 720),
            hosts=_read_list(
                given.get("hosts", ""), "hosts", _HOST, "names without port, for example labels.example.org"
            ),
            cors_origins=_read_list(
                given.get("cors_origins", ""),
                "cors_origins",
                _ORIGIN,
                "origins such as https://viewer.example.org:3000",
            ),
            header_seconds=read_float(
                given.get("header_seconds", cls.header_seconds), "--conf header_seconds", 0.1, 300
            ),
            connections_per_address=read_int(
                given.get("connections_per_address", cls.connections_per_address),
                "--conf connections_per_address",
                8,
                10_000,
            ),
            max_upload_gb=read_float(
                given.get("max_upload_gb", cls.max_upload_gb), "--conf max_upload_gb", 0.001, 1000
            ),
            score_pool=read_choice(given.get("score_pool", cls.score_pool), "--conf score_pool", ("auto", "on", "off")),
            score_prompt=given.get("score_prompt", cls.score_prompt),
            reserve_minutes=read_float(
                given.get("reserve_minutes", cls.reserve_minutes), "--conf reserve_minutes", 0.1, 1440
            ),
            next_strategy=given.get("next_strategy", cls.next_strategy),
            training_nice=read_int(given.get("training_nice", cls.training_nice), "--conf training_nice", 0, 19),
            acquisition=given.get("acquisition", cls.acquisition),
            retrain_after=read_int(given.get("retrain_after", cls.retrain_after), "--conf retrain_after", 0, 1_000_000),
            retrain_task=given.get("retrain_task", cls.retrain_task),
            retrain_params=given.get("retrain_params", cls.retrain_params),
            clean_up=read_choice(given.get("clean_up", cls.clean_up), "--conf clean_up", CLEAN_UPS),
            read_apart=read_bool(given.get("read_apart", cls.read_apart), "--conf read_apart"),
            double_reading=_read_double_reading(given),
            detached_data=read_bool(given.get("detached_data", cls.detached_data), "--conf detached_data"),
            log=read_choice(given.get("log", cls.log), "--conf log", (logs.TEXT, logs.JSON)),
            log_names=(
                read_choice(given["log_names"], "--conf log_names", (logs.HASHED, logs.PLAIN))
                if "log_names" in given
                else None
            ),
            metrics=read_choice(given.get("metrics", cls.metrics), "--conf metrics", (ADMINISTRATORS, EVERYBODY, OFF)),
            metrics_token_file=_read_path(given, "metrics_token_file"),
        )


def _read_devices(given: Mapping[str, str]) -> tuple[str, ...]:
    """Several devices; "all" stands for every CUDA device of this machine."""
    text = given.get("devices", "").lower()
    if not text:
        return ()
    if given.get("device", "auto").lower() != "auto":
        raise RequestError("--conf device and --conf devices say the same thing twice; leave one of them out.")
    import torch

    count = torch.cuda.device_count()
    if text == "all":
        if not count:
            raise RequestError("--conf devices all: torch sees no CUDA device here; leave it out for the processor.")
        return tuple(f"cuda:{index}" for index in range(count))
    names = _read_list(text, "devices", _DEVICE, "devices, for example cuda:0,cuda:1")
    if not names:
        raise RequestError("--conf devices names none; write for example cuda:0,cuda:1, or leave it out.")
    twice = sorted({name for name in names if names.count(name) > 1 and name != "cpu"})
    if twice or {"cuda", "cuda:0"} <= set(names):
        named = twice[0] if twice else "cuda, which is cuda:0,"
        raise RequestError(
            f"--conf devices {text[:80]}: {named} is named twice; each computes one request at a time, name it once."
        )
    absent = [name for name in names if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= count]
    if absent:
        raise RequestError(
            f"--conf devices {text[:80]}: torch sees {count} CUDA device{'' if count == 1 else 's'} here, and no "
            f"{absent[0]}."
        )
    return names


def _read_double_reading(given: Mapping[str, str]) -> bool:
    is_on = read_bool(given.get("double_reading", False), "--conf double_reading")
    if is_on and "users_file" not in given and "token_file" not in given:
        raise RequestError(
            "--conf double_reading on: a reading needs somebody's name. Name a file of users too: --conf users_file "
            "FILE; `progidiff users add` makes one."
        )
    return is_on


def _check_names(conf: Mapping[str, str], known: Sequence[str]) -> None:
    for name in conf:
        if name not in known and name not in _HOST_CONF:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}."
            raise RequestError(f"--conf {name[:60]}: there is no such option. {meant}")


def _read_path(given: Mapping[str, str], name: str) -> Path | None:
    return Path(given[name]).expanduser() if name in given else None


def _read_anonymous(text: str) -> Role | None:
    """`true` is enough to annotate; whoever wants strangers to delete labels has to write `administer`."""
    choice = read_choice(text, "--conf allow_anonymous", ("false", "true", *Role))
    return None if choice == "false" else Role.ANNOTATE if choice == "true" else Role(choice)


def _read_list(text: str, name: str, pattern: re.Pattern[str], what: str) -> tuple[str, ...]:
    entries = tuple(entry.strip().lower() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if not pattern.fullmatch(entry):
            raise RequestError(f"--conf {name} has '{entry[:80]}'; it must be a comma-separated list of {what}.")
    return entries
