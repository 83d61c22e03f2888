"""The Frechet distance against closed forms, scipy and clean-fid, and the metric with its jackknife."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from metric_cases import F64, covariance, normal, sample_of

from diffdistill.evaluation.metrics.frechet import (
    FrechetMetric,
    SpatialFrechetMetric,
    covariance_factor,
    frechet_distance,
    jackknife_frechet,
)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean_1, mean_2 = normal(5, seed=1), normal(5, seed=2)
    sd_1, sd_2 = normal(5, seed=3).abs(), normal(5, seed=4).abs()
    found = frechet_distance(mean_1, torch.diag(sd_1**2), mean_2, torch.diag(sd_2**2))
    assert found.mean_term == pytest.approx(float((mean_1 - mean_2).square().sum()), rel=1e-12)
    assert found.covariance_term == pytest.approx(float((sd_1 - sd_2).square().sum()), rel=1e-12)
    assert found.value == pytest.approx(found.mean_term + found.covariance_term, rel=1e-15)


def test_frechet_of_commuting_covariances_is_the_closed_form():
    basis = torch.linalg.qr(normal(6, 6)).Q
    sd_1, sd_2 = torch.linspace(0.1, 3, 6, dtype=F64), torch.linspace(2, 0.5, 6, dtype=F64)
    found = frechet_distance(torch.zeros(6), basis * sd_1**2 @ basis.T, torch.zeros(6), basis * sd_2**2 @ basis.T)
    assert found.value == pytest.approx(float((sd_1 - sd_2).square().sum()), rel=1e-11)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_frechet_equals_scipy_sqrtm(d):
    linalg = pytest.importorskip("scipy.linalg")
    c1, c2, m1, m2 = covariance(d, 1), covariance(d, 2), normal(d, seed=3), normal(d, seed=4)
    root = np.asarray(linalg.sqrtm((c1 @ c2).numpy())).real
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)
    assert frechet_distance(m1, c1, m2, c2).value == pytest.approx(expected, rel=1e-9)


def test_frechet_equals_clean_fid_on_the_same_features():
    fid = pytest.importorskip("cleanfid.fid")
    x, y = normal(500, 32) @ covariance(32, 1), normal(700, 32, seed=2) @ covariance(32, 3) + 0.3
    stats = [(z.mean(0).numpy(), np.cov(z.numpy(), rowvar=False)) for z in (x, y)]
    try:
        expected = fid.frechet_distance(*stats[0], *stats[1])
    except TypeError:
        pytest.skip("this clean-fid calls sqrtm in a way that this scipy no longer has")
    one, two = sample_of(x).moments, sample_of(y).moments
    found = frechet_distance(one.mean(), one.covariance(), two.mean(), two.covariance())
    assert found.value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [10, 30, 500])
def test_frechet_of_a_set_with_itself_is_zero_also_when_images_are_few(n):
    moments = sample_of(normal(n, 60) * 10).moments  # trace 6000
    found = frechet_distance(moments.mean(), moments.covariance(), moments.mean(), moments.covariance())
    assert 0 <= found.value <= 1e-10 * 6000 / 60


def test_frechet_with_fewer_samples_than_dimensions_is_exact():
    # Two point pairs along orthogonal axes: covariances of rank one that share no direction, so nothing overlaps.
    c1, c2 = torch.zeros(50, 50, dtype=F64), torch.zeros(50, 50, dtype=F64)
    c1[0, 0], c2[1, 1] = 4.0, 9.0
    basis = torch.linalg.qr(normal(50, 50)).Q
    zero = torch.zeros(50, dtype=F64)
    rotated = frechet_distance(zero, basis @ c1 @ basis.T, zero, basis @ c2 @ basis.T)
    assert rotated.value == pytest.approx(13.0, rel=1e-12)
    assert frechet_distance(zero, c1, zero, 4 * c1).value == pytest.approx(4.0, rel=1e-12)


def test_frechet_is_never_negative():
    for seed in range(20):
        c = covariance(12, seed)
        assert frechet_distance(torch.zeros(12), c, torch.zeros(12), c * (1 + 1e-15)).value >= 0


def test_factor_gives_the_covariance_back():
    c = covariance(9, 0)
    factor = covariance_factor(c)
    assert torch.allclose(factor @ factor.T, c, rtol=0, atol=1e-13)


def test_jackknife_lowers_the_bias_of_the_frechet_distance():
    d, n, repeats, true = 16, 400, 40, 16 * 0.1**2
    factor, mean = covariance_factor(torch.eye(d, dtype=F64)), torch.full((d,), 0.1, dtype=F64)
    found = [jackknife_frechet(sample_of(normal(n, d, seed=seed), 20).moments, mean, factor) for seed in range(repeats)]
    plain = torch.tensor([whole.value for whole, _ in found])
    corrected = torch.tensor([value.value for _, value in found])
    error = float(corrected.std()) / math.sqrt(repeats)
    assert plain.mean() - true > 10 * error  # the plain estimate is far off
    assert abs(corrected.mean() - true) < 3 * error  # the corrected one is within its own error
    claimed = torch.tensor([value.se for _, value in found]).mean()
    assert 0.75 < claimed / corrected.std() < 1.33  # the spread of 40 repeats is itself known to 11 percent


def test_frechet_metric_carries_the_jackknife_error_and_warns_when_images_are_few():
    reference = sample_of(normal(100, 6, seed=1))
    values = FrechetMetric()(sample_of(normal(60, 6), 6), reference, 0)
    assert values["fid"].se == values["fid_jackknife"].se > 0
    assert values["fid_jackknife"].value < values["fid"].value
    with pytest.warns(UserWarning, match="singular"):
        FrechetMetric()(sample_of(normal(6, 6), 3), reference, 0)


def test_sfid_is_the_frechet_metric_of_the_spatial_features():
    spatial, real_spatial = sample_of(normal(60, 6, seed=2) * 2, 6), sample_of(normal(100, 6, seed=3))
    sample = replace(sample_of(normal(60, 4), 6), spatial=spatial.moments)
    reference = replace(sample_of(normal(100, 4, seed=1)), spatial=real_spatial.moments)
    found, expected = SpatialFrechetMetric()(sample, reference, 0), FrechetMetric()(spatial, real_spatial, 0)
    assert found == {"sfid": expected["fid"], "sfid_jackknife": expected["fid_jackknife"]}
    assert found["sfid"].value > 2 * FrechetMetric()(sample, reference, 0)["fid"].value
