"""Where a method's states and times come from: noised data at a share of the noising process, intervals of a grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.distillers.base import Rng
from diffdistill.math import transfer, weighting
from diffdistill.math.grids import TimeGrid
from diffdistill.math.schedules import EDMSchedule, Schedule


class Noised(NamedTuple):
    """States carried to a noise level: x_t (B, ...) at t (B,)."""

    x_t: Tensor
    t: Tensor


class Jump(NamedTuple):
    """Neighbouring times t > r of a batch, (B,) each."""

    t: Tensor
    r: Tensor


def diffusion_time(schedule: Schedule, u: Tensor) -> Tensor:
    """Return the time of a share u in [0, 1] of the noising process, (B,) float64.

    VP: from timestep 0 to T-1, the integers of the papers continued; flow and Trig: linear in t, for a shifted flow the
    time before the shift, so that the shift acts on the law; EDM: Karras' ramp with rho = 7, whose 1000 points DMD2
    indexes uniformly.
    """
    if isinstance(schedule, EDMSchedule):
        low, high = schedule.sigma_min ** (1 / 7), schedule.t_max ** (1 / 7)
        return (low + u * (high - low)) ** 7
    first = max(schedule.t_clean, 0.0)  # VP networks never saw times below 0
    return first + u * (schedule.t_max - first)


def share_of(schedule: Schedule, t: Tensor) -> Tensor:
    """Return the share u in [0, 1] of the noising process at times t: the inverse of `diffusion_time`."""
    if isinstance(schedule, EDMSchedule):
        low, high = schedule.sigma_min ** (1 / 7), schedule.t_max ** (1 / 7)
        return ((t ** (1 / 7) - low) / (high - low)).clamp(0, 1)
    first = max(schedule.t_clean, 0.0)
    return ((t - first) / (schedule.t_max - first)).clamp(0, 1)


def noised(x0: Tensor, schedule: Schedule, rng: Rng, low: float = 0.0, high: float = 1.0) -> Noised:
    """Carry clean states to times whose share of the process is uniform in [low, high); noise is fresh."""
    t = diffusion_time(schedule, rng.uniform(len(x0), low, high))
    eps = rng.normal(x0.shape).to(x0.dtype)
    return Noised(transfer.add_noise(x0, eps, schedule.coefficients(t)), t)


def draw_interval(grid: TimeGrid, size: int, rng: Rng, lognormal: tuple[float, float] | None = None) -> Jump:
    """Draw one interval of the grid for every sample, uniformly or with ln(sigma / alpha) normal (mean, std)."""
    times = grid.times_on(rng.local.device)
    if lognormal is None:
        i = rng.integers(size, grid.num_steps)
    else:
        levels = grid.schedule.coefficients(times).noise_to_signal
        mass = weighting.lognormal_interval_probabilities(levels, *lognormal)
        i = torch.multinomial(mass, size, replacement=True, generator=rng.local)
    return Jump(times[i], times[i + 1])
