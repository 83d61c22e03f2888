"""An estimate without its 1/N bias, and its standard error, by deleting one group of samples at a time.

Source: Busing, Meijer and van der Leeden 1999 (Statistics and Computing 9), for unequal groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffdistill.evaluation.metrics.sample import Value


def jackknife(whole: float, parts: Sequence[float], counts: Sequence[int]) -> Value:
    """Return the estimate with its 1/N bias removed, and its standard error, by deleting one group at a time.

    For G equal groups the value is G whole - (G - 1) mean(parts) and the variance (G - 1) mean((parts - their mean)^2).

    Args:
        whole: the estimate from all samples.
        parts: the estimate without group g, for each of G groups.
        counts: the size of each group, all positive.
    Raises:
        ValueError: fewer than two groups, an empty group, or lengths that differ.
    Source: Busing et al. 1999, Eq. 5 and 6.
    """
    if len(parts) < 2 or len(parts) != len(counts) or min(counts) < 1:
        raise ValueError(
            f"the jackknife needs two or more groups, none empty; got {len(parts)} estimates and counts {list(counts)[:10]}."
        )
    theta = torch.tensor(parts, dtype=torch.float64)
    sizes = torch.tensor(counts, dtype=torch.float64)
    h = sizes.sum() / sizes
    value = len(parts) * whole - ((1 - 1 / h) * theta).sum()
    pseudo = h * whole - (h - 1) * theta
    variance = ((pseudo - value).square() / (h - 1)).mean()
    return Value(float(value), math.sqrt(float(variance)))
