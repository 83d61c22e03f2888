"""What an image of the `shapes` shows, read from its pixels by the formulas that draw it: no network, so nothing to train or to fool.

A pixel's colour is that of the direction in which it leaves the grey of the background. Each colour's pixels are one thing: its area gives
the size, its centre of mass the place, and the drawn shape of that area at that place which overlaps it most gives the shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.data.shapes import COLOURS, PALETTE, RADII, SHAPES, SIDE, Scenes, coverage
from diffdistill.evaluation.images import check_uint8_images

LEAST_AREA = 6.0  # pixels, a third of the smallest shape's; less is no thing
LEAST_OVERLAP = 0.75  # intersection over union with the best shape
BORDER = float(RADII[0, 1] + RADII[1, 0]) / 2  # radius between small and large, pixels


class Seen(NamedTuple):
    """What is seen of each colour in N images.

    Attributes:
        present: (N, 6) bool, whether the colour covers LEAST_AREA.
        shape: (N, 6) int64, index into SHAPES.
        size: (N, 6) int64, index into SIZES.
        centre: (N, 6, 2), x and y of the centre of mass, pixels.
        overlap: (N, 6), intersection over union with the drawn shape, in [0, 1].
    """

    present: Tensor
    shape: Tensor
    size: Tensor
    centre: Tensor
    overlap: Tensor


def masks(images: Tensor) -> Tensor:
    """Return how much of each pixel a colour covers, (N, 6, 32, 32) in [0, 1], of uint8 images (N, 3, 32, 32)."""
    pixels = images.float() / 255
    grey = pixels.flatten(1).median(1).values[:, None, None, None]  # things cover less than half
    leaves = pixels - grey
    palette = PALETTE.to(pixels.device)
    direction = palette - grey.flatten()[:, None, None]  # (N, 6, 3)
    product = torch.einsum("nchw,nkc->nkhw", leaves, direction)
    length = direction.norm(dim=-1)[..., None, None]
    nearest = (product / length).argmax(1, keepdim=True)
    amount = (product / length**2).clamp(0, 1)
    own = torch.zeros_like(amount).scatter_(1, nearest, 1.0)
    # Below a tenth it is noise of the background, of no colour.
    return amount * own * (amount > 0.1)


def look(images: Tensor) -> Seen:
    """Return what uint8 images (N, 3, 32, 32) show."""
    check_uint8_images(images, 3, SIDE)
    mask = masks(images)
    area = mask.sum((2, 3))  # (N, 6)
    pixel = torch.arange(SIDE, device=mask.device) + 0.5
    safe = area.clamp(min=1e-6)
    centre = torch.stack([(mask.sum(2) * pixel).sum(-1) / safe, (mask.sum(3) * pixel).sum(-1) / safe], -1)
    radius = (area / torch.pi).sqrt()
    shapes = torch.arange(len(SHAPES), device=mask.device)
    drawn = coverage(
        shapes.expand(*area.shape, -1),
        radius[..., None].expand(-1, -1, len(SHAPES)),
        centre[..., None, :].expand(-1, -1, 3, -1),
    )  # (N, 6, 3, 32, 32)
    both = torch.minimum(drawn, mask.unsqueeze(2)).sum((-2, -1))
    overlap = both / torch.maximum(drawn, mask.unsqueeze(2)).sum((-2, -1)).clamp(min=1e-6)
    best = overlap.max(-1)
    return Seen(area >= LEAST_AREA, best.indices, (radius > BORDER).long(), centre, best.values)


class Obeyed(NamedTuple):
    """Which parts of its caption an image shows, each (N,) bool.

    Attributes:
        colours: the colours asked for are there, and no others.
        shapes: and each has its shape, well enough drawn to be told.
        sizes: and its size.
        relation: and they stand as asked: the caption is obeyed.
    """

    colours: Tensor
    shapes: Tensor
    sizes: Tensor
    relation: Tensor


def obeyed(images: Tensor, scenes: Scenes) -> Obeyed:
    """Compare uint8 images (N, 3, 32, 32) with what was asked for; each answer includes the ones before it."""
    seen = look(images)
    asked = torch.zeros(len(images), len(COLOURS), dtype=torch.bool)
    counts = torch.stack([torch.ones_like(scenes.is_pair), scenes.is_pair], 1)  # (N, 2)
    asked.scatter_(1, scenes.colour.flip(1), counts.flip(1))
    colours = (seen.present.cpu() == asked).all(1)

    def of_things(values: Tensor) -> Tensor:
        return values.cpu().gather(1, scenes.colour)  # (N, 2)

    shape = (of_things(seen.shape) == scenes.shape) & (of_things(seen.overlap) >= LEAST_OVERLAP)
    size = of_things(seen.size) == scenes.size
    x, y = (of_things(seen.centre[..., k]) for k in (0, 1))
    right, down = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
    stands = torch.stack([right > down.abs(), -right > down.abs(), down > right.abs(), -down > right.abs()], 1)
    relation = stands.gather(1, scenes.relation.clamp(min=0)[:, None])[:, 0] | ~scenes.is_pair
    shapes = colours & (shape | ~counts).all(1)
    sizes = shapes & (size | ~counts).all(1)
    return Obeyed(colours, shapes, sizes, sizes & relation)
