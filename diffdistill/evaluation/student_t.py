"""Student's t: intervals and p values of estimates whose standard error is itself estimated, without scipy."""

from __future__ import annotations

import math
from typing import NamedTuple


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), to 1e-12 of itself, with a or b in the ten thousands to 1e-9.

    Args:
        a, b: positive.
        x: in [0, 1].
    Source: DLMF 8.17.22, a continued fraction, with I_x(a, b) = 1 - I_(1 - x)(b, a) where it converges slowly.
    """
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for m in range(100 + 5 * math.isqrt(int(max(a, b))), 0, -1):  # about sqrt(max(a, b)) terms count
        fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
        n = m - 1
        fraction = 1 - (a + n) * (a + b + n) * x / ((a + 2 * n) * (a + 2 * n + 1)) / fraction
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * fraction)


def p_value(t: float, degrees: float) -> float:
    """Return the probability that |T| is |t| or more under Student's t; infinite degrees are the normal distribution."""
    if math.isinf(degrees):
        return math.erfc(abs(t) / math.sqrt(2))
    if math.isinf(t):
        return 0.0
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def quantile(level: float, degrees: float) -> float:
    """Return the t that |T| stays below with probability `level`, e.g. 2.01 for 0.95 and 49 degrees; by bisection."""
    if not 0 < level < 1 or degrees <= 0:
        raise ValueError(f"a quantile needs 0 < level < 1 and positive degrees; got {level} and {degrees}.")
    low, high = 0.0, 1.0
    while p_value(high, degrees) > 1 - level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if p_value(middle, degrees) > 1 - level else (low, middle)
    return high


def interval(value: float, se: float, degrees: float = math.inf, level: float = 0.95) -> Interval:
    """Return the interval that covers what is estimated with probability `level`.

    Args:
        value, se: the estimate and its standard error.
        degrees: of freedom of the standard error: G - 1 of a jackknife over G groups, infinite where it is as good as known.
        level: e.g. 0.95.
    """
    margin = quantile(level, degrees) * se
    return Interval(value - margin, value + margin)
