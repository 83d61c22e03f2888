"""The size of a distance's bias, the law behind it, and what is said of it."""

import pytest
import torch
from test_significance import GROUPS, NUM_GROUPS, NUM_IMAGES, evaluation, normal

from diffdistill.evaluation.bias import Bias, Point, bias_of, count_curve, count_points, inverse_count_line
from diffdistill.evaluation.metrics.frechet import frechet_to_reference, jackknife_frechet
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian
from diffdistill.evaluation.metrics.jackknife import jackknife
from diffdistill.evaluation.moments import Moments

F64 = torch.float64


def test_bias_follows_the_law():
    bias = Bias(count=2000, plain=6.3, corrected=1.1, se=0.05)
    assert bias.size == pytest.approx(5.2) and bias.constant == pytest.approx(10_400) and bias.is_too_much
    assert bias.count_for(0.01) == pytest.approx(10_400 / 0.011, abs=1)
    assert not Bias(50_000, 1.2, 1.1, 0.02).is_too_much


def test_what_is_said_names_the_bias_and_the_images_that_would_do():
    assert Bias(2000, 6.3, 1.1, 0.05).sentence() == (
        "2,000 images: about 5.2 of the distance 6.3 is bias, which falls as 1/N; "
        "about 950,000 images would bring it below 1% of what remains."
    )
    assert Bias(2000, 5.25, 0.05, 0.03).sentence().endswith("0.05 with a standard error of 0.03, may be zero.")
    assert Bias(50_000, 40.1, 40.0, 0.5).sentence().endswith("is bias, which falls as 1/N, less than 1% of what remains.")


def test_an_evaluation_tells_the_bias_of_its_distance():
    x = normal(NUM_IMAGES, 6) * 2
    found = evaluation(x, torch.ones(NUM_IMAGES, dtype=F64))
    assert bias_of(found) is None  # nothing told its error
    jackknifed = found.values["fid"].__class__(3.0, 0.1, 0.4, (2.9, 3.0, 3.1, 3.0))
    found.values["fid_jackknife"], found.values["fid"] = jackknifed, found.values["fid"].__class__(4.0, None, None, (4.0,) * 4)
    assert bias_of(found) == Bias(NUM_IMAGES, 4.0, 3.0, 0.2)


def test_points_on_the_law_give_limit_and_slope_without_error():
    points = tuple(Point(count, 2.5 + 300 / count) for count in (1000, 500, 200))
    limit, slope = inverse_count_line(points)
    assert limit.value == pytest.approx(2.5, rel=1e-9) and slope.value == pytest.approx(300, rel=1e-9)
    assert limit.se < 1e-9 and slope.se < 1e-6


def test_points_are_means_over_disjoint_parts():
    x = normal(NUM_IMAGES, 3) + torch.arange(NUM_IMAGES)[:, None]
    moments = Moments(3, NUM_GROUPS)
    moments.update(x, GROUPS)
    curve = count_curve(count_points(moments, lambda part: float(part.mean()[0]), (1, 2, 5)))
    fifths = x[: NUM_IMAGES * 10 // 12, 0].reshape(5, -1).mean(1)  # twelve groups make five parts of two
    assert [point.num_images for point in curve.points] == [NUM_IMAGES, NUM_IMAGES // 2, NUM_IMAGES // 6]
    assert [point.value for point in curve.points] == pytest.approx([float(x[:, 0].mean())] * 2 + [float(fifths.mean())])
    for parts in ((1, 2), (1, 2, 13)):
        with pytest.raises(ValueError, match="three sizes"):
            count_points(moments, lambda part: 0.0, parts)


def test_curve_and_jackknife_find_the_constant_of_a_gaussian():
    # Of N(0, I) against itself: the mean is off by d / N, the covariance by a quarter of E|C - I|^2 = d (d + 1) / N.
    d, num_images, num_groups = 16, 2000, 20
    constant = d + d * (d + 1) / 4
    reference = ReferenceGaussian(torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64))
    lines, jackknifed = [], []
    for seed in range(20):
        moments = Moments(d, num_groups)
        moments.update(normal(num_images, d, seed=seed), torch.arange(num_images) * num_groups // num_images)
        curve = count_curve(count_points(moments, lambda part: frechet_to_reference(part, reference).value))
        lines.append((curve.limit.value, curve.slope.value, curve.slope.se))
        assert curve.at(num_images) == pytest.approx(curve.points[0].value, rel=0.05)
        whole, deleted = jackknife_frechet(moments, reference)
        jackknifed.append(num_images * (whole.value - jackknife(whole.value, deleted, [100] * 20).value))
    limit, slope, slope_se = torch.tensor(lines, dtype=F64).T
    # What the law leaves out, of the order 1 / N^2, lifts the limit: by 0.0016 +- 0.0006 of 0.042 over 60 seeds.
    assert float(limit.mean()) == pytest.approx(0, abs=0.08 * constant / num_images)
    assert float(slope.mean()) == pytest.approx(constant, rel=0.03)
    assert float(torch.tensor(jackknifed).mean()) == pytest.approx(constant, rel=0.03)
    assert 0.4 < float(slope_se.square().mean().sqrt() / slope.std()) < 1.3
