"""Distribution matching distillation into one step, with a regression on stored pairs. arXiv:2311.18828.

The student's outputs, once noised, shall be distributed as noised data: the gradient of the reverse KL needs two scores,
of the frozen teacher and of a `fake` network trained online on the student's outputs. Both networks are updated once a
step, on the same images. The fake network lags behind at this ratio, so a regression to teacher pairs (noise, image)
holds the student to the teacher's modes.

    x_g = D_student(z, t_max, c)
    x_t = alpha x_g + sigma eps,  t ~ U[0.02, 0.98]
    g   = alpha_t (D_fake(x_t) - D_real_w(x_t)) / N,   N = mean |x_g - D_real_w(x_t)|          Eq. 7 and 8
    L_student = 0.5 mean (x_g - sg(x_g - g))^2 + 0.25 LPIPS(D_student(z_ref), y_ref)           Algorithm 1
    L_fake    = |D_fake(x_t') - sg(x_g)|^2 in the network's own output type                    Eq. 6

In memory: student and fake with their optimisers, the frozen teacher, and the LPIPS network where it is used. A step costs the
student's pass with gradient, a second one for the regression, made when the graph of the first is gone, the teacher's (two with
guidance, as one batch), the fake's (in the same batch where `roles.one_batch_up_to` says so), and its update.

Departures from the paper:
- The regression defaults to l2 on the student's clean states, since LPIPS is not defined on latents and its weights do not
  come with this package; `regression.lpips` names them for pixel models.
- Times are continuous; the fake network's law of t is uniform over the whole process.
- The regression can be left out (`regression: null`), for data-free comparison with dmd2; the paper needs it.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffdistill.distillers import matching
from diffdistill.distillers.base import Batch, Distiller, Loss, MethodConfig, Needs, PairBatch, Rng, Turn
from diffdistill.distillers.guidance import GuidanceInterval, GuidanceScale, guided_teacher
from diffdistill.distillers.lpips import LPIPSConfig, load_lpips
from diffdistill.distillers.states import noised
from diffdistill.math import grids, losses
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler


class RegressionConfig(MethodConfig):
    """The regression on stored pairs of the teacher, made with the same guidance."""

    weight: Annotated[float, Field(gt=0, description="lambda_reg, weight beside the matching loss")] = 0.25
    distance: Annotated[Literal["l2", "lpips"], Field(description="distance to the stored image")] = "l2"
    lpips: Annotated[LPIPSConfig | None, Field(description="weights of LPIPS; null for l2")] = None

    @model_validator(mode="after")
    def _weights_fit(self) -> RegressionConfig:
        if (self.distance == "lpips") != (self.lpips is not None):
            raise ValueError("distance: lpips and the paths under lpips belong together; set both or neither")
        return self


class DMDConfig(MethodConfig):
    """Settings of DMD."""

    guidance: GuidanceScale = 1.0
    guidance_interval: GuidanceInterval = None
    student_time_range: Annotated[
        tuple[float, float], Field(description="shares of the noising process between which the student's loss is taken")
    ] = (0.02, 0.98)
    fake_loss: matching.FakeLoss = "network"
    regression: Annotated[
        RegressionConfig | None, Field(description="regression on stored pairs; null for none, and no pairs are read")
    ] = RegressionConfig()

    @property
    def fixed_steps(self) -> int:
        """One: the student is trained from pure noise only."""
        return 1

    @model_validator(mode="after")
    def _range_inside(self) -> DMDConfig:
        low, high = self.student_time_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"student_time_range is [low, high] with 0 <= low < high <= 1; got {[low, high]}")
        return self


class _Given:
    """Noise that is already drawn, for the sampler's first state."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return it."""
        return self.noise


class DMD(Distiller):
    """One-step distribution matching with pair regression."""

    name = "dmd"
    paper = "arXiv:2311.18828"
    summary = "one step: matches distributions by the difference of two scores, held by a regression on teacher pairs"
    Config = DMDConfig

    @classmethod
    def needs(cls, config: DMDConfig) -> Needs:
        """Return: labels alone, student and fake, and stored pairs with the regression."""
        return Needs("labels", trained=("student", "fake"), pairs=config.regression is not None)

    def __init__(self, config: DMDConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.teacher, self.roles, self.schedule = config, teacher, roles, teacher.schedule
        self._one_step = self.sampler(1)
        lpips = config.regression.lpips if config.regression else None
        self._lpips = None if lpips is None else load_lpips(lpips, teacher.sample_shape)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn and the fake's, one to one."""
        return (Turn("student", ("student",)), Turn("fake", ("fake",)))

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return the loss of the student's or of the fake's turn."""
        return self._student_loss(batch, rng) if turn.name == "student" else self._fake_loss(batch, rng)

    def _student_loss(self, batch: Batch, rng: Rng) -> Loss:
        student = self.roles["student"]
        z = matching.student_input(student, self._one_step, batch, rng, step=0)
        x_g = matching.generate(student, self._one_step, z, batch.cond, step=0)
        x_sg = x_g.detach()
        real = guided_teacher(self.teacher, self.config.guidance, self.config.guidance_interval, batch.size, rng)
        state = noised(x_sg, self.schedule, rng, *self.config.student_time_range)
        gradient = matching.matching_gradient(
            x_sg, state, real, self.roles["fake"], batch.cond, factor=self.schedule.alpha(state.t)
        )
        total = losses.surrogate(x_g, gradient).mean()
        terms = {"matching": total.detach(), "gradient_abs": gradient.abs().mean()}
        regression = self.config.regression
        then = None if regression is None else partial(self._regression_loss, regression.weight, batch.pairs)
        return Loss(total, terms, carry={"x_g": x_sg}, then=then)

    def _regression_loss(self, weight: float, pairs: PairBatch | None) -> Loss:
        """Return the weighted distance between the student's images and the teacher's of the same noise."""
        assert pairs is not None, "DMD's regression needs stored pairs"
        z = self._one_step.initial(_Given(pairs.noise), tuple(pairs.noise.shape[1:]))
        x_ref = matching.generate(self.roles["student"], self._one_step, z, pairs.cond, step=0)
        distance = losses.l2(x_ref, pairs.x0) if self._lpips is None else self._lpips(x_ref, pairs.x0)
        regression = distance.mean()
        return Loss(weight * regression, {"regression": regression.detach()})

    def _fake_loss(self, batch: Batch, rng: Rng) -> Loss:
        x_g = batch.carry["x_g"]
        state = noised(x_g, self.schedule, rng)
        total = matching.fake_loss(self.roles["fake"], x_g, state, batch.cond, self.config.fake_loss).mean()
        return Loss(total, {"fake": total.detach()})

    def sampler(self, num_steps: int) -> Sampler:
        """Return: clean estimate, then fresh noise, on the trailing grid; the student is trained for one step."""
        return Sampler(grids.trailing(self.schedule, num_steps), "renoise")
