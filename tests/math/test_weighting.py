"""Weights are the ratios of squared errors they claim to be; laws and curricula against their published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from schedule_cases import times

from diffdistill.math import grids, weighting
from diffdistill.math.prediction import KINDS, edm_preconditioning, from_x0
from diffdistill.math.schedules import EDMSchedule, Schedule, expand

F64 = torch.float64


def test_the_weight_of_a_kind_is_the_ratio_of_its_squared_error_to_that_of_x0(schedule: Schedule) -> None:
    alpha, sigma = schedule.coefficients(times(schedule, 0.1, 0.4, 0.8))
    generator = torch.Generator().manual_seed(0)
    x_t, x0, other = torch.randn(3, 3, 5, generator=generator, dtype=F64)
    for kind in KINDS:
        error = from_x0(kind, x0, x_t, alpha, sigma) - from_x0(kind, other, x_t, alpha, sigma)
        weight = weighting.of_kind(kind, alpha, sigma)
        torch.testing.assert_close(error**2, expand(weight, x0) * (x0 - other) ** 2, rtol=1e-8, atol=1e-10)
        assert weight.dtype == F64
    assert torch.equal(weighting.of_kind("epsilon", alpha, sigma), weighting.snr(alpha, sigma))
    assert torch.equal(weighting.of_kind("sample", alpha, sigma), weighting.uniform(alpha, sigma))
    with pytest.raises(ValueError, match="unknown prediction type 'noise'; known: epsilon"):
        weighting.of_kind("noise", alpha, sigma)


def test_weights_by_hand() -> None:
    alpha, sigma = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    for weight, expected in (
        (weighting.uniform, [1, 1]),
        (weighting.snr, [16 / 9, 9 / 16]),
        (weighting.truncated_snr, [16 / 9, 1]),
        (weighting.snr_plus_one, [25 / 9, 25 / 16]),
        (weighting.v, [1 / 0.36, 1 / 0.64]),
        (weighting.flow, [(1.4 / 0.6) ** 2, (1.4 / 0.8) ** 2]),
        (weighting.edm, [(0.5625 + 0.25) / (0.5625 * 0.25), ((16 / 9) + 0.25) / ((16 / 9) * 0.25)]),
    ):
        value = weight(alpha, sigma)
        assert value.tolist() == pytest.approx(expected, rel=1e-6) and value.dtype == F64
        assert torch.equal(value, weight(alpha.double(), sigma.double()))  # float32 scales are widened first
    alpha, sigma = alpha.double(), sigma.double()
    assert weighting.v(torch.ones(1), torch.full((1,), 2.0)).item() == 25 / 4
    # The larger of the squared errors in x0 and eps is the truncated one.
    larger = torch.maximum(weighting.snr(alpha, sigma), torch.ones(2, dtype=F64))
    torch.testing.assert_close(weighting.truncated_snr(alpha, sigma), larger)


def test_edm_weight_is_one_over_c_out_squared() -> None:
    for sigma_data in (0.5, 1.2):
        alpha, sigma = torch.tensor([1.0, 0.5], dtype=F64), torch.tensor([0.3, 4.0], dtype=F64)
        c = edm_preconditioning(sigma / alpha, sigma_data)
        torch.testing.assert_close(weighting.edm(alpha, sigma, sigma_data), 1 / c.c_out**2)
        torch.testing.assert_close(weighting.edm(alpha, sigma, sigma_data), (alpha / sigma) ** 2 + 1 / sigma_data**2)


def test_inverse_gap() -> None:
    gap = weighting.inverse_gap(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.75]))
    assert gap.tolist() == [0.5, 4.0] and gap.dtype == F64


def test_lognormal_probabilities_are_those_of_a_normal_log_level() -> None:
    levels = grids.karras(EDMSchedule(), 41).times
    p = weighting.lognormal_interval_probabilities(levels)
    assert p.shape == (40,) and p.dtype == F64 and float(p.sum()) == pytest.approx(1, abs=1e-12) and bool((p > 0).all())
    torch.testing.assert_close(p.flip(0), weighting.lognormal_interval_probabilities(levels.flip(0)))
    single = levels.float()
    law = weighting.lognormal_interval_probabilities
    assert torch.equal(law(single), law(single.double()))
    normal = torch.distributions.Normal(torch.tensor(-1.1, dtype=F64), torch.tensor(2.0, dtype=F64))
    cdf = normal.cdf(levels.log())
    torch.testing.assert_close(p, (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1]))
    other = torch.distributions.Normal(torch.tensor(0.5, dtype=F64), torch.tensor(0.7, dtype=F64)).cdf(levels.log())
    torch.testing.assert_close(
        weighting.lognormal_interval_probabilities(levels, 0.5, 0.7), (other[:-1] - other[1:]) / (other[0] - other[-1])
    )


def test_progressive_discretisation_of_consistency_training() -> None:
    # Released code: CIFAR-10, s0 = 2, s1 = 150, from one interval to s1.
    assert weighting.ct_num_intervals(0, 1000) == 1
    assert weighting.ct_num_intervals(1000, 1000) == 150
    assert weighting.ct_num_intervals(500, 1000) == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) == 106
    assert weighting.ct_num_intervals(1, 1000) == 5  # sqrt(0.001 * 22797 + 4) - 1 = 4.18
    for k in range(0, 1000, 7):
        assert weighting.ct_num_intervals(k, 1000, 10, 200) == math.ceil(math.sqrt(k / 1000 * (40401 - 100) + 100) - 1)
    assert weighting.ct_num_intervals(0, 10, s0=1, s1=4) == 1  # never none
    counts = [weighting.ct_num_intervals(k, 1000) for k in range(1001)]
    assert counts == sorted(counts)


def test_adaptive_decay_of_consistency_training() -> None:
    assert weighting.ct_ema_decay(0, 1000) == pytest.approx(0.9**2)
    assert weighting.ct_ema_decay(1000, 1000) == pytest.approx(0.9 ** (2 / 150))
    assert weighting.ct_ema_decay(500, 1000, 10, 200, 0.95) == pytest.approx(
        0.95 ** (10 / weighting.ct_num_intervals(500, 1000, 10, 200))
    )


def test_doubling_discretisation_of_ict() -> None:
    # s0 = 10 to s1 = 1280 doubles 7 times: 8 stages of K / 8 steps.
    stages = [weighting.ict_num_points(k, 800) for k in (0, 99, 100, 200, 300, 400, 500, 600, 700, 799, 800, 5000)]
    assert stages == [11, 11, 21, 41, 81, 161, 321, 641, 1281, 1281, 1281, 1281]
    assert weighting.ict_num_points(3, 5) == 81  # fewer steps than stages: one step each
    assert weighting.ict_num_points(33, 99, s0=4, s1=16) == 9  # 3 stages of 33 steps
    assert weighting.ict_num_points(32, 99, s0=4, s1=16) == 5
    assert weighting.ict_num_points(33, 101, s0=4, s1=16) == 9  # 33 again, rounded down
    assert weighting.ict_num_points(10**6, 99, s0=3, s1=20) == 21  # ends at s1, not at a power of two


def test_the_gap_of_ect_shrinks_by_q_in_every_stage() -> None:
    t = torch.tensor([0.01, 1.0, 80.0])
    k = 1 + 8 / (1 + (t.double()).exp())
    for stage in (0, 3, 6):
        r = weighting.ect_next_level(t, stage)
        torch.testing.assert_close(r, (t.double() * (1 - k / 2 ** (stage + 1))).clamp(min=0), rtol=1e-12, atol=0)
        assert r.dtype == F64
    assert weighting.ect_next_level(t, 0).tolist() == [0.0, 0.0, 40.0]  # denoising at the start
    gap = [float((1 - weighting.ect_next_level(t, stage) / t)[1]) for stage in (4, 5)]
    assert gap[0] / gap[1] == pytest.approx(2)
    r = weighting.ect_next_level(t, 1, q=4.0, k=2.0, b=0.5)
    torch.testing.assert_close(r, t.double() * (1 - (1 + 2 / (1 + (0.5 * t.double()).exp())) / 16), rtol=1e-12, atol=0)
