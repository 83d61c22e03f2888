"""Noise that belongs to an image: image k is the same whatever the batch size or the number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Standard normal draws, one generator per image, in the order in which diffusers draws for a list of generators.

    The k-th draw of the image with seed s is the k-th draw of `torch.Generator("cpu").manual_seed(s)`, so a stock
    pipeline called with `generator=[torch.Generator().manual_seed(s) for s in seeds]` makes the same images.

    Attributes:
        seeds: one per image.
        generators: one per image; a stock scheduler takes them as they are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = [int(seed) for seed in seeds]
        self.device = torch.device(device)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the next draw of every image, (B, *shape)."""
        noise = torch.empty((len(self.generators), *shape), dtype=dtype)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self.device)


class BatchNoise:
    """Standard normal draws of a whole batch from one generator: what training uses, where no image has a name."""

    def __init__(self, batch_size: int, generator: torch.Generator) -> None:
        self.batch_size, self.generator = batch_size, generator

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the next draw, (B, *shape), on the generator's device."""
        return torch.randn((self.batch_size, *shape), generator=self.generator, device=self.generator.device, dtype=dtype)
