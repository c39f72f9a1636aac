"""The model behind one device: loads networks, picks adapters, remembers features, and answers requests
(`progidiff.proposals.walk` is the way of one through the networks).

Not thread-safe: callers take turns (see `progidiff.proposals.device_queue`). Networks are loaded on first use;
`Engine.info` never loads.

When the device's memory does not suffice, everything that is only remembered goes, and slices and proposals are
computed in batches of half the size, down to one proposal of one slice; then the processor answers, if that is allowed;
then the request is refused.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.errors import CancelledError, MemoryFullError, NotFoundError, ProGiDiffError, RequestError
from progidiff.images.volume import Volume
from progidiff.model.adapters import AdapterCard, AdapterStore, build_networks, compute_base_digest
from progidiff.model.backbone import Backbone, pick_device
from progidiff.model.close_up import CloseUpNetwork, WindowBatch
from progidiff.model.close_up_folder import CloseUpCard, has_close_up, load_close_up, load_close_up_card
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.folder import ModelCard, find_backbone, load_card, load_pipeline
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.batches import Batch, BatchSize, compute_in_batches, is_out_of_memory
from progidiff.proposals.close_up_walk import CloseUpTools, CloseUpWalk, EvidenceShelf
from progidiff.proposals.request import AUTO, NONE, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.walk import WHOLE, FeatureBook, Walk, count_bytes
from progidiff.proposals.work import Work

logger = logging.getLogger(__name__)

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
        at_once: Latents that a device (not the processor) denoises together; a card with free units and memory is
            faster with more. None for `WHOLE`. Memory that does not suffice halves it, as always.
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
        at_once: int | None = None,
    ) -> None:
        self.model_dir = Path(model_dir)
        self.adapters = AdapterStore(adapters or self.model_dir / "adapters")
        self._backbone_source = str(backbone) if backbone else str(find_backbone(self.model_dir))
        self._device = device
        self._dtype = dtype
        self._cpu_fallback = cpu_fallback
        self._whole = None if at_once is None else BatchSize(max(WHOLE.slices, at_once // 4), at_once)
        self._on_cpu: Engine | None = None
        self._base_digest: str | None = None
        self._default_steps: int | None = None
        self._card: ModelCard | None = None
        self._pipeline: ProposalPipeline | None = None
        self._prompts: dict[tuple[str, ...], EncodedPrompts] = {}
        self._adapted: OrderedDict[str, ProposalPipeline] = OrderedDict()
        self._features: OrderedDict[tuple[str, str], list[SliceFeatures]] = OrderedDict()
        self._shelf = EvidenceShelf(FEATURE_CACHE_BYTES)
        self._close_up: CloseUpTools | None = None

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps of a request that names none."""
        if self._default_steps is None:
            card = self._read_close_up_card() or self.card
            self._default_steps = card.num_inference_steps
        return self._default_steps

    def _read_close_up_card(self) -> CloseUpCard | None:
        return load_close_up_card(self.model_dir) if has_close_up(self.model_dir) else None

    @classmethod
    def from_networks(
        cls,
        card: ModelCard,
        pipeline: ProposalPipeline,
        adapters: AdapterStore,
        base_digest: str,
        close_up: tuple[CloseUpCard, CloseUpNetwork] | None = None,
    ) -> Engine:
        """An engine whose networks are loaded.

        Args:
            card: What they were trained on.
            pipeline: The networks.
            adapters: Versions that requests may ask for.
            base_digest: What `compute_base_digest` says of the model; adapters of another base are not used.
            close_up: What draws close-ups, in fp32 on the pipeline's device; None to answer from whole slices.
        """
        engine = cls(pipeline.backbone.folder, pipeline.backbone.source, adapters=adapters.root)
        engine._card, engine._pipeline, engine._base_digest = card, pipeline, base_digest
        engine._default_steps = card.num_inference_steps
        if close_up is not None:
            engine._default_steps = close_up[0].num_inference_steps
            engine._close_up = engine._make_close_up(*close_up, pipeline)
        return engine

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
            card, close_up = self.card, self._read_close_up_card()
            return {
                "model_version": card.full_name,
                "modality": card.modality,
                "structures": list(card.structures),
                "num_inference_steps": self.num_inference_steps,
                "guidance_scale": card.guidance_scale,
                "backbone": self._backbone_source,
                "loaded": self._pipeline is not None,
                "adapters": [entry.name for entry in self.adapters.entries() if entry.current is not None],
                "listens_to_edits": close_up is not None,
                "is_calibrated": close_up is not None and close_up.calibration is not None,
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
            autocast = None if self._dtype is not None else find_autocast(backbone.device)
            self._card, self._pipeline = load_pipeline(self.model_dir, backbone, autocast)
            if has_close_up(self.model_dir):
                self._close_up = self._load_close_up(self._pipeline)
            for part in (backbone.unet, backbone.text_encoder, backbone.tokenizer):
                logger.debug("Ready: %s", type(part).__name__)
        return self._pipeline

    def warm_up(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Load the networks and run each of them once on nothing, so that the first request finds kernels picked and
        memory taken: on a device a whole batch, on the processor one slice.

        Args:
            is_cancelled: Asked between two networks.

        Raises:
            ModelError: if the networks cannot be loaded.
            CancelledError: if `is_cancelled` said so.
        """
        is_small = self.load().device.type == "cpu"
        size = BatchSize(1, 1) if is_small else WHOLE
        while True:
            try:
                self._run_once(size, is_cancelled)
                return
            except Exception as err:
                if not is_out_of_memory(err) or size.slices == 1:
                    raise
            # After the except clause: its error holds what was computed so far.
            self._free_memory()
            size = size.halve(size.slices, size.samples)

    def _run_once(self, size: BatchSize, is_cancelled: Callable[[], bool]) -> None:
        """Every network on `size.slices` slices of nothing, with as many proposals as `size.samples` allows."""
        pipeline, config = self.load(), self.card.conditioning
        count, proposals = size.slices, max(1, size.samples // size.slices)

        def go_on() -> None:
            if is_cancelled():
                raise CancelledError("The networks are warmed up by the request that came meanwhile.")

        prompts = self._encode_prompts(pipeline, self.structures[:1])
        go_on()
        images = torch.zeros(count, 2 * config.num_neighbours + 1, config.height, config.width)
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        go_on()
        pipeline.propose(
            features,
            evidence,
            prompts,
            [(n, 0) for n in range(count)],
            pipeline.draw_noise(proposals, 0),
            self.num_inference_steps,
            self.card.guidance_scale,
            pipeline.draw_offsets(proposals, 0),
        )
        if self._close_up is not None:
            go_on()
            at_once = self._close_up.count_windows(size.samples, proposals)
            self._warm_up_close_up(self._close_up, prompts, min(count, at_once), proposals)

    def _warm_up_close_up(self, tools: CloseUpTools, prompts: EncodedPrompts, count: int, proposals: int) -> None:
        config, size, device = tools.pipeline.network.config, tools.rules.size, tools.pipeline.device
        batch = WindowBatch(
            images=torch.zeros(count, 2 * config.num_neighbours + 1, size, size, device=device),
            evidence=torch.full((count, 2 * config.evidence_neighbours + 1, size, size), 0.5, device=device),
            is_found=torch.ones(count, device=device),
            edits=None,
            pooled=prompts.pooled[:1].expand(count, -1).to(device),
            spacing=torch.ones(count, 2, device=device),
        )
        noise, levels = tools.pipeline.draw_noise(proposals, 0), tools.pipeline.draw_levels(proposals, 0)
        tokens = prompts.tokens[:1].expand(count, -1, -1)
        mask = None if prompts.mask is None else prompts.mask[:1].expand(count, -1)
        tools.pipeline.propose(batch, tokens, mask, noise, levels, self.num_inference_steps)

    def _load_close_up(self, pipeline: ProposalPipeline) -> CloseUpTools:
        card, network = load_close_up(self.model_dir, pipeline.device, pipeline.backbone)
        if pipeline.device.type != "cpu":
            network.to(next(pipeline.branch.parameters()).dtype)
        return self._make_close_up(card, network, pipeline)

    def _make_close_up(self, card: CloseUpCard, network: CloseUpNetwork, pipeline: ProposalPipeline) -> CloseUpTools:
        texts = self.card.structures
        precision = pipeline.autocast_dtype
        if precision is None and pipeline.device.type == "cuda" and pipeline.unet.dtype != torch.float32:
            precision = pipeline.unet.dtype  # Its weights stay in fp32, and its products are those of the denoiser.
        drawing = CloseUpPipeline(network, precision, card.presence)
        prompts = self._encode_prompts(pipeline, texts)
        trained = card.structures or texts
        return CloseUpTools(drawing, card.rules, self._shelf, texts, prompts, trained, card.calibration)

    def find_taught(self, modality: str | None = None) -> tuple[str, ...]:
        """Structures that served versions know and the model itself does not, by name; empty if nothing is served, or
        what is served cannot be read: a request says so.

        Args:
            modality: Of the images; None for any.
        """
        try:
            served = self.adapters.list_served(self._find_base(), modality)
            return tuple(sorted({name for _, card in served for name in card.find_new(self.structures)}))
        except ProGiDiffError as err:
            logger.warning("What versions were taught cannot be read: %s", err)
            return ()

    def find_known(self) -> tuple[str, ...]:
        """Names that a prompt may ask for: what the model was trained on, and what served versions were taught."""
        return (*self.structures, *self.find_taught())

    def pick_adapter(self, adapter: str | None, modality: str, structures: Collection[str] = ()) -> AdapterCard | None:
        """Which version a request gets: reads a few small files, loads nothing, and may be asked from any thread.

        Args:
            adapter: None, "" or "auto": the served version for this modality, if there is one; "none": the model
                itself; a name: its served version; ``name@version``: that one.
            modality: Of the image.
            structures: What is asked for; of several versions the one that learned it answers.

        Returns:
            The version's card, None for the model itself.

        Raises:
            RequestError: if there is no such adapter; the message names what there is.
            ModelError: if it is damaged.
        """
        if adapter == NONE:
            return None
        if adapter in (None, "", AUTO):
            return self.adapters.pick_for(modality, self._find_base(), structures, self.structures)
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
            tensors = self.adapters.load(card, self._find_base())
            branch, unet = build_networks(card, tensors, base.branch, base.unet, self.adapters.folder(card))
            self._adapted[card.full_name] = base.with_networks(branch, unet)
            logger.info("Loaded adapter %s", card.full_name)
            while len(self._adapted) > ADAPTED_PIPELINES:
                gone, _ = self._adapted.popitem(last=False)
                for key in [k for k in self._features if k[0] == gone]:
                    del self._features[key]
        self._adapted.move_to_end(card.full_name)
        return self._adapted[card.full_name]

    def propose(self, request: ProposalRequest, volume: Volume, work: Work | None = None) -> VolumeProposals:
        """K proposals for every structure on every slice of a volume.

        Args:
            request: What is asked.
            volume: Any orientation and spacing.
            work: How to compute it, and who watches.

        Raises:
            RequestError: if there is no such adapter or slice.
            CancelledError: if `work.is_cancelled` said so.
            ModelError: if the model cannot be loaded.
            ImageError: if the volume cannot be segmented.
            MemoryFullError: if the device has not even memory for one proposal of one slice.
        """
        work = work or Work()
        try:
            return self._propose(request, volume, work)
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
        return self._on_cpu.propose(request, volume, work)

    def _propose(self, request: ProposalRequest, volume: Volume, work: Work) -> VolumeProposals:
        """`propose` on this device, in smaller and smaller batches; raises what torch raises if the smallest do not
        fit.
        """
        started = time.monotonic()
        chosen = self.pick_adapter(request.adapter, volume.modality, [query.name for query in request.queries])
        pipeline = self.load() if chosen is None else self._load_adapted(chosen)
        card, tools = self.card, self._close_up
        if chosen is not None and chosen.grid is not None:
            card = replace(card, conditioning=chosen.place(card.conditioning))
        adapter = "" if chosen is None else chosen.full_name
        if pipeline.device.type != "cpu":  # There a seed gives the same bits, whatever the settings.
            work = replace(work, whole=self._whole)
        settled = request.settle(self.num_inference_steps, card.guidance_scale, adapter)
        prompts = self._encode_prompts(pipeline, tuple(query.text for query in request.queries))
        if tools is None:
            walk = Walk(pipeline, card, settled, adapter, volume, prompts, work, started)
        else:
            walk = CloseUpWalk(pipeline, tools, card, settled, adapter, volume, prompts, work, started)

        # Features of this very volume and these slices, if they are still there.
        key = (adapter, f"{volume.digest}:{len(walk.slices)}:{hash(walk.slices.tobytes())}:{walk.size.slices}")
        if key in self._features:
            self._features.move_to_end(key)
        book = FeatureBook(self._features.get(key), work.remember, FEATURE_CACHE_BYTES)

        def compute(batch: Batch, size: BatchSize) -> SliceFeatures | None:
            return walk.compute(batch, size, book.find(batch.number))

        def make_room(size: BatchSize) -> None:
            logger.warning(
                "Not enough memory on %s: going on with %d slices and %d samples at once",
                pipeline.device,
                size.slices,
                size.samples,
            )
            book.drop()
            self._free_memory()

        samples_per_slice = len(request.queries) * request.num_proposals
        for batch, features in compute_in_batches(walk.batches, walk.size, samples_per_slice, compute, make_room):
            if features is not None:
                book.add(batch.number, features)
            walk.finish(batch)
        self._remember(key, book.collected(len(walk.batches)))
        return walk.end()

    def recall_evidence(self, volume: Volume, structures: Collection[str] = ()) -> dict[str, NDArray[np.uint8]]:
        """What the last requests for some structures found in a volume, for close-ups: text of a prompt -> uint8
        (Z, h, w) of 0..255 on the working grid; empty if nothing was asked about it, or long ago.
        """
        chosen = self.pick_adapter(None, volume.modality, structures)
        return self._shelf.get(("" if chosen is None else chosen.full_name, volume.digest))

    def _find_base(self) -> str:
        return compute_base_digest(self.model_dir) if self._base_digest is None else self._base_digest

    def _free_memory(self) -> None:
        """Let go of everything that can be made again."""
        self._features.clear()
        self._shelf.clear()
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

    def _remember(self, key: tuple[str, str], features: list[SliceFeatures] | None) -> None:
        if features is None:
            return
        self._features[key] = features
        while sum(count_bytes(one) for one in self._features.values()) > FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)


def find_autocast(device: torch.device) -> torch.dtype | None:
    """What fp32 networks compute in where nobody asked for a precision: bf16 on processors that have it."""
    is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast else None
