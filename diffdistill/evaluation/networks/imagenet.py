"""The scale on which networks of ImageNet take their images."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def standardise(images: Tensor, size: int | None = None) -> Tensor:
    """Return (images / 255 - MEAN) / STD for each channel.

    Args:
        images: floating, (B, 3, size, size) or, where size is None, (B, 3, H, W); in [0, 255], or beyond by what a bicubic
            filter overshoots.
    Returns:
        float32, the shape of images.
    Raises:
        ValueError: another shape, or images that are not floating.
    """
    channels, *sides = images.shape[1:]
    if not images.is_floating_point() or channels != 3 or len(sides) != 2 or (size and sides != [size, size]):
        wanted = f"(B, 3, {size or 'H'}, {size or 'W'})"
        raise ValueError(f"the network takes floating images {wanted} in [0, 255]; got {images.dtype} {tuple(images.shape)}.")
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (MEAN, STD))
    return (images.float() / 255 - mean) / std
