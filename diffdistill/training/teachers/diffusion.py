"""`kind: diffusion`: a class-conditional teacher, a UNet on pixels or a DiT on latents.

A UNet is written as ConsistencyModelPipeline, the one stock pipeline that feeds class labels to UNet2DModel; a DiT as
DiTPipeline.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.data.batches import ImageSource, MicroBatches, keyed_generator
from diffdistill.data.digits import NUM_CLASSES
from diffdistill.errors import UserError
from diffdistill.evaluation.digits_net import DigitsNet
from diffdistill.evaluation.images import to_uint8
from diffdistill.training.teachers.fit import fit
from diffdistill.training.teachers.parts import (
    Trained,
    TrainingConfig,
    build_network,
    find_folder,
    keep_autoencoder_files,
    load_images,
    num_parameters,
)

NUM_JUDGED = 1000  # samples drawn to measure a network at the end


class DiffusionConfig(TrainingConfig):
    """A class-conditional diffusion model."""

    kind: Literal["diffusion"] = "diffusion"
    network: Literal["UNet2DModel", "DiTTransformer2DModel"] = Field(description="diffusers class of the denoiser")
    network_config: dict[str, Any] = Field(description="keyword arguments of that class; no dropout")
    scheduler_config: dict[str, Any] = Field(
        description="keyword arguments of diffusers' DDIMScheduler; its prediction_type is what the network learns"
    )
    vae: str | None = Field(
        None,
        description="folder of the AutoencoderKL whose latents are modelled (a path, or the "
        "shipped digits-dit/vae); null to model pixels. A DiT needs one, a UNet takes none",
    )
    num_classes: int = Field(NUM_CLASSES, gt=0, description="classes; the empty label is index num_classes")
    label_dropout: float = Field(0.1, gt=0, lt=1, description="share of labels replaced by the empty one, for guidance")
    classifier: str | None = Field(
        None,
        description="folder of a DigitsNet that judges samples at the end (a path, or "
        "the shipped digits-classifier); null for no judgement",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DiffusionConfig:
        is_unet = self.network == "UNet2DModel"
        if is_unet != (self.vae is None):
            raise ValueError(
                "the stock pipelines hold a UNet2DModel without a VAE and a DiTTransformer2DModel with "
                f"one; got {self.network} with vae={self.vae!r}"
            )
        key, rows = ("num_class_embeds", self.num_classes + 1) if is_unet else ("num_embeds_ada_norm", self.num_classes)
        if self.network_config.get(key) != rows:
            raise ValueError(
                f"network_config.{key} must be {rows} for num_classes={self.num_classes}"
                f"{' and one empty label' if is_unet else ''}; got {self.network_config.get(key)}"
            )
        if self.network_config.get("dropout"):
            raise ValueError("network_config.dropout has no effect, as networks train in eval mode; leave it out")
        if self.scheduler_config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "scheduler_config.prediction_type must be epsilon, v_prediction or sample; got "
                f"{self.scheduler_config.get('prediction_type')!r}"
            )
        return self


# The mathematics


def diffusion_loss(
    network: nn.Module,
    scheduler: Any,
    x0: Tensor,
    labels: Tensor,
    null_label: int,
    label_dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the plain mean squared error of the network's own prediction, t uniform over the scheduler's steps; 0-dim.

    Args:
        network: called as network(x_t, timestep=t, class_labels=labels).
        scheduler: gives add_noise, get_velocity and prediction_type.
        x0: clean states (B, C, H, W).
        labels: (B,) int64; a share `label_dropout` becomes `null_label`.
        generator: source of t, noise and dropped labels, on the CPU whatever the device of x0.
    """
    count = len(x0)
    t = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    dropped = (torch.rand(count, generator=generator) < label_dropout).to(x0.device)
    x_t = scheduler.add_noise(x0, eps, t)
    output = network(x_t, timestep=t, class_labels=labels.masked_fill(dropped, null_label)).sample
    targets = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}
    return F.mse_loss(output, targets[scheduler.config.prediction_type])


@torch.no_grad()
def ddim_samples(network: nn.Module, scheduler: Any, labels: Tensor, num_steps: int, seed: int) -> Tensor:
    """Return deterministic DDIM samples at guidance 1 with the stock scheduler, (B, C, H, W), for labels (B,)."""
    batch_size = 250  # of one network call
    size, channels = network.config.sample_size, network.config.in_channels
    x = torch.randn(len(labels), channels, size, size, generator=keyed_generator(seed, "samples")).to(labels.device)
    parts = []
    for x_t, chosen in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        scheduler.set_timesteps(num_steps)
        for t in scheduler.timesteps:
            output = network(x_t, timestep=t.expand(len(x_t)).to(x_t.device), class_labels=chosen).sample
            x_t = scheduler.step(output, t, x_t).prev_sample
        parts.append(x_t)
    return torch.cat(parts)


# The training


def train(config: DiffusionConfig, device: torch.device, progress: bool, snapshot_every: int | None) -> Iterator[Trained]:
    """Train a denoiser, and measure the samples of its averaged weights where the config names a judge."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**config.scheduler_config)
    network = build_network(config.network, config.network_config, config.seed).to(device)
    vae = _load_vae(config.vae, device)
    images = load_images(config.images)
    source = _states(images, vae, device)
    _check_states(config, source)
    batches = MicroBatches(source.num_samples, config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss(model: nn.Module, step: int, key: str) -> Tensor:
        generator = keyed_generator(config.seed, key, step)
        sample = source.take(batches.indices(step, 0), generator)
        x0, labels = sample.x0, sample.labels
        assert x0 is not None and labels is not None
        return diffusion_loss(
            model, scheduler, x0.to(device), labels.to(device), config.num_classes, config.label_dropout, generator
        )

    for fitted in fit(network, lambda step: loss(network, step, "train"), config.fit, progress, snapshot_every):
        with torch.no_grad():
            ema_losses = [loss(fitted.ema, k, "judge").item() for k in range(64)]
        measures = {
            "num_parameters": num_parameters(network),
            "train_loss": fitted.loss,
            "ema_loss": sum(ema_losses) / len(ema_losses),
            **_judge(config, fitted.ema, scheduler, vae, images.x0, device),
        }
        yield Trained(fitted.steps, measures, functools.partial(_save, config, fitted.ema, scheduler, vae))


def _load_vae(name: str | None, device: torch.device) -> Any | None:
    if name is None:
        return None
    from diffusers import AutoencoderKL

    folder = find_folder(name, "autoencoder")
    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a readable AutoencoderKL: {error}") from error


@torch.no_grad()
def _states(images: ImageSource, vae: Any | None, device: torch.device) -> ImageSource:
    """Return what is modelled: the pixels, or the posterior means of the latents times scaling_factor."""
    if vae is None:
        return images
    latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean.cpu() for part in images.x0.split(256)])
    return ImageSource(latents * vae.config.scaling_factor, images.labels, max_abs=100.0)


def _check_states(config: DiffusionConfig, source: ImageSource) -> None:
    if source.labels is None or int(source.labels.max()) >= config.num_classes:
        found = "none" if source.labels is None else int(source.labels.max()) + 1
        raise UserError(f"num_classes={config.num_classes} but the images have {found} classes.")
    expected = (config.network_config.get("in_channels"), config.network_config.get("sample_size"))
    if expected != (source.x0.shape[1], source.x0.shape[2]):
        raise UserError(
            f"network_config has in_channels={expected[0]}, sample_size={expected[1]}; the states are "
            f"{source.x0.shape[1]} channels of {source.x0.shape[2]}x{source.x0.shape[3]}."
        )


@torch.no_grad()
def _judge(
    config: DiffusionConfig, ema: nn.Module, scheduler: Any, vae: Any | None, images: Tensor, device: torch.device
) -> dict[str, Any]:
    """Measure samples of 50 DDIM steps at guidance 1, classes in equal shares; nothing without a classifier.

    `ddim50_accuracy` is the share that the classifier takes for the class asked for. `nearest_real_distance` is the mean
    Euclidean distance in [-1, 1] pixels from a sample to the nearest image of the data, and from an image to the nearest
    other one: samples much nearer than that would be copies of the data.
    """
    if config.classifier is None:
        return {}
    classifier = DigitsNet.load(find_folder(config.classifier, "classifier")).to(device)
    labels = torch.arange(NUM_JUDGED, device=device) % config.num_classes
    samples = ddim_samples(ema, scheduler, labels, num_steps=50, seed=config.seed)
    if vae is not None:
        samples = vae.decode(samples / vae.config.scaling_factor).sample
    agree = classifier(to_uint8(samples)).logits.argmax(dim=1) == labels
    real = images.flatten(1)
    distances = torch.cdist(samples.cpu().clamp(-1, 1).flatten(1), real).amin(dim=1)
    between = torch.cdist(real, real).fill_diagonal_(math.inf).amin(dim=1)
    return {
        "ddim50_accuracy": agree.double().mean().item(),
        "ddim50_num_samples": len(labels),
        "nearest_real_distance": {"samples": distances.mean().item(), "real": between.mean().item()},
    }


def _save(config: DiffusionConfig, network: Any, scheduler: Any, vae: Any | None, folder: Path) -> None:
    from diffusers import ConsistencyModelPipeline, DiTPipeline

    if vae is None:
        pipeline: Any = ConsistencyModelPipeline(unet=network, scheduler=scheduler)
    else:
        id2label = {str(k): str(k) for k in range(config.num_classes)}
        pipeline = DiTPipeline(transformer=network, vae=vae, scheduler=scheduler, id2label=id2label)
        pipeline.register_to_config(id2label=id2label)  # the class does not do it, and drops the names on saving
    pipeline.save_pretrained(folder, safe_serialization=True)
    if config.vae is not None:
        keep_autoencoder_files(config.vae, folder / "vae")
