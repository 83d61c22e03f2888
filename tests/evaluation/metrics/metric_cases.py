"""Gaussian features, covariances and samples, the same every time."""

import torch

from diffdistill.evaluation.metrics.sample import Sample
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
