"""The contract of every network and oracle: (x_t, t, cond) -> Prediction, on a schedule.

It hides the family, the prediction type, input scaling and the network's own time convention. A method sees nothing else.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import Schedule, change_coordinates
from diffdistill.models.attention import Attention
from diffdistill.models.condition import Condition
from diffdistill.models.regions import Recorded


class Denoiser(ABC):
    """Says what is under the noise.

    Attributes:
        schedule: the Gaussian path its states live on.
        sample_shape: shape of one state without the batch, e.g. (C, H, W).
    """

    schedule: Schedule
    sample_shape: tuple[int, ...]

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the prediction at x_t.

        Args:
            x_t: noisy states, (B, *sample_shape).
            t: times of `schedule`, (B,), float64.
            cond: condition with B rows.
        """

    def in_schedule(self, schedule: Schedule) -> Denoiser:
        """Return the same denoiser seen in other coordinates: exact, since only lambda matters (see InSchedule)."""
        return InSchedule(self, schedule)


RoleContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class OfNetwork(Denoiser):
    """A denoiser made of a network that can be trained, seen in a role: what roles are made of.

    Attributes:
        network: the module; several denoisers may share one (roles as views).
        role: context entered around every call of the network; sets the active adapter and nothing else.
        attention: the kernel that the network's attention runs on.
        recorded: its passes without gradient as CUDA graphs, None where they run as they are.
    """

    network: nn.Module
    role: RoleContext = field(default=contextlib.nullcontext, kw_only=True)
    attention: Attention = field(default_factory=Attention, kw_only=True)
    recorded: Recorded | None = field(default=None, kw_only=True)

    def with_network(self, network: nn.Module) -> Self:
        """Return the same denoiser around another network of the same shape."""
        return replace(self, network=network)

    def with_role(self, role: RoleContext) -> Self:
        """Return the same network seen in a role. What was recorded belonged to another."""
        return replace(self, role=role, recorded=None)

    def with_attention(self, attention: Attention) -> Self:
        """Return the same network with another kernel of attention."""
        return replace(self, attention=attention)


class View(Denoiser):
    """Another denoiser, seen through a change of its input or its answer.

    Attributes:
        inner: that denoiser.
    """

    inner: Denoiser


def network_of(denoiser: Denoiser) -> nn.Module | None:
    """Return the network at the bottom of a denoiser, behind all views; None for an oracle."""
    while isinstance(denoiser, View):
        denoiser = denoiser.inner
    return denoiser.network if isinstance(denoiser, OfNetwork) else None


class InSchedule(View):
    """A view of a denoiser on another Gaussian path: x' = x alpha'(t')/alpha(t), lambda'(t') = lambda(t); x0 is unchanged."""

    def __init__(self, inner: Denoiser, schedule: Schedule) -> None:
        self.inner, self.schedule, self.sample_shape = inner, schedule, inner.sample_shape

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Carry the state over, ask, and state the answer as x0 at the original state."""
        x_inner, t_inner = change_coordinates(x_t, t, self.schedule, self.inner.schedule)
        alpha, sigma = self.schedule.coefficients(t)
        return Prediction("sample", self.inner(x_inner, t_inner, cond).x0, x_t, alpha, sigma)
