"""Published text-to-image models without their weights: networks of the published configurations, and teachers made of them.

What a step costs and keeps depends on shapes alone, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffdistill.math.schedules import RectifiedFlowSchedule, Schedule, VPSchedule
from diffdistill.models.codec import Codec
from diffdistill.models.conditioning import Asked, Conditioning
from diffdistill.models.families import FAMILIES
from diffdistill.models.loading import Teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.weightless import on_meta

SCHEDULE = VPSchedule(torch.linspace(0.99, 0.01, 1000))  # any: costs do not depend on it


def sd15() -> Any:
    """Return the network of Stable Diffusion 1.5, 860 M parameters."""
    import diffusers

    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> Any:
    """Return the network of SDXL, 2.6 B parameters."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def flux() -> Any:
    """Return the network of FLUX.1-dev, 11.9 B parameters."""
    import diffusers

    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def pixart() -> Any:
    """Return the network of PixArt-alpha at 512 pixels, 0.6 B parameters."""
    import diffusers

    return diffusers.PixArtTransformer2DModel(sample_size=64, caption_channels=4096)


def sd3() -> Any:
    """Return the network of Stable Diffusion 3.5 medium, 2.5 B parameters."""
    import diffusers

    return diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def sana() -> Any:
    """Return the network of Sana at 512 pixels, 1.6 B parameters."""
    import diffusers

    return diffusers.SanaTransformer2DModel(sample_size=16)


def kl_autoencoder(latent_channels: int = 4) -> Any:
    """Return the autoencoder of Stable Diffusion 1.5, SDXL and PixArt-alpha, or with 16 channels that of SD3 and FLUX.1."""
    import diffusers

    channels = (128, 256, 512, 512)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=latent_channels,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
    )


def dc_autoencoder() -> Any:
    """Return the autoencoder of Sana, which divides edges by 32."""
    import diffusers

    return diffusers.AutoencoderDC(
        downsample_block_type="conv", upsample_block_type="interpolate", encoder_layers_per_block=(2, 2, 2, 3, 3, 3)
    )


@dataclass(frozen=True)
class Published:
    """A published text-to-image model.

    Attributes:
        build: its network.
        autoencoder: builds that.
        schedule, kind: the path its states live on, and what the network emits.
        state: (C, H, W) of the states at the size its recipes train.
        prompt: name -> shape of what a prompt is encoded to.
        constants: name -> shape of what every prompt gets besides.
    """

    build: Callable[[], Any]
    autoencoder: Callable[[], Any]
    schedule: Schedule
    kind: str
    state: tuple[int, int, int]
    prompt: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, tuple[int, ...]]


FLOW = RectifiedFlowSchedule(3.0)
MASKED = "encoder_attention_mask"
MODELS: dict[str, Published] = {  # by the first part of the recipes' names
    "sd15": Published(sd15, kl_autoencoder, SCHEDULE, "epsilon", (4, 64, 64), {"encoder_hidden_states": (77, 768)}, {}),
    "sdxl": Published(
        sdxl,
        kl_autoencoder,
        SCHEDULE,
        "epsilon",
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)},
        {"time_ids": (6,)},
    ),
    "pixart": Published(
        pixart, kl_autoencoder, SCHEDULE, "epsilon", (4, 64, 64), {"encoder_hidden_states": (120, 4096), MASKED: (120,)}, {}
    ),
    "sd3": Published(
        sd3,
        partial(kl_autoencoder, 16),
        FLOW,
        "flow_prediction",
        (16, 128, 128),
        {"encoder_hidden_states": (77 + 256, 4096), "pooled_projections": (2048,)},
        {},
    ),
    "flux": Published(
        flux,
        partial(kl_autoencoder, 16),
        FLOW,
        "flow_prediction",
        (16, 64, 64),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)},
        {"embedded_guidance": ()},
    ),
    "sana": Published(
        sana, dc_autoencoder, FLOW, "flow_prediction", (32, 16, 16), {"encoder_hidden_states": (300, 2304), MASKED: (300,)}, {}
    ),
}


@dataclass(frozen=True)
class StatedPrompts:
    """Makes conditions of stated shapes, of zeros."""

    model: Published
    dtype: torch.dtype
    device: torch.device
    conditioning: Conditioning = "text"
    fingerprint: str = ""

    @property
    def null(self) -> Mapping[str, Tensor]:
        """Return the empty prompt."""
        return self._zeros(self.model.prompt, 1)

    def values(self, asked: Asked, batch_size: int | None = None) -> dict[str, Tensor]:
        """Return as many prompts."""
        return self._zeros({**self.model.prompt, **self.model.constants}, batch_size or 1)

    def _zeros(self, shapes: Mapping[str, tuple[int, ...]], num: int) -> dict[str, Tensor]:
        kinds = {name: torch.int64 if name == MASKED else self.dtype for name in shapes}
        return {name: torch.zeros(num, *shape, dtype=kinds[name], device=self.device) for name, shape in shapes.items()}


def teacher_of(model: Published, network: Any, state: tuple[int, int, int], autoencoder: Any = None) -> Teacher:
    """Return a model as a teacher without text encoders, and where none is given without autoencoder."""
    first = next(network.parameters())
    family = FAMILIES[type(network).__name__]
    denoiser = NetworkDenoiser(network.eval().requires_grad_(False), family, model.schedule, model.kind, state)
    prompts = StatedPrompts(model, first.dtype, first.device)
    return Teacher(denoiser, family, network, Codec(autoencoder), {}, "", "", guidance=1.0, steps=1, conditioner=prompts)


def random_network(build: Callable[[], Any], device: torch.device, std: float = 0.02) -> Any:
    """Return a network in bfloat16 on a device, its weights normal with a standard deviation that keeps outputs finite."""
    network = on_meta(build, torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.normal_(0, std, generator=generator)
    return network


def random_teacher(name: str, device: torch.device) -> Teacher:
    """Return a published network, a key of MODELS, with random weights."""
    model = MODELS[name]
    return teacher_of(model, random_network(model.build, device), model.state)
