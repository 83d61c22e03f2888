"""What a distillation method is to the rest of the program.

A method declares the roles and data it needs, says who is updated at a step and in which order, and turns a batch into a
loss. It never calls an optimiser, a logger or `torch.distributed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance_adapters import GuidanceAdapterSpec
from diffdistill.models.roles import Roles
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import TrajectorySpec


class MethodConfig(BaseModel):
    """Base of every method's settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps the student is trained for; None where it serves any."""
        return None

    @property
    def usual_steps(self) -> int | None:
        """The number of steps the student is sampled in where nobody names one; None for the program's default."""
        return self.fixed_steps


class Turn(NamedTuple):
    """One update inside a step: its name, and the roles whose parameters it trains."""

    name: str
    trains: tuple[str, ...]


class Needs(NamedTuple):
    """What a method asks of the engine.

    Attributes:
        data: "images" for clean states, "labels" when conditions are enough (data-free).
        trained: roles with an optimiser.
        frozen: further roles that follow another one (EMA target, earlier stage).
        pairs: whether stored teacher pairs (noise, x0) are read.
        head: the tap whose features a discriminator head reads, None for no head. The head is role "head", trained in the
            turns that name it.
        extra_inputs: inputs that the roles' networks have beyond the teacher's, see `models.extras`; the loss puts their values
            into the condition.
        guidance_adapters: what a role trains in place of its network, see `models.guidance_adapters`; None for nothing.
        trajectories: which trajectories of the guided teacher are stored and read, see `sampling.trajectories`; None for none.
    """

    data: Literal["images", "labels"]
    trained: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    pairs: bool = False
    head: str | None = None
    extra_inputs: tuple[str, ...] = ()
    guidance_adapters: GuidanceAdapterSpec | None = None
    trajectories: TrajectorySpec | None = None


@dataclass(frozen=True)
class PairBatch:
    """Stored teacher pairs: the noise an image was made from, and the image. (B, ...), float32."""

    noise: Tensor
    x0: Tensor
    cond: Condition


@dataclass(frozen=True)
class TrajectoryBatch:
    """Stored calls of the guided teacher: state and time, the guidance w, and the guided output in the network's own type.

    x_t and target (B, ...) float32, t and w (B,) float64.
    """

    x_t: Tensor
    t: Tensor
    w: Tensor
    target: Tensor
    cond: Condition


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        cond: condition of B rows.
        x0: clean states (B, C, H, W), latents where the model has a codec; None for data-free methods. H and W are the teacher's,
            or with buckets the batch's own.
        pairs: stored teacher pairs, or None.
        carry: tensors that an earlier turn of the same step and micro-batch handed on, without graph.
        trajectories: stored calls of the guided teacher, or None.
    """

    cond: Condition
    x0: Tensor | None = None
    pairs: PairBatch | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    trajectories: TrajectoryBatch | None = None

    @property
    def size(self) -> int:
        """Number of samples, B."""
        return self.cond.batch_size

    @property
    def state_shape(self) -> tuple[int, ...] | None:
        """Shape of one state where the batch has images, None for the networks' usual one."""
        return None if self.x0 is None else tuple(self.x0.shape[1:])


@dataclass(frozen=True)
class Loss:
    """What a turn returns.

    Attributes:
        total: 0-dim, with graph.
        terms: named 0-dim values for the log, detached, never moved to the host here.
        carry: tensors for later turns of the same step and micro-batch, detached.
        then: makes the rest of the loss, when the graph of `total` is gone: gradients of both add up, and only one graph lives at
            a time. Its graph must reach every parameter that is trained.
    """

    total: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    then: Callable[[], Loss] | None = None


@dataclass(frozen=True)
class Rng:
    """Where a turn's randomness comes from.

    Attributes:
        local: the micro-batch's own generator.
        shared: a generator in the same state in every micro-batch and process of the step (for choices all must share).
    """

    local: torch.Generator
    shared: torch.Generator

    def normal(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Return standard normal float32 noise of the given shape."""
        return torch.randn(shape, generator=self.local, device=self.local.device)

    def uniform(self, size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return `size` float64 numbers, uniform in [low, high)."""
        return low + (high - low) * torch.rand(size, generator=self.local, device=self.local.device, dtype=torch.float64)

    def integers(self, size: int, high: int) -> Tensor:
        """Return `size` int64 numbers, uniform in 0..high-1."""
        return torch.randint(high, (size,), generator=self.local, device=self.local.device)

    def shared_integer(self, high: int) -> int:
        """Return one number in 0..high-1, equal in every micro-batch and process; drawn on the CPU, so nothing waits."""
        return int(torch.randint(high, (1,), generator=self.shared))


class Distiller(ABC):
    """A method. Concrete ones are final: variants are settings or other functions, not subclasses."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]

    @classmethod
    @abstractmethod
    def needs(cls, config: Any) -> Needs:
        """Return the roles and data the method uses under these settings."""

    @abstractmethod
    def __init__(self, config: Any, teacher: Denoiser, roles: Roles, total_steps: int) -> None:
        """Hold the settings, the unguided teacher and the roles named by `needs`."""

    @abstractmethod
    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return who is updated at this step (counted from 0), in order."""

    @abstractmethod
    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return the loss of one turn on one micro-batch; a function of its arguments and the roles' weights only."""

    @abstractmethod
    def sampler(self, num_steps: int) -> Sampler:
        """Return how the student is sampled in `num_steps` steps."""

    def after(self, turn: Turn, step: int) -> None:  # noqa: B027 (most methods have nothing to do)
        """Act after the optimiser step of a turn: EMA targets and the like."""

    def finish(self) -> None:  # noqa: B027
        """Act at the end of the stage: hand the student's weights to the next one's teacher, say."""
