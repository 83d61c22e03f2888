"""`kind: autoencoder`: an AutoencoderKL for latents of unit standard deviation, written as that stock class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from diffdistill.data.batches import MicroBatches, keyed_generator
from diffdistill.errors import UserError
from diffdistill.training.teachers.fit import fit
from diffdistill.training.teachers.parts import Trained, TrainingConfig, build_network, load_images, num_parameters


class AutoencoderConfig(TrainingConfig):
    """An AutoencoderKL for latents of unit standard deviation."""

    kind: Literal["autoencoder"] = "autoencoder"
    network_config: dict[str, Any] = Field(
        description="keyword arguments of diffusers' AutoencoderKL, without scaling_factor, which is measured"
    )
    kl_weight: float = Field(
        1e-4, ge=0, description="weight of the KL divergence per latent element, beside the mean squared error per pixel"
    )


def autoencoder_loss(vae: Any, images: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Return mean squared error per pixel + kl_weight * KL(posterior, N(0, 1)) per latent element; 0-dim.

    Args:
        vae: AutoencoderKL.
        images: (B, C, H, W) in [-1, 1].
        generator: source of the posterior sample, on the CPU.
    """
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    output = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return F.mse_loss(output, images) + kl_weight * kl


def train(config: AutoencoderConfig, device: torch.device, progress: bool, snapshot_every: int | None) -> Iterator[Trained]:
    """Train an autoencoder; its scaling_factor is one over the standard deviation of the data's latents."""
    if "scaling_factor" in config.network_config:
        raise UserError("leave network_config.scaling_factor out: it is measured, for latents of unit deviation.")
    network = build_network("AutoencoderKL", config.network_config, config.seed).to(device)
    source = load_images(config.images)
    batches = MicroBatches(source.num_samples, config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss_at(step: int) -> Tensor:
        generator = keyed_generator(config.seed, "train", step)
        x0 = source.take(batches.indices(step, 0), generator).x0
        assert x0 is not None
        return autoencoder_loss(network, x0.to(device), config.kl_weight, generator)

    for fitted in fit(network, loss_at, config.fit, progress, snapshot_every):
        with torch.no_grad():
            latents = torch.cat([fitted.ema.encode(part.to(device)).latent_dist.mean for part in source.x0.split(256)])
            decoded = torch.cat([fitted.ema.decode(part).sample.cpu() for part in latents.split(256)])
        fitted.ema.register_to_config(scaling_factor=1 / latents.double().std().item())
        measures = {
            "num_parameters": num_parameters(network),
            "train_loss": fitted.loss,
            "reconstruction_rmse": (decoded - source.x0).double().square().mean().sqrt().item(),
            "scaling_factor": fitted.ema.config.scaling_factor,
            "latent_mean": latents.double().mean().item(),
        }
        yield Trained(fitted.steps, measures, fitted.ema.save_pretrained)
