"""Schedules and teachers that the tests of oracles share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule, VPSchedule
from diffdistill.oracles import GaussianTeacher, MixtureTeacher

F64 = torch.float64
SHAPE = (1, 2, 2)
PATHS: dict[str, Schedule] = {
    "vp": VPSchedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)),
    "edm": EDMSchedule(),
    "flow": RectifiedFlowSchedule(3.0),
    "trig": TrigFlowSchedule(0.5),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def full_covariance() -> Tensor:
    root = normal(4, 4, seed=3)
    return root @ root.T / 4 + 0.1 * torch.eye(4, dtype=F64)


def gaussian(path: Schedule, kind: str = "sample", full: bool = False, classes: bool = True) -> GaussianTeacher:
    covariance = full_covariance() if full else 0.2 + normal(*SHAPE, seed=2) ** 2
    return GaussianTeacher(normal(*SHAPE, seed=1), covariance, path, kind, normal(3, *SHAPE, seed=4) if classes else None)


def mixture(path: Schedule, kind: str = "sample") -> MixtureTeacher:
    return MixtureTeacher(
        normal(4, *SHAPE, seed=5),
        torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64),
        path,
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        kind,
        classes=torch.tensor([0, 1, 0, 1]),
    )


def levels(path: Schedule, *noise_to_signal: float) -> Tensor:
    """Return the times of these noise levels sigma / alpha, (B,)."""
    return path.time_of_lambda(-torch.tensor(noise_to_signal, dtype=F64).log())
