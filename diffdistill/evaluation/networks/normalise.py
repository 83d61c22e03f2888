"""The first step of a network: bytes' range to numbers of mean 0 and deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError

RGB = tuple[float, float, float]

OPENAI_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on; BLIP takes them too
OPENAI_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


class Normalise(nn.Module):
    """Images of one size to (image / 255 - mean) / std.

    Attributes:
        size: side of the images, pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, size: int, mean: RGB, std: RGB) -> None:
        super().__init__()
        self.size = size
        mean_, std_ = (torch.tensor(value)[:, None, None] for value in (mean, std))
        self.register_buffer("scale", 1 / (255 * std_), persistent=False)
        self.register_buffer("shift", mean_ / std_, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 (B, 3, size, size).

        Args:
            images: (B, 3, size, size), any floating dtype, in [0, 255], on the device of this module.
        Raises:
            ValueError: another shape, or images that are not floating.
        """
        if not images.is_floating_point() or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"the network takes floating images (B, 3, {self.size}, {self.size}) in [0, 255]; "
                f"got {images.dtype} {tuple(images.shape)}."
            )
        return images.float() * self.scale - self.shift


def check_captions(images: Tensor, captions: list[str]) -> None:
    """Raise UserError unless there is one caption for each image."""
    if len(images) != len(captions):
        raise UserError(f"{len(images)} images but {len(captions)} captions: give one caption for each image.")
