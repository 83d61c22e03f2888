"""Schedules and states that the tests of `math` share."""

from __future__ import annotations

import torch

from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule, VPSchedule


def linear_vp() -> VPSchedule:
    """Return DDPM's linear schedule, written out."""
    return VPSchedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


SCHEDULES: dict[str, Schedule] = {
    "vp": linear_vp(),
    "edm": EDMSchedule(sigma_max=300.0),
    "flow": RectifiedFlowSchedule(),
    "flow_shift3": RectifiedFlowSchedule(3.0),
    "trig": TrigFlowSchedule(),
    "trig_half": TrigFlowSchedule(0.5),
}


def times(schedule: Schedule, *fractions: float) -> torch.Tensor:
    """Return the times at these fractions of the way from the clean end to t_max."""
    return schedule.t_clean + torch.tensor(fractions, dtype=torch.float64) * (schedule.t_max - schedule.t_clean)
