"""The Gaussian teacher against Bayes' rule, autograd, its own ODE, and Monte Carlo."""

from __future__ import annotations

import pytest
import torch
from oracle_cases import F64, PATHS, SHAPE, full_covariance, gaussian, levels, normal
from torch import Tensor

from diffdistill.math.prediction import KINDS
from diffdistill.math.schedules import EDMSchedule, Schedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.guidance import guided
from diffdistill.oracles import GaussianTeacher

LABELS = torch.tensor([0, 2, 3])  # 3 is null


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.fixture(params=PATHS, ids=str)
def path(request: pytest.FixtureRequest) -> Schedule:
    return PATHS[request.param]


@pytest.fixture(params=[False, True], ids=["diagonal", "full"])
def full(request: pytest.FixtureRequest) -> bool:
    return request.param


def case(path: Schedule, full: bool, kind: str = "sample") -> tuple[GaussianTeacher, Tensor, Tensor, Condition]:
    """Return teacher, states, times and condition of three samples."""
    model = gaussian(path, kind, full)
    return model, normal(3, *SHAPE), levels(path, 0.3, 1.5, 6.0), model.condition(LABELS, 3)


def matrices(path: Schedule, full: bool, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the data covariance (4, 4), that of x_t (B, 4, 4) and the class means (B, 4), built independently."""
    c = full_covariance() if full else torch.diag((0.2 + normal(*SHAPE, seed=2) ** 2).flatten())
    a, s = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    means = torch.cat([normal(3, *SHAPE, seed=4), normal(*SHAPE, seed=1)[None]]).flatten(1)
    return c, a**2 * c + s**2 * torch.eye(4, dtype=F64), means[LABELS]


def test_posterior_mean_is_the_conditional_expectation(path: Schedule, full: bool) -> None:
    model, x, t, cond = case(path, full)
    c, v, m = matrices(path, full, t)
    a = path.alpha(t)[:, None]
    gap = (x.flatten(1) - a * m)[..., None]
    close(model.posterior_mean(x, t, cond).flatten(1), m + a * (c @ torch.linalg.solve(v, gap))[..., 0])
    close(model.posterior_noise(x, t, cond).flatten(1), path.sigma(t)[:, None] * torch.linalg.solve(v, gap)[..., 0])
    close(model.mean(cond).flatten(1), m)
    close(model.covariance(), c)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_means_the_posterior_mean(path: Schedule, full: bool, kind: str) -> None:
    model, x, t, cond = case(path, full, kind)
    prediction = model(x, t, cond)
    assert prediction.kind == kind
    close(prediction.x0, model.posterior_mean(x, t, cond))
    close(prediction.eps, model.posterior_noise(x, t, cond))
    close(prediction.score, model.score(x, t, cond))
    close(prediction.velocity(path.alpha_dot(t), path.sigma_dot(t)), model.velocity(x, t, cond))


def test_score_is_the_gradient_of_the_density(path: Schedule, full: bool) -> None:
    model, x, t, cond = case(path, full)
    _, v, m = matrices(path, full, t)
    x.requires_grad_()
    log_prob = model.log_prob(x, t, cond)
    close(torch.autograd.grad(log_prob.sum(), x)[0], model.score(x, t, cond))
    exact = torch.distributions.MultivariateNormal(path.alpha(t)[:, None] * m, v).log_prob(x.flatten(1))
    close(log_prob, exact)


def test_flow_map_solves_its_ode_and_carries_the_marginals(path: Schedule, full: bool) -> None:
    model, x, t, cond = case(path, full)
    r = levels(path, 0.1, 0.5, 2.0)
    close(model.flow_map(x, t, t, cond), x)
    close(model.flow_map(model.flow_map(x, t, r, cond), r, t, cond), x)
    h = 1e-6 * (path.t_max - path.t_clean)
    difference = (model.flow_map(x, t, t + h, cond) - model.flow_map(x, t, t - h, cond)) / (2 * h)
    close(difference, model.velocity(x, t, cond), 2e-3, 1e-7)  # the beta schedule bends at the integers
    # Density along the map: log p_r(x_r) + log |d x_r / d x_t| = log p_t(x_t).
    _, v, _ = matrices(path, full, t)
    _, w, _ = matrices(path, full, r)
    volume = 0.5 * (torch.logdet(w) - torch.logdet(v))
    close(model.log_prob(model.flow_map(x, t, r, cond), r, cond) + volume, model.log_prob(x, t, cond))
    close(model.average_velocity(x, t, r, cond) * expand(t - r, x), x - model.flow_map(x, t, r, cond))


def test_the_consistency_map_ends_in_the_data_distribution(path: Schedule) -> None:
    model, x, t, cond = case(path, False)
    clean = torch.full((3,), path.t_clean, dtype=F64)
    c, v, m = matrices(path, False, t)
    scale = (c.diagonal() / v.diagonal(dim1=1, dim2=2)).sqrt()
    close(model.flow_map(x, t, clean, cond).flatten(1), m + scale * (x.flatten(1) - path.alpha(t)[:, None] * m))


def test_ddim_map_is_one_step_with_the_exact_denoiser(path: Schedule, full: bool) -> None:
    from diffdistill.math.transfer import ddim

    model, x, t, cond = case(path, full)
    r = levels(path, 0.1, 0.5, 2.0)
    stepped = ddim(x, model(x, t, cond).x0, path.coefficients(t), path.coefficients(r))
    close(model.ddim_map(x, t, r, cond), stepped)
    assert model.kappa(t, r).shape == (3, 4)


def test_kappas_of_the_variance_exploding_path() -> None:
    c, t, r = 0.3, 5.0, 2.0
    model = GaussianTeacher(torch.zeros(1), torch.tensor(c, dtype=F64), EDMSchedule())
    args = torch.tensor([t], dtype=F64), torch.tensor([r], dtype=F64)
    assert model.kappa(*args).item() == pytest.approx((c + r * t) / (c + t**2), rel=1e-14)
    slopes = t / (c + t**2) + r * (c + r * t) / ((c + t**2) * (c + r**2))
    assert model.heun_kappa(*args).item() == pytest.approx(1 + (r - t) / 2 * slopes, rel=1e-14)


def test_guidance_only_shifts_the_mean(path: Schedule, full: bool) -> None:
    """null + w (cond - null) of exact denoisers is the exact denoiser of the shifted mean; w = 0 is null, w = 1 the class."""
    model, x, t, cond = case(path, full, "v_prediction")
    w = torch.tensor([0.0, 1.0, 3.5])
    null, classes = model.mean(cond.null_like()), model.mean(cond)
    close(model.mean(cond, w), null + expand(w, null) * (classes - null))
    shifted = GaussianTeacher(model.mean(cond, 3.5)[0], full_covariance() if full else 0.2 + normal(*SHAPE, seed=2) ** 2, path)
    none = Condition.none(3)
    r = levels(path, 0.1, 0.5, 2.0)
    first = cond.select(slice(0, 1))
    for name in ("posterior_mean", "posterior_noise", "score", "velocity"):
        close(getattr(model, name)(x[:1], t[:1], first, 3.5), getattr(shifted, name)(x, t, none)[:1])
    for name in ("flow_map", "ddim_map", "average_velocity"):
        close(getattr(model, name)(x[:1], t[:1], r[:1], first, 3.5), getattr(shifted, name)(x, t, r, none)[:1])
    close(guided(model, w)(x, t, cond).x0, model.posterior_mean(x, t, cond, w))


def test_guided_average_velocity_uses_its_guidance(path: Schedule) -> None:
    model, x, t, cond = case(path, False)
    r = levels(path, 0.1, 0.5, 2.0)
    close(model.average_velocity(x, t, r, cond, 2.0), (x - model.flow_map(x, t, r, cond, 2.0)) / expand(t - r, x))


def test_log_ratio_and_divergence(path: Schedule, full: bool) -> None:
    model, x, t, cond = case(path, full)
    other = GaussianTeacher(torch.zeros(SHAPE, dtype=F64), 0.7, path)
    close(model.log_ratio(other, x, t, cond), model.log_prob(x, t, cond) - other.log_prob(x, t, Condition.none(3)))
    _, v, m = matrices(path, full, t)
    spread = (path.alpha(t) ** 2 * 0.7 + path.sigma(t) ** 2)[:, None, None] * torch.eye(4, dtype=F64)
    q = torch.distributions.MultivariateNormal(torch.zeros(3, 4, dtype=F64), spread)
    p = torch.distributions.MultivariateNormal(path.alpha(t)[:, None] * m, v)
    close(model.kl(other, t, cond), torch.distributions.kl_divergence(p, q))
    close(model.kl(model, t, cond), torch.zeros(3, dtype=F64))


def test_a_mean_shift_of_equal_covariance_makes_a_constant_score_difference(path: Schedule) -> None:
    real, fake = (GaussianTeacher(torch.full((1,), m, dtype=F64), 0.4, path) for m in (0.2, 1.0))
    t, x = levels(path, 0.3, 1.5, 6.0), normal(3, 1)
    a, s = path.coefficients(t)
    gap = fake.posterior_mean(x, t, Condition.none(3)) - real.posterior_mean(x, t, Condition.none(3))
    close(gap[:, 0], 0.8 * s**2 / (a**2 * 0.4 + s**2))


def test_the_view_on_another_path_is_the_oracle_of_that_path(full: bool) -> None:
    for source in PATHS.values():
        model = gaussian(source, "epsilon", full)
        for target in PATHS.values():
            x, t, cond = normal(3, *SHAPE), levels(target, 0.3, 1.5, 6.0), model.condition(LABELS, 3)
            there = model.in_coordinates(target, "sample")
            close(model.in_schedule(target)(x, t, cond).x0, there(x, t, cond).x0)
            assert there.kind == "sample" and model.in_coordinates(target).kind == "epsilon"
    plain = gaussian(PATHS["vp"], classes=False)
    assert plain.in_coordinates(PATHS["edm"]).num_classes is None and plain.num_classes is None


def test_samples_have_the_mean_and_covariance_of_their_class(full: bool) -> None:
    model = gaussian(PATHS["edm"], full=full)
    cond = model.condition(torch.ones(40000, dtype=torch.int64), 40000)
    x0 = model.sample(cond, torch.Generator().manual_seed(0)).flatten(1)
    close(x0.mean(0), normal(3, *SHAPE, seed=4)[1].flatten(), 0, 0.03)
    close(x0.T.cov(), model.covariance(), 0, 0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_finite_at_the_clean_end_and_at_pure_noise(path: Schedule, full: bool, kind: str) -> None:
    model, x, _, cond = case(path, full, kind)
    ends = torch.tensor([path.t_clean, path.t_max, path.t_max], dtype=F64)
    assert bool(torch.isfinite(model(x, ends, cond).raw).all())
    if kind != "epsilon" or path is not PATHS["flow"]:
        close(model(x, ends, cond).x0[0], x[0])


def test_conditions() -> None:
    classed, plain = gaussian(PATHS["edm"]), gaussian(PATHS["edm"], classes=False)
    x, t = normal(2, *SHAPE), torch.tensor([1.0, 2.0], dtype=F64)
    null = classed(x, t, classed.condition(None, 2)).x0
    close(null, classed(x, t, Condition.none(2)).x0)
    close(null, plain(x, t, plain.condition(None, 2)).x0)
    assert classed.condition(torch.tensor([0, 1]), 2).has_null and not plain.condition(torch.tensor([0, 1]), 2).has_null
    assert classed.num_classes == 3 and classed.sample_shape == SHAPE


def test_float32_states_get_float32_answers_and_gradients_pass() -> None:
    model, x, t, cond = case(PATHS["vp"], True)
    assert model(x.float(), t, cond).x0.dtype == torch.float32 and model(x.bfloat16(), t, cond).raw.dtype == torch.float32
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: model(y, t, cond).x0, (x,))


def test_impossible_covariances_are_refused_and_degenerate_ones_are_not() -> None:
    with pytest.raises(ValueError, match="positive semi-definite"):
        GaussianTeacher(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), EDMSchedule())
    point = GaussianTeacher(torch.full((2,), 3.0), torch.ones(2, 2), EDMSchedule())  # rank one: an eigenvalue rounds below 0
    assert bool(torch.isfinite(point(torch.zeros(1, 2), torch.ones(1), Condition.none(1)).x0).all())
    dirac = GaussianTeacher(torch.full((2,), 3.0), 0.0, EDMSchedule())
    assert dirac(torch.zeros(1, 2), torch.ones(1), Condition.none(1)).x0.tolist() == [[3.0, 3.0]]


def test_progressive_gain_reproduces_two_half_steps(path: Schedule) -> None:
    from diffdistill.math.transfer import ddim

    model, x, t, cond = case(path, False)
    mid, r = levels(path, 0.2, 0.8, 3.0), levels(path, 0.1, 0.5, 2.0)
    mean = model.mean(cond)
    student = mean + model.progressive_gain(t, mid, r).reshape(3, *SHAPE) * (x - expand(path.alpha(t), x) * mean)
    two = model.ddim_map(model.ddim_map(x, t, mid, cond), mid, r, cond)
    close(ddim(x, student, path.coefficients(t), path.coefficients(r)), two)
