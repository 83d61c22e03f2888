"""Progressive distillation: a student that does in one DDIM step what its teacher does in two. arXiv:2202.00512.

A stage takes a teacher of 2N steps to a student of N. The student learns the x0 for which one DDIM step from u lands
where two teacher steps land; then it becomes the teacher of the next stage, which halves N again. The noise-to-image map
of the teacher is kept.

    i ~ U{0..N-1},  u = u_i,  u'' = u_{i+1},  u' halfway              trailing grid, noisiest first
    x_u   = alpha_u x0 + sigma_u eps
    x_u'  = DDIM_{u->u'}(x_u, D_source(x_u, u))
    x_u'' = DDIM_{u'->u''}(x_u', D_source(x_u', u'))
    target = invDDIM_{u->u''}(x_u'', x_u)
    loss  = max(SNR_u, 1) mean (target - D_student(x_u, u))^2          Algorithm 2

In memory: the student with its optimiser, and `source`, the frozen teacher of the stage. A step costs two passes of the source,
each two with guidance, as one batch, and the student's with gradient.

Departures from the paper and its code:
- Times are the schedule's own on its trailing grid, not a cosine log-SNR clipped to [-20, 20]; any teacher is accepted.
- Our grids end where sigma = 0 exactly, so at the last step invDDIM is D_source(x_u', u') up to rounding. As in the paper's
  code, that value is taken there.
- Guidance may act on the stage's teacher. Only the first stage of a chain wants it, since its student has it built in; the
  paper has none.
- After method guidance with w as an input this is stage 2 of arXiv:2210.03142: source and student are told the same w, drawn
  for every sample, and the source is not guided a second time.
- The learning rate is the engine's; the paper lets it fall to 0 inside every stage.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

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
from diffdistill.errors import UserError
from diffdistill.math import grids, losses, transfer, weighting
from diffdistill.math.grids import TimeGrid
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler

MIN_ALPHA_OF_EPS = 0.05
"""Below this alpha an eps network cannot be a few-step student: x0 = (x - sigma eps) / alpha turns an error of the network
into one more than 20 times as large, and no later step corrects it. Stable Diffusion's first time has 0.068."""


class ProgressiveConfig(MethodConfig):
    """Settings of one halving stage."""

    student_steps: Annotated[int, Field(ge=1, description="N, DDIM steps of the student; its teacher takes 2N")] = 4
    weighting: Annotated[
        Literal["truncated_snr", "snr_plus_one", "uniform"],
        Field(description="weight of the squared error in x0: max(SNR, 1), SNR + 1 (the plain v loss), or 1"),
    ] = "truncated_snr"
    guidance: GuidanceScale = 1.0
    guidance_interval: GuidanceInterval = None
    guidance_input: GuidanceInput = None
    clip: Annotated[
        float | None,
        Field(
            gt=0,
            description="bound on |x0| when the student is sampled, 1 for pixels in "
            "[-1, 1]; null for none. Training never clips",
        ),
    ] = None

    @property
    def fixed_steps(self) -> int:
        """The student's steps."""
        return self.student_steps

    @model_validator(mode="after")
    def _fits_together(self) -> ProgressiveConfig:
        check_guidance_input(self.guidance_input, self.guidance)
        if self.guidance_input is not None and self.guidance_interval is not None:
            raise ValueError(
                "guidance_interval has no effect where w is an input: the source has its guidance built in. Set it in the "
                "stage that made the source, method guidance"
            )
        return self


_WEIGHTS = {"truncated_snr": weighting.truncated_snr, "snr_plus_one": weighting.snr_plus_one, "uniform": weighting.uniform}


class Progressive(Distiller):
    """One stage of progressive distillation."""

    name = "progressive"
    paper = "arXiv:2202.00512"
    summary = "halves the number of deterministic DDIM steps, stage by stage"
    Config = ProgressiveConfig

    @classmethod
    def needs(cls, config: ProgressiveConfig) -> Needs:
        """Return: images, a trained student, the stage's teacher as `source`, and w as an input where asked for."""
        inputs = extra_inputs(config.guidance_input)
        return Needs("images", trained=("student",), frozen=("source",), extra_inputs=inputs)

    def __init__(self, config: ProgressiveConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.roles, self.schedule = config, roles, teacher.schedule
        self.grid: TimeGrid = grids.trailing(self.schedule, config.student_steps)
        self._half_grid = self.grid.refine(2)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn."""
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return Algorithm 2's loss: two source passes without graph, one student pass."""
        assert batch.x0 is not None, "progressive distillation needs images"
        half_steps = self._half_grid.times_on(batch.x0.device)  # (2N + 1,)
        i = rng.integers(batch.size, self.grid.num_steps)
        u, u_mid, u_end = half_steps[2 * i], half_steps[2 * i + 1], half_steps[2 * i + 2]
        at_u = self.schedule.coefficients(u)
        x_u = transfer.add_noise(batch.x0, rng.normal(batch.x0.shape).to(batch.x0.dtype), at_u)

        w = draw_guidance(self.config.guidance, batch.size, rng)
        cond = told_guidance(batch.cond, w, self.config.guidance_input)
        source = self.roles["source"]
        if self.config.guidance_input is None:
            source = guided_by(source, w, self.config.guidance_interval)
        x0_target = losses.progressive_target(lambda x, t: source(x, t, cond).x0, x_u, u, u_mid, u_end, self.schedule)

        prediction = self.roles["student"](x_u, u, cond)
        self._refuse_eps_at_pure_noise(prediction.kind)
        loss = _WEIGHTS[self.config.weighting](*at_u) * losses.l2(prediction.x0, x0_target)  # (B,)
        return Loss(loss.mean(), {"loss": loss.mean().detach()})

    def _refuse_eps_at_pure_noise(self, kind: str) -> None:
        alpha = float(self.schedule.alpha(self.grid.times[0]))
        if kind == "epsilon" and alpha < MIN_ALPHA_OF_EPS:
            raise UserError(
                f"progressive distillation of an epsilon network needs alpha >= {MIN_ALPHA_OF_EPS} at its first time; it is "
                f"{alpha:.4f} at t = {float(self.grid.times[0]):g}, where x0 = (x - sigma eps) / alpha magnifies every error. "
                "Use a teacher that predicts v or x0, or another method: consistency or dmd2."
            )

    def finish(self) -> None:
        """Make the student the teacher of the next stage."""
        self.roles.assign("source", "student")

    def sampler(self, num_steps: int) -> Sampler:
        """Return DDIM on the trailing grid; the student is trained for `student_steps` of them."""
        sampler = Sampler(grids.trailing(self.schedule, num_steps), "ddim", clip=self.config.clip)
        return sampled_with(sampler, self.config.guidance_input)
