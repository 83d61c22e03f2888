"""Small real diffusers networks with random weights, from torch's global seed, and how a pipeline of them is saved."""

import json
from pathlib import Path


def unet(attention: bool = True, **options):
    """Return a UNet2DModel on 8x8 grey images; `options` replace its arguments."""
    from diffusers import UNet2DModel

    down, up = ("AttnDownBlock2D", "AttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", down),
        "up_block_types": (up, "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**(arguments | options))


def dit(**options):
    """Return a DiTTransformer2DModel of three classes on 8x8 states of one channel; `options` replace its arguments."""
    from diffusers import DiTTransformer2DModel

    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 3,
    }
    return DiTTransformer2DModel(**(arguments | options))


def vae(channels: int = 3, latent_channels: int = 4):
    """Return an AutoencoderKL from 8x8 images to 4x4 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latent_channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
    )


def save(pipeline, folder: Path, **declared) -> Path:
    """Save a pipeline, with what `diffdistill teacher` would declare beside it; return the folder."""
    pipeline.save_pretrained(folder)
    if declared:
        (folder / "diffdistill_teacher.json").write_text(json.dumps({"config": declared}))
    return folder
