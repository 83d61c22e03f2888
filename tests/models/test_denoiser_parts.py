"""A denoiser asked in parts answers as one that is asked at once, and never sees more rows."""

import pytest
import torch

from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import RectifiedFlowSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import guided
from diffdistill.models.parts import InParts


class Labelled(Denoiser):
    """Says flow = x t label, and notes how many rows it was asked about."""

    schedule, sample_shape = RectifiedFlowSchedule(1.0), (1, 2, 2)

    def __init__(self):
        self.rows = []

    def __call__(self, x_t, t, cond):
        self.rows.append(len(x_t))
        alpha, sigma = self.schedule.coefficients(t)
        factor = (t * cond.values["class_labels"]).reshape(-1, 1, 1, 1)
        return Prediction("flow_prediction", x_t * factor, x_t, alpha, sigma)


@pytest.mark.parametrize(
    ("scale", "rows", "passes"), [(1.0, 2, [2, 2, 1]), (1.0, 9, [5]), (3.0, 4, [4, 4, 2]), (3.0, 10, [10])]
)
def test_parts_answer_for_their_own_rows(scale, rows, passes):
    x_t, t = torch.arange(20.0, dtype=torch.float64).reshape(5, 1, 2, 2), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    cond = Condition.labels(torch.arange(1, 6), null_label=7)
    inner = Labelled()
    said = guided(InParts(inner, rows), scale)(x_t, t, cond)
    assert inner.rows == passes
    whole = guided(Labelled(), scale)(x_t, t, cond)
    assert torch.equal(said.x0, whole.x0) and torch.equal(said.eps, whole.eps)
