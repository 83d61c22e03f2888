"""Steps: against independent code (diffusers), against the exact flow of Gaussian data, and by their order of convergence."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
from schedule_cases import SCHEDULES, linear_vp, times
from torch import Tensor

from diffdistill.math import grids, losses, transfer, weighting
from diffdistill.math.prediction import KINDS, Prediction, consistency_preconditioning, edm_preconditioning, lcm_boundary
from diffdistill.math.schedules import (
    Coefficients,
    EDMSchedule,
    RectifiedFlowSchedule,
    Schedule,
    change_coordinates,
    expand,
    schedule_from_diffusers,
)
from diffdistill.models.condition import Condition
from diffdistill.oracles import GaussianTeacher, MixtureTeacher

F64 = torch.float64
SHAPE = (1, 2, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def teacher(schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(normal(*SHAPE, seed=7), 0.2 + normal(*SHAPE, seed=8) ** 2, schedule)


def denoise(model: GaussianTeacher | MixtureTeacher) -> transfer.Denoise:
    return lambda x, t: model(x, t, Condition.none(len(x))).x0


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def pair(schedule: Schedule, t: float, r: float) -> tuple[Tensor, Tensor]:
    """Return times with (log) noise levels between clean and noisy that suit every schedule, (4,) each."""
    high, low = (schedule.time_of_lambda(-torch.tensor([level], dtype=F64).log()).expand(4) for level in (t, r))
    return high, low


# Single steps ---------------------------------------------------------------------------------------------------------


def test_add_noise_is_alpha_x0_plus_sigma_eps_and_diffusers_add_noise() -> None:
    scheduler = diffusers.DDPMScheduler()
    x0, eps, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 400, 999])
    point = schedule_from_diffusers(scheduler).coefficients(t)
    close(transfer.add_noise(x0, eps, point), scheduler.add_noise(x0, eps, t), 1e-5, 1e-6)
    close(transfer.renoise_x0(x0, eps, point), scheduler.add_noise(x0, eps, t), 1e-5, 1e-6)
    flow = RectifiedFlowSchedule().coefficients(torch.tensor([0.25], dtype=F64))
    assert transfer.add_noise(torch.tensor([[4.0]]), torch.tensor([[8.0]]), flow).item() == 0.75 * 4 + 0.25 * 8


def test_ddim_keeps_the_noise_that_the_estimate_implies(schedule: Schedule) -> None:
    t, r = pair(schedule, 2.0, 0.5)
    x0, eps = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    x_t = transfer.add_noise(x0, eps, schedule.coefficients(t))
    close(
        transfer.ddim(x_t, x0, schedule.coefficients(t), schedule.coefficients(r)),
        transfer.add_noise(x0, eps, schedule.coefficients(r)),
    )


def test_ddim_to_the_same_time_is_the_identity_and_to_the_clean_end_the_estimate(schedule: Schedule) -> None:
    t, _ = pair(schedule, 2.0, 0.5)
    at, clean = schedule.coefficients(t), schedule.coefficients(torch.full((4,), schedule.t_clean))
    x_t, x0 = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    assert torch.equal(transfer.ddim(x_t, x0, at, at), x_t)
    assert torch.equal(transfer.ddim(x_t, x0, at, clean), x0)


def test_inverse_ddim_is_a_right_and_a_left_inverse(schedule: Schedule) -> None:
    t, r = pair(schedule, 2.0, 0.5)
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    x_t, x0 = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    x_r = transfer.ddim(x_t, x0, at, ar)
    close(transfer.inverse_ddim(x_r, x_t, at, ar), x0, 1e-12, 1e-12)
    any_x_r = normal(4, *SHAPE, seed=2)
    close(transfer.ddim(x_t, transfer.inverse_ddim(any_x_r, x_t, at, ar), at, ar), any_x_r, 1e-12, 1e-12)


def test_inverse_ddim_on_edm_is_the_target_of_the_consistency_repository() -> None:
    schedule, x_t, x_r = EDMSchedule(), normal(4, *SHAPE), normal(4, *SHAPE, seed=2)
    t, r = pair(schedule, 3.0, 1.0)
    target = transfer.inverse_ddim(x_r, x_t, schedule.coefficients(t), schedule.coefficients(r))
    close(target, x_t - 3.0 * (x_r - x_t) / (1.0 - 3.0))


def test_one_ddim_step_of_a_gaussian_is_kappa(schedule: Schedule) -> None:
    model, x_t = teacher(schedule), normal(4, *SHAPE)
    t, r = pair(schedule, 2.0, 0.5)
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    stepped = transfer.ddim(x_t, denoise(model)(x_t, t), at, ar)
    mean, c = model.mean(Condition.none(4)), model._variances.reshape(SHAPE)
    a, s, b, q = (expand(x, x_t) for x in (*at, *ar))
    close(stepped, b * mean + (a * b * c + s * q) / (a**2 * c + s**2) * (x_t - a * mean))


def test_euler_on_straight_paths_is_ddim() -> None:
    schedule = RectifiedFlowSchedule()
    t, r = torch.tensor([1.0, 0.7], dtype=F64), torch.tensor([0.4, 0.0], dtype=F64)
    x_t, x0 = normal(2, 3), normal(2, 3, seed=1)
    eps = (x_t - expand(1 - t, x_t) * x0) / expand(t, x_t)
    close(transfer.euler(x_t, eps - x0, t, r), transfer.ddim(x_t, x0, schedule.coefficients(t), schedule.coefficients(r)))
    close(transfer.euler(x_t, torch.ones_like(x_t), t, r), x_t + (r - t)[:, None])


# Keeping the marginals ------------------------------------------------------------------------------------------------


def moments_after(step: Callable[[Tensor, Tensor], Tensor], mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of step(x, z), affine per sample, for x ~ N(mean, variance) and z ~ N(0, 1), exactly."""
    zero = torch.zeros_like(mean)
    shift = step(zero, zero)
    gain, noise = step(torch.ones_like(mean), zero) - shift, step(zero, torch.ones_like(mean)) - shift
    return gain * mean + shift, gain**2 * variance + noise**2


def test_renoise_keeps_the_marginals(schedule: Schedule) -> None:
    q, r = pair(schedule, 2.0, 0.5)
    aq, ar = schedule.coefficients(q), schedule.coefficients(r)
    m, c = normal(4, 3), 0.2 + normal(4, 3, seed=1) ** 2
    a, s = expand(ar.alpha, m), expand(ar.sigma, m)
    mean, variance = moments_after(lambda x, z: transfer.renoise(x, z, ar, aq), a * m, a**2 * c + s**2)
    a, s = expand(aq.alpha, m), expand(aq.sigma, m)
    close(mean, a * m)
    close(variance, a**2 * c + s**2)
    x = normal(4, 3, seed=2)
    close(transfer.renoise(x, torch.ones_like(x), ar, ar), x, 0, 1e-7)


def test_renoise_in_the_formulas_of_three_paths() -> None:
    x, z = torch.tensor([[2.0]], dtype=F64), torch.tensor([[1.0]], dtype=F64)

    def run(schedule: Schedule, r: float, q: float) -> float:
        low, high = torch.tensor([r], dtype=F64), torch.tensor([q], dtype=F64)
        return transfer.renoise(x, z, schedule.coefficients(low), schedule.coefficients(high)).item()

    assert run(EDMSchedule(), 3.0, 5.0) == pytest.approx(2 + 4)
    assert run(RectifiedFlowSchedule(), 0.2, 0.6) == pytest.approx(2 * 0.5 + (0.36 - 0.01) ** 0.5)
    vp = linear_vp()
    ratio = float(vp.alphas_cumprod[700] / vp.alphas_cumprod[300])
    assert run(vp, 300, 700) == pytest.approx(2 * ratio**0.5 + (1 - ratio) ** 0.5)


STOCHASTIC = {
    **{f"ddim_eta_{eta}": (lambda x, x0, z, t, r, eta=eta: transfer.ddim_eta(x, x0, z, t, r, eta)) for eta in (0.0, 0.5, 1.0)},
    **{f"sde_{eta}": (lambda x, x0, z, t, r, eta=eta: transfer.sde(x, x0, z, t, r, eta)) for eta in (0.0, 0.5, 1.0, 1.4)},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_steps_leave_noisy_points_exactly_distributed(schedule: Schedule, name: str) -> None:
    """For data at one point the denoiser is constant, and every eta must map N(a_t x0, s_t^2) to N(a_r x0, s_r^2) exactly."""
    t, r = pair(schedule, 2.0, 0.5)
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    x0 = normal(4, 3)
    mean, variance = moments_after(
        lambda x, z: STOCHASTIC[name](x, x0, z, at, ar), expand(at.alpha, x0) * x0, (expand(at.sigma, x0) ** 2).expand_as(x0)
    )
    close(mean, expand(ar.alpha, x0) * x0)
    close(variance, (expand(ar.sigma, x0) ** 2).expand_as(x0))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_steps_approach_the_marginals_of_a_gaussian(name: str) -> None:
    """The mean stays exact, and the error of the variance at the end of N steps halves when N doubles (weak order one)."""
    schedule, m, c = SCHEDULES["vp"], 0.7, 0.3
    model = GaussianTeacher(torch.tensor([m], dtype=F64), c, schedule)

    def errors(num_steps: int) -> Tensor:
        levels = torch.logspace(0.5, -1.0, num_steps + 1, dtype=F64)
        grid = schedule.time_of_lambda(-levels.log())
        point = schedule.coefficients(grid[:1])
        mean, variance = point.alpha[:, None] * m, point.alpha[:, None] ** 2 * c + point.sigma[:, None] ** 2
        for t, r in zip(grid[:-1, None], grid[1:, None], strict=True):
            at, ar = schedule.coefficients(t), schedule.coefficients(r)
            mean, variance = moments_after(
                lambda x, z, t=t, at=at, ar=ar: STOCHASTIC[name](x, denoise(model)(x, t), z, at, ar), mean, variance
            )
        point = schedule.coefficients(grid[-1:])
        close(mean, point.alpha[:, None] * m)
        return variance - point.alpha[:, None] ** 2 * c - point.sigma[:, None] ** 2

    coarse, fine = float(errors(40)), float(errors(80))
    assert abs(fine) < 0.02 and 1.8 < coarse / fine < 2.2


def test_eta_one_is_the_ddpm_posterior_and_first_order_sde(schedule: Schedule) -> None:
    t, r = pair(schedule, 2.0, 0.5)
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    x, x0, z = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    close(transfer.ddim_eta(x, x0, z, at, ar, 1.0), transfer.sde(x, x0, z, at, ar))
    # The product of the forward kernel r -> t and the marginal at r given x0, in information form.
    scale, kernel = at.alpha / ar.alpha, at.sigma**2 - (at.alpha / ar.alpha * ar.sigma) ** 2
    precision = scale**2 / kernel + 1 / ar.sigma**2
    mean = (expand(scale / kernel, x) * x + expand(ar.alpha / ar.sigma**2, x) * x0) / expand(precision, x)
    close(transfer.ddim_eta(x, x0, z, at, ar, 1.0), mean + z / expand(precision, x).sqrt())


def test_eta_zero_is_ddim_whatever_the_noise(schedule: Schedule) -> None:
    t, r = pair(schedule, 2.0, 0.5)
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    x, x0, z = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    close(transfer.ddim_eta(x, x0, z, at, ar, 0.0), transfer.ddim(x, x0, at, ar))
    assert torch.equal(transfer.sde(x, x0, z, at, ar, 0.0), transfer.ddim(x, x0, at, ar))


def test_stochastic_steps_are_finite_at_both_ends(schedule: Schedule) -> None:
    x, x0, z = normal(1, 3), normal(1, 3, seed=1), normal(1, 3, seed=2)
    top, mid, clean = (schedule.coefficients(times(schedule, f)) for f in (1.0, 0.5, 0.0))
    for step in STOCHASTIC.values():
        close(step(x, x0, z, mid, clean), x0)
        assert bool(torch.isfinite(step(x, x0, z, top, mid)).all())
    noise = Coefficients(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    close(transfer.sde(x, x0, z, noise, mid), transfer.add_noise(x0, z, mid))  # nothing of x_t is kept
    assert bool(torch.isfinite(transfer.sde(x, x0, z, noise, clean)).all())


def test_a_step_of_no_length_needs_no_noise_below_rounding(schedule: Schedule) -> None:
    """Rounding may put the two times of such a step in the wrong order; the variance must count as 0, not as NaN."""
    x, x0 = normal(50, 3), normal(50, 3, seed=1)
    t = times(schedule, *torch.linspace(0.1, 0.9, 50).tolist())
    at, above = schedule.coefficients(t), schedule.coefficients(t * (1 + 1e-14))
    for r in (at, above):
        close(transfer.ddim_eta(x, x0, torch.ones_like(x), at, r, 1.0), x, 0, 1e-5)
        close(transfer.renoise(x, torch.ones_like(x), r, at), x, 0, 1e-5)
    close(
        transfer.ddim_eta(x, x0, torch.zeros_like(x), at, schedule.coefficients(t * 0.5), 3.0),
        expand(schedule.alpha(t * 0.5), x) * x0,
    )  # eta beyond its range leaves no room for x_t, and no NaN


# Solvers --------------------------------------------------------------------------------------------------------------


def run_solver(name: str, fn: transfer.Denoise, x: Tensor, grid: Tensor, schedule: Schedule) -> Tensor:
    """Carry x along the times of a grid, (N + 1,)."""
    previous: tuple[Tensor | None, Coefficients | None] = (None, None)
    for i in range(len(grid) - 1):
        t, r = grid[i].expand(len(x)), grid[i + 1].expand(len(x))
        at, ar = schedule.coefficients(t), schedule.coefficients(r)
        if name == "heun":
            x = transfer.heun(fn, x, t, r, schedule)
            continue
        x0 = fn(x, t)
        if name == "euler":
            eps = (x - expand(at.alpha, x) * x0) / expand(at.sigma, x)
            x = transfer.euler(x, expand(schedule.alpha_dot(t), x) * x0 + expand(schedule.sigma_dot(t), x) * eps, t, r)
        elif name == "ddim":
            x = transfer.ddim(x, x0, at, ar)
        else:
            x, previous = transfer.dpmpp_2m(x, x0, previous[0], at, ar, previous[1]), (x0, at)
    return x


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_at_their_order(schedule: Schedule, name: str, order: int) -> None:
    model, x = teacher(schedule), normal(2, *SHAPE)

    def error(num_steps: int) -> float:
        levels = torch.logspace(1.0, -1.0, num_steps + 1, dtype=F64)
        grid = schedule.time_of_lambda(-levels.log())
        exact = model.flow_map(x, grid[:1].expand(2), grid[-1:].expand(2), Condition.none(2))
        return float((run_solver(name, denoise(model), x, grid, schedule) - exact).abs().max())

    coarse, fine = error(40), error(80)
    assert fine < 0.05
    assert 2 ** (order - 0.25) < coarse / fine < 2 ** (order + 0.35)


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_solvers_converge_to_the_integrated_flow_of_a_mixture(name: str) -> None:
    schedule = EDMSchedule()
    model = MixtureTeacher(torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=F64), torch.tensor([0.1, 0.3], dtype=F64), schedule)
    x = 3 * normal(4, 2)
    ends = torch.tensor([3.0, 0.3], dtype=F64)
    exact = model.flow_map(x, ends[:1].expand(4), ends[1:].expand(4), Condition.none(4))

    def error(num_steps: int) -> float:
        grid = torch.logspace(float(ends[0].log10()), float(ends[1].log10()), num_steps + 1, dtype=F64)
        return float((run_solver(name, denoise(model), x, grid, schedule) - exact).abs().max())

    order = {"ddim": 1, "heun": 2}[name]
    assert 2 ** (order - 0.25) < error(30) / error(60) < 2 ** (order + 0.35)


def test_one_heun_step_of_a_gaussian_is_its_closed_form(schedule: Schedule) -> None:
    model, x_t = teacher(schedule), normal(4, *SHAPE)
    t, r = pair(schedule, 2.0, 0.5)
    mean = model.mean(Condition.none(4))
    gain = model.heun_kappa(t, r).reshape(4, *SHAPE)
    expected = expand(schedule.alpha(r), x_t) * mean + gain * (x_t - expand(schedule.alpha(t), x_t) * mean)
    close(transfer.heun(denoise(model), x_t, t, r, schedule), expected)
    close(transfer.heun(denoise(model), x_t, t, r, schedule, x0=denoise(model)(x_t, t)), expected)


def test_heun_is_the_same_in_all_coordinates() -> None:
    x0, eps = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    clean = []
    for schedule in SCHEDULES.values():
        t, r = pair(schedule, 2.0, 0.5)
        x_t = transfer.add_noise(x0, eps, schedule.coefficients(t))
        x_r = transfer.heun(denoise(teacher(schedule)), x_t, t, r, schedule)
        clean.append(x_r / expand(schedule.alpha(r), x_r))
    for other in clean[1:]:
        close(other, clean[0])


def test_heun_takes_the_euler_step_where_a_sample_lands_clean(schedule: Schedule) -> None:
    model, x_t = teacher(schedule), normal(2, *SHAPE)
    t = pair(schedule, 2.0, 0.5)[0][:2]
    r = torch.stack([torch.tensor(schedule.t_clean, dtype=F64), pair(schedule, 2.0, 0.5)[1][0]])
    asked: list[Tensor] = []

    def fn(x: Tensor, s: Tensor) -> Tensor:
        asked.append(s)
        return denoise(model)(x, s)

    x_t.requires_grad_()
    both = transfer.heun(fn, x_t, t, r, schedule)
    close(both[0], denoise(model)(x_t, t)[0])
    close(both[1], transfer.heun(denoise(model), x_t[1:], t[1:], r[1:], schedule)[0])
    assert len(asked) == 2 and asked[1].tolist() == [t[0].item(), r[1].item()]  # never asked at the clean end
    assert bool(torch.isfinite(torch.autograd.grad(both.sum(), x_t)[0]).all())


def test_heun_from_pure_noise_is_finite_and_of_second_order() -> None:
    """alpha = 0 there: (x/alpha, sigma/alpha) is infinite, (x/sigma, alpha/sigma) is not."""
    schedule = RectifiedFlowSchedule()
    model, x = teacher(schedule), normal(2, *SHAPE).requires_grad_()

    def error(step: float) -> Tensor:
        t, r = torch.ones(2, dtype=F64), torch.full((2,), 1 - step, dtype=F64)
        return transfer.heun(denoise(model), x, t, r, schedule) - model.flow_map(x, t, r, Condition.none(2))

    assert float(error(0.02).abs().max() / error(0.01).abs().max()) > 6.5  # a second-order method errs by h^3 in one step
    assert 0 < float(error(0.02).detach().abs().max()) < 1e-6
    assert bool(torch.isfinite(torch.autograd.grad(error(0.1).sum(), x)[0]).all())
    one = transfer.heun(denoise(model), x, torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64), schedule)
    close(one, denoise(model)(x, torch.ones(2, dtype=F64)))


def test_dpmpp_2m_is_first_order_without_a_past_and_where_it_lands_clean(schedule: Schedule) -> None:
    t, r = pair(schedule, 2.0, 0.5)
    at, ar, before = schedule.coefficients(t), schedule.coefficients(r), schedule.coefficients(pair(schedule, 5.0, 1.0)[0])
    x, x0, x0_before = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    clean = schedule.coefficients(torch.full((4,), schedule.t_clean))
    close(transfer.dpmpp_2m(x, x0, x0_before, at, clean, before), x0)
    close(transfer.dpmpp_2m(x, x0, None, at, ar, before), transfer.ddim(x, x0, at, ar))
    close(transfer.dpmpp_2m(x, x0, x0_before, at, ar, None), transfer.ddim(x, x0, at, ar))
    # h = log 4 and h0 = log 2.5: the estimate is extrapolated by h / (2 h0) of its last change.
    h, h0 = torch.tensor(4.0, dtype=F64).log(), torch.tensor(2.5, dtype=F64).log()
    expected = transfer.ddim(x, x0 + h / (2 * h0) * (x0 - x0_before), at, ar)
    close(transfer.dpmpp_2m(x, x0, x0_before, at, ar, before), expected)
    noise = Coefficients(torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64))
    close(transfer.dpmpp_2m(x, x0, x0_before, at, ar, noise), transfer.ddim(x, x0, at, ar))  # infinitely long ago


@pytest.mark.parametrize(("name", "expected"), [("ddim", 0.0058052), ("heun", 0.0072145), ("exact", 0.0068464)])
def test_consistency_fixed_points_of_euler_and_heun(name: str, expected: float) -> None:
    """Slope of the exact discrete consistency function: c = 0.3, 18 Karras points on [0.002, 80], zero mean."""
    schedule = EDMSchedule()
    model = GaussianTeacher(torch.zeros(1, dtype=F64), 0.3, schedule)
    grid = grids.karras(schedule, 18).times
    assert len(grid) == 18
    x = torch.ones(1, 1, dtype=F64)
    if name == "exact":
        slope = model.flow_map(x, grid[:1], grid[-1:], Condition.none(1))
    else:
        slope = run_solver(name, denoise(model), x, grid, schedule)
        kappa = {"ddim": model.kappa, "heun": model.heun_kappa}[name]
        close(kappa(grid[:-1], grid[1:]).prod(0), slope[0])
    assert slope.item() == pytest.approx(expected, abs=5e-8)


def test_steps_keep_float32_and_widen_half(schedule: Schedule) -> None:
    t, r = pair(schedule, 2.0, 0.5)
    at, ar = schedule.coefficients(t), schedule.coefficients(r)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(4, 3, dtype=dtype)
        outputs = [
            transfer.add_noise(x, x, at),
            transfer.ddim(x, x, at, ar),
            transfer.inverse_ddim(x, x, at, ar),
            transfer.ddim_eta(x, x, x, at, ar, 1.0),
            transfer.renoise(x, x, ar, at),
            transfer.sde(x, x, x, at, ar),
            transfer.dpmpp_2m(x, x, x, at, ar, schedule.coefficients(t)),
            transfer.euler(x, x, t, r),
            transfer.heun(lambda y, s: y, x, t, r, schedule),
        ]
        assert all(output.dtype == torch.float32 for output in outputs)


@pytest.mark.parametrize("batch", [4])
def test_coefficients_of_a_wrong_shape_are_refused(batch: int) -> None:
    x = torch.ones(batch, batch)
    wide = Coefficients(torch.ones(batch, batch), torch.ones(batch, batch))
    for call in (
        lambda: transfer.add_noise(x, x, wide),
        lambda: transfer.ddim(x, x, wide, wide),
        lambda: transfer.renoise(x, x, wide, wide),
        lambda: transfer.euler(x, x, x, x),
    ):
        with pytest.raises(ValueError, match="per-sample"):
            call()


def test_nothing_leaves_the_device_or_reads_a_value_back(schedule: Schedule) -> None:
    """On the meta device a constant left behind, or a value read by the host, is an error."""
    x, t = torch.zeros(4, 3, device="meta"), torch.zeros(4, dtype=F64, device="meta")
    at, other = schedule.coefficients(t), RectifiedFlowSchedule()
    outputs = [
        schedule.alpha_dot(t),
        schedule.sigma_dot(t),
        schedule.lambda_(t),
        schedule.time_of_lambda(t),
        at.noise_to_signal,
        *change_coordinates(x, t, schedule, other),
        *change_coordinates(x, t, other, schedule),
        transfer.add_noise(x, x, at),
        transfer.ddim(x, x, at, at),
        transfer.inverse_ddim(x, x, at, at),
        transfer.ddim_eta(x, x, x, at, at, 1.0),
        transfer.renoise(x, x, at, at),
        transfer.sde(x, x, x, at, at),
        transfer.dpmpp_2m(x, x, x, at, at, at),
        transfer.euler(x, x, t, t),
        transfer.heun(lambda y, s: y, x, t, t, schedule),
        losses.progressive_target(lambda y, s: y, x, t, t, t, schedule),
        losses.surrogate(x, losses.dmd_gradient(x, x0_real=x, x0_fake=x, factor=t)),
        losses.pseudo_huber_vector(x, x, 0.0),
        losses.fake_score_loss(x, x, t),
        weighting.truncated_snr(*at),
        weighting.edm(*at),
        weighting.inverse_gap(t, t),
        weighting.ect_next_level(t, 2),
        *edm_preconditioning(t),
        *consistency_preconditioning(t),
        *lcm_boundary(t),
    ]
    outputs += [Prediction(kind, x, x, *at).score for kind in KINDS]
    assert all(output.device.type == "meta" for output in outputs)


# Independent code -----------------------------------------------------------------------------------------------------


def predicted_noise(x: Tensor, t: int) -> Tensor:
    """A smooth made-up network output."""
    return torch.sin(x + t / 500) * 0.8


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_equals_diffusers(eta: float, set_alpha_to_one: bool, spacing: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing=spacing,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
        steps_offset=1 if spacing == "leading" else 0,
        beta_schedule="scaled_linear",
    )
    schedule = schedule_from_diffusers(scheduler)
    scheduler.set_timesteps(8)
    end = "clean" if set_alpha_to_one else "first"
    if spacing == "leading":
        grid = grids.leading(schedule, 8, 1, end=end)
    else:
        grid = grids.at_times(schedule, scheduler.timesteps.tolist(), end=end)
    x = y = normal(2, 1, 4, 4)
    for t, (now, then) in zip(scheduler.timesteps.tolist(), grid.pairs(), strict=True):
        z = normal(2, 1, 4, 4, seed=t)
        y = scheduler.step(predicted_noise(y, t), t, y, eta=eta, variance_noise=z).prev_sample
        at, ar = (schedule.coefficients(torch.full((2,), s, dtype=F64)) for s in (now, then))
        x0 = (x - expand(at.sigma, x) * predicted_noise(x, t)) / expand(at.alpha, x)
        x = transfer.ddim_eta(x, x0, z, at, ar, eta)
        close(x, y, 1e-4, 1e-4)  # diffusers keeps its table in float32


@pytest.mark.parametrize("num_steps", [4, 20])
def test_dpmpp_2m_equals_diffusers(num_steps: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    schedule = schedule_from_diffusers(scheduler)
    scheduler.set_timesteps(num_steps)
    grid = grids.at_times(schedule, scheduler.timesteps.tolist())
    x = y = normal(2, 1, 4, 4)
    previous: tuple[Tensor | None, Coefficients | None] = (None, None)
    for t, (now, then) in zip(scheduler.timesteps.tolist(), grid.pairs(), strict=True):
        y = scheduler.step(predicted_noise(y, t), t, y).prev_sample
        at, ar = (schedule.coefficients(torch.full((2,), s, dtype=F64)) for s in (now, then))
        x0 = (x - expand(at.sigma, x) * predicted_noise(x, t)) / expand(at.alpha, x)
        x, previous = transfer.dpmpp_2m(x, x0, previous[0], at, ar, previous[1]), (x0, at)
        close(x, y, 1e-4, 1e-4)


def test_renoising_equals_the_lcm_scheduler() -> None:
    # In float64 with timestep_scaling so large that its boundary scalings are 0 and 1: x0, then fresh noise.
    scheduler = diffusers.LCMScheduler(timestep_scaling=1e9, clip_sample=False)
    schedule = schedule_from_diffusers(scheduler)
    scheduler.set_timesteps(4)
    x = y = normal(2, 1, 4, 4)
    pairs = list(grids.lcm(schedule, 4).pairs())
    generator, ours = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for k, (t, (now, then)) in enumerate(zip(scheduler.timesteps.tolist(), pairs, strict=True)):
        y = scheduler.step(predicted_noise(y, t), t, y, generator=generator).prev_sample
        at, ar = (schedule.coefficients(torch.full((2,), s, dtype=F64)) for s in (now, then))
        x0 = (x - expand(at.sigma, x) * predicted_noise(x, t)) / expand(at.alpha, x)
        x = x0 if k == 3 else transfer.renoise_x0(x0, torch.randn(x.shape, generator=ours, dtype=F64), ar)
        close(x, y, 1e-4, 1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_on_straight_paths_equals_flow_match_euler(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = RectifiedFlowSchedule(shift)
    scheduler.set_timesteps(sigmas=(torch.arange(4, 0, -1) / 4).tolist())
    x = y = normal(2, 1, 4, 4)
    for t, (now, then) in zip(scheduler.timesteps, grids.flow(schedule, 4).pairs(), strict=True):
        y = scheduler.step(predicted_noise(y, int(t)), t, y).prev_sample
        at, ar = (schedule.coefficients(torch.full((2,), s, dtype=F64)) for s in (now, then))
        flow = predicted_noise(x, int(t))
        x = transfer.ddim(x, (x - expand(at.sigma, x) * flow) / expand(at.alpha + at.sigma, x), at, ar)
        close(x, y.double(), 1e-5, 1e-5)


def test_ddim_on_edm_equals_edm_euler() -> None:
    scheduler, schedule = diffusers.EDMEulerScheduler(prediction_type="epsilon", sigma_data=0.5), EDMSchedule()
    scheduler.set_timesteps(6)
    grid = grids.karras(schedule, 6, end="clean")
    x = y = 80 * normal(2, 1, 4, 4)
    for t, (now, then) in zip(scheduler.timesteps, grid.pairs(), strict=True):
        sigma = torch.full((2,), now, dtype=F64)
        x0 = scheduler.precondition_outputs(x, predicted_noise(x / now, 0), torch.tensor(now, dtype=F64))
        scheduler.scale_model_input(y, t)
        y = scheduler.step(predicted_noise(y / now, 0), t, y).prev_sample
        x = transfer.ddim(x, x0, schedule.coefficients(sigma), schedule.coefficients(torch.full((2,), then, dtype=F64)))
        close(x, y.double(), 1e-4, 1e-4)


def test_ddim_in_vp_coordinates_equals_euler_discrete_in_its_own() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
    schedule = schedule_from_diffusers(scheduler)
    scheduler.set_timesteps(5)
    grid = grids.trailing(schedule, 5)
    x = normal(2, 1, 4, 4)
    y = x / schedule.alpha(torch.tensor(999.0))  # the scheduler's states are x / alpha
    for t, (now, then) in zip(scheduler.timesteps, grid.pairs(), strict=True):
        assert float(t) == now
        at, ar = (schedule.coefficients(torch.full((2,), s, dtype=F64)) for s in (now, then))
        y = scheduler.step(predicted_noise(scheduler.scale_model_input(y, t), int(t)), t, y).prev_sample
        x0 = (x - expand(at.sigma, x) * predicted_noise(x, int(t))) / expand(at.alpha, x)
        x = transfer.ddim(x, x0, at, ar)
        close(x / expand(ar.alpha, x), y.double(), 1e-4, 1e-4)
