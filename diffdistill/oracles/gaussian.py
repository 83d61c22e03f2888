"""A teacher whose data are Gaussian, N(m_c, C): denoiser, score, flow map, solver errors and divergences in closed form.

With the eigenvalues c of C and V(t) = alpha^2 c + sigma^2, per eigen-direction:

    denoiser       D(x, t) = m + alpha c / V (x - alpha m)
    PF-ODE map     x_r = alpha_r m + sqrt(V_r / V_t) (x_t - alpha_t m)
    one DDIM step  x_r - alpha_r m = kappa(t, r) (x_t - alpha_t m),  kappa = (alpha_t alpha_r c + sigma_t sigma_r) / V_t

Classes have means of their own and share C; guidance then shifts the mean, m_w = m_null + w (m_c - m_null), and nothing
else, so every guided quantity is exact as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffdistill.math.prediction import Prediction, from_x0_eps
from diffdistill.math.schedules import Coefficients, Schedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser

Guidance = float | Tensor
"""w counted from 1: a number or one value per sample, (B,)."""


def row_of(cond: Condition, num_rows: int, device: torch.device) -> Tensor:
    """Return the row of a table with one entry per class and the null entry last, (B,): the label, or last without one.

    A table of one row answers every condition alike.
    """
    labels = cond.values.get("class_labels")
    if labels is None or num_rows == 1:
        return torch.full((cond.batch_size,), num_rows - 1, device=device)
    return labels.to(device)


def class_condition(labels: Tensor | None, batch_size: int, num_classes: int | None) -> Condition:
    """Return the condition of an oracle: labels (B,), the null label for None, or nothing where there are no classes."""
    if num_classes is None:
        return Condition.none(batch_size)
    if labels is None:
        labels = torch.full((batch_size,), num_classes)
    return Condition.labels(labels, num_classes)


class GaussianTeacher(Denoiser):
    """The exact denoiser of N(m_c, C) on any schedule, emitting any output type.

    Args of the constructor:
        mean: mean of the data, sample_shape; with classes, the mean without a condition (null).
        covariance: variances, sample_shape (or a number), or the full matrix (D, D) of the flattened sample.
        schedule: the path its states live on.
        kind: what it emits, see `math.prediction`.
        class_means: (K, *sample_shape), or None; label K is null.
    Computes in float64 and answers in promote(float32, dtype of x_t).
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor | float,
        schedule: Schedule,
        kind: str = "sample",
        class_means: Tensor | None = None,
    ) -> None:
        self.schedule, self.kind, self.sample_shape = schedule, kind, tuple(mean.shape)
        self.num_classes = None if class_means is None else class_means.shape[0]
        rows = mean.double()[None] if class_means is None else torch.cat([class_means.double(), mean.double()[None]])
        self._means = rows.flatten(1)  # (K + 1, D), null last
        size = self._means.shape[1]
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        self._basis: Tensor | None = None  # None: the coordinate axes
        if covariance.shape == (size, size) and covariance.shape != self.sample_shape:
            self._variances, self._basis = torch.linalg.eigh(covariance)
        else:
            self._variances = covariance.expand(self.sample_shape).reshape(-1).clone()  # (D,)
        if bool((self._variances < -1e-12).any()):
            raise ValueError("the covariance must be positive semi-definite.")
        self._variances = self._variances.clamp(min=0)

    # What it is asked -------------------------------------------------------------------------------------------------

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the exact posterior mean at x_t, (B, *sample_shape), as a prediction of type `kind`; defined at every time."""
        point = self.schedule.coefficients(t)
        raw = from_x0_eps(self.kind, self.posterior_mean(x_t, t, cond), self.posterior_noise(x_t, t, cond), *point)
        return Prediction(self.kind, raw, x_t, *point)

    def condition(self, labels: Tensor | None, batch_size: int) -> Condition:
        """Return the condition of these labels (B,); None is the null condition."""
        return class_condition(labels, batch_size, self.num_classes)

    def in_coordinates(self, schedule: Schedule, kind: str | None = None) -> GaussianTeacher:
        """Return the same data seen on another path: what `in_schedule` must equal."""
        covariance = self.covariance() if self._basis is not None else self._variances.reshape(self.sample_shape)
        means = self._means.reshape(-1, *self.sample_shape)
        return GaussianTeacher(means[-1], covariance, schedule, kind or self.kind, None if len(means) == 1 else means[:-1])

    # Closed forms -----------------------------------------------------------------------------------------------------

    def mean(self, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return m_null + w (m_c - m_null), (B, *sample_shape), float64."""
        device = next(iter(cond.values.values())).device if cond.values else self._means.device
        return self._mean(cond, guidance, device).reshape(-1, *self.sample_shape)

    def covariance(self) -> Tensor:
        """Return C, (D, D), float64."""
        return torch.diag(self._variances) if self._basis is None else self._basis @ torch.diag(self._variances) @ self._basis.T

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return E[x0 | x_t] = m + alpha c / V (x_t - alpha m), (B, *sample_shape)."""
        a, s, c = self._scales(t)
        m, y = self._centred(x_t, t, cond, guidance)
        return self._finish(m + self._apply(a * c / (a**2 * c + s**2), y), x_t)

    def posterior_noise(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return E[eps | x_t] = sigma / V (x_t - alpha m), (B, *sample_shape); 0 at the clean end."""
        a, s, c = self._scales(t)
        _, y = self._centred(x_t, t, cond, guidance)
        return self._finish(self._apply(s / (a**2 * c + s**2), y), x_t)

    def score(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return grad log p_t = -(x_t - alpha m) / V, (B, *sample_shape)."""
        a, s, c = self._scales(t)
        _, y = self._centred(x_t, t, cond, guidance)
        return self._finish(self._apply(-1 / (a**2 * c + s**2), y), x_t)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return dx/dt of the PF-ODE: alpha' m + (alpha alpha' c + sigma sigma') / V (x_t - alpha m)."""
        a, s, c = self._scales(t)
        a_dot, s_dot = self.schedule.alpha_dot(t)[:, None], self.schedule.sigma_dot(t)[:, None]
        m, y = self._centred(x_t, t, cond, guidance)
        return self._finish(a_dot * m + self._apply((a * a_dot * c + s * s_dot) / (a**2 * c + s**2), y), x_t)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return where the PF-ODE carries x_t from t to r, either way, (B, *sample_shape); r = t_clean: consistency map."""
        a, s, c = self._scales(t)
        a_r, s_r, _ = self._scales(r)
        m, y = self._centred(x_t, t, cond, guidance)
        return self._finish(a_r * m + self._apply(((a_r**2 * c + s_r**2) / (a**2 * c + s**2)).sqrt(), y), x_t)

    def average_velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return (x_t - x_r) / (t - r) along the PF-ODE, MeanFlow's u(x_t, r, t); t and r must differ."""
        return (x_t - self.flow_map(x_t, t, r, cond, guidance)) / expand(t - r, x_t)

    def ddim_map(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition, guidance: Guidance = 1.0) -> Tensor:
        """Return one DDIM step from t to r with the exact denoiser: alpha_r m + kappa(t, r) (x_t - alpha_t m)."""
        m, y = self._centred(x_t, t, cond, guidance)
        return self._finish(self.schedule.alpha(r)[:, None] * m + self._apply(self.kappa(t, r), y), x_t)

    def kappa(self, t: Tensor, r: Tensor) -> Tensor:
        """Return one DDIM step's factor (alpha_t alpha_r c + sigma_t sigma_r) / V_t per eigen-direction, (B, D)."""
        (a, s, c), (a_r, s_r, _) = self._scales(t), self._scales(r)
        return (a * a_r * c + s * s_r) / (a**2 * c + s**2)

    def heun_kappa(self, t: Tensor, r: Tensor) -> Tensor:
        """Return one Heun step's factor per eigen-direction, (B, D); alpha_t and sigma_r positive.

        In u = sigma / alpha: 1 + (u_r - u_t)/2 [u_t/(c + u_t^2) + u_r (c + u_r u_t)/((c + u_t^2)(c + u_r^2))], times
        alpha_r/alpha_t.
        """
        (a, s, c), (a_r, s_r, _) = self._scales(t), self._scales(r)
        u, w = s / a, s_r / a_r
        slopes = u / (c + u**2) + w * (c + w * u) / ((c + u**2) * (c + w**2))
        return a_r / a * (1 + (w - u) / 2 * slopes)

    def progressive_gain(self, t: Tensor, mid: Tensor, r: Tensor) -> Tensor:
        """Return g of the optimal progressive student, D = m + g (x_t - alpha m), per eigen-direction, (B, D)."""
        (a, s, _), (a_r, s_r, _) = self._scales(t), self._scales(r)
        return (self.kappa(t, mid) * self.kappa(mid, r) - s_r / s) / (a_r - a * s_r / s)

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return log N(x_t; alpha m, V), (B,), float64."""
        a, s, c = self._scales(t)
        _, y = self._centred(x_t, t, cond, 1.0)
        y = y if self._basis is None else y @ self._basis
        variance = (a**2 * c + s**2).expand_as(y)
        return -0.5 * (y**2 / variance + (2 * math.pi * variance).log()).sum(1)

    def log_ratio(self, other: GaussianTeacher, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return log p_t(x_t) - log q_t(x_t), p being this teacher's density and q the other's, (B,), float64."""
        return self.log_prob(x_t, t, cond) - other.log_prob(x_t, t, cond)

    def kl(self, other: GaussianTeacher, t: Tensor, cond: Condition) -> Tensor:
        """Return KL(p_t || q_t), p being this teacher's density and q the other's, (B,), float64."""
        point = self.schedule.coefficients(t)
        p, q = self._noised_covariance(point), other._noised_covariance(point)
        gap = point.alpha[:, None] * (other._mean(cond, 1.0, t.device) - self._mean(cond, 1.0, t.device))
        inverse = torch.linalg.inv(q)
        trace = (inverse @ p).diagonal(dim1=1, dim2=2).sum(1)
        square = torch.einsum("bi,bij,bj->b", gap, inverse, gap)
        return 0.5 * (trace + square - gap.shape[1] + torch.logdet(q) - torch.logdet(p))

    def sample(self, cond: Condition, generator: torch.Generator) -> Tensor:
        """Return clean samples x0 ~ N(m_c, C), (B, *sample_shape), float64."""
        shape = (cond.batch_size, self._means.shape[1])
        z = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        y = z * self._variances.to(z.device).sqrt()
        y = y if self._basis is None else y @ self._basis.to(z.device).T
        return (self._mean(cond, 1.0, z.device) + y).reshape(-1, *self.sample_shape)

    # ------------------------------------------------------------------------------------------------------------------

    def _noised_covariance(self, point: Coefficients) -> Tensor:
        a, s = point.alpha[:, None, None], point.sigma[:, None, None]
        identity = torch.eye(self._variances.numel(), dtype=torch.float64, device=a.device)
        return a**2 * self.covariance().to(a.device) + s**2 * identity  # (B, D, D)

    def _mean(self, cond: Condition, guidance: Guidance, device: torch.device) -> Tensor:
        means = self._means.to(device)
        null = means[-1]
        w = torch.as_tensor(guidance, dtype=torch.float64, device=device).expand(cond.batch_size)[:, None]
        return null + w * (means[row_of(cond, len(means), device)] - null)  # (B, D)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha (B, 1), sigma (B, 1) and the eigenvalues (1, D)."""
        point = self.schedule.coefficients(t)
        return point.alpha[:, None], point.sigma[:, None], self._variances.to(t.device)[None]

    def _centred(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: Guidance) -> tuple[Tensor, Tensor]:
        """Return the mean (B, D) and x_t - alpha mean, (B, D), float64."""
        m = self._mean(cond, guidance, x_t.device)
        return m, x_t.double().flatten(1) - self.schedule.alpha(t)[:, None] * m

    def _apply(self, factor: Tensor, y: Tensor) -> Tensor:
        """Multiply each eigen-direction of y (B, D) by its factor (B, D)."""
        return factor * y if self._basis is None else (factor * (y @ self._basis.to(y.device))) @ self._basis.to(y.device).T

    def _finish(self, y: Tensor, x_t: Tensor) -> Tensor:
        return y.reshape(-1, *self.sample_shape).to(torch.promote_types(torch.float32, x_t.dtype))
