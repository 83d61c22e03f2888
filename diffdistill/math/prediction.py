"""What a network emits, and what it means: x0, eps, v, flow, score, velocity, converted in one place.

With x_t = alpha x0 + sigma eps every form is affine in every other at fixed (x_t, alpha, sigma):

    epsilon          eps
    sample           x0
    v_prediction     v = alpha eps - sigma x0           (Salimans & Ho 2022, arXiv:2202.00512, App. D)
    flow_prediction  u = eps - x0                       (rectified flow, arXiv:2209.03003)

Conversions run in promote(float32, dtype), also under autocast: near pure noise 1/alpha magnifies rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffdistill.math.schedules import Coefficients, expand

Kind = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
KINDS: tuple[str, ...] = get_args(Kind)


class _Form(NamedTuple):
    """x0 and eps from (raw, x_t, alpha, sigma), and raw from (x0, eps, alpha, sigma)."""

    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    eps: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    raw: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# v is solved for a general (alpha, sigma), not only alpha^2 + sigma^2 = 1.
_FORMS: dict[str, _Form] = {
    "epsilon": _Form(
        x0=lambda raw, x, a, s: (x - s * raw) / a,
        eps=lambda raw, x, a, s: raw,
        raw=lambda x0, eps, a, s: eps,
    ),
    "sample": _Form(
        x0=lambda raw, x, a, s: raw,
        eps=lambda raw, x, a, s: (x - a * raw) / s,
        raw=lambda x0, eps, a, s: x0,
    ),
    "v_prediction": _Form(
        x0=lambda raw, x, a, s: (a * x - s * raw) / (a * a + s * s),
        eps=lambda raw, x, a, s: (s * x + a * raw) / (a * a + s * s),
        raw=lambda x0, eps, a, s: a * eps - s * x0,
    ),
    "flow_prediction": _Form(
        x0=lambda raw, x, a, s: (x - s * raw) / (a + s),
        eps=lambda raw, x, a, s: (x + a * raw) / (a + s),
        raw=lambda x0, eps, a, s: eps - x0,
    ),
}


def _form(kind: str) -> _Form:
    if kind not in _FORMS:
        raise ValueError(f"unknown prediction type {kind!r}; known: {', '.join(KINDS)}.")
    return _FORMS[kind]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def to_x0(kind: str, raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean sample that the output `raw` stands for.

    Args:
        kind: one of KINDS.
        raw, x_t: network output and its input, (B, ...), any floating dtype.
        alpha, sigma: scales at t, (B,).
    Returns:
        x0: (B, ...), float32 or wider.
    Raises:
        ValueError: unknown kind, or alpha or sigma not of shape (B,).
    """
    x_t = _wide(x_t)
    return _form(kind).x0(_wide(raw), x_t, expand(alpha, x_t), expand(sigma, x_t))


def to_eps(kind: str, raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise that the output `raw` stands for; arguments as in `to_x0`. Infinite for "sample" where sigma = 0."""
    x_t = _wide(x_t)
    return _form(kind).eps(_wide(raw), x_t, expand(alpha, x_t), expand(sigma, x_t))


def from_x0(kind: str, x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the output of type `kind` that stands for the clean sample x0 at x_t: the inverse of `to_x0`.

    Not defined at sigma = 0 (NaN or infinite) but for "sample"; where eps is known as well, use `from_x0_eps`.
    """
    x_t, x0 = _wide(x_t), _wide(x0)
    if kind == "sample":
        return x0
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    return _form(kind).raw(x0, (x_t - a * x0) / s, a, s)


def from_x0_eps(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the output of type `kind` that stands for x0 and eps, (B, ...): defined at every time."""
    x0, eps = _wide(x0), _wide(eps)
    return _form(kind).raw(x0, eps, expand(alpha, x0), expand(sigma, x0))


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says about x_t, readable in every form of the field.

    Attributes:
        kind: the type of `raw`, one of KINDS.
        raw: network output, (B, ...).
        x_t: the state it was asked about, (B, ...).
        alpha, sigma: scales at its time, (B,), float64.
    """

    kind: str
    raw: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def point(self) -> Coefficients:
        """The scales at its time."""
        return Coefficients(self.alpha, self.sigma)

    @cached_property
    def x0(self) -> Tensor:
        """The denoised sample E[x0 | x_t], (B, ...), float32 or wider."""
        return to_x0(self.kind, self.raw, self.x_t, self.alpha, self.sigma)

    @cached_property
    def eps(self) -> Tensor:
        """The noise E[eps | x_t]."""
        return to_eps(self.kind, self.raw, self.x_t, self.alpha, self.sigma)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return self.as_kind("v_prediction")

    @property
    def flow(self) -> Tensor:
        """eps - x0."""
        return self.as_kind("flow_prediction")

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2 = -eps / sigma."""
        return -self.eps / expand(self.sigma, self.eps)

    def velocity(self, alpha_dot: Tensor, sigma_dot: Tensor) -> Tensor:
        """Return dx/dt of the probability-flow ODE: alpha_dot x0 + sigma_dot eps, with (B,) derivatives."""
        return expand(alpha_dot, self.x0) * self.x0 + expand(sigma_dot, self.eps) * self.eps

    def as_kind(self, kind: str) -> Tensor:
        """Return the same statement in another output type, (B, ...), float32 or wider."""
        if kind == self.kind:
            return _wide(self.raw)
        return from_x0_eps(kind, self.x0, self.eps, self.alpha, self.sigma)


class Preconditioning(NamedTuple):
    """EDM's scalings: D(x) = c_skip x + c_out F(c_in x; c_noise), each (B,), float64."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_preconditioning(sigma: Tensor, sigma_data: float = 0.5) -> Preconditioning:
    """Return EDM's scalings at noise level sigma, (B,). Source: arXiv:2206.00364, Table 1; c_noise = ln(sigma) / 4."""
    sigma = sigma.to(torch.float64)
    variance = sigma**2 + sigma_data**2
    return Preconditioning(sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), variance.rsqrt(), sigma.log() / 4)


def consistency_preconditioning(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Preconditioning:
    """Return the scalings of consistency models at noise level sigma, (B,): the identity at sigma = sigma_min.

    Source: arXiv:2303.01469, App. C; c_noise = 250 ln(sigma + 1e-44) as in the released code.
    """
    sigma = sigma.to(torch.float64)
    variance, gap = sigma**2 + sigma_data**2, sigma - sigma_min
    return Preconditioning(
        sigma_data**2 / (gap**2 + sigma_data**2),
        sigma_data * gap / variance.sqrt(),
        variance.rsqrt(),
        250 * (sigma + 1e-44).log(),
    )


def lcm_boundary(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return LCM's (c_skip, c_out) of f = c_skip x_t + c_out x0 at timestep t, each (B,), float64; the identity at t = 0.

    c_skip = sigma_data^2 / (t'^2 + sigma_data^2), c_out = t' / sqrt(t'^2 + sigma_data^2) with t' = timestep_scaling t;
    unlike in the consistency model there is no sigma_data in c_out.
    Source: LCM (arXiv:2310.04378), Eq. 9, and diffusers' LCMScheduler.
    """
    scaled = timestep_scaling * t.to(torch.float64)
    variance = scaled**2 + sigma_data**2
    return sigma_data**2 / variance, scaled / variance.sqrt()
