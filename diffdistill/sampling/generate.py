"""From seeds and labels to images, and to what the model takes the images to be on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffdistill.models.condition import Condition
from diffdistill.models.conditioning import Asked
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import DrawsNoise, State

Generate = Callable[[list[int], Asked], Tensor]
"""(seeds, class labels (B,), B prompts or None) -> images (B, C, H, W) in [-1, 1]; image k depends on seed and label k only."""


class Predicted(NamedTuple):
    """The clean states (B, ...) that a model predicts at time t, and what turns them into images; latents stay small until looked at."""

    t: float
    x0: Tensor
    decode: Callable[[Tensor], Tensor]

    @property
    def images(self) -> Tensor:
        """The images (B, C, H, W) in [-1, 1] of these states."""
        return self.decode(self.x0).clamp(-1, 1)


Predictions = Callable[[list[int], Asked], list[Predicted]]
"""(seeds, class labels (B,), B prompts or None) -> the prediction at each step of the way to the image of the same seed."""


class Samples(Protocol):
    """A sampler: our own, or a stock scheduler behind the same calls."""

    def sample(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> Tensor:
        """Return the final states."""
        ...

    def trajectory(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> tuple[list[State], Tensor]:
        """Return every step's state and clean estimate, and the same final states."""
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


def prediction_generator(teacher: Teacher, denoiser: Denoiser, sampler: Samples) -> Predictions:
    """Return a function from seeds and what is asked for to the clean images predicted at each step; arguments as above.

    Source: the "DT-visualisation" of Gandikota and Bau (arXiv:2503.10637).
    """

    @torch.no_grad()
    def predict(seeds: list[int], asked: Asked) -> list[Predicted]:
        states, _ = sampler.trajectory(denoiser, Noise(seeds, teacher.device), teacher.condition(asked, len(seeds)))
        return [Predicted(state.t, state.x0, teacher.codec.decode) for state in states]

    return predict
