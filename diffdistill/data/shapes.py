"""The embedded `shapes`: captioned scenes of one or two coloured shapes, drawn by formula, so every caption can be checked exactly.

    a small red circle
    a large blue square left of a small green triangle

The caption says colour, shape, size and relation; where the shapes are, how large exactly and how bright the background is are left
to chance, so that a set of images has a distribution beyond its captions.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.data.batches import keyed_generator

SIDE = 32  # pixels
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
PALETTE = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.float32)  # RGB in [0, 1]
RADII = torch.tensor([[2.6, 3.2], [4.4, 5.2]])  # (size, lowest and highest), pixels: radius of the circle of equal area
BACKGROUND = 0.3  # its brightest grey
GAP = 2.0  # least distance of two shapes, and of a shape from the border: half of it, pixels
HELD_OUT = 10  # one in so many pairs of things is never trained on


class Scenes(NamedTuple):
    """What N captions say; each field int64.

    Attributes:
        colour, shape, size: (N, 2), indices into COLOURS, SHAPES and SIZES of the first and second thing.
        relation: (N,), index into RELATIONS of the first to the second; -1 where there is only a first.
    """

    colour: Tensor
    shape: Tensor
    size: Tensor
    relation: Tensor

    @property
    def is_pair(self) -> Tensor:
        """Whether there is a second thing, (N,) bool."""
        return self.relation >= 0

    def captions(self) -> list[str]:
        """Return the N captions."""
        return [_caption(*row) for row in zip(*(field.tolist() for field in self), strict=True)]

    def select(self, index: Tensor) -> Scenes:
        """Return the scenes of an index or mask."""
        return Scenes(*(field[index] for field in self))


def _thing(colour: int, shape: int, size: int) -> str:
    return f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"


def _caption(colour: list[int], shape: list[int], size: list[int], relation: int) -> str:
    first, second = (_thing(*parts) for parts in zip(colour, shape, size, strict=True))
    return first if relation < 0 else f"{first} {RELATIONS[relation]} {second}"


def parse_captions(captions: list[str]) -> Scenes:
    """Return the scenes that captions of the grammar describe.

    Raises:
        ValueError: a caption that is not of the grammar.
    """
    return Scenes(*(torch.tensor(list(field)) for field in zip(*map(_parse, captions), strict=True)))


def _parse(caption: str) -> tuple[list[int], list[int], list[int], int]:
    relation = next((k for k, name in enumerate(RELATIONS) if f" {name} " in caption), -1)
    parts = [caption] if relation < 0 else caption.split(f" {RELATIONS[relation]} ")
    try:
        words = [part.split() for part in parts]
        things = [
            (COLOURS.index(colour), SHAPES.index(shape), SIZES.index(size), article) for article, size, colour, shape in words
        ]
        if any(article != "a" for *_, article in things) or len(things) != 1 + (relation >= 0):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{caption!r} is no caption of the shapes, such as 'a small red circle above a large blue square'."
        ) from None
    colour, shape, size, _ = (list(field) for field in zip(*(things * 2)[:2], strict=True))
    return colour, shape, size, relation


def held_out_table() -> Tensor:
    """Return which pairs of (colour, shape) are never trained on, (18, 18) bool, in either order; a thing is colour * 3 + shape.

    A pair is held out where the SHA-256 of its names is divisible by HELD_OUT, so it depends on no library's random numbers.
    """
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    table = torch.zeros(len(names), len(names), dtype=torch.bool)
    for i, first in enumerate(names):
        for j in range(i, len(names)):
            digest = hashlib.sha256(f"{first}, {names[j]}".encode()).digest()
            table[i, j] = table[j, i] = int.from_bytes(digest, "big") % HELD_OUT == 0
    return table


def is_held_out(scenes: Scenes) -> Tensor:
    """Return which scenes hold a pair that is never trained on, (N,) bool."""
    things = scenes.colour * len(SHAPES) + scenes.shape
    return held_out_table()[things[:, 0], things[:, 1]] & scenes.is_pair


def draw_scenes(num: int, generator: torch.Generator, pairs: float = 0.8, only_trained: bool = False) -> Scenes:
    """Draw scenes: a share `pairs` of two things of unlike colours, the others of one.

    Args:
        num: N.
        generator: on the CPU.
        pairs: share with two things.
        only_trained: whether to leave the held-out pairs out; else they have their share.
    """
    found: list[Scenes] = []
    while sum(len(part.relation) for part in found) < num:
        scenes = _draw(num, generator, pairs)
        found.append(scenes.select(~is_held_out(scenes)) if only_trained else scenes)
    return Scenes(*(torch.cat(fields)[:num] for fields in zip(*found, strict=True)))


def _draw(num: int, generator: torch.Generator, pairs: float) -> Scenes:
    first = torch.randint(len(COLOURS), (num,), generator=generator)
    other = (first + 1 + torch.randint(len(COLOURS) - 1, (num,), generator=generator)) % len(COLOURS)
    shape = torch.randint(len(SHAPES), (num, 2), generator=generator)
    size = torch.randint(len(SIZES), (num, 2), generator=generator)
    relation = torch.randint(len(RELATIONS), (num,), generator=generator)
    single = torch.rand(num, generator=generator) >= pairs
    return Scenes(torch.stack([first, other], 1), shape, size, relation.masked_fill(single, -1))


# Drawing


def extents(shape: Tensor, radius: Tensor) -> Tensor:
    """Return how far shapes reach from their centre of mass, (..., 4): left, right, up and down, in pixels."""
    side = radius * math.sqrt(math.pi) / 2  # half the edge of the square
    half, up, down = radius * TRIANGLE_HALF, radius * TRIANGLE_UP, radius * TRIANGLE_UP / 2
    reach = torch.stack(
        [
            torch.stack([radius] * 4, -1),
            torch.stack([side] * 4, -1),
            torch.stack([half, half, up, down], -1),
        ],
        -2,
    )  # (..., shape, 4)
    return reach.gather(-2, shape[..., None, None].expand(*shape.shape, 1, 4)).squeeze(-2)


# Of an equilateral triangle of area pi: half its edge, and the distance of its top from its centre.
TRIANGLE_HALF = math.sqrt(math.pi / math.sqrt(3))
TRIANGLE_UP = 2 * TRIANGLE_HALF / math.sqrt(3)


def coverage(shape: Tensor, radius: Tensor, centre: Tensor, side: int = SIDE) -> Tensor:
    """Return the share of each pixel that a shape covers, with an edge one pixel wide.

    Args:
        shape: (...), index into SHAPES.
        radius: (...), of the circle of equal area, pixels.
        centre: (..., 2), x and y of the centre of mass; pixel k covers k to k + 1.
    Returns:
        (..., side, side) in [0, 1], rows first.
    """
    pixel = torch.arange(side, dtype=radius.dtype, device=radius.device) + 0.5
    x = pixel - centre[..., :1]  # (..., side)
    y = pixel - centre[..., 1:]
    x, y = x[..., None, :], y[..., :, None]
    r = radius[..., None, None]
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - r * math.sqrt(math.pi) / 2
    slope = 0.5 * math.sqrt(3) * x.abs() - 0.5 * y  # distance along the normal of either upper edge
    triangle = torch.maximum(slope, y.expand_as(slope)) - r * TRIANGLE_UP / 2
    kind = shape[..., None, None]
    distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def draw_images(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Draw one image of each scene, (N, 3, 32, 32) float32 in [-1, 1]."""
    num = len(scenes.relation)
    low, high = RADII[scenes.size].unbind(-1)
    radius = low + (high - low) * torch.rand(num, 2, generator=generator)
    centre = _place(scenes, extents(scenes.shape, radius), generator)
    cover = coverage(scenes.shape, radius, centre)  # (N, 2, 32, 32)
    cover[:, 1] *= scenes.is_pair[:, None, None]
    grey = BACKGROUND * torch.rand(num, 1, 1, 1, generator=generator)
    colour = PALETTE[scenes.colour][..., None, None]  # (N, 2, 3, 1, 1)
    cover = cover.unsqueeze(2)
    image = grey * (1 - cover.sum(1)) + (cover * colour).sum(1)
    return 2 * image - 1


def _place(scenes: Scenes, reach: Tensor, generator: torch.Generator) -> Tensor:
    """Return centres (N, 2, 2), x and y of both things, so that they stand apart as the relation says and inside the image."""
    num = len(scenes.relation)
    vertical = (scenes.relation >= 2)[:, None]
    swapped = ((scenes.relation % 2) == 1)[:, None, None]
    along = torch.where(vertical[..., None], reach[..., 2:], reach[..., :2])  # (N, 2, 2): before and after, along the relation
    across = torch.where(vertical[..., None], reach[..., :2], reach[..., 2:])
    ordered = torch.where(swapped, along.flip(1), along)  # the one that comes first along the axis, then the other
    slack = SIDE - 2 * GAP - ordered.sum((1, 2))
    cuts = torch.rand(num, 2, generator=generator).sort(1).values * slack[:, None]
    first = GAP / 2 + cuts[:, 0] + ordered[:, 0, 0]
    second = SIDE - GAP / 2 - (slack - cuts[:, 1]) - ordered[:, 1, 1]
    position = torch.stack([first, second], 1)
    position = torch.where(swapped[..., 0], position.flip(1), position)
    free = SIDE - GAP - along[:, 0].sum(1)  # a thing alone is anywhere
    alone = GAP / 2 + along[:, 0, 0] + free * torch.rand(num, generator=generator)
    position[:, 0] = torch.where(scenes.is_pair, position[:, 0], alone)
    low, high = GAP / 2 + across[..., 0], SIDE - GAP / 2 - across[..., 1]  # (N, 2)
    base = low[:, 0] + (high - low)[:, 0] * torch.rand(num, generator=generator)
    tilt = (torch.rand(num, generator=generator) - 0.5) * (position[:, 1] - position[:, 0]).abs()  # at most 27 degrees
    side = torch.stack([base, (base + tilt).clamp(low[:, 1], high[:, 1])], 1)
    # The clamp may tilt further where the second is larger; then the first gives way.
    limit = 0.5 * (position[:, 1] - position[:, 0]).abs()
    side[:, 0] = torch.where(scenes.is_pair, side[:, 0].clamp(side[:, 1] - limit, side[:, 1] + limit), side[:, 0])
    return torch.where(vertical[..., None], torch.stack([side, position], -1), torch.stack([position, side], -1))


class Captioned(NamedTuple):
    """Images (N, 3, 32, 32) float32 in [-1, 1] and what they show."""

    images: Tensor
    scenes: Scenes


def shapes(num: int, seed: int = 0, only_trained: bool = True) -> Captioned:
    """Return `num` drawn images with their scenes; the training set leaves the held-out pairs out.

    Args:
        num: N.
        seed: of scenes and images.
        only_trained: see `draw_scenes`.
    """
    generator = keyed_generator("shapes", seed)
    scenes = draw_scenes(num, generator, only_trained=only_trained)
    return Captioned(torch.cat([draw_images(part, generator) for part in _split(scenes, 1000)]), scenes)


def shape_captions(num: int, seed: int = 0, only_trained: bool = True) -> list[str]:
    """Return the captions of `shapes` with the same arguments, without drawing an image."""
    return draw_scenes(num, keyed_generator("shapes", seed), only_trained=only_trained).captions()


def _split(scenes: Scenes, size: int) -> list[Scenes]:
    return [Scenes(*fields) for fields in zip(*(field.split(size) for field in scenes), strict=True)]
