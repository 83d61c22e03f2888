"""Classifier-free guidance, counted from 1: D_w = D_null + w (D_cond - D_null); w = 1 is no guidance.

Source: arXiv:2207.12598; guidance interval: arXiv:2404.07724. The formula holds for x0, eps and the raw output alike, since
they are affine in each other at fixed (x_t, t).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, View


class Interval(NamedTuple):
    """The noise levels sigma / alpha inside which guidance acts; outside w = 1."""

    sigma_low: float
    sigma_high: float


def guide(cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
    """Return null + scale (cond - null), with scale of shape (B,), counted from 1."""
    return null + expand(scale, null) * (cond - null)


class Guided(View):
    """A denoiser under guidance; both branches run as one batch of 2B."""

    def __init__(self, inner: Denoiser, scale: float | Tensor, interval: Interval | None = None) -> None:
        self.inner, self.scale, self.interval = inner, scale, interval
        self.schedule, self.sample_shape = inner.schedule, inner.sample_shape

    def _scales(self, t: Tensor) -> Tensor:
        if isinstance(self.scale, Tensor):
            scale = self.scale.to(torch.float64)
        else:
            scale = torch.full(t.shape, self.scale, dtype=torch.float64, device=t.device)
        if self.interval is None:
            return scale
        level = self.schedule.coefficients(t).noise_to_signal
        inside = (level >= self.interval.sigma_low) & (level <= self.interval.sigma_high)
        return torch.where(inside, scale, torch.ones_like(scale))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the guided prediction, in the output type of the inner denoiser."""
        return self.combine(self.inner(*self.branches(x_t, t, cond)), x_t, t)

    def branches(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        """Return what the inner denoiser is asked: the conditional branch, then the empty one, 2B rows."""
        return torch.cat([x_t, x_t]), torch.cat([t, t]), cond.paired()

    def combine(self, both: Prediction, x_t: Tensor, t: Tensor) -> Prediction:
        """Return the guided prediction of B rows from that of the 2B rows of `branches`."""
        raw_cond, raw_null = both.raw.chunk(2)
        alpha, sigma = self.schedule.coefficients(t)
        return Prediction(both.kind, guide(raw_cond, raw_null, self._scales(t)), x_t, alpha, sigma)


def guided(denoiser: Denoiser, scale: float | Tensor, interval: Interval | None = None) -> Denoiser:
    """Return the denoiser under guidance, or the denoiser itself where scale is the number 1.

    Args:
        scale: w counted from 1, a number or one value per sample (B,).
        interval: noise levels inside which w acts.
    Raises:
        ValueError: scale is a negative number.
    """
    if not isinstance(scale, Tensor):
        if scale < 0:
            raise ValueError(f"guidance is counted from 1 (1 = none, larger is stronger); got {scale}.")
        if scale == 1:
            return denoiser
    return Guided(denoiser, scale, interval)
