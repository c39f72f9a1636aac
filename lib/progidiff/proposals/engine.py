"""From a volume and prompts to proposals on the working grid; slices are streamed, features are remembered.

Not thread-safe: callers take turns (see `progidiff.proposals.device_queue`). Networks are loaded on first use;
`Engine.info` never loads.

When the device's memory does not suffice, everything that is only remembered goes, and slices and proposals are
computed in batches of half the size, down to one proposal of one slice; then the processor answers, if that is allowed;
then the request is refused.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.errors import CancelledError, ImageError, MemoryFullError, NotFoundError, ProGiDiffError, RequestError
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.volume import Volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.model.adapters import AdapterCard, AdapterStore, build_networks, compute_base_digest
from progidiff.model.backbone import Backbone, pick_device
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.folder import ModelCard, load_card, load_pipeline
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.islands import OFF, check_clean_up, drop_islands
from progidiff.proposals.request import MAX_PROPOSALS, MAX_STEPS
from progidiff.proposals.volume_proposals import VolumeProposals

logger = logging.getLogger(__name__)

SLICES_PER_BATCH = 16
SAMPLES_PER_BATCH = 64
"""Latents denoised at once: pairs x proposals."""

FEATURE_CACHE_BYTES = 600_000_000

ADAPTED_PIPELINES = 2
"""Versions of adapters whose networks stay in memory, beside the base."""


class Engine:
    """The model behind one device.

    Args:
        model_dir: Folder with ``backbone/`` and ``conditioning/``; see `progidiff.model.folder`.
        backbone: Another Stable-Diffusion folder or hub id; the conditioning must have been trained with it.
        device: "cpu", "cuda", "cuda:1"; None picks CUDA if there is one.
        dtype: "fp32", "bf16", "fp16"; None picks by device.
        adapters: Folder of adapters; None for ``adapters/`` in the model folder.
        cpu_fallback: Whether the processor answers what does not fit into the device's memory.
    """

    def __init__(
        self,
        model_dir: str | Path,
        backbone: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        adapters: str | Path | None = None,
        cpu_fallback: bool = False,
    ) -> None:
        self.model_dir = Path(model_dir)
        self.adapters = AdapterStore(adapters or self.model_dir / "adapters")
        self._backbone_source = str(backbone) if backbone else str(self.model_dir / "backbone")
        self._device = device
        self._dtype = dtype
        self._cpu_fallback = cpu_fallback
        self._on_cpu: Engine | None = None
        self._card: ModelCard | None = None
        self._pipeline: ProposalPipeline | None = None
        self._prompts: dict[tuple[str, ...], EncodedPrompts] = {}
        self._adapted: OrderedDict[str, ProposalPipeline] = OrderedDict()
        self._features: OrderedDict[tuple[str, str], list[SliceFeatures]] = OrderedDict()

    @property
    def card(self) -> ModelCard:
        """What the model was trained on; read from its JSON, no weights."""
        if self._card is None:
            self._card = load_card(self.model_dir)
        return self._card

    @property
    def structures(self) -> tuple[str, ...]:
        """Names that the model was trained on."""
        return self.card.structures

    @property
    def model_version(self) -> str:
        """``name@version``."""
        return self.card.full_name

    def info(self) -> dict[str, Any]:
        """A cheap description that never raises; ``error`` says why the model cannot be used, if it cannot."""
        try:
            card = self.card
            return {
                "model_version": card.full_name,
                "modality": card.modality,
                "structures": list(card.structures),
                "num_inference_steps": card.num_inference_steps,
                "guidance_scale": card.guidance_scale,
                "backbone": self._backbone_source,
                "loaded": self._pipeline is not None,
                "adapters": [entry.name for entry in self.adapters.entries() if entry.current is not None],
                "error": "",
            }
        except ProGiDiffError as err:
            return {
                "model_version": "",
                "modality": "",
                "structures": [],
                "loaded": False,
                "adapters": [],
                "error": str(err),
            }

    def load(self) -> ProposalPipeline:
        """Load the networks if they are not loaded yet.

        Raises:
            ModelError: if something is missing or does not fit; the message says what.
        """
        if self._pipeline is None:
            backbone = Backbone(self._backbone_source, self._device, self._dtype)
            autocast = None
            if backbone.device.type == "cpu" and self._dtype is None and torch.cpu._is_avx512_bf16_supported():
                autocast = torch.bfloat16
            self._card, self._pipeline = load_pipeline(self.model_dir, backbone, autocast)
            for part in (backbone.unet, backbone.text_encoder, backbone.tokenizer):
                logger.debug("Ready: %s", type(part).__name__)
        return self._pipeline

    def pick_adapter(self, adapter: str | None, modality: str) -> AdapterCard | None:
        """Which version a request gets: reads a few small files, loads nothing, and may be asked from any thread.

        Args:
            adapter: None, "" or "auto": the served version for this modality, if there is one; "none": the model
                itself; a name: its served version; ``name@version``: that one.
            modality: Of the image.

        Returns:
            The version's card, None for the model itself.

        Raises:
            RequestError: if there is no such adapter; the message names what there is.
            ModelError: if it is damaged.
        """
        if adapter == "none":
            return None
        if adapter in (None, "", "auto"):
            return self.adapters.pick_for(modality, compute_base_digest(self.model_dir))
        try:
            return self.adapters.find(adapter)
        except NotFoundError as err:
            raise RequestError(
                f"{err} Leave the adapter option empty to have one picked, or send 'none' for the model itself."
            ) from err

    def find_warnings(self, volume: Volume, queries: Sequence[Query], adapter: AdapterCard | None = None) -> list[str]:
        """What a user should know before trusting an answer, as sentences; empty if everything is as in training."""
        name, modality, trained = self.card.full_name, self.card.modality, self.card.structures
        if adapter is not None:
            name, modality, trained = adapter.full_name, adapter.modality, adapter.structures
        warnings = []
        if volume.modality != modality:
            warnings.append(
                f"The image is {volume.modality} ({volume.modality_source}); {name} was trained on {modality} images."
            )
        unseen = [query.name for query in queries if query.known and query.name not in trained]
        if unseen:
            warnings.append(f"{name} was trained on {', '.join(trained)}, not on {', '.join(unseen)}.")
        free = [query.name for query in queries if not query.known]
        if free:
            warnings.append(f"No training example vouches for {', '.join(free)}.")
        return warnings

    def _load_adapted(self, card: AdapterCard) -> ProposalPipeline:
        """The networks of a version, merged into copies of the base's; the last few stay in memory."""
        base = self.load()
        if card.full_name not in self._adapted:
            tensors = self.adapters.load(card, compute_base_digest(self.model_dir))
            branch, unet = build_networks(
                card, tensors, base.branch, base.unet, self.adapters.folder(card) / "adapter.safetensors"
            )
            self._adapted[card.full_name] = base.with_networks(branch, unet)
            logger.info("Loaded adapter %s", card.full_name)
            while len(self._adapted) > ADAPTED_PIPELINES:
                gone, _ = self._adapted.popitem(last=False)
                for key in [k for k in self._features if k[0] == gone]:
                    del self._features[key]
        self._adapted.move_to_end(card.full_name)
        return self._adapted[card.full_name]

    def propose(
        self,
        volume: Volume,
        queries: Sequence[Query],
        *,
        num_proposals: int = 4,
        num_inference_steps: int | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        adapter: str | None = None,
        slices: Sequence[int] | None = None,
        first: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_slices: Callable[[VolumeProposals, Sequence[int]], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        remember: bool = True,
        clean_up: str = OFF,
    ) -> VolumeProposals:
        """K proposals for every query on every slice of a volume.

        Args:
            volume: Any orientation and spacing.
            queries: P structures, from `progidiff.prompts.parser.parse_prompt`.
            num_proposals: K, 1..64.
            num_inference_steps: T, 1..50; None for the model's default.
            seed: Of the noise, 0..2**63 - 1.
            guidance_scale: 1 for none; None for the model's default.
            adapter: See `pick_adapter`.
            slices: Only these axial indices; None for all.
            first: Somebody looks at this axial index: the slices around it are computed first, the others by their
                distance. The proposals are the same in any order.
            progress: Called with (slices done, slices in all).
            on_slices: Called after every batch with the proposals so far and the axial indices that are new in them.
                Their `probabilities` are filled further by later batches; everything derived belongs to this moment.
            is_cancelled: Asked between batches.
            remember: Keep the features of the slices in memory for the next prompt; work that nobody watches leaves
                that to others.
            clean_up: How to drop islands from every proposal (`progidiff.proposals.islands`), once all slices are
                there: what `on_slices` gets is not cleaned yet, and some `slices` alone never are, since what they hold
                may hang together on the others.

        Raises:
            RequestError: if an option is out of range.
            CancelledError: if `is_cancelled` said so.
            ModelError: if the model cannot be loaded.
            ImageError: if the volume cannot be segmented.
            MemoryFullError: if the device has not even memory for one proposal of one slice.
        """
        asked: dict[str, Any] = {
            "num_proposals": num_proposals,
            "num_inference_steps": num_inference_steps,
            "seed": seed,
            "guidance_scale": guidance_scale,
            "adapter": adapter,
            "slices": slices,
            "first": first,
            "progress": progress,
            "on_slices": on_slices,
            "is_cancelled": is_cancelled,
            "remember": remember,
            "clean_up": clean_up,
        }
        try:
            return self._propose(volume, queries, **asked)
        except Exception as err:
            if not is_out_of_memory(err):
                raise
            reason = str(err).splitlines()[0][:200] if str(err) else type(err).__name__
        # After the except clause: its error holds what was computed so far.
        self._free_memory()
        device = pick_device(self._device)
        if not self._cpu_fallback or device.type == "cpu":
            raise MemoryFullError(
                f"There is not enough memory on {device} for one proposal of one slice of '{volume.name}' ({reason}). "
                "Wait until other work has left it, ask for fewer structures, crop the image, or start the server with "
                "--conf cpu_fallback true or --conf device cpu.",
                retry_after=30,
            )
        logger.warning(
            "'%s' does not fit into the memory of %s (%s); the processor computes it, slowly",
            volume.name,
            device,
            reason,
        )
        if self._on_cpu is None:
            self._on_cpu = Engine(self.model_dir, self._backbone_source, "cpu", adapters=self.adapters.root)
        return self._on_cpu.propose(volume, queries, **asked)

    def _propose(
        self,
        volume: Volume,
        queries: Sequence[Query],
        *,
        num_proposals: int,
        num_inference_steps: int | None,
        seed: int,
        guidance_scale: float | None,
        adapter: str | None,
        slices: Sequence[int] | None,
        first: int | None,
        progress: Callable[[int, int], None] | None,
        on_slices: Callable[[VolumeProposals, Sequence[int]], None] | None,
        is_cancelled: Callable[[], bool] | None,
        remember: bool,
        clean_up: str,
    ) -> VolumeProposals:
        """`propose` on this device, in smaller and smaller batches; raises what torch raises if the smallest do not
        fit.
        """
        started = time.monotonic()
        check_options(num_proposals, num_inference_steps, seed, guidance_scale, len(queries))
        check_clean_up(clean_up)
        chosen = self.pick_adapter(adapter, volume.modality)
        pipeline = self.load() if chosen is None else self._load_adapted(chosen)
        adapter_name = "" if chosen is None else chosen.full_name
        card = self.card
        config = card.conditioning
        steps = num_inference_steps or card.num_inference_steps
        guidance = card.guidance_scale if guidance_scale is None else guidance_scale

        stack, spacing = volume.to_stack()
        grid = plan_working_grid(
            stack, spacing, compute_body_threshold(volume), config.height, config.width, config.spacing_range
        )
        wanted = np.arange(len(stack)) if slices is None else np.unique(np.asarray(slices, dtype=np.int64))
        if len(wanted) == 0 or wanted[0] < 0 or wanted[-1] >= len(stack):
            raise RequestError(f"Slices must lie in 0..{len(stack) - 1}, the axial indices of '{volume.name}'.")
        prompts = self._encode_prompts(pipeline, tuple(q.text for q in queries))
        noise, offsets = pipeline.draw_noise(num_proposals, seed), pipeline.draw_offsets(num_proposals, seed)
        result = np.zeros((len(queries), num_proposals, len(stack), config.height, config.width), np.uint8)
        batches = [wanted[i : i + SLICES_PER_BATCH] for i in range(0, len(wanted), SLICES_PER_BATCH)]
        window = compute_window(volume, config.mr_headroom)
        remembered = self._recall(volume, wanted, adapter_name)
        fresh: dict[int, SliceFeatures] | None = {} if remember else None
        done = 0
        cleaned = OFF

        def collect() -> VolumeProposals:
            return VolumeProposals(
                structures=tuple(q.name for q in queries),
                probabilities=result,
                grid=grid,
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                model_version=card.full_name,
                adapter=adapter_name,
                modality=volume.modality,
                modality_source=volume.modality_source,
                seconds=time.monotonic() - started,
                clean_up=cleaned,
            )

        def check_cancelled() -> None:
            if is_cancelled is not None and is_cancelled():
                raise CancelledError(
                    f"Stopped on request after {done} of {len(wanted)} slices of '{volume.name}'; nothing was kept."
                )

        def compute(batch: np.ndarray, features: SliceFeatures | None, samples: int) -> SliceFeatures:
            """Fill `result` on some slices, `samples` latents at once; the features, for the next prompt."""
            check_cancelled()
            if features is None:
                inputs = grid.extract_slices(stack, batch, window, config.num_neighbours, config.neighbour_mm)
                if not torch.isfinite(inputs).all():
                    raise ImageError(
                        f"'{volume.name}' holds values that are not finite; replace NaN and infinity before segmenting."
                    )
                features = pipeline.encode_slices(inputs)
                # What is remembered is what is used the first time too: the second prompt must not see rounder numbers.
                features = features.to(torch.bfloat16 if pipeline.device.type == "cpu" else features.fine.dtype)
            used = features.to(next(pipeline.branch.parameters()).dtype)
            evidence = pipeline.predict_evidence(used, prompts)
            strongest = evidence.amax(dim=(2, 3)).cpu()
            pairs = [
                (n, p) for p in range(len(queries)) for n in range(len(batch)) if float(strongest[n, p]) >= card.gate
            ]
            at_once = max(1, samples // num_proposals)
            for start in range(0, len(pairs), at_once):
                check_cancelled()
                part = pairs[start : start + at_once]
                drawn = []
                for k in range(0, num_proposals, samples):
                    worn = None if offsets is None else offsets[k : k + samples]
                    drawn.append(
                        pipeline.propose(used, evidence, prompts, part, noise[k : k + samples], steps, guidance, worn)
                    )
                probabilities = torch.cat(drawn, dim=1)
                quantised = (probabilities * 255).round().to(torch.uint8).numpy()
                for (n, p), masks in zip(part, quantised, strict=True):
                    # Proposals that draw nothing are stored as exact zeros: "absent" is then the same everywhere.
                    result[p, :, batch[n]] = masks * (masks >= 128).any(axis=(1, 2), keepdims=True)
                if progress is not None:
                    progress(done + int(len(batch) * (start + len(part)) / max(1, len(pairs))), len(wanted))
            return features

        todo = deque((number, batches[number]) for number in _order_batches(batches, first))
        size, samples = SLICES_PER_BATCH, SAMPLES_PER_BATCH
        while todo:
            number, batch = todo.popleft()
            if len(batch) > size:
                todo.extendleft(reversed([(number, batch[i : i + size]) for i in range(0, len(batch), size)]))
                continue
            is_full = False
            try:
                features = compute(batch, None if remembered is None else remembered[number], samples)
            except Exception as err:
                if not is_out_of_memory(err) or (len(batch) == 1 and samples == 1):
                    raise
                is_full = True
            if is_full:  # After the except clause: its error holds what was computed so far.
                size, samples = (
                    max(1, len(batch) // 2),
                    max(1, min(samples, len(batch) * len(queries) * num_proposals) // 2),
                )
                logger.warning(
                    "Not enough memory on %s: going on with %d slices and %d samples at once",
                    pipeline.device,
                    size,
                    samples,
                )
                remembered = fresh = None
                self._free_memory()
                todo.appendleft((number, batch))
                continue
            if fresh is not None and remembered is None:
                fresh[number] = features
                if _count_bytes(fresh.values()) > FEATURE_CACHE_BYTES:
                    fresh = None  # Too large to remember; do not hold what will not be kept.
            done += len(batch)
            if progress is not None:
                progress(done, len(wanted))
            if on_slices is not None:
                on_slices(collect(), batch.tolist())
        if remembered is None and fresh is not None:
            self._remember(volume, wanted, adapter_name, [fresh[number] for number in range(len(batches))])
        if len(wanted) == len(stack):
            drop_islands(result, clean_up, (grid.stack_spacing[0], grid.spacing, grid.spacing), grid.covered)
            cleaned = clean_up
        return collect()

    def _free_memory(self) -> None:
        """Let go of everything that can be made again."""
        self._features.clear()
        self._adapted.clear()
        self._prompts.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode_prompts(self, pipeline: ProposalPipeline, texts: tuple[str, ...]) -> EncodedPrompts:
        if texts not in self._prompts:
            if len(self._prompts) > 64:
                self._prompts.clear()
            self._prompts[texts] = pipeline.encode_prompts(texts)
        return self._prompts[texts]

    def _recall(self, volume: Volume, wanted: np.ndarray, adapter: str) -> list[SliceFeatures] | None:
        """Features of this very volume and these slices, if they are still there."""
        key = (adapter, f"{volume.digest}:{volume.modality}:{len(wanted)}:{hash(wanted.tobytes())}")
        if key in self._features:
            self._features.move_to_end(key)
            return self._features[key]
        return None

    def _remember(self, volume: Volume, wanted: np.ndarray, adapter: str, features: list[SliceFeatures]) -> None:
        key = (adapter, f"{volume.digest}:{volume.modality}:{len(wanted)}:{hash(wanted.tobytes())}")
        self._features[key] = features
        while sum(_count_bytes(f) for f in self._features.values()) > FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)


def check_options(
    num_proposals: int, num_inference_steps: int | None, seed: int, guidance_scale: float | None, num_queries: int
) -> None:
    """Refuse options out of range before anything is computed.

    Raises:
        RequestError: naming the option, its range and what was given.
    """
    if num_queries < 1:
        raise RequestError("No structure was asked for; give at least one prompt.")
    if not 1 <= num_proposals <= MAX_PROPOSALS:
        raise RequestError(f"num_proposals must lie in 1..{MAX_PROPOSALS}, got {num_proposals}; 4 to 8 are useful.")
    if num_inference_steps is not None and not 1 <= num_inference_steps <= MAX_STEPS:
        raise RequestError(
            f"num_inference_steps must lie in 1..{MAX_STEPS}, got {num_inference_steps}; 1 to 8 are useful."
        )
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed must lie in 0..2**63 - 1, got {seed}.")
    if guidance_scale is not None and not 0.0 <= guidance_scale <= 20.0:
        raise RequestError(f"guidance_scale must lie in 0..20, got {guidance_scale}; 1 switches guidance off.")


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error of torch or numpy means that memory did not suffice; not every device has a class for it."""
    text = str(err).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(err, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(err, RuntimeError) and any(sign in text for sign in signs)
    )


def _order_batches(batches: Sequence[np.ndarray], first: int | None) -> list[int]:
    """In which order to compute them: as they lie, or by their distance to an axial index."""
    if first is None:
        return list(range(len(batches)))
    return sorted(range(len(batches)), key=lambda number: int(np.abs(batches[number] - first).min()))


def _count_bytes(features: Iterable[SliceFeatures]) -> int:
    return sum(t.numel() * t.element_size() for f in features for t in (f.fine, f.coarse, *f.levels.values()))
