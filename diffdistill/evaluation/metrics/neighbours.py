"""Metrics by nearest neighbours: which images lie in the balls around those of the other set.

Sources: Kynkaanniemi et al. 2019 (arXiv:1904.06991) for precision and recall, Naeem et al. 2020 (arXiv:2002.09797) for
density and coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.distances import squared_distance_blocks
from diffdistill.evaluation.metrics.sample import Sample, Value


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Return the squared distance of each row of x, float64 (N, d), to its k-th nearest other row, (N,)."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in squared_distance_blocks(x, x)])


def share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of points, (N, d), within the squared radius, (M,), of at least one centre, (M, d)."""
    inside = [(block <= radii).any(1) for block in squared_distance_blocks(points, centres)]
    return float(torch.cat(inside).double().mean())


def precision_recall(sample: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the share of samples inside the reference's k-nearest-neighbour balls, and the reverse.

    Args:
        sample: (N, d). reference: (M, d). Both longer than k; taken to float64.
    """
    if min(len(sample), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than k={k} images; got {len(sample)} and {len(reference)}.")
    x, y = sample.double(), reference.double()
    return share_inside(x, y, neighbour_radii(y, k)), share_inside(y, x, neighbour_radii(x, k))


def density_coverage(sample: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Return the mean number of the reference's k-nearest-neighbour balls around a sample, over k, and the share of balls not empty.

    Balls are open, as in the published code; those of precision and recall are closed. For two samples of one distribution
    the density is 1 on average, whatever N and M, and the coverage 1 - prod_i (M - i) / (N + M - i), i = 1 to k. Samples
    crowded where the reference is dense have a density above 1.

    Args:
        sample: (N, d), not empty. reference: (M, d), longer than k. Taken to float64.
    """
    if not len(sample) or len(reference) <= k:
        raise ValueError(
            f"density and coverage need an image, and more than k={k} of the reference; got {len(sample)} and {len(reference)}."
        )
    x, y = sample.double(), reference.double()
    radii = neighbour_radii(y, k)
    members = torch.stack([(block < radii).sum(0) for block in squared_distance_blocks(x, y)]).sum(0)  # (M,)
    return float(members.sum()) / (k * len(x)), float((members > 0).double().mean())


def seeded_subset(x: Tensor, size: int, seed: int) -> Tensor:
    """Return `size` rows of x drawn without replacement in their old order, or x itself when it is no longer."""
    if len(x) <= size:
        return x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
    return x[chosen.sort().values]


def equal_subsets(sample: Sample, reference: Sample, max_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features of both in seeded subsets of the size of the smaller set, at most `max_images`: shares depend on N and M."""
    ours, real = sample.tensor("features"), reference.tensor("features")
    size = min(max_images, len(ours), len(real))
    return seeded_subset(ours, size, seed), seeded_subset(real, size, seed)


@dataclass(frozen=True)
class PrecisionRecallMetric:
    """`precision` and `recall` with k = 3, on equal numbers of both sets: recall grows with the number of samples."""

    k: int = 3
    max_images: int = 10_000
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return precision and recall on `equal_subsets`."""
        precision, recall = precision_recall(*equal_subsets(sample, reference, self.max_images, seed), k=self.k)
        return {"precision": Value(precision), "recall": Value(recall)}


@dataclass(frozen=True)
class DensityCoverageMetric:
    """`density` and `coverage` with k = 5, on equal numbers of both sets; equal distributions give 1 and about 1 - 2^-k."""

    k: int = 5
    max_images: int = 10_000
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return density and coverage on `equal_subsets`."""
        density, coverage = density_coverage(*equal_subsets(sample, reference, self.max_images, seed), k=self.k)
        return {"density": Value(density), "coverage": Value(coverage)}
