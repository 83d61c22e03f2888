"""Between images and states: the autoencoder of a latent model, or nothing for a pixel model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.models.fingerprint import weights_fingerprint

MOST_IMAGES, MOST_PIXELS = 500, 2**21


def images_at_once(height: int, width: int) -> int:
    """Return how many images are made or encoded at once where nobody says: two of 1024 by 1024, eight of 512 by 512, at most 500.

    A GPU that holds the network has room for as many, and they keep it busy.
    """
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))


@dataclass(frozen=True)
class Codec:
    """Encodes images in [-1, 1] to states and decodes states to images: state = (latent - shift) * scale.

    Attributes:
        vae: diffusers AutoencoderKL or AutoencoderDC, or None for a model that works on pixels.
    """

    vae: Any = None

    @property
    def _scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def _shift(self) -> float:
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    @property
    def downscale(self) -> int:
        """Pixels of the image along one edge of a state's pixel."""
        if self.vae is None:
            return 1
        blocks = getattr(self.vae.config, "encoder_block_out_channels", None) or self.vae.config.block_out_channels
        return 2 ** (len(blocks) - 1)

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (C, H, W) of the images of states (C, H, W)."""
        channels, height, width = sample_shape
        if self.vae is not None:
            channels = self.vae.config.in_channels
        return channels, height * self.downscale, width * self.downscale

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the autoencoder's weights; empty for a pixel model."""
        return "" if self.vae is None else weights_fingerprint(self.vae)

    def offload(self) -> None:
        """Move the autoencoder to the CPU; what is encoded or decoded next takes it back to its own device."""
        if self.vae is not None:
            self.vae.to("cpu")

    def _bring_to(self, device: torch.device) -> None:
        if self.vae.device != device:
            self.vae.to(device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return states of images (B, C, H, W) in [-1, 1]: the mean of the latent, shifted and scaled to the model's range."""
        if self.vae is None:
            return images
        self._bring_to(images.device)
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return (latents.float() - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, states: Tensor) -> Tensor:
        """Return images, about [-1, 1], of states (B, C, H, W)."""
        if self.vae is None:
            return states
        self._bring_to(states.device)
        return self.vae.decode((states / self._scale + self._shift).to(self.vae.dtype)).sample
