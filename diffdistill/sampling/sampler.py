"""How a model is sampled: one object for rollout, validation, evaluation and export.

A `Sampler` is a time grid and a rule. Its states equal, step by step, those of the stock diffusers scheduler that
`scheduler_config` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffdistill.math import transfer
from diffdistill.math.grids import TimeGrid
from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import Coefficients
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, View
from diffdistill.models.guidance import guided

Rule = Literal["ddim", "renoise", "heun", "dpmpp_2m", "sde"]


DRAWN_AHEAD = 16
"""Draws of noise that a sampler makes before its first pass, at most: one on the CPU waits for all that a GPU has under way. More would
take memory for every step."""


class DrawsNoise(Protocol):
    """Anything that draws (B, *shape) standard normal noise: `Noise` or `BatchNoise`."""

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the next draw."""
        ...


class State(NamedTuple):
    """One step of a trajectory: the state x_t at time t, and the clean estimate x0 made from it."""

    t: float
    x_t: Tensor
    x0: Tensor


class Recording(View):
    """A denoiser that writes down what it is asked and answers: one `State` a call, in `states`."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.schedule, self.sample_shape = inner, inner.schedule, inner.sample_shape
        self.states: list[State] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the inner prediction."""
        prediction = self.inner(x_t, t, cond)
        self.states.append(State(float(t[0]), x_t, prediction.x0))
        return prediction


class Estimate(NamedTuple):
    """A clean estimate x0 (B, ...) and the point it was made at."""

    x0: Tensor
    point: Coefficients


@dataclass(frozen=True)
class Sampler:
    """A time grid and the rule that carries a state along it.

    Attributes:
        grid: the times, noisiest first.
        rule: "ddim" deterministic (stochastic with eta), "renoise" clean estimate then fresh noise (consistency,
            LCM, DMD2), "heun", "dpmpp_2m" and "sde" for teachers.
        eta: noise of "ddim" (diffusers' eta) and "sde"; 0 for none.
        guidance: w counted from 1.
        clip: bound on |x0| in every step, or None; few-step pixel models use 1.
        guidance_as_input: whether the network takes w as an extra input, "guidance" in the condition, in one evaluation; otherwise
            w != 1 asks it twice, with and without the condition.
    """

    grid: TimeGrid
    rule: Rule = "ddim"
    eta: float = 0.0
    guidance: float = 1.0
    clip: float | None = None
    guidance_as_input: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that, on one schedule, decide the images."""
        return {**vars(self), "grid": self.grid.times.tolist()}

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return self.grid.num_steps

    @property
    def nfe(self) -> int:
        """Network evaluations an image: Heun two a step but the last; guidance doubles unless it is an input."""
        lands_clean = float(self.grid.times[-1]) <= self.grid.schedule.t_clean
        calls = 2 * self.num_steps - int(lands_clean) if self.rule == "heun" else self.num_steps
        return calls * (1 if self.guidance == 1 or self.guidance_as_input else 2)

    @property
    def draws_noise(self) -> bool:
        """Whether a step that does not land clean draws noise."""
        return self.rule in ("renoise", "sde") or (self.rule == "ddim" and self.eta > 0)

    def initial(self, noise: DrawsNoise, shape: tuple[int, ...]) -> Tensor:
        """Return the state the sampler starts from: pure noise scaled to the first time's spread.

        VP and flow models start at unit variance, as stock pipelines do; EDM at sigma_max.
        """
        return self.grid.first_std * noise.draw(shape)

    def sample(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> Tensor:
        """Return x at the end of the grid, (B, *sample_shape), float32."""
        x = self.initial(noise, denoiser.sample_shape)
        return self._run(denoiser, x, noise, cond, self.num_steps, None)

    def trajectory(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> tuple[list[State], Tensor]:
        """Return every step's state and clean estimate, and the final sample."""
        states: list[State] = []
        x = self.initial(noise, denoiser.sample_shape)
        x = self._run(denoiser, x, noise, cond, self.num_steps, states.append)
        return states, x

    def advance(
        self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition, num_steps: int, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Return the state after the first `num_steps` steps: what the network sees next at inference.

        `shape` is that of one state, None for the denoiser's usual one.
        """
        x = self.initial(noise, denoiser.sample_shape if shape is None else shape)
        return self._run(denoiser, x, noise, cond, num_steps, None)

    def _run(
        self,
        denoiser: Denoiser,
        x: Tensor,
        noise: DrawsNoise,
        cond: Condition,
        num_steps: int,
        record: Callable[[State], None] | None,
    ) -> Tensor:
        if self.guidance_as_input:
            w = torch.full((len(x),), self.guidance, dtype=torch.float64, device=x.device)
            net, cond = denoiser, cond.with_values(guidance=w)
        else:
            net = guided(denoiser, self.guidance)
        times, alphas, sigmas = (
            value.to(x.device, non_blocking=True)[:, None].expand(-1, len(x)) for value in (self.grid.times, *self.grid.points)
        )
        points = list(map(Coefficients, alphas, sigmas))
        steps = list(islice(self.grid.pairs(), num_steps))
        num_draws = sum(r > self.grid.schedule.t_clean for _, r in steps) if self.draws_noise else 0
        fresh: Iterator[Tensor] = (noise.draw(tuple(x.shape[1:])) for _ in range(num_draws))
        if num_draws <= DRAWN_AHEAD:
            fresh = iter(list(fresh))
        last: Estimate | None = None
        for i, (t_float, r_float) in enumerate(steps):
            t, r = times[i], times[i + 1]
            now = Estimate(self._denoise(net, x, t, cond), points[i])
            if record is not None:
                record(State(t_float, x, now.x0))
            if r_float <= self.grid.schedule.t_clean:
                x = now.x0  # every rule ends in its estimate: all that is left of x_t is sigma_r = 0 times it
            elif self.rule == "heun":
                x = transfer.heun(lambda y, s: self._denoise(net, y, s, cond), x, t, r, self.grid.schedule, now.x0)
            else:
                x = self._step(x, now, last, points[i + 1], fresh)
            last = now
        return x

    def _denoise(self, net: Denoiser, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        x0 = net(x, t, cond).x0
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def _step(self, x: Tensor, now: Estimate, last: Estimate | None, r: Coefficients, fresh: Iterator[Tensor]) -> Tensor:
        """Carry x one step by a rule that needs no further network call."""
        if self.rule == "renoise":
            return transfer.renoise_x0(now.x0, next(fresh), r)
        if self.rule == "dpmpp_2m":
            x0_last, point_last = last if last is not None else (None, None)
            return transfer.dpmpp_2m(x, now.x0, x0_last, now.point, r, point_last)
        if self.rule == "sde":
            return transfer.sde(x, now.x0, next(fresh), now.point, r, self.eta)
        if self.eta > 0:
            return transfer.ddim_eta(x, now.x0, next(fresh), now.point, r, self.eta)
        return transfer.ddim(x, now.x0, now.point, r)

    def scheduler_config(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """Return class name and full config of the stock scheduler with the same states; see `sampling.stock`."""
        from diffdistill.sampling.stock import scheduler_config

        return scheduler_config(self, training)
