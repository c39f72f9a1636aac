"""What one request for proposals asks for, checked and typed (form field `params`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from progidiff.errors import RequestError
from progidiff.images.formats import Use, list_suffixes
from progidiff.images.modality import list_modalities
from progidiff.params import read_bool, read_choice, read_float, read_int, show_value
from progidiff.prompts.structures import LAST_LABEL_ID, name_label_id
from progidiff.proposals.islands import CLEAN_UPS, SMALL

CONSENSUS = "consensus"


BEST = "best"


DISAGREEMENT = "disagreement"


DEFAULT_CLEAN_UP = SMALL
"""What the command line and the server drop from proposals unless told otherwise; benchmarks/notes.md says why."""


AUTO = "auto"


NONE = "none"
"""What the option adapter may be beside the names of adapters: chosen by modality, or the model itself."""


MAX_PROPOSALS = 64


MAX_STEPS = 50


MAX_SEED = 2**32 - 1


MAX_SLICE = 2**20


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


@dataclass(frozen=True)
class InferOptions:
    """What one request asks for.

    Attributes:
        prompt: Free text naming structures. OHIF's "Class Prompts" send their label ids as `label_prompt` instead,
            which wins: OHIF sends along what was once typed into the options.
        num_proposals: K.
        show: "consensus", "best", "1".."K" or "disagreement".
        steps: Denoising steps; None for the model's default.
        seed: 0..2**32 - 1.
        guidance_scale: Classifier-free guidance; None for the model's default.
        adapter: A name, ``name@version`` or "none"; None to have it chosen by the image's modality.
        modality: "CT", "MR", or None to find out.
        allow_free_text: Send an unknown prompt through the text encoder instead of refusing it.
        clean_up: How islands are dropped from every proposal once all slices are there: "off", "small" or "largest",
            see `progidiff.proposals.islands`.
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
    def from_params(
        cls, params: Mapping[str, Any], defaults: Mapping[str, Any], max_proposals: int, adapters: Sequence[str]
    ) -> InferOptions:
        """Read the parameters of a request.

        Args:
            params: As sent.
            defaults: For what was not sent (OHIF sends changed options only); the same names.
            max_proposals: Largest K allowed.
            adapters: What may be asked for, see `AUTO`, `NONE`; the first is the default.

        Raises:
            RequestError: if a parameter is reserved, malformed or out of range.

        Example:
            >>> options = InferOptions.from_params({"prompt": "liver", "num_proposals": "4", "show": 2}, {}, 16,
            ...     ["base"])
            >>> options.num_proposals, options.show, options.seed
            (4, '2', 0)
        """
        sent = {_ALIASES.get(name, name): value for name, value in params.items()}
        for name in _RESERVED:
            if name in sent:
                raise RequestError(
                    f"Option {name} cannot be set by a request; image, session and model "
                    "go into the address, the rest into --conf."
                )
        values = {**defaults, **{name: value for name, value in sent.items() if value is not None}}
        num_proposals = read_int(values.get("num_proposals", 4), "num_proposals", 1, max_proposals)
        steps = values.get("steps")
        guidance = values.get("guidance_scale")
        job_id = values.get("job_id")
        first_slice = values.get("first_slice")
        extensions = list_suffixes(Use.ANSWER, "volume")
        adapter = _read_adapter(values.get("adapter", adapters[0]), adapters) if adapters else None
        modality = read_choice(values.get("modality", AUTO), "modality", (AUTO, *list_modalities()))
        return cls(
            prompt=_read_label_prompt(sent.get("label_prompt")) or _read_prompt(values.get("prompt")),
            num_proposals=num_proposals,
            show=_read_show(values.get("show", CONSENSUS), num_proposals),
            steps=None if steps is None else read_int(steps, "steps", 1, MAX_STEPS),
            seed=read_int(values.get("seed", 0), "seed", 0, MAX_SEED),
            guidance_scale=None if guidance is None else read_float(guidance, "guidance_scale", 0.0, 20.0),
            adapter=adapter,
            modality=None if modality == AUTO else modality,
            allow_free_text=read_bool(values.get("allow_free_text", False), "allow_free_text"),
            clean_up=read_choice(values.get("clean_up", DEFAULT_CLEAN_UP), "clean_up", CLEAN_UPS),
            save_original=read_bool(values.get("save_original", False), "save_original"),
            save_proposals=read_bool(values.get("save_proposals", False), "save_proposals"),
            first_slice=None if first_slice is None else read_int(first_slice, "first_slice", 0, MAX_SLICE),
            result_extension=read_choice(values.get("result_extension", extensions[0]), "result_extension", extensions),
            job_id=None if job_id is None else str(job_id),
            ignored=tuple(sorted(name for name in sent if name not in OPTION_NAMES)),
        )


def _read_adapter(value: object, choices: Sequence[str]) -> str | None:
    """One of the choices, or a version of one; whether there is such a version is known to whoever holds them."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else AUTO
    if value == "":
        return None
    name, at, version = (
        value.strip().partition("@") if isinstance(value, str) and value not in choices else (value, "", "")
    )
    choice = read_choice(name if at and name not in (AUTO, NONE) else value, "adapter", choices)
    return None if choice == AUTO else choice + at + version


def _read_label_prompt(value: object) -> str:
    """The structures of some label ids, as a prompt; "" if there are none."""
    if value is None or value == "":
        return ""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    numbers = [read_int(item, "label_prompt", 1, LAST_LABEL_ID) for item in items]
    return "; ".join(name for name in map(name_label_id, numbers) if name is not None)


def _read_prompt(value: object) -> str:
    """The prompt's text; several prompts in a list are one that names them all."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = "; ".join(value)
    if value is None:
        raise RequestError("Option prompt is missing. Name a structure, for example 'liver', or write 'all'.")
    if not isinstance(value, str):
        raise RequestError(f"Option prompt is {show_value(value)}; it must be text, for example 'liver and spleen'.")
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
            raise RequestError(
                f"Proposal {index} cannot be shown, only {num_proposals} are asked for. "
                "Raise num_proposals or show a lower one."
            )
    raise RequestError(
        f"Option show is {show_value(value)}; it must be consensus, best, disagreement, "
        f"or a proposal from 1 to {num_proposals}."
    )
