"""Options as they arrive, checked and typed: of the server (`--conf name value`) and of one request (form field `params`).

Viewers send what their widgets hold: numbers as text, a choice as text or as the whole list of choices, booleans as text.
Everything is read tolerantly where the meaning is clear and refused with a cure where it is not.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progidiff.clean_up import CLEAN_UPS, SMALL
from progidiff.errors import RequestError
from progidiff.prompts import STRUCTURES
from progidiff.users import Role

CONSENSUS = "consensus"
BEST = "best"
DISAGREEMENT = "disagreement"

DEFAULT_CLEAN_UP = SMALL
"""What the command line and the server drop from proposals unless told otherwise; benchmarks/notes.md says why."""

DEFAULT_STRATEGY = "foreground_random"
"""How slices are chosen where nobody says how: what did best in ``benchmarks/active_learning.py``, see the README."""

AUTO = "auto"
NONE = "none"
"""What the option adapter may be beside the names of adapters: chosen by modality, or the model itself."""

MAX_PROPOSALS = 64
MAX_STEPS = 50
MAX_SEED = 2**32 - 1
MAX_SLICE = 2**20
RESULT_EXTENSIONS = (".nii.gz", ".nii", ".nrrd")

_HOST_CONF = ("server_mode",)
"""Names of `--conf` that MONAI Label's base class reads. Others that it knows belong to its bundles, which this app has none of."""

_ORIGIN = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_RESERVED = (
    "model",
    "image",
    "image_id",
    "session",
    "session_id",
    "device",
    "file",
    "label_tag",
    "result_dir",
    "model_dir",
    "backbone",
    "store",
    "adapters",
)
_ALIASES = {"num_inference_steps": "steps", "k": "num_proposals"}
OPTION_NAMES = (
    "prompt",
    "label_prompt",
    "num_proposals",
    "show",
    "steps",
    "seed",
    "guidance_scale",
    "adapter",
    "modality",
    "allow_free_text",
    "clean_up",
    "save_original",
    "save_proposals",
    "first_slice",
    "result_extension",
    "job_id",
)
"""Every option that a request may carry in `params`."""


def read_int(value: object, name: str, low: int, high: int) -> int:
    """A whole number in low..high, from a number or its text.

    Raises:
        RequestError: if it is none, or out of range.

    Example:
        >>> read_int("4", "num_proposals", 1, 16)
        4
    """
    number: int | None = None
    if isinstance(value, str):
        try:
            number = int(value.strip())
        except ValueError:
            number = None
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if number is None or not low <= number <= high:
        raise RequestError(f"Option {name} is {_show(value)}; it must be a whole number from {low} to {high}.")
    return number


def read_float(value: object, name: str, low: float, high: float) -> float:
    """A number in low..high, from a number or its text.

    Raises:
        RequestError: if it is none, or out of range.
    """
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not low <= number <= high:
        raise RequestError(f"Option {name} is {_show(value)}; it must be a number from {low:g} to {high:g}.")
    return number


def read_bool(value: object, name: str) -> bool:
    """True or false, from a boolean, 0 or 1, or their text.

    Raises:
        RequestError: if it is none of these.
    """
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0", ""):
        return False
    raise RequestError(f"Option {name} is {_show(value)}; it must be true or false.")


def read_choice(value: object, name: str, choices: Sequence[str]) -> str:
    """One of the choices, whatever its case. A list, as untouched widgets send it, stands for its first entry.

    Raises:
        RequestError: if it is none of them.
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    for choice in choices:
        if text == choice.lower():
            return choice
    raise RequestError(f"Option {name} is {_show(value)}; it must be one of {', '.join(choices)}.")


@dataclass(frozen=True)
class ServerOptions:
    """What `--conf` sets for the life of the server.

    Attributes:
        store: Folder of the kept proposals. Default: `.progidiff` in the studies folder, where MONAI Label does not look for images,
            or `~/.cache/progidiff/<hash>` if the studies are behind a DICOMweb address.
        model_dir: Folder of backbone and conditioning weights; None for the embedded ones.
        backbone: A Stable-Diffusion folder or hub id to use instead of the backbone in `model_dir`; None for that one.
        device: "cpu", "cuda", "cuda:<n>" or "mps"; None to take the best there is.
        cpu_fallback: Whether a request that does not fit into the device's memory, one slice at a time, is answered by the processor.
        max_proposals: Largest K of a request, 1..64.
        max_waiting: Requests that may wait for the device, 0..30.
        adapters: Folder of adapters; None for `adapters` in the model folder.
        textdiff: Folder of textdiff models; None for `textdiff` in the model folder.
        store_gb: Size that the store may grow to before the oldest proposals go, in GB.
        token_file: Tokens that open the server to other hosts, see `progidiff.users.read_tokens`.
        users_file: Users with hashed passwords, see `progidiff.users.UsersFile`.
        allow_anonymous: What somebody without a login may do from another host; None for nothing. "true" means annotate.
        session_hours: How long a login lasts, in hours, 0.1..720.
        hosts: Names, without a port, that browsers may call this server by, beside localhost and addresses.
        cors_origins: Pages of these origins ("https://viewer.example.org") may call this server from a browser; otherwise only its own.
        max_upload_gb: Largest body of a request that brings an image or a label, in GB.
        score_pool: Whether images are scored in the background: "on", "off", or "auto": if they lie in a folder (behind a DICOMweb
            address all of them would have to be fetched).
        score_prompt: The structures to score, as a request names them.
        reserve_minutes: How long an image stays with the client that got it as next sample, 0.1..1440.
        training_nice: How far trainings step back from requests on the processor, 0 (not at all) to 19.
        next_strategy: What the strategy `random` stands for, see `progidiff.acquisition.STRATEGIES`.
        acquisition: Settings of the choice of slices, "name=value,name=value", see `progidiff.acquisition.AcquisitionConfig`.
        retrain_after: Newly annotated slices after which a training starts by itself; 0 for never.
        retrain_task: The trainer that starts then; "auto" for textdiff where pictures and progidiff_adapt where volumes were labelled.
        clean_up: How islands are dropped from proposals where a request does not say, see `progidiff.clean_up`.
        retrain_params: Its parameters, "name=value,name=value", see `progidiff.training_options.TrainingOptions`.
    """

    store: Path
    model_dir: Path | None = None
    backbone: str | None = None
    device: str | None = None
    cpu_fallback: bool = False
    max_proposals: int = 16
    max_waiting: int = 8
    store_gb: float = 10.0
    adapters: Path | None = None
    textdiff: Path | None = None
    token_file: Path | None = None
    users_file: Path | None = None
    allow_anonymous: Role | None = None
    session_hours: float = 12.0
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
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

    @classmethod
    def from_conf(cls, conf: Mapping[str, str], studies: str) -> ServerOptions:
        """Read the strings of `--conf name value`.

        Raises:
            RequestError: if a name is neither ours nor MONAI Label's, or a value makes no sense; the message names the option.
        """
        _check_names(conf, [field.name for field in dataclasses.fields(cls)])
        given = {name: str(value).strip() for name, value in conf.items() if str(value).strip()}
        device = given.get("device", "auto").lower()
        if device != "auto" and not _DEVICE.fullmatch(device):
            raise RequestError(f"--conf device {device}: it must be auto, cpu, mps, cuda or cuda:<number>.")
        model_dir = Path(given["model_dir"]).expanduser() if "model_dir" in given else None
        if model_dir is not None and not model_dir.is_dir():
            raise RequestError(f"--conf model_dir {model_dir}: no such folder. `progidiff train` writes one; leave it out for the embedded model.")
        return cls(
            store=Path(given["store"]).expanduser() if "store" in given else default_store(studies),
            model_dir=model_dir,
            backbone=given.get("backbone"),
            device=None if device == "auto" else device,
            cpu_fallback=read_bool(given.get("cpu_fallback", cls.cpu_fallback), "--conf cpu_fallback"),
            max_proposals=read_int(given.get("max_proposals", cls.max_proposals), "--conf max_proposals", 1, MAX_PROPOSALS),
            max_waiting=read_int(given.get("max_waiting", cls.max_waiting), "--conf max_waiting", 0, 30),
            adapters=Path(given["adapters"]).expanduser() if "adapters" in given else None,
            textdiff=Path(given["textdiff"]).expanduser() if "textdiff" in given else None,
            store_gb=read_float(given.get("store_gb", cls.store_gb), "--conf store_gb", 0.01, 1e6),
            token_file=Path(given["token_file"]).expanduser() if "token_file" in given else None,
            users_file=Path(given["users_file"]).expanduser() if "users_file" in given else None,
            allow_anonymous=_read_anonymous(given.get("allow_anonymous", "false")),
            session_hours=read_float(given.get("session_hours", cls.session_hours), "--conf session_hours", 0.1, 720),
            hosts=_read_list(given.get("hosts", ""), "hosts", _HOST, "names without port, for example labels.example.org"),
            cors_origins=_read_list(given.get("cors_origins", ""), "cors_origins", _ORIGIN, "origins such as https://viewer.example.org:3000"),
            max_upload_gb=read_float(given.get("max_upload_gb", cls.max_upload_gb), "--conf max_upload_gb", 0.001, 1000),
            score_pool=read_choice(given.get("score_pool", cls.score_pool), "--conf score_pool", ("auto", "on", "off")),
            score_prompt=given.get("score_prompt", cls.score_prompt),
            reserve_minutes=read_float(given.get("reserve_minutes", cls.reserve_minutes), "--conf reserve_minutes", 0.1, 1440),
            next_strategy=given.get("next_strategy", cls.next_strategy),
            training_nice=read_int(given.get("training_nice", cls.training_nice), "--conf training_nice", 0, 19),
            acquisition=given.get("acquisition", cls.acquisition),
            retrain_after=read_int(given.get("retrain_after", cls.retrain_after), "--conf retrain_after", 0, 1_000_000),
            retrain_task=given.get("retrain_task", cls.retrain_task),
            retrain_params=given.get("retrain_params", cls.retrain_params),
            clean_up=read_choice(given.get("clean_up", cls.clean_up), "--conf clean_up", CLEAN_UPS),
        )


def _check_names(conf: Mapping[str, str], known: Sequence[str]) -> None:
    for name in conf:
        if name not in known and name not in _HOST_CONF:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}."
            raise RequestError(f"--conf {name[:60]}: there is no such option. {meant}")


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


def default_store(studies: str) -> Path:
    """Where proposals are kept if `--conf store` does not say; see `ServerOptions.store`."""
    if studies.startswith(("http://", "https://")):
        return Path.home() / ".cache" / "progidiff" / hashlib.sha256(studies.encode()).hexdigest()[:16]
    return Path(studies) / ".progidiff"


@dataclass(frozen=True)
class InferOptions:
    """What one request asks for.

    Attributes:
        prompt: Free text naming structures. OHIF's "Class Prompts" send their label ids as `label_prompt` instead, which wins:
            OHIF sends along what was once typed into the options.
        num_proposals: K.
        show: "consensus", "best", "1".."K" or "disagreement".
        steps: Denoising steps; None for the model's default.
        seed: 0..2**32 - 1.
        guidance_scale: Classifier-free guidance; None for the model's default.
        adapter: A name, ``name@version`` or "none"; None to have it chosen by the image's modality.
        modality: "CT", "MR", or None to find out.
        allow_free_text: Send an unknown prompt through the text encoder instead of refusing it.
        clean_up: How islands are dropped from every proposal once all slices are there: "off", "small" or "largest", see
            `progidiff.clean_up`.
        save_original: Also save the consensus as the image's label of tag `original`.
        save_proposals: The same, and every proposal as tag `proposal_1` .. `proposal_K`.
        first_slice: The axial index that somebody looks at, to be computed first; None for any order.
        result_extension: ".nii.gz", ".nii" or ".nrrd".
        job_id: The client's name for the job, None to have one made up.
        ignored: Names of parameters that mean nothing to this task.
    """

    prompt: str
    num_proposals: int
    show: str
    steps: int | None
    seed: int
    guidance_scale: float | None
    adapter: str | None
    modality: str | None
    allow_free_text: bool
    clean_up: str
    save_original: bool
    save_proposals: bool
    first_slice: int | None
    result_extension: str
    job_id: str | None
    ignored: tuple[str, ...]

    @classmethod
    def from_params(cls, params: Mapping[str, Any], defaults: Mapping[str, Any], max_proposals: int, adapters: Sequence[str]) -> InferOptions:
        """Read the parameters of a request.

        Args:
            params: As sent.
            defaults: For what was not sent (OHIF sends changed options only); the same names.
            max_proposals: Largest K allowed.
            adapters: What may be asked for, see `AUTO`, `NONE`; the first is the default.

        Raises:
            RequestError: if a parameter is reserved, malformed or out of range.

        Example:
            >>> options = InferOptions.from_params({"prompt": "liver", "num_proposals": "4", "show": 2}, {}, 16, ["base"])
            >>> options.num_proposals, options.show, options.seed
            (4, '2', 0)
        """
        sent = {_ALIASES.get(name, name): value for name, value in params.items()}
        for name in _RESERVED:
            if name in sent:
                raise RequestError(f"Option {name} cannot be set by a request; image, session and model go into the address, the rest into --conf.")
        values = {**defaults, **{name: value for name, value in sent.items() if value is not None}}
        num_proposals = read_int(values.get("num_proposals", 4), "num_proposals", 1, max_proposals)
        steps = values.get("steps")
        guidance = values.get("guidance_scale")
        job_id = values.get("job_id")
        first_slice = values.get("first_slice")
        adapter = _read_adapter(values.get("adapter", adapters[0]), adapters) if adapters else None
        modality = read_choice(values.get("modality", "auto"), "modality", ("auto", "CT", "MR"))
        return cls(
            prompt=_read_label_prompt(sent.get("label_prompt")) or _read_prompt(values.get("prompt")),
            num_proposals=num_proposals,
            show=_read_show(values.get("show", CONSENSUS), num_proposals),
            steps=None if steps is None else read_int(steps, "steps", 1, MAX_STEPS),
            seed=read_int(values.get("seed", 0), "seed", 0, MAX_SEED),
            guidance_scale=None if guidance is None else read_float(guidance, "guidance_scale", 0.0, 20.0),
            adapter=adapter,
            modality=None if modality == "auto" else modality,
            allow_free_text=read_bool(values.get("allow_free_text", False), "allow_free_text"),
            clean_up=read_choice(values.get("clean_up", DEFAULT_CLEAN_UP), "clean_up", CLEAN_UPS),
            save_original=read_bool(values.get("save_original", False), "save_original"),
            save_proposals=read_bool(values.get("save_proposals", False), "save_proposals"),
            first_slice=None if first_slice is None else read_int(first_slice, "first_slice", 0, MAX_SLICE),
            result_extension=read_choice(values.get("result_extension", RESULT_EXTENSIONS[0]), "result_extension", RESULT_EXTENSIONS),
            job_id=None if job_id is None else str(job_id),
            ignored=tuple(sorted(name for name in sent if name not in OPTION_NAMES)),
        )


def _read_adapter(value: object, choices: Sequence[str]) -> str | None:
    """One of the choices, or a version of one; whether there is such a version is known to whoever holds them."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else AUTO
    if value == "":
        return None
    name, at, version = value.strip().partition("@") if isinstance(value, str) and value not in choices else (value, "", "")
    choice = read_choice(name if at and name not in (AUTO, NONE) else value, "adapter", choices)
    return None if choice == AUTO else choice + at + version


def _read_label_prompt(value: object) -> str:
    """The structures of some label ids, as a prompt; "" if there are none."""
    if value is None or value == "":
        return ""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return "; ".join(STRUCTURES[read_int(item, "label_prompt", 1, len(STRUCTURES)) - 1] for item in items)


def _read_prompt(value: object) -> str:
    """The prompt's text; several prompts in a list are one that names them all."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = "; ".join(value)
    if value is None:
        raise RequestError("Option prompt is missing. Name a structure, for example 'liver', or write 'all'.")
    if not isinstance(value, str):
        raise RequestError(f"Option prompt is {_show(value)}; it must be text, for example 'liver and spleen'.")
    return value


def _read_show(value: object, num_proposals: int) -> str:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else CONSENSUS
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
        if text in (CONSENSUS, BEST, DISAGREEMENT):
            return text
        index = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if 1 <= index <= num_proposals:
            return str(index)
        if index > num_proposals:
            raise RequestError(f"Proposal {index} cannot be shown, only {num_proposals} are asked for. Raise num_proposals or show a lower one.")
    raise RequestError(f"Option show is {_show(value)}; it must be consensus, best, disagreement, or a proposal from 1 to {num_proposals}.")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
