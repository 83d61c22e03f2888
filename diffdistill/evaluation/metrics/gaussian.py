"""The Gaussian that stands for a set of features: its mean and a factor of its covariance, computed once for a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.moments import Moments


@dataclass(frozen=True)
class ReferenceGaussian:
    """Mean and covariance factor of a set of images; a Frechet distance needs no more of its reference.

    Attributes:
        mean: float64 (d,).
        factor: float64 (d, r) with factor factor' the covariance, of rank r.
        count: number of images, or None where it is not known.
    """

    mean: Tensor
    factor: Tensor
    count: int | None = None

    @classmethod
    def of(cls, statistics: Moments | ReferenceGaussian) -> ReferenceGaussian:
        """Take the mean and factorise the covariance of all groups together; a Gaussian is returned as it is."""
        if isinstance(statistics, ReferenceGaussian):
            return statistics
        return cls(statistics.mean(), covariance_factor(statistics.covariance()), statistics.count)

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor, count: int | None = None) -> ReferenceGaussian:
        """Factorise a covariance (d, d), e.g. one read from a file of another package."""
        return cls(mean.double(), covariance_factor(covariance), count)

    @property
    def dim(self) -> int:
        """Length of one feature vector."""
        return len(self.mean)

    def to(self, device: torch.device | str) -> ReferenceGaussian:
        """Return the same Gaussian on another device."""
        return ReferenceGaussian(self.mean.to(device), self.factor.to(device), self.count)

    def state(self) -> dict[str, Tensor]:
        """Return tensors on the CPU to be stored beside the statistics: mean, factor, and count (-1 when not known)."""
        return {
            "mean": self.mean.cpu(),
            "factor": self.factor.cpu(),
            "count": torch.tensor(-1 if self.count is None else self.count),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ReferenceGaussian:
        """Rebuild from `state()`."""
        count = int(state["count"])
        return cls(state["mean"], state["factor"], None if count < 0 else count)


def covariance_factor(covariance: Tensor) -> Tensor:
    """Return F with F F' = covariance: Cholesky's where it is safely positive definite, else that of its eigenvectors.

    Eigenvalues that rounding alone explains (at most d eps of the largest) are no part of the covariance. With fewer samples
    than dimensions that keeps the distance right: their square roots would be large against them. Their columns are left
    out, so F is as narrow as the rank. A pivot of Cholesky's says less about the rank (of a singular matrix the last was
    seen at 1e-11 of the largest), hence the wide margin; where it serves, it is nine times as fast and as exact.

    Args:
        covariance: float64 (d, d), symmetric, positive semi-definite up to rounding.
    Returns:
        float64 (d, r), r the rank.
    """
    covariance = covariance.double()
    varies = covariance.diagonal() > 0
    if not varies.all():  # features that are zero for every image, as after a ReLU; on many of them `eigh` fails, too
        factor = covariance_factor(covariance[varies][:, varies])
        return torch.zeros(len(covariance), factor.shape[1], dtype=factor.dtype, device=factor.device).index_copy(
            0, varies.nonzero()[:, 0], factor
        )
    if not len(covariance):
        return covariance
    eps = torch.finfo(torch.float64).eps
    lower, failed_at = torch.linalg.cholesky_ex(covariance)
    if not failed_at and lower.diagonal().square().min() > eps**0.5 * covariance.diagonal().max():
        return lower
    values, vectors = _eigen(covariance)
    kept = values > len(values) * eps * values.max().clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, in any order; negative ones, which are rounding, may come out positive.

    LAPACK's divide and conquer gives up on some matrices of very low rank, of four images say; the singular values take longer and
    are found.
    """
    try:
        return torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        vectors, values, _ = torch.linalg.svd(covariance)
        return values, vectors
