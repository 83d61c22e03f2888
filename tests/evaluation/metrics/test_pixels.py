"""Metrics of the pixels."""

import math

import pytest
import torch
from metric_cases import normal, sample_of

from diffdistill.evaluation.metrics.pixels import PixelMetric


def test_pixel_metric_averages_with_error():
    sample = sample_of(normal(4, 2))
    sample.pixels[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    values = PixelMetric()(sample, sample, 0)
    assert values["saturated"].estimate == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert values["contrast"].estimate == (0.0, 0.0)
