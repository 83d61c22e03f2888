"""Metrics of the classes asked for: is an image in its class, and how far its class spreads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.captions import share_value
from diffdistill.evaluation.metrics.sample import Sample, Value


def label_accuracy(logits: Tensor, labels: Tensor) -> Value:
    """Return the share of images whose class by the classifier, logits (N, K), is the one asked for, labels (N,)."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"one label per image: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}.")
    return share_value(logits.argmax(1) == labels)


@dataclass(frozen=True)
class AccuracyMetric:
    """`accuracy`: the share of images that the extractor's own classifier puts into the class asked for."""

    needs: frozenset[str] = frozenset({"logits", "labels"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return accuracy with its binomial standard error."""
        return {"accuracy": label_accuracy(sample.tensor("logits"), sample.tensor("labels"))}


def within_class_variance(features: Tensor, labels: Tensor) -> float:
    """Return the trace of the unbiased covariance inside each class, averaged over the classes with two images or more.

    Args:
        features: (N, d), taken to float64. labels: int64 (N,).
    """
    classes = [features[labels == label].double() for label in labels.unique().tolist()]
    traces = [members.var(0).sum() for members in classes if len(members) > 1]
    if not traces:
        raise ValueError("within-class variance needs a class with two images or more.")
    return float(torch.stack(traces).mean())


@dataclass(frozen=True)
class DiversityMetric:
    """`diversity`: feature variance within a class over that of the reference; 1 is as diverse as real, 0 collapsed."""

    needs: frozenset[str] = frozenset({"features", "labels"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return diversity."""
        ours, real = (within_class_variance(each.tensor("features"), each.tensor("labels")) for each in (sample, reference))
        return {"diversity": Value(ours / real)}
