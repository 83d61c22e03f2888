"""Our samplers as stock diffusers schedulers.

`scheduler_config` describes the stock scheduler whose `set_timesteps(num_steps)` and `step` make the same states as a
`Sampler`, or refuses with the reason. Three facts decide which one that is:

- Stock pipelines of class-conditional models call `set_timesteps(n)` and nothing else, so the grid must come from the
  scheduler's config alone.
- `DDIMScheduler` clips x0 but keeps the noise of the unclipped one, so it equals our "ddim" with a clip in one step only.
  `DPMSolverMultistepScheduler` of order one is the same jump written in x0, and its thresholding to 1 is that clip.
- `LCMScheduler` blends x_t into x0 by c_skip = 1/(1 + 4 (scaling t)^2); a large `timestep_scaling` makes it nothing.

`SCMScheduler` (Sana-Sprint) walks on an arc of angles u in place of a flow's sigma, tan u = sigma / (1 - sigma), and re-noises there:
`SanaSprintPipeline` can be told the first angle and, in two steps, the second. Lists of timesteps it hands on without their
number, which the scheduler refuses; and it spaces three or more angles evenly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.math.grids import TimeGrid
from diffdistill.math.schedules import RectifiedFlowSchedule, VPSchedule
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock_runs import build_scheduler, set_steps

BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
NO_LAMBDA_CLIP = -1e9  # stands for diffusers' -inf, which is not valid JSON
SCM = "SCMScheduler"
TIMESTEP_SCALING = 1e4  # c_skip of LCM is 2.5e-9 at t = 1; with the default of 10 it is 2.5e-3


def scheduler_config(sampler: Sampler, training: Mapping[str, Any], gives_sigmas: bool = False) -> dict[str, Any]:
    """Return class name (under "_class_name") and every field of the stock scheduler with the sampler's states.

    Args:
        sampler: the grid and rule; guidance belongs to the pipeline and is not looked at here.
        training: the teacher's scheduler config: betas or shift, and prediction type.
        gives_sigmas: whether the pipeline calls `set_timesteps(sigmas=1 .. 1/n)`, as Flux's does, in place of `set_timesteps(n)`.
    Raises:
        UserError: no stock scheduler makes these states from that call; says why and what works.
    """
    schedule = sampler.grid.schedule
    if training.get("_class_name") == SCM:
        config = _scm_config(sampler, training)
    elif isinstance(schedule, RectifiedFlowSchedule):
        config = _flow_config(sampler, training, gives_sigmas)
    elif isinstance(schedule, VPSchedule):
        config = _vp_config(sampler, schedule, training)
    else:
        raise UserError(
            f"a grid on {type(schedule).__name__} has no stock scheduler here. Make it on the teacher's own "
            "schedule: grids.trailing(teacher.denoiser.schedule, num_steps)."
        )
    scheduler = build_scheduler(config)
    if not visits(scheduler, sampler, gives_sigmas):
        raise UserError(
            f"{config['_class_name']} visits {scheduler.timesteps.tolist()} in {sampler.num_steps} steps where the student was "
            f"trained on {stock_times(sampler, config)}. Use a trailing grid whose number of steps divides the teacher's timesteps."
        )
    return config


def stock_times(sampler: Sampler, config: Mapping[str, Any]) -> list[float]:
    """Return what the stock scheduler's `timesteps` must be: t for beta schedules, 1000 sigma for flows, angles on SCM's arc."""
    times = sampler.grid.times[:-1]
    if not isinstance(sampler.grid.schedule, RectifiedFlowSchedule):
        return times.tolist()
    sigma = sampler.grid.schedule.sigma(times)
    return (torch.atan2(sigma, 1 - sigma) if config["_class_name"] == SCM else 1000 * sigma).tolist()


def times_call(sampler: Sampler, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by which SanaSprintPipeline's call is told the times, beside their number; none of other pipelines."""
    if config["_class_name"] != SCM:
        return {}
    angles = stock_times(sampler, config)
    return {"max_timesteps": angles[0], "intermediate_timesteps": angles[1] if len(angles) == 2 else None}


def visits(scheduler: Any, sampler: Sampler, gives_sigmas: bool) -> bool:
    """Set the scheduler's times as the pipeline does, and return whether they are the sampler's."""
    config = scheduler.config | {"_class_name": type(scheduler).__name__}
    set_steps(scheduler, sampler.num_steps, gives_sigmas, **times_call(sampler, config))
    wanted = stock_times(sampler, config)
    visited = scheduler.timesteps.tolist()[: -1 if config["_class_name"] == SCM else None]  # SCM's list goes on to the end, 0
    return len(visited) == len(wanted) and all(
        abs(a - b) <= 1e-5 * wanted[0]
        for a, b in zip(visited, wanted, strict=True)  # of float32, or rounded to integers
    )


def with_steps(sampler: Sampler, num_steps: int) -> Sampler:
    """Return the sampler with another number of steps on the same kind of grid.

    Raises:
        UserError: the grid is one of a kind, so that it has no sibling of another length.
    """
    grid, schedule = sampler.grid, sampler.grid.schedule
    if num_steps == grid.num_steps:
        return sampler
    if _same(grid, grids.trailing(schedule, grid.num_steps)):
        return replace(sampler, grid=grids.trailing(schedule, num_steps))
    original = _lcm_original(grid) if isinstance(schedule, VPSchedule) else None
    if original is not None and num_steps <= original:
        return replace(sampler, grid=grids.lcm(schedule, num_steps, original))
    raise UserError(
        f"a {grid.spacing!r} grid of {grid.num_steps} steps says nothing about {num_steps} steps. Use a "
        f"trailing grid, or step_counts=({grid.num_steps},)."
    )


def unipc(training: Mapping[str, Any], spacing: str = "trailing") -> dict[str, Any]:
    """Return the config of UniPC of order 2, ending at sigma 0: the strong training-free baseline.

    Args:
        training: the teacher's scheduler config (betas).
        spacing: "trailing", or "linspace" (diffusers' default for this scheduler).
    Source: arXiv:2302.04867, the B2(h) variant, as in diffusers.
    """
    return _explicit(
        "UniPCMultistepScheduler",
        **_betas(training),
        solver_order=2,
        predict_x0=True,
        solver_type="bh2",
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing=spacing,
        steps_offset=0,
        thresholding=False,
        rescale_betas_zero_snr=False,
    )


# Beta schedules


def _vp_config(sampler: Sampler, schedule: VPSchedule, training: Mapping[str, Any]) -> dict[str, Any]:
    _check_betas(schedule, training)
    if float(sampler.grid.times[-1]) != schedule.t_clean and sampler.rule != "ddim":
        raise UserError(
            f"rule {sampler.rule!r} must end at the clean end t = -1 in a stock scheduler; this grid ends at "
            f"t = {float(sampler.grid.times[-1]):g}. Use a trailing grid."
        )
    if sampler.rule == "ddim":
        return _ddim(sampler, training)
    if sampler.rule == "renoise":
        return _renoise(sampler, training)
    if sampler.rule == "dpmpp_2m":
        _require_trailing(sampler)
        return _dpm(sampler, training, solver_order=2)
    raise UserError(
        f"no stock scheduler makes the states of rule {sampler.rule!r} on a beta schedule: diffusers' own works "
        "in other coordinates or draws noise elsewhere. Export with ddim, renoise or dpmpp_2m."
    )


def _ddim(sampler: Sampler, training: Mapping[str, Any]) -> dict[str, Any]:
    one_step = sampler.num_steps == 1
    if sampler.eta > 0 and not one_step:
        raise UserError(
            f"eta is an argument of DDIMScheduler.step that stock pipelines leave at 0; got {sampler.eta}. Use "
            "eta=0, or rule 'renoise', whose noise is in the scheduler itself."
        )
    spacing = _ddim_spacing(sampler)
    if sampler.clip is not None and not one_step:
        _require_trailing(sampler)
        return _dpm(sampler, training, solver_order=1)
    return _explicit(
        "DDIMScheduler", **_betas(training), **spacing, **_clip(sampler), thresholding=False, rescale_betas_zero_snr=False
    )


def _ddim_spacing(sampler: Sampler) -> dict[str, Any]:
    grid = sampler.grid
    lands_clean = float(grid.times[-1]) == grid.schedule.t_clean
    if _same(grid, grids.trailing(grid.schedule, grid.num_steps)):
        _require_trailing(sampler)
        return {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    if grid.num_steps == 1:
        raise UserError(
            f"a one-step student must start at full noise, t = {grid.schedule.t_max:g}; this {grid.spacing!r} "
            f"grid starts at t = {float(grid.times[0]):g}. Use a trailing grid."
        )
    for offset in (0, 1):
        end = "clean" if lands_clean else "first"
        if (offset or lands_clean) and _same(grid, grids.leading(grid.schedule, grid.num_steps, offset, end)):
            return {"timestep_spacing": "leading", "steps_offset": offset, "set_alpha_to_one": lands_clean}
    raise _no_grid(
        sampler,
        "DDIMScheduler steps by T / num_steps whatever the next time is, so linspace, LCM, Karras and "
        "custom times do not fit it",
    )


def _renoise(sampler: Sampler, training: Mapping[str, Any]) -> dict[str, Any]:
    original = _lcm_original(sampler.grid)
    if original is None:
        raise _no_grid(sampler, "LCMScheduler takes evenly spaced indices of a uniform grid")
    return _explicit(
        "LCMScheduler",
        **_betas(training),
        **_clip(sampler),
        original_inference_steps=original,
        timestep_scaling=TIMESTEP_SCALING,
        set_alpha_to_one=True,
        steps_offset=0,
        thresholding=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=False,
    )


def _dpm(sampler: Sampler, training: Mapping[str, Any], solver_order: int) -> dict[str, Any]:
    if sampler.clip not in (None, 1):
        raise UserError(
            f"clip must be 1 or none here: DPMSolverMultistepScheduler clips x0 only by thresholding to 1; got {sampler.clip}."
        )
    return _explicit(
        "DPMSolverMultistepScheduler",
        **_betas(training),
        solver_order=solver_order,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        steps_offset=0,
        thresholding=sampler.clip is not None,
        sample_max_value=1.0,
        lambda_min_clipped=NO_LAMBDA_CLIP,
        rescale_betas_zero_snr=False,
    )


def _clip(sampler: Sampler) -> dict[str, Any]:
    return {"clip_sample": sampler.clip is not None, "clip_sample_range": 1.0 if sampler.clip is None else sampler.clip}


def _betas(training: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in BETA_KEYS if key not in training and key != "trained_betas"]
    if missing:
        raise UserError(f"the teacher's scheduler config lacks {', '.join(missing)}; a beta schedule needs them.")
    betas = {key: training.get(key) for key in BETA_KEYS}
    if betas["trained_betas"] is not None:
        betas["trained_betas"] = [float(beta) for beta in betas["trained_betas"]]
    return betas | {"prediction_type": training.get("prediction_type", "epsilon")}


def _check_betas(schedule: VPSchedule, training: Mapping[str, Any]) -> None:
    if training.get("rescale_betas_zero_snr"):
        raise UserError("zero terminal SNR is not supported: the first state has no signal scale to divide by.")
    betas = build_scheduler({"_class_name": "DDIMScheduler"} | _betas(training)).alphas_cumprod.to(torch.float64)
    if betas.shape != schedule.alphas_cumprod.shape or not torch.allclose(betas, schedule.alphas_cumprod, rtol=1e-6, atol=0):
        raise UserError(
            "the sampler's grid lives on other betas than the teacher's scheduler. Make it on teacher.denoiser.schedule."
        )


def _same(grid: TimeGrid, other: TimeGrid) -> bool:
    return grid.times.shape == other.times.shape and torch.allclose(grid.times, other.times, rtol=0, atol=1e-9)


def _require_trailing(sampler: Sampler) -> None:
    grid, num_steps = sampler.grid, sampler.num_steps
    if not _same(grid, grids.trailing(grid.schedule, num_steps)):
        raise _no_grid(sampler, f"rule {sampler.rule!r} is exported on trailing times only")
    total = grid.schedule.num_timesteps  # type: ignore[attr-defined]
    if total % num_steps:
        near = sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - num_steps))[:3]
        raise UserError(
            f"the number of steps must divide the teacher's {total} timesteps, or diffusers rounds the times; got "
            f"{num_steps}. Near it: {', '.join(map(str, sorted(near)))}."
        )


def _no_grid(sampler: Sampler, reason: str) -> UserError:
    times = ", ".join(f"{t:g}" for t in sampler.grid.times.tolist()[:8])
    return UserError(
        f"no stock scheduler visits the times {times} of this {sampler.grid.spacing!r} grid from its config "
        f"alone: {reason}. Use a trailing grid whose number of steps divides the teacher's timesteps."
    )


def _lcm_original(grid: TimeGrid) -> int | None:
    """Return the `original_inference_steps` for which LCM's grid is this one, the largest such; None if there is none."""
    total, num_steps = grid.schedule.num_timesteps, grid.num_steps  # type: ignore[attr-defined]
    wanted = grid.times[:-1].tolist()
    if wanted[-1] < 1:  # at t = 0 LCM returns x_t itself
        return None
    for original in range(total, num_steps - 1, -1):
        stride = total // original
        if wanted == [(original - j * original // num_steps) * stride - 1 for j in range(num_steps)]:
            return original
    return None


# Flows


def _scm_config(sampler: Sampler, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of Sana-Sprint's scheduler; the times are arguments of the call, see `times_call`."""
    times, num_steps = stock_times(sampler, {"_class_name": SCM}), sampler.num_steps
    if num_steps > 2:
        raise UserError(
            f"SanaSprintPipeline can be told the times of one or two steps and spaces more of them evenly on its arc; got "
            f"{num_steps} steps. Train the student for 1 or 2 steps."
        )
    if sampler.clip is not None or (num_steps > 1 and sampler.rule != "renoise"):
        raise UserError(
            f"{SCM} does not clip x0 and draws fresh noise between its steps; got rule {sampler.rule!r} with clip {sampler.clip}. "
            "Use rule 'renoise' without a clip (methods dmd2 and consistency), or one step."
        )
    if not math.isclose(times[0], math.pi / 2):
        raise _no_grid(sampler, "SanaSprintPipeline starts at pure noise")
    return _explicit(
        SCM,
        num_train_timesteps=int(training.get("num_train_timesteps", 1000)),
        prediction_type="trigflow",
        sigma_data=float(training["sigma_data"]),
    )


def _flow_config(sampler: Sampler, training: Mapping[str, Any], gives_sigmas: bool) -> dict[str, Any]:
    schedule, num_steps = sampler.grid.schedule, sampler.num_steps
    if sampler.rule not in ("ddim", "renoise") or sampler.eta > 0:
        raise UserError(
            f"on a flow, FlowMatchEulerDiscreteScheduler carries rule 'ddim' with eta 0 (its Euler step) and "
            f"'renoise' (stochastic_sampling); got {sampler.rule!r} with eta {sampler.eta}."
        )
    if sampler.clip is not None:
        raise UserError("stock flow schedulers do not clip x0; use clip none.")
    if not _same(sampler.grid, grids.trailing(schedule, num_steps)):
        raise _no_grid(sampler, "the sigmas of a flow are given by shift and number of steps")
    total = int(training.get("num_train_timesteps", 1000))
    shift, terminal = schedule.shift, None  # type: ignore[attr-defined]
    if not gives_sigmas:
        shift, terminal = _flow_shift(shift, num_steps, total)
    return _explicit(
        "FlowMatchEulerDiscreteScheduler",
        num_train_timesteps=total,
        shift=shift,
        shift_terminal=terminal,
        use_dynamic_shifting=False,
        invert_sigmas=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        stochastic_sampling=sampler.rule == "renoise",
    )


def _flow_shift(shift: float, num_steps: int, total: int) -> tuple[float, float | None]:
    """Return (shift', shift_terminal) with which `set_timesteps(num_steps)` gives shift(1), shift(1 - 1/n), ..., shift(1/n).

    diffusers starts from n points between 1 and its own smallest sigma, which is already shifted, shifts them (again) and
    stretches the last one to `shift_terminal`. In the index j the result and the wanted sigmas are both ratios of linear
    functions that are 1 at j = 0; they agree when the last points and the poles do. With y = shift' - 1, e = 1/T and
    K = n shift / (shift - 1), the poles agree for (n - 1)(e y^2 + (1 + e) y + 1) = K (1 - e) y.
    """
    if num_steps == 1:
        return shift, None  # a terminal would make 0/0 of the only sigma, which is 1 for every shift
    terminal = shift / num_steps / (1 + (shift - 1) / num_steps)
    if shift == 1:
        return 1.0, terminal
    e, pole = 1 / total, num_steps * shift / (shift - 1)
    a, b, c = (num_steps - 1) * e, (num_steps - 1) * (1 + e) - pole * (1 - e), float(num_steps - 1)
    root = 2 * c / (-b + math.copysign(math.sqrt(b * b - 4 * a * c), -b))  # the root nearer to 0
    return 1 + root, terminal


# Every field


def _explicit(class_name: str, **chosen: Any) -> dict[str, Any]:
    """Return the class name and every field: those chosen, and the class's defaults written out.

    `from_config` of another class carries over only what was not a default at the source, so nothing is left implicit.
    """
    import diffusers

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    fields = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    unknown = set(chosen) - set(fields)
    if unknown:
        raise UserError(
            f"diffusers {diffusers.__version__} has no field {', '.join(sorted(unknown))} in {class_name}; install a newer one."
        )
    merged = fields | chosen
    return {"_class_name": class_name} | {
        name: list(value) if isinstance(value, (list, tuple)) else value for name, value in merged.items()
    }
