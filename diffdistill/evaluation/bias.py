"""How much of a Frechet distance is there only because images are few, and how many would do.

A distance of N images lies above its limit by about c / N: the covariance of few images is too uneven, and their mean is off. The
jackknife measures that excess without further images, and c with it. The curve shows the law itself: the distance of parts of the
images against their number.

Source: Chong and Forsyth 2020 (arXiv:1911.07023) for the law and the extrapolation from parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffdistill.evaluation.metrics.sample import Value
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.result import Evaluation

TOO_MUCH = 0.1  # of a distance: more of it as bias is said
PARTS = (1, 2, 3, 5, 10)  # into how many parts the images are cut


@dataclass(frozen=True)
class Bias:
    """The bias of a distance.

    Attributes:
        count: number of images, N.
        plain: the distance.
        corrected: without its bias, by the jackknife. It can fall below zero, by its error.
        se: standard error of both.
    """

    count: int
    plain: float
    corrected: float
    se: float

    @property
    def size(self) -> float:
        """The bias itself."""
        return self.plain - self.corrected

    @property
    def constant(self) -> float:
        """c, the bias times N, the same for any N by the law."""
        return self.size * self.count

    @property
    def is_too_much(self) -> bool:
        """Whether more than a tenth of the distance is bias."""
        return self.size > TOO_MUCH * self.plain

    def count_for(self, share: float) -> int | None:
        """Return how many images bring the bias below a share of the true distance; None where that may be zero."""
        return math.ceil(self.constant / (share * self.corrected)) if self.corrected > 2 * self.se else None

    def sentence(self, share: float = 0.01) -> str:
        """Return for a report how large the bias is and what would lower it."""
        about = f"{self.count:,} images: about {self.size:.2g} of the distance {self.plain:.3g} is bias, which falls as 1/N"
        count = self.count_for(share)
        if count is None:
            return (
                f"{about}; what remains without it, {self.corrected:.2g} with a standard error of {self.se:.2g}, may be zero."
            )
        if count <= self.count:
            return f"{about}, less than {share:.0%} of what remains."
        return f"{about}; about {_two_digits(count):,} images would bring it below {share:.0%} of what remains."


def bias_of(evaluation: Evaluation, name: str = "fid") -> Bias | None:
    """Return the bias of a distance that an evaluation measured, averaged over its blocks of seeds; None where it did not."""
    plain, corrected = evaluation.values.get(name), evaluation.values.get(f"{name}_jackknife")
    if plain is None or corrected is None or corrected.se is None:
        return None
    return Bias(evaluation.num_images, plain.mean, corrected.mean, corrected.se / math.sqrt(len(plain.blocks)))


class Point(NamedTuple):
    """A distance of so many images, the mean over disjoint parts of all."""

    num_images: int
    value: float


@dataclass(frozen=True)
class CountCurve:
    """A distance against the number of images, and the line limit + slope / N through it.

    Attributes:
        points: the most images first.
        limit: of infinitely many images; its error is that of the line alone, and the images' own comes on top.
        slope: c. Points share images, so that its error is about 0.7 of the true one.
    """

    points: tuple[Point, ...]
    limit: Value
    slope: Value

    def at(self, count: float) -> float:
        """Return the line's distance of so many images."""
        return self.limit.value + self.slope.value / count


def count_curve(points: Sequence[tuple[float, float]]) -> CountCurve:
    """Return distances of different numbers of images with the 1/N line through them, the most images first."""
    ordered = tuple(sorted((Point(int(count), value) for count, value in points), reverse=True))
    return CountCurve(ordered, *inverse_count_line(ordered))


def count_points(moments: Moments, distance: Callable[[Moments], float], parts: tuple[int, ...] = PARTS) -> tuple[Point, ...]:
    """Return the distance of all images and of halves, thirds, fifths and tenths of them.

    Each point is a mean over all the disjoint parts of one size: what is peculiar to these images is then nearly the same in every
    point and leaves the slope alone, which nested parts make twice as uncertain. It takes sum(parts) distances.

    Args:
        moments: with at least max(parts) groups.
        distance: of one set of moments to the reference.
        parts: into how many parts the images are cut, three numbers or more.
    Raises:
        ValueError: fewer groups or numbers.
    """
    if len(set(parts)) < 3 or moments.num_groups < max(parts):
        raise ValueError(
            f"a line and its error need parts of three sizes and a group for each part; got {parts} of {moments.num_groups} groups."
        )
    return tuple(sorted((_mean_distance(moments, distance, num_parts) for num_parts in set(parts)), reverse=True))


def _mean_distance(moments: Moments, distance: Callable[[Moments], float], num_parts: int) -> Point:
    size = moments.num_groups // num_parts
    chosen = [moments.subset(range(first, first + size)) for first in range(0, num_parts * size, size)]
    return Point(sum(part.count for part in chosen) // num_parts, sum(map(distance, chosen)) / num_parts)


def inverse_count_line(points: tuple[Point, ...]) -> tuple[Value, Value]:
    """Return the limit and the slope of value = limit + slope / N, with the standard errors of the line.

    Weighted by N^3: the scatter about the line falls as 1/N, and what the law leaves out, squared, as 1/N^4.
    """
    count, value = torch.tensor(points, dtype=torch.float64).T
    weight = count**3 / (count**3).sum()
    design = torch.stack([torch.ones_like(count), 1 / count], 1)
    inverse = torch.linalg.inv(design.T @ (weight[:, None] * design))
    line = inverse @ design.T @ (weight * value)
    scatter = (weight * (value - design @ line).square()).sum() / (len(points) - 2)
    (limit, slope), (limit_se, slope_se) = line.tolist(), (inverse.diagonal() * scatter).sqrt().tolist()
    return Value(limit, limit_se), Value(slope, slope_se)


def _two_digits(count: int) -> int:
    """Round a number of images to two digits."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count / unit) * unit
