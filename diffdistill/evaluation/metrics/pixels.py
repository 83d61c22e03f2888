"""Metrics of the pixels themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffdistill.evaluation.metrics.sample import Sample, Value


@dataclass(frozen=True)
class PixelMetric:
    """`saturated` and `contrast`: means of `images.pixel_statistics`, to be read beside those of the reference."""

    needs: frozenset[str] = frozenset({"pixels"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return both means with their standard errors."""
        pixels = sample.tensor("pixels")
        means, errors = pixels.mean(0).tolist(), (pixels.std(0) / math.sqrt(len(pixels))).tolist()
        return {name: Value(*pair) for name, *pair in zip(("saturated", "contrast"), means, errors, strict=True)}
