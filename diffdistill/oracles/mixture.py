"""Teachers whose data are a Gaussian mixture or a finite set: exact posterior mean, score and density at every noise level.

Component k has weight w_k, mean m_k and variance c_k (per coordinate). With V_k = alpha^2 c_k + sigma^2 the noisy density
is again a mixture, sum_k w_k N(alpha m_k, V_k); a finite data set is the case c = 0. The flow map has no closed form and
is integrated numerically, see `integrate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.math.prediction import Prediction, from_x0_eps
from diffdistill.math.schedules import Schedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.oracles.gaussian import class_condition, row_of


def integrate(
    field: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    start: Tensor,
    end: Tensor,
    tolerance: float = 1e-9,
    max_steps: int = 2**15,
) -> Tensor:
    """Return the solution at `end` of dy/dphi = field(y, phi), y(start) given, each sample with its own interval.

    The classical Runge-Kutta method of order four on equal steps; the number of steps doubles until Richardson's
    estimate of the error, (difference to the last result) / 15, is below `tolerance` everywhere, and the extrapolated
    result is returned.

    Raises:
        RuntimeError: max_steps are not enough.
    """

    def solve(num_steps: int) -> Tensor:
        h, x = (end - start) / num_steps, y
        width = expand(h, y)
        for i in range(num_steps):
            phi = start + i * h
            k1 = field(x, phi)
            k2 = field(x + width / 2 * k1, phi + h / 2)
            k3 = field(x + width / 2 * k2, phi + h / 2)
            k4 = field(x + width * k3, phi + h)
            x = x + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    num_steps, coarse = 32, solve(16)
    while num_steps <= max_steps:
        fine = solve(num_steps)
        correction = (fine - coarse) / 15
        if float(correction.abs().max()) < tolerance:
            return fine + correction
        num_steps, coarse = 2 * num_steps, fine
    raise RuntimeError(
        f"{max_steps} Runge-Kutta steps do not reach a tolerance of {tolerance}; the field is too stiff. "
        "End at a noisier time or widen the components."
    )


class MixtureTeacher(Denoiser):
    """The exact denoiser of a Gaussian mixture on any schedule, emitting any output type.

    Args of the constructor:
        means: (K, *sample_shape).
        variances: (K,) isotropic, or (K, *sample_shape); 0 allowed, see `DataTeacher`.
        schedule: the path its states live on.
        weights: (K,), positive; None for equal ones. They need not sum to one.
        kind: what it emits, see `math.prediction`.
        classes: (K,) int64, the class of each component: a condition leaves only those of its class, the null condition all.
    Computes in float64 and answers in promote(float32, dtype of x_t).
    """

    def __init__(
        self,
        means: Tensor,
        variances: Tensor,
        schedule: Schedule,
        weights: Tensor | None = None,
        kind: str = "sample",
        classes: Tensor | None = None,
    ) -> None:
        self.schedule, self.kind, self.sample_shape = schedule, kind, tuple(means.shape[1:])
        self._means = means.double().flatten(1)  # (K, D)
        wide = variances.double().reshape(len(means), -1)
        self._variances = wide.expand_as(self._means)  # (K, D)
        weights = torch.ones(len(means), dtype=torch.float64) if weights is None else weights.double()
        self.num_classes = None if classes is None else int(classes.max()) + 1
        allowed = torch.ones(1, len(means), dtype=torch.bool)
        if classes is not None and self.num_classes is not None:
            allowed = torch.cat([classes[None] == torch.arange(self.num_classes)[:, None], allowed])
        log_weights = weights.log().expand(len(allowed), -1).masked_fill(~allowed, -math.inf)
        self._log_weights = log_weights.log_softmax(1)  # (classes + 1, K), null last

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the exact posterior mean at x_t, (B, *sample_shape), as a prediction of type `kind`."""
        point = self.schedule.coefficients(t)
        raw = from_x0_eps(self.kind, self.posterior_mean(x_t, t, cond), self.posterior_noise(x_t, t, cond), *point)
        return Prediction(self.kind, raw, x_t, *point)

    def condition(self, labels: Tensor | None, batch_size: int) -> Condition:
        """Return the condition of these labels (B,); None is the null condition."""
        return class_condition(labels, batch_size, self.num_classes)

    def in_coordinates(self, schedule: Schedule, kind: str | None = None) -> MixtureTeacher:
        """Return the same data seen on another path: what `in_schedule` must equal."""
        other = MixtureTeacher(
            self._means.reshape(-1, *self.sample_shape),
            self._variances.reshape(-1, *self.sample_shape),
            schedule,
            kind=kind or self.kind,
        )
        other._log_weights, other.num_classes = self._log_weights, self.num_classes
        return other

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return E[x0 | x_t] = sum_k p(k | x_t) [m_k + alpha c_k / V_k (x_t - alpha m_k)], (B, *sample_shape)."""
        alpha, variance, gap, log_joint = self._components(x_t, t, cond)
        each = self._means.to(x_t.device) + alpha * self._variances.to(x_t.device) / variance * gap
        return self._average(log_joint, each, x_t)

    def posterior_noise(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return E[eps | x_t] = sum_k p(k | x_t) sigma / V_k (x_t - alpha m_k), (B, *sample_shape)."""
        _, variance, gap, log_joint = self._components(x_t, t, cond)
        sigma = self.schedule.sigma(t)[:, None, None]
        return self._average(log_joint, sigma / variance * gap, x_t)

    def score(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return grad log p_t = -sum_k p(k | x_t) (x_t - alpha m_k) / V_k, (B, *sample_shape)."""
        _, variance, gap, log_joint = self._components(x_t, t, cond)
        return self._average(log_joint, -gap / variance, x_t)

    def responsibilities(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return p(k | x_t), (B, K), float64: how much of each component is in a state."""
        return self._components(x_t, t, cond)[3].softmax(1)

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return log p_t(x_t), (B,), float64."""
        return self._components(x_t, t, cond)[3].logsumexp(1)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, tolerance: float = 1e-9) -> Tensor:
        """Return where the PF-ODE carries x_t from t to r, (B, *sample_shape), float64, to about `tolerance`.

        Integrated by `integrate` in the angle phi = atan2(sigma, alpha) for y = x / sqrt(alpha^2 + sigma^2), where
        dy/dphi = cos(phi) E[eps] - sin(phi) E[x0] on every schedule, regular from pure noise to clean data.
        """
        at, ar = self.schedule.coefficients(t), self.schedule.coefficients(r)
        start, end = torch.atan2(at.sigma, at.alpha), torch.atan2(ar.sigma, ar.alpha)
        radius = (at.alpha**2 + at.sigma**2).sqrt()

        def field(y: Tensor, phi: Tensor) -> Tensor:
            x0, eps = self._both(y, phi.cos(), phi.sin(), cond)
            return expand(phi.cos(), y) * eps - expand(phi.sin(), y) * x0

        y = integrate(field, x_t.double() / expand(radius, x_t.double()), start, end, tolerance)
        return expand((ar.alpha**2 + ar.sigma**2).sqrt(), y) * y

    def sample(self, cond: Condition, generator: torch.Generator) -> Tensor:
        """Return clean samples x0, (B, *sample_shape), float64."""
        device = generator.device
        rows = self._log_weights.to(device)[row_of(cond, len(self._log_weights), device)]
        k = torch.multinomial(rows.exp(), 1, generator=generator).squeeze(1)
        z = torch.randn(len(k), self._means.shape[1], generator=generator, dtype=torch.float64, device=device)
        x0 = self._means.to(device)[k] + self._variances.to(device)[k].sqrt() * z
        return x0.reshape(-1, *self.sample_shape)

    # ------------------------------------------------------------------------------------------------------------------

    def _both(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x] and E[eps | x] at scales (alpha, sigma) that need not be the schedule's."""
        _, variance, gap, log_joint = self._joint(x, alpha, sigma, cond)
        a, s = alpha[:, None, None], sigma[:, None, None]
        x0 = self._means.to(x.device) + a * self._variances.to(x.device) / variance * gap
        return self._average(log_joint, x0, x), self._average(log_joint, s / variance * gap, x)

    def _components(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._joint(x_t, *self.schedule.coefficients(t), cond)

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha (B, 1, 1), V_k (B, K, D), x - alpha m_k (B, K, D) and log w_k N(x; alpha m_k, V_k) (B, K)."""
        a, s = alpha[:, None, None], sigma[:, None, None]
        variance = (a**2 * self._variances.to(x.device) + s**2).clamp(min=1e-24)  # a data point without noise: nearest wins
        gap = x.double().flatten(1)[:, None] - a * self._means.to(x.device)
        log_normal = -0.5 * (gap**2 / variance + (2 * math.pi * variance).log()).sum(2)
        prior = self._log_weights.to(x.device)[row_of(cond, len(self._log_weights), x.device)]
        return a, variance, gap, prior + log_normal

    def _average(self, log_joint: Tensor, each: Tensor, x_t: Tensor) -> Tensor:
        mean = torch.einsum("bk,bkd->bd", log_joint.softmax(1), each)
        return mean.reshape(-1, *self.sample_shape).to(torch.promote_types(torch.float32, x_t.dtype))


def DataTeacher(data: Tensor, schedule: Schedule, labels: Tensor | None = None, kind: str = "sample") -> MixtureTeacher:
    """Return the exact denoiser of a finite data set, (N, *sample_shape): a mixture of N equal points of variance 0.

    labels: (N,) int64, the class of each point, or None.
    """
    return MixtureTeacher(data, torch.zeros(len(data), dtype=torch.float64), schedule, kind=kind, classes=labels)
