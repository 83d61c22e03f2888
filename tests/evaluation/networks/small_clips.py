"""CLIP networks of a few thousand weights, and files of theirs in every published layout."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.evaluation.networks.clip import Clip
from diffdistill.evaluation.networks.clip_towers import TOWERS, Tower

VISION = dict(image_size=28, patch_size=14, width=32, layers=2, head_width=16)
TEXT = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2)


def small(name: str, **changes) -> Tower:
    """The tower of that name with small shapes."""
    return dataclasses.replace(TOWERS[name], embed_dim=8, vision=VISION, text=TEXT, **changes)


OPENAI, LAION, HUGE = small("clip-vit-l-14"), small("clip-vit-l-14-laion"), small("clip-vit-h-14")


def network(tower: Tower, seed: int = 0, rounded: bool | None = None) -> nn.Module:
    """open_clip's module with random weights large enough for the activations to matter; its matrices float16 numbers as published."""
    model = Clip.random(seed, tower).network
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
        for name, part in model.named_parameters():
            if "mlp" in name:
                part.mul_(3)
            if tower.rounded if rounded is None else rounded:
                part.copy_(part.half() if part.ndim > 1 else part)
    return model


def images(count: int = 3, size: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5)) * 255


def write_openai(model: nn.Module, path: Path) -> Path:
    """TorchScript as OpenAI's files are: matrices in float16, the sizes as numbers beside them."""
    model = copy.deepcopy(model)
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask  # OpenAI's is no buffer
    for name, value in (("input_resolution", 28), ("context_length", 77), ("vocab_size", 49408)):
        vars(model).pop(name, None)  # open_clip's own note of it
        model.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(model, (torch.zeros(1, 3, 28, 28), torch.zeros(1, 77, dtype=torch.long)), check_trace=False)
        for part in traced.parameters():
            part.data = part.data.half() if part.ndim > 1 else part.data
        traced.save(str(path))
    return path


def write_open_clip(model: nn.Module, folder: Path, tower: Tower, **config) -> Path:
    """A folder of open_clip; `config` goes into model_cfg."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    cfg = dict(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT) | (
        {"quick_gelu": True} if tower.activation == "quick_gelu" else {}
    )
    preprocess = dict(mean=tower.mean, std=tower.std)
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg | config, preprocess_cfg=preprocess)))
    return folder


def transformers_clip(tower: Tower):
    """transformers' CLIPModel of the same shapes, random."""
    from transformers import CLIPConfig, CLIPModel

    shared = dict(hidden_act=tower.activation, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(hidden_size=32, intermediate_size=128, image_size=28, patch_size=14, **shared)
    text = dict(
        hidden_size=16, intermediate_size=64, vocab_size=49408, max_position_embeddings=77, eos_token_id=49407, **shared
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval().requires_grad_(False)
        for name, part in model.named_parameters():
            part.copy_(part * 3 if "mlp" in name else part + 0.1 * torch.randn_like(part) if "embeddings" in name else part)
            if tower.rounded:
                part.copy_(part.half() if part.ndim > 1 else part)
    return model
