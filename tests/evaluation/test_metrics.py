"""Metrics against closed forms, direct formulas and independent code."""

import math

import numpy as np
import pytest
import torch

from diffdistill.evaluation.metrics import (
    METRICS,
    Sample,
    covariance_factor,
    frechet_distance,
    jackknife,
    jackknife_frechet,
    kernel_distance,
    label_accuracy,
    polynomial_mmd2,
    precision_recall,
    seeded_subset,
    within_class_variance,
)
from diffdistill.evaluation.moments import Moments

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(d, seed):
    mix = normal(d, d + 4, seed=seed)
    return mix @ mix.T / d


def sample_of(features, num_groups=1, logits=None, labels=None):
    moments = Moments(features.shape[1], num_groups)
    moments.update(features, torch.arange(len(features)) * num_groups // len(features))
    return Sample(moments, features, logits, labels, torch.zeros(len(features), 2, dtype=F64))


# --- Frechet distance


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


# --- Jackknife


def test_jackknife_of_the_mean_gives_its_textbook_error():
    x = normal(60)
    parts = [float((x.sum() - value) / 59) for value in x]
    found = jackknife(float(x.mean()), parts, [1] * 60)
    assert found.value == pytest.approx(float(x.mean()), rel=1e-10)
    assert found.se == pytest.approx(float(x.std() / math.sqrt(60)), rel=1e-10)


@pytest.mark.parametrize("counts", [[10] * 6, [5, 10, 15, 20, 5, 5]])
def test_jackknife_removes_a_bias_of_one_over_n_exactly(counts):
    total = sum(counts)
    found = jackknife(2 + 7 / total, [2 + 7 / (total - count) for count in counts], counts)
    assert found.value == pytest.approx(2.0, rel=1e-12)


def test_jackknife_of_one_group_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        jackknife(1.0, [1.0], [5])


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


# --- Kernel distance


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
    metric = METRICS["kid_normalised"]
    assert metric(*scaled, 0)["kid"].value == pytest.approx(metric(x, y, 0)["kid"].value, rel=1e-9)
    assert METRICS["kid"](*scaled, 0)["kid"].value > 1000 * METRICS["kid"](x, y, 0)["kid"].value


# --- Precision and recall


def line(*positions):
    return torch.tensor([[float(p), 0.0] for p in positions])


def test_precision_and_recall_on_a_line_are_known():
    # Real points 0..9: the third nearest neighbour is at most 3 away (ends) and at least 2 (middle).
    real = line(*range(10))
    # 0.5 and 11.5 are inside (9 reaches to 12); 12.5 and 40 are outside every ball.
    fake = line(0.5, 11.5, 12.5, 40.0)
    precision, recall = precision_recall(fake, real, k=3)
    assert precision == 0.5
    # Each fake point's ball reaches its farthest fake neighbour: radii 39.5, 28.5, 27.5, 39.5 cover all of 0..9.
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


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(300, 5), normal(250, 5, seed=1) + 1
    whole = precision_recall(x, y)
    monkeypatch.setattr("diffdistill.evaluation.metrics.ROWS_PER_BLOCK", 7)
    assert precision_recall(x, y) == whole
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


# --- Labels


def test_accuracy_of_labels_off_by_one_is_zero():
    labels = torch.arange(20) % 10
    logits = torch.nn.functional.one_hot(labels, 10).float()
    assert label_accuracy(logits, labels).value == 1.0
    assert label_accuracy(logits, (labels + 1) % 10).value == 0.0
    half = torch.where(torch.arange(20) < 10, labels, (labels + 1) % 10)
    assert label_accuracy(logits, half) == (0.5, pytest.approx(math.sqrt(0.25 / 20)))


def test_accuracy_wants_a_label_per_image():
    with pytest.raises(ValueError, match="one label per image"):
        label_accuracy(torch.zeros(4, 10), torch.zeros(3, dtype=torch.int64))


def test_within_class_variance_does_not_see_the_distance_between_classes():
    x, labels = normal(4000, 3), torch.arange(4000) % 4
    far = x + 100.0 * labels[:, None]
    assert within_class_variance(far, labels) == pytest.approx(within_class_variance(x, labels), rel=1e-9)
    assert within_class_variance(x, labels) == pytest.approx(3.0, abs=0.15)  # 3 dimensions of variance 1; s.e. 0.04


def test_within_class_variance_is_unbiased_and_skips_classes_of_one():
    x = torch.tensor([[0.0], [2.0], [50.0]])
    assert within_class_variance(x, torch.tensor([0, 0, 1])) == 2.0
    with pytest.raises(ValueError, match="two images"):
        within_class_variance(x, torch.tensor([0, 1, 2]))


def test_diversity_is_one_for_the_reference_and_zero_when_collapsed():
    labels = torch.arange(40) % 4
    real = sample_of(normal(40, 3), labels=labels)
    collapsed = sample_of(labels[:, None].expand(40, 3).double(), labels=labels)
    metric = METRICS["diversity"]
    assert metric(real, real, 0)["diversity"].value == pytest.approx(1.0)
    assert metric(collapsed, real, 0)["diversity"].value == 0.0


# --- The metrics as a protocol uses them


def test_frechet_metric_carries_the_jackknife_error_and_warns_when_images_are_few():
    reference = sample_of(normal(100, 6, seed=1))
    values = METRICS["fid"](sample_of(normal(60, 6), 6), reference, 0)
    assert values["fid"].se == values["fid_jackknife"].se > 0
    assert values["fid_jackknife"].value < values["fid"].value
    with pytest.warns(UserWarning, match="singular"):
        METRICS["fid"](sample_of(normal(6, 6), 3), reference, 0)


def test_pixel_metric_averages_with_error():
    sample = sample_of(normal(4, 2))
    sample.pixels[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    values = METRICS["pixels"](sample, sample, 0)
    assert values["saturated"] == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert values["contrast"] == (0.0, 0.0)
