"""Variational score distillation of a one-step generator, data-free: VSD, SwiftBrush, Diff-Instruct.

arXiv:2305.16213 (VSD), arXiv:2312.05239 (SwiftBrush), arXiv:2305.18455 (Diff-Instruct). The student's image, once noised, is
moved along the difference of two scores: the guided teacher's, and that of a `fake` network which learns the student's own
images online, usually as a LoRA of the teacher. Both are updated once a step. There is no normaliser, no regression and no
adversarial loss; what tells the papers apart is the weight of the difference and the law of t.

    x_g = D_student(z, t_max, c)
    x_t = alpha x_g + sigma eps,  t ~ U[0.02, 0.98]
    g   = sigma^2 (eps_real_w(x_t) - eps_fake(x_t)) = W (D_fake - D_real_w),  W = alpha sigma
    L_student = 0.5 mean (x_g - sg(x_g - g))^2
    L_fake    = |F_fake(x_t') - target|^2 in the network's own output type, on sg(x_g),  t' ~ U[0, 1]

    weighting      W on D_fake - D_real    on the scores    descends the integral over t of
    vsd            alpha sigma             sigma^3          (sigma^3 / alpha) KL(q_t || p_t)
    diff_instruct  1                       sigma^2 / alpha  (sigma / alpha)^2 KL(q_t || p_t)
    kl             alpha^2 / sigma^2       alpha            KL(q_t || p_t)

Diff-Instruct is a setting and not a method of its own, since roles, turns, gradient and sampler are the same: `weighting:
diff_instruct, time_law: lognormal, student_time_range: [0, 1], fake_loss: edm`. SwiftBrush is the default with
`fake_loss: alpha_epsilon` and `guided_fake: {}`.

In memory: student and fake with their optimisers and the frozen teacher; one network and two adapters in layout `shared`.
A step costs the student's pass with gradient, the teacher's (two with guidance, as one batch), the fake's (in the same batch where
`roles.one_batch_up_to` says so) and its update.

Departures from the papers and their code:
- Times are continuous, not integers, and x_0 is read with the schedule's own alpha at t_max, where SwiftBrush writes
  sqrt(0.0047) into the code.
- The fake network learns from the images of the student's turn, as in SwiftBrush; Diff-Instruct draws new ones and
  updates the fake first. It also starts at a chosen sigma (1 on CIFAR-10); here every student starts at t_max.
- Losses are means over a sample; Diff-Instruct's and VSD's are sums, which an optimiser like Adam does not see.
- SwiftBrush guides the fake network like the teacher (`guided_fake`). A fake network that has learnt both its branches then
  takes the teacher's guidance out again: for Gaussian classes the student ends at the class itself, whatever w. Off by default.
- Labels are dropped sample by sample for the guided fake, not for whole batches.
- VSD's renderings and camera, and SwiftBrush v2's clamped CLIP loss and merged weights (arXiv:2408.14176) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from diffdistill.distillers import matching
from diffdistill.distillers.base import Batch, Distiller, Loss, MethodConfig, Needs, Rng, Turn
from diffdistill.distillers.guidance import GuidanceInterval, GuidanceScale, guided_teacher
from diffdistill.distillers.states import Noised, diffusion_time
from diffdistill.math import grids, losses, transfer, weighting
from diffdistill.math.schedules import Schedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import Guided
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler

TimeLaw = Literal["uniform", "lognormal"]
WEIGHTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vsd": lambda alpha, sigma: alpha * sigma,
    "diff_instruct": weighting.uniform,
    "kl": weighting.snr,
}
LOGNORMAL = (-1.2, 1.2)  # mean and std of ln(sigma / alpha) in Diff-Instruct's code


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"a time range is [low, high] with 0 <= low < high <= 1; got {list(value)}")
    return value


class LateConfig(MethodConfig):
    """A second time range for the end of the training, when coarse structure has settled. VSD: [0.02, 0.5] from step 5000."""

    from_step: Annotated[int, Field(ge=1, description="first step of the stage with this range")]
    student_time_range: Annotated[tuple[float, float], Field(description="shares of the noising process, as before it")] = (
        0.02,
        0.5,
    )
    _inside = field_validator("student_time_range")(_check_range)


class GuidedFakeConfig(MethodConfig):
    """The fake network under the teacher's guidance, as in SwiftBrush."""

    null_share: Annotated[
        float, Field(gt=0, lt=1, description="share of samples whose condition is dropped when the fake network is trained")
    ] = 0.1


class VSDConfig(MethodConfig):
    """Settings of variational score distillation."""

    weighting: Annotated[
        Literal["vsd", "diff_instruct", "kl"],
        Field(
            description="weight of D_fake - D_real: alpha sigma (VSD, SwiftBrush: sigma^2 on eps), 1 (Diff-Instruct), or alpha^2 / "
            "sigma^2, the plain integral of KL divergences"
        ),
    ] = "vsd"
    guidance: GuidanceScale = 1.0
    guidance_interval: GuidanceInterval = None
    guided_fake: Annotated[
        GuidedFakeConfig | None, Field(description="guide the fake network as the teacher; null for never, as in VSD")
    ] = None
    time_law: Annotated[
        TimeLaw,
        Field(
            description="law of t in both losses: a uniform share of the noising process, or ln(sigma / alpha) normal with mean -1.2 "
            "and standard deviation 1.2, held inside the range"
        ),
    ] = "uniform"
    student_time_range: Annotated[
        tuple[float, float], Field(description="shares of the noising process between which the student's loss is taken")
    ] = (0.02, 0.98)
    late: Annotated[LateConfig | None, Field(description="another time range from some step on; null for none")] = None
    fake_loss: matching.FakeLoss = "network"
    fake_warmup_steps: Annotated[
        int,
        Field(
            ge=0,
            description="first steps in which only the fake network is updated, so that it knows a student that does not start at the "
            "teacher; 0 for none",
        ),
    ] = 0

    _inside = field_validator("student_time_range")(_check_range)

    @property
    def fixed_steps(self) -> int:
        """One: the student is trained from pure noise only."""
        return 1


def draw_time(schedule: Schedule, size: int, rng: Rng, law: TimeLaw, limits: tuple[float, float]) -> Tensor:
    """Return times between two shares of the noising process, (size,) float64."""
    if law == "uniform":
        return diffusion_time(schedule, rng.uniform(size, *limits))
    mean, std = LOGNORMAL
    t = schedule.time_of_lambda(-(mean + std * rng.normal((size,)).double()))
    low, high = diffusion_time(schedule, torch.tensor(limits, dtype=torch.float64)).tolist()  # on the CPU: nothing waits
    return t.clamp(low, high)


class VSD(Distiller):
    """One step by the difference of the teacher's score and the student's own."""

    name = "vsd"
    paper = "arXiv:2305.16213"
    summary = "one step: follows the difference of the guided teacher's score and a LoRA's; data-free (VSD, SwiftBrush, Diff-Instruct)"
    Config = VSDConfig

    @classmethod
    def needs(cls, config: VSDConfig) -> Needs:
        """Return: labels alone, student and fake."""
        return Needs("labels", trained=("student", "fake"))

    def __init__(self, config: VSDConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.teacher, self.roles, self.schedule = config, teacher, roles, teacher.schedule
        self._one_step = self.sampler(1)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn and the fake's, one to one; after the first steps, which are the fake's alone."""
        fake = Turn("fake", ("fake",))
        return (fake,) if step < self.config.fake_warmup_steps else (Turn("student", ("student",)), fake)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return the loss of the student's or of the fake's turn."""
        return self._student_loss(batch, rng, step) if turn.name == "student" else self._fake_loss(batch, rng)

    def _student_loss(self, batch: Batch, rng: Rng, step: int) -> Loss:
        x_g = self._generate(batch, rng)
        x_sg = x_g.detach()
        real = guided_teacher(self.teacher, self.config.guidance, self.config.guidance_interval, batch.size, rng)
        state = self._noised(x_sg, rng, self._limits(step))
        factor = WEIGHTS[self.config.weighting](*self.schedule.coefficients(state.t))
        gradient = matching.matching_gradient(x_sg, state, real, self._fake_beside(real), batch.cond, "none", factor)
        total = losses.surrogate(x_g, gradient).mean()
        return Loss(total, {"matching": total.detach(), "gradient_abs": gradient.abs().mean()}, carry={"x_g": x_sg})

    def _fake_loss(self, batch: Batch, rng: Rng) -> Loss:
        if "x_g" in batch.carry:  # the student's turn of this step has made the images
            x_g = batch.carry["x_g"]
        else:
            with torch.no_grad():
                x_g = self._generate(batch, rng)
        state = self._noised(x_g, rng, (0.0, 1.0))
        cond = self._with_null_share(batch.cond, rng)
        total = matching.fake_loss(self.roles["fake"], x_g, state, cond, self.config.fake_loss).mean()
        return Loss(total, {"fake": total.detach()})

    def _generate(self, batch: Batch, rng: Rng) -> Tensor:
        """Return x_g."""
        student = self.roles["student"]
        z = matching.student_input(student, self._one_step, batch, rng, step=0)
        return matching.generate(student, self._one_step, z, batch.cond, step=0)

    def _limits(self, step: int) -> tuple[float, float]:
        late = self.config.late
        return self.config.student_time_range if late is None or step < late.from_step else late.student_time_range

    def _noised(self, x0: Tensor, rng: Rng, limits: tuple[float, float]) -> Noised:
        t = draw_time(self.schedule, len(x0), rng, self.config.time_law, limits)
        return Noised(transfer.add_noise(x0, rng.normal(x0.shape).to(x0.dtype), self.schedule.coefficients(t)), t)

    def _fake_beside(self, real: Denoiser) -> Denoiser:
        """Return the fake network as it is compared with the teacher: under the teacher's own w where it is guided at all."""
        fake = self.roles["fake"]
        if self.config.guided_fake is None or not isinstance(real, Guided):
            return fake
        return Guided(fake, real.scale, real.interval)

    def _with_null_share(self, cond: Condition, rng: Rng) -> Condition:
        guided_fake = self.config.guided_fake
        return cond if guided_fake is None else cond.drop(rng.uniform(cond.batch_size) < guided_fake.null_share)

    def sampler(self, num_steps: int) -> Sampler:
        """Return: clean estimate, then fresh noise, on the trailing grid; the student is trained for one step."""
        return Sampler(grids.trailing(self.schedule, num_steps), "renoise")
