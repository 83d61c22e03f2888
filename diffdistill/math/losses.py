"""Distances, gradient rules and targets: tensors in, one value per sample (B,) out; the caller weighs and averages.

Everything is computed in promote(float32, dtype). A distance reduces over all dimensions but the first; the mean over the
batch is the caller's, so that a per-sample weight can stand in between: `(weight * l2(y, z)).mean()`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffdistill.math.schedules import Schedule, expand
from diffdistill.math.transfer import Denoise, ddim, inverse_ddim


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def per_sample(x: Tensor) -> Tensor:
    """Return the mean over every dimension but the first, (B,)."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def _difference(y: Tensor, z: Tensor) -> Tensor:
    if y.shape != z.shape:
        raise ValueError(f"a distance needs equal shapes; got {tuple(y.shape)} and {tuple(z.shape)}.")
    return _wide(y) - _wide(z)


def _safe_sqrt(x: Tensor) -> Tensor:
    """Return sqrt(x) with derivative 0 (not infinite) at x = 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


# Distances ------------------------------------------------------------------------------------------------------------


def l2(y: Tensor, z: Tensor) -> Tensor:
    """Return the mean of squares, mean (y - z)^2, (B,)."""
    return per_sample(_difference(y, z) ** 2)


def l1(y: Tensor, z: Tensor) -> Tensor:
    """Return the mean of absolute values, mean |y - z|, (B,)."""
    return per_sample(_difference(y, z).abs())


def pseudo_huber_elementwise(y: Tensor, z: Tensor, c: float = 0.001) -> Tensor:
    """Return mean( sqrt((y - z)^2 + c^2) - c ), (B,): saturates per pixel. c = 0 gives l1.

    Source: LCM (arXiv:2310.04378), released training scripts, c = 0.001.
    """
    return per_sample(_safe_sqrt(_difference(y, z) ** 2 + c**2) - c)


def pseudo_huber_vector(y: Tensor, z: Tensor, c: float) -> Tensor:
    """Return sqrt(||y - z||^2 + c^2) - c, (B,): normalises the whole sample's gradient. c = 0 gives the unsquared norm.

    The gradient at y = z is 0 for every c.
    Source: iCT (arXiv:2310.14189), Sec. 3.3; c = 0 in ECT (arXiv:2406.14548).
    """
    square = (_difference(y, z) ** 2).flatten(1).sum(1)
    return _safe_sqrt(square + c**2) - c


def ict_huber_constant(dim: int) -> float:
    """Return iCT's c = 0.00054 sqrt(dim), dim = channels * height * width. Source: arXiv:2310.14189, Sec. 3.3."""
    return 0.00054 * math.sqrt(dim)


# Gradient rules of distribution matching ------------------------------------------------------------------------------


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """Return 0.5 mean (x - sg(x - g))^2, (B,), whose mean over the batch has the derivative g / numel(x), exactly.

    Written as x - sg(x) + g, which is the same function without the rounding of x - (x - g).
    Args:
        x: where the gradient enters, (B, ...), with graph.
        gradient: g, (B, ...); no gradient flows into it.
    Source: DMD2 (arXiv:2405.14867), released code.
    """
    x = _wide(x)
    return 0.5 * per_sample((_difference(x, x.detach()) + gradient.detach()) ** 2)


Normaliser = Literal["abs_mean", "none"]


@torch.no_grad()
def dmd_gradient(
    x_g: Tensor, *, x0_real: Tensor, x0_fake: Tensor, normaliser: Normaliser = "abs_mean", factor: Tensor | None = None
) -> Tensor:
    """Return DMD's gradient at the clean sample: g = factor (D_fake - D_real) / mean|x_g - D_real|, without graph.

    Args:
        x_g: the student's clean output, (B, ...); not the noisy state.
        x0_real, x0_fake: denoised estimates of teacher and fake score at the same noisy state, (B, ...). By name only:
            exchanged they would turn the gradient round without a sound.
        normaliser: "abs_mean" divides by the mean over all dimensions but the first; "none" does not.
        factor: (B,), alpha_t in DMD (arXiv:2311.18828, Eq. 7-8), none in DMD2; sigma-weights of other methods.
    Returns:
        g: (B, ...), float64. Values that are not finite become 0 and so teach nothing.
    Source: DMD2 (arXiv:2405.14867), released code (which maps infinities to the largest float instead).
    """
    x_g, x0_real, x0_fake = x_g.double(), x0_real.double(), x0_fake.double()
    gradient = x0_fake - x0_real
    if normaliser == "abs_mean":
        gradient = gradient / expand(per_sample((x_g - x0_real).abs()), gradient)
    elif normaliser != "none":
        raise ValueError(f"normaliser must be 'abs_mean' or 'none'; got {normaliser!r}.")
    if factor is not None:
        gradient = expand(factor, gradient) * gradient
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def fake_score_loss(x0_fake: Tensor, x_g: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return W mean (D_fake(x_t) - sg(x_g))^2, (B,): the fake score is a denoiser of the student's own samples.

    Args:
        x0_fake: denoised estimate at x_t = alpha sg(x_g) + sigma eps, (B, ...), with graph.
        x_g: the student's clean output; no gradient flows into it.
        weight: W in x0 space, (B,), see `weighting`; None is 1.
    """
    loss = l2(x0_fake, x_g.detach())
    return loss if weight is None else weight.to(loss.dtype) * loss


# Adversarial losses on logits (larger: more real) ---------------------------------------------------------------------


def generator_gan_loss(fake_logits: Tensor) -> Tensor:
    """Return softplus(-l(x_g)), (B,), averaged over a sample's logits (non-saturating). Source: DMD2 (arXiv:2405.14867)."""
    return per_sample(softplus(-_wide(fake_logits)))


def discriminator_gan_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return softplus(l(x_g)) + softplus(-l(x_real)), (B,); both of the same batch size. 2 log 2 for a blind discriminator."""
    return per_sample(softplus(_wide(fake_logits))) + per_sample(softplus(-_wide(real_logits)))


# Targets --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def progressive_target(denoise: Denoise, x_t: Tensor, t: Tensor, mid: Tensor, r: Tensor, schedule: Schedule) -> Tensor:
    """Return the x0 from which one DDIM step t -> r lands where two teacher steps t -> mid -> r land, without graph.

    Where r is the clean end this is the teacher's own estimate at mid, which the inverse equals only up to rounding.

    Args:
        denoise: the teacher, (x, t) -> x0.
        x_t: states at t, (B, ...).
        t, mid, r: times, (B,), t > mid > r.
    Returns:
        target: (B, ...), float32 or wider.
    Source: progressive distillation (arXiv:2202.00512), Algorithm 2 and App. G.
    """
    at, am, ar = schedule.coefficients(t), schedule.coefficients(mid), schedule.coefficients(r)
    x_mid = ddim(x_t, denoise(x_t, t), at, am)
    x0_mid = denoise(x_mid, mid)
    inverse = inverse_ddim(ddim(x_mid, x0_mid, am, ar), x_t, at, ar)
    return torch.where(expand(ar.sigma, inverse) > 0, inverse, x0_mid)
