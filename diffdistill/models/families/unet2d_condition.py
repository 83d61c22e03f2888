"""UNet2DConditionModel: latent UNet with cross-attention to text, Stable Diffusion 1.x and 2.x (eps and v) and SDXL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, FEED_FORWARD
from diffdistill.models.network import Family, Framing, Values

GUIDANCE_WIDTH = 256  # of latent consistency models


def guidance_waves(w: Tensor, width: int) -> Tensor:
    """Return sines and cosines of 1000 (w - 1) for w (B,), counted from 1: (B, width) float32.

    Rounded where stock pipelines round, the frequencies on the CPU (`get_guidance_scale_embedding`, whose w counts from 0): at w = 15
    the angles reach 14,000, and those rounded elsewhere differ by a thousandth.
    """
    half = width // 2
    rate = torch.log(torch.tensor(10_000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -rate).to(w.device, non_blocking=True)
    angles = ((w - 1).float() * 1000.0)[:, None] * frequencies  # (B, F)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNet2DCondition(Family):
    """How to call diffusers' UNet2DConditionModel.

    SDXL's (`addition_embed_type: text_time`) also take the second text encoder's pooled output and the sizes that the image is
    to look made for; both are part of the condition. Without a prompt SDXL takes zeros where its pipeline says so.

    With `time_cond_proj_dim` (latent consistency models) the guidance scale w, "guidance" in the condition, is an input: a projection
    of its waves is added to those of the time. A condition without w adds nothing.
    """

    name = "unet2d_condition"
    component = "unet"
    blocks = ("ResnetBlock2D", "BasicTransformerBlock")
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
        width, w = network.config.time_cond_proj_dim, values.get("guidance")
        waves = None if width is None or w is None else guidance_waves(w, width).to(x.dtype)
        return network(
            x,
            t.float(),
            values["encoder_hidden_states"].to(x.dtype),
            timestep_cond=waves,
            added_cond_kwargs=added or None,
            return_dict=False,
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

    def guidance_input(self, network: Any, guidance: float) -> Values:
        """Return w for a latent consistency model's kind of network; in float64, since `guidance_waves` says where it is rounded."""
        takes = network.config.time_cond_proj_dim is not None
        return {"guidance": torch.tensor([guidance], dtype=torch.float64)} if takes else {}

    def guidance_slot(self, network: Any) -> str:
        """Return the projection of w's waves."""
        return "time_embedding.cond_proj"

    def add_guidance_slot(self, network: Any) -> None:
        """Give the network that projection, as `time_cond_proj_dim` would have."""
        first = network.time_embedding.linear_1
        projection = nn.Linear(GUIDANCE_WIDTH, first.in_features, bias=False)
        nn.init.zeros_(projection.weight)
        network.time_embedding.cond_proj = projection.to(first.weight.device, first.weight.dtype)
        network.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)

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
