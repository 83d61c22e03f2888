"""Steps from one time to another: one implementation on (alpha, sigma) pairs serves every schedule.

A point is `Coefficients(alpha, sigma)` with (B,) entries; t is noisier than r. In the variables xbar = x / alpha and
u = sigma / alpha the probability-flow ODE is d xbar / d u = eps(x), so DDIM is its Euler step and Heun its trapezoid,
whatever the schedule. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.math.schedules import Coefficients, Schedule, expand

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> x0, with t of shape (B,)."""


def add_noise(x0: Tensor, eps: Tensor, point: Coefficients) -> Tensor:
    """Carry clean samples to a noise level: x_t = alpha x0 + sigma eps.

    Args:
        x0, eps: clean samples and standard normal noise, (B, ...), equal shape.
        point: scales at t, (B,).
    Returns:
        x_t: (B, ...), float32 or wider.
    Source: arXiv:2107.00630, Eq. 1.
    """
    return expand(point.alpha, x0) * x0 + expand(point.sigma, x0) * eps


def renoise(x_r: Tensor, noise: Tensor, r: Coefficients, q: Coefficients) -> Tensor:
    """Forward kernel from r up to q > r: x_q = (a_q/a_r) x_r + sqrt(s_q^2 - (a_q/a_r)^2 s_r^2) z; keeps the marginals.

    The variance is clamped at 0, so that q = r gives x_r back also where rounding puts q below r.
    """
    scale = q.alpha / r.alpha
    variance = (q.sigma**2 - (scale * r.sigma) ** 2).clamp(min=0)
    return expand(scale, x_r) * x_r + expand(variance.sqrt(), x_r) * noise


def ddim(x_t: Tensor, x0: Tensor, t: Coefficients, r: Coefficients) -> Tensor:
    """Deterministic jump: x_r = a_r x0 + (s_r / s_t)(x_t - a_t x0). The identity at r = t, whatever x0.

    Args:
        x_t, x0: state at t and its denoised estimate, (B, ...).
        t, r: scales, (B,); sigma at t positive, alpha at t may be 0.
    Source: DDIM (arXiv:2010.02502), Eq. 12 without noise, for general (alpha, sigma).
    """
    ratio = r.sigma / t.sigma
    return expand(r.alpha - ratio * t.alpha, x_t) * x0 + expand(ratio, x_t) * x_t


def inverse_ddim(x_r: Tensor, x_t: Tensor, t: Coefficients, r: Coefficients) -> Tensor:
    """Return the x0 for which `ddim` takes x_t to x_r: (x_r - (s_r/s_t) x_t) / (a_r - (s_r/s_t) a_t).

    Source: progressive distillation (arXiv:2202.00512), App. G, Eq. 43. Ill-conditioned as r -> t.
    """
    ratio = r.sigma / t.sigma
    return (x_r - expand(ratio, x_t) * x_t) / expand(r.alpha - ratio * t.alpha, x_t)


def ddim_eta(x_t: Tensor, x0: Tensor, noise: Tensor, t: Coefficients, r: Coefficients, eta: float) -> Tensor:
    """Stochastic DDIM step with diffusers' eta: 0 is `ddim`, 1 samples the posterior of x_r given x_t and x0 (DDPM).

    x_r = a_r x0 + sqrt(s_r^2 - std^2) (x_t - a_t x0) / s_t + std z,
    std = eta (s_r / s_t) sqrt(s_t^2 - (a_t / a_r)^2 s_r^2).

    Args:
        x_t, x0: state at t and its denoised estimate, (B, ...).
        noise: z, standard normal, (B, ...).
        t, r: scales, (B,); sigma at t positive.
        eta: in [0, 1].
    Source: DDIM (arXiv:2010.02502), Eq. 12 and 16, for general (alpha, sigma).
    """
    kernel = (t.sigma**2 - (t.alpha / r.alpha * r.sigma) ** 2).clamp(min=0)  # variance of the forward kernel r -> t
    std = eta * (r.sigma / t.sigma) * kernel.sqrt()
    direction = (r.sigma**2 - std**2).clamp(min=0).sqrt() / t.sigma
    return expand(r.alpha - direction * t.alpha, x_t) * x0 + expand(direction, x_t) * x_t + expand(std, x_t) * noise


def renoise_x0(x0: Tensor, noise: Tensor, r: Coefficients) -> Tensor:
    """Few-step rule of consistency, LCM and DMD2 students: forget x_t, noise the clean estimate to r."""
    return add_noise(x0, noise, r)


def euler(x_t: Tensor, velocity: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Euler step in the schedule's own time: x_r = x_t + (r - t) dx/dt, with t, r of shape (B,)."""
    return x_t + expand(r - t, x_t) * velocity


def heun(denoise: Denoise, x_t: Tensor, t: Tensor, r: Tensor, schedule: Schedule, x0: Tensor | None = None) -> Tensor:
    """Heun's second-order step of the PF-ODE in (x/alpha, sigma/alpha): x_r = (a_r/a_t) x_t + (s_r - (a_r/a_t) s_t) mean(eps).

    Per sample: where r is the clean end, eps is not defined there and the step is Euler's, as in EDM; where t is pure noise
    (alpha = 0), the variables are infinite and the trapezoid is taken in (x/sigma, alpha/sigma), which is second order too.

    Args:
        denoise: (x, t) -> x0, called once, twice without x0. Samples that land clean ask it at (x_t, t) again: a
            harmless value for a row of the batch that is not used.
        x_t: state, (B, ...).
        t, r: times, (B,), t > r; sigma at t positive.
        x0: denoise(x_t, t) when the caller has it already.
    Source: EDM (arXiv:2206.00364), Algorithm 1, in the variables of the module docstring.
    """
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    x0_t = denoise(x_t, t) if x0 is None else x0
    x_euler = ddim(x_t, x0_t, at, ar)
    lands_clean, pure_noise = ar.sigma <= 0, at.alpha <= 0
    keep = expand(lands_clean, x_euler) > 0

    # Unused branches divide by sigma_t or 1, so that no NaN reaches a gradient.
    x_second = torch.where(keep, x_t, x_euler)
    sigma_second = torch.where(lands_clean, at.sigma, ar.sigma)
    x0_r = denoise(x_second, torch.where(lands_clean, t, r))
    eps_t = (x_t - expand(at.alpha, x_t) * x0_t) / expand(at.sigma, x_t)
    eps_r = (x_second - expand(ar.alpha, x_t) * x0_r) / expand(sigma_second, x_t)
    ratio = ar.alpha / torch.where(pure_noise, torch.ones_like(at.alpha), at.alpha)
    x_heun = expand(ratio, x_t) * x_t + expand(ar.sigma - ratio * at.sigma, x_t) * (eps_t + eps_r) / 2
    x_noise = ddim(x_t, (x0_t + x0_r) / 2, at, ar)
    return torch.where(keep, x_euler, torch.where(expand(pure_noise, x_heun) > 0, x_noise, x_heun))


def dpmpp_2m(
    x_t: Tensor, x0: Tensor, x0_previous: Tensor | None, t: Coefficients, r: Coefficients, previous: Coefficients | None
) -> Tensor:
    """DPM-Solver++(2M): second-order multistep on x0; first order without a previous estimate or where sigma_r = 0.

    With h = lambda_r - lambda_t and h0 = lambda_t - lambda_previous:
    x_r = (s_r/s_t) x_t - a_r (e^-h - 1) [x0 + (h / 2 h0)(x0 - x0_previous)].

    Args:
        x_t, x0: state at t and its denoised estimate, (B, ...).
        x0_previous, previous: the estimate one step earlier, and the scales at its time; None on the first step.
        t, r: scales, (B,).
    Source: arXiv:2211.01095, Algorithm 2.
    """
    if x0_previous is None or previous is None:
        return ddim(x_t, x0, t, r)
    lam_previous, lam_t, lam_r = (c.alpha.log() - c.sigma.log() for c in (previous, t, r))
    ratio = torch.where(r.sigma > 0, (lam_r - lam_t) / (2 * (lam_t - lam_previous)), torch.zeros_like(r.sigma))
    return ddim(x_t, x0 + expand(ratio, x_t) * (x0 - x0_previous), t, r)


def sde(x_t: Tensor, x0: Tensor, noise: Tensor, t: Coefficients, r: Coefficients, eta: float = 1.0) -> Tensor:
    """First-order exponential step of the reverse SDE on x0; 0 is `ddim`, 1 SDE-DPM-Solver++ and the DDPM posterior.

    x_r = a_r x0 + e^{-eta^2 h} (s_r / s_t) (x_t - a_t x0) + s_r sqrt(1 - e^{-2 eta^2 h}) z, with h = lambda_r - lambda_t.
    The exact solution, while x0 is constant, of dx = [f x - (1 + eta^2) g^2 score / 2] dt + eta g dw.

    Args:
        x_t, x0: state at t and its denoised estimate, (B, ...).
        noise: z, standard normal, (B, ...).
        t, r: scales, (B,); sigma at t positive. From pure noise (alpha_t = 0) x_t is forgotten: x_r = a_r x0 + s_r z.
        eta: scale of the noise, any eta >= 0 keeps the marginals.
    Source: arXiv:2211.01095, Sec. 5 (eta = 1); the family in eta: EDM (arXiv:2206.00364), Eq. 6.
    """
    if eta == 0:
        return ddim(x_t, x0, t, r)
    h = (r.alpha.log() - r.sigma.log()) - (t.alpha.log() - t.sigma.log())  # infinite at either end
    direction = r.sigma / t.sigma * torch.exp(-(eta**2) * h)
    std = r.sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt()
    return expand(r.alpha - direction * t.alpha, x_t) * x0 + expand(direction, x_t) * x_t + expand(std, x_t) * noise
