"""Kernel distances against their definition."""

import math

import pytest
import torch
from metric_cases import normal, sample_of

from diffdistill.evaluation.metrics.kernel import KernelMetric, kernel_distance, polynomial_mmd2


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
    assert polynomial_mmd2(x, y) == pytest.approx(direct_mmd2(x.tolist(), y.tolist()), rel=1e-12)


def test_mmd_of_equal_distributions_averages_to_zero_and_of_others_is_positive():
    pairs = [(normal(100, 4, seed=2 * s), normal(100, 4, seed=2 * s + 1)) for s in range(60)]
    same = torch.tensor([polynomial_mmd2(x, y) for x, y in pairs])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(60)
    assert same.min() < 0  # unbiased, hence on both sides
    assert min(polynomial_mmd2(x, y + 1.0) for x, y in pairs) > 3 * float(same.std())


def test_kernel_distance_is_seeded_and_averages_the_subsets():
    x, y = normal(80, 4), normal(90, 4, seed=1) + 0.5
    assert kernel_distance(x, y, 20, 40, seed=3) == kernel_distance(x, y, 20, 40, seed=3)
    assert kernel_distance(x, y, 20, 40, seed=3) != kernel_distance(x, y, 20, 40, seed=4)
    mean, spread = kernel_distance(x, y, 200, 40, seed=3)
    assert mean == pytest.approx(polynomial_mmd2(x, y), abs=4 * spread / math.sqrt(200) + 0.02)


def test_normalised_kernel_ignores_the_unit_of_the_features():
    x, y = sample_of(normal(50, 4)), sample_of(normal(60, 4, seed=1) + 0.5)
    scaled = sample_of(x.features * 100), sample_of(y.features * 100)
    metric = KernelMetric(normalised=True)
    assert metric(*scaled, 0)["kid"].value == pytest.approx(metric(x, y, 0)["kid"].value, rel=1e-9)
    assert KernelMetric()(*scaled, 0)["kid"].value > 1000 * KernelMetric()(x, y, 0)["kid"].value
