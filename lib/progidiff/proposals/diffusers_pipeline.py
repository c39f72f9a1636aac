"""`ProGiDiffPipeline`: the model as a pipeline of diffusers, for use in Python.

1. take      image, prompt              -> a volume (I, J, K), P structures
2. propose   volume, structures, noise  -> K proposals for each, by `progidiff.proposals.engine`
3. restore   proposals                  -> label maps (K, *shape), consensus, agreement, disagreement, as the image came

It is a door to the engine that the server and the command line use, with the parts of the model in the open: a seed
gives the same proposals here and there. A module of its own, because diffusers takes seconds to import.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.utils import BaseOutput
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from progidiff.errors import ModelError, RequestError
from progidiff.images.arrays import GivenImage, take_image
from progidiff.model.adapters import AdapterStore, compute_base_digest
from progidiff.model.backbone import Backbone, LoadedBackbone
from progidiff.model.close_up import CloseUpNetwork
from progidiff.model.close_up_backbone import lend_denoiser
from progidiff.model.close_up_folder import CloseUpCard, has_close_up, load_close_up, save_close_up
from progidiff.model.conditioning_model import ConditioningModel
from progidiff.model.folder import (
    WEIGHTS,
    ModelCard,
    check_backbone,
    compute_backbone_digest,
    drop_derived_settings,
    find_backbone,
    load_card,
    make_pipeline,
    write_card,
)
from progidiff.model.pipeline import create_scheduler
from progidiff.prompts.parser import compute_label_ids, parse_prompts
from progidiff.proposals.engine import Engine, find_autocast
from progidiff.proposals.request import DEFAULT_CLEAN_UP, DEFAULT_NUM_PROPOSALS, NONE, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.storage.app_folder import find_model

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*README.md", "*CURRENT", "*.jsonl")
"""What of a repository on the model hub is fetched."""

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
"""Options of fetching."""


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes."""

NOWHERE = Path(os.devnull)
"""A folder of adapters that holds none."""


@dataclass
class ProGiDiffOutput(BaseOutput):  # type: ignore[misc]
    """Proposals for one image, on its own grid: every array ends in the shape that the image was given in.

    Attributes:
        proposals: uint8 (K, *shape), a label map each; `labels` names the ids, 0 is background.
        consensus: uint8 (*shape), a label map of what at least half of the proposals draw.
        agreement: float32 (*shape), the share of proposals that draw a voxel, 0 to 1; of several structures the
            highest. Not a calibrated probability.
        disagreement: float32 (*shape), 0 where all proposals say the same, 1 where half of them draw the voxel.
        labels: Structure -> id.
        seed: Of the noise: the same seed gives the same proposals, on the command line and from the server too.
        warnings: What one should know before trusting them; empty if everything is as in training.
        details: The same, structure by structure: `details.summary()`, `details.agreement(...)` and so on.
    """

    proposals: NDArray[np.uint8]
    consensus: NDArray[np.uint8]
    agreement: NDArray[np.float32]
    disagreement: NDArray[np.float32]
    labels: dict[str, int]
    seed: int
    warnings: tuple[str, ...]
    details: VolumeProposals


class ProGiDiffPipeline(DiffusionPipeline):  # type: ignore[misc]
    """K proposals of a mask for a prompt, on a CT or MR volume.

    Args:
        vae: Autoencoder of masks.
        unet: Denoiser.
        text_encoder, tokenizer: What reads prompts.
        scheduler: A DDIM scheduler; fewer than ten steps are usual.
        conditioning: What the denoiser sees of the image.
        card: What the model was trained on, and how it is used.
        adapters: Folder of adapters that fit the model, picked by the image's modality; None for none.
    """

    def __init__(
        self,
        vae: AutoencoderTiny | AutoencoderKL,
        unet: UNet2DConditionModel,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: DDIMScheduler,
        conditioning: ConditioningModel,
        card: ModelCard | None = None,
        adapters: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            conditioning=conditioning,
        )
        if card is None:
            raise ModelError(
                "A pipeline needs the card of its model; from_pretrained reads it from the model's folder."
            )
        self.card = card
        self.adapters = AdapterStore(NOWHERE if adapters is None else adapters)
        self._base_digest = ""
        self._trained: object = None
        self._origin: Path | None = None
        self._close_up: tuple[CloseUpCard, CloseUpNetwork] | None = None
        self._autocasts = True

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, **options: Any) -> ProGiDiffPipeline:
        """Load a model with its adapters.

        Args:
            source: A model folder of this program (``backbone/`` beside ``conditioning/``), a folder that
                `save_pretrained` wrote, or the id of a repository on the model hub; None for the weights that come with
                the program.
            options: ``dtype`` (or ``torch_dtype``), and ``adapters``, another folder of adapters; for the hub
                `HUB_OPTIONS`; for a model folder ``backbone``, the Stable Diffusion that it was trained with, where
                that lies elsewhere; for a folder that `save_pretrained` wrote all that diffusers takes.

        Raises:
            ModelError: if something is missing or does not fit.
        """
        hub = {str(name): options.pop(name) for name in HUB_OPTIONS if name in options}
        folder = _find_folder(find_model() if source is None else source, hub)
        card, dtype = load_card(folder), options.pop("dtype", None) or options.pop("torch_dtype", None)
        adapters = options.pop("adapters", folder / "adapters")
        if find_backbone(folder) == folder:
            pipe = super().from_pretrained(folder, dtype=_spread(dtype), card=card, adapters=adapters, **options)
            backbone = pipe._gather_backbone(folder)
        else:
            backbone = Backbone(options.pop("backbone", None) or find_backbone(folder), "cpu", "fp32")
            if options:
                raise RequestError(
                    f"'{folder}' is a model folder of this program, for which there is no option {', '.join(options)}; "
                    "for those that save_pretrained writes there is."
                )
            pipe = cls(**_load_parts(folder, card, backbone, _spread(dtype)), card=card, adapters=adapters)
        pipe._base_digest, pipe._origin, pipe._autocasts = compute_base_digest(folder), folder, dtype is None
        if has_close_up(folder):
            pipe._close_up = load_close_up(folder, torch.device("cpu"), backbone)
        pipe._trained = pipe._sum_weights()
        return pipe  # type: ignore[no-any-return]

    def to(self, *args: Any, **options: Any) -> ProGiDiffPipeline:
        """Move or cast all parts, as of every pipeline; adapters still fit then."""
        fits = self._is_as_trained
        super().to(*args, **options)
        if self._close_up is not None:
            self._close_up[1].to(self.device)
        if fits:
            self._trained = self._sum_weights()
        return self

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str],
        num_proposals: int = DEFAULT_NUM_PROPOSALS,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        *,
        affine: ArrayLike | None = None,
        spacing: Sequence[float] | None = None,
        modality: str | None = None,
        adapter: str | None = None,
        allow_free_text: bool = False,
        clean_up: str = DEFAULT_CLEAN_UP,
        return_dict: bool = True,
    ) -> ProGiDiffOutput:
        """Propose masks.

        Args:
            image: A nibabel image, a path, an array (I, J, K) or one axial slice; see
                `progidiff.images.arrays.take_image`.
            prompt: What to segment, "left kidney" or "liver and spleen" or "all"; several prompts are one that asks for
                all of it.
            num_proposals: K, 1..64.
            num_inference_steps: 1..50; None for the model's default.
            guidance_scale: 0..20, 1 for none; None for the model's default.
            generator: Where the seed comes from. ``torch.Generator().manual_seed(7)`` is seed 7, as of the command line
                and the server; a generator that was used gives another one with every call. None for torch's own.
            affine: Voxel index -> RAS mm, (4, 4), of an array.
            spacing: mm from row to row and from column to column, of an axial slice as it is shown.
            modality: "CT" or "MR"; None to find out.
            adapter: A name, ``name@version`` or "none"; None for the one that is served for the modality.
            allow_free_text: Try a prompt that names no structure of the model.
            clean_up: Islands to drop: "off", "small" or "largest".
            return_dict: False for a tuple in the order of `ProGiDiffOutput`.

        Raises:
            PromptError: if the prompt names no structure that is known.
            RequestError: if an option is out of range.
            ImageError: if the image cannot be segmented.
            MemoryFullError: if the device has not even memory for one proposal of one slice.
        """
        # 1. Take
        engine = self._open_engine(adapter)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        known = engine.find_known()
        queries = parse_prompts(texts, known, allow_free_text, engine.model_version)
        given = take_image(image, affine, spacing, modality)
        chosen = engine.pick_adapter(adapter, given.volume.modality, [query.name for query in queries])
        request = ProposalRequest(
            queries=queries,
            num_proposals=num_proposals,
            num_inference_steps=num_inference_steps,
            seed=draw_seed(generator),
            guidance_scale=guidance_scale,
            adapter=NONE if chosen is None else chosen.full_name,
            clean_up=clean_up,
        )

        # 2. Propose
        with self.progress_bar(total=given.volume.grid.num_slices) as bar:
            work = Work(remember=False, on_progress=lambda done, total: bar.update(done - bar.n))
            details = engine.propose(request, given.volume, work)  # uint8 (P, K, Z, h, w) on the working grid

        # 3. Restore
        warnings = (*given.volume.grid.warnings, *engine.find_warnings(given.volume, queries, chosen))
        output = _restore(details, given, compute_label_ids(queries), warnings)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the whole model as one folder of diffusers, with its adapters.

        `from_pretrained` loads it, and so do the server (``--conf model_dir``) and the command line (``--model``).

        Args:
            save_directory: Made when needed.
            options: As of every pipeline; `push_to_hub` is a method of its own.

        Raises:
            ModelError: if the conditioning or the denoiser is wrapped, as by PEFT.
        """
        if options.pop("push_to_hub", False):
            raise RequestError("Call push_to_hub(repository) instead: it saves and uploads.")
        for name in ("conditioning", "unet"):
            if not isinstance(getattr(self, name), ModelMixin):
                raise ModelError(
                    f"The {name} is a {type(getattr(self, name)).__name__}, which diffusers cannot save; merge it "
                    f"first, with PEFT: pipe.{name} = pipe.{name}.merge_and_unload()."
                )
        folder = Path(save_directory)
        super().save_pretrained(folder, **options)
        drop_derived_settings(folder / "vae")
        _save_lossless(self.conditioning, folder / "conditioning" / WEIGHTS)
        written = compute_backbone_digest(folder)
        fits = self._is_as_trained
        is_same = fits and bool(self.card.backbone_digest)
        changes: dict[str, Any] = {"backbone_digest": written, "backbone_copies": ()}
        if is_same:
            changes = {"backbone_copies": (written,)}
        write_card(folder / "conditioning", replace(self.card, **changes))
        if self._close_up is not None:
            close_up, network = self._close_up
            if network.shares_denoiser:
                close_up = replace(close_up, **changes)
            save_close_up(folder, close_up, network, half=holds_halves(network.state_dict()))
        for name in ("run.json", "README.md"):
            if self._origin is not None and (self._origin / "conditioning" / name).is_file():
                shutil.copyfile(self._origin / "conditioning" / name, folder / "conditioning" / name)
        if (folder / "conditioning" / "README.md").is_file():
            shutil.copyfile(folder / "conditioning" / "README.md", folder / "README.md")
        target = folder / "adapters"
        if fits and self.adapters.entries() and self.adapters.root.resolve() != target.resolve():
            others = shutil.ignore_patterns(".*")
            shutil.copytree(self.adapters.root, target, ignore=others, dirs_exist_ok=True)

    @property
    def _is_as_trained(self) -> bool:
        """Whether adapters of the model fit: the networks that they change hold the weights that were loaded."""
        return self._trained is not None and self._trained == self._sum_weights()

    def _sum_weights(self) -> object:
        """What says whether weights were exchanged or changed in place, which PEFT does when it merges: of every tensor
        its name, its type and the sum of its bits as whole numbers, the same on any device.
        """
        return [
            (name, tensor.dtype, int(tensor.view(_WHOLE[tensor.element_size()]).sum(dtype=torch.int64)))
            for network in (self.conditioning, self.unet)
            for name, tensor in network.state_dict().items()
        ]

    def _gather_backbone(self, source: str | Path) -> LoadedBackbone:
        """The parts of the backbone as they are now."""
        return LoadedBackbone(self.vae, self.unet, self.text_encoder, self.tokenizer, self.scheduler.config, source)

    def _open_engine(self, adapter: str | None) -> Engine:
        """The engine over the parts as they are now."""
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ModelError(
                f"The scheduler is a {type(self.scheduler).__name__}; the model was trained for few steps of a "
                "DDIMScheduler, give it one."
            )
        fits = bool(self.adapters.entries()) and self._is_as_trained
        if not fits and self.adapters.entries() and adapter not in (None, "", NONE):
            raise RequestError(
                "The conditioning or the denoiser was exchanged or changed, and adapters belong to the model as it was "
                "trained; leave the adapter out, or load the model anew."
            )
        backbone = self._gather_backbone(self._origin or "memory")
        if self._close_up is not None and self._close_up[1].shares_denoiser:
            lend_denoiser(self._close_up[1], backbone)
        is_plain = self._autocasts and self.unet.dtype == torch.float32
        pipeline = make_pipeline(
            self.card, backbone, self.conditioning, find_autocast(backbone.device) if is_plain else None
        )
        pipeline.scheduler = self.scheduler
        store = self.adapters if fits else AdapterStore(NOWHERE)
        return Engine.from_networks(self.card, pipeline, store, self._base_digest, self._close_up)


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed of proposals, 0..2**63 - 1, from a generator.

    Example:
        >>> generator = torch.Generator().manual_seed(7)
        >>> draw_seed(generator), draw_seed(generator) == 7
        (7, False)
    """
    if generator is None:
        return int(torch.randint(2**63 - 1, ()))
    start = generator.initial_seed()
    untouched = torch.Generator(generator.device).manual_seed(start)
    is_new = torch.equal(untouched.get_state(), generator.get_state())
    drawn = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return start if is_new and 0 <= start < 2**63 else drawn


def _find_folder(source: str | Path, hub: dict[str, Any]) -> Path:
    """A local folder, or the copy of a repository on the model hub.

    Raises:
        ModelError: if it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ModelError(f"There is no model folder '{source}'. Name one, or the id of a repository like 'owner/name'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(HUB_FILES), **hub))
    except Exception as err:  # the hub client raises a dozen unrelated types; the cure is the same for all
        raise ModelError(
            f"'{source}' is no local folder and could not be fetched from the model hub ({type(err).__name__}: {err}). "
            "Download it on a machine with network access and give its folder."
        ) from err


def _spread(dtype: Any) -> dict[str, torch.dtype]:
    """A precision for every part: the conditioning stays in fp32 (it is small and runs once), the autoencoder too where
    fp16 is asked for, in which Stable Diffusion's overflow.
    """
    given = dtype if isinstance(dtype, dict) else {"default": dtype or torch.float32}
    default = given.get("default", torch.float32)
    vae = torch.float32 if default == torch.float16 else default
    return {"vae": vae, "conditioning": torch.float32, **given}


def _load_parts(folder: Path, card: ModelCard, backbone: Backbone, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """The parts of a model folder of this program, on the CPU.

    Raises:
        ModelError: if a part is missing, or the conditioning belongs to another backbone.
    """
    check_backbone(card, backbone)
    parts = {name: getattr(backbone, name) for name in ("vae", "unet", "text_encoder", "tokenizer")}
    parts["conditioning"] = ConditioningModel.from_pretrained(folder / "conditioning")
    for name in ("vae", "unet", "text_encoder", "conditioning"):
        torch.nn.Module.to(parts[name], dtypes.get(name, dtypes.get("default", torch.float32)))
    return {**parts, "scheduler": create_scheduler(backbone, card.scheduler)}


def _restore(
    details: VolumeProposals, given: GivenImage, labels: dict[str, int], warnings: Sequence[str]
) -> ProGiDiffOutput:
    """What the proposals draw, on the grid and in the shape of the image."""
    grid = given.volume.grid
    drawn = [details.label_map(grid, k, labels) for k in range(1, details.num_proposals + 1)]  # K of (I, J, K)
    return ProGiDiffOutput(
        proposals=given.restore(np.stack(drawn)),
        consensus=given.restore(details.label_map(grid, "consensus", labels)),
        agreement=given.restore(details.agreement(grid)),
        disagreement=given.restore(details.disagreement_map(grid).astype(np.float32) / np.float32(100)),
        labels=labels,
        seed=details.seed,
        warnings=tuple(warnings),
        details=details,
    )


def holds_halves(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether fp16 holds the weights without a loss, as it does those that a training stored so."""
    return all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in tensors.values())


def _save_lossless(conditioning: torch.nn.Module, path: Path) -> None:
    """Write weights in fp16 where that is what they are, as a training does: the file is then bit for bit the one that
    adapters belong to.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in conditioning.state_dict().items()}
    is_half = holds_halves(tensors)
    save_file({name: tensor.half() for name, tensor in tensors.items()} if is_half else tensors, path)
