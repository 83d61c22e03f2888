"""The Inception Score: how sure a classifier is of each image, and over how many classes the images spread.

Source: Salimans et al. 2016 (arXiv:1606.03498), with the splits of its code.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.sample import Sample, Value


def inception_score(logits: Tensor, num_splits: int = 10) -> Value:
    """Return exp(mean_x KL(p(y|x) || p(y))), in [1, K], averaged over splits, and the standard error of that average.

    p(y) is the mean over the split, so a score is at most the number of images in its split, and the order of the images
    counts: sorted by class they would score near 1. The "±" of papers is the deviation between the splits, which is
    sqrt(num_splits - 1) times this error.

    Args:
        logits: (N, K), before the softmax, in the order of the images. Taken to float64.
        num_splits: split s is images s N // num_splits to (s + 1) N // num_splits.
    Raises:
        ValueError: fewer than two splits, or a split of one image, whose score is 1 whatever it shows.
    """
    if num_splits < 2 or len(logits) < 2 * num_splits:
        raise ValueError(
            f"the Inception Score needs two or more splits of two or more images; got {len(logits)} images and {num_splits} splits."
        )
    log_p = logits.double().log_softmax(1)
    bounds = [s * len(log_p) // num_splits for s in range(num_splits + 1)]
    scores = torch.stack([_score(log_p[start:end]) for start, end in itertools.pairwise(bounds)])
    return Value(float(scores.mean()), float(scores.std()) / math.sqrt(num_splits))


def _score(log_p: Tensor) -> Tensor:
    """Return the score of one split from log p(y|x), float64 (n, K), 0-dim; a probability that underflows adds nothing."""
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))  # (K,)
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()


@dataclass(frozen=True)
class InceptionScoreMetric:
    """`inception_score`: the score by the extractor's own classifier, 1 to its number of classes, higher is better."""

    num_splits: int = 10
    needs: frozenset[str] = frozenset({"logits"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return inception_score; warns when the images of a split are fewer than the classes, which caps it."""
        logits = sample.tensor("logits")
        num_images, num_classes = len(logits) // self.num_splits, logits.shape[1]
        if num_images < num_classes:
            warnings.warn(
                f"{num_images} images in a split for {num_classes} classes: the Inception Score is capped by the images.",
                stacklevel=2,
            )
        return {"inception_score": inception_score(logits, self.num_splits)}
