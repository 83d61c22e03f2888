"""Guidance by adapters on a frozen network, learnt from stored trajectories of the guided teacher. arXiv:2503.07274.

The base network is never touched: small adapters at its attention blocks take w, time and class, and are trained until ONE
conditional pass gives what guidance makes of two. They learn on the states that guided sampling visits, which noised data
are not: the guided sampler runs once, before training, and its states and answers are stored. The result halves the cost
of a step and leaves their number as it was; it takes any w of its range, can be switched off, and serves other finetunes of
the same base.

    w ~ U[w_low, w_high] for each trajectory;  x_k, t_k: every j-th state of the guided teacher's own sampler
    target = F(x_k, t_k, null) + w (F(x_k, t_k, c) - F(x_k, t_k, null))       F the network's own output, stored with x_k
    loss   = mean | F_{base + A}(x_k, t_k, c; w) - target |^2                 (trajectory, step) uniform

The adapters are in `models.guidance_adapters`, the trajectories in `sampling.trajectories`.

In memory: one frozen network, the adapters with their optimiser, and the stored states, num (steps / every) pairs of them.
A step costs one pass forward and one backward to the adapters; no teacher runs.

Departures from the paper and its code:
- Every j-th step can be stored instead of all; where it begins changes from trajectory to trajectory, so that all steps occur.
- The trajectories are those of DDIM, or its ancestral form with eta = 1, in 50 steps; the code takes 1000 ancestral ones.
- Means of squares without weight, as in the code's default; its other losses (l1, sigma, cosine) are left out.
- The variance that some networks predict is not learnt.
- The adapters differ as said in their file: both kinds start at zero, and the encoders of w, time and class are shared.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from diffdistill.distillers.base import Batch, Distiller, Loss, MethodConfig, Needs, Rng, Turn
from diffdistill.distillers.guidance import sampled_with
from diffdistill.math import grids, losses
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance_adapters import GuidanceAdapterSpec
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import TrajectorySpec


class AGDConfig(MethodConfig):
    """Settings of adapter guidance distillation."""

    adapters: Annotated[GuidanceAdapterSpec, Field(description="what is trained: kind, size and places of the adapters")] = (
        GuidanceAdapterSpec()
    )
    trajectories: Annotated[
        TrajectorySpec, Field(description="the stored trajectories of the guided teacher, and the range of w")
    ] = TrajectorySpec()
    guidance_input: Annotated[
        float,
        Field(ge=0, description="the w the student is sampled with unless another is asked for; inside trajectories.guidance"),
    ] = 3.0
    student_steps: Annotated[
        int, Field(ge=1, description="DDIM steps the student is sampled in unless others are asked for; it serves any number")
    ] = 20
    clip: Annotated[
        float | None,
        Field(gt=0, description="bound on |x0| when the student is sampled, 1 for pixels in [-1, 1]; null for none"),
    ] = None

    @property
    def usual_steps(self) -> int:
        """The student's steps."""
        return self.student_steps

    @model_validator(mode="after")
    def _inside(self) -> AGDConfig:
        low, high = self.trajectories.guidance
        if not low <= self.guidance_input <= high:
            raise ValueError(
                f"guidance_input must lie in the range trajectories.guidance, [{low:g}, {high:g}]; got {self.guidance_input:g}"
            )
        return self


class AGD(Distiller):
    """One pass for the guided teacher's two, the network frozen."""

    name = "agd"
    paper = "arXiv:2503.07274"
    summary = (
        "puts guidance into small adapters of a frozen network: the teacher's steps at half their cost, for any w; data-free"
    )
    Config = AGDConfig

    @classmethod
    def needs(cls, config: AGDConfig) -> Needs:
        """Return: labels alone, a student that trains adapters, and stored trajectories."""
        return Needs("labels", trained=("student",), guidance_adapters=config.adapters, trajectories=config.trajectories)

    def __init__(self, config: AGDConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.roles, self.schedule = config, roles, teacher.schedule

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn."""
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return the mean squared difference of the adapted network's output and the stored guided one; nothing is drawn."""
        asked = batch.trajectories
        assert asked is not None, "adapter guidance distillation needs stored trajectories"
        prediction = self.roles["student"](asked.x_t, asked.t, asked.cond.with_values(guidance=asked.w))
        total = losses.l2(prediction.raw, asked.target).mean()
        return Loss(total, {"loss": total.detach()})

    def sampler(self, num_steps: int) -> Sampler:
        """Return DDIM on the trailing grid, one pass a step, with w as an input."""
        sampler = Sampler(grids.trailing(self.schedule, num_steps), "ddim", clip=self.config.clip)
        return sampled_with(sampler, self.config.guidance_input)
