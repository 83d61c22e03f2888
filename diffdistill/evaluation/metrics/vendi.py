"""The Vendi score: the effective number of different images in a sample.

Source: Friedman and Dieng 2023 (arXiv:2210.02410).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.distances import unit_rows
from diffdistill.evaluation.metrics.sample import Sample, Value


def vendi_score(features: Tensor) -> float:
    """Return exp(-sum_i l_i log l_i), l the eigenvalues of K / N with K_ij = cos(x_i, x_j).

    Between 1, all vectors of one direction, and min(N, d), all directions equally strong. With X the vectors at unit length,
    X X' = K and X' X have the same eigenvalues but for zeros; the smaller matrix is taken apart.

    Args:
        features: (N, d), none of them zero. Taken to float64.
    """
    x = unit_rows(features)
    gram = x.T @ x if x.shape[1] < len(x) else x @ x.T
    shares = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)  # rounding leaves zeros on either side of zero
    return float(torch.special.entr(shares).sum().exp())


@dataclass(frozen=True)
class VendiMetric:
    """`vendi`: the effective number of different images, whatever they show; to be read beside that of the reference."""

    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return vendi."""
        return {"vendi": Value(vendi_score(sample.tensor("features")))}
