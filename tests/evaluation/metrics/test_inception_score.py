"""The Inception Score of predictions whose divergences are known."""

import math

import pytest
import torch
from metric_cases import normal, sample_of

from diffdistill.evaluation.metrics.inception_score import InceptionScoreMetric, inception_score


def one_hot(labels, num_classes=5):
    """Logits of a classifier without doubt: every other probability underflows to zero."""
    return 1000.0 * torch.nn.functional.one_hot(labels, num_classes)


def test_confident_predictions_of_every_class_equally_often_score_the_number_of_classes():
    assert inception_score(one_hot(torch.arange(50) % 5), 2).estimate == (
        pytest.approx(5.0, rel=1e-12),
        pytest.approx(0.0, abs=1e-12),
    )


def test_predictions_that_do_not_depend_on_the_image_score_one():
    assert inception_score(normal(1, 7).expand(30, 7), 3).estimate == (
        pytest.approx(1.0, rel=1e-12),
        pytest.approx(0.0, abs=1e-12),
    )


def test_unequal_classes_score_the_exponential_of_their_entropy():
    found = inception_score(one_hot(torch.tensor([0, 0, 0, 1] * 4)), 2).value
    assert found == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-12)


def test_the_divergence_goes_from_the_image_to_the_marginal():
    # Two images, P(first class) = 0.9 and 0.5, so 0.7 in the mean. The other direction would give another number.
    logits = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log() + 3.0
    divergences = [0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3), 0.5 * math.log(5 / 7) + 0.5 * math.log(5 / 3)]
    found = inception_score(logits.repeat(4, 1), 2).value
    assert found == pytest.approx(math.exp(sum(divergences) / 2), rel=1e-12)


def test_splits_are_scored_apart_and_averaged():
    # The first split shows five classes and scores 5, the second one class and scores 1; 11 images split as 5 and 6.
    logits = one_hot(torch.tensor([0, 1, 2, 3, 4] + [0] * 6))
    assert inception_score(logits, 2).estimate == (pytest.approx(3.0), pytest.approx(math.sqrt(8.0) / math.sqrt(2)))
    assert inception_score(one_hot(torch.arange(50) // 10), 5).value == pytest.approx(1.0)  # sorted by class


def test_the_error_is_that_of_a_mean_over_splits():
    values = torch.stack([torch.tensor(inception_score(normal(1000, 4, seed=seed), 10).estimate) for seed in range(60)])
    assert 0.8 < values[:, 1].square().mean().sqrt() / values[:, 0].std() < 1.25  # 60 repeats know their spread to 9 percent


def test_two_images_are_the_least_that_a_split_can_hold():
    assert inception_score(one_hot(torch.arange(20) % 2), 10).value == pytest.approx(2.0)


@pytest.mark.parametrize(("num_images", "num_splits"), [(19, 10), (20, 1)])
def test_splits_that_mean_nothing_are_refused(num_images, num_splits):
    with pytest.raises(ValueError, match=f"got {num_images} images and {num_splits} splits"):
        inception_score(torch.zeros(num_images, 3), num_splits)


def test_the_metric_needs_no_reference_and_warns_when_images_cap_the_score():
    metric = InceptionScoreMetric(num_splits=2)
    sample = sample_of(normal(20, 2), logits=one_hot(torch.arange(20) % 5))
    assert metric.needs == {"logits"} and metric.absolute
    assert metric(sample, None, 0)["inception_score"].value == pytest.approx(5.0)
    few = sample_of(normal(8, 2), logits=one_hot(torch.arange(8) % 5))
    with pytest.warns(UserWarning, match="4 images in a split for 5 classes"):
        metric(few, None, 0)
