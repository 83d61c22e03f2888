"""SD3Transformer2DModel: text-to-image flow transformer on latents, Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, FEED_FORWARD, TEXT_ATTENTION, TEXT_FEED_FORWARD, numbered
from diffdistill.models.network import Family, Values

_FEED_FORWARD = (*FEED_FORWARD, *TEXT_FEED_FORWARD)


class SD3(Family):
    """How to call diffusers' SD3Transformer2DModel; its time is 1000 sigma."""

    name = "sd3"
    component = "transformer"
    blocks = ("JointTransformerBlock",)
    reads_text = True
    lora_targets = {
        "attention": (*ATTENTION, *TEXT_ATTENTION),
        "attention+ff": (*ATTENTION, *TEXT_ATTENTION, *_FEED_FORWARD),
        "all": (
            *ATTENTION,
            *TEXT_ATTENTION,
            *_FEED_FORWARD,
            "norm1.linear",
            "norm1_context.linear",
            "norm_out.linear",
            "proj_out",
            "context_embedder",
            "pos_embed.proj",
        ),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W)."""
        values = cond.values
        return network(
            hidden_states=x,
            encoder_hidden_states=values["encoder_hidden_states"].to(x.dtype),
            pooled_projections=values["pooled_projections"].to(x.dtype),
            timestep=t.float(),
            return_dict=False,
        )[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> tuple[Values, Values]:
        """Return the states of the two CLIPs and T5 (zeros for a T5 that is left out), and the pooled ones of the CLIPs."""
        states, null, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, device=pipeline.device)
        values = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return values, {"encoder_hidden_states": null, "pooled_projections": null_pooled}

    def longest_edge(self, network: Any) -> int:
        """Return the edge of the table of positions, of which smaller images take the middle."""
        return network.config.pos_embed_max_size * network.config.patch_size

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the time MLP; the pooled text is added to its output."""
        return [network.time_text_embed.timestep_embedder]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the blocks' norms of the image tokens' feed-forward input, the middle one also under "mid"."""
        return numbered([block.norm2 for block in network.transformer_blocks])

    def num_tokens(self, network: Any, sample_shape: tuple[int, int, int]) -> int:
        """Return the number of patches."""
        patch = network.config.patch_size
        return (sample_shape[1] // patch) * (sample_shape[2] // patch)
