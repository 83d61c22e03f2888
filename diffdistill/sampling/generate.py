"""From seeds and labels to images: what evaluation, sample grids and the `sample` verb all call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from diffdistill.models.condition import Condition
from diffdistill.models.conditioning import Asked
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import DrawsNoise

Generate = Callable[[list[int], Asked], Tensor]
"""(seeds, class labels (B,), B prompts or None) -> images (B, C, H, W) in [-1, 1]; image k depends on seed and label k only."""


class Samples(Protocol):
    """A sampler: our own, or a stock scheduler behind the same call."""

    def sample(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> Tensor:
        """Return the final states."""
        ...


def image_generator(teacher: Teacher, denoiser: Denoiser, sampler: Samples) -> Generate:
    """Return a function from seeds and what is asked for to images of `denoiser` (the teacher's own, or a student's role).

    Args:
        teacher: gives conditions and the codec.
        denoiser: what is sampled.
        sampler: how.
    """

    @torch.no_grad()
    def generate(seeds: list[int], asked: Asked) -> Tensor:
        states = sampler.sample(denoiser, Noise(seeds, teacher.device), teacher.condition(asked, len(seeds)))
        return teacher.codec.decode(states).clamp(-1, 1)

    return generate
