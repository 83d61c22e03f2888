"""DiTTransformer2DModel: class-conditional transformer on the latents of an autoencoder (DiTPipeline)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, FEED_FORWARD, numbered
from diffdistill.models.network import Classes, Family


class DiT(Family):
    """How to call diffusers' DiTTransformer2DModel.

    The table of labels has one row more than `num_embeds_ada_norm`: the null label. Networks in train mode drop labels by
    themselves, so they are kept in eval mode throughout. Where the network also emits a variance (twice the channels),
    the first half is the prediction.
    """

    name = "dit"
    component = "transformer"
    blocks = ("BasicTransformerBlock",)
    lora_targets = {
        "attention": ATTENTION,
        "attention+ff": (*ATTENTION, *FEED_FORWARD),
        "all": (
            *ATTENTION,
            *FEED_FORWARD,
            "norm1.linear",
            "linear_1",
            "linear_2",
            "proj_out_1",
            "proj_out_2",
            "pos_embed.proj",
        ),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W); an unconditional call uses the null label."""
        labels = cond.values.get("class_labels")
        if labels is None:
            labels = torch.full((len(x),), network.config.num_embeds_ada_norm, device=x.device)
        raw = network(x, timestep=t.float(), class_labels=labels, return_dict=False)[0]
        return raw[:, : x.shape[1]]

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return every block's own time MLP (DiT's blocks do not share one)."""
        return [block.norm1.emb.timestep_embedder for block in network.transformer_blocks]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the blocks, the middle one also under "mid"."""
        return numbered(network.transformer_blocks)

    def classes(self, network: Any, declared: int | None) -> Classes:
        """Return the classes; the null label is the row after the last class."""
        num = network.config.num_embeds_ada_norm
        return Classes(num, num)
