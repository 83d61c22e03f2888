"""Kernel distances: the squared maximum mean discrepancy of two sets of features.

Sources: Binkowski et al. 2018 (arXiv:1801.01401) for KID, Jayasumana et al. 2024 (arXiv:2401.09603) for CMMD.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.distances import squared_distance_blocks, unit_rows
from diffdistill.evaluation.metrics.sample import Sample, Value


class Witnessed(typing.NamedTuple):
    """A squared MMD, and the witness h of each row of x, float64 (N,): how much nearer it is to x than to y, on average.

    To first order the estimate is the mean of value + 2 (h - mean h) over the rows (Hoeffding's projection), so these say how far it
    would scatter with other rows.
    """

    value: float
    witness: Tensor


def polynomial_mmd2(x: Tensor, y: Tensor, scale: float | None = None) -> Witnessed:
    """Return the unbiased squared MMD under the kernel (x.y / scale + 1)^3; it can fall below zero.

    Args:
        x: (N, d). y: (M, d). Taken to float64.
        scale: None is d, the published choice.
    """
    x, y = x.double(), y.double()
    scale = x.shape[1] if scale is None else scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / scale + 1) ** 3

    def off_diagonal_means(gram: Tensor) -> Tensor:
        return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)

    own, other = off_diagonal_means(kernel(x, x)), kernel(x, y).mean(1)
    return Witnessed(float(own.mean() + off_diagonal_means(kernel(y, y)).mean() - 2 * other.mean()), own - other)


class KernelDistance(typing.NamedTuple):
    """The mean over subsets, its spread over them, and a value for each row of x, (N,), whose mean it is to first order."""

    value: float
    subset_sd: float
    each: Tensor


def kernel_distance(
    x: Tensor, y: Tensor, num_subsets: int, subset_size: int, seed: int, scale: float | None = None
) -> KernelDistance:
    """Return mean and standard deviation of `polynomial_mmd2` over seeded subsets drawn without replacement.

    The subset size is capped by the smaller set. The deviation is between subsets and no standard error: they overlap. A row counts
    as often as it was drawn.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"the kernel distance needs two samples on each side; got {len(x)} and {len(y)}.")
    generator = torch.Generator().manual_seed(seed)

    values, witness = torch.empty(num_subsets, dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for index in range(num_subsets):
        chosen = torch.randperm(len(x), generator=generator)[:size]
        found = polynomial_mmd2(x[chosen], y[torch.randperm(len(y), generator=generator)[:size]], scale)
        values[index] = found.value
        witness[chosen] += found.witness - found.witness.mean()
    value, share = float(values.mean()), num_subsets * size / len(x)
    return KernelDistance(value, float(values.std(correction=0)), value + 2 * witness / share)


def gaussian_mmd2(x: Tensor, y: Tensor, sigma: float) -> Witnessed:
    """Return the biased squared MMD under exp(-|a - b|^2 / (2 sigma^2)): each mean is over all pairs, a = b among them.

    Zero for equal sets and never below but for rounding. With K the expectation of the kernel inside a distribution, it
    lies (1 - K) / N of x plus (1 - K) / M of y above its limit on average, so only equal numbers compare.

    Args:
        x: (N, d). y: (M, d). Taken to float64: under a kernel wide against the distances the means differ by little.
    """
    x, y = x.double(), y.double()

    def mean_kernels(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([(block / (-2 * sigma**2)).exp().mean(1) for block in squared_distance_blocks(a, b)])

    own, other = mean_kernels(x, x), mean_kernels(x, y)
    return Witnessed(float(own.mean() + mean_kernels(y, y).mean() - 2 * other.mean()), own - other)


@dataclass(frozen=True)
class KernelMetric:
    """`kid`: mean over subsets of the unbiased squared kernel distance, with standard error; `kid_subset_sd`: its spread over them.

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
        ours, real = sample.tensor("features"), reference.tensor("features")
        scale = float(real.double().square().sum(1).mean()) if self.normalised else None
        found = kernel_distance(ours, real, self.num_subsets, self.subset_size, seed, scale)
        return {"kid": Value(found.value, standard_error(found.each), found.each), "kid_subset_sd": Value(found.subset_sd)}


@dataclass(frozen=True)
class CmmdMetric:
    """`cmmd`: 1000 times the biased squared MMD of unit vectors under a Gaussian kernel of sigma 10, as the published code has it.

    Published figures are of OpenAI's CLIP ViT-L/14 at 336 pixels. Between unit vectors this kernel is nearly linear and the
    value nearly 10 times the squared distance of their means.
    """

    sigma: float = 10.0
    scale: float = 1000.0
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return cmmd over all images of both; the biased estimator compares at equal numbers only."""
        found = gaussian_mmd2(unit_rows(sample.tensor("features")), unit_rows(reference.tensor("features")), self.sigma)
        each = self.scale * (found.value + 2 * (found.witness - found.witness.mean()))
        return {"cmmd": Value(self.scale * found.value, standard_error(each), each)}


def standard_error(each: Tensor) -> float:
    """Return the standard error of the mean of independent values (N,)."""
    return float(each.std()) / math.sqrt(len(each))
