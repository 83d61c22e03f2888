"""What happens to an image before any network resizes it: a chain of named steps, as a protocol lists them.

| step | result | used by |
|---|---|---|
| `rgb`, `grey` | Pillow's `convert` to RGB (grey repeated, palette looked up, alpha dropped) or L; only as the first step | clean-fid, EDM |
| `center_crop` | the square of the short side, at the nearest offset, halves to the even one | GigaGAN, DMD2 |
| `center_crop_floor` | the same at the offset rounded down: one pixel apart at 640x425 | EDM's `center-crop`, CMMD |
| `center_patch SIDE` | the square of that side at `center_crop`'s offset, nothing is resized | patch FID (SIDE 299) |
| `center_crop_dhariwal SIDE` | halved by BOX as often as the short side stays SIDE or more, BICUBIC to it, cropped | ADM, EDM's `center-crop-dhariwal` |
| `box SIDE`, `bilinear SIDE`, `bicubic SIDE`, `lanczos SIDE` | a square; an image that is none is squashed | GigaGAN, DMD2 (LANCZOS to 256), BK-SDM (BICUBIC to 256) |
| `box_short SIDE`, and so on | the short side becomes SIDE, the other is rounded down, as torchvision's `Resize` | CLIP's preprocessing |
| `jpeg QUALITY SUBSAMPLING` | what a JPEG file keeps; subsampling 4:4:4, 4:2:2 or 4:2:0 (Pillow's own choice, with quality 75) | BK-SDM, Sana's MJHQ |

A PNG file keeps everything, so there is no step for it. Every resize is Pillow's on bytes, the horizontal pass first: Pillow 13 may start
with the vertical one where an image shrinks more in height, which changes bytes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.images import check_uint8_images
from diffdistill.evaluation.threads import ordered_map, usual_threads

Picture = Image.Image
Step = Callable[[Picture], Picture]

CONVERSIONS = ("rgb", "grey")
IMAGES_AT_ONCE = 16  # handed to a thread together


class Transform(NamedTuple):
    """A chain of steps for images of Pillow of mode L or RGB, or of any mode where the first step converts."""

    steps: tuple[Step, ...] = ()
    converts: bool = False

    def __call__(self, image: Picture) -> Picture:
        """Return the image after every step."""
        for step in self.steps:
            image = step(image)
        return image


def parse_transform(steps: Sequence[str]) -> Transform:
    """Build the chain that a protocol lists, e.g. ["rgb", "center_crop", "lanczos 256"].

    Raises:
        UserError: a step that is unknown (the nearest is named), has wrong arguments, or converts but is not the first.
    """
    names = [text.split()[0] if text.split() else "" for text in steps]
    for name in names[1:]:
        if name in CONVERSIONS:
            raise UserError(f"transform {name!r} must be the first step; got {', '.join(steps)}. Move it to the front.")
    return Transform(tuple(map(_parse_step, steps)), bool(names) and names[0] in CONVERSIONS)


def transform_images(images: Tensor, transform: Transform, num_threads: int | None = None) -> Tensor:
    """Return generated images after the chain, byte for byte what comes of them by way of a PNG file.

    Args:
        images: uint8, (B, 1 or 3, H, W), any device.
        transform: from `parse_transform`.
        num_threads: threads of the CPU that share the images, None for `usual_threads`.
    Returns:
        uint8, (B, C', H', W') on the device of images; the images themselves where the chain is empty.
    """
    check_uint8_images(images)
    if not transform.steps:
        return images
    parts = images.cpu().split(IMAGES_AT_ONCE)
    run = functools.partial(_transform_part, transform=transform)
    return torch.cat(list(ordered_map(run, parts, num_threads or usual_threads()))).to(images.device)


def _transform_part(images: Tensor, transform: Transform) -> Tensor:
    return torch.stack([to_tensor(transform(to_picture(image))) for image in images])


def to_picture(image: Tensor) -> Picture:
    """Return uint8 (1 or 3, H, W) as an image of Pillow, mode L or RGB."""
    pixels = image.numpy()  # numpy moves channels four times faster than torch
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())


def to_tensor(image: Picture) -> Tensor:
    """Return an image of mode L or RGB as uint8 (1 or 3, H, W)."""
    return torch.from_numpy(planes(image).copy())


def planes(image: Picture) -> np.ndarray:
    """Return a view of an image of mode L or RGB as (1 or 3, H, W), read only."""
    pixels = np.asarray(image)  # (H, W) or (H, W, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def convert(mode: str) -> Step:
    """Return Pillow's conversion to a mode."""
    return lambda image: image.convert(mode)


def center_crop(round_offset: Callable[[float], int]) -> Step:
    """Return the crop to the centred square of the short side; its offset, half the excess, is rounded by a function."""
    return lambda image: _centred(image, min(image.size), round_offset)


def center_patch(side: int) -> Step:
    """Return the crop to a centred square of that side.

    The step raises a UserError where an image is smaller.
    """

    def crop(image: Picture) -> Picture:
        if min(image.size) < side:
            width, height = image.size
            raise UserError(
                f"'center_patch {side}' takes images of at least {side} pixels on each side; got {width}x{height} (width x height). "
                "Leave the image out, or choose a smaller patch."
            )
        return _centred(image, side, round)

    return crop


def center_crop_dhariwal(side: int) -> Step:
    """Return ADM's way to a square: halve by BOX while twice the side fits, BICUBIC to the side, crop with the offset rounded down."""

    def crop(image: Picture) -> Picture:
        while min(image.size) >= 2 * side:
            image = _resized(image, (image.width // 2, image.height // 2), "box")
        scale = side / min(image.size)
        image = _resized(image, (round(image.width * scale), round(image.height * scale)), "bicubic")
        return _centred(image, side, int)

    return crop


def to_square(filter: str, side: int) -> Step:
    """Return the resize to a square, whatever the shape."""
    return lambda image: _resized(image, (side, side), filter)


def to_short_side(filter: str, side: int) -> Step:
    """Return the resize that makes the short side `side` and rounds the other one down."""

    def resize(image: Picture) -> Picture:
        short = min(image.size)
        return _resized(image, (side * image.width // short, side * image.height // short), filter)

    return resize


def jpeg(quality: int, subsampling: str) -> Step:
    """Return the way through a JPEG file in memory, as Pillow writes and reads it."""

    def write_and_read(image: Picture) -> Picture:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        with Image.open(buffer) as stored:
            stored.load()
            return stored

    return write_and_read


def _centred(image: Picture, side: int, round_offset: Callable[[float], int]) -> Picture:
    left, top = (round_offset((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _resized(image: Picture, size: tuple[int, int], filter: str) -> Picture:
    """Return the image at another (width, height), the horizontal pass first in every version of Pillow."""
    resample = Image.Resampling[filter.upper()]
    return image.resize((size[0], image.height), resample).resize(size, resample)


class _Arguments(NamedTuple):
    """How the arguments of a step are written, and what makes the step of them."""

    names: str
    make: Callable[..., Step]


def _side(make: Callable[[int], Step]) -> _Arguments:
    return _Arguments("SIDE", lambda side: make(_whole(side, 1, 1 << 16)))


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isdecimal() and least <= int(text) <= most):
        raise ValueError(f"a whole number from {least} to {most}")
    return int(text)


def _jpeg_of(quality: str, subsampling: str) -> Step:
    if subsampling not in ("4:4:4", "4:2:2", "4:2:0"):
        raise ValueError("a subsampling of 4:4:4, 4:2:2 or 4:2:0")
    return jpeg(_whole(quality, 1, 100), subsampling)


_FILTERS = ("box", "bilinear", "bicubic", "lanczos")
STEPS: dict[str, _Arguments] = {
    "rgb": _Arguments("", lambda: convert("RGB")),
    "grey": _Arguments("", lambda: convert("L")),
    "center_crop": _Arguments("", lambda: center_crop(round)),
    "center_crop_floor": _Arguments("", lambda: center_crop(int)),
    "center_patch": _side(center_patch),
    "center_crop_dhariwal": _side(center_crop_dhariwal),
    "jpeg": _Arguments("QUALITY SUBSAMPLING", _jpeg_of),
    **{filter: _side(functools.partial(to_square, filter)) for filter in _FILTERS},
    **{f"{filter}_short": _side(functools.partial(to_short_side, filter)) for filter in _FILTERS},
}


def _parse_step(text: str) -> Step:
    name, *arguments = text.split() or [""]
    if name not in STEPS:
        raise unknown_name("transform", name, STEPS)
    names, make = STEPS[name]
    usage = f"{name} {names}".rstrip()
    if len(arguments) != len(names.split()):
        raise UserError(f"transform {text!r} has {len(arguments)} argument(s); write it as {usage!r}.")
    try:
        return make(*arguments)
    except ValueError as error:
        raise UserError(f"transform {text!r} needs {error}; write it as {usage!r}.") from None
