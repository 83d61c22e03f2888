"""The jackknife's 95 % intervals cover the true distance, and its bias is a small part of the plain one's. The study: eval/evaluation_statistics.py."""

import torch

from diffdistill.evaluation.metrics.frechet import jackknife_frechet
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian
from diffdistill.evaluation.metrics.jackknife import jackknife
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.student_t import interval

F64 = torch.float64


def test_intervals_cover_the_truth_and_the_bias_is_below_a_tenth():
    d, num_images, num_groups, trials = 12, 500, 20, 200
    reference = ReferenceGaussian(torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64))
    truth = d * (0.1**2 + (1.2 - 1) ** 2)  # N(0.1, 1.44 I) to N(0, I)
    groups = torch.arange(num_images) * num_groups // num_images
    plain, corrected, held = [], [], 0
    for trial in range(trials):
        moments = Moments(d, num_groups)
        draw = torch.randn(num_images, d, dtype=F64, generator=torch.Generator().manual_seed(trial))
        moments.update(0.1 + 1.2 * draw, groups)
        whole, deleted = jackknife_frechet(moments, reference)
        value, se = jackknife(whole.value, deleted, moments.counts.tolist()).estimate
        low, high = interval(value, se, num_groups - 1)
        plain.append(whole.value)
        corrected.append(value)
        held += low <= truth <= high
    assert 0.92 <= held / trials <= 0.98
    biases = [torch.tensor(values, dtype=F64).mean() - truth for values in (plain, corrected)]
    assert abs(biases[1]) < 0.1 * biases[0]
