"""Latent consistency distillation of the guided teacher, whole or as a LoRA. arXiv:2310.04378, arXiv:2311.05556.

Consistency distillation along the ODE of the guided teacher, with solver steps of k = T / N timesteps at a time, far enough
apart for neighbouring targets to differ. The guidance scale w is fixed, or drawn for every sample; the student then either
takes w as an input or learns the average over w.

    t = k (i + 1) - 1,  r = max(t - k, 0),  i ~ U{0..N-1}                  Sec. 4.3, skipping steps
    z_t = alpha_t z0 + sigma_t eps
    z_r = DDIM_{t->r}(z_t, D_w),  D_w = D_null + w (D_cond - D_null)       Sec. 4.2, the guided ODE
    f(z, t) = c_skip(t) z + c_out(t) D_student(z, t, c[, w])               Sec. 4.1, f(z, 0) = z
    loss = dist( f_student(z_t, t), sg f_target(z_r, r) )                  Algorithm 1
    target <- mu target + (1 - mu) student                                 or the student itself

In memory: the student with its optimiser, the frozen teacher, the frozen target (with an EMA); with the roles as adapters
of one network only that network (LCM-LoRA). A step costs the teacher's pass (two with guidance, as one batch), the target's, by the
student where there is no average, and the student's with gradient.

Departures from the papers and diffusers' training scripts:
- w counts from 1; the paper's range [2, 14] is [3, 15] here, the scripts' [5, 15] is [6, 16].
- The embedding of w ends in a layer that starts at zero, so the student starts equal to the teacher for every w; the scripts
  leave that layer random.
- The solver is DDIM. The paper's DPM-Solvers are alike at k = 20.
- The last step of the sampler returns D where the papers return f: c_skip is below 7e-6 at every time of the sampler.
- Networks run in eval mode, so dropout has no part.
"""

from __future__ import annotations

from functools import partial
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
    sampled_with,
    told_guidance,
)
from diffdistill.distillers.states import draw_interval
from diffdistill.errors import UserError
from diffdistill.math import grids, losses, transfer
from diffdistill.math.prediction import lcm_boundary
from diffdistill.math.schedules import VPSchedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler


class LCMConfig(MethodConfig):
    """Settings of latent consistency distillation."""

    solver_steps: Annotated[
        int, Field(ge=1, description="N, DDIM steps of the teacher over the whole trajectory; each skips T / N timesteps")
    ] = 50
    guidance: GuidanceScale = 1.0
    guidance_interval: GuidanceInterval = None
    guidance_input: GuidanceInput = None
    ema_decay: Annotated[
        float | None, Field(ge=0, lt=1, description="mu of the target network; null for the student itself under stop-gradient")
    ] = None
    distance: Annotated[
        Literal["huber_elementwise", "l2"], Field(description="distance of the two function values, per element, averaged")
    ] = "huber_elementwise"
    huber_c: Annotated[float | None, Field(ge=0, description="c of the pseudo-Huber distance; null for 0.001")] = None

    @model_validator(mode="after")
    def _fits_together(self) -> LCMConfig:
        check_guidance_input(self.guidance_input, self.guidance)
        if self.huber_c is not None and self.distance == "l2":
            raise ValueError("huber_c has no effect on distance l2; leave it out")
        return self


def consistency_function(denoiser: Denoiser, z_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Return f(z_t, t) = c_skip(t) z_t + c_out(t) D(z_t, t), (B, ...); z_t itself at t = 0."""
    c_skip, c_out = lcm_boundary(t)
    return expand(c_skip, z_t) * z_t + expand(c_out, z_t) * denoiser(z_t, t, cond).x0


class LCM(Distiller):
    """Latent consistency models and LCM-LoRA."""

    name = "lcm"
    paper = "arXiv:2310.04378"
    summary = "consistency distillation of the guided teacher in long solver steps; 1 to 8 steps, whole or as a LoRA"
    Config = LCMConfig

    @classmethod
    def needs(cls, config: LCMConfig) -> Needs:
        """Return: images, a trained student, the frozen target where it is an average, and w as an input where asked for."""
        frozen = () if config.ema_decay is None else ("target",)
        return Needs("images", trained=("student",), frozen=frozen, extra_inputs=extra_inputs(config.guidance_input))

    def __init__(self, config: LCMConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        if not isinstance(teacher.schedule, VPSchedule):
            raise UserError(
                "lcm steps along the integer timesteps of a beta schedule; the teacher has a "
                f"{type(teacher.schedule).__name__}. "
                "Use method consistency with grid: {kind: trailing} and guidance."
            )
        self.config, self.teacher, self.roles, self.schedule = config, teacher, roles, teacher.schedule
        self.grid = grids.index_grid(self.schedule, config.solver_steps)
        self._distance = losses.l2 if config.distance == "l2" else losses.pseudo_huber_elementwise
        if config.huber_c is not None:
            self._distance = partial(losses.pseudo_huber_elementwise, c=config.huber_c)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn."""
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return Algorithm 1's loss: the teacher's guided pass and the target's without graph, one of the student."""
        assert batch.x0 is not None, "lcm needs images"
        t, r = draw_interval(self.grid, batch.size, rng)
        at_t, at_r = self.schedule.coefficients(t), self.schedule.coefficients(r)
        z_t = transfer.add_noise(batch.x0, rng.normal(batch.x0.shape).to(batch.x0.dtype), at_t)
        w = draw_guidance(self.config.guidance, batch.size, rng)
        cond = told_guidance(batch.cond, w, self.config.guidance_input)

        with torch.no_grad():
            teacher = guided_by(self.teacher, w, self.config.guidance_interval)
            z_r = transfer.ddim(z_t, teacher(z_t, t, batch.cond).x0, at_t, at_r)
            target = self.roles["student" if self.config.ema_decay is None else "target"]
            f_target = consistency_function(target, z_r, r, cond)
        f = consistency_function(self.roles["student"], z_t, t, cond)
        loss = self._distance(f, f_target)  # (B,)
        return Loss(loss.mean(), {"loss": loss.mean().detach()})

    def after(self, turn: Turn, step: int) -> None:
        """Move the target towards the student."""
        if self.config.ema_decay is not None:
            self.roles.lerp("target", "student", self.config.ema_decay)

    def sampler(self, num_steps: int) -> Sampler:
        """Return: clean estimate, then fresh noise, at the times of LCMScheduler."""
        sampler = Sampler(grids.lcm(self.schedule, num_steps, self.config.solver_steps), "renoise")
        return sampled_with(sampler, self.config.guidance_input)
