"""K proposals for a batch of slices. Knows tensors; knows nothing of DICOM, MONAI Label or HTTP.

1. encode    slices (N, C, H, W)            -> features, once per slice
2. evidence  features, prompts (P)          -> (N, P, H, W) in [0, 1], a dot product per prompt
3. gate      evidence                       -> M (slice, prompt) pairs that are not plainly absent
4. residuals features, worn evidence        -> what is added to the denoiser's skips, per pair and proposal
5. denoise   noise (K, c, h, w), T steps    -> latents (M, K, c, h, w)
6. decode    latents                        -> probabilities (M, K, H, W)
7. fuse      probabilities, worn evidence   -> probabilities (M, K, H, W)

Two things make proposals differ: the noise that the denoiser starts from, and smooth offsets on the evidence ("worn"
evidence, as in training, see `progidiff.training.proposal_stage`). With few steps a denoiser's samples hug their mean,
so that noise alone moves edges; the offsets make it commit to different readings of what the evidence leaves open.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from progidiff.errors import RequestError
from progidiff.model.backbone import PROMPT_TEMPLATE, Backbone
from progidiff.model.codec import MaskCodec
from progidiff.model.conditioning import ConditioningBranch, SliceFeatures
from progidiff.model.sampling import draw_quantiles, guide, sample, seed_generator
from progidiff.prompts.words import spell_out


@dataclass
class EncodedPrompts:
    """P prompts as the networks read them.

    Attributes:
        tokens: (P, L, D) for the denoiser's cross-attention.
        mask: (P, L) of real tokens, or None.
        pooled: (P, D) for the query head.
        empty_tokens, empty_mask: The dropped text of classifier-free guidance, (1, L', D).
    """

    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor
    empty_tokens: Tensor
    empty_mask: Tensor | None


class ProposalPipeline:
    """The networks in working order.

    Args:
        backbone: Text encoder and denoiser.
        branch: Conditioning that was trained with this backbone.
        codec: Its autoencoder with mask statistics.
        scheduler_config: Overrides of the backbone's scheduler that the branch was trained with.
        unet: The denoiser, if it is not the backbone's own.
        autocast: Precision for the networks; None for the weights' own.
        evidence_weight: How much the evidence counts in the final mask beside the decoded proposal, see
            `fuse_evidence`.
        evidence_spread: Standard deviations (field, shift), in logits, of the offsets that set proposals apart, see
            `draw_offsets`; None for noise alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        branch: ConditioningBranch,
        codec: MaskCodec,
        scheduler_config: dict[str, Any] | None = None,
        unet: Any | None = None,
        autocast: torch.dtype | None = None,
        evidence_weight: float = 0.0,
        evidence_spread: tuple[float, float] | None = None,
    ) -> None:
        self.backbone = backbone
        self.branch = branch
        self.codec = codec
        self.unet = backbone.unet if unet is None else unet
        self.scheduler = create_scheduler(backbone, scheduler_config)
        self.autocast_dtype = autocast
        self.evidence_weight = evidence_weight
        self.evidence_spread = evidence_spread if evidence_spread and any(evidence_spread) else None

    def with_networks(self, branch: ConditioningBranch, unet: Any) -> ProposalPipeline:
        """The same pipeline with other networks, as an adapter makes them."""
        other = copy.copy(self)
        other.branch, other.unet = branch, unet
        return other

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.backbone.device

    @property
    def _dtype(self) -> torch.dtype:
        """Of the branch's weights."""
        return next(self.branch.parameters()).dtype

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def encode_prompts(self, texts: Sequence[str]) -> EncodedPrompts:
        """Encode structure names or free text, each through the template that training used."""
        tokens, mask, pooled = self.backbone.encode_text([PROMPT_TEMPLATE.format(spell_out(t)) for t in texts])
        empty_tokens, empty_mask, _ = self.backbone.encode_text([""])
        return EncodedPrompts(tokens, mask, pooled, empty_tokens, empty_mask)

    @torch.no_grad()
    def encode_slices(self, slices: Float[Tensor, "N C H W"]) -> SliceFeatures:
        """(N, C, H, W) in [-1, 1] -> features that every prompt, proposal and step reuses."""
        with self._autocast():
            return self.branch.encode_slices(slices.to(self.device, self._dtype))

    @torch.no_grad()
    def predict_evidence(self, features: SliceFeatures, prompts: EncodedPrompts) -> Float[Tensor, "N P H W"]:
        """Text-query evidence (N, P, H, W) in [0, 1], fp32."""
        with self._autocast():
            return self.branch.predict_evidence(features, prompts.pooled.to(self._dtype)).float().sigmoid()

    def draw_noise(self, num_proposals: int, seed: int) -> Float[Tensor, "K c h w"]:
        """The noise of proposals 0..K-1, (K, c, h, w).

        Proposal k depends on (seed, k) alone: it is the same for every slice, so that proposal k is one coherent
        volume, the same for every K, and the same alone or in a batch.
        """
        config = self.branch.config
        shape = (
            self.unet.config.in_channels,
            config.height // config.latent_stride,
            config.width // config.latent_stride,
        )
        return torch.stack([torch.randn(shape, generator=seed_generator(f"{seed}:{k}")) for k in range(num_proposals)])

    def draw_offsets(self, num_proposals: int, seed: int) -> Float[Tensor, "K H W"] | None:
        """What proposals 0..K-1 add to the evidence's logits, (K, H, W); None if `evidence_spread` is.

        Offset k is a smooth random field plus a constant. The constants are stratified (a golden-ratio sequence through
        the normal quantiles), so that already four proposals hold cautious and generous readings. Like the noise they
        depend on (seed, k) alone and are the same on every slice and for every prompt.
        """
        if self.evidence_spread is None:
            return None
        field_spread, shift_spread = self.evidence_spread
        config = self.branch.config
        offsets = []
        for k, shift in enumerate(draw_quantiles(num_proposals, seed)):
            field = draw_smooth_field(1, config.height, config.width, seed_generator(f"{seed}:{k}:field"))[0]
            offsets.append(field_spread * field + shift_spread * shift)
        return torch.stack(offsets)

    @torch.no_grad()
    def propose(
        self,
        features: SliceFeatures,
        evidence: Float[Tensor, "N P H W"],
        prompts: EncodedPrompts,
        pairs: Sequence[tuple[int, int]],
        noise: Float[Tensor, "K c h w"],
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        offsets: Float[Tensor, "K H W"] | None = None,
    ) -> Float[Tensor, "M K H W"]:
        """Denoise and decode K proposals for M (slice, prompt) pairs.

        Args:
            features: Of N slices.
            evidence: (N, P, H, W) from `predict_evidence`.
            prompts: P prompts.
            pairs: M indices (n, p).
            noise: (K, c, h, w) from `draw_noise`.
            num_inference_steps: T, 1 to 8 are useful.
            guidance_scale: Strength of the text; 1 costs nothing, other values double the work. Only the text is
                dropped: the image evidence always stays.
            offsets: (K, H, W) from `draw_offsets`, or None.

        Returns:
            (M, K, H, W) in [0, 1], fp32 on the CPU. A mask is where it is at least 0.5.
        """
        count = len(noise)
        if not pairs:
            return torch.zeros(0, count, *evidence.shape[-2:])
        rows = torch.tensor([n for n, _ in pairs], device=self.device)  # (M,)
        columns = torch.tensor([p for _, p in pairs], device=self.device)  # (M,)

        # 1. Evidence as each proposal reads it; one reading for all of them without offsets
        worn = evidence[rows, columns].to(self.device)[:, None]  # (M, 1, H, W)
        if offsets is not None:
            worn = (torch.logit(worn, eps=1e-4) + offsets.to(self.device)).sigmoid()  # (M, K, H, W)

        with self._autocast():
            # 2. Residuals of the conditioning branch
            down, middle = self._compute_residuals(features, rows, worn, count)  # each (M K, c_l, h_l, w_l)

            # 3. Denoise
            latents = noise.to(self.device).repeat(len(pairs), 1, 1, 1)  # (M K, c, h, w)
            tokens = prompts.tokens[columns].repeat_interleave(count, dim=0)  # (M K, L, D)
            mask = None if prompts.mask is None else prompts.mask[columns].repeat_interleave(count, dim=0)  # (M K, L)
            empty = prompts.empty_tokens.expand(len(latents), -1, -1)  # (M K, L', D)
            empty_mask = None if prompts.empty_mask is None else prompts.empty_mask.expand(len(latents), -1)
            denoise = guide(
                partial(self._predict, tokens=tokens, mask=mask, down=down, middle=middle),
                partial(self._predict, tokens=empty, mask=empty_mask, down=down, middle=middle),
                guidance_scale,
            )
            clean = sample(denoise, self.scheduler, latents, num_inference_steps)  # (M K, c, h, w)

            # 4. Decode
            decoded = self.codec.decode_latents(clean)  # (M K, H, W)
        probabilities = decoded.view(len(pairs), count, *decoded.shape[-2:]).float()  # (M, K, H, W)

        # 5. Fuse with the evidence
        if self.evidence_weight:
            probabilities = fuse_evidence(probabilities, worn, self.evidence_weight)  # (M, K, H, W)
        return probabilities.cpu()

    def _compute_residuals(
        self, features: SliceFeatures, rows: Tensor, worn: Tensor, count: int
    ) -> tuple[list[Tensor], Tensor]:
        """What is added to the denoiser's skips and middle, for every proposal of every pair."""
        worn = worn.to(self._dtype)
        if worn.shape[1] == count:
            return self.branch.compute_residuals(features[rows.repeat_interleave(count)], worn.flatten(0, 1)[:, None])
        # All proposals read the same evidence: once per pair is enough.
        down, middle = self.branch.compute_residuals(features[rows], worn)
        return [r.repeat_interleave(count, dim=0) for r in down], middle.repeat_interleave(count, dim=0)

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        tokens: Tensor,
        mask: Tensor | None,
        down: list[Tensor],
        middle: Tensor,
    ) -> Tensor:
        dtype = self.unet.dtype
        predicted: Tensor = self.unet(
            latents.to(dtype),
            timestep,
            tokens.to(dtype),
            encoder_attention_mask=mask,
            down_block_additional_residuals=tuple(r.to(dtype) for r in down),
            mid_block_additional_residual=middle.to(dtype),
        ).sample
        return predicted.float()


def draw_smooth_field(count: int, height: int, width: int, generator: torch.Generator) -> Float[Tensor, "count H W"]:
    """Low-frequency random fields (count, H, W): errors as large as organs and as their parts, not as pixels."""
    coarse = torch.randn(count, 1, 8, 10, generator=generator)
    fine = torch.randn(count, 1, 16, 20, generator=generator)
    return sum(
        (
            F.interpolate(part, size=(height, width), mode="bicubic", align_corners=False)[:, 0]
            for part in (coarse, fine)
        ),
        torch.zeros(()),
    )


def fuse_evidence(
    probabilities: Float[Tensor, "*maps"], evidence: Float[Tensor, "*#maps"], weight: float, sharpness: float = 6.0
) -> Float[Tensor, "*maps"]:
    """A product of experts in logit space: the decoded proposal, and the evidence it came from.

    The denoiser works at an eighth of the resolution; where it is indifferent, thin structures and boundaries are
    better known to the full-resolution evidence. Where proposals differ clearly, the evidence is weak and does not
    decide.

    Args:
        probabilities: (..., H, W) in [0, 1], decoded proposals.
        evidence: Broadcastable, in [0, 1].
        weight: Of the evidence's logit; 0 leaves the masks as they are.
        sharpness: Logit of a decoded value of 1.

    Returns:
        Probabilities in [0, 1]; values under 0.02 are exactly 0, so that background stays background.
    """
    logits = sharpness * (2 * probabilities - 1) + weight * torch.logit(evidence, eps=2e-3)
    fused = logits.sigmoid()
    return torch.where(fused < 0.02, torch.zeros_like(fused), fused)


def create_scheduler(backbone: Backbone, overrides: dict[str, Any] | None = None) -> Any:
    """The DDIM scheduler that training and use share.

    Zero terminal SNR and trailing spacing make the first of few steps start from pure noise (arXiv 2305.08891); the
    last step ends on the clean latent.
    """
    from diffusers import DDIMScheduler

    settings = {
        **backbone.scheduler_config,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        **(overrides or {}),
    }
    if settings["prediction_type"] == "epsilon" and settings["rescale_betas_zero_snr"]:
        raise RequestError(
            "prediction_type 'epsilon' is undefined at zero terminal SNR; use 'v_prediction' or 'sample'."
        )
    return DDIMScheduler.from_config(settings)
