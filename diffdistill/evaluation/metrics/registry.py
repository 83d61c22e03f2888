"""The metrics that a protocol can name."""

from __future__ import annotations

import dataclasses

from diffdistill.evaluation.metrics.captions import ClipScale, ClipScoreMetric, MeanScoreMetric, ObeyedMetric
from diffdistill.evaluation.metrics.frechet import Dmd2FrechetMetric, FrechetMetric
from diffdistill.evaluation.metrics.inception_score import InceptionScoreMetric
from diffdistill.evaluation.metrics.kernel import CmmdMetric, KernelMetric
from diffdistill.evaluation.metrics.labels import AccuracyMetric, DiversityMetric
from diffdistill.evaluation.metrics.neighbours import DensityCoverageMetric, PrecisionRecallMetric
from diffdistill.evaluation.metrics.pixels import PixelMetric
from diffdistill.evaluation.metrics.prompts import LpipsDiversityMetric, PromptSpreadMetric
from diffdistill.evaluation.metrics.sample import Metric
from diffdistill.evaluation.metrics.vendi import VendiMetric

METRICS: dict[str, Metric] = {
    "fid": FrechetMetric(),
    "sfid": FrechetMetric("sfid", "spatial"),
    "fd_dinov2": FrechetMetric("fd_dinov2"),
    "clip_fid": FrechetMetric("clip_fid"),
    "patch_fid": FrechetMetric("patch_fid"),
    "fid_dmd2": Dmd2FrechetMetric(),
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
    "prompt_diversity": PromptSpreadMetric(),
    "lpips_diversity": LpipsDiversityMetric(),
    "pickscore": MeanScoreMetric("pickscore", "pickscore"),
    "hps_v2.0": MeanScoreMetric("hps_v2.0", "hps-v2.0"),
    "hps_v2.1": MeanScoreMetric("hps_v2.1", "hps-v2.1"),
    "aesthetic": MeanScoreMetric("aesthetic", "aesthetic"),
    "image_reward": MeanScoreMetric("image_reward", "image-reward"),
}


def metric_of(name: str, clip_scale: ClipScale = "100cos", logit_scale: float | None = None, per_prompt: int = 1) -> Metric:
    """Return the metric of that name as a protocol wants it.

    Args:
        name: a key of METRICS.
        clip_scale: of the protocol.
        logit_scale: of the network of the view, None where it has none.
        per_prompt: neighbouring images that share a prompt.
    """
    metric = METRICS[name]
    if isinstance(metric, ClipScoreMetric):
        return dataclasses.replace(metric, scale=clip_scale, logit_scale=logit_scale)
    if isinstance(metric, PromptSpreadMetric):
        return dataclasses.replace(metric, per_prompt=per_prompt)
    return metric
