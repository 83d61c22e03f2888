"""Student's t against its closed forms for one and two degrees, the binomial distribution, and scipy."""

import math

import pytest

from diffdistill.evaluation.student_t import incomplete_beta, interval, p_value, quantile


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 5.0, 200.0])
def test_p_values_of_one_and_two_degrees_are_the_closed_forms(t):
    assert p_value(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-11)
    assert p_value(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_many_degrees_become_the_normal_distribution():
    assert p_value(1.959963984540054, math.inf) == pytest.approx(0.05, rel=1e-12)
    assert p_value(2.0, 1e5) == pytest.approx(p_value(2.0, math.inf), rel=1e-3)
    assert p_value(math.inf, 5) == p_value(math.inf, math.inf) == 0


@pytest.mark.parametrize("k", [0, 3, 7, 10])
def test_incomplete_beta_is_the_tail_of_the_binomial_distribution(k):
    tail = sum(math.comb(10, j) * 0.3**j * 0.7 ** (10 - j) for j in range(k + 1))
    assert (incomplete_beta(10 - k, k + 1, 0.7) if k < 10 else 1.0) == pytest.approx(tail, rel=1e-12)


def test_incomplete_beta_at_the_ends():
    assert (incomplete_beta(2, 3, 0.0), incomplete_beta(2, 3, 1.0)) == (0.0, 1.0)


@pytest.mark.parametrize(("level", "degrees", "expected"), [(0.95, 9, 2.262157), (0.95, 49, 2.009575), (0.99, 19, 2.860935)])
def test_quantiles_are_those_of_the_tables(level, degrees, expected):
    assert quantile(level, degrees) == pytest.approx(expected, abs=1e-6)
    assert p_value(quantile(level, degrees), degrees) == pytest.approx(1 - level, rel=1e-9)


@pytest.mark.parametrize("degrees", [1, 3.7, 49, 149.5, 29_999])
def test_student_t_equals_scipy(degrees):
    stats = pytest.importorskip("scipy.stats")
    for t in (1e-3, 0.5, 2.0, 10.0):
        assert p_value(t, degrees) == pytest.approx(2 * stats.t.sf(t, degrees), rel=1e-9)
    assert quantile(0.95, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_an_interval_lies_around_the_value():
    low, high = interval(5.0, 2.0, degrees=9)
    assert (low, high) == pytest.approx((5 - 2 * 2.262157, 5 + 2 * 2.262157), abs=1e-5)
    assert interval(0.0, 1.0).high == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(("level", "degrees"), [(0, 5), (1, 5), (0.95, 0)])
def test_what_is_no_level_is_refused(level, degrees):
    with pytest.raises(ValueError, match="0 < level < 1"):
        quantile(level, degrees)
