"""Metrics of the captions asked for: what of them is in the image.

Source: Hessel et al. 2021 (arXiv:2104.08718) for the CLIP score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.sample import Sample, Value


@dataclass(frozen=True)
class ObeyedMetric:
    """`obeyed`: the share of images that show all that their caption says, and of those that show its first parts."""

    needs: frozenset[str] = frozenset({"obeyed"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the four shares, each with its binomial standard error."""
        shares = sample.obeyed.double().mean(0).tolist()
        names = ("obeyed_colours", "obeyed_shapes", "obeyed_sizes", "obeyed")
        count = len(sample.obeyed)
        return {name: Value(share, math.sqrt(share * (1 - share) / count)) for name, share in zip(names, shares, strict=True)}


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return 100 max(cos(image, text), 0) of each row, (N,) float64. Source: Hessel et al. 2021 (arXiv:2104.08718), without w = 2.5."""
    return 100 * torch.nn.functional.cosine_similarity(images.double(), texts.double()).clamp(min=0)


@dataclass(frozen=True)
class ClipScoreMetric:
    """`clip_score`: the mean of `clip_score`, on the scale of 0 to 100."""

    needs: frozenset[str] = frozenset({"features", "texts"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the mean with its standard error."""
        scores = clip_score(sample.features, sample.texts)
        return {"clip_score": Value(float(scores.mean()), float(scores.std()) / math.sqrt(len(scores)))}
