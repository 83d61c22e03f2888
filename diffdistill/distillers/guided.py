"""Guidance distillation: one pass of the student does what the guided teacher does in two. arXiv:2210.03142, stage 1.

The student regresses the guided teacher on noised data and keeps its number of steps, at half their cost. w is fixed, or an
input of the student that varies over a range. Stage 2 of the paper is `progressive`, started from this student. As a LoRA
on the teacher's own network this is LoRA-enhanced distillation, arXiv:2312.06899.

    x_t = alpha_t x0 + sigma_t eps,   t ~ U,   w fixed or ~ U[w_min, w_max]
    D_w = D_null + w (D_cond - D_null)                              teacher, two passes in one batch
    loss = omega(t) mean (D_student(x_t, t, c[, w]) - sg D_w)^2     omega = max(SNR, 1), SNR + 1 or 1
         or mean (F_student - sg F_w)^2                             F the network's own output, eps in arXiv:2312.06899

In memory: the student with its optimiser and the frozen teacher, or one network with an adapter. A step costs the teacher's two
passes, as one batch, and the student's with gradient.

Departures from the papers:
- w counts from 1; the paper's range [0, 4] is [1, 5] here.
- The embedding of w ends in a layer that starts at zero, so the student starts equal to the conditional teacher.
- Guidance may be limited to an interval of noise levels (arXiv:2404.07724), which the student then has built in.
- t is uniform over the noising process of the teacher's own schedule, not of a cosine one.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffdistill.distillers.base import Batch, Distiller, Loss, MethodConfig, Needs, Rng, Turn
from diffdistill.distillers.guidance import (
    GuidanceInput,
    GuidanceInterval,
    GuidanceScale,
    check_guidance_input,
    draw_guidance,
    extra_inputs,
    guided_by,
    has_guidance,
    sampled_with,
    told_guidance,
)
from diffdistill.distillers.states import noised
from diffdistill.math import grids, losses, weighting
from diffdistill.math.prediction import Prediction
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler

Weighting = Literal["truncated_snr", "snr_plus_one", "uniform", "network"]


class GuidanceConfig(MethodConfig):
    """Settings of guidance distillation."""

    guidance: GuidanceScale = 3.0
    guidance_interval: GuidanceInterval = None
    guidance_input: GuidanceInput = None
    weighting: Annotated[
        Weighting,
        Field(
            description="weight of the squared error in x0: max(SNR, 1), SNR + 1 (the plain v loss) or 1; 'network' for the "
            "plain error of the network's own output, the choice for eps networks"
        ),
    ] = "truncated_snr"
    student_steps: Annotated[
        int,
        Field(
            ge=1,
            description="DDIM steps the student is sampled in unless others are asked for; it serves any number, stock schedulers "
            "those that divide the teacher's timesteps",
        ),
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
    def _fits_together(self) -> GuidanceConfig:
        check_guidance_input(self.guidance_input, self.guidance)
        if not has_guidance(self.guidance):
            raise ValueError(
                "guidance 1 is the teacher without guidance and leaves nothing to distil; set a larger one, or a range"
            )
        return self


def guidance_loss(student: Prediction, teacher: Prediction, kind: Weighting) -> Tensor:
    """Return the weighted squared error of the student's prediction, (B,); both at the same (x_t, t)."""
    if kind == "network":
        return losses.l2(student.raw, teacher.as_kind(student.kind))
    weight = {"truncated_snr": weighting.truncated_snr, "snr_plus_one": weighting.snr_plus_one, "uniform": weighting.uniform}[
        kind
    ]
    return weight(student.alpha, student.sigma) * losses.l2(student.x0, teacher.x0)


class GuidanceDistillation(Distiller):
    """One pass for the guided teacher's two."""

    name = "guidance"
    paper = "arXiv:2210.03142"
    summary = "puts guidance into the student: the teacher's steps at half their cost"
    Config = GuidanceConfig

    @classmethod
    def needs(cls, config: GuidanceConfig) -> Needs:
        """Return: images, a trained student, and w as an input where asked for."""
        return Needs("images", trained=("student",), extra_inputs=extra_inputs(config.guidance_input))

    def __init__(self, config: GuidanceConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.teacher, self.roles, self.schedule = config, teacher, roles, teacher.schedule

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn."""
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return stage 1's loss: the guided teacher without graph, one conditional pass of the student."""
        assert batch.x0 is not None, "guidance distillation needs images"
        x_t, t = noised(batch.x0, self.schedule, rng)
        w = draw_guidance(self.config.guidance, batch.size, rng)
        with torch.no_grad():
            target = guided_by(self.teacher, w, self.config.guidance_interval)(x_t, t, batch.cond)
        prediction = self.roles["student"](x_t, t, told_guidance(batch.cond, w, self.config.guidance_input))
        loss = guidance_loss(prediction, target, self.config.weighting)  # (B,)
        return Loss(loss.mean(), {"loss": loss.mean().detach()})

    def sampler(self, num_steps: int) -> Sampler:
        """Return DDIM on the trailing grid without a second pass."""
        sampler = Sampler(grids.trailing(self.schedule, num_steps), "ddim", clip=self.config.clip)
        return sampled_with(sampler, self.config.guidance_input)
