"""Shares with 95 % intervals where the yes and no come in clusters: several images of one prompt, several questions of one image.

Images of one prompt resemble each other, so n of them say less than n independent ones: with m images a prompt and a correlation rho
between them, the variance of the share is 1 + (m - 1) rho times p (1 - p) / n (Kish 1965). The interval of Wilson 1927 is therefore
taken at the effective count n_eff = p (1 - p) / variance, the variance estimated over prompts (Korn and Graubard 1998 do this with
the interval of Clopper and Pearson). It speaks of prompts like these and of other seeds: for the same prompts under other seeds it is
too wide.

Near a share of 0 or 1 the variance rests on the few prompts that differ. For the effective count, half a prompt that is right
throughout and half a prompt that is wrong throughout are added to the others, as Jeffreys' prior adds half a yes and half a no. In
20,000 trials of beta-binomial prompts (80 of 4 images, p from 0.04 to 0.98, rho from 0.05 to 0.7) the intervals held the truth
in 94.5 to 98.2 %; without the halves in 90.3 to 95.1 %; the interval over images as if they were independent in 73 to 94 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError

Z = 1.959963984540054  # 97.5 % of the standard normal distribution lie below


class Estimate(NamedTuple):
    """A share or a mean of shares.

    Attributes:
        value: the estimate.
        se: its standard error over prompts; 0 where all prompts agree, where only the interval says how little is known.
        low, high: ends of the 95 % interval.
    """

    value: float
    se: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in other units, such as percent."""
        return Estimate(*(factor * number for number in self))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the p between which |share - p| <= Z sqrt(p (1 - p) / count): Wilson 1927, JASA 22.

    Args:
        share: observed, in [0, 1].
        count: of independent yes and no, positive; not necessarily whole.
    """
    shrink = 1 + Z**2 / count
    centre = (share + Z**2 / (2 * count)) / shrink
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / shrink
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # against rounding at 0 and 1


def clustered_share(yes: Tensor, asked: Tensor) -> Estimate:
    """Return sum(yes) / sum(asked), a ratio over clusters, with Wilson's interval at the effective count.

    One answer a cluster gives Wilson's interval at K^2 / (K + 1).

    Args:
        yes: float64 (K,), the number of yes in each cluster, or a sum of scores in [0, 1].
        asked: float64 (K,), how many there were in each; positive.
    Raises:
        UserError: fewer than two clusters.
    """
    num = len(yes)
    if num < 2:
        raise UserError(f"an interval over prompts needs two of them or more; got {num}.")
    share, variance = _ratio(yes, asked, torch.ones_like(yes))
    mean = asked.mean()
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with_halves = torch.cat([yes, torch.stack([mean, 0 * mean])]), torch.cat([asked, mean.expand(2)])
    near, near_variance = _ratio(*with_halves, torch.cat([torch.ones_like(yes), halves]))
    count = near * (1 - near) / near_variance * num / (num + 1)  # the halves are no data: they leave the count again
    return Estimate(share, math.sqrt(variance), *wilson(share, count))


def _ratio(yes: Tensor, asked: Tensor, weight: Tensor) -> tuple[float, float]:
    """Return r = sum w yes / sum w asked and its variance, W / (W - 1) sum w (yes - r asked)^2 / (sum w asked)^2 with W = sum w.

    The variance is that of the linearised ratio (Cochran 1977, section 6.3).
    """
    total, num = float((weight * asked).sum()), float(weight.sum())
    ratio = float((weight * yes).sum()) / total
    return ratio, num / (num - 1) * float((weight * (yes - ratio * asked).square()).sum()) / total**2


def mean_share(estimates: Sequence[Estimate]) -> Estimate:
    """Return the plain mean of independent estimates, its interval made of theirs (MOVER: Zou and Donner 2008, Stat. Med. 27).

    low = mean - sqrt(sum((value_t - low_t)^2)) / T, and high likewise: each distance is that of an interval which may be skewed, as
    near a share of 0 or 1, where value -+ Z se would be too short.
    """
    num = len(estimates)
    mean = math.fsum(each.value for each in estimates) / num
    return Estimate(
        mean,
        math.hypot(*(each.se for each in estimates)) / num,
        mean - math.hypot(*(each.value - each.low for each in estimates)) / num,
        mean + math.hypot(*(each.high - each.value for each in estimates)) / num,
    )
