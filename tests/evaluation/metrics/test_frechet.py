"""The Frechet distance against closed forms, scipy and clean-fid, and the metric with its jackknife."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from metric_cases import F64, covariance, normal, sample_of

from diffdistill.evaluation.metrics.frechet import (
    Dmd2FrechetMetric,
    FrechetMetric,
    frechet_distance,
    frechet_to_reference,
    jackknife_frechet,
    quick_frechet,
)
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian
from diffdistill.evaluation.metrics.jackknife import jackknife


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


SHARED_AXES = {
    "all": (range(60), range(60)),
    "all of the few": (range(60), range(120)),
    "some": (range(60), range(30, 90)),
    "none": (range(60), range(60, 120)),
    "all of one direction": (range(1), range(1)),
    "all but one": (range(119), range(120)),
}


@pytest.mark.parametrize("axes", SHARED_AXES.values(), ids=SHARED_AXES)
def test_frechet_with_fewer_samples_than_dimensions_is_exact(axes):
    # Both covariances have variance along some of 120 common axes only. Along each axis the distance is (sd_1 - sd_2)^2.
    basis = torch.linalg.qr(normal(120, 120)).Q
    sd = torch.zeros(2, 120, dtype=F64)
    for k in (0, 1):
        sd[k, list(axes[k])] = torch.arange(1, 121, dtype=F64)[list(axes[k])] ** -0.6 * (7 + k)  # traces up to 280
    covariances = [basis * row**2 @ basis.T for row in sd]
    zero = torch.zeros(120, dtype=F64)
    found = frechet_distance(zero, covariances[0], zero, covariances[1])
    assert found.value == pytest.approx(float((sd[0] - sd[1]).square().sum()), rel=0, abs=1e-11)


def test_frechet_is_never_negative():
    for seed in range(20):
        c = covariance(12, seed)
        assert frechet_distance(torch.zeros(12), c, torch.zeros(12), c * (1 + 1e-15)).value >= 0


def test_the_quick_form_is_the_same_distance():
    sample = sample_of(normal(500, 20) @ covariance(20, 1) + 0.2, 5).moments
    reference = ReferenceGaussian.of(sample_of(normal(700, 20, seed=2) @ covariance(20, 3)).moments)
    assert quick_frechet(sample, reference) == pytest.approx(frechet_to_reference(sample, reference).value, rel=1e-11)
    few = sample_of(normal(12, 20), 2).moments  # eigenvalues known to eps of the largest only: their roots to 1e-8
    assert quick_frechet(few, reference) == pytest.approx(frechet_to_reference(few, reference).value, abs=1e-6)


@pytest.mark.parametrize("exact_up_to", [0, 1000])
@pytest.mark.parametrize("num_images", [400, 18])  # with 18 images for 20 features as well
def test_distances_without_a_group_are_those_of_the_other_images(num_images, exact_up_to):
    x = normal(num_images, 20) @ covariance(20, 1)
    reference = ReferenceGaussian.of(sample_of(normal(700, 20, seed=2)).moments)
    whole, deleted = jackknife_frechet(sample_of(x, 6).moments, reference, exact_up_to)
    assert whole.value == pytest.approx(frechet_to_reference(sample_of(x).moments, reference).value, rel=1e-12)
    groups = torch.arange(num_images) * 6 // num_images
    expected = [frechet_to_reference(sample_of(x[groups != group]).moments, reference).value for group in range(6)]
    assert deleted == pytest.approx(expected, rel=1e-9)


def test_jackknife_lowers_the_bias_of_the_frechet_distance():
    d, n, repeats, true = 16, 400, 40, 16 * 0.1**2
    reference = ReferenceGaussian(torch.full((d,), 0.1, dtype=F64), torch.eye(d, dtype=F64))
    found = []
    for seed in range(repeats):
        whole, deleted = jackknife_frechet(sample_of(normal(n, d, seed=seed), 20).moments, reference)
        found.append((whole.value, *jackknife(whole.value, deleted, [n // 20] * 20).estimate))
    plain, corrected, claimed = torch.tensor(found).T
    error = float(corrected.std()) / math.sqrt(repeats)
    assert plain.mean() - true > 10 * error  # the plain estimate is far off
    assert abs(corrected.mean() - true) < 3 * error  # the corrected one is within its own error
    assert 0.75 < claimed.mean() / corrected.std() < 1.33  # the spread of 40 repeats is itself known to 11 percent


def test_frechet_metric_carries_the_jackknife_error_and_warns_when_images_are_few():
    reference = sample_of(normal(100, 6, seed=1))
    values = FrechetMetric()(sample_of(normal(60, 6), 6), reference, 0)
    assert values["fid"].se == values["fid_jackknife"].se > 0
    assert values["fid_jackknife"].value < values["fid"].value
    assert len(values["fid"].deleted) == 6
    with pytest.warns(UserWarning, match="singular"):
        FrechetMetric()(sample_of(normal(6, 6), 3), reference, 0)


def test_the_gaussian_of_a_reference_stands_for_its_moments():
    sample, reference = sample_of(normal(60, 6), 6), sample_of(normal(100, 6, seed=1))
    assert FrechetMetric()(sample, reference.as_reference(), 0) == FrechetMetric()(sample, reference, 0)


def test_sfid_is_the_frechet_metric_of_the_spatial_features():
    spatial, real_spatial = sample_of(normal(60, 6, seed=2) * 2, 6), sample_of(normal(100, 6, seed=3))
    sample = replace(sample_of(normal(60, 4), 6), spatial=spatial.moments)
    reference = replace(sample_of(normal(100, 4, seed=1)), spatial=real_spatial.moments)
    found, expected = FrechetMetric("sfid", "spatial")(sample, reference, 0), FrechetMetric()(spatial, real_spatial, 0)
    assert found == {"sfid": expected["fid"], "sfid_jackknife": expected["fid_jackknife"]}
    assert found["sfid"].value > 2 * FrechetMetric()(sample, reference, 0)["fid"].value


def test_the_fid_of_dmd2s_script_has_a_matrix_of_ones_for_each_process():
    sample, reference = sample_of(normal(50, 3, seed=1), 5), sample_of(normal(60, 3, seed=2) + 1)
    moments = sample.moments
    for processes in (0, 1, 8):
        excess = torch.full((3, 3), processes / 49, dtype=F64)
        expected = frechet_distance(
            moments.mean(), moments.covariance() + excess, reference.moments.mean(), reference.moments.covariance()
        )
        found = Dmd2FrechetMetric(processes)(sample, reference, 0)["fid_dmd2"].value
        assert found == pytest.approx(expected.value, rel=1e-9)
    assert Dmd2FrechetMetric(0)(sample, reference, 0)["fid_dmd2"].value == pytest.approx(
        FrechetMetric()(sample, reference, 0)["fid"].value, rel=1e-9
    )
