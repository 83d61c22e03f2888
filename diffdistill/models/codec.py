"""Between images and states: the autoencoder of a latent model, or nothing for a pixel model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """Encodes images in [-1, 1] to states and decodes states to images.

    Attributes:
        vae: diffusers AutoencoderKL, or None for a model that works on pixels.
    """

    vae: Any = None

    @property
    def _scale(self) -> float:
        return float(self.vae.config.scaling_factor) if self.vae is not None else 1.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return states of images (B, C, H, W) in [-1, 1]: the mean of the latent, scaled to the model's range."""
        if self.vae is None:
            return images
        return self.vae.encode(images).latent_dist.mode() * self._scale

    @torch.no_grad()
    def decode(self, states: Tensor) -> Tensor:
        """Return images, about [-1, 1], of states (B, C, H, W)."""
        if self.vae is None:
            return states
        return self.vae.decode(states / self._scale).sample
