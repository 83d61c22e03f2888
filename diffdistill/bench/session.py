"""A run that is measured, ready to train: the engine that `train` builds, on random data held in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffdistill.bench import published
from diffdistill.config import RunConfig
from diffdistill.data.batches import Sample
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.device import usual_device
from diffdistill.models.attention import Attention
from diffdistill.models.loading import Teacher
from diffdistill.models.roles import Roles
from diffdistill.training.building import open_stage, open_teacher
from diffdistill.training.engine import Engine

BATCHES = 16  # in the data, as about that many are in the digits
CONDITIONS = 20  # different ones in the data; more would be more of the same


class RandomSource:
    """Random clean states, and conditions of the teacher over and over, in memory: what a cache holds, without a cache.

    Args:
        teacher: whose states and conditions they are.
        num_samples: states.
    """

    def __init__(self, teacher: Teacher, num_samples: int) -> None:
        self.num_samples = num_samples
        self.x0 = _noise(num_samples, teacher).clamp(-1, 1)
        self.values = {
            name: value.cpu() for name, value in teacher.condition(teacher.examples(CONDITIONS), CONDITIONS).values.items()
        }

    def take(self, indices: Tensor, generator: torch.Generator) -> Sample:
        """Return the states at `indices`, with their conditions; nothing is drawn."""
        return Sample(self.x0[indices], {name: value[indices % CONDITIONS] for name, value in self.values.items()})


def _noise(num: int, teacher: Teacher) -> Tensor:
    return torch.randn(num, *teacher.denoiser.sample_shape, generator=torch.Generator().manual_seed(0))


def random_pairs(teacher: Teacher, num: int) -> Pairs:
    """Return pairs of the right shapes; a step costs the same whatever they hold."""
    states = _noise(num, teacher)
    return Pairs(states, states.clamp(-1, 1), torch.arange(num) % CONDITIONS % (teacher.num_classes or CONDITIONS))


def random_trajectories(teacher: Teacher, num: int) -> Trajectories:
    """Return trajectories of one call each."""
    states, t = _noise(num, teacher)[:, None], torch.linspace(0, teacher.denoiser.schedule.t_max, num, dtype=torch.float64)
    labels = torch.arange(num) % CONDITIONS % (teacher.num_classes or CONDITIONS)
    return Trajectories(states, states, t[:, None], torch.full((num,), 2.0, dtype=torch.float64), labels)


@dataclass
class Session:
    """A stage ready to train.

    Attributes:
        done: steps done.
    """

    config: RunConfig
    teacher: Teacher
    roles: Roles
    engine: Engine
    done: int = 0

    def step(self) -> None:
        """Train one step, as the engine does."""
        self.engine.step(self.done)
        self.done += 1

    def cycle(self) -> None:
        """Train as many steps as there are from one turn of the student to the next."""
        for _ in range(self.cycle_steps):
            self.step()

    def two_cycles(self) -> None:
        """Train two of them: whatever is compiled for a first and for a second call, is then."""
        self.cycle()
        self.cycle()

    @property
    def cycle_steps(self) -> int:
        """Steps of a cycle."""
        return getattr(self.config.stages[0].method, "student_every", 1)


def open_session(config: RunConfig, published_network: bool = False) -> Session:
    """Build the first stage of a run on the GPU where there is one.

    Args:
        config: the run.
        published_network: whether its teacher names a published network, which gets random weights.
    Raises:
        UserError: the method cannot be trained on this teacher, or not in this layout.
    """
    device = usual_device()
    if published_network:
        teacher = published.random_teacher(config.teacher, device)
        teacher = replace(teacher, denoiser=teacher.denoiser.with_attention(Attention(config.compute.attention)))
    else:
        teacher = open_teacher(config, device)
    needs, num = config.stages[0].needs, BATCHES * config.batch_size
    roles, engine = open_stage(
        config,
        teacher,
        source=RandomSource(teacher, num),
        pairs=random_pairs(teacher, num) if needs.pairs else None,
        trajectories=random_trajectories(teacher, num) if needs.trajectories is not None else None,
    )
    return Session(config, teacher, roles, engine)
