"""The Frechet distance of two Gaussians, from factors of their covariances.

All is float64: float32 in the square root of a covariance product is off by 0.06 at d = 2048.
Sources: Heusel et al. 2017 (arXiv:1706.08500), Nash et al. 2021 (arXiv:2103.03841) for sFID.
"""

from __future__ import annotations

import typing
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.evaluation.bias import PARTS, Bias, count_points
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian, covariance_factor
from diffdistill.evaluation.metrics.jackknife import jackknife
from diffdistill.evaluation.metrics.sample import Sample, Statistics, Value
from diffdistill.evaluation.moments import Moments


class Frechet(typing.NamedTuple):
    """The squared Frechet distance and its two parts, value = mean_term + covariance_term, none below zero."""

    value: float
    mean_term: float
    covariance_term: float


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


def frechet_to_reference(moments: Moments, reference: ReferenceGaussian) -> Frechet:
    """Return the Frechet distance of a sample, all its groups together, to a reference on the same device."""
    return frechet_from_factors(moments.mean(), covariance_factor(moments.covariance()), reference.mean, reference.factor)


def quick_frechet(moments: Moments, reference: ReferenceGaussian) -> float:
    """Return |m1 - m2|^2 + tr C1 + |F2|^2 - 2 sum sqrt(eigenvalues of F2' C1 F2), three times as fast as the factors' product.

    The eigenvalues are squares of what is wanted, each known to eps of the largest: those below d eps of it count as zero. The
    value is right to about 1e-9 of itself at worst, and off by nearly the same for samples that differ in one group.
    """
    covariance = moments.covariance()
    overlaps = torch.linalg.eigvalsh(reference.factor.T @ covariance @ reference.factor)
    rounding = overlaps[-1:] * len(covariance) * torch.finfo(torch.float64).eps  # empty where the factor is
    cross = torch.where(overlaps > rounding, overlaps, 0.0).sqrt().sum()
    mean_term = (moments.mean() - reference.mean).square().sum()
    return float(mean_term + covariance.trace() + reference.factor.square().sum() - 2 * cross)


def jackknife_frechet(
    moments: Moments, reference: ReferenceGaussian, exact_up_to: int = 1000
) -> tuple[Frechet, tuple[float, ...]]:
    """Return the Frechet distance of a sample and those without each of its groups, as `jackknife` takes them.

    The latter are the distance itself and its change. With more than `exact_up_to` dimensions, where every group would take
    seconds, the change is by `quick_frechet` on both sides, so that its error cancels: the jackknife multiplies errors.
    """
    whole = frechet_to_reference(moments, reference)
    if moments.dim > exact_up_to:
        start, deleted = quick_frechet(moments, reference), [quick_frechet(rest, reference) for rest in moments.leave_one_out()]
    else:
        start, deleted = whole.value, [frechet_to_reference(rest, reference).value for rest in moments.leave_one_out()]
    return whole, tuple(whole.value + value - start for value in deleted)


def frechet_values(name: str, sample: Statistics | None, reference: Statistics | None) -> dict[str, Value]:
    """Return the distance as `name` (its se is the jackknife's) and `name`_jackknife; warns when images are too few.

    Args:
        name: fid, sfid, ...
        sample: moments in two or more groups.
        reference: moments, or what was kept of them.
    """
    if not isinstance(sample, Moments) or reference is None:
        raise TypeError(f"{name} takes moments of the sample and a reference; got {type(sample)} and {type(reference)}.")
    gaussian = ReferenceGaussian.of(reference).to(sample.device)
    whole, deleted = jackknife_frechet(sample, gaussian)
    corrected = jackknife(whole.value, deleted, sample.counts.tolist())
    bias = Bias(sample.count, whole.value, corrected.value, corrected.se or 0.0)
    if bias.is_too_much:
        warnings.warn(bias.sentence(), stacklevel=3)
    for images, count in (("images", sample.count), ("real images", gaussian.count)):
        if count is not None and count <= sample.dim:
            warnings.warn(f"{count:,} {images} for {sample.dim} features: their covariance is singular.", stacklevel=3)
    curve = count_points(sample, lambda part: quick_frechet(part, gaussian)) if sample.num_groups >= max(PARTS) else None
    return {name: Value(whole.value, corrected.se, deleted=deleted, curve=curve), f"{name}_jackknife": corrected}


@dataclass(frozen=True)
class FrechetMetric:
    """NAME: Frechet distance, lower is better; NAME_jackknife: the same without its 1/N bias, with standard error.

    Attributes:
        name: fid, or what it is called of other features: sfid of spatial ones (layout counts), fd_dinov2, clip_fid, patch_fid.
        field: of a `Sample`, where the moments are.
    """

    name: str = "fid"
    field: Literal["moments", "spatial"] = "moments"
    absolute: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """The moments."""
        return frozenset({self.field})

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return both distances."""
        return frechet_values(self.name, getattr(sample, self.field), getattr(reference, self.field))


@dataclass(frozen=True)
class Dmd2FrechetMetric:
    """`fid_dmd2`: the FID that DMD2's ImageNet script prints with this many processes, each of which starts its covariance at ones.

    The sums of all processes together are then too large by as many matrices of ones, and the covariance by num_processes / (N - 1)
    in every entry. It is no better estimate of anything; it says how much of a published number that is.
    """

    num_processes: int = 8
    needs: frozenset[str] = frozenset({"moments"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the distance."""
        if not isinstance(sample.moments, Moments) or reference.moments is None:
            raise TypeError(f"fid_dmd2 takes moments; got {type(sample.moments)} and {type(reference.moments)}.")
        gaussian = ReferenceGaussian.of(reference.moments).to(sample.moments.device)
        excess = self.num_processes / (sample.moments.count - 1)
        factor = covariance_factor(sample.moments.covariance() + excess)
        return {"fid_dmd2": Value(frechet_from_factors(sample.moments.mean(), factor, gaussian.mean, gaussian.factor).value)}
