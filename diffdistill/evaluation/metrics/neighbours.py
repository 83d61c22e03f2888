"""Metrics by nearest neighbours: which images lie in the balls around those of the other set.

Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991).
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.sample import Sample, Value

ROWS_PER_BLOCK = 1024


def _distance_blocks(x: Tensor, y: Tensor) -> typing.Iterator[Tensor]:
    """Yield squared distances of blocks of rows of x to all of y, float64 (rows, M)."""
    y_norms = y.square().sum(1)
    for rows in x.split(ROWS_PER_BLOCK):
        yield (rows.square().sum(1, keepdim=True) + y_norms - 2 * rows @ y.T).clamp(min=0)


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Return the squared distance of each row of x, float64 (N, d), to its k-th nearest other row, (N,)."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distance_blocks(x, x)])


def coverage(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of points, (N, d), within the squared radius, (M,), of at least one centre, (M, d)."""
    inside = [(block <= radii).any(1) for block in _distance_blocks(points, centres)]
    return float(torch.cat(inside).double().mean())


def precision_recall(sample: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the share of samples inside the reference's k-nearest-neighbour balls, and the reverse.

    Args:
        sample: (N, d). reference: (M, d). Both longer than k; taken to float64.
    """
    if min(len(sample), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than k={k} images; got {len(sample)} and {len(reference)}.")
    x, y = sample.double(), reference.double()
    return coverage(x, y, neighbour_radii(y, k)), coverage(y, x, neighbour_radii(x, k))


def seeded_subset(x: Tensor, size: int, seed: int) -> Tensor:
    """Return `size` rows of x drawn without replacement in their old order, or x itself when it is no longer."""
    if len(x) <= size:
        return x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
    return x[chosen.sort().values]


@dataclass(frozen=True)
class PrecisionRecallMetric:
    """`precision` and `recall` with k = 3, on equal numbers of both sets: recall grows with the number of samples."""

    k: int = 3
    max_images: int = 10_000
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return precision and recall on seeded subsets of the size of the smaller set, at most `max_images`."""
        size = min(self.max_images, len(sample.features), len(reference.features))
        sets = (seeded_subset(side.features, size, seed) for side in (sample, reference))
        precision, recall = precision_recall(*sets, k=self.k)
        return {"precision": Value(precision), "recall": Value(recall)}
