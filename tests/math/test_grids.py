"""Time grids: equal to diffusers' own timesteps and sigmas, and to the numbers quoted in papers and code."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from schedule_cases import SCHEDULES, linear_vp, times

from diffdistill.math import grids
from diffdistill.math.grids import TimeGrid
from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, VPSchedule, schedule_from_diffusers

STEPS = [1, 2, 4, 5, 8, 10, 20, 50]
VP = linear_vp()


def visited(scheduler, num_steps: int) -> list[float]:
    scheduler.set_timesteps(num_steps)
    return [float(t) for t in scheduler.timesteps]


# Equality with diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("num_steps", STEPS)
def test_ddim_grids_equal_diffusers(num_steps: int, beta_schedule: str, set_alpha_to_one: bool) -> None:
    end = "clean" if set_alpha_to_one else "first"

    def check(grid: TimeGrid, spacing: str, steps_offset: int) -> None:
        scheduler = diffusers.DDIMScheduler(
            beta_schedule=beta_schedule, timestep_spacing=spacing, steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one
        )
        assert grid.times[:-1].tolist() == visited(scheduler, num_steps)
        schedule = schedule_from_diffusers(scheduler)
        torch.testing.assert_close(
            schedule.alpha(grid.times[-1:]) ** 2, scheduler.final_alpha_cumprod.double().reshape(1), rtol=1e-12, atol=0
        )

    schedule = schedule_from_diffusers(diffusers.DDIMScheduler(beta_schedule=beta_schedule))
    check(grids.leading(schedule, num_steps, steps_offset=1, end=end), "leading", 1)
    if set_alpha_to_one:
        if 1000 % num_steps == 0:
            check(grids.trailing(schedule, num_steps), "trailing", 0)
        check(grids.leading(schedule, num_steps), "leading", 0)
        check(grids.linspace(schedule, num_steps), "linspace", 0)


@pytest.mark.parametrize("num_steps", [3, 7, 300])
def test_a_leading_grid_that_does_not_divide_the_schedule_equals_diffusers(num_steps: int) -> None:
    assert grids.leading(VP, num_steps).times[:-1].tolist() == visited(diffusers.DDIMScheduler(), num_steps)


@pytest.mark.parametrize("make", [diffusers.LCMScheduler, diffusers.TCDScheduler], ids=["lcm", "tcd"])
@pytest.mark.parametrize("origin", [40, 50])
def test_lcm_grid_equals_the_lcm_and_tcd_schedulers_for_every_step_count(make, origin: int) -> None:
    # In the config, not as an argument of set_timesteps: any argument makes TCDScheduler take all 1000 steps instead.
    scheduler = make(original_inference_steps=origin)
    for num_steps in range(1, origin + 1):
        assert grids.lcm(VP, num_steps, origin).times[:-1].tolist() == visited(scheduler, num_steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", STEPS)
def test_flow_grid_equals_flow_match_euler_called_with_sigmas(num_steps: int, shift: float) -> None:
    schedule = RectifiedFlowSchedule(shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    grid = grids.flow(schedule, num_steps)
    torch.testing.assert_close(schedule.sigma(grid.times), scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)
    assert grid.spacing == "flow"


def test_karras_grid_equals_the_consistency_and_edm_schedulers() -> None:
    consistency = diffusers.CMStochasticIterativeScheduler()  # 40 points, 0.002 to 80
    consistency.set_timesteps(40)
    grid = grids.karras(EDMSchedule(), 40)
    torch.testing.assert_close(grid.times, consistency.sigmas[:40].double(), rtol=1e-5, atol=0)
    edm = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    edm.set_timesteps(18)
    grid = grids.karras(EDMSchedule(), 18, 0.01, 50.0, rho=5.0, end="clean")
    torch.testing.assert_close(grid.times, edm.sigmas.double(), rtol=1e-5, atol=0)


def test_karras_grid_follows_its_formula_on_every_path(schedule: Schedule) -> None:
    i = torch.arange(6, dtype=torch.float64)
    sigmas = (5.0 ** (1 / 7) + i / 5 * (0.01 ** (1 / 7) - 5.0 ** (1 / 7))) ** 7
    grid = grids.karras(schedule, 6, 0.01, 5.0)
    torch.testing.assert_close(schedule.coefficients(grid.times).noise_to_signal, sigmas, rtol=1e-9, atol=0)
    assert grid.num_steps == 5 and grid.spacing == "karras"
    clean = grids.karras(schedule, 6, 0.01, 5.0, end="clean")
    assert clean.num_steps == 6 and float(clean.times[-1]) == schedule.t_clean


# Quoted numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])],
)
def test_lcm_grids_of_the_literature(num_steps: int, expected: list[int]) -> None:
    assert grids.lcm(VP, num_steps).times.tolist() == [*expected, -1]
    assert grids.lcm(VP, num_steps).spacing == "lcm50"
    trailing = grids.trailing(VP, num_steps).times.tolist()
    assert grids.lcm(VP, num_steps, 40).times.tolist() == trailing == grids.lcm(VP, num_steps, 1000).times.tolist()


def test_trailing_grids_of_the_literature() -> None:
    assert grids.trailing(VP, 4).times.tolist() == [999, 749, 499, 249, -1]
    assert grids.trailing(VP, 1).times.tolist() == [999, -1]
    assert grids.trailing(VP, 16).times[1].item() == 999 - 62.5  # exact, not rounded
    assert grids.trailing(RectifiedFlowSchedule(3.0), 4).times.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert grids.trailing(VP, 4).spacing == "trailing"


def test_index_grid_of_lcm_training_ends_at_timestep_zero() -> None:
    grid = grids.index_grid(VP, 50)
    assert grid.times.tolist() == [*range(999, 18, -20), 0]
    assert grid.num_steps == 50 and grid.spacing == "index"
    assert grids.index_grid(VP, 500).times[-3:].tolist() == [3, 1, 0]  # the finest
    with pytest.raises(ValueError, match="between 1 and 500"):
        grids.index_grid(VP, 501)


def test_given_times_land_where_asked() -> None:
    assert grids.at_times(VP, [999, 399]).times.tolist() == [999, 399, -1]
    assert grids.at_times(VP, [999, 399], end="first").times.tolist() == [999, 399, 0]
    assert grids.at_times(EDMSchedule(), [80.0, 0.8]).times.tolist() == [80.0, 0.8, 0.0]
    assert grids.at_times(VP, [999]).spacing == "custom"


def test_names_of_the_spacings() -> None:
    assert grids.leading(VP, 4).spacing == "leading" and grids.linspace(VP, 4).spacing == "linspace"


# The record -----------------------------------------------------------------------------------------------------------


def test_pairs_are_the_steps_noisiest_first() -> None:
    assert list(grids.trailing(VP, 2).pairs()) == [(999, 499), (499, -1)]
    assert grids.trailing(VP, 2).num_steps == 2


def test_a_refined_trailing_grid_is_the_trailing_grid_of_more_steps(schedule: Schedule) -> None:
    for factor in (1, 2, 3):
        fine = grids.trailing(schedule, 4).refine(factor)
        torch.testing.assert_close(fine.times, grids.trailing(schedule, 4 * factor).times, rtol=0, atol=1e-12)
        assert fine.times[::factor].tolist() == grids.trailing(schedule, 4).times.tolist()
        assert fine.spacing == "trailing"
    assert grids.trailing(schedule, 3).refine().num_steps == 6


def test_a_refined_grid_of_another_spacing_claims_none() -> None:
    grid = grids.lcm(VP, 4)
    assert grid.refine(2).spacing == "custom" and grid.refine(1).spacing == "lcm50"
    assert grid.refine(2).times.tolist() == [999, 879, 759, 629, 499, 379, 259, 129, -1]
    assert grids.flow(RectifiedFlowSchedule(), 2).refine(2).spacing == "flow"


def test_grids_are_fixed_and_compared_by_identity() -> None:
    grid = grids.trailing(VP, 2)
    assert grid == grid and grid != grids.trailing(VP, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.spacing = "leading"


def test_times_are_kept_in_float64() -> None:
    assert TimeGrid(torch.tensor([1.0, 0.0], dtype=torch.float32), RectifiedFlowSchedule()).times.dtype == torch.float64
    assert TimeGrid(torch.tensor([5, 0]), VP).times.dtype == torch.float64


@pytest.mark.parametrize("bad", [[1.0], [0.5, 0.5, 0.0], [0.2, 0.4], [[1.0, 0.0]], [1.1, 0.0], [1.0, 0.5, -0.1]])
def test_impossible_grids_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="strictly decreasing|lie between"):
        TimeGrid(torch.tensor(bad), RectifiedFlowSchedule())


@pytest.mark.parametrize(
    "make",
    [
        lambda: grids.trailing(VP, 0),
        lambda: grids.leading(VP, 0),
        lambda: grids.linspace(VP, 1001),
        lambda: grids.leading(VP, 1001),
        lambda: grids.lcm(VP, 51),
        lambda: grids.lcm(VP, 4, 1001),
        lambda: grids.karras(VP, 1),
    ],
    ids=range(7),
)
def test_impossible_step_counts_are_refused(make) -> None:
    with pytest.raises(ValueError, match="num_steps must be (between 1 and|at least 1)"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: grids.leading(EDMSchedule(), 4),
        lambda: grids.linspace(EDMSchedule(), 4),
        lambda: grids.index_grid(EDMSchedule(), 4),
        lambda: grids.lcm(EDMSchedule(), 4),
        lambda: grids.at_times(EDMSchedule(), [80.0], end="first"),
    ],
    ids=range(5),
)
def test_grids_of_integer_times_need_a_beta_schedule(make) -> None:
    with pytest.raises(ValueError, match="EDMSchedule has none"):
        make()


def test_unknown_or_wasteful_end_points_are_refused() -> None:
    with pytest.raises(ValueError, match="'clean' or 'first'"):
        grids.leading(VP, 4, end="last")
    with pytest.raises(ValueError, match="'clean' or 'first'"):
        grids.at_times(VP, [999], end="last")
    with pytest.raises(ValueError, match="'sigma_min' or 'clean'"):
        grids.karras(EDMSchedule(), 4, end="first")
    with pytest.raises(ValueError, match="from timestep 0 to timestep 0"):
        grids.leading(VP, 4, end="first")


def test_a_refinement_by_less_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        grids.trailing(VP, 2).refine(0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.002, 1e4)])
def test_karras_levels_must_lie_inside_the_schedule(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="sigma_max"):
        grids.karras(VP, 10, low, high)


def test_karras_may_use_the_whole_range_of_a_schedule() -> None:
    top = float(VP.coefficients(torch.tensor(999.0)).noise_to_signal)
    assert grids.karras(VP, 10, 0.02, top).times[0].item() == pytest.approx(999, abs=1e-9)


def test_the_largest_step_counts_are_allowed() -> None:
    assert grids.leading(VP, 1000).times.tolist() == [*range(999, -1, -1), -1]
    assert grids.linspace(VP, 1000).num_steps == grids.lcm(VP, 1000, 1000).num_steps == 1000
    assert grids.lcm(VP, 50).num_steps == 50
    assert isinstance(VP, VPSchedule) and set(SCHEDULES) and times(VP, 1.0).item() == 999
