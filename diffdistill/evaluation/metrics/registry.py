"""The metrics that a protocol can name."""

from __future__ import annotations

from diffdistill.evaluation.metrics.captions import ClipScoreMetric, ObeyedMetric
from diffdistill.evaluation.metrics.frechet import FrechetMetric, SpatialFrechetMetric
from diffdistill.evaluation.metrics.inception_score import InceptionScoreMetric
from diffdistill.evaluation.metrics.kernel import CmmdMetric, KernelMetric
from diffdistill.evaluation.metrics.labels import AccuracyMetric, DiversityMetric
from diffdistill.evaluation.metrics.neighbours import DensityCoverageMetric, PrecisionRecallMetric
from diffdistill.evaluation.metrics.pixels import PixelMetric
from diffdistill.evaluation.metrics.sample import Metric
from diffdistill.evaluation.metrics.vendi import VendiMetric

METRICS: dict[str, Metric] = {
    "fid": FrechetMetric(),
    "sfid": SpatialFrechetMetric(),
    "kid": KernelMetric(),
    "kid_normalised": KernelMetric(normalised=True),
    "cmmd": CmmdMetric(),
    "precision_recall": PrecisionRecallMetric(),
    "density_coverage": DensityCoverageMetric(),
    "vendi": VendiMetric(),
    "inception_score": InceptionScoreMetric(),
    "accuracy": AccuracyMetric(),
    "diversity": DiversityMetric(),
    "pixels": PixelMetric(),
    "obeyed": ObeyedMetric(),
    "clip_score": ClipScoreMetric(),
}
