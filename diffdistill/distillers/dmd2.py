"""Improved distribution matching distillation: few steps, no stored pairs, two time scales. arXiv:2405.14867.

The student's outputs are pushed so that, once noised, they are distributed as noised data; the push is the difference of
two denoisers, the teacher's and that of a `fake` network trained online on the student's outputs. The fake network is
updated at every step and the student at every n-th, so that the fake score is accurate when it is used (Sec. 4.2). Several
steps are trained on the states the sampler itself visits (backward simulation, Sec. 4.5); an adversarial loss on real
images may be added (Sec. 4.3).

    k ~ U{0..K-1};  x_t = the sampler's state at its k-th time;  x_g = D_student(x_t, t_k, c)
    x_s = alpha_s x_g + sigma_s eps,  s ~ U[0.02, 0.98]
    g   = (D_fake(x_s) - D_real_w(x_s)) / N,   N = mean |x_g - D_real_w(x_s)|          gradient on x_g
    L_student = 0.5 mean (x_g - sg(x_g - g))^2 + a mean softplus(-head(x_g))
    L_fake    = |D_fake(x_s') - sg(x_g)|^2 in the network's own output type,  s' ~ U[0, 1]
                + b mean [softplus(head(sg(x_g))) + softplus(-head(x_real))]

In memory: student and fake with their optimisers, the frozen teacher, and a small head with the adversarial loss. One
student step costs k simulated student passes, one with gradient, the teacher's (two with guidance, as one batch), the
fake's (in the same batch where `roles.one_batch_up_to` says so), and the fake's update; the other steps only rollout and fake update.
The adversarial loss adds, up to the tap, one pass of the network whose features are read to the student's turn, with gradient into its
inputs, and one of twice the batch to the fake's, without gradient where the teacher's are read.

Departures from the paper and its code:
- The paper's factor alpha in the gradient is absent, as in the authors' code; `dmd` has it.
- Times are continuous, not integers.
- Backward simulation noises each clean estimate with its own draw, as inference does; the authors noise the last simulated
  image anew, equal in law.
- The adversarial loss reads the frozen teacher's features by default: with a LoRA fake network nothing else could learn
  there, and the fake score is not bent by the discriminator. features: fake is the paper's form.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from diffdistill.distillers import matching
from diffdistill.distillers.base import Batch, Distiller, Loss, MethodConfig, Needs, Rng, Turn
from diffdistill.distillers.guidance import GuidanceInterval, GuidanceScale, guided_teacher
from diffdistill.distillers.states import noised, share_of
from diffdistill.math import grids, losses, transfer
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.heads import features
from diffdistill.models.roles import Roles
from diffdistill.sampling.noise import BatchNoise
from diffdistill.sampling.sampler import Sampler


class GanConfig(MethodConfig):
    """The adversarial loss on noised images; needs images."""

    features: Annotated[
        Literal["teacher", "fake"],
        Field(description="whose features the head reads; 'fake' trains the fake network with the discriminator loss as well"),
    ] = "teacher"
    tap: Annotated[str, Field(description="block whose output the head reads")] = "mid"
    generator_weight: Annotated[float, Field(ge=0, description="weight of the student's adversarial loss")] = 1e-3
    discriminator_weight: Annotated[float, Field(gt=0, description="weight of the discriminator's loss beside the fake's")] = (
        1e-2
    )


class DMD2Config(MethodConfig):
    """Settings of DMD2."""

    student_steps: Annotated[int, Field(ge=1, description="K, steps of the student, at the trailing grid's times")] = 4
    student_every: Annotated[
        int, Field(ge=1, description="steps from one student update to the next; the fake network is updated at every step")
    ] = 5
    fake_warmup_steps: Annotated[
        int, Field(ge=0, description="first steps in which only the fake network is updated; 0 for none")
    ] = 0
    guidance: GuidanceScale = 1.0
    guidance_interval: GuidanceInterval = None
    normaliser: Annotated[
        losses.Normaliser, Field(description="what divides the gradient: mean |x_g - D_real| of each sample, or nothing")
    ] = "abs_mean"
    student_time_range: Annotated[
        tuple[float, float], Field(description="shares of the noising process between which the student's loss is taken")
    ] = (0.02, 0.98)
    matching_times: Annotated[
        Literal["all", "own_interval"],
        Field(
            description="noise levels at which the outputs of a student step are compared: all, where the steps share one fake network "
            "that sees only their mixture; or those between its own time and the next one's, where the fake sees each step apart"
        ),
    ] = "all"
    fake_loss: matching.FakeLoss = "network"
    initial: Annotated[
        Literal["simulation", "data"],
        Field(
            description="where the student's inputs come from: the sampler's own states (data-free), or noised images, which the "
            "student will not meet when it is used"
        ),
    ] = "simulation"
    gan: Annotated[GanConfig | None, Field(description="adversarial loss; null for none")] = None

    @property
    def fixed_steps(self) -> int:
        """The student's steps."""
        return self.student_steps

    @field_validator("student_time_range")
    @classmethod
    def _inside(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"student_time_range is [low, high] with 0 <= low < high <= 1; got {list(value)}")
        return value


class DMD2(Distiller):
    """Distribution matching with two time scales and backward simulation."""

    name = "dmd2"
    paper = "arXiv:2405.14867"
    summary = "matches the student's distribution to the teacher's by the difference of two scores; 1 to 4 steps, data-free"
    Config = DMD2Config

    @classmethod
    def needs(cls, config: DMD2Config) -> Needs:
        """Return: student and fake, labels alone unless images are noised or discriminated, a head with the latter."""
        has_images = config.gan is not None or config.initial == "data"
        head = None if config.gan is None else config.gan.tap
        return Needs("images" if has_images else "labels", trained=("student", "fake"), head=head)

    def __init__(self, config: DMD2Config, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.teacher, self.roles, self.schedule = config, teacher, roles, teacher.schedule
        self._rollout = self.sampler(config.student_steps)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the fake's turn, after the student's at every n-th step."""
        fake = Turn("fake", ("fake",) if self.config.gan is None else ("fake", "head"))
        counted = step - self.config.fake_warmup_steps
        if counted < 0 or counted % self.config.student_every:
            return (fake,)
        return (Turn("student", ("student",)), fake)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return the loss of the student's or of the fake's turn."""
        return self._student_loss(batch, rng) if turn.name == "student" else self._fake_loss(batch, rng)

    def _student_loss(self, batch: Batch, rng: Rng) -> Loss:
        k = self._draw_step(rng)
        x_g = self._generate(batch, rng, k)
        x_sg = x_g.detach()
        real = guided_teacher(self.teacher, self.config.guidance, self.config.guidance_interval, batch.size, rng)
        state = noised(x_sg, self.schedule, rng, *self._shares(k, *self.config.student_time_range))
        gradient = matching.matching_gradient(x_sg, state, real, self.roles["fake"], batch.cond, self.config.normaliser)
        total = losses.surrogate(x_g, gradient).mean()
        terms = {"matching": total.detach(), "gradient_abs": gradient.abs().mean()}
        if self.config.gan is not None:
            adversarial = losses.generator_gan_loss(self._logits(x_g, batch.cond, rng)).mean()
            total = total + self.config.gan.generator_weight * adversarial
            terms["adversarial"] = adversarial.detach()
        return Loss(total, terms, carry={"x_g": x_sg, "step": torch.tensor(k)})

    def _fake_loss(self, batch: Batch, rng: Rng) -> Loss:
        if "x_g" in batch.carry:  # the student's turn of this step has made the images
            x_g, k = batch.carry["x_g"], int(batch.carry["step"])
        else:
            k = self._draw_step(rng)
            with torch.no_grad():
                x_g = self._generate(batch, rng, k)
        state = noised(x_g, self.schedule, rng, *self._shares(k))
        total = matching.fake_loss(self.roles["fake"], x_g, state, batch.cond, self.config.fake_loss).mean()
        terms = {"fake": total.detach()}
        if self.config.gan is not None:
            real, fake = self._real_and_fake_logits(x_g, batch, rng)
            discriminator = losses.discriminator_gan_loss(real, fake).mean()
            total = total + self.config.gan.discriminator_weight * discriminator
            terms["discriminator"] = discriminator.detach()
            terms |= {"logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
        return Loss(total, terms)

    def _draw_step(self, rng: Rng) -> int:
        """Return the student's step k, equal for all processes: otherwise they would run different numbers of passes."""
        return rng.shared_integer(self.config.student_steps)

    def _shares(self, k: int, low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
        """Return the shares of the noising process between which the outputs of step k are compared.

        What step k makes is noised to t_{k+1} before the next step sees it, so it need only be right from there on, and above t_k
        it is the step before that decides. The intervals do not overlap, so one fake network knows each step's outputs apart.
        Source: TDM (arXiv:2503.06674), Sec. 4.
        """
        if self.config.matching_times == "all":
            return low, high
        upper, lower = share_of(self.schedule, self._rollout.grid.times[k : k + 2]).tolist()
        return max(low, lower), min(high, upper)

    def _generate(self, batch: Batch, rng: Rng, k: int) -> Tensor:
        """Return x_g of step k."""
        student = self.roles["student"]
        if self.config.initial == "simulation":
            x_t = matching.student_input(student, self._rollout, batch, rng, k)
        else:
            x_t = self._noised_data(batch, rng, k)
        return matching.generate(student, self._rollout, x_t, batch.cond, k)

    def _noised_data(self, batch: Batch, rng: Rng, k: int) -> Tensor:
        """Return images noised to the k-th time; pure noise at the first, as at inference."""
        assert batch.x0 is not None, "initial: data needs images"
        if k == 0:
            return self._rollout.initial(BatchNoise(batch.size, rng.local), tuple(batch.x0.shape[1:]))
        t = self._rollout.grid.times_on(batch.x0.device)[k].expand(batch.size)
        return transfer.add_noise(batch.x0, rng.normal(batch.x0.shape), self.schedule.coefficients(t))

    def _logits(self, x0: Tensor, cond: Condition, rng: Rng) -> Tensor:
        """Return the discriminator's logits of clean states, (B,), read at a fresh time and noise; keeps the graph to x0."""
        assert self.config.gan is not None
        state = noised(x0, self.schedule, rng)
        reader = self.teacher if self.config.gan.features == "teacher" else self.roles["fake"]
        assert self.roles.head is not None, "the adversarial loss needs a head"
        return self.roles.head(features(reader, state.x_t, state.t, cond, self.config.gan.tap))

    def _real_and_fake_logits(self, x_g: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return head(x_real) and head(x_g), asked as one batch."""
        assert batch.x0 is not None, "the adversarial loss needs images"
        logits = self._logits(torch.cat([x_g, batch.x0.to(x_g.dtype)]), batch.cond.repeat(2), rng)
        fake, real = logits.chunk(2)
        return real, fake

    def sampler(self, num_steps: int) -> Sampler:
        """Return: clean estimate, then fresh noise, on the trailing grid; the student is sampled without guidance."""
        return Sampler(grids.trailing(self.schedule, num_steps), "renoise")
