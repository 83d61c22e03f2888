"""Schedules: coefficients against their formulas and diffusers' tables, derivatives against differences, exact coordinates."""

from __future__ import annotations

import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from schedule_cases import SCHEDULES, linear_vp, times

from diffdistill.math.schedules import (
    Coefficients,
    EDMSchedule,
    RectifiedFlowSchedule,
    Schedule,
    TrigFlowSchedule,
    VPSchedule,
    change_coordinates,
    expand,
    schedule_from_diffusers,
)

BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def close(actual: torch.Tensor, expected: torch.Tensor | float, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=atol)


# Formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_vp_equals_diffusers_table_at_every_integer(beta_schedule: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=beta_schedule)
    schedule = schedule_from_diffusers(scheduler)
    abar = scheduler.alphas_cumprod.double()
    t = torch.arange(1000, dtype=torch.float64)
    close(schedule.alpha(t), abar.sqrt())
    close(schedule.sigma(t), (1 - abar).sqrt())
    close(schedule.lambda_(t), 0.5 * (abar / (1 - abar)).log(), atol=1e-10)
    assert (schedule.t_clean, schedule.t_max) == (-1.0, 999.0)


def test_vp_is_log_linear_between_the_integers_and_down_to_minus_one() -> None:
    schedule = linear_vp()
    t = np.linspace(-1, 999, 4321)
    log_abar = np.interp(t, np.arange(-1, 1000), np.concatenate([[0.0], schedule.alphas_cumprod.log().numpy()]))
    close(schedule.alpha(torch.from_numpy(t)), torch.from_numpy(np.exp(log_abar / 2)))
    close(schedule.sigma(torch.from_numpy(t)), torch.from_numpy(np.sqrt(-np.expm1(log_abar))))


def test_vp_stays_at_its_ends_outside_its_range() -> None:
    schedule = linear_vp()
    last = float(schedule.alphas_cumprod[-1]) ** 0.5
    close(schedule.alpha(torch.tensor([-5.0, 2000.0])), torch.tensor([1.0, last], dtype=torch.float64))


def test_edm_flow_and_trig_formulas() -> None:
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    edm = EDMSchedule()
    close(edm.alpha(t), 1.0)
    close(edm.sigma(t), t)
    assert (edm.t_clean, edm.t_max, edm.sigma_min) == (0.0, 80.0, 0.002)
    for shift in (1.0, 3.0, 0.5):
        flow = RectifiedFlowSchedule(shift)
        close(flow.sigma(t), shift * t / (1 + (shift - 1) * t))
        close(flow.alpha(t), 1 - shift * t / (1 + (shift - 1) * t))
        close(flow.time_of_sigma(flow.sigma(t)), t)
        assert (flow.t_clean, flow.t_max) == (0.0, 1.0)
    trig = TrigFlowSchedule(0.5)
    close(trig.alpha(t), t.cos())
    close(trig.sigma(t), 0.5 * t.sin())
    assert (trig.t_clean, trig.t_max) == (0.0, math.pi / 2)
    close(TrigFlowSchedule().sigma(t), t.sin())
    close(RectifiedFlowSchedule().sigma(t), t)


def test_flow_shift_equals_the_shift_of_flow_match_euler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = torch.linspace(1, 1000, 1000, dtype=torch.float64) / 1000
    ours = schedule_from_diffusers(scheduler).sigma(t).flip(0)
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)


def test_the_clean_end_has_no_noise_and_pure_noise_no_signal(schedule: Schedule) -> None:
    clean = torch.tensor([schedule.t_clean])
    close(schedule.alpha(clean), 1.0)
    assert schedule.sigma(clean).tolist() == [0.0]
    assert schedule.lambda_(clean).tolist() == [math.inf]
    assert RectifiedFlowSchedule(3.0).alpha(torch.tensor([1.0])).tolist() == [0.0]


def test_lambda_is_the_log_of_the_signal_to_noise_ratio_and_falls(schedule: Schedule) -> None:
    t = times(schedule, *torch.linspace(0.001, 0.999, 50).tolist())
    close(schedule.lambda_(t), (schedule.alpha(t) / schedule.sigma(t)).log(), atol=1e-10)
    assert bool((schedule.lambda_(t).diff() < 0).all())


def test_coefficients_are_alpha_and_sigma_and_their_ratio(schedule: Schedule) -> None:
    t = times(schedule, 0.2, 0.7)
    point = schedule.coefficients(t)
    close(point.alpha, schedule.alpha(t))
    close(point.sigma, schedule.sigma(t))
    close(point.noise_to_signal, schedule.sigma(t) / schedule.alpha(t))


# Derivatives ----------------------------------------------------------------------------------------------------------


def test_derivatives_equal_autograd_and_central_differences(schedule: Schedule) -> None:
    t = times(schedule, 0.1234, 0.4321, 0.6789, 0.9123).requires_grad_()
    h = 1e-5 * (schedule.t_max - schedule.t_clean)
    for function, derivative in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        exact = derivative(t.detach())
        value = function(t).sum()
        if value.requires_grad:
            close(exact, torch.autograd.grad(value, t)[0])
        difference = (function(t.detach() + h) - function(t.detach() - h)) / (2 * h)
        torch.testing.assert_close(exact, difference, rtol=1e-6, atol=1e-9)


def test_vp_derivative_at_an_integer_is_the_right_one() -> None:
    schedule, h = linear_vp(), 1e-6
    t = torch.tensor([-1.0, 0.0, 500.0])
    difference = (schedule.alpha(t.double() + h) - schedule.alpha(t)) / h
    torch.testing.assert_close(schedule.alpha_dot(t), difference, rtol=1e-4, atol=0)
    last = torch.tensor([999.0])
    torch.testing.assert_close(
        schedule.alpha_dot(last), (schedule.alpha(last) - schedule.alpha(last.double() - h)) / h, rtol=1e-4, atol=0
    )


# Inverse of lambda ----------------------------------------------------------------------------------------------------


def test_time_of_lambda_inverts_lambda_up_to_the_ends(schedule: Schedule) -> None:
    t = times(schedule, *torch.linspace(0.0005, 0.9995, 400).tolist())
    close(schedule.time_of_lambda(schedule.lambda_(t)), t, atol=1e-9)
    assert schedule.time_of_lambda(torch.tensor([math.inf])).tolist() == [schedule.t_clean]
    assert schedule.time_of_lambda(torch.tensor([-math.inf])).tolist() == [schedule.t_max]
    assert RectifiedFlowSchedule(3.3).time_of_lambda(torch.tensor([-math.inf])).tolist() == [1.0]  # not a rounding above 1
    ends = torch.tensor([schedule.t_clean, schedule.t_max], dtype=torch.float64)
    close(schedule.time_of_lambda(schedule.lambda_(ends)), ends, atol=1e-9)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_time_of_lambda_inverts_at_every_integer_of_a_table(beta_schedule: str) -> None:
    schedule = schedule_from_diffusers(diffusers.DDPMScheduler(beta_schedule=beta_schedule))
    t = torch.arange(-1, 1000, dtype=torch.float64)
    close(schedule.time_of_lambda(schedule.lambda_(t)), t, atol=1e-9)


def test_time_of_lambda_is_exact_in_lambda_at_very_low_signal() -> None:
    schedule = VPSchedule(torch.logspace(-1e-4, -12, 50, dtype=torch.float64))  # log abar down to -28
    lam = schedule.lambda_(torch.linspace(0, 49, 200, dtype=torch.float64))
    close(schedule.lambda_(schedule.time_of_lambda(lam)), lam, atol=1e-12)


# Types and refusals ---------------------------------------------------------------------------------------------------


def test_times_of_any_dtype_and_shape_give_float64(schedule: Schedule) -> None:
    for t in (torch.tensor([0, 1]), torch.tensor([[0.25, 1.0]]), torch.tensor(1.0)):
        for function in (
            schedule.alpha,
            schedule.sigma,
            schedule.alpha_dot,
            schedule.sigma_dot,
            schedule.lambda_,
            schedule.time_of_lambda,
        ):
            assert function(t).dtype == torch.float64 and function(t).shape == t.shape


def test_expand_refuses_everything_but_one_number_per_sample() -> None:
    images = torch.zeros(4, 3, 5, 4, dtype=torch.bfloat16)
    assert expand(torch.ones(4, dtype=torch.float64), images).shape == (4, 1, 1, 1)
    assert expand(torch.ones(4, dtype=torch.float64), images).dtype == torch.float32
    assert expand(torch.ones(4, dtype=torch.float32), images.double()).dtype == torch.float64
    for wrong in (torch.ones(1), torch.tensor(1.0), torch.ones(3), torch.ones(4, 4), torch.ones(4, 1, 1, 1)):
        with pytest.raises(ValueError, match="per-sample coefficient"):
            expand(wrong, images)


def test_a_batch_as_large_as_the_width_scales_samples_not_columns() -> None:
    images = torch.ones(4, 1, 4, 4)
    scaled = expand(torch.arange(4.0), images) * images
    for k in range(4):
        assert bool((scaled[k] == k).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPSchedule(torch.tensor([0.9])),
        lambda: VPSchedule(torch.tensor([[0.9, 0.5], [0.8, 0.4]])),
        lambda: VPSchedule(torch.tensor([0.9, 0.9])),
        lambda: VPSchedule(torch.tensor([0.5, 0.9])),
        lambda: VPSchedule(torch.tensor([1.0, 0.5])),
        lambda: VPSchedule(torch.tensor([0.5, 0.0])),
        lambda: EDMSchedule(sigma_min=-0.1),
        lambda: EDMSchedule(sigma_min=2.0, sigma_max=2.0),
        lambda: RectifiedFlowSchedule(0.0),
        lambda: TrigFlowSchedule(0.0),
    ],
)
def test_impossible_schedules_are_refused(make) -> None:
    with pytest.raises(ValueError, match="must be|need"):
        make()


def test_edm_may_start_at_zero() -> None:
    assert EDMSchedule(sigma_min=0.0, sigma_max=1.0).t_max == 1.0


def test_the_smallest_table_has_two_entries() -> None:
    close(VPSchedule(torch.tensor([0.9, 0.5])).alpha(torch.tensor([1.0])), math.sqrt(0.5))


def test_schedules_are_read_from_every_kind_of_scheduler() -> None:
    vp = schedule_from_diffusers(diffusers.DPMSolverMultistepScheduler())
    assert isinstance(vp, VPSchedule) and vp.num_timesteps == 1000
    assert isinstance(schedule_from_diffusers(diffusers.EulerDiscreteScheduler()), VPSchedule)
    edm = schedule_from_diffusers(diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0))
    assert isinstance(edm, EDMSchedule) and (edm.sigma_min, edm.t_max) == (0.01, 50.0)
    for scheduler, shift in (
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (diffusers.FlowMatchEulerDiscreteScheduler(), 1.0),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), 1.0),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0), 5.0),
    ):
        flow = schedule_from_diffusers(scheduler)
        assert isinstance(flow, RectifiedFlowSchedule) and flow.shift == shift
    with pytest.raises(ValueError, match="ScoreSdeVpScheduler"):
        schedule_from_diffusers(diffusers.schedulers.ScoreSdeVpScheduler())
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedule_from_diffusers(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))


def test_a_flow_whose_scheduler_names_no_shift_has_none() -> None:
    config = SimpleNamespace(prediction_type="flow_prediction", shift=None)
    assert schedule_from_diffusers(SimpleNamespace(config=config)).shift == 1.0


@pytest.mark.parametrize(("kind", "shift"), [("exponential", math.exp(0.825)), ("linear", 0.825)])
def test_a_dynamic_shift_grows_with_the_tokens_by_the_schedulers_law(kind: str, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type=kind,
    )
    assert schedule_from_diffusers(scheduler, num_tokens=(256 + 4096) // 2).shift == pytest.approx(shift, rel=1e-12)


# Change of coordinates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SCHEDULES)
@pytest.mark.parametrize("target", SCHEDULES)
def test_change_of_coordinates_is_exact_between_every_pair(source: str, target: str) -> None:
    a, b = SCHEDULES[source], SCHEDULES[target]
    t = times(a, 0.02, 0.3, 0.6, 0.9) if source != "edm" else torch.tensor([0.01, 0.5, 3.0, 140.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 1, 3, 3, generator=generator, dtype=torch.float64)
    x, t_target = change_coordinates(expand(a.alpha(t), x0) * x0 + expand(a.sigma(t), x0) * eps, t, a, b)
    # The same clean sample and noise, at the time of equal ratio on the other path.
    close(b.alpha(t_target) / b.sigma(t_target) / (a.alpha(t) / a.sigma(t)), 1.0, atol=1e-10)
    close(x, expand(b.alpha(t_target), x0) * x0 + expand(b.sigma(t_target), x0) * eps, atol=1e-9)


def test_change_of_coordinates_at_the_ends() -> None:
    x = torch.ones(1, 2)
    for a in SCHEDULES.values():
        for b in SCHEDULES.values():
            y, r = change_coordinates(x, torch.tensor([a.t_clean], dtype=torch.float64), a, b)
            assert r.tolist() == [b.t_clean] and y.dtype == torch.float32
            torch.testing.assert_close(y, x)
    # Pure noise on a straight path has no counterpart on EDM: its noisiest time, and noise of that size.
    y, r = change_coordinates(x, torch.tensor([1.0]), RectifiedFlowSchedule(), EDMSchedule())
    assert r.tolist() == [80.0] and y.tolist() == [[80.0, 80.0]]
    y, r = change_coordinates(x, torch.tensor([1.0]), RectifiedFlowSchedule(), linear_vp())
    assert r.tolist() == [999.0]
    close(y.double(), float(linear_vp().sigma(torch.tensor(999.0))), atol=1e-7)


def test_change_of_coordinates_has_a_forward_derivative_in_time() -> None:
    a, b, h = RectifiedFlowSchedule(3.0), linear_vp(), 1e-6
    t = torch.tensor([0.2345, 0.8], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64)
    _, (dx, dt) = torch.func.jvp(lambda s: change_coordinates(x, s, a, b), (t,), (torch.ones_like(t),))
    up, down = change_coordinates(x, t + h, a, b), change_coordinates(x, t - h, a, b)
    torch.testing.assert_close(dx, (up[0] - down[0]) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dt, (up[1] - down[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_a_point_is_a_pair_of_scales() -> None:
    alpha, sigma = Coefficients(torch.ones(1), torch.zeros(1))
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)
