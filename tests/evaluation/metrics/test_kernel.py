"""Kernel distances against their definition."""

import math

import pytest
import torch
from metric_cases import F64, normal, sample_of

from diffdistill.evaluation.metrics.kernel import CmmdMetric, KernelMetric, gaussian_mmd2, kernel_distance, polynomial_mmd2


def direct_mmd2(x, y):
    """The definition, one pair at a time."""

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd_equals_the_double_sum():
    x, y = normal(12, 4), normal(9, 4, seed=1) + 0.5
    assert polynomial_mmd2(x, y).value == pytest.approx(direct_mmd2(x.tolist(), y.tolist()), rel=1e-12)


def test_mmd_of_equal_distributions_averages_to_zero_and_of_others_is_positive():
    pairs = [(normal(100, 4, seed=2 * s), normal(100, 4, seed=2 * s + 1)) for s in range(60)]
    same = torch.tensor([polynomial_mmd2(x, y).value for x, y in pairs])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(60)
    assert same.min() < 0  # unbiased, hence on both sides
    assert min(polynomial_mmd2(x, y + 1.0).value for x, y in pairs) > 3 * float(same.std())


def test_kernel_distance_is_seeded_and_averages_the_subsets():
    x, y = normal(80, 4), normal(90, 4, seed=1) + 0.5
    first, again, other = (kernel_distance(x, y, 20, 40, seed=seed)[:2] for seed in (3, 3, 4))
    assert first == again != other
    mean, spread, _ = kernel_distance(x, y, 200, 40, seed=3)
    assert mean == pytest.approx(polynomial_mmd2(x, y).value, abs=4 * spread / math.sqrt(200) + 0.02)


def test_normalised_kernel_ignores_the_unit_of_the_features():
    x, y = sample_of(normal(50, 4)), sample_of(normal(60, 4, seed=1) + 0.5)
    scaled = sample_of(x.features * 100), sample_of(y.features * 100)
    metric = KernelMetric(normalised=True)
    assert metric(*scaled, 0)["kid"].value == pytest.approx(metric(x, y, 0)["kid"].value, rel=1e-9)
    assert KernelMetric()(*scaled, 0)["kid"].value > 1000 * KernelMetric()(x, y, 0)["kid"].value


# --- The Gaussian kernel


def test_gaussian_mmd_of_a_few_points_is_worked_by_hand():
    near = math.exp(-(3.0**2) / (2 * 2.0**2))
    zero, both = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert gaussian_mmd2(both[:1], both[1:], sigma=2.0).value == pytest.approx(2 - 2 * near, rel=1e-12)
    # (2 + 2 near) / 4 + 1 - (1 + near): pairs of a point with itself count.
    assert gaussian_mmd2(both, zero, sigma=2.0).value == pytest.approx((1 - near) / 2, rel=1e-12)


def test_gaussian_mmd_of_a_set_with_itself_is_zero_in_any_order():
    x = normal(40, 5)
    assert gaussian_mmd2(x, x.flip(0), sigma=1.0).value == pytest.approx(0.0, abs=1e-14)


def test_gaussian_mmd_of_gaussians_has_the_expectation_of_the_biased_estimator():
    d, sigma, n, m, repeats = 3, 1.5, 20, 30, 300
    sd_x, sd_y, shift = 1.0, 0.5, torch.tensor([0.5, -0.2, 0.3], dtype=F64)

    def expected_kernel(variance, mean_shift):  # E exp(-|z|^2 / (2 sigma^2)) of z ~ N(mean_shift, variance I)
        total = sigma**2 + variance
        return (sigma**2 / total) ** (d / 2) * math.exp(-float(mean_shift.square().sum()) / (2 * total))

    within_x, within_y = expected_kernel(2 * sd_x**2, 0 * shift), expected_kernel(2 * sd_y**2, 0 * shift)
    limit = within_x + within_y - 2 * expected_kernel(sd_x**2 + sd_y**2, shift)
    bias = (1 - within_x) / n + (1 - within_y) / m
    pairs = [(normal(n, d, seed=2 * s) * sd_x, normal(m, d, seed=2 * s + 1) * sd_y + shift) for s in range(repeats)]
    found = torch.tensor([gaussian_mmd2(x, y, sigma).value for x, y in pairs])
    error = float(found.std()) / math.sqrt(repeats)
    assert abs(found.mean() - (limit + bias)) < 3 * error
    assert bias > 10 * error  # so the unbiased estimator would fail the line above


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(30, 5), normal(25, 5, seed=1) + 1
    whole = gaussian_mmd2(x, y, sigma=2.0).value
    monkeypatch.setattr("diffdistill.evaluation.metrics.distances.ROWS_PER_BLOCK", 7)
    assert gaussian_mmd2(x, y, sigma=2.0).value == pytest.approx(whole, rel=1e-12)


def test_cmmd_sees_directions_alone_at_the_published_scale():
    one, other = torch.tensor([[5.0, 0.0]]).expand(4, 2), torch.tensor([[0.0, 0.1]]).expand(6, 2)
    metric = CmmdMetric()
    found = metric(sample_of(one), sample_of(other), 0)["cmmd"]
    assert found.estimate == (pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-10), pytest.approx(0, abs=1e-9))
    assert metric(sample_of(one), sample_of(7 * one), 0)["cmmd"].value == pytest.approx(0.0, abs=1e-10)
    with pytest.raises(ValueError, match="4 of 4 feature vectors are zero"):
        metric(sample_of(0 * one), sample_of(other), 0)


def test_cmmd_is_nearly_ten_times_the_squared_distance_of_the_mean_directions():
    x, y = normal(50, 8) + 1, normal(60, 8, seed=1) + 0.5
    means = [torch.nn.functional.normalize(z).mean(0) for z in (x, y)]
    expected = 10 * float((means[0] - means[1]).square().sum())
    assert CmmdMetric()(sample_of(x), sample_of(y), 0)["cmmd"].value == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("metric", [KernelMetric(num_subsets=30, subset_size=100), CmmdMetric(sigma=1.0)])
def test_the_error_is_the_scatter_of_the_value_over_other_images(metric):
    reference = sample_of(normal(300, 3, seed=999) + 1)
    [name, *_] = metric(sample_of(normal(10, 3)), reference, 0)
    found = [metric(sample_of(0.8 * normal(300, 3, seed=seed) + 0.6), reference, seed)[name] for seed in range(150)]
    scatter = torch.tensor([value.value for value in found], dtype=F64).std()
    errors = torch.tensor([value.se for value in found], dtype=F64)
    assert 0.8 < float(errors.square().mean().sqrt() / scatter) < 1.25
    assert float(found[0].each.mean()) == pytest.approx(found[0].value, rel=1e-9)
