"""Nearest-neighbour metrics on points whose neighbours can be counted."""

import math

import pytest
import torch
from metric_cases import normal, sample_of

from diffdistill.evaluation.metrics.neighbours import (
    DensityCoverageMetric,
    PrecisionRecallMetric,
    density_coverage,
    precision_recall,
    seeded_subset,
)
from diffdistill.evaluation.metrics.sample import Value


def line(*positions):
    return torch.tensor([[float(p), 0.0] for p in positions])


def test_precision_and_recall_on_a_line_are_known():
    # Real points 0..9: the third nearest neighbour is at most 3 away (ends) and at least 2 (middle).
    real = line(*range(10))
    # 0.5 and 12 are inside (9 reaches to 12, and the balls are closed); 12.5 and 40 are outside every ball.
    fake = line(0.5, 12.0, 12.5, 40.0)
    precision, recall = precision_recall(fake, real, k=3)
    assert precision == 0.5
    # Each fake point's ball reaches its farthest fake neighbour: radii 39.5, 28, 27.5, 39.5 cover all of 0..9.
    assert recall == 1.0


def test_far_samples_have_neither():
    real, fake = line(*range(10)), line(*range(1000, 1010))
    assert precision_recall(fake, real) == (0.0, 0.0)


def test_a_collapsed_sample_is_precise_without_recall():
    real = line(*range(0, 100, 10))
    fake = line(50.0, 50.001, 50.002, 50.003)
    precision, recall = precision_recall(fake, real)
    assert precision == 1.0
    assert recall == 0.1  # the one real point in the cluster


def test_identical_sets_have_both():
    x = normal(200, 5)
    assert precision_recall(x, x) == (1.0, 1.0)


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_blocks_change_nothing(monkeypatch, metric):
    x, y = normal(300, 5), normal(250, 5, seed=1) + 1
    whole = metric(x, y)
    monkeypatch.setattr("diffdistill.evaluation.metrics.distances.ROWS_PER_BLOCK", 7)
    assert metric(x, y) == whole
    assert 0 < whole[0] < 1


def test_precision_equals_the_direct_definition():
    x, y = normal(60, 3), normal(70, 3, seed=1) + 0.7
    between = torch.cdist(y, y).sort(1).values[:, 3]
    expected = float((torch.cdist(x, y) <= between).any(1).double().mean())
    assert precision_recall(x, y)[0] == expected


def test_seeded_subset_keeps_order_and_repeats_nothing():
    x = torch.arange(100)
    chosen = seeded_subset(x, 30, seed=1)
    assert len(chosen.unique()) == 30
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, seeded_subset(x, 30, seed=1))
    assert not torch.equal(chosen, seeded_subset(x, 30, seed=2))
    assert seeded_subset(x, 100, seed=1) is x


# --- Density and coverage


def test_density_and_coverage_on_a_line_are_counted():
    # With k = 2 the ends of 0..9 have radius 2 and the others 1; the balls are open.
    real = line(*range(10))
    # 0.5 is in the balls of 0 and 1; 3 in its own alone, as 2 and 4 are just out of reach; 9.5 in that of 9; 40 in none.
    fake = line(0.5, 3.0, 9.5, 40.0)
    density, coverage = density_coverage(fake, real, k=2)
    assert density == 4 / (2 * 4)
    assert coverage == 4 / 10
    # The other way round the radii are 9, 6.5, 9 and 37, and the balls hold 10, 10, 9 and 6 of the ten points.
    assert density_coverage(real, fake, k=2) == (35 / (2 * 10), 1.0)


def test_far_samples_have_neither_density_nor_coverage():
    assert density_coverage(line(*range(1000, 1010)), line(*range(10))) == (0.0, 0.0)


def test_samples_crowded_where_the_reference_is_dense_have_a_density_above_one():
    real = line(0.0, 1.0, -1.0, 2.5, -2.5, 100.0)
    density, coverage = density_coverage(line(0.1, 0.2, 0.3), real, k=3)
    assert density == 6 / 3  # in every ball, also in that of the outlier, whose radius is 100
    assert coverage == 1.0


def test_one_outlier_of_the_reference_makes_precision_whole_and_density_small():
    real = line(0.0, 1.0, 2.0, 3.0, 4.0, 100.0)
    fake = line(60.0, 70.0, 80.0, 90.0)
    assert precision_recall(fake, real, k=3)[0] == 1.0
    assert density_coverage(fake, real, k=3) == (1 / 3, 1 / 6)


def test_a_set_without_equal_distances_has_density_and_coverage_one_against_itself():
    x = line(0, 1, 3, 7, 15, 31, 63)  # an open ball holds its centre and the k - 1 nearest others
    assert density_coverage(x, x, k=3) == (1.0, 1.0)


def test_equal_distributions_have_the_density_and_coverage_of_the_paper():
    n, m, k = 30, 20, 5
    found = torch.tensor([density_coverage(normal(n, 3, seed=2 * s), normal(m, 3, seed=2 * s + 1), k) for s in range(300)])
    error = found.std(0) / math.sqrt(300)
    uncovered = math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    assert abs(found[:, 0].mean() - 1) < 3 * error[0]
    assert abs(found[:, 1].mean() - (1 - uncovered)) < 3 * error[1]
    assert max(error) < 0.02


@pytest.mark.parametrize(("n", "m"), [(3, 5), (0, 6)])
def test_density_without_neighbours_or_samples_is_refused(n, m):
    with pytest.raises(ValueError, match=f"got {n} and {m}"):
        density_coverage(torch.zeros(n, 2), torch.zeros(m, 2), k=5)


@pytest.mark.parametrize(
    ("metric", "function", "names"),
    [
        (PrecisionRecallMetric(max_images=30), precision_recall, ("precision", "recall")),
        (DensityCoverageMetric(max_images=30), density_coverage, ("density", "coverage")),
    ],
)
def test_metrics_take_equal_numbers_of_both_sets(metric, function, names):
    real, fake = sample_of(normal(40, 3)), sample_of(2 * normal(90, 3, seed=1) + 0.5)
    expected = function(seeded_subset(fake.features, 30, 7), seeded_subset(real.features, 30, 7))
    assert metric(fake, real, 7) == {name: Value(value) for name, value in zip(names, expected, strict=True)}
    assert metric(real, fake, 7) != metric(fake, real, 7)
