"""`kind: text_diffusion`: a latent text-to-image teacher with its text encoder, trained together, in a stock pipeline's format.

The network is called and the prompts are encoded as every teacher's are, through its `Family`, so what is trained here is what
`load_teacher` and the stock pipeline run.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.data.batches import MicroBatches, keyed_generator
from diffdistill.data.shapes import Captioned, Scenes, draw_scenes, shapes
from diffdistill.errors import UserError
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.shapes_detector import Obeyed, obeyed
from diffdistill.math import grids, prediction, transfer
from diffdistill.models.codec import Codec
from diffdistill.models.condition import Condition
from diffdistill.models.families import FAMILIES
from diffdistill.models.network import NetworkDenoiser, Values
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.training.teachers.fit import fit
from diffdistill.training.teachers.parts import (
    NUM_SHAPES,
    ImagesConfig,
    Trained,
    TrainingConfig,
    find_folder,
    keep_autoencoder_files,
    num_parameters,
)
from diffdistill.training.teachers.words import clip_tokenizer, name_fast_tokenizer, t5_tokenizer

NUM_JUDGED = 500  # samples drawn to measure a network at the end
IMAGES_PER_PASS = 250


class TextDiffusionConfig(TrainingConfig):
    """A latent text-to-image model of the embedded captioned shapes."""

    kind: Literal["text_diffusion"] = "text_diffusion"
    images: ImagesConfig = Field(ImagesConfig(source="shapes", size=32, channels=3), description="the captioned shapes")
    pipeline: Literal["StableDiffusionPipeline", "PixArtAlphaPipeline"] = Field(description="diffusers class it is written as")
    network_config: dict[str, Any] = Field(
        description="keyword arguments of the network's class: UNet2DConditionModel, or PixArtTransformer2DModel"
    )
    text_config: dict[str, Any] = Field(
        description="keyword arguments of the text encoder's configuration, CLIPTextConfig or T5Config, without those of its vocabulary"
    )
    max_tokens: int = Field(16, gt=2, description="tokens of a caption, start and end included")
    scheduler_config: dict[str, Any] = Field(
        description="keyword arguments of diffusers' DDIMScheduler; its prediction_type is what the network learns"
    )
    vae: str = Field(description="folder of the AutoencoderKL whose latents are modelled, a path or a shipped one")
    caption_dropout: float = Field(0.1, gt=0, lt=1, description="share of captions replaced by the empty one, for guidance")
    guidance: float = Field(3.0, ge=1, description="scale it is usually sampled with, counted from 1; its record keeps it")

    @model_validator(mode="after")
    def _are_shapes(self) -> TextDiffusionConfig:
        if self.images != ImagesConfig(source="shapes", size=32, channels=3):
            raise ValueError("text_diffusion is made for the embedded captioned shapes; leave `images` out")
        return self


class Trainable(nn.Module):
    """The network and its text encoder, which are trained together."""

    def __init__(self, network: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.network, self.text_encoder = network, text_encoder


def text_diffusion_loss(denoiser: NetworkDenoiser, x0: Tensor, cond: Condition, generator: torch.Generator) -> Tensor:
    """Return the mean squared error of the network's own output, timesteps uniform; 0-dim.

    Args:
        denoiser: on a schedule of timesteps.
        x0: clean states (B, C, H, W).
        cond: of B captions, some of them empty.
        generator: source of t and noise, on the CPU.
    """
    t = torch.randint(int(denoiser.schedule.t_max) + 1, (len(x0),), generator=generator).double().to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    at = denoiser.schedule.coefficients(t)
    output = denoiser(transfer.add_noise(x0, eps, at), t, cond)
    return F.mse_loss(output.raw, prediction.from_x0_eps(denoiser.kind, x0, eps, at.alpha, at.sigma))


def stable_diffusion(config: TextDiffusionConfig, captions: list[str], vae: Any) -> Any:
    """Return a StableDiffusionPipeline with initial weights and a tokenizer of the captions' words."""
    import diffusers
    import transformers

    tokenizer = clip_tokenizer(captions, config.max_tokens)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=config.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config.text_config,
    )
    network = diffusers.UNet2DConditionModel(**config.network_config)
    scheduler = diffusers.DDIMScheduler(**config.scheduler_config)
    return diffusers.StableDiffusionPipeline(
        vae, transformers.CLIPTextModel(text), tokenizer, network, scheduler, None, None, requires_safety_checker=False
    )


def pixart_alpha(config: TextDiffusionConfig, captions: list[str], vae: Any) -> Any:
    """Return a PixArtAlphaPipeline with initial weights and a T5 tokenizer of the captions' words."""
    import diffusers
    import transformers

    tokenizer = t5_tokenizer(captions, config.max_tokens)
    text = transformers.T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dropout_rate=0.0,
        **config.text_config,
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel(text),
        vae=vae,
        transformer=diffusers.PixArtTransformer2DModel(**config.network_config),
        scheduler=diffusers.DDIMScheduler(**config.scheduler_config),
    )


BUILDERS: dict[str, Callable[[TextDiffusionConfig, list[str], Any], Any]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "PixArtAlphaPipeline": pixart_alpha,
}


def t5_prompts(pipeline: Any, captions: list[str]) -> tuple[Values, Values]:
    """Return T5's states and mask of B captions and of the empty one, without the masked padding behind the longest caption.

    PixArt's pipeline pads to 120 tokens, all of which T5 would encode at every step.
    """
    tokens = pipeline.tokenizer([*captions, ""], padding=True, return_tensors="pt").to(pipeline.text_encoder.device)
    states = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    both = {"encoder_hidden_states": states, "encoder_attention_mask": tokens.attention_mask}
    return {name: value[:-1] for name, value in both.items()}, {name: value[-1:] for name, value in both.items()}


ENCODERS: dict[str, Callable[[Any, list[str]], tuple[Values, Values]]] = {"PixArtAlphaPipeline": t5_prompts}
"""What encodes captions in training where that is less work than the family's way; equal to it but for rounding."""


class _Model(NamedTuple):
    pipeline: Any
    denoiser: NetworkDenoiser

    @property
    def trained(self) -> Trainable:
        """The network and the text encoder."""
        return Trainable(self.denoiser.network, self.pipeline.text_encoder)

    def condition(self, captions: list[str]) -> Condition:
        """Return the condition of B captions as the stock pipeline encodes them, with gradients where they are on."""
        encode = ENCODERS.get(type(self.pipeline).__name__, self.denoiser.family.encode)
        values, null = encode(self.pipeline, captions)
        return Condition(len(captions), values, {name: value[:1] for name, value in null.items()})


def build(config: TextDiffusionConfig, captions: list[str], device: torch.device) -> _Model:
    """Build the pipeline with initial weights from the config's seed, and its denoiser.

    Raises:
        UserError: no such autoencoder, or arguments that build no network.
    """
    import diffusers

    folder = find_folder(config.vae, "autoencoder")
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a readable AutoencoderKL: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            pipeline = BUILDERS[config.pipeline](config, captions, vae)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"network_config, text_config or scheduler_config does not build: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    model = _Model(pipeline, _denoiser(pipeline))
    for part in (pipeline.vae.requires_grad_(False), pipeline.text_encoder, model.denoiser.network):
        part.eval().to(device)
    return model


def _denoiser(pipeline: Any) -> NetworkDenoiser:
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    family = FAMILIES[type(network).__name__]
    shape = family.sample_shape(network)
    schedule, kind = family.path(network, pipeline.scheduler, shape)
    return NetworkDenoiser(network, family, schedule, kind, shape)


def train(config: TextDiffusionConfig, device: torch.device, progress: bool, snapshot_every: int | None) -> Iterator[Trained]:
    """Train network and text encoder together, and measure which captions the samples of their averages obey."""
    data = shapes(NUM_SHAPES)
    captions = data.scenes.captions()
    model = build(config, captions, device)
    x0 = _latents(data, Codec(model.pipeline.vae), device)
    batches = MicroBatches(len(x0), config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss_at(step: int) -> Tensor:
        generator = keyed_generator(config.seed, "train", step)
        index = batches.indices(step, 0)
        dropped = (torch.rand(len(index), generator=generator) < config.caption_dropout).tolist()
        asked = ["" if drop else captions[k] for k, drop in zip(index.tolist(), dropped, strict=True)]
        return text_diffusion_loss(model.denoiser, x0[index].to(device), model.condition(asked), generator)

    trained = model.trained
    for fitted in fit(trained, loss_at, config.fit, progress, snapshot_every):
        ema = _averaged(model, fitted.ema)
        measures = {
            "num_parameters": num_parameters(trained),
            "train_loss": fitted.loss,
            "obeyed_at_25_ddim_steps": _judge(ema, config.guidance, config.seed, device),
        }
        yield Trained(fitted.steps, measures, functools.partial(_save, ema, config.vae))


def _latents(data: Captioned, codec: Codec, device: torch.device) -> Tensor:
    return torch.cat([codec.encode(part.to(device)).cpu() for part in data.images.split(IMAGES_PER_PASS)])


def _averaged(model: _Model, ema: Any) -> _Model:
    """Return the pipeline with the averaged weights."""
    pipeline = copy.copy(model.pipeline)
    pipeline.register_modules(**{model.denoiser.family.component: ema.network, "text_encoder": ema.text_encoder})
    return _Model(pipeline, _denoiser(pipeline))


@torch.no_grad()
def _judge(model: _Model, guidance: float, seed: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the share of captions obeyed in 25 DDIM steps without and with guidance; a tenth of the pairs was never trained on."""
    scenes = draw_scenes(NUM_JUDGED, keyed_generator(seed, "judged captions"))
    return {f"guidance {scale:g}": shares(_samples(model, scenes, scale, device), scenes) for scale in sorted({1.0, guidance})}


def shares(images: Tensor, scenes: Scenes) -> dict[str, float]:
    """Return the share of images that obey each part of their caption."""
    return {name: part.double().mean().item() for name, part in zip(Obeyed._fields, obeyed(images, scenes), strict=True)}


def _samples(model: _Model, scenes: Scenes, guidance: float, device: torch.device) -> Tensor:
    sampler = Sampler(grids.trailing(model.denoiser.schedule, 25), guidance=guidance)
    codec, captions, images = Codec(model.pipeline.vae), scenes.captions(), []
    for start in range(0, len(captions), IMAGES_PER_PASS):
        part = captions[start : start + IMAGES_PER_PASS]
        noise = Noise(list(range(start, start + len(part))), device)
        images.append(to_uint8(codec.decode(sampler.sample(model.denoiser, noise, model.condition(part))).clamp(-1, 1)).cpu())
    return torch.cat(images)


def _save(model: _Model, vae: str, folder: Path) -> None:
    model.pipeline.save_pretrained(folder, safe_serialization=True)
    keep_autoencoder_files(vae, folder / "vae")
    name_fast_tokenizer(folder / "model_index.json")
