"""Early signs of the known collapses, read off the student's samples beside the teacher's from equal noise.

Saturation and contrast rise when guidance or adversarial losses overdo it and fall when a student averages; diversity falls
when modes are dropped; a fake network that lags behind its student pushes it in stale directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.math import transfer
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.sampling.sampler import DrawsNoise

SATURATED = 0.98
LAG_LEVELS = (0.25, 0.5, 0.75)  # shares of the noising process at which the fake network is asked


def saturation(images: Tensor) -> float:
    """Return the share of values with |x| > 0.98, of images in [-1, 1]."""
    return float((images.abs() > SATURATED).double().mean())


def contrast(images: Tensor) -> float:
    """Return the mean over the images of the standard deviation of their values."""
    return float(images.double().flatten(1).std(1, correction=0).mean())


def diversity(images: Tensor, labels: Tensor | None) -> float:
    """Return the mean RMS distance of two images of one class; over all pairs where there are no labels.

    NaN when no class has two images.
    """
    flat = images.double().flatten(1)
    distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    same = torch.ones_like(distance, dtype=torch.bool) if labels is None else labels[:, None] == labels[None, :]
    same.fill_diagonal_(False)
    return float(distance[same.to(distance.device)].mean())


def figures(images: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Return the three figures of a set of images (B, C, H, W) in [-1, 1]."""
    return {"saturation": saturation(images), "contrast": contrast(images), "diversity": diversity(images, labels)}


@torch.no_grad()
def denoising_errors(
    fake: Denoiser, teacher: Denoiser, samples: Sequence[Tensor], cond: Condition, noise: DrawsNoise
) -> Tensor:
    """Return mean |D_fake(x_s) - x_g| and mean |D_teacher(x_s) - x_g| of each image, (B, 2) float64 on the CPU, summed over noise levels.

    Args:
        samples: x_g (B, ...), the student's clean outputs in each of its steps, whose mixture the fake network is trained on.
        noise: of the images.
    """
    schedule, errors = teacher.schedule, torch.zeros(cond.batch_size, 2, dtype=torch.float64)
    for x_g, level in itertools.product(samples, LAG_LEVELS):
        time = schedule.t_clean + level * (schedule.t_max - schedule.t_clean)
        t = torch.full((len(x_g),), time, dtype=torch.float64, device=x_g.device)
        x_t = transfer.add_noise(x_g, noise.draw(tuple(x_g.shape[1:])), schedule.coefficients(t))
        found = [(denoiser(x_t, t, cond).x0 - x_g).abs().double().flatten(1).mean(1) for denoiser in (fake, teacher)]
        errors += torch.stack(found, dim=1).cpu()
    return errors


def fake_lag(errors: Tensor) -> float:
    """Return mean |D_fake(x_s) - x_g| / mean |D_teacher(x_s) - x_g| over the images, from their `denoising_errors`.

    A fake network that follows its student denoises the student's outputs better than the teacher does, as long as these are not yet
    the teacher's: below 1. At 1 it has learned nothing; above, it is worse than no training at all.
    """
    fake, teacher = errors.sum(0).tolist()
    return fake / teacher
