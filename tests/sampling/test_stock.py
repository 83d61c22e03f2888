"""Stock schedulers make our states. The network is the exact denoiser of a Gaussian, so nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.math.prediction import Prediction, from_x0
from diffdistill.math.schedules import (
    EDMSchedule,
    RectifiedFlowSchedule,
    Schedule,
    VPSchedule,
    expand,
    schedule_from_diffusers,
)
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.sampling.noise import BatchNoise, Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock import scheduler_config, stock_times, unipc, with_steps
from diffdistill.sampling.stock_runs import build_scheduler, stock_sample, stock_states

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCALED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2"}
# 1/alpha is 157 at the end of the linear schedule and 20,000 at that of the cosine: there eps would turn float32 rounding
# into errors of order one, in diffusers as in ours, so the cosine is asked in v, as people train it.
BETAS = [
    LINEAR | {"prediction_type": "v_prediction"},
    SCALED | {"prediction_type": "epsilon"},
    LINEAR | {"prediction_type": "sample"},
    COSINE | {"prediction_type": "v_prediction"},
]
MEAN, SPREAD = 0.3, 0.6
SEEDS = [3, 1, 4]
COND = Condition.none(len(SEEDS))


@dataclass(frozen=True)
class Gaussian(Denoiser):
    """The posterior mean for data N(MEAN, SPREAD^2) with a bend, so that no rule is exact on it; bend 0 for none."""

    schedule: Schedule
    kind: str
    sample_shape: tuple[int, ...] = (2, 4, 4)
    bend: float = 0.2

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        alpha, sigma = self.schedule.coefficients(t)
        a, variance = expand(alpha, x_t), expand(alpha**2 * SPREAD**2 + sigma**2, x_t)
        x0 = MEAN + a * SPREAD**2 * (x_t - a * MEAN) / variance + self.bend * torch.sin(3 * x_t)
        return Prediction(self.kind, from_x0(self.kind, x0, x_t, alpha, sigma), x_t, alpha, sigma)


def gaussian(betas: dict[str, Any]) -> Gaussian:
    schedule = schedule_from_diffusers(build_scheduler(betas | {"_class_name": "DDIMScheduler"}))
    return Gaussian(schedule, betas["prediction_type"])


def largest_gap(sampler: Sampler, training: dict[str, Any], denoiser: Denoiser) -> float:
    scheduler = build_scheduler(scheduler_config(sampler, training))
    theirs = stock_states(denoiser, scheduler, sampler.num_steps, Noise(SEEDS), COND)
    states, final = sampler.trajectory(denoiser, Noise(SEEDS), COND)
    ours = [state.x_t for state in states] + [final]
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("betas", BETAS, ids=lambda b: f"{b['beta_schedule']}-{b['prediction_type']}")
@pytest.mark.parametrize(
    ("rule", "clip"),
    [("ddim", None), ("ddim", 1.0), ("renoise", None), ("renoise", 0.5), ("dpmpp_2m", None), ("dpmpp_2m", 1.0)],
)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 20])
def test_states_equal_the_stock_scheduler(betas, rule, clip, num_steps):
    denoiser = gaussian(betas)
    sampler = Sampler(grids.trailing(denoiser.schedule, num_steps), rule, clip=clip)
    # The first x0 of the scaled_linear epsilon network is divided by alpha = 0.068.
    assert largest_gap(sampler, betas, denoiser) < 1e-5


@pytest.mark.parametrize("rule", ["ddim", "dpmpp_2m", "renoise"])
def test_the_gap_is_seen_when_the_rule_is_another(rule):
    betas = BETAS[0]
    denoiser = gaussian(betas)
    grid = grids.trailing(denoiser.schedule, 4)
    other = {"ddim": "dpmpp_2m", "dpmpp_2m": "ddim", "renoise": "ddim"}[rule]
    theirs = stock_sample(denoiser, build_scheduler(scheduler_config(Sampler(grid, rule), betas)), 4, Noise(SEEDS), COND)
    ours = Sampler(grid, other).sample(denoiser, Noise(SEEDS), COND)
    assert (ours - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_lcm_grid_of_50_is_found_from_its_times(num_steps):
    denoiser = gaussian(BETAS[0])
    sampler = Sampler(grids.lcm(denoiser.schedule, num_steps), "renoise")
    assert largest_gap(sampler, BETAS[0], denoiser) < 1e-5
    # One and two steps are on the trailing grid too.
    assert scheduler_config(sampler, BETAS[0])["original_inference_steps"] == (1000 if num_steps <= 2 else 50)


def test_leading_ddim_is_carried():
    denoiser = gaussian(BETAS[0])
    for offset, end in ((0, "clean"), (1, "clean"), (1, "first")):
        sampler = Sampler(grids.leading(denoiser.schedule, 10, offset, end))
        assert largest_gap(sampler, BETAS[0], denoiser) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 0.5])
@pytest.mark.parametrize("rule", ["ddim", "renoise"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_flow_states_equal_the_stock_scheduler_from_config_alone(shift, rule, num_steps):
    schedule = RectifiedFlowSchedule(shift)
    denoiser = Gaussian(schedule, "flow_prediction")
    sampler = Sampler(grids.trailing(schedule, num_steps), rule)
    training = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    assert largest_gap(sampler, training, denoiser) < 1e-5


def test_every_field_is_written_out():
    denoiser = gaussian(BETAS[0])
    for rule in ("ddim", "renoise", "dpmpp_2m"):
        config = scheduler_config(Sampler(grids.trailing(denoiser.schedule, 4), rule), BETAS[0])
        scheduler = build_scheduler(config)
        assert {name for name in scheduler.config if name[0] != "_"} == set(config) - {"_class_name"}
        assert not scheduler.config.get("_use_default_values")
        assert config["timestep_spacing"] == "trailing"


def test_ddim_config_lands_clean_at_full_noise():
    denoiser = gaussian(BETAS[1])
    config = scheduler_config(Sampler(grids.trailing(denoiser.schedule, 1)), BETAS[1])
    assert (config["_class_name"], config["set_alpha_to_one"], config["clip_sample"]) == ("DDIMScheduler", True, False)
    assert config["beta_schedule"] == "scaled_linear" and config["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Sampler(grids.trailing(s, 3)), "must divide"),
        (lambda s: Sampler(grids.trailing(s, 3), "dpmpp_2m"), "must divide"),
        (lambda s: Sampler(grids.trailing(s, 6), "renoise"), "trailing grid"),
        (lambda s: Sampler(grids.trailing(s, 4), "heun"), "heun"),
        (lambda s: Sampler(grids.trailing(s, 4), "sde", eta=1.0), "sde"),
        (lambda s: Sampler(grids.trailing(s, 4), eta=0.5), "eta"),
        (lambda s: Sampler(grids.leading(s, 1)), "full noise"),
        (lambda s: Sampler(grids.linspace(s, 1)), "full noise"),
        (lambda s: Sampler(grids.linspace(s, 4)), "linspace"),
        (lambda s: Sampler(grids.at_times(s, [999.0, 700.0, 300.0])), "custom"),
        (lambda s: Sampler(grids.at_times(s, [999.0, 700.0, 300.0]), "renoise"), "LCMScheduler"),
        (lambda s: Sampler(grids.karras(s, 5, 0.02, 80.0), "renoise"), "clean end"),
        (lambda s: Sampler(grids.trailing(s, 1000), "renoise"), "trailing grid"),
        (lambda s: Sampler(grids.trailing(s, 4), clip=2.0), "clip must be 1"),
        (lambda s: Sampler(grids.trailing(EDMSchedule(), 4)), "EDMSchedule"),
        (lambda s: Sampler(grids.trailing(VPSchedule(s.alphas_cumprod**2), 4)), "other betas"),
    ],
)
def test_what_no_stock_scheduler_carries_is_refused_with_a_reason(make, message):
    with pytest.raises(UserError, match=message):
        scheduler_config(make(gaussian(BETAS[0]).schedule), BETAS[0])


def test_flow_refusals():
    schedule = RectifiedFlowSchedule(3.0)
    for sampler in (
        Sampler(grids.trailing(schedule, 4), "heun"),
        Sampler(grids.trailing(schedule, 4), clip=1.0),
        Sampler(grids.at_times(schedule, [1.0, 0.3])),
    ):
        with pytest.raises(UserError):
            scheduler_config(sampler, {"num_train_timesteps": 1000})


def test_with_steps_keeps_the_kind_of_grid():
    schedule = gaussian(BETAS[0]).schedule
    assert stock_times(with_steps(Sampler(grids.trailing(schedule, 4)), 2), {"_class_name": "DDIMScheduler"}) == [999.0, 499.0]
    assert (
        stock_times(with_steps(Sampler(grids.lcm(schedule, 4), "renoise"), 8), {"_class_name": "LCMScheduler"})
        == grids.lcm(schedule, 8).times[:-1].tolist()
    )
    with pytest.raises(UserError, match="says nothing"):
        with_steps(Sampler(grids.at_times(schedule, [999.0, 700.0])), 4)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_unipc_is_nearer_to_the_exact_flow_than_ddim(spacing):
    """The map of a Gaussian is known; the last, first-order jump to sigma 0 keeps either from doing better than 1/n."""
    betas = SCALED | {"prediction_type": "epsilon"}
    schedule = gaussian(betas).schedule
    denoiser = Gaussian(schedule, "epsilon", bend=0.0)
    alpha, sigma = schedule.coefficients(torch.tensor([999.0]))
    x_T = Noise(SEEDS).draw(denoiser.sample_shape)
    exact = MEAN + SPREAD * (alpha**2 * SPREAD**2 + sigma**2).rsqrt().float() * (x_T - alpha.float() * MEAN)

    def error(sample: Tensor) -> float:
        return float((sample - exact).abs().max())

    for num_steps in (10, 20, 40):
        ours = error(Sampler(grids.trailing(schedule, num_steps)).sample(denoiser, Noise(SEEDS), COND))
        scheduler = build_scheduler(unipc(betas, spacing))
        assert error(stock_sample(denoiser, scheduler, num_steps, Noise(SEEDS), COND)) < 0.7 * ours
    assert ours < 0.1


def test_one_generator_for_the_batch_is_taken_on():
    denoiser = gaussian(BETAS[0])
    sampler = Sampler(grids.trailing(denoiser.schedule, 4), "renoise")
    scheduler = build_scheduler(scheduler_config(sampler, BETAS[0]))
    theirs = stock_sample(denoiser, scheduler, 4, BatchNoise(3, torch.Generator().manual_seed(5)), COND)
    ours = sampler.sample(denoiser, BatchNoise(3, torch.Generator().manual_seed(5)), COND)
    assert (ours - theirs).abs().max() < 1e-5
