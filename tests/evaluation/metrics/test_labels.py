"""Metrics of the classes asked for."""

import math

import pytest
import torch
from metric_cases import normal, sample_of

from diffdistill.evaluation.metrics.labels import DiversityMetric, label_accuracy, within_class_variance


def test_accuracy_of_labels_off_by_one_is_zero():
    labels = torch.arange(20) % 10
    logits = torch.nn.functional.one_hot(labels, 10).float()
    assert label_accuracy(logits, labels).value == 1.0
    assert label_accuracy(logits, (labels + 1) % 10).value == 0.0
    half = torch.where(torch.arange(20) < 10, labels, (labels + 1) % 10)
    assert label_accuracy(logits, half).estimate == (0.5, pytest.approx(math.sqrt(0.25 / 20)))
    assert label_accuracy(logits, half).each.tolist() == [1.0] * 10 + [0.0] * 10


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
    metric = DiversityMetric()
    assert metric(real, real, 0)["diversity"].value == pytest.approx(1.0)
    assert metric(collapsed, real, 0)["diversity"].value == 0.0
