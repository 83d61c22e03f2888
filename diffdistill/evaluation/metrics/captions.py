"""Metrics of the captions asked for: what of them is in the image.

Source: Hessel et al. 2021 (arXiv:2104.08718) for the CLIP score. "0.29", "29" and "0.73" can be one score on three scales, and the
network matters as much: the protocol names both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.sample import Sample, Value


@dataclass(frozen=True)
class ObeyedMetric:
    """`obeyed`: the share of images that show all that their caption says, and of those that show its first parts."""

    needs: frozenset[str] = frozenset({"obeyed"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the four shares, each with its binomial standard error."""
        names = ("obeyed_colours", "obeyed_shapes", "obeyed_sizes", "obeyed")
        return {name: share_value(each) for name, each in zip(names, sample.tensor("obeyed").T, strict=True)}


ClipScale = Literal["cos", "100cos", "100cos+", "logit", "hessel"]


def clip_scores(images: Tensor, texts: Tensor, scale: ClipScale = "100cos", logit_scale: float | None = None) -> Tensor:
    """Return the CLIP score of each image for its text, on one of the scales of papers.

    | scale | value | used by |
    |---|---|---|
    | `cos` | cos(image, text), about 0.3 | GigaGAN, DMD2 |
    | `100cos` | 100 cos(image, text) | torchmetrics |
    | `100cos+` | 100 max(cos(image, text), 0) | the shapes here |
    | `logit` | logit_scale cos(image, text) | Sana, the package clip-score; logit_scale is 100 of published networks, 14.3 untrained |
    | `hessel` | 2.5 max(cos(image, text), 0) | Hessel et al. 2021, Eq. 1 |

    Args:
        images, texts: (N, d) vectors of any length. Taken to float64.
        logit_scale: what the network multiplied its cosines by in training, for `logit` alone.
    Returns:
        (N,) float64.
    Raises:
        UserError: `logit` without a logit_scale.
    """
    cosines = torch.nn.functional.cosine_similarity(images.double(), texts.double())
    if scale == "hessel":
        return 2.5 * cosines.clamp(min=0)
    if scale == "logit":
        if logit_scale is None:
            raise UserError("clip_scale: logit needs a network that says its logit scale, and this one does not. Write 100cos.")
        return logit_scale * cosines
    if scale == "100cos+":
        return 100 * cosines.clamp(min=0)
    return cosines if scale == "cos" else 100 * cosines


@dataclass(frozen=True)
class ClipScoreMetric:
    """`clip_score`: the mean of `clip_scores`.

    Attributes:
        scale, logit_scale: see `clip_scores`.
    """

    scale: ClipScale = "100cos"
    logit_scale: float | None = None
    needs: frozenset[str] = frozenset({"features", "texts"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the mean with its standard error."""
        return {
            "clip_score": mean_value(
                clip_scores(sample.tensor("features"), sample.tensor("texts"), self.scale, self.logit_scale)
            )
        }


@dataclass(frozen=True)
class MeanScoreMetric:
    """The mean of what a network says of each image.

    Attributes:
        name: of the value.
        network: whose scores these are: the only extractor behind which the metric means what its name says.
    """

    name: str
    network: str
    needs: frozenset[str] = frozenset({"scores"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the mean with its standard error."""
        return {self.name: mean_value(sample.tensor("scores"))}


def mean_value(each: Tensor) -> Value:
    """Return the mean over N images with its standard error and the values themselves."""
    each = each.double()
    return Value(float(each.mean()), float(each.std()) / math.sqrt(len(each)), each)


def share_value(each: Tensor) -> Value:
    """Return the share of N images that are true, with its binomial standard error and the values themselves."""
    each = each.double()
    share = float(each.mean())
    return Value(share, math.sqrt(share * (1 - share) / len(each)), each)
