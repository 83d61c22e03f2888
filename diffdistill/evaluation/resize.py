"""Resize before a feature network, in the arithmetic of the packages whose numbers are compared.

One network on the same images gives Frechet distances up to three percent apart under different resizes, so the kind of resize
is part of what a number means. Every kind takes uint8 images (N, C, H, W) to (N, C, *size), with values in [0, 255] but for
`torch_bicubic`, which nobody clips:

| kind | result | rule | used by |
|---|---|---|---|
| `identity` | float32 | no other size is accepted | networks that take the images as they are |
| `pil_bicubic` | float32 | Pillow, each channel as a float image, then clipped | clean-fid `clean` |
| `pil_bicubic_u8` | uint8 | Pillow, rounded after each pass | dgm-eval, CMMD, CLIP's preprocessing |
| `pil_bilinear_u8` | uint8 | Pillow, rounded after each pass | torchvision's default for Pillow images |
| `pil_lanczos_u8` | uint8 | Pillow, rounded after each pass | the step to 256 pixels of GigaGAN's and DMD2's COCO-30k |
| `tf1_bilinear` | float32 | TensorFlow 1: pixel i lies at i * source / target | ADM's evaluator, EDM, torch-fidelity, clean-fid `legacy_tensorflow` |
| `torch_bilinear` | float32 | `interpolate`: its centre lies at (i + 1/2) * source / target | pytorch-fid, clean-fid `legacy_pytorch` |
| `torch_bilinear_antialias` | float32 | `interpolate` with antialias | torchmetrics since 1.8, by default |
| `torch_bicubic` | float32 | `interpolate` with antialias, from -72 to 327 | EDM2's FD-DINOv2 |

Pillow's filters widen when an image shrinks, and torch's with antialias are the same ones in float32; `tf1_bilinear` and
`torch_bilinear` always blend two neighbours. EDM and clean-fid compute TensorFlow's rule through `grid_sample`, whose coordinates are less exact: their values differ by up to 0.02 (512 pixels).

Pillow's kinds are Pillow itself on the CPU and two matrix products on other devices. One core resizes bytes 3 to 5 times faster by
Pillow; floats 2 times faster from 256 pixels on, equally fast at 64, half as fast at 32 (onto 299 pixels). The products are in float64,
eight bytes for each value of the batch: sums of fixed-point weights are exact, so the bytes are Pillow's, and so are the floats but for
the last bit, whatever is set for TF32.

The horizontal pass always comes first. Pillow 13 may start with the vertical one where an image shrinks more in height than in width
(python-pillow/Pillow#9549), which changes bytes of upright images, 500x333 to 224x224 among them; earlier versions never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.images import check_uint8_images

ResizeKind = Literal[
    "identity",
    "pil_bicubic",
    "pil_bicubic_u8",
    "pil_bilinear_u8",
    "pil_lanczos_u8",
    "tf1_bilinear",
    "torch_bilinear",
    "torch_bilinear_antialias",
    "torch_bicubic",
]
Filter = Literal["bilinear", "bicubic", "lanczos"]
Size = tuple[int, int]  # height, width

FIXED_POINT = 2**22  # Pillow's byte weights are whole multiples of 1 / FIXED_POINT


def resize(images: Tensor, size: Size, kind: ResizeKind) -> Tensor:
    """Return images at another size by one kind of resize.

    Args:
        images: uint8, (N, C, H, W), any device; one with float64 for Pillow's kinds.
        size: height and width of the result, pixels.
        kind: one of RESIZES; see the table above.
    Returns:
        (N, C, *size) on the device of images: uint8 for the kinds that end in `_u8`, float32 for the others, in [0, 255] but for
        `torch_bicubic`.
    Raises:
        ValueError: images are not uint8 (N, C, H, W).
        UserError: the kind is unknown, or `identity` and the images have another size.
    """
    check_uint8_images(images)
    if kind not in RESIZES:
        raise unknown_name("resize", kind, RESIZES)
    return RESIZES[kind](images, size)


def identity(images: Tensor, size: Size) -> Tensor:
    """Return the images as float32; they must have the size already."""
    if images.shape[-2:] != size:
        got, wanted = ("x".join(map(str, shape)) for shape in (images.shape[-2:], size))
        raise UserError(
            f"resize 'identity' takes images of {wanted} pixels (height x width); got {got}. "
            "Make images of that size, or name another resize."
        )
    return images.float()


def torch_bilinear(images: Tensor, size: Size, antialias: bool = False) -> Tensor:
    """Return float32: torch's own `interpolate`, clipped to [0, 255]."""
    resized = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=antialias)
    return resized.clamp(0, 255)  # its weights may add up to a little more than one


def torch_bicubic(images: Tensor, size: Size) -> Tensor:
    """Return float32: torch's own `interpolate` with antialias, whose a is -1/2 (without it -3/4), overshoot and all."""
    return F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False, antialias=True)


def tf1_bilinear(images: Tensor, size: Size) -> Tensor:
    """Return float32 as TensorFlow 1's `resize_bilinear(align_corners=False)`, operation by operation."""
    height, width = size
    return _blend_neighbours(_blend_neighbours(images.float(), width, -1), height, -2)


def _blend_neighbours(x: Tensor, target: int, dim: int) -> Tensor:
    """Resize one axis of float32 x: pixel i of the result lies at i * source / target, the last pixel is repeated."""
    source = x.shape[dim]
    # In float32 as TensorFlow has it: a more exact place would change values by 0.01 at a thousand pixels.
    place = torch.arange(target, dtype=torch.float32, device=x.device) * (source / target)
    before = place.long()
    after = (before + 1).clamp(max=source - 1)
    share = (place - before).unflatten(0, (target,) + (1,) * (-1 - dim))  # along dim
    first = x.index_select(dim, before)
    return first + (x.index_select(dim, after) - first) * share


def pil_float(images: Tensor, size: Size, filter: Filter) -> Tensor:
    """Return float32: Pillow's resize of each channel as an image of floats (mode F), clipped to [0, 255]."""
    resized = pillow(images.float(), size, filter) if images.is_cpu else float_products(images, size, filter)
    return resized.clamp_(0, 255)  # the bicubic filter overshoots


def pil_u8(images: Tensor, size: Size, filter: Filter) -> Tensor:
    """Return uint8: Pillow's resize of bytes."""
    return pillow(images, size, filter) if images.is_cpu else byte_products(images, size, filter)


def pillow(images: Tensor, size: Size, filter: Filter) -> Tensor:
    """Return Pillow's own resize of uint8 or float32 images on the CPU, the horizontal pass first in every version."""
    import numpy as np
    from PIL import Image

    resample = Image.Resampling[filter.upper()]
    height, width = size
    planes = images.flatten(0, 1).numpy()
    resized = np.empty((len(planes), height, width), planes.dtype)
    rows_first = planes.shape[1] * width <= planes.shape[2] * height  # as much in width: so every Pillow does by itself
    for plane, result in zip(planes, resized, strict=True):
        image = Image.fromarray(plane)
        result[:] = (image if rows_first else image.resize((width, len(plane)), resample)).resize((width, height), resample)
    return torch.from_numpy(resized).reshape(*images.shape[:2], height, width)


def float_products(images: Tensor, size: Size, filter: Filter) -> Tensor:
    """Return Pillow's resize of floats as two matrix products in float64, rounded to float32 after each."""
    down, across = (pil_weights(*axis, filter, images.device) for axis in zip(images.shape[-2:], size, strict=True))
    rows = (images.double() @ across.mT).float()
    return (down @ rows.double()).float()


def byte_products(images: Tensor, size: Size, filter: Filter) -> Tensor:
    """Return Pillow's resize of bytes as two matrix products, rounded to bytes after each.

    Sums of bytes times fixed-point weights are exact in float64, so the bytes are Pillow's.
    """
    down, across = (pil_byte_weights(*axis, filter, images.device) for axis in zip(images.shape[-2:], size, strict=True))
    rows = _nearest_byte(images.double() @ across.mT)
    return _nearest_byte(down @ rows).to(torch.uint8)


def _nearest_byte(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


@functools.lru_cache(maxsize=64)
def pil_weights(source: int, target: int, filter: Filter, device: torch.device) -> Tensor:
    """Return Pillow's weights of `source` pixels in each of `target` pixels, float64 (target, source); rows sum to one.

    Shrinking stretches the filter over source / target pixels (antialias); what it covers beyond the edge is left out.
    Made on the CPU with the operations in Pillow's order, so that fixed-point weights are its own.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(source) - centre + 0.5) * (1 / stretch)
    weights = _FILTERS[filter](distance.abs())
    return (weights / weights.cumsum(1)[:, -1:]).to(device)  # summed one by one, as Pillow does


@functools.lru_cache(maxsize=64)
def pil_byte_weights(source: int, target: int, filter: Filter, device: torch.device) -> Tensor:
    """Return `pil_weights` rounded to multiples of 1 / FIXED_POINT, halves away from zero; rows sum to nearly one."""
    scaled = pil_weights(source, target, filter, torch.device("cpu")) * FIXED_POINT
    return ((scaled + torch.copysign(torch.tensor(0.5), scaled)).trunc() / FIXED_POINT).to(device)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, of distances x >= 0 (`interpolate` has a = -3/4)."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, far) * (x < 2)


def _lanczos(x: Tensor) -> Tensor:
    """sinc(x) sinc(x / 3), of distances x >= 0."""
    return torch.sinc(x) * torch.sinc(x / 3) * (x < 3)


_FILTERS: dict[Filter, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos}

RESIZES: dict[ResizeKind, Callable[[Tensor, Size], Tensor]] = {
    "identity": identity,
    "pil_bicubic": functools.partial(pil_float, filter="bicubic"),
    "pil_bicubic_u8": functools.partial(pil_u8, filter="bicubic"),
    "pil_bilinear_u8": functools.partial(pil_u8, filter="bilinear"),
    "pil_lanczos_u8": functools.partial(pil_u8, filter="lanczos"),
    "tf1_bilinear": tf1_bilinear,
    "torch_bilinear": torch_bilinear,
    "torch_bilinear_antialias": functools.partial(torch_bilinear, antialias=True),
    "torch_bicubic": torch_bicubic,
}
