"""What DMD and DMD2 share: the rollout, the matching gradient, the fake network's loss.

Distribution matching moves the student's output x_g along the difference of two scores, of the student's distribution
(learnt online by the fake network) and of the data (the teacher). In x0 form
s_fake - s_real = (alpha / sigma^2)(D_fake - D_real), so the gradient on x_g is a weight times (D_fake - D_real).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.distillers.base import Batch, Rng
from diffdistill.distillers.states import Noised
from diffdistill.math import losses, weighting
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.together import predict_both
from diffdistill.sampling.noise import BatchNoise
from diffdistill.sampling.sampler import Sampler

FakeLossKind = Literal["network", "epsilon", "v_prediction", "sample", "flow_prediction", "edm", "alpha_epsilon"]
FakeLoss = Annotated[
    FakeLossKind,
    Field(
        description="output type whose squared error trains the fake network: 'network' for its own; 'edm' is the x0 error with "
        "weight sigma^-2 + 4, for EDM networks; 'alpha_epsilon' the eps error times alpha^2, SwiftBrush's"
    ),
]


def student_input(student: Denoiser, sampler: Sampler, batch: Batch, rng: Rng, step: int) -> Tensor:
    """Return what the student sees at step `step` of inference, (B, ...), without graph: backward simulation.

    It starts from noise of the shape of the batch's images, where there are some, since the conditions may tell their sizes.

    Source: DMD2 (arXiv:2405.14867), Sec. 4.5. The states are the sampler's own, for they are made by it.
    """
    with torch.no_grad():
        return sampler.advance(student, BatchNoise(batch.size, rng.local), batch.cond, step, batch.state_shape)


def generate(student: Denoiser, sampler: Sampler, x_t: Tensor, cond: Condition, step: int) -> Tensor:
    """Return x_g, the student's clean output at the sampler's step `step`: the one pass that may carry a graph."""
    t = sampler.grid.times_on(x_t.device)[step].expand(len(x_t))
    return student(x_t, t, cond).x0


def wide_x0(prediction: Prediction) -> Tensor:
    """Return x0 computed in float64: near pure noise 1 / alpha magnifies rounding, and two of these are subtracted."""
    p = prediction
    return Prediction(p.kind, p.raw.double(), p.x_t.double(), p.alpha, p.sigma).x0


@torch.no_grad()
def matching_gradient(
    x_g: Tensor,
    state: Noised,
    real: Denoiser,
    fake: Denoiser,
    cond: Condition,
    normaliser: losses.Normaliser = "abs_mean",
    factor: Tensor | None = None,
) -> Tensor:
    """Return the gradient on x_g, factor (D_fake - D_real) / N with N = mean |x_g - D_real|, (B, ...), dtype of x_g.

    Args:
        x_g: clean student outputs; their graph is not used.
        state: x_g noised.
        real: the teacher, under guidance if any; `fake` is never guided.
        normaliser: "abs_mean" divides by N per sample, "none" does not.
        factor: further weight, (B,); alpha in DMD, none in DMD2.
    Source: DMD (arXiv:2311.18828), Eq. 7 and 8; the reference code of DMD2 for the x0 form.
    """
    by_real, by_fake = predict_both(real, fake, state.x_t, state.t, cond)
    x0_real, x0_fake = wide_x0(by_real), wide_x0(by_fake)
    return losses.dmd_gradient(x_g, x0_real=x0_real, x0_fake=x0_fake, normaliser=normaliser, factor=factor).to(x_g.dtype)


def fake_loss(fake: Denoiser, x_g: Tensor, state: Noised, cond: Condition, kind: FakeLossKind) -> Tensor:
    """Return the fake network's denoising loss per sample, (B,).

    Args:
        fake: the network, one pass.
        x_g: the student's clean output, what it should find at `state`.
        kind: output type whose error is squared, "network" for its own, the weight it was trained with; "edm" for
            sigma^-2 + 1 / 0.5^2, "alpha_epsilon" for alpha^2 times the eps error. Whatever the weight, the optimum is the
            posterior mean of the student's outputs.
    """
    prediction = fake(state.x_t, state.t, cond)
    kind = prediction.kind if kind == "network" else kind  # type: ignore[assignment]
    point = (prediction.alpha, prediction.sigma)
    named = {"edm": weighting.edm, "alpha_epsilon": weighting.alpha_epsilon}
    weight = named[kind](*point) if kind in named else weighting.of_kind(kind, *point)
    return losses.fake_score_loss(prediction.x0, x_g, weight)
