"""What the roles of a run keep in memory: weights, gradients and optimiser, counted tensor by tensor; activations come on top.

Only shapes and dtypes are read, so a plan can be made of networks on the meta device, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from diffdistill.models.quantize import num_values, stored_bytes
from diffdistill.models.roles import Roles
from diffdistill.training.optimizers import OptimizerConfig


@dataclass(frozen=True)
class MemoryRow:
    """What a role adds to memory: numbers of parameters, and bytes. Activations come on top."""

    role: str
    parameters: int
    trained: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def bytes(self) -> int:
        """Weights, gradients and optimiser together."""
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes


def memory_plan(roles: Roles, optimizers: Mapping[str, OptimizerConfig], averaged: bool) -> list[MemoryRow]:
    """Return a row for the teacher, each role, the head and the average; a tensor counts where it is seen first.

    Args:
        roles: on any device, the meta device too.
        optimizers: of the trained roles.
        averaged: whether an average of the student is kept.
    """
    names = [*roles.names, *(["head"] if roles.head is not None else [])]
    own = {name: roles.named_parameters(name) for name in names}
    seen = {id(parameter) for parameters in own.values() for parameter in parameters.values()}
    rows = [_row("teacher", _unseen(roles.teacher, seen), [], None)]
    for name in names:
        rest = [] if name == "head" else _unseen(roles[name], seen)
        rows.append(_row(name, [*rest, *own[name].values()], list(own[name].values()), optimizers.get(name)))
    if averaged:
        rows.append(_row("average of student", list(own["student"].values()), [], None))
    return rows


def total(rows: Sequence[MemoryRow]) -> MemoryRow:
    """Return the sum of the rows."""
    sums = {field.name: sum(getattr(row, field.name) for row in rows) for field in fields(MemoryRow) if field.name != "role"}
    return MemoryRow("all", **sums)


def _unseen(denoiser: Any, seen: set[int]) -> list[Tensor]:
    network = getattr(denoiser, "network", None)
    found = [] if network is None else [parameter for parameter in network.parameters() if id(parameter) not in seen]
    seen |= {id(parameter) for parameter in found}
    return found


def _row(role: str, parameters: Sequence[Tensor], trained: Sequence[Tensor], optimizer: OptimizerConfig | None) -> MemoryRow:
    gradient = _bytes(trained) if optimizer is not None else 0
    moments = 0
    if optimizer is not None:
        moments = int(optimizer.betas[0] > 0) if optimizer.name == "sgd" else 2
    return MemoryRow(
        role,
        sum(num_values(parameter) for parameter in parameters),
        sum(parameter.numel() for parameter in trained) if optimizer else 0,
        _bytes(parameters),
        gradient,
        moments * gradient,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(stored_bytes(tensor) for tensor in tensors)
