"""SanaTransformer2DModel: text-to-image flow transformer with linear attention on deep latents, Sana and Sana-Sprint."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.math.schedules import RectifiedFlowSchedule, Schedule
from diffdistill.models.condition import Condition
from diffdistill.models.families.common import ATTENTION, numbered
from diffdistill.models.network import Family, Values

_FEED_FORWARD = ("ff.conv_inverted", "ff.conv_point")


class Sana(Family):
    """How to call diffusers' SanaTransformer2DModel; Sana's time is 1000 sigma times `timestep_scale`.

    Sana-Sprint's pipeline walks on the TrigFlow path and translates at every call; its network is a rectified flow of time
    sigma, and is seen as that here. With u its time on the arc, sigma = sin u / (sin u + cos u), and the pipeline's latents
    are x_t (sin u + cos u) sigma_data. It takes the guidance scale as an input.
    """

    name = "sana"
    component = "transformer"
    blocks = ("SanaTransformerBlock",)
    reads_text = True
    image_multiple = 32
    lora_targets = {
        "attention": ATTENTION,
        "attention+ff": (*ATTENTION, *_FEED_FORWARD),
        "all": (*ATTENTION, *_FEED_FORWARD, "linear_1", "linear_2", "time_embed.linear", "proj_out", "patch_embed.proj"),
    }

    def forward(self, network: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the raw output, (B, C, H, W)."""
        values, config = cond.values, network.config
        raw = network(
            x,
            encoder_hidden_states=values["encoder_hidden_states"].to(x.dtype),
            encoder_attention_mask=values["encoder_attention_mask"],
            guidance=values.get("embedded_guidance"),
            timestep=t.float() / 1000 if config.guidance_embeds else t.float() * config.timestep_scale,
            return_dict=False,
        )[0]
        return raw[:, : x.shape[1]]

    def encode(self, pipeline: Any, prompts: list[str]) -> tuple[Values, Values]:
        """Return the language model's states and mask; Sana-Sprint knows no empty prompt."""
        encoded = pipeline.encode_prompt(prompts, device=pipeline.device, complex_human_instruction=_instruction(pipeline))
        values, null = (dict(zip(_NAMES, pair, strict=False)) for pair in (encoded[:2], encoded[2:]))
        return values, null

    def guidance_input(self, network: Any, guidance: float) -> Values:
        """Return the scale in the unit of Sana-Sprint's network, which embeds it."""
        config = network.config
        return {"embedded_guidance": torch.tensor([guidance * config.guidance_embeds_scale])} if config.guidance_embeds else {}

    def path(self, network: Any, scheduler: Any, sample_shape: tuple[int, int, int]) -> tuple[Schedule, str]:
        """Return the flow of the scheduler; for Sana-Sprint the flow that its network was trained on."""
        if network.config.guidance_embeds:
            return RectifiedFlowSchedule(), "flow_prediction"
        return super().path(network, scheduler, sample_shape)

    def time_modules(self, network: Any) -> list[nn.Module]:
        """Return the time MLP."""
        return [getattr(network.time_embed, "emb", network.time_embed).timestep_embedder]

    def taps(self, network: Any) -> dict[str, nn.Module]:
        """Return the blocks, the middle one also under "mid"."""
        return numbered(network.transformer_blocks)


_NAMES = ("encoder_hidden_states", "encoder_attention_mask")


def _instruction(pipeline: Any) -> list[str] | None:
    """Return the instruction that the pipeline puts before every prompt unless it is told another."""
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
