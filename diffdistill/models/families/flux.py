"""FluxTransformer2DModel: text-to-image flow transformer on packed latents, FLUX.1 with and without embedded guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, FEED_FORWARD, TEXT_ATTENTION, TEXT_FEED_FORWARD
from diffdistill.models.network import Family, Values

_FEED_FORWARD = (*FEED_FORWARD, *TEXT_FEED_FORWARD, "proj_mlp", "proj_out")  # the latter two of the single blocks
LATENT_SIZE = 128  # edge of the latents of FluxPipeline's default image; the network itself names no size


def pack(x: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H/2 * W/2, 4 C): each is a patch of 2x2, channels first."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (B, H/2 * W/2, 4 C) as latents (B, C, H, W): the inverse of `pack`."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def position_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return (0, row, column) of each token of latents (H, W), (H/2 * W/2, 3) float32."""
    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=device), torch.arange(width // 2, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


class Flux(Family):
    """How to call diffusers' FluxTransformer2DModel; its time is sigma. Text tokens all sit at position (0, 0, 0).

    A network with `guidance_embeds` (FLUX.1-dev) takes the guidance scale as an input and runs once.
    """

    name = "flux"
    component = "transformer"
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    reads_text = True
    lora_targets = {
        "attention": (*ATTENTION, *TEXT_ATTENTION),
        "attention+ff": (*ATTENTION, *TEXT_ATTENTION, *_FEED_FORWARD),
        "all": (
            *ATTENTION,
            *TEXT_ATTENTION,
            *_FEED_FORWARD,
            "norm.linear",
            "norm1.linear",
            "norm1_context.linear",
            "norm_out.linear",
            "x_embedder",
            "context_embedder",
        ),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W), of latents that are packed here."""
        values = cond.values
        text = values["encoder_hidden_states"].to(x.dtype)
        height, width = x.shape[2:]
        tokens = network(
            hidden_states=pack(x),
            timestep=t.float() / 1000,
            guidance=values.get("embedded_guidance"),
            pooled_projections=values["pooled_projections"].to(x.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=position_ids(height, width, x.device),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def encode(self, pipeline: Any, prompts: list[str]) -> tuple[Values, Values]:
        """Return T5's states and CLIP's pooled output, and those of the empty prompt for guidance by two passes."""
        states, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.device)
        null, null_pooled, _ = pipeline.encode_prompt([""], device=pipeline.device)
        values = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return values, {"encoder_hidden_states": null, "pooled_projections": null_pooled}

    def guidance_input(self, network: Any, guidance: float) -> Values:
        """Return the scale, which FLUX.1-dev's kind embeds."""
        return {"embedded_guidance": torch.tensor([guidance])} if network.config.guidance_embeds else {}

    def usual_guidance(self, network: Any, of_pipeline: float) -> float:
        """Return 1: guidance is an input of the network, or distilled away (FLUX.1-schnell)."""
        return 1.0

    def sample_shape(self, network: Any) -> tuple[int, int, int]:
        """Return (C, H, W) of the unpacked latents of the pipeline's default size."""
        return network.config.in_channels // 4, LATENT_SIZE, LATENT_SIZE

    def multiple(self, network: Any) -> int:
        """Return 2, the edge of what `pack` makes a token of."""
        return 2

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the time MLP; embedded guidance and pooled text are added to its output."""
        return [network.time_text_embed.timestep_embedder]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the norms of the image tokens' feed-forward input in each double block, the last also under "mid"."""
        blocks = list(network.transformer_blocks)
        return {"mid": blocks[-1].norm2} | {f"block.{i}": block.norm2 for i, block in enumerate(blocks)}

    def num_tokens(self, network: Any, sample_shape: tuple[int, int, int]) -> int:
        """Return the number of packed tokens."""
        return (sample_shape[1] // 2) * (sample_shape[2] // 2)
