"""Metrics of captions: the scales of the CLIP score, and means of scores."""

import math

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.captions import ClipScoreMetric, MeanScoreMetric, ObeyedMetric, clip_scores
from diffdistill.evaluation.metrics.registry import METRICS, metric_of
from diffdistill.evaluation.metrics.sample import Sample

# Vectors at 0, 60, 90 and 180 degrees, of lengths that must not matter.
IMAGES = torch.tensor([[2.0, 0], [3, 0], [1, 0], [5, 0]])
TEXTS = torch.tensor([[0.5, 0], [1, math.sqrt(3)], [0, 7], [-2, 0]])
COSINES = torch.tensor([1.0, 0.5, 0, -1])


@pytest.mark.parametrize(
    "scale, expected",
    [
        ("cos", COSINES),
        ("100cos", 100 * COSINES),
        ("logit", 14.3 * COSINES),
        ("hessel", torch.tensor([2.5, 1.25, 0, 0])),  # an opposite is no worse than a stranger
    ],
)
def test_scales_of_known_angles(scale, expected):
    found = clip_scores(IMAGES, TEXTS, scale, logit_scale=14.3)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-6)


def test_logits_without_their_scale_are_refused():
    with pytest.raises(UserError, match="clip_scale: logit.*Write 100cos"):
        clip_scores(IMAGES, TEXTS, "logit")


def test_the_metric_is_the_mean_on_the_scale_of_the_protocol():
    sample = Sample(features=IMAGES, texts=TEXTS)
    value = metric_of("clip_score", "cos", None)(sample, sample, 0)["clip_score"]
    assert value.estimate == (pytest.approx(0.125), pytest.approx(float(COSINES.double().std()) / 2))
    torch.testing.assert_close(value.each, COSINES.double(), rtol=0, atol=1e-7)
    assert metric_of("clip_score", "logit", 50.0)(sample, sample, 0)["clip_score"].value == pytest.approx(6.25)
    assert ClipScoreMetric()(sample, sample, 0)["clip_score"].value == pytest.approx(12.5)
    assert metric_of("fid", "cos", None) is METRICS["fid"]


def test_a_mean_of_scores_has_their_error_and_keeps_them():
    scores = torch.tensor([20.0, 22, 21, 25])
    value = MeanScoreMetric("pickscore", "pickscore")(Sample(scores=scores), Sample(), 0)["pickscore"]
    assert value.estimate == (22.0, pytest.approx(math.sqrt(14 / 3) / 2))
    assert torch.equal(value.each, scores.double())


def test_each_score_is_of_one_network():
    scored = {name: metric.network for name, metric in METRICS.items() if isinstance(metric, MeanScoreMetric)}
    assert scored == {
        "pickscore": "pickscore",
        "hps_v2.0": "hps-v2.0",
        "hps_v2.1": "hps-v2.1",
        "aesthetic": "aesthetic",
        "image_reward": "image-reward",
    }
    assert all(METRICS[name].name == name and METRICS[name].needs == {"scores"} for name in scored)


def test_obeyed_is_the_share_of_images_and_keeps_what_each_obeys():
    obeyed = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    found = ObeyedMetric()(Sample(obeyed=obeyed), Sample(), 0)
    assert {name: value.value for name, value in found.items()} == {
        "obeyed_colours": 0.75,
        "obeyed_shapes": 0.5,
        "obeyed_sizes": 0.25,
        "obeyed": 0.25,
    }
    assert found["obeyed_shapes"].each.tolist() == [1, 1, 0, 0]
    assert found["obeyed"].se == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
