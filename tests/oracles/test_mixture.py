"""Mixture and data teachers against sums written out, autograd, quadrature, the Gaussian oracle and the ODE they define."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_cases import F64, PATHS, SHAPE, levels, mixture, normal
from torch import Tensor

from diffdistill.math.prediction import KINDS
from diffdistill.math.schedules import EDMSchedule, Schedule, expand
from diffdistill.models.condition import Condition
from diffdistill.oracles import DataTeacher, GaussianTeacher, MixtureTeacher, integrate


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.fixture(params=PATHS, ids=str)
def path(request: pytest.FixtureRequest) -> Schedule:
    return PATHS[request.param]


def components(path: Schedule, t: Tensor, row: int) -> torch.distributions.MixtureSameFamily:
    """Return the noisy density of sample `row` with torch's own mixture; labels are 0, 1, null."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64) * torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]])[row]
    a, s = path.alpha(t)[row], path.sigma(t)[row]
    std = (a**2 * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64) + s**2).sqrt()[:, None].expand(4, 4)
    normals = torch.distributions.Independent(torch.distributions.Normal(a * normal(4, *SHAPE, seed=5).flatten(1), std), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights + 1e-300), normals)


def test_density_score_and_posterior_of_every_class(path: Schedule) -> None:
    model, x, t = mixture(path), normal(3, *SHAPE).requires_grad_(), levels(path, 0.3, 1.0, 4.0)
    cond = model.condition(torch.tensor([0, 1, 2]), 3)
    log_prob = model.log_prob(x, t, cond)
    close(log_prob, torch.stack([components(path, t, k).log_prob(x[k].flatten()) for k in range(3)]))
    score = torch.autograd.grad(log_prob.sum(), x)[0]
    close(model.score(x, t, cond), score)
    # Tweedie: alpha E[x0] = x + sigma^2 score, and E[eps] = -sigma score.
    a, s = (expand(c, x) for c in path.coefficients(t))
    close(model.posterior_mean(x, t, cond), (x + s**2 * score) / a)
    close(model.posterior_noise(x, t, cond), -s * score)
    inside = model.responsibilities(x, t, cond)
    close(inside.sum(1), torch.ones(3, dtype=F64))
    assert inside[0, [1, 3]].tolist() == [0, 0] and inside[1, [0, 2]].tolist() == [0, 0] and bool((inside[2] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_means_the_posterior_mean(path: Schedule, kind: str) -> None:
    model, x, t = mixture(path, kind), normal(3, *SHAPE), levels(path, 0.3, 1.0, 4.0)
    cond = model.condition(torch.tensor([0, 1, 2]), 3)
    assert model(x, t, cond).kind == kind
    close(model(x, t, cond).x0, model.posterior_mean(x, t, cond))
    close(model(x, t, cond).eps, model.posterior_noise(x, t, cond))


def test_one_component_is_the_gaussian_teacher_flow_map_included(path: Schedule) -> None:
    mean, variance = normal(*SHAPE), 0.2 + normal(*SHAPE, seed=1) ** 2
    model, exact = MixtureTeacher(mean[None], variance[None], path), GaussianTeacher(mean, variance, path)
    x, none = normal(2, *SHAPE, seed=2), Condition.none(2)
    t, r = levels(path, 0.5, 4.0), levels(path, 0.1, 0.5)
    close(model(x, t, none).x0, exact(x, t, none).x0)
    close(model.log_prob(x, t, none), exact.log_prob(x, t, none))
    close(model.flow_map(x, t, r, none), exact.flow_map(x, t, r, none), 0, 1e-8)
    close(model.flow_map(x, r, t, none), exact.flow_map(x, r, t, none), 0, 1e-7)  # and back up


def test_flow_map_from_pure_noise_to_clean_data() -> None:
    """In one dimension the flow map keeps quantiles: F_0(map(x)) = F_t(x), whatever the mixture."""
    means, variances = torch.tensor([[-1.0], [1.5]], dtype=F64), torch.tensor([0.1, 0.3], dtype=F64)
    path = PATHS["flow"]
    model = MixtureTeacher(means, variances, path, torch.tensor([1.0, 3.0]))
    x = torch.tensor([[-1.2], [0.1], [0.9]], dtype=F64)
    y = model.flow_map(x, torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64), Condition.none(3))

    def cdf(z: Tensor) -> Tensor:
        return torch.special.ndtr((z - means.T) / variances.sqrt()) @ torch.tensor([0.25, 0.75], dtype=F64)

    close(cdf(y), torch.special.ndtr(x[:, 0]), 0, 1e-8)
    assert y.dtype == F64


def test_the_view_on_another_path_is_the_oracle_of_that_path() -> None:
    model = mixture(PATHS["vp"], "epsilon")
    cond = model.condition(torch.tensor([0, 1, 2]), 3)
    for target in PATHS.values():
        x, t = normal(3, *SHAPE), levels(target, 0.3, 1.0, 4.0)
        there = model.in_coordinates(target)
        close(model.in_schedule(target)(x, t, cond).x0, there(x, t, cond).x0)
        assert there.kind == "epsilon" and there.num_classes == 2 and model.in_coordinates(target, "sample").kind == "sample"


def test_posterior_mean_of_a_data_set_is_the_weighted_sum_of_its_points(path: Schedule) -> None:
    data, labels = normal(6, *SHAPE), torch.tensor([0, 0, 0, 1, 1, 1])
    model, x, t = DataTeacher(data, path, labels), normal(3, *SHAPE, seed=1), levels(path, 0.3, 1.0, 4.0)
    cond = model.condition(torch.tensor([0, 1, 2]), 3)
    a, s = path.coefficients(t)
    distance = ((x[:, None] - a.reshape(3, 1, 1, 1, 1) * data[None]) ** 2).flatten(2).sum(2)
    allowed = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6])
    weight = allowed * torch.exp(-distance / (2 * s[:, None] ** 2))
    expected = torch.einsum("bk,kchw->bchw", weight / weight.sum(1, keepdim=True), data)
    close(model(x, t, cond).x0, expected)
    # At the clean end and just above it, the nearest point; at much noise, nearly the mean.
    near = model(data[:2] * 1.0001, torch.full((2,), path.t_clean, dtype=F64), Condition.none(2))
    close(near.x0, data[:2], 0, 1e-12)
    close(
        DataTeacher(data, EDMSchedule(sigma_max=1e6))(x, torch.full((3,), 1e6), Condition.none(3)).x0,
        data.mean(0).expand(3, *SHAPE),
        0,
        1e-5,
    )
    assert DataTeacher(data, path).num_classes is None and model.num_classes == 2
    assert DataTeacher(data, path, kind="epsilon").kind == "epsilon"


def test_samples_follow_weights_means_and_variances() -> None:
    model = mixture(PATHS["edm"])
    cond = model.condition(torch.zeros(40000, dtype=torch.int64), 40000)
    x0 = model.sample(cond, torch.Generator().manual_seed(0))
    means = normal(4, *SHAPE, seed=5)
    mean = 0.25 * means[0] + 0.75 * means[2]
    close(x0.mean(0), mean, 0, 0.03)
    variance = 0.25 * (0.1 + means[0] ** 2) + 0.75 * (0.3 + means[2] ** 2) - mean**2
    close(x0.var(0), variance, 0, 0.05)


def test_states_of_half_precision_get_float32_answers() -> None:
    model = mixture(PATHS["vp"])
    assert model(normal(1, *SHAPE).bfloat16(), torch.tensor([500.0]), Condition.none(1)).raw.dtype == torch.float32


def test_integrate_reaches_its_tolerance_each_sample_on_its_own_interval() -> None:
    start, end = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([2.0, 0.5], dtype=F64)
    y = integrate(lambda y, phi: y * phi.cos()[:, None], torch.ones(2, 1, dtype=F64), start, end)
    close(y[:, 0], (end.sin() - start.sin()).exp(), 0, 1e-9)
    with pytest.raises(RuntimeError, match="too stiff"):
        integrate(lambda y, phi: -1e4 * y, torch.ones(1, 1, dtype=F64), torch.zeros(1), torch.ones(1), max_steps=64)


def test_integrate_is_of_fourth_order_before_extrapolation() -> None:
    calls: list[float] = []

    def field(y: Tensor, phi: Tensor) -> Tensor:
        calls.append(float(phi[0]))
        return y

    y = integrate(field, torch.ones(1, 1, dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), tolerance=1e-7)
    assert float(y) == pytest.approx(math.e, abs=1e-9)
    assert len(calls) == 4 * (16 + 32)  # error of 32 steps: about 2e-8
