"""From images in [-1, 1] to the uint8 images that every metric sees, and what can be read off the pixels alone."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images: round((clip(x, -1, 1) + 1) * 127.5), in float32, halves to the even neighbour.

    -1 becomes 0, 0 becomes 128 (127.5 rounds to even) and 1 becomes 255, so uint8 / 127.5 - 1 is undone exactly.
    Truncating instead of rounding would move a Frechet distance by about two percent.

    Args:
        images: (B, C, H, W), any floating dtype, nominally in [-1, 1]; what lies outside is clipped.
    Returns:
        uint8, (B, C, H, W), on the device of images.
    Raises:
        ValueError: images is not floating or holds NaN or infinity, which uint8 would hide.
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes floating images in [-1, 1]; got {images.dtype}. Pass uint8 images on as they are.")
    if not torch.isfinite(images).all():
        raise ValueError("the images hold NaN or infinity; a generator that diverged cannot be scored.")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]: x / 127.5 - 1, the right inverse of `to_uint8`."""
    return images.to(torch.float32) / 127.5 - 1


def check_uint8_images(images: Tensor, channels: int | None = None, size: int | None = None) -> None:
    """Refuse what is not uint8 (B, C, H, W) with the wanted channels and side; None accepts any.

    Raises:
        ValueError: naming the rule and what was received.
    """
    wanted = f"uint8 (B, {channels or 'C'}, {size or 'H'}, {size or 'W'})"
    ok = images.dtype == torch.uint8 and images.ndim == 4
    ok = ok and channels in (None, images.shape[1]) and (size is None or tuple(images.shape[2:]) == (size, size))
    if not ok:
        raise ValueError(f"images must be {wanted}; got {images.dtype} {tuple(images.shape)}.")


def pixel_statistics(images: Tensor) -> Tensor:
    """Return the saturated share and the contrast of each image.

    Saturated is the share of channel values at either end of the range (0 or 255), contrast the standard deviation of
    the luminance (Rec. 601 weights for three channels, the plain mean otherwise) divided by 255. Too much guidance and
    adversarial training raise both, averaging lowers both; read them against the same figures of the real images.

    Args:
        images: uint8, (B, C, H, W).
    Returns:
        float64, (B, 2): columns saturated and contrast, both in [0, 1].
    """
    check_uint8_images(images)
    saturated = ((images == 0) | (images == 255)).flatten(1).double().mean(1)
    weights = [0.299, 0.587, 0.114] if images.shape[1] == 3 else [1 / images.shape[1]] * images.shape[1]
    luminance = torch.einsum("bchw,c->bhw", images.double(), images.new_tensor(weights, dtype=torch.float64))
    contrast = luminance.flatten(1).std(1, correction=0) / 255
    return torch.stack([saturated, contrast], 1).cpu()
