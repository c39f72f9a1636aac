"""What a request for proposals asks for.

`ProposalRequest` is what the model is asked, and under which key the answer is kept. `InferOptions` reads one from the
form field `params` of a client, with what to show and to save of the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from progidiff.errors import RequestError
from progidiff.images.formats import Use, list_suffixes
from progidiff.images.modality import list_modalities
from progidiff.params import read_bool, read_choice, read_float, read_int, show_value
from progidiff.prompts.parser import Query
from progidiff.prompts.structures import LAST_LABEL_ID, name_label_id
from progidiff.proposals.edits import Edit, describe_edits, read_edits
from progidiff.proposals.islands import CLEAN_UPS, OFF, SMALL, check_clean_up

FORMAT = 1
"""Version of what is kept: of the files that `VolumeProposals.to_files` writes, and of the keys."""

CONSENSUS = "consensus"

BEST = "best"

DISAGREEMENT = "disagreement"

AGREEMENT = "agreement"

PROBABILITY = "probability"
"""What `show` may be beside proposals where the agreement was compared with the truth."""

DEFAULT_CLEAN_UP = SMALL
"""What the command line and the server drop from proposals unless told otherwise; benchmarks/notes.md says why."""

AUTO = "auto"

NONE = "none"
"""What the option adapter may be beside the names of adapters: chosen by modality, or the model itself."""

DEFAULT_NUM_PROPOSALS = 4
"""K of a request that does not say, and of the scores."""

MAX_PROPOSALS = 64

MAX_STEPS = 50

MAX_GUIDANCE = 20.0

MAX_SEED = 2**32 - 1
"""Of a client's request; the model takes any below 2**63."""

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
    "store",
)
"""What no client may set."""

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
    "edits",
    "job_id",
)
"""Every option that a request may carry in `params`."""


class ProposalRequest(BaseModel):
    """What a model is asked about one image.

    Nothing else decides what the proposals are: two equal requests about the same voxels get the same bits. A request
    that leaves something to the model is settled (`settle`) before it has a key.

    Attributes:
        queries: P structures, from `progidiff.prompts.parser.parse_prompt`; at least one.
        num_proposals: K, 1..64.
        num_inference_steps: T, 1..50; None for the model's default.
        seed: Of the noise, 0..2**63 - 1.
        guidance_scale: 0..20, 1 for none; None for the model's default.
        adapter: A name, ``name@version``, "none" for the model itself; None, "" or "auto" to have it chosen by the
            image's modality.
        clean_up: How islands are dropped from every proposal (`progidiff.proposals.islands`), once all slices are
            there. Some `slices` alone are never cleaned: what they hold may hang together on the others.
        slices: Only these axial indices, ascending; None for all.
        edits: What a person drew; proposals are drawn given them, and the voxels of clicks and lines are kept exactly.

    Raises:
        RequestError: if a value is out of range; the message names it and what was given.

    Example:
        >>> ProposalRequest(queries=[Query("liver", "liver")], num_proposals=2, slices=[5, 3, 3]).slices
        (3, 5)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: tuple[Query, ...]
    num_proposals: int = DEFAULT_NUM_PROPOSALS
    num_inference_steps: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    adapter: str | None = None
    clean_up: str = OFF
    slices: tuple[int, ...] | None = None
    edits: tuple[Edit, ...] = ()

    @field_validator("queries")
    @classmethod
    def _check_queries(cls, value: tuple[Query, ...]) -> tuple[Query, ...]:
        if not value:
            raise RequestError("No structure was asked for; give at least one prompt.")
        return value

    @field_validator("num_proposals")
    @classmethod
    def _check_num_proposals(cls, value: int) -> int:
        if not 1 <= value <= MAX_PROPOSALS:
            raise RequestError(f"num_proposals must lie in 1..{MAX_PROPOSALS}, got {value}; 4 to 8 are useful.")
        return value

    @field_validator("num_inference_steps")
    @classmethod
    def _check_steps(cls, value: int | None) -> int | None:
        if value is not None and not 1 <= value <= MAX_STEPS:
            raise RequestError(f"num_inference_steps must lie in 1..{MAX_STEPS}, got {value}; 1 to 8 are useful.")
        return value

    @field_validator("seed")
    @classmethod
    def _check_seed(cls, value: int) -> int:
        if not 0 <= value < 2**63:
            raise RequestError(f"seed must lie in 0..2**63 - 1, got {value}.")
        return value

    @field_validator("guidance_scale")
    @classmethod
    def _check_guidance(cls, value: float | None) -> float | None:
        if value is not None and not 0.0 <= value <= MAX_GUIDANCE:
            raise RequestError(f"guidance_scale must lie in 0..{MAX_GUIDANCE:g}, got {value}; 1 switches guidance off.")
        return value

    @field_validator("clean_up")
    @classmethod
    def _check_clean_up(cls, value: str) -> str:
        return check_clean_up(value)

    @field_validator("slices", mode="before")
    @classmethod
    def _sort_slices(cls, value: Iterable[int] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(sorted({int(z) for z in value}))

    def settle(self, num_inference_steps: int, guidance_scale: float, adapter: str) -> ProposalRequest:
        """The same request with nothing left to the model.

        Args:
            num_inference_steps: The model's default.
            guidance_scale: The model's default.
            adapter: Full name of the version that answers; "" for the model itself.
        """
        return self.model_copy(
            update={
                "num_inference_steps": self.num_inference_steps or num_inference_steps,
                "guidance_scale": guidance_scale if self.guidance_scale is None else self.guidance_scale,
                "adapter": adapter or NONE,
            }
        )

    def settled(self) -> tuple[int, float]:
        """Steps and guidance of a settled request.

        Raises:
            RequestError: if something is left to the model, see `settle`.
        """
        if self.num_inference_steps is None or self.guidance_scale is None or self.adapter in (None, "", AUTO):
            raise RequestError(
                "The request leaves steps, guidance or adapter to the model, and its answer is not determined yet. "
                "Settle it first."
            )
        return self.num_inference_steps, self.guidance_scale

    def key(self, image_id: str, image_digest: str, model_version: str) -> str:
        """SHA-256 (hexadecimal) of everything that the answer depends on.

        Args:
            image_id: Of the datastore, "" for an upload.
            image_digest: Of the voxels, their grid and modality, see `Volume.digest`.
            model_version: ``name@version`` of the model.

        Raises:
            RequestError: if something is left to the model, see `settle`.

        Example:
            >>> from progidiff.prompts.parser import parse_prompt
            >>> first, same, other = (
            ...     ProposalRequest(queries=parse_prompt(prompt), seed=seed).settle(4, 1.0, "").key("a", "00", "base@1")
            ...     for prompt, seed in (("liver", 0), ("hepatic parenchyma", 0), ("liver", 1))
            ... )
            >>> first == same, first == other
            (True, False)
        """
        return self._compute_key(self.queries, image_id, image_digest, model_version)

    def whole_key(self, image_id: str, image_digest: str, model_version: str) -> str:
        """`key` without the structures: requests that share it are parts of one another, since noise and offsets are
        drawn for the slice and not for the structure.
        """
        return self._compute_key((), image_id, image_digest, model_version)

    def _compute_key(self, queries: Sequence[Query], image_id: str, image_digest: str, model_version: str) -> str:
        steps, guidance = self.settled()
        parts: list[Any] = [
            FORMAT,
            image_id,
            image_digest,
            [[query.name, query.text, query.known] for query in queries],
            self.num_proposals,
            steps,
            self.seed,
            guidance,
            model_version,
            "" if self.adapter == NONE else self.adapter,
        ]
        # What came later is in a key only where it was asked for: what earlier versions kept is still found.
        if self.clean_up != OFF:
            parts.append(self.clean_up)
        if self.slices is not None:
            parts.append({"slices": self.slices})
        if self.edits:
            parts.append({"edits": describe_edits(self.edits)})
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What a request of any kind says of its answer.

    Attributes:
        num_proposals: K.
        show: "consensus", "best", "1".."K", "disagreement", "probability", or what else the task shows.
        modality: "CT", "MR", or None to find out.
        save_original: Also save the consensus as the image's label of tag `original`.
        save_proposals: The same, and every proposal as tag `proposal_1` .. `proposal_K`.
        job_id: The client's name for the job, None to have one made up.
        ignored: Names of parameters that mean nothing to this task.
    """

    num_proposals: int
    show: str
    modality: str | None
    save_original: bool
    save_proposals: bool
    job_id: str | None
    ignored: tuple[str, ...]


def read_answer_options(
    values: Mapping[str, Any],
    sent: Iterable[str],
    known: Sequence[str],
    max_proposals: int,
    also_reserved: Sequence[str] = (),
) -> dict[str, Any]:
    """The fields of `AnswerOptions`, but for `show`.

    Args:
        values: What was sent, and defaults.
        sent: Names of what was sent.
        known: Names of what means something to the task.
        max_proposals: Largest K allowed.
        also_reserved: Names beside those that no task takes from a client.

    Raises:
        RequestError: if a parameter is reserved, malformed or out of range.
    """
    sent = sorted(str(name) for name in sent)
    for name in sent:
        if name in _RESERVED or name in also_reserved:
            raise RequestError(
                f"Option {name} cannot be set by a request; image, session and model "
                "go into the address, the rest into --conf."
            )
    modality = read_choice(values.get("modality", AUTO), "modality", (AUTO, *list_modalities()))
    job_id = values.get("job_id")
    return {
        "num_proposals": read_int(
            values.get("num_proposals", DEFAULT_NUM_PROPOSALS), "num_proposals", 1, max_proposals
        ),
        "modality": None if modality == AUTO else modality,
        "save_original": read_bool(values.get("save_original", False), "save_original"),
        "save_proposals": read_bool(values.get("save_proposals", False), "save_proposals"),
        "job_id": None if job_id is None else str(job_id),
        "ignored": tuple(name for name in sent if name not in known),
    }


@dataclass(frozen=True, kw_only=True)
class InferOptions(AnswerOptions):
    """What one request for proposals of a volume asks for, beside `AnswerOptions`.

    Attributes:
        prompt: Free text naming structures. OHIF's "Class Prompts" send their label ids as `label_prompt` instead,
            which wins: OHIF sends along what was once typed into the options.
        steps: Denoising steps; None for the model's default.
        seed: 0..2**32 - 1.
        guidance_scale: Classifier-free guidance; None for the model's default.
        adapter: A name, ``name@version`` or "none"; None to have it chosen by the image's modality.
        allow_free_text: Send an unknown prompt through the text encoder instead of refusing it.
        clean_up: How islands are dropped from every proposal once all slices are there: "off", "small" or "largest",
            see `progidiff.proposals.islands`.
        first_slice: The axial index that somebody looks at, to be computed first; None for any order.
        result_extension: ".nii.gz", ".nii", ".nrrd", or ".seg.nrrd" for a segmentation of 3D Slicer.
        edits: What a person drew, see `progidiff.proposals.edits`.
    """

    prompt: str
    steps: int | None
    seed: int
    guidance_scale: float | None
    adapter: str | None
    allow_free_text: bool
    clean_up: str
    first_slice: int | None
    result_extension: str
    edits: tuple[Edit, ...] = ()

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
        values = {**defaults, **{name: value for name, value in sent.items() if value is not None}}
        shared = read_answer_options(values, sent, OPTION_NAMES, max_proposals, also_reserved=("backbone", "adapters"))
        steps = values.get("steps")
        guidance = values.get("guidance_scale")
        first_slice = values.get("first_slice")
        extensions = (*list_suffixes(Use.ANSWER, "volume"), *list_suffixes(Use.SEGMENTS))
        adapter = _read_adapter(values.get("adapter", adapters[0]), adapters) if adapters else None
        return cls(
            **shared,
            prompt=_read_label_prompt(sent.get("label_prompt")) or _read_prompt(values.get("prompt")),
            show=_read_show(values.get("show", CONSENSUS), shared["num_proposals"]),
            steps=None if steps is None else read_int(steps, "steps", 1, MAX_STEPS),
            seed=read_int(values.get("seed", 0), "seed", 0, MAX_SEED),
            guidance_scale=None if guidance is None else read_float(guidance, "guidance_scale", 0.0, MAX_GUIDANCE),
            adapter=adapter,
            allow_free_text=read_bool(values.get("allow_free_text", False), "allow_free_text"),
            clean_up=read_choice(values.get("clean_up", DEFAULT_CLEAN_UP), "clean_up", CLEAN_UPS),
            first_slice=None if first_slice is None else read_int(first_slice, "first_slice", 0, MAX_SLICE),
            result_extension=read_choice(values.get("result_extension", extensions[0]), "result_extension", extensions),
            edits=read_edits(sent.get("edits")),
        )

    def to_request(self, queries: Sequence[Query]) -> ProposalRequest:
        """What the model is asked; `queries` are what `prompt` names."""
        return ProposalRequest(
            queries=tuple(queries),
            num_proposals=self.num_proposals,
            num_inference_steps=self.steps,
            seed=self.seed,
            guidance_scale=self.guidance_scale,
            adapter=self.adapter,
            clean_up=self.clean_up,
            edits=self.edits,
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
        if text in (CONSENSUS, BEST, DISAGREEMENT, PROBABILITY):
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
        f"Option show is {show_value(value)}; it must be consensus, best, disagreement, probability, "
        f"or a proposal from 1 to {num_proposals}."
    )
