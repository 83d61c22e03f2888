"""Time grids: which times a sampler visits, tied to the diffusers scheduler that visits the same ones.

A `TimeGrid` of N steps holds N + 1 decreasing times; the last is where the final step lands (usually the clean end).
Training, rollout, validation, evaluation and export take the same object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffdistill.math.schedules import Coefficients, RectifiedFlowSchedule, Schedule, VPSchedule


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """N + 1 decreasing times of a schedule, float64; `times[-1]` is the end point.

    Attributes:
        times: (N + 1,), float64, strictly decreasing.
        schedule: the schedule the times belong to.
        spacing: how the times were made; `Sampler.scheduler_config` turns it into a stock scheduler's settings.
    Raises:
        ValueError: fewer than two times, not strictly decreasing, or outside the schedule's range.
    """

    times: Tensor
    schedule: Schedule
    spacing: str = field(default="custom")

    def __post_init__(self) -> None:
        times = self.times
        if times.ndim != 1 or times.numel() < 2 or bool((times.diff() >= 0).any()):
            raise ValueError(f"a time grid needs at least two strictly decreasing times; got {times.tolist()}.")
        if float(times[0]) > self.schedule.t_max or float(times[-1]) < self.schedule.t_clean:
            raise ValueError(
                f"the times of a {type(self.schedule).__name__} lie between {self.schedule.t_clean} and "
                f"{self.schedule.t_max}; got {float(times[0])} down to {float(times[-1])}."
            )
        object.__setattr__(self, "times", times.to(torch.float64))

    def times_on(self, device: torch.device) -> Tensor:
        """Return the times on a device; the host does not wait for it."""
        return self.times.to(device, non_blocking=True)

    @cached_property
    def points(self) -> Coefficients:
        """The scales at the times, (N + 1,) each, where the times are."""
        return self.schedule.coefficients(self.times)

    @cached_property
    def first_std(self) -> float:
        """The spread of the first state of a sampler: sigma at the first time, and 1 on paths that end in unit variance."""
        return max(1.0, float(self.points.sigma[0]))

    @property
    def num_steps(self) -> int:
        """Number of steps, N."""
        return self.times.numel() - 1

    def pairs(self) -> Iterator[tuple[float, float]]:
        """Yield (t, r) for each step, noisiest first."""
        times = self.times.tolist()
        return zip(times[:-1], times[1:], strict=True)

    def refine(self, factor: int = 2) -> TimeGrid:
        """Return the grid of `factor` times as many steps that contains this one, evenly spaced inside each step."""
        if factor < 1:
            raise ValueError(f"a grid is refined by a factor of at least 1; got {factor}.")
        t, r = self.times[:-1, None], self.times[1:, None]
        inner = t + (r - t) * torch.arange(factor, dtype=torch.float64) / factor  # (N, factor)
        nests = self.spacing in ("trailing", "flow") or factor == 1  # the finer grid is again of that spacing
        return TimeGrid(torch.cat([inner.flatten(), self.times[-1:]]), self.schedule, self.spacing if nests else "custom")


def _check_steps(num_steps: int, limit: int | None = None) -> None:
    if num_steps < 1 or (limit is not None and num_steps > limit):
        bound = f"between 1 and {limit}" if limit else "at least 1"
        raise ValueError(f"num_steps must be {bound}; got {num_steps}.")


def trailing(schedule: Schedule, num_steps: int) -> TimeGrid:
    """Evenly spaced from t_max to the clean end: for VP T-1-jT/N, diffusers' "trailing" (999, 749, 499, 249 for N = 4).

    diffusers rounds to integers where N does not divide T; here the times stay exact, so that grids of N and 2N nest.
    """
    _check_steps(num_steps)
    steps = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return TimeGrid(schedule.t_max + (schedule.t_clean - schedule.t_max) * steps, schedule, "trailing")


def _vp(schedule: Schedule, name: str) -> VPSchedule:
    if not isinstance(schedule, VPSchedule):
        raise ValueError(
            f"the {name} grid is made of a beta schedule's integer times; {type(schedule).__name__} has none. Use trailing."
        )
    return schedule


def _end(times: Tensor, end: str) -> Tensor:
    """Append the landing point: "clean" is t = -1 (set_alpha_to_one=True), "first" is t = 0 (False)."""
    if end not in ("clean", "first"):
        raise ValueError(f"end must be 'clean' or 'first'; got {end!r}.")
    if end == "first" and float(times[-1]) == 0:
        raise ValueError(
            "the last step would go from timestep 0 to timestep 0 and waste its network call; use end='clean', "
            "or steps_offset=1 on the leading grid."
        )
    landing = -1.0 if end == "clean" else 0.0
    return torch.cat([times, torch.tensor([landing], dtype=torch.float64)])


def leading(schedule: Schedule, num_steps: int, steps_offset: int = 0, end: str = "clean") -> TimeGrid:
    """diffusers' "leading" DDIM grid: multiples of T // N, plus steps_offset; does not start at full noise."""
    vp = _vp(schedule, "leading")
    _check_steps(num_steps, vp.num_timesteps)
    ratio = vp.num_timesteps // num_steps
    times = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * ratio + steps_offset
    return TimeGrid(_end(times, end), schedule, "leading")


def linspace(schedule: Schedule, num_steps: int) -> TimeGrid:
    """diffusers' "linspace" DDIM grid: N rounded times from T-1 to 0, then the clean end.

    diffusers' DDIM steps T // N down from each of them, not to the next; here a step lands on the next time.
    """
    vp = _vp(schedule, "linspace")
    _check_steps(num_steps, vp.num_timesteps)
    times = torch.linspace(0, vp.t_max, num_steps, dtype=torch.float64).round().flip(0)
    return TimeGrid(_end(times, "clean"), schedule, "linspace")


def index_grid(schedule: Schedule, num_solver_steps: int) -> TimeGrid:
    """LCM's index grid: ts[i] = k (i + 1) - 1 with k = T // N (19, 39, ..., 999 for N = 50), ending at t = 0.

    Source: methods of LCM, TCD, PCM; the "previous" time of i = 0 is timestep 0, not the clean end.
    """
    vp = _vp(schedule, "index")
    _check_steps(num_solver_steps, vp.num_timesteps // 2)
    stride = vp.num_timesteps // num_solver_steps
    times = torch.arange(num_solver_steps, 0, -1, dtype=torch.float64) * stride - 1
    return TimeGrid(_end(times, "first"), schedule, "index")


def lcm(schedule: Schedule, num_steps: int, original_inference_steps: int = 50) -> TimeGrid:
    """The grid of diffusers' LCM and TCD schedulers: every floor(j N / n)-th point of the reversed index grid of N.

    For N = 50: 999; 999, 499; 999, 759, 499, 259. With N = T it is the trailing grid. Ends clean.
    """
    vp = _vp(schedule, "lcm")
    _check_steps(original_inference_steps, vp.num_timesteps)
    _check_steps(num_steps, original_inference_steps)
    stride = vp.num_timesteps // original_inference_steps
    origin = torch.arange(original_inference_steps, 0, -1, dtype=torch.float64) * stride - 1
    chosen = (torch.arange(num_steps, dtype=torch.float64) * original_inference_steps / num_steps).floor().long()
    return TimeGrid(_end(origin[chosen], "clean"), schedule, f"lcm{original_inference_steps}")


def karras(
    schedule: Schedule,
    num_points: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    end: str = "sigma_min",
) -> TimeGrid:
    """Karras' grid in sigma/alpha, mapped to the schedule's time: (smax^(1/rho) + i/(N-1)(smin^(1/rho) - smax^(1/rho)))^rho.

    Args:
        num_points: N sigmas from sigma_max to sigma_min; with end="sigma_min" the grid has N - 1 steps (consistency
            training), with end="clean" N steps, the last one from sigma_min to 0 (EDM's sampler).
        sigma_min, sigma_max: noise levels sigma / alpha; must lie inside the schedule's range.
        end: "sigma_min" or "clean".
    Source: EDM (arXiv:2206.00364), Eq. 5; noisiest point first.
    """
    _check_steps(num_points - 1)
    if end not in ("sigma_min", "clean"):
        raise ValueError(f"end must be 'sigma_min' or 'clean'; got {end!r}.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}.")
    noisiest = float(schedule.coefficients(torch.tensor(schedule.t_max, dtype=torch.float64)).noise_to_signal)
    if sigma_max > noisiest * (1 + 1e-12):
        raise ValueError(
            f"sigma_max must be at most {noisiest:.6g}, the noisiest level of this {type(schedule).__name__}; got {sigma_max}."
        )
    ramp = torch.linspace(0, 1, num_points, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    times = schedule.time_of_lambda(-sigmas.log())
    if end == "clean":
        times = torch.cat([times, torch.tensor([schedule.t_clean], dtype=torch.float64)])
    return TimeGrid(times, schedule, "karras")


def flow(schedule: RectifiedFlowSchedule, num_steps: int) -> TimeGrid:
    """Sigmas 1, 1 - 1/N, ..., 1/N given before the shift, then 0: the correct call of FlowMatchEuler for few steps."""
    grid = trailing(schedule, num_steps)
    return TimeGrid(grid.times, schedule, "flow")


def at_times(schedule: Schedule, times: list[float], end: str = "clean") -> TimeGrid:
    """A grid of given times, noisiest first, landing on the clean end (or on VP's first timestep)."""
    given = torch.tensor(times, dtype=torch.float64)
    if end == "clean":
        given = torch.cat([given, torch.tensor([schedule.t_clean], dtype=torch.float64)])
    else:
        _vp(schedule, "custom")
        given = _end(given, end)
    return TimeGrid(given, schedule, "custom")
