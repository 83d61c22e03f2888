"""UNet2DConditionModel: latent UNet with cross-attention to text, Stable Diffusion 1.x and 2.x (eps and v) and SDXL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, FEED_FORWARD
from diffdistill.models.network import Family, Framing, Values


class UNet2DCondition(Family):
    """How to call diffusers' UNet2DConditionModel.

    SDXL's (`addition_embed_type: text_time`) also take the second text encoder's pooled output and the sizes that the image is
    to look made for; both are part of the condition. Without a prompt SDXL takes zeros where its pipeline says so.
    """

    name = "unet2d_condition"
    component = "unet"
    reads_text = True
    lora_targets = {
        "attention": ATTENTION,
        "attention+ff": (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out"),
        "all": (
            *ATTENTION,
            *FEED_FORWARD,
            "proj_in",
            "proj_out",
            "conv1",
            "conv2",
            "conv_shortcut",
            "downsamplers.0.conv",
            "upsamplers.0.conv",
            "time_emb_proj",
        ),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W); t goes in as float32, so fractional times are kept."""
        values = cond.values
        added = {name: values[name] for name in ("text_embeds", "time_ids") if name in values}
        return network(
            x, t.float(), values["encoder_hidden_states"].to(x.dtype), added_cond_kwargs=added or None, return_dict=False
        )[0]

    def encode(self, pipeline: Any, prompts: list[str]) -> tuple[Values, Values]:
        """Return the text encoders' states, and for SDXL the pooled output of the second."""
        if getattr(pipeline, "text_encoder_2", None) is None:
            states, null = pipeline.encode_prompt(prompts, pipeline.device, 1, True, negative_prompt=[""] * len(prompts))
            return {"encoder_hidden_states": states}, {"encoder_hidden_states": null}
        states, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=pipeline.device)
        values = {"encoder_hidden_states": states, "text_embeds": pooled}
        return values, {"encoder_hidden_states": null, "text_embeds": null_pooled}

    def constants(self, network: Any, image_size: tuple[int, int]) -> Values:
        """Return SDXL's sizes: (height, width) of the original, no crop, (height, width) of the image."""
        if network.config.addition_embed_type != "text_time":
            return {}
        return {"time_ids": torch.tensor([[*image_size, 0, 0, *image_size]], dtype=torch.float32)}

    def framed(self, network: Any, framing: Framing) -> Values:
        """Return SDXL's sizes as they are of the image, as it was trained with."""
        if network.config.addition_embed_type != "text_time":
            return {}
        return {"time_ids": torch.tensor([[*framing.original, *framing.crop, *framing.size]], dtype=torch.float32)}

    def downscale(self, network: Any) -> int:
        """Return what all levels together divide the edges by: each but the last halves them."""
        return 2 ** (len(network.config.block_out_channels) - 1)

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the time MLP."""
        return [network.time_embedding]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the middle block and every up block."""
        return {"mid": network.mid_block} | {f"up.{i}": block for i, block in enumerate(network.up_blocks)}
