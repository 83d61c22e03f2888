"""Guidance counted from 1, on teachers whose guided answer is known."""

from __future__ import annotations

import pytest
import torch
from oracle_cases import F64, PATHS, SHAPE, gaussian, levels, mixture, normal
from torch import Tensor

from diffdistill.math import transfer
from diffdistill.math.prediction import KINDS
from diffdistill.math.schedules import Schedule
from diffdistill.models.condition import Condition
from diffdistill.models.guidance import Interval, guide, guided

LABELS = torch.tensor([0, 1, 1])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [gaussian, mixture], ids=["gaussian", "mixture"])
def test_zero_is_null_one_is_the_condition_and_two_is_beyond(make, kind: str) -> None:
    for path in PATHS.values():
        model = make(path, kind)
        x, t, cond = normal(3, *SHAPE), levels(path, 0.3, 1.0, 4.0), model.condition(LABELS, 3)
        null, plain = model(x, t, cond.null_like()).x0, model(x, t, cond).x0
        for w, expected in ((0.0, null), (1.0, plain), (2.0, 2 * plain - null), (0.5, (plain + null) / 2)):
            close(guided(model, w)(x, t, cond).x0, expected)
        per_sample = torch.tensor([0.0, 1.0, 4.0])
        close(guided(model, per_sample)(x, t, cond).x0, torch.stack([null[0], plain[1], null[2] + 4 * (plain[2] - null[2])]))
        assert guided(model, 3.0)(x, t, cond).kind == kind


def test_no_guidance_is_the_denoiser_itself_and_negative_is_refused() -> None:
    model = gaussian(PATHS["edm"])
    assert guided(model, 1.0) is model and guided(model, 1) is model
    assert guided(model, 2.0).sample_shape == SHAPE and guided(model, 2.0).schedule is PATHS["edm"]
    with pytest.raises(ValueError, match="counted from 1"):
        guided(model, -0.1)
    with pytest.raises(ValueError, match="no null value"):
        guided(model, 2.0)(normal(1, *SHAPE), torch.ones(1, dtype=F64), Condition.none(1))


def test_outside_its_interval_guidance_is_one() -> None:
    model = gaussian(PATHS["vp"], "v_prediction")
    x, t, cond = normal(3, *SHAPE), levels(PATHS["vp"], 0.3, 1.0, 4.0), model.condition(LABELS, 3)
    got = guided(model, 5.0, Interval(0.5, 2.0))(x, t, cond).x0
    close(got[[0, 2]], model(x, t, cond).x0[[0, 2]])
    close(got[1], model.posterior_mean(x, t, cond, 5.0)[1])
    edge = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    edm = gaussian(PATHS["edm"])
    close(guided(edm, 5.0, Interval(1.0, 3.0))(x, edge, cond).x0, edm.posterior_mean(x, edge, cond, 5.0))  # ends included


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_inside_an_interval_alone_the_flow_is_that_of_the_guided_mean(path: Schedule) -> None:
    """Three pieces of the exact flow map, towards the class, the guided mean and the class, are the limit of the solver's steps."""
    model, w, interval = gaussian(path), 4.0, Interval(0.5, 2.0)
    cond, x = model.condition(LABELS, 3), 2 * normal(3, *SHAPE)
    ends = [levels(path, level).expand(3) for level in (8.0, interval.sigma_high, interval.sigma_low, 0.05)]

    def pieces(*scales: float) -> Tensor:
        x_t = x
        for t, r, scale in zip(ends, ends[1:], scales, strict=False):
            x_t = model.flow_map(x_t, t, r, cond, scale)
        return x_t

    def solved(num_steps: int) -> Tensor:
        x_t, steps = x, torch.linspace(0, 1, num_steps + 1, dtype=F64)[1:]
        for start, end in zip(ends, ends[1:], strict=False):
            t, (first, last) = start, (path.lambda_(start), path.lambda_(end))
            for share in steps:
                r = path.time_of_lambda(first + share * (last - first)) if share < 1 else end
                x0 = guided(model, w, interval)(x_t, t, cond).x0
                x_t, t = transfer.ddim(x_t, x0, path.coefficients(t), path.coefficients(r)), r
        return x_t

    # DDIM is of first order, and so is its step from the end of the interval, which belongs to it: what is left is of the second.
    limit = 2 * solved(32) - solved(16)
    torch.testing.assert_close(limit, pieces(1.0, w, 1.0), rtol=0, atol=0.01)
    for others in ((w, 1.0, w), (1.0, w, w), (w, w, 1.0), (w, w, w), (1.0, 1.0, 1.0), (1.0, -w, 1.0)):
        assert float((limit - pieces(*others)).abs().max()) > 0.2


def test_guide_needs_one_scale_per_sample() -> None:
    x = torch.zeros(4, 4)
    assert guide(x + 1, x, torch.arange(4.0)).tolist() == [[float(k)] * 4 for k in range(4)]
    with pytest.raises(ValueError, match="per-sample"):
        guide(x, x, torch.ones(4, 4))
