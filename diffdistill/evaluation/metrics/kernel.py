"""Kernel distances: the squared maximum mean discrepancy of two sets of features.

Source: Binkowski et al. 2018 (arXiv:1801.01401).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.sample import Sample, Value


def polynomial_mmd2(x: Tensor, y: Tensor, scale: float | None = None) -> float:
    """Return the unbiased squared MMD under the kernel (x.y / scale + 1)^3; it can fall below zero.

    Args:
        x: (N, d). y: (M, d). Taken to float64.
        scale: None is d, the published choice.
    """
    x, y = x.double(), y.double()
    scale = x.shape[1] if scale is None else scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / scale + 1) ** 3

    def off_diagonal_mean(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))

    return float(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())


def kernel_distance(
    x: Tensor, y: Tensor, num_subsets: int, subset_size: int, seed: int, scale: float | None = None
) -> tuple[float, float]:
    """Return mean and standard deviation of `polynomial_mmd2` over seeded subsets drawn without replacement.

    The subset size is capped by the smaller set. The deviation is between subsets and no standard error: they overlap.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"the kernel distance needs two samples on each side; got {len(x)} and {len(y)}.")
    generator = torch.Generator().manual_seed(seed)

    def subset(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=generator)[:size]]

    found = [polynomial_mmd2(subset(x), subset(y), scale) for _ in range(num_subsets)]
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


@dataclass(frozen=True)
class KernelMetric:
    """`kid`: mean over subsets of the unbiased squared kernel distance; `kid_subset_sd`: its spread over them.

    normalised puts the mean squared norm of the reference's features in the place of d in the kernel. The published form
    suits features of about unit size; with larger ones the cubic term rules and the estimate is mostly noise.
    """

    normalised: bool = False
    num_subsets: int = 50
    subset_size: int = 1000
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return kid and kid_subset_sd."""
        scale = float(reference.features.double().square().sum(1).mean()) if self.normalised else None
        mean, spread = kernel_distance(sample.features, reference.features, self.num_subsets, self.subset_size, seed, scale)
        return {"kid": Value(mean), "kid_subset_sd": Value(spread)}
