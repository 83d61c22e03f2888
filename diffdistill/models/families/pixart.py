"""PixArtTransformer2DModel: text-to-image transformer on latents, PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, FEED_FORWARD, numbered
from diffdistill.models.network import Family, Values


class PixArt(Family):
    """How to call diffusers' PixArtTransformer2DModel; where it also emits a variance, the first half is the prediction."""

    name = "pixart"
    component = "transformer"
    blocks = ("BasicTransformerBlock",)
    reads_text = True
    lora_targets = {
        "attention": ATTENTION,
        "attention+ff": (*ATTENTION, *FEED_FORWARD),
        "all": (*ATTENTION, *FEED_FORWARD, "adaln_single.linear", "linear_1", "linear_2", "proj_out", "pos_embed.proj"),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W); t goes in as float32, so fractional times are kept."""
        values = cond.values
        raw = network(
            x,
            encoder_hidden_states=values["encoder_hidden_states"].to(x.dtype),
            encoder_attention_mask=values["encoder_attention_mask"],
            timestep=t.float(),
            added_cond_kwargs={name: values.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return raw[:, : x.shape[1]]

    def encode(self, pipeline: Any, prompts: list[str]) -> tuple[Values, Values]:
        """Return T5's states and mask."""
        states, mask, null, null_mask = pipeline.encode_prompt(prompts, device=pipeline.device)
        values = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return values, {"encoder_hidden_states": null, "encoder_attention_mask": null_mask}

    def constants(self, network: Any, image_size: tuple[int, int]) -> Values:
        """Return resolution and aspect ratio for the one network that takes them, PixArt-alpha's of 1024 pixels."""
        if not network.use_additional_conditions:
            return {}
        height, width = image_size
        return {"resolution": torch.tensor([[height, width]]).float(), "aspect_ratio": torch.tensor([[height / width]])}

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the time MLP."""
        return [network.adaln_single.emb.timestep_embedder]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the blocks, the middle one also under "mid"."""
        return numbered(network.transformer_blocks)
