"""What one pass over the images leaves behind, and the contract of the metrics that read it."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from torch import Tensor

from diffdistill.evaluation.moments import Moments


class Value(typing.NamedTuple):
    """A number and its standard error, None where the estimator offers none."""

    value: float
    se: float | None = None


@dataclass(frozen=True)
class Sample:
    """What one pass over N images leaves for the metrics.

    Attributes:
        moments: of the features, in jackknife groups of neighbouring images.
        features: float32 (N, d), or None when no metric asked for them.
        logits: float32 (N, K), or None when the extractor is no classifier.
        labels: int64 (N,), the classes asked for, or None when unknown.
        pixels: float64 (N, 2), see `images.pixel_statistics`.
        texts: float32 (N, d), the vectors of the captions asked for, or None without captions or an extractor that reads them.
        obeyed: bool (N, 4), the parts of its caption that an image obeys, see `shapes_detector.Obeyed`, or None.
        spatial: moments of the extractor's spatial features, in the same groups, or None where it has none or no metric asked.
    """

    moments: Moments
    features: Tensor | None
    logits: Tensor | None
    labels: Tensor | None
    pixels: Tensor
    texts: Tensor | None = None
    obeyed: Tensor | None = None
    spatial: Moments | None = None


class Metric(typing.Protocol):
    """Named values of a sample against a reference; `needs` lists the fields of `Sample` that must not be None."""

    needs: frozenset[str]
    absolute: bool  # True: the reference is not used, so the same figure of the reference can stand beside it

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the values by name; `seed` fixes every random choice of the metric."""
        ...
