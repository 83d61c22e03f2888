"""The Frechet distance of two Gaussians, from factors of their covariances.

All is float64: float32 in the square root of a covariance product is off by 0.06 at d = 2048.
Sources: Heusel et al. 2017 (arXiv:1706.08500), Nash et al. 2021 (arXiv:2103.03841) for sFID.
"""

from __future__ import annotations

import typing
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.jackknife import jackknife
from diffdistill.evaluation.metrics.sample import Sample, Value
from diffdistill.evaluation.moments import Moments


class Frechet(typing.NamedTuple):
    """The squared Frechet distance and its two parts, value = mean_term + covariance_term, none below zero."""

    value: float
    mean_term: float
    covariance_term: float


def covariance_factor(covariance: Tensor) -> Tensor:
    """Return F with F F' = covariance, from the eigendecomposition.

    Eigenvalues that rounding alone explains (at most d eps of the largest) count as zero, which keeps the distance
    right when there are fewer samples than dimensions: their square roots would be large against them.

    Args:
        covariance: float64 (d, d), symmetric, positive semi-definite up to rounding.
    Returns:
        float64 (d, d).
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    return vectors * torch.where(values > floor, values, 0.0).sqrt()


def frechet_from_factors(mean_1: Tensor, factor_1: Tensor, mean_2: Tensor, factor_2: Tensor) -> Frechet:
    """Return |m1 - m2|^2 + |F1|^2 + |F2|^2 - 2 |F1' F2|_*, norms Frobenius and nuclear.

    The singular values of F1' F2 are the roots of the eigenvalues of C1 C2, so this is the usual trace formula; it is
    the least |F1 - F2 Q|^2 over rotations Q and so never negative (what rounding leaves below zero is cut).

    Args:
        mean_1, mean_2: float64 (d,).
        factor_1, factor_2: float64 (d, any), F F' the covariance.
    """
    mean_term = (mean_1 - mean_2).square().sum()
    cross = torch.linalg.svdvals(factor_1.T @ factor_2).sum()
    covariance_term = (factor_1.square().sum() + factor_2.square().sum() - 2 * cross).clamp(min=0)
    return Frechet(float(mean_term + covariance_term), float(mean_term), float(covariance_term))


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Frechet:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians; means (d,), covariances (d, d)."""
    return frechet_from_factors(
        mean_1.double(), covariance_factor(covariance_1), mean_2.double(), covariance_factor(covariance_2)
    )


def jackknife_frechet(moments: Moments, mean: Tensor, factor: Tensor) -> tuple[Frechet, Value]:
    """Return the Frechet distance of grouped moments to a fixed reference, plain and corrected by the jackknife.

    Args:
        moments: of the sample, in two or more groups.
        mean, factor: of the reference, float64 (d,) and (d, d).
    """

    def distance(part: Moments) -> Frechet:
        return frechet_from_factors(part.mean(), covariance_factor(part.covariance()), mean, factor)

    whole = distance(moments)
    parts = [distance(part).value for part in moments.leave_one_out()]
    return whole, jackknife(whole.value, parts, moments.counts.tolist())


def frechet_values(name: str, sample: Moments, reference: Moments) -> dict[str, Value]:
    """Return the distance as `name` (its se is the jackknife's) and `name`_jackknife; warns when images are fewer than dimensions."""
    smallest = min(sample.count, reference.count)
    if smallest <= sample.dim:
        warnings.warn(
            f"{smallest} images for {sample.dim} features: the covariance is singular and the Frechet distance mostly bias.",
            stacklevel=3,
        )
    whole, corrected = jackknife_frechet(sample, reference.mean(), covariance_factor(reference.covariance()))
    return {name: Value(whole.value, corrected.se), f"{name}_jackknife": corrected}


@dataclass(frozen=True)
class FrechetMetric:
    """`fid`: Frechet distance, lower is better; `fid_jackknife`: the same without its 1/N bias, with standard error."""

    needs: frozenset[str] = frozenset({"moments"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return fid and fid_jackknife."""
        return frechet_values("fid", sample.moments, reference.moments)


@dataclass(frozen=True)
class SpatialFrechetMetric:
    """`sfid` and `sfid_jackknife`: `FrechetMetric` on features that say where in the image, so that layout counts."""

    needs: frozenset[str] = frozenset({"spatial"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return sfid and sfid_jackknife."""
        return frechet_values("sfid", sample.spatial, reference.spatial)
