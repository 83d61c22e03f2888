"""Stock diffusers schedulers run on our denoisers, as stock pipelines run them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.math.schedules import RectifiedFlowSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.sampling.noise import BatchNoise, Noise
from diffdistill.sampling.sampler import DrawsNoise


def build_scheduler(config: Mapping[str, Any]) -> Any:
    """Return the diffusers scheduler of a config with its class name under "_class_name".

    Raises:
        UserError: diffusers has no scheduler of that name.
    """
    import diffusers

    name = config.get("_class_name", "")
    if not name or not hasattr(diffusers, name):
        raise UserError(f"diffusers {diffusers.__version__} has no scheduler {name!r}.")
    return getattr(diffusers, name).from_config(dict(config))


def set_steps(
    scheduler: Any,
    num_steps: int,
    gives_sigmas: bool = False,
    device: torch.device | str | None = None,
    **times: Any,
) -> None:
    """Set a stock scheduler's times as the pipeline does: by their number (and `times_call`), or by even sigmas that it shifts."""
    if gives_sigmas:
        scheduler.set_timesteps(sigmas=[1 - k / num_steps for k in range(num_steps)], device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device, **times)


@torch.no_grad()
def stock_states(
    denoiser: Denoiser, scheduler: Any, num_steps: int, noise: DrawsNoise, cond: Condition, gives_sigmas: bool = False
) -> list[Tensor]:
    """Run a stock scheduler on our denoiser and return its num_steps + 1 states, the last one the sample.

    Args:
        denoiser: any denoiser on a beta or flow schedule; wrap it in `guided` for guidance.
        scheduler: a diffusers scheduler on the same betas; its timesteps are set here.
        num_steps: what `set_timesteps` gets. Schedulers of order 2 have more states.
        noise: the first draw is the start; stochastic schedulers go on with the same generators, as pipelines do.
        cond: condition with B rows.
        gives_sigmas: whether the pipeline sets the times by even sigmas, as Flux's does.
    """
    first = noise.draw(denoiser.sample_shape)
    set_steps(scheduler, num_steps, gives_sigmas, first.device)
    states = [first * getattr(scheduler, "init_noise_sigma", 1.0)]  # flow schedulers name none: it is 1
    accepts = inspect.signature(scheduler.step).parameters
    options = {"generator": _generators(noise)} if "generator" in accepts else {}
    ignores_generators = _ignores_generators(scheduler)
    for k, timestep in enumerate(scheduler.timesteps):
        x_t = scheduler.scale_model_input(states[-1], timestep) if hasattr(scheduler, "scale_model_input") else states[-1]
        t = timestep.to(torch.float64).expand(len(x_t))
        if isinstance(denoiser.schedule, RectifiedFlowSchedule):
            t = denoiser.schedule.time_of_sigma(t / scheduler.config.num_train_timesteps)
        raw = denoiser(x_t, t, cond).as_kind(getattr(scheduler.config, "prediction_type", "flow_prediction"))
        if ignores_generators:  # its step, with our noise
            sigma, next_sigma = scheduler.sigmas[k : k + 2].tolist()
            x0 = states[-1] - sigma * raw
            states.append((1 - next_sigma) * x0 + next_sigma * noise.draw(denoiser.sample_shape))
        else:
            states.append(scheduler.step(raw, timestep, states[-1], **options).prev_sample)
    return states


def _ignores_generators(scheduler: Any) -> bool:
    """Return whether step draws from the global generator whatever it is given: of a stochastic flow, in diffusers before 0.39."""
    import diffusers
    from packaging.version import Version

    return bool(scheduler.config.get("stochastic_sampling")) and Version(diffusers.__version__) < Version("0.39")


def stock_sample(
    denoiser: Denoiser, scheduler: Any, num_steps: int, noise: DrawsNoise, cond: Condition, gives_sigmas: bool = False
) -> Tensor:
    """Return the sample of a stock scheduler run on our denoiser, (B, *sample_shape); arguments as in `stock_states`."""
    return stock_states(denoiser, scheduler, num_steps, noise, cond, gives_sigmas)[-1]


def _generators(noise: DrawsNoise) -> torch.Generator | list[torch.Generator] | None:
    if isinstance(noise, Noise):
        return noise.generators  # the package's own class: stock schedulers must go on with the very same generators
    return noise.generator if isinstance(noise, BatchNoise) else None
