"""From images in [-1, 1] to the uint8 images that every metric sees, and what can be read off the pixels alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError, unknown_name

VALUES_AT_ONCE = 2**17  # of a batch on the CPU: half a megabyte of float32 stays in the cache, many megabytes do not


def round_half_even(images: Tensor) -> Tensor:
    """round((clip(x, -1, 1) + 1) * 127.5), halves to the even neighbour: -1 becomes 0, 0 becomes 128, 1 becomes 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def add_128_and_truncate(images: Tensor) -> Tensor:
    """clip(x * 127.5 + 128) without its fraction: halves go up. Six of a million float32 values end one above `round_half_even`."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def truncate(images: Tensor) -> Tensor:
    """clip((x + 1) * 127.5) without its fraction: half a level darker than the others, 255 only at 1."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)


Uint8Rule = Literal["round", "round128", "trunc127"]
UINT8_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "round": round_half_even,
    "round128": add_128_and_truncate,
    "trunc127": truncate,
}
"""How scripts write float32 images in [-1, 1] as bytes. Those that write (x + 1) / 2 * 255 are among them: halving is exact, so it is
(x + 1) * 127.5 to the last bit.

- `round`: diffusers' pipelines, iMeanFlow's PyTorch script.
- `round128`: EDM, EDM2 (pixels), DiT, MeanFlow and iMeanFlow in JAX.
- `trunc127`: ADM's samplers, DMD2, GigaGAN, EDM2 (its latents), torchmetrics with `normalize=True`.
"""


def to_uint8(images: Tensor, rule: Uint8Rule = "round") -> Tensor:
    """Quantise images by one of UINT8_RULES, in float32.

    After `round` and `round128`, uint8 / 127.5 - 1 is undone exactly. Truncating instead of rounding moves a Frechet distance by about
    two percent.

    Args:
        images: (B, C, H, W), any floating dtype, nominally in [-1, 1]; what lies outside is clipped.
        rule: one of UINT8_RULES.
    Returns:
        uint8, (B, C, H, W), on the device of images.
    Raises:
        ValueError: images is not floating.
        UserError: images hold NaN or infinity, which uint8 would hide, or the rule is unknown.
    """
    if rule not in UINT8_RULES:
        raise unknown_name("uint8 rule", rule, UINT8_RULES)
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes floating images in [-1, 1]; got {images.dtype}. Pass uint8 images on as they are.")
    parts = images.flatten().split(VALUES_AT_ONCE if images.is_cpu else max(1, images.numel()))
    return torch.cat([UINT8_RULES[rule](_finite(part).float()) for part in parts]).reshape(images.shape)


def _finite(values: Tensor) -> Tensor:
    """Return the values, if all are finite: a finite sum says so ten times faster than a look at each."""
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise UserError(
            "the images hold NaN or infinity; a generator that diverged cannot be scored. Take an earlier checkpoint, or more precision."
        )
    return values


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
    at_once = max(1, VALUES_AT_ONCE // math.prod(images.shape[1:])) if images.is_cpu else max(1, len(images))
    return torch.cat([_pixel_statistics(part) for part in images.split(at_once)]).cpu()


def _pixel_statistics(images: Tensor) -> Tensor:
    channels = images.shape[1]
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels
    pixels = images.flatten(2)  # (B, C, H * W)
    saturated = (pixels + 1 < 2).sum((1, 2)).double() / math.prod(pixels.shape[1:])  # 255 + 1 wraps to 0
    luminance = pixels.new_tensor(weights, dtype=torch.float64) @ pixels.double()
    return torch.stack([saturated, luminance.std(1, correction=0) / 255], 1)
