"""Output types: each form against its definition from (x0, eps), not only round trips."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from schedule_cases import times

from diffdistill.math import prediction
from diffdistill.math.prediction import KINDS, Prediction, from_x0, from_x0_eps, to_eps, to_x0
from diffdistill.math.schedules import Schedule, expand


def truth(schedule: Schedule) -> dict[str, torch.Tensor]:
    """Return a state made of a known clean sample and noise, and every form written out by its definition."""
    generator = torch.Generator().manual_seed(1)
    t = times(schedule, 0.05, 0.3, 0.6, 0.95)
    x0, eps = torch.randn(2, 4, 2, 3, generator=generator, dtype=torch.float64)
    a, s = schedule.alpha(t).reshape(4, 1, 1), schedule.sigma(t).reshape(4, 1, 1)
    return {
        "x0": x0,
        "eps": eps,
        "x_t": a * x0 + s * eps,
        "alpha": schedule.alpha(t),
        "sigma": schedule.sigma(t),
        "t": t,
        "epsilon": eps,
        "sample": x0,
        "v_prediction": a * eps - s * x0,
        "flow_prediction": eps - x0,
    }


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_means_the_same_clean_sample_and_noise(schedule: Schedule, kind: str) -> None:
    c = truth(schedule)
    tolerance = 1e-12 * max(1.0, float((c["sigma"] / c["alpha"]).max()), float((c["alpha"] / c["sigma"]).max()))
    close(to_x0(kind, c[kind], c["x_t"], c["alpha"], c["sigma"]), c["x0"], tolerance)
    close(to_eps(kind, c[kind], c["x_t"], c["alpha"], c["sigma"]), c["eps"], tolerance)
    close(from_x0(kind, c["x0"], c["x_t"], c["alpha"], c["sigma"]), c[kind], tolerance * 300)
    close(from_x0_eps(kind, c["x0"], c["eps"], c["alpha"], c["sigma"]), c[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_is_readable_in_every_form(schedule: Schedule, kind: str) -> None:
    c = truth(schedule)
    tolerance = 1e-12 * max(1.0, float((c["sigma"] / c["alpha"]).max()), float((c["alpha"] / c["sigma"]).max())) * 300
    p = Prediction(kind, c[kind], c["x_t"], c["alpha"], c["sigma"])
    close(p.x0, c["x0"], tolerance)
    close(p.eps, c["eps"], tolerance)
    close(p.v, c["v_prediction"], tolerance)
    close(p.flow, c["flow_prediction"], tolerance)
    for other in KINDS:
        close(p.as_kind(other), c[other], tolerance)
    # The score of N(alpha x0, sigma^2), and the velocity of the straight path through x0 and eps.
    s = expand(c["sigma"], c["x_t"])
    torch.testing.assert_close(p.score, (expand(c["alpha"], c["x_t"]) * c["x0"] - c["x_t"]) / s**2, rtol=1e-9, atol=1e-9)
    a_dot, s_dot = schedule.alpha_dot(c["t"]), schedule.sigma_dot(c["t"])
    close(p.velocity(a_dot, s_dot), expand(a_dot, s) * c["x0"] + expand(s_dot, s) * c["eps"], tolerance)


def test_velocity_is_the_time_derivative_of_the_path(schedule: Schedule) -> None:
    c, h = truth(schedule), 1e-6 * (schedule.t_max - schedule.t_clean)

    def state(t: torch.Tensor) -> torch.Tensor:
        return expand(schedule.alpha(t), c["x0"]) * c["x0"] + expand(schedule.sigma(t), c["x0"]) * c["eps"]

    p = Prediction("sample", c["x0"], c["x_t"], c["alpha"], c["sigma"])
    t = c["t"] + h  # away from a knot of the VP table
    p = Prediction("sample", c["x0"], state(t), schedule.alpha(t), schedule.sigma(t))
    difference = (state(t + h / 2) - state(t - h / 2)) / h
    torch.testing.assert_close(p.velocity(schedule.alpha_dot(t), schedule.sigma_dot(t)), difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_outputs_are_read_in_float32_also_under_autocast(kind: str) -> None:
    x_t, raw = torch.randn(2, 2, 4, 4, dtype=torch.bfloat16)
    alpha, sigma = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.95])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = Prediction(kind, raw, x_t, alpha, sigma)
        forms = [
            p.x0,
            p.eps,
            p.v,
            p.flow,
            p.score,
            p.as_kind(kind),
            from_x0(kind, raw, x_t, alpha, sigma),
            from_x0_eps(kind, raw, raw, alpha, sigma),
        ]
    assert all(form.dtype == torch.float32 for form in forms)
    close(p.x0.double(), to_x0(kind, raw.double(), x_t.double(), alpha.double(), sigma.double()), 1e-5)


def test_a_prediction_does_not_change() -> None:
    x = torch.ones(1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Prediction("sample", x, x, torch.ones(1), torch.ones(1)).kind = "epsilon"


def test_the_dtype_is_the_wider_of_state_and_output() -> None:
    one = torch.ones(1, 1)
    assert to_x0("epsilon", one, one.double(), torch.ones(1), torch.ones(1)).dtype == torch.float64
    assert to_eps("sample", one.double(), one, torch.ones(1), torch.ones(1)).dtype == torch.float64


def test_unknown_kinds_and_wrong_coefficients_are_refused() -> None:
    x, c = torch.zeros(4, 4), torch.ones(4)
    for function in (to_x0, to_eps, from_x0):
        with pytest.raises(ValueError, match="unknown prediction type 'noise'; known: epsilon"):
            function("noise", x, x, c, c)
        with pytest.raises(ValueError, match="per-sample"):
            function("epsilon", x, x, torch.ones(4, 4), c)


def test_edm_preconditioning_keeps_input_and_target_at_unit_variance() -> None:
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    for sigma_data in (0.5, 1.3):
        c = prediction.edm_preconditioning(sigma, sigma_data)
        close(c.c_skip, sigma_data**2 / (sigma**2 + sigma_data**2))
        close(c.c_in**2 * (sigma**2 + sigma_data**2), torch.ones_like(sigma))
        # Var[(x0 - c_skip x) / c_out] = 1 for data of variance sigma_data^2, and c_out is the smallest such scale.
        close(((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2) / c.c_out**2, torch.ones_like(sigma))
        close(c.c_noise, sigma.log() / 4)
        assert bool((c.c_out > 0).all()) and c.c_skip.dtype == torch.float64
    assert prediction.edm_preconditioning(torch.tensor([0.5])).c_skip.item() == 0.5


def test_consistency_preconditioning_is_the_identity_at_sigma_min() -> None:
    c = prediction.consistency_preconditioning(torch.tensor([0.002], dtype=torch.float64))
    assert (c.c_skip.item(), c.c_out.item()) == (1.0, 0.0)
    sigma = torch.tensor([0.5, 7.0], dtype=torch.float64)
    for sigma_data, sigma_min in ((0.5, 0.002), (1.0, 0.1)):
        c = prediction.consistency_preconditioning(sigma, sigma_data, sigma_min)
        close(c.c_skip, sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2))
        close(c.c_out, sigma_data * (sigma - sigma_min) / (sigma**2 + sigma_data**2).sqrt())
        close(c.c_in, 1 / (sigma**2 + sigma_data**2).sqrt())
        close(c.c_noise, 1000 * sigma.log() / 4)
    assert torch.isfinite(prediction.consistency_preconditioning(torch.zeros(1)).c_noise).all()
    close(prediction.consistency_preconditioning(torch.zeros(1)).c_noise, torch.tensor([250 * math.log(1e-44)]).double(), 0.01)


def test_lcm_boundary_equals_diffusers() -> None:
    import diffusers

    scheduler = diffusers.LCMScheduler()
    t = torch.tensor([0, 19, 499, 999])
    c_skip, c_out = prediction.lcm_boundary(t)
    for k in range(4):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(float(t[k]))
        assert (float(c_skip[k]), float(c_out[k])) == pytest.approx((float(skip), float(out)), rel=1e-12, abs=1e-15)
    assert (c_skip[0].item(), c_out[0].item()) == (1.0, 0.0) and c_skip.dtype == torch.float64
    assert float(c_skip[1]) == pytest.approx(6.9e-6, rel=0.01)  # f is nearly D at the first solver step already
    skip, out = prediction.lcm_boundary(torch.tensor([2.0]), sigma_data=1.5, timestep_scaling=0.5)
    assert (float(skip), float(out)) == pytest.approx((2.25 / 3.25, 1 / 3.25**0.5), rel=1e-12)
