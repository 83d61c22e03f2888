"""A denoiser asked about a few rows at a time: what a pass needs in memory grows with its rows, what it answers for a row does not."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, View


def predict_in_parts(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, rows: int) -> Prediction:
    """Return denoiser(x_t, t, cond) from passes of at most `rows` rows; equal to one pass up to rounding."""
    if len(x_t) <= rows:
        return denoiser(x_t, t, cond)
    parts = [denoiser(x_t[k : k + rows], t[k : k + rows], cond.select(slice(k, k + rows))) for k in range(0, len(x_t), rows)]
    columns = zip(*((part.raw, part.x_t, part.alpha, part.sigma) for part in parts), strict=True)
    return Prediction(parts[0].kind, *map(torch.cat, columns))


class InParts(View):
    """Another denoiser, asked about at most `rows` rows at a time; under guidance each sample has two.

    Args:
        inner: that denoiser.
        rows: of a pass, at least 1.
    """

    def __init__(self, inner: Denoiser, rows: int) -> None:
        self.inner, self.schedule, self.sample_shape, self.rows = inner, inner.schedule, inner.sample_shape, rows

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Answer as the other does."""
        return predict_in_parts(self.inner, x_t, t, cond, self.rows)
