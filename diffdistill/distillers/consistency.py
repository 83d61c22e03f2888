"""Consistency distillation and training: one function that maps every point of a trajectory to its end.

Consistency models arXiv:2303.01469 (CD, CT); improved training arXiv:2310.14189 (iCT); easy tuning arXiv:2406.14548 (ECT).
The function agrees with itself at two neighbouring times of the teacher's ODE, and is the identity at the end; so the
agreement carries the end point to every time. Distillation moves from t to r by a step of the teacher; training has no
teacher and moves along the data's own noise, which is an Euler step with x0 as the denoiser.

    f(x, t) = DDIM_{t->end}(x, D_student(x, t)),   f(x, end) = x
    x_t  = alpha_t x0 + sigma_t eps,   (t, r) neighbours of a grid, t noisier
    x_r  = DDIM or Heun_{t->r}(x_t; teacher)              distillation, Algorithm 2
         = alpha_r x0 + sigma_r eps                       training, Algorithm 3
    loss = weight(t, r) dist( f_student(x_t, t), sg f_target(x_r, r) )
    target <- mu target + (1 - mu) student                or the student itself

In memory: the student with its optimiser, the frozen teacher (distillation), the frozen target (with an EMA). A step costs the
teacher's solver (`solver_steps` passes, twice as many with heun, and again with guidance; none in training), the target's pass, by the
student where there is no average, and the student's with gradient.

Recipes: CD is mode distillation, solver heun, ema_decay 0.95 on a Karras grid of 40 points. CT is mode training,
curriculum ct, ema_decay 0.9. iCT is mode training, curriculum ict, distance huber_vector, weighting inverse_gap, noise_law
lognormal. ECT is mode training, grid continuous, curriculum ect, distance huber_vector with huber_c 0, weighting
inverse_gap, noise_law lognormal.

Departures from the papers:
- f is the DDIM form of the student's x0, for any schedule and output type, so a pretrained network starts with f near D; the
  papers' c_skip and c_out belong to EDM networks. Both are the identity at the end point, exactly.
- Noise levels of grids, laws and weights are sigma / alpha, the papers' t, whatever the schedule.
- Guidance may act on the teacher of distillation; the papers have none.
- Networks run in eval mode, so the equal dropout masks that the papers ask of both evaluations hold: there are none.
- The last step of the sampler returns D where the grid ends at sigma_min > 0; f would leave noise of sigma_min = 0.002.
- Times for several steps are spread evenly over the training grid; the papers searched them by FID.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffdistill.distillers.base import Batch, Distiller, Loss, MethodConfig, Needs, Rng, Turn
from diffdistill.distillers.guidance import GuidanceInterval, GuidanceScale, guided_teacher, has_guidance
from diffdistill.distillers.lpips import LPIPSConfig, load_lpips
from diffdistill.distillers.states import Jump, draw_interval
from diffdistill.errors import UserError
from diffdistill.math import grids, losses, transfer, weighting
from diffdistill.math.grids import TimeGrid
from diffdistill.math.schedules import Coefficients, Schedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler

# Settings


class KarrasGrid(MethodConfig):
    """Karras' grid in sigma / alpha; f ends at sigma_min."""

    kind: Literal["karras"] = "karras"
    num_points: Annotated[int, Field(ge=2, description="N, points of the grid; unused under a curriculum")] = 18
    sigma_min: Annotated[float, Field(gt=0, description="noise level of the end point")] = 0.002
    sigma_max: Annotated[
        float | None, Field(gt=0, description="noise level of the first point; null for the schedule's own")
    ] = None
    rho: Annotated[float, Field(gt=0, description="larger values put more points at low noise")] = 7.0


class IndexGrid(MethodConfig):
    """LCM's grid of every (T / num_steps)-th timestep of a beta schedule; f ends at timestep 0."""

    kind: Literal["index"] = "index"
    num_steps: Annotated[int, Field(ge=1, description="steps of the teacher's solver over the whole trajectory")] = 50


class TrailingGrid(MethodConfig):
    """Evenly spaced times of any schedule; f ends at the clean end."""

    kind: Literal["trailing"] = "trailing"
    num_steps: Annotated[int, Field(ge=1, description="steps of the teacher's solver; unused under a curriculum")] = 18


class NoGrid(MethodConfig):
    """ECT's continuous times, for curriculum ect; f ends at the clean end."""

    kind: Literal["continuous"] = "continuous"
    sigma_min: Annotated[float, Field(gt=0, description="smallest noise level drawn")] = 0.002
    sigma_max: Annotated[float | None, Field(gt=0, description="largest noise level drawn; null for the schedule's own")] = None


class CTCurriculum(MethodConfig):
    """CT: from s0 to s1 intervals, quadratically; ema_decay is its value at s0 intervals and rises with them."""

    kind: Literal["ct"] = "ct"
    s0: Annotated[int, Field(ge=1, description="intervals at the start")] = 2
    s1: Annotated[int, Field(ge=1, description="intervals at the end")] = 150


class ICTCurriculum(MethodConfig):
    """ICT: intervals double from s0 to s1, in phases of equal length."""

    kind: Literal["ict"] = "ict"
    s0: Annotated[int, Field(ge=1, description="intervals at the start")] = 10
    s1: Annotated[int, Field(ge=1, description="intervals at the end")] = 1280


class ECTCurriculum(MethodConfig):
    """ECT: the gap t - r shrinks by 1 / q with every stage, from denoising (r = 0) on."""

    kind: Literal["ect"] = "ect"
    q: Annotated[float, Field(gt=1, description="factor by which the gap shrinks with a stage")] = 2.0
    double_every: Annotated[int, Field(ge=1, description="steps of a stage")] = 25_000


Grid = Annotated[
    KarrasGrid | IndexGrid | TrailingGrid | NoGrid, Field(discriminator="kind", description="where the times t and r come from")
]
Curriculum = Annotated[CTCurriculum | ICTCurriculum | ECTCurriculum, Field(discriminator="kind")]


class ConsistencyConfig(MethodConfig):
    """Settings of consistency distillation and training; the defaults are CD's with l2."""

    mode: Annotated[
        Literal["distillation", "training"],
        Field(description="whether x_r comes from the teacher's ODE or from the data's own noise"),
    ] = "distillation"
    grid: Grid = KarrasGrid()
    solver: Annotated[
        Literal["ddim", "heun"],
        Field(description="teacher's step from t to r: one pass or two; training takes ddim with x0 itself"),
    ] = "ddim"
    solver_steps: Annotated[
        int,
        Field(
            ge=1,
            description="teacher's steps from t to r, evenly spaced in time; more make a coarse grid exact, whose last interval is "
            "otherwise the teacher's blurred estimate",
        ),
    ] = 1
    curriculum: Annotated[
        Curriculum | None, Field(description="how the gap t - r shrinks over the run; null for a fixed grid")
    ] = None
    ema_decay: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="mu of the target network; null for the student itself "
            "under stop-gradient, which needs no further copy",
        ),
    ] = None
    distance: Annotated[
        Literal["l2", "l1", "huber_elementwise", "huber_vector", "lpips"],
        Field(description="distance of the two function values; the two pseudo-Hubers are different losses"),
    ] = "l2"
    huber_c: Annotated[
        float | None,
        Field(
            ge=0,
            description="c of a pseudo-Huber distance; null for the papers' values, "
            "0.00054 sqrt(dim) (vector) and 0.001 (elementwise)",
        ),
    ] = None
    lpips: Annotated[LPIPSConfig | None, Field(description="weights of LPIPS; null for the other distances")] = None
    weighting: Annotated[
        Literal["uniform", "inverse_gap"],
        Field(description="1, or 1 / (difference of the noise levels sigma / alpha of t and r)"),
    ] = "uniform"
    noise_law: Annotated[
        Literal["uniform", "lognormal"],
        Field(description="how t is drawn: uniformly over grid intervals, or with ln(sigma / alpha) normal"),
    ] = "uniform"
    lognormal_mean: Annotated[float, Field(description="P_mean of the lognormal law")] = -1.1
    lognormal_std: Annotated[float, Field(gt=0, description="P_std of the lognormal law")] = 2.0
    guidance: GuidanceScale = 1.0
    guidance_interval: GuidanceInterval = None

    @model_validator(mode="after")
    def _fits_together(self) -> ConsistencyConfig:
        curriculum = None if self.curriculum is None else self.curriculum.kind
        if self.mode == "training" and (self.solver != "ddim" or self.solver_steps > 1 or has_guidance(self.guidance)):
            raise ValueError(
                "mode: training asks no teacher, so solver, solver_steps and guidance have no effect; leave them out, "
                "or use mode: distillation"
            )
        if (self.grid.kind == "continuous") != (curriculum == "ect"):
            raise ValueError(
                "grid: continuous and curriculum: ect belong together; got "
                f"grid {self.grid.kind} and curriculum {curriculum or 'null'}"
            )
        if curriculum in ("ct", "ict") and self.grid.kind == "index":
            raise ValueError(f"curriculum {curriculum} changes the number of points; use grid karras or trailing, not index")
        if self.huber_c is not None and not self.distance.startswith("huber"):
            raise ValueError(f"huber_c has no effect on distance {self.distance}; leave it out")
        if (self.distance == "lpips") != (self.lpips is not None):
            raise ValueError("distance: lpips and the paths under lpips belong together; set both or neither")
        if self.noise_law == "uniform" and self.grid.kind == "continuous":
            raise ValueError("grid: continuous has no intervals to choose from uniformly; use noise_law: lognormal")
        return self


# The times


def draw_ect(
    schedule: Schedule, size: int, rng: Rng, lognormal: tuple[float, float], limits: tuple[float, float], stage: int, q: float
) -> Jump:
    """Draw ECT's pair: ln(sigma / alpha) of t normal, that of r by the stage's shrinking rule.

    Args:
        lognormal: mean and standard deviation of the logarithm of the noise level.
        limits: smallest and largest noise level; draws beyond are moved there.
    Source: ECT (arXiv:2406.14548), released code.
    """
    mean, std = lognormal
    level = (mean + std * rng.normal((size,)).double()).exp().clamp(*limits)
    level_r = weighting.ect_next_level(level, stage, q)
    return Jump(schedule.time_of_lambda(-level.log()), schedule.time_of_lambda(-level_r.log()))


# The function


def consistency_function(denoiser: Denoiser, x_t: Tensor, t: Tensor, end: float, cond: Condition) -> Tensor:
    """Return f(x_t, t) = DDIM_{t->end}(x_t, D(x_t, t)), (B, ...); x_t itself, bit for bit, where t is the end.

    Args:
        t: times, (B,), not below `end`.
        end: the end point's time; where it is clean, f = D for every other time.
    """
    is_end = t <= end
    said = denoiser(
        x_t, torch.where(is_end, denoiser.schedule.t_max, t), cond
    )  # not asked at sigma = 0, by which ddim would divide
    f = transfer.ddim(x_t, said.x0, said.point, denoiser.schedule.coefficients(torch.full_like(t, end)))
    return torch.where(is_end.to(x_t.device).reshape(-1, *[1] * (x_t.ndim - 1)), x_t.to(f.dtype), f)


def _clean(denoiser: Denoiser, cond: Condition, x_t: Tensor, t: Tensor) -> Tensor:
    return denoiser(x_t, t, cond).x0


def _distance(config: ConsistencyConfig, sample_shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    if config.distance == "lpips":
        assert config.lpips is not None
        return load_lpips(config.lpips, sample_shape)
    if config.distance == "huber_elementwise":
        return (
            losses.pseudo_huber_elementwise
            if config.huber_c is None
            else partial(losses.pseudo_huber_elementwise, c=config.huber_c)
        )
    if config.distance == "huber_vector":
        c = losses.ict_huber_constant(math.prod(sample_shape)) if config.huber_c is None else config.huber_c
        return partial(losses.pseudo_huber_vector, c=c)
    return {"l2": losses.l2, "l1": losses.l1}[config.distance]


class Consistency(Distiller):
    """Consistency distillation (CD) and training (CT, iCT, ECT)."""

    name = "consistency"
    paper = "arXiv:2303.01469"
    summary = "maps every point of the teacher's trajectory to its end; one step, or more by re-noising"
    Config = ConsistencyConfig

    @classmethod
    def needs(cls, config: ConsistencyConfig) -> Needs:
        """Return: images, a trained student, and the frozen target where it is an average."""
        return Needs("images", trained=("student",), frozen=() if config.ema_decay is None else ("target",))

    def __init__(self, config: ConsistencyConfig, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        self.config, self.teacher, self.roles, self.total_steps = config, teacher, roles, total_steps
        self.schedule = teacher.schedule
        self._distance = _distance(config, teacher.sample_shape)
        self._lognormal = (config.lognormal_mean, config.lognormal_std)
        self._limits = self._noise_range()
        self._grids = functools.lru_cache(maxsize=1)(self._grid)  # one for many steps
        first = self.schedule.coefficients(self.grid(0).times[:1]) if config.grid.kind != "continuous" else None
        if config.weighting == "inverse_gap" and first is not None and not bool(first.noise_to_signal.isfinite()):
            raise UserError(
                "weighting: inverse_gap is 0 at the first time of this grid, where alpha = 0, so that nothing "
                "would be learnt there. Use weighting: uniform, or grid: karras with sigma_max."
            )

    def _noise_range(self) -> tuple[float, float]:
        """Return the noise levels sigma / alpha of a Karras or continuous grid, the schedule's own where none is given."""
        grid = self.config.grid
        if grid.kind not in ("karras", "continuous"):
            return 0.0, math.inf
        t_max = torch.tensor([self.schedule.t_max], dtype=torch.float64)
        largest = float(self.schedule.coefficients(t_max).noise_to_signal)
        sigma_max = largest if grid.sigma_max is None else grid.sigma_max
        if not grid.sigma_min < sigma_max <= largest * (1 + 1e-9) or not math.isfinite(sigma_max):
            raise UserError(
                f"grid {grid.kind} needs sigma_min < sigma_max inside the schedule's noise levels, which end at "
                f"{largest:g}; got sigma_min {grid.sigma_min:g} and sigma_max {sigma_max:g}."
            )
        return grid.sigma_min, sigma_max

    def grid(self, step: int) -> TimeGrid:
        """Return the grid of a step: fixed, or with the curriculum's number of points."""
        grid, curriculum = self.config.grid, self.config.curriculum
        assert not isinstance(grid, NoGrid), "ECT has no grid"
        num_steps = grid.num_points - 1 if isinstance(grid, KarrasGrid) else grid.num_steps
        if isinstance(curriculum, CTCurriculum):
            num_steps = weighting.ct_num_intervals(step, self.total_steps, curriculum.s0, curriculum.s1)
        elif isinstance(curriculum, ICTCurriculum):
            num_steps = weighting.ict_num_points(step, self.total_steps, curriculum.s0, curriculum.s1) - 1
        return self._grids(num_steps)

    def _grid(self, num_steps: int) -> TimeGrid:
        grid = self.config.grid
        if isinstance(grid, KarrasGrid):
            return grids.karras(self.schedule, num_steps + 1, *self._limits, grid.rho)
        if isinstance(grid, IndexGrid):
            return grids.index_grid(self.schedule, num_steps)
        return grids.trailing(self.schedule, num_steps)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the student's turn."""
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return Algorithm 2's or 3's loss: the solver's passes and the target's without graph, one of the student."""
        assert batch.x0 is not None, "consistency needs images"
        (t, r), end = self._times(batch.size, rng, step)
        at_t, at_r = self.schedule.coefficients(t), self.schedule.coefficients(r)
        eps = rng.normal(batch.x0.shape).to(batch.x0.dtype)
        x_t = transfer.add_noise(batch.x0, eps, at_t)

        with torch.no_grad():
            x_r = self._move(x_t, (t, r), (at_t, at_r), batch, eps, rng)
            target = self.roles["student" if self.config.ema_decay is None else "target"]
            f_target = consistency_function(target, x_r, r, end, batch.cond)
        f = consistency_function(self.roles["student"], x_t, t, end, batch.cond)
        loss = self._weight(at_t, at_r) * self._distance(f, f_target)  # (B,)
        return Loss(loss.mean(), {"loss": loss.mean().detach()})

    def _times(self, size: int, rng: Rng, step: int) -> tuple[Jump, float]:
        """Return the batch's (t, r) and the end point."""
        curriculum = self.config.curriculum
        if isinstance(curriculum, ECTCurriculum):
            stage = step // curriculum.double_every
            return draw_ect(self.schedule, size, rng, self._lognormal, self._limits, stage, curriculum.q), self.schedule.t_clean
        grid = self.grid(step)
        law = self._lognormal if self.config.noise_law == "lognormal" else None
        return draw_interval(grid, size, rng, law), float(grid.times[-1])

    def _move(
        self,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        points: tuple[Coefficients, Coefficients],
        batch: Batch,
        eps: Tensor,
        rng: Rng,
    ) -> Tensor:
        """Return x_r: on the teacher's trajectory through x_t, or x0 with the same noise."""
        assert batch.x0 is not None
        (t, r), (at_t, at_r) = times, points
        if self.config.mode == "training":
            return transfer.add_noise(batch.x0, eps, at_r)
        teacher = guided_teacher(self.teacher, self.config.guidance, self.config.guidance_interval, batch.size, rng)
        denoise = partial(_clean, teacher, batch.cond)
        between = [torch.lerp(t, r, k / self.config.solver_steps) for k in range(1, self.config.solver_steps)]
        ends = [*zip(between, map(self.schedule.coefficients, between), strict=True), (r, at_r)]
        for (s, at_s), (s_next, at_next) in itertools.pairwise([(t, at_t), *ends]):
            if self.config.solver == "heun":
                x_t = transfer.heun(denoise, x_t, s, s_next, self.schedule)
            else:
                x_t = transfer.ddim(x_t, denoise(x_t, s), at_s, at_next)
        return x_t

    def _weight(self, at_t: Coefficients, at_r: Coefficients) -> Tensor:
        if self.config.weighting == "uniform":
            return weighting.uniform(*at_t)
        return weighting.inverse_gap(at_t.noise_to_signal, at_r.noise_to_signal)

    def after(self, turn: Turn, step: int) -> None:
        """Move the target towards the student; under CT's curriculum mu follows the number of intervals."""
        decay, curriculum = self.config.ema_decay, self.config.curriculum
        if decay is None:
            return
        if isinstance(curriculum, CTCurriculum) and decay > 0:
            decay = weighting.ct_ema_decay(step, self.total_steps, curriculum.s0, curriculum.s1, decay)
        self.roles.lerp("target", "student", decay)

    def sampler(self, num_steps: int) -> Sampler:
        """Return: clean estimate, then fresh noise, at `num_steps` times spread evenly over the training grid."""
        grid = self.config.grid
        if isinstance(grid, IndexGrid):
            return Sampler(grids.lcm(self.schedule, num_steps, grid.num_steps), "renoise")
        if isinstance(grid, TrailingGrid):
            return Sampler(grids.trailing(self.schedule, num_steps), "renoise")
        rho = grid.rho if isinstance(grid, KarrasGrid) else 7.0
        ramp = grids.karras(self.schedule, num_steps + 1, *self._limits, rho)  # its last point, sigma_min, is left out
        return Sampler(grids.at_times(self.schedule, ramp.times[:-1].tolist()), "renoise")
