"""`kind: clip`: a small CLIP of the captioned shapes, written as open_clip writes and loads one.

It judges images by drawn ones alone: no generated image and no weight of a generator goes into it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffdistill.data.batches import keyed_generator
from diffdistill.data.shapes import SIDE, SIZES, Captioned, Scenes, draw_images, draw_scenes, shape_captions
from diffdistill.errors import UserError
from diffdistill.files import write_json
from diffdistill.training.teachers.fit import fit
from diffdistill.training.teachers.parts import ImagesConfig, Trained, TrainingConfig, num_parameters
from diffdistill.training.teachers.words import clip_tokenizer

NUM_JUDGED = 256  # images that are matched with as many captions
MEAN = STD = (0.5, 0.5, 0.5)  # of the preprocessing, which gives [-1, 1]


class ClipConfig(TrainingConfig):
    """A CLIP of the embedded captioned shapes, all pairs of things included: it must know what generators are asked for."""

    kind: Literal["clip"] = "clip"
    images: ImagesConfig = Field(ImagesConfig(source="shapes", size=32, channels=3), description="the captioned shapes")
    embed_dim: int = Field(64, gt=0, description="length of an image's and of a caption's vector")
    vision_config: dict[str, Any] = Field(description="keyword arguments of open_clip's CLIPVisionCfg, without image_size")
    text_config: dict[str, Any] = Field(
        description="keyword arguments of open_clip's CLIPTextCfg, without those of the vocabulary"
    )
    max_tokens: int = Field(16, gt=2, description="tokens of a caption, start and end included")

    @model_validator(mode="after")
    def _are_shapes(self) -> ClipConfig:
        if self.images != ImagesConfig(source="shapes", size=32, channels=3):
            raise ValueError("clip is made for the embedded captioned shapes; leave `images` out")
        return self


def twins(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Return scenes that differ from the given ones in one word: the relation turned round, or the first thing's size."""
    turned = (torch.rand(len(scenes.relation), generator=generator) < 0.5) & scenes.is_pair
    relation = torch.where(turned, scenes.relation ^ 1, scenes.relation)
    size = scenes.size.clone()
    size[:, 0] = torch.where(turned, size[:, 0], len(SIZES) - 1 - size[:, 0])
    return scenes._replace(relation=relation, size=size)


def draw_batch(num: int, generator: torch.Generator) -> Captioned:
    """Return `num` new images; half of them are twins of the others, so that no word of a caption can be passed over."""
    half = draw_scenes(num - num // 2, generator)
    other = twins(half.select(torch.arange(num // 2)), generator)
    scenes = Scenes(*(torch.cat(fields) for fields in zip(half, other, strict=True)))
    return Captioned(draw_images(scenes, generator), scenes)


def matched(images: Tensor, texts: Tensor) -> float:
    """Return the share of images (N, d) whose own caption, row by row in texts (N, d), is the most similar of all N."""
    return ((images @ texts.T).argmax(1) == torch.arange(len(images), device=images.device)).double().mean().item()


def train(config: ClipConfig, device: torch.device, progress: bool, snapshot_every: int | None) -> Iterator[Trained]:
    """Train by the symmetric cross entropy over the batch, and measure how often an unseen image finds its caption."""
    from open_clip import ClipLoss

    tokenizer = clip_tokenizer(shape_captions(3000, only_trained=False), config.max_tokens)
    described, network = build(config, tokenizer)
    network.to(device)
    criterion = ClipLoss()
    tokens = functools.partial(_tokens, tokenizer, device)

    def loss_at(step: int) -> Tensor:
        batch = draw_batch(config.fit.batch_size, keyed_generator(config.seed, "train", step))
        image, text, scale = network(batch.images.to(device), tokens(batch.scenes))[:3]
        return criterion(image, text, scale.clamp(max=100))

    judged = draw_batch(NUM_JUDGED, keyed_generator(config.seed, "judge"))
    for fitted in fit(network, loss_at, config.fit, progress, snapshot_every):
        with torch.no_grad():
            image, text = fitted.ema(judged.images.to(device), tokens(judged.scenes))[:2]
        measures = {
            "num_parameters": num_parameters(network),
            "train_loss": fitted.loss,
            "caption_found_among_256": matched(image, text),
            "mean_cosine": (image * text).sum(1).double().mean().item(),
        }
        yield Trained(fitted.steps, measures, functools.partial(_save, fitted.ema, described, tokenizer))


def build(config: ClipConfig, tokenizer: Any) -> tuple[dict[str, Any], nn.Module]:
    """Return open_clip's description of the model, and the model with initial weights from the config's seed."""
    from open_clip import CLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vocabulary = {"vocab_size": len(tokenizer), "context_length": config.max_tokens, "hf_tokenizer_name": "shapes"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            vision = CLIPVisionCfg(image_size=SIDE, **config.vision_config)
            text = CLIPTextCfg(**vocabulary, **config.text_config)
            network = CLIP(config.embed_dim, vision, text).eval()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"vision_config and text_config do not build an open_clip CLIP: {error}") from error
    chosen = {"embed_dim": config.embed_dim, "vision_cfg": _given(vision), "text_cfg": _given(text)}
    return chosen, network


def _given(settings: Any) -> dict[str, Any]:
    """Return the fields that differ from their default, which is all that open_clip's files hold."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default}


def _tokens(tokenizer: Any, device: torch.device, scenes: Scenes) -> Tensor:
    padded = tokenizer(scenes.captions(), padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids.to(device)


def _save(network: nn.Module, described: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    write_json(folder / "open_clip_config.json", {"model_cfg": described, "preprocess_cfg": preprocess})
    tokenizer.save_pretrained(folder)
