"""Weights on squared errors in x0 space, laws of noise levels, and the curricula of consistency training.

A weight is a function of (alpha, sigma), both (B,), and returns float64 (B,): a loss on another output type is the x0
loss times its weight, since all types are affine in each other at fixed (x_t, t).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdistill.math.prediction import KINDS


def uniform(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return 1: plain error in x0."""
    return torch.ones_like(alpha, dtype=torch.float64)


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return alpha^2 / sigma^2: plain error in eps."""
    return (alpha.double() / sigma.double()) ** 2


def alpha_epsilon(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return alpha^4 / sigma^2: the error in eps times alpha^2. Source: SwiftBrush (arXiv:2312.05239), released code."""
    return alpha.double() ** 2 * snr(alpha, sigma)


def truncated_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return max(alpha^2 / sigma^2, 1): the larger of the errors in eps and x0. Source: arXiv:2202.00512, Sec. 4."""
    return snr(alpha, sigma).clamp(min=1)


def snr_plus_one(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return alpha^2 / sigma^2 + 1: for variance-preserving paths, plain error in v. Source: arXiv:2202.00512, Sec. 4."""
    return snr(alpha, sigma) + 1


def v(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return (alpha^2 + sigma^2)^2 / sigma^2: plain error in v on any path; snr + 1 where alpha^2 + sigma^2 = 1."""
    a, s = alpha.double(), sigma.double()
    return ((a**2 + s**2) / s) ** 2


def flow(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return (alpha + sigma)^2 / sigma^2: plain error in eps - x0 on any path; 1 / sigma^2 for straight ones."""
    a, s = alpha.double(), sigma.double()
    return ((a + s) / s) ** 2


def edm(alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Return (u^2 + sigma_data^2) / (u sigma_data)^2 with u = sigma / alpha. Source: EDM (arXiv:2206.00364), Table 1."""
    level = sigma.double() / alpha.double()
    return (level**2 + sigma_data**2) / (level * sigma_data) ** 2


_OF_KIND = {"epsilon": snr, "sample": uniform, "v_prediction": v, "flow_prediction": flow}


def of_kind(kind: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the weight that turns an x0 error into the plain error of a network's own output type, (B,), float64."""
    if kind not in _OF_KIND:
        raise ValueError(f"unknown prediction type {kind!r}; known: {', '.join(KINDS)}.")
    return _OF_KIND[kind](alpha, sigma)


# Consistency training: pairs (t, r) -----------------------------------------------------------------------------------


def inverse_gap(t: Tensor, r: Tensor) -> Tensor:
    """Return 1 / (t - r), (B,), of noise levels t > r. Source: iCT (arXiv:2310.14189), Sec. 3.1; ECT (arXiv:2406.14548)."""
    return 1 / (t.double() - r.double())


def lognormal_interval_probabilities(levels: Tensor, p_mean: float = -1.1, p_std: float = 2.0) -> Tensor:
    """Return the probability of each interval of a noise grid when ln(level) is normal, restricted to the grid.

    p(i) is proportional to erf((ln t_{i+1} - P_mean) / (sqrt2 P_std)) - erf((ln t_i - P_mean) / (sqrt2 P_std)).

    Args:
        levels: (N,), positive and monotone, in either direction.
    Returns:
        (N - 1,), float64, summing to one; entry i belongs to the interval between levels[i] and levels[i + 1].
    Source: iCT (arXiv:2310.14189), Sec. 3.5.
    """
    cumulative = torch.erf((levels.double().log() - p_mean) / (math.sqrt(2) * p_std))
    mass = cumulative.diff()
    return mass / mass.sum()


def ct_num_intervals(step: int, total_steps: int, s0: int = 2, s1: int = 150) -> int:
    """Return N'(k) = max(1, ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1)): intervals of the grid at step k of K.

    The grid has N' + 1 points. Source: consistency models (arXiv:2303.01469), App. C, as in the released code.
    """
    return max(1, math.ceil(math.sqrt(step / total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1))


def ct_ema_decay(step: int, total_steps: int, s0: int = 2, s1: int = 150, mu0: float = 0.9) -> float:
    """Return the target network's decay mu(k) = exp(s0 ln(mu0) / N'(k)).

    The paper divides by the number of points, the released code by the number of intervals N'; this is the code's.
    Source: consistency models (arXiv:2303.01469), App. C.
    """
    return math.exp(s0 * math.log(mu0) / ct_num_intervals(step, total_steps, s0, s1))


def ict_num_points(step: int, total_steps: int, s0: int = 10, s1: int = 1280) -> int:
    """Return N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2(floor(s1 / s0)) + 1)): points of the grid.

    Source: iCT (arXiv:2310.14189), Sec. 3.4. K' is at least 1, so that short runs are defined.
    """
    stage_steps = max(1, math.floor(total_steps / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // stage_steps), s1) + 1


def ect_next_level(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return r = max(0, t (1 - q^-(stage+1) (1 + k sigmoid(-b t)))): the cleaner level of ECT's pair, (B,), float64.

    stage counts from 0; r = 0 (denoising) while the bracket is negative.
    Source: ECT (arXiv:2406.14548), released code.
    """
    t = t.double()
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)
