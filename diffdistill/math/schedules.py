"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with eps ~ N(0, I) and t growing with noise.

Every function takes times of any shape and returns float64 tensors of that shape; `expand` is the one place where a
coefficient of shape (B,) meets an image. Two schedules describe the same process up to scale at equal
lambda = log(alpha / sigma); see `change_coordinates`.
Source: Kingma et al. 2021 (arXiv:2107.00630) Eq. 1; Karras et al. 2022 (arXiv:2206.00364) Table 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The scales of signal and noise at one time per sample: alpha and sigma, float64, (B,)."""

    alpha: Tensor
    sigma: Tensor

    @property
    def noise_to_signal(self) -> Tensor:
        """Return sigma / alpha, the noise level in the variance-exploding view, (B,)."""
        return self.sigma / self.alpha


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Return a per-sample coefficient (B,) as (B, 1, ..., 1) in the dtype promote(float32, like.dtype).

    Raises:
        ValueError: the coefficient is not of shape (B,), B = like.shape[0]. A (B, W) tensor would broadcast along the
            width without a sound, so shapes are never guessed.
    """
    if coefficient.shape != like.shape[:1]:
        raise ValueError(
            f"a per-sample coefficient must have shape ({like.shape[0]},); got {tuple(coefficient.shape)} "
            f"for samples of shape {tuple(like.shape)}. Write coefficient.expand(batch_size)."
        )
    dtype = torch.promote_types(torch.float32, like.dtype)
    return coefficient.to(device=like.device, dtype=dtype).reshape(-1, *[1] * (like.ndim - 1))


class Schedule(ABC):
    """A Gaussian path. Times, coefficients and lambda are float64; `t_clean` is where sigma is 0, `t_max` the noisiest time."""

    t_clean: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal scale alpha(t)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise scale sigma(t) >= 0."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return d alpha / d t."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return d sigma / d t."""

    @abstractmethod
    def time_of_lambda(self, lam: Tensor) -> Tensor:
        """Return the t at which log(alpha / sigma) = lam, clipped to [t_clean, t_max]."""

    def lambda_(self, t: Tensor) -> Tensor:
        """Return lambda(t) = log(alpha(t) / sigma(t)), half the log-SNR; +inf where sigma = 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return (alpha(t), sigma(t))."""
        return Coefficients(self.alpha(t), self.sigma(t))


class _OnDevices:
    """A table and its copies on devices; kept, since a copy in every call would make the host wait for the device."""

    def __init__(self, table: Tensor) -> None:
        self._copies = {table.device: table}

    def on(self, device: torch.device) -> Tensor:
        """Return the table on a device."""
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


class VPSchedule(Schedule):
    """Variance preserving, from the cumulative products of a diffusers beta schedule, continued between the integers.

    Times are the integers 0..T-1 of the training schedule, continued by linear interpolation of log abar; t = -1 is the
    clean end (abar = 1), where DDIM with `set_alpha_to_one=True` lands. alpha = sqrt(abar), sigma = sqrt(1 - abar).
    Source: DDPM (arXiv:2006.11239); the continuation is that of DPM-Solver's discrete schedule (arXiv:2206.00927, B.2).
    """

    t_clean = -1.0

    def __init__(self, alphas_cumprod: Tensor) -> None:
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        if abar.ndim != 1 or abar.numel() < 2 or not bool(((abar > 0) & (abar < 1)).all()) or bool((abar.diff() >= 0).any()):
            raise ValueError(
                "alphas_cumprod must be (T,), strictly decreasing and inside (0, 1); zero terminal SNR is "
                "not supported: use a schedule without rescale_betas_zero_snr."
            )
        self.alphas_cumprod = abar
        self.num_timesteps = abar.numel()
        self.t_max = float(self.num_timesteps - 1)
        log_abar = torch.cat([torch.zeros(1, dtype=torch.float64), abar.log()])
        self._table = _OnDevices(log_abar)  # index k + 1 holds time k
        self._intervals = _OnDevices(torch.stack([log_abar[:-1], log_abar.diff()], dim=1))  # left end and slope of each

    def _knots(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return position inside the interval, log abar at its left end and its slope, for times in [-1, T-1]."""
        place = (t.to(torch.float64) + 1).clamp(0, self.num_timesteps)
        index = place.long().clamp(max=self.num_timesteps - 1)
        left, slope = self._intervals.on(t.device)[index].unbind(-1)
        return place - index, left, slope

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        offset, left, slope = self._knots(t)
        return torch.addcmul(left, offset, slope)

    def alpha(self, t: Tensor) -> Tensor:
        """Return sqrt(abar(t))."""
        return (0.5 * self._log_alpha_bar(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - abar(t)), without cancellation near the clean end."""
        return (-torch.expm1(self._log_alpha_bar(t))).sqrt()

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return (alpha(t), sigma(t)), from one look into the table: every network call asks for both."""
        log_abar = self._log_alpha_bar(t)
        return Coefficients((0.5 * log_abar).exp(), (-torch.expm1(log_abar)).sqrt())

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return alpha * (d log abar / d t) / 2; piecewise, the right derivative at an integer."""
        return 0.5 * self._knots(t)[2] * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return -alpha * alpha_dot / sigma, from alpha^2 + sigma^2 = 1; infinite at the clean end."""
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def time_of_lambda(self, lam: Tensor) -> Tensor:
        """Return t with log(alpha/sigma) = lam: log abar = -log(1 + exp(-2 lam)), found in the table; clipped to [-1, T-1]."""
        log_abar = torch.nn.functional.logsigmoid(2 * lam.to(torch.float64))  # softplus turns linear at 20: off by 2e-9
        table = self._table.on(lam.device)
        index = torch.searchsorted(-table, -log_abar.contiguous()).clamp(1, self.num_timesteps)  # table decreases
        left, right = table[index - 1], table[index]
        return ((index - 1) + (log_abar - left) / (right - left) - 1).clamp(-1, self.t_max)


class EDMSchedule(Schedule):
    """Variance exploding in Karras' form: alpha = 1, sigma = t. Source: EDM (arXiv:2206.00364), Table 1."""

    t_clean = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(f"need 0 <= sigma_min < sigma_max; got {sigma_min} and {sigma_max}.")
        self.sigma_min, self.t_max = sigma_min, float(sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """Return t."""
        return t.to(torch.float64)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(t, dtype=torch.float64)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t, dtype=torch.float64)

    def time_of_lambda(self, lam: Tensor) -> Tensor:
        """Return exp(-lam), at most sigma_max."""
        return (-lam.to(torch.float64)).exp().clamp(max=self.t_max)


class RectifiedFlowSchedule(Schedule):
    """Straight paths: alpha = 1 - s, sigma = s with s = shift t / (1 + (shift - 1) t), t in [0, 1].

    shift > 1 spends more of t at high noise. Source: rectified flow (arXiv:2209.03003); shift: SD3 (arXiv:2403.03206), Eq. 23.
    """

    t_clean = 0.0
    t_max = 1.0

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive; got {shift}. Write 1.0 for none.")
        self.shift = float(shift)

    def sigma(self, t: Tensor) -> Tensor:
        """Return shift t / (1 + (shift - 1) t)."""
        t = t.to(torch.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - sigma = (1 - t) / (1 + (shift - 1) t), without cancellation near pure noise."""
        t = t.to(torch.float64)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return shift / (1 + (shift - 1) t)^2."""
        return self.shift / (1 + (self.shift - 1) * t.to(torch.float64)) ** 2

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -sigma_dot."""
        return -self.sigma_dot(t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """Return t with sigma(t) = sigma: the inverse of the shift."""
        sigma = sigma.to(torch.float64)
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def time_of_lambda(self, lam: Tensor) -> Tensor:
        """Return the time of sigma = 1 / (1 + exp(lam))."""
        return self.time_of_sigma(torch.sigmoid(-lam.to(torch.float64))).clamp(0, 1)


class TrigFlowSchedule(Schedule):
    """Spherical path of sCM: alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2]. Source: arXiv:2410.11081, Sec. 3."""

    t_clean = 0.0
    t_max = math.pi / 2

    def __init__(self, sigma_data: float = 1.0) -> None:
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive; got {sigma_data}.")
        self.sigma_data = float(sigma_data)

    def alpha(self, t: Tensor) -> Tensor:
        """Return cos t."""
        return t.to(torch.float64).cos()

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma_data sin t."""
        return self.sigma_data * t.to(torch.float64).sin()

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -sin t."""
        return -t.to(torch.float64).sin()

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return sigma_data cos t."""
        return self.sigma_data * t.to(torch.float64).cos()

    def time_of_lambda(self, lam: Tensor) -> Tensor:
        """Return arctan(exp(-lam) / sigma_data)."""
        return torch.atan((-lam.to(torch.float64)).exp() / self.sigma_data)


def change_coordinates(x: Tensor, t: Tensor, source: Schedule, target: Schedule) -> tuple[Tensor, Tensor]:
    """Carry a state to the same point of another Gaussian path: x' = x alpha'(t') / alpha(t) with lambda'(t') = lambda(t).

    Args:
        x: state on `source`, (B, ...).
        t: its time on `source`, (B,), float64.
    Returns:
        (x', t') on `target`; x' has the shape and dtype of x, t' is (B,) float64. At the clean end (lambda = inf) t' is
        target.t_clean. Noise beyond the target's range is taken as its t_max, with x' scaled by sigma'(t') / sigma(t):
        the spread that the target's network knows, but no longer an exact change of coordinates.
    """
    t_target = target.time_of_lambda(source.lambda_(t))
    a, b = source.coefficients(t), target.coefficients(t_target)
    # Both ratios are the same number; near pure noise alpha may be 0, near the clean end sigma is.
    scale = torch.where(a.alpha > a.sigma, b.alpha / a.alpha, b.sigma / a.sigma)
    return (expand(scale, x) * x).to(x.dtype), t_target


def schedule_from_diffusers(scheduler: Any, num_tokens: int | None = None) -> Schedule:
    """Read the training schedule out of any diffusers scheduler: its betas, or its flow shift, or Karras' sigma range.

    Args:
        scheduler: a diffusers scheduler.
        num_tokens: image tokens of one state, for a shift that depends on the image size (`use_dynamic_shifting`); None reads
            such a path without a shift.
    Raises:
        ValueError: the scheduler has none of these.
    """
    config = scheduler.config
    if "flow" in type(scheduler).__name__.lower() or getattr(config, "prediction_type", "") == "flow_prediction":
        if getattr(config, "use_dynamic_shifting", False):
            return RectifiedFlowSchedule(1.0 if num_tokens is None else _dynamic_shift(config, num_tokens))
        return RectifiedFlowSchedule(getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0)
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return VPSchedule(scheduler.alphas_cumprod)
    if getattr(config, "sigma_max", None) is not None:
        return EDMSchedule(config.sigma_min, config.sigma_max)
    raise ValueError(
        f"{type(scheduler).__name__} has no betas, flow shift or sigma range to read a schedule from. "
        "Use a folder whose scheduler is a DDPM/DDIM, FlowMatchEuler or EDM scheduler."
    )


def _dynamic_shift(config: Any, num_tokens: int) -> float:
    """Return the shift of an image of `num_tokens`: exp(mu) or mu, with mu linear in the tokens between two given points."""
    low, high = config.base_image_seq_len, config.max_image_seq_len
    mu = config.base_shift + (config.max_shift - config.base_shift) * (num_tokens - low) / (high - low)
    return math.exp(mu) if getattr(config, "time_shift_type", "exponential") == "exponential" else mu
