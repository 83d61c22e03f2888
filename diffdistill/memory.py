"""What a run keeps in memory: weights, adapters, gradients and optimiser of each role tensor by tensor, and what a turn adds.

Only shapes and dtypes are read, so a plan can be made of networks on the meta device, before anything is loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffdistill.models.quantize import num_values, stored_bytes
from diffdistill.models.roles import HEAD, Roles
from diffdistill.training.optimizers import OptimizerConfig, moment_bytes


@dataclass(frozen=True)
class MemoryRow:
    """What a role adds to memory: numbers of parameters, and bytes.

    Attributes:
        role: or what else is kept: the autoencoder, an average.
        parameters, trained: numbers of parameters.
        weights_bytes: networks, where they are the role's own: parameters and buffers.
        adapter_bytes: what the role trains in place of a network.
        gradient_bytes, optimizer_bytes: of what it trains. Gradients are there during the role's turn alone.
        activation_bytes: the most that its turn has beside all of these at once: inputs, graph, intermediate results.
        offloaded_bytes: kept in the memory of the CPU for a GPU (`offload` of optimiser and average); in no sum.
    """

    role: str
    parameters: int
    trained: int
    weights_bytes: int
    adapter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    offloaded_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """What is there from the first step to the last: weights, adapters and optimiser."""
        return self.weights_bytes + self.adapter_bytes + self.optimizer_bytes

    @property
    def bytes(self) -> int:
        """All of it together."""
        return self.kept_bytes + self.gradient_bytes + self.activation_bytes


@dataclass(frozen=True)
class TurnMemory:
    """What a turn has in memory beside what is kept: the gradients of the roles it trains, and its activations."""

    name: str
    trains: tuple[str, ...]
    gradient_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.gradient_bytes + self.activation_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """What the stage of a run that needs most keeps in memory.

    Attributes:
        stage: which one, counted from 0.
        rows: by role.
        turns: of a step, in order, and making images, which trains nothing; gradients and activations are there one turn at a time.
    """

    stage: int
    rows: tuple[MemoryRow, ...]
    turns: tuple[TurnMemory, ...]

    @property
    def heaviest(self) -> TurnMemory:
        """The turn that needs most."""
        return max(self.turns, key=lambda turn: turn.bytes)

    @property
    def peak(self) -> MemoryRow:
        """All that is kept, and gradients and activations of the turn that needs most."""
        turn = self.heaviest
        return replace(
            total(self.rows, "peak of a step"), gradient_bytes=turn.gradient_bytes, activation_bytes=turn.activation_bytes
        )

    def summary(self) -> str:
        """Return the peak and its parts in one line."""
        peak = self.peak
        parts = ("weights", "adapter", "optimizer", "gradient", "activation")
        amounts = {part: getattr(peak, f"{part}_bytes") for part in parts}
        shown = " + ".join(f"{NAMES[part]} {readable(amount)}" for part, amount in amounts.items() if amount)
        beside = f", and {readable(peak.offloaded_bytes)} in the memory of the CPU" if peak.offloaded_bytes else ""
        return f"{readable(peak.bytes)} = {shown} (turn of {self.heaviest.name}){beside}"


NAMES = {
    "weights": "weights",
    "adapter": "adapters",
    "gradient": "gradients",
    "optimizer": "optimizer",
    "activation": "activations",
}


def readable(amount: int) -> str:
    """Return bytes as MiB or GiB."""
    return f"{amount / 2**20:,.1f} MiB" if amount < 2**30 else f"{amount / 2**30:,.2f} GiB"


# What is kept


def memory_rows(
    roles: Roles, optimizers: Mapping[str, OptimizerConfig], averaged: bool, offloaded_average: bool = False
) -> list[MemoryRow]:
    """Return a row for the teacher, each role, the head and the average; a tensor counts where it is seen first.

    Args:
        roles: on any device, the meta device too.
        optimizers: of the trained roles.
        averaged: whether an average of the student is kept.
        offloaded_average: whether it is kept in the memory of the CPU.
    """
    networks = roles.networks
    own = {name: roles.parameters(name) for name in (*roles.names, *([HEAD] if HEAD in networks else []))}
    seen = {id(parameter) for parameters in own.values() for parameter in parameters}
    rows = []
    for name in ("teacher", *own):
        base = [tensor for tensor in _tensors(networks.get(name)) if id(tensor) not in seen]
        seen |= {id(tensor) for tensor in base}
        rows.append(_row(name, base, own.get(name, ()), roles.adapted and name != HEAD, optimizers.get(name)))
    if averaged:
        rows.append(_average_row(own["student"], roles.adapted, offloaded_average))
    return rows


def network_row(name: str, network: nn.Module) -> MemoryRow:
    """Return the row of a frozen network that has no role, such as the autoencoder."""
    return _row(name, _tensors(network), (), False, None)


def total(rows: Sequence[MemoryRow], name: str = "all") -> MemoryRow:
    """Return the sum of the rows."""
    sums = {key: sum(getattr(row, key) for row in rows) for key in vars(rows[0]) if key != "role"}
    return MemoryRow(name, **sums)


def without_a_gpu(row: MemoryRow) -> MemoryRow:
    """Return the row as it is where the memory of the CPU is all there is."""
    return replace(row, optimizer_bytes=row.optimizer_bytes + row.offloaded_bytes, offloaded_bytes=0)


def _average_row(averaged: Sequence[Tensor], adapted: bool, offloaded: bool) -> MemoryRow:
    """Return the row of an average, which is kept in float32 or wider (see `Shadow`)."""
    wide = sum(tensor.numel() * torch.promote_types(torch.float32, tensor.dtype).itemsize for tensor in averaged)
    parameters = sum(tensor.numel() for tensor in averaged)
    if offloaded:  # and beside it the weights that are taken in next
        return MemoryRow("average of student", parameters, 0, 0, offloaded_bytes=wide + nbytes(averaged))
    return MemoryRow("average of student", parameters, 0, *((0, wide) if adapted else (wide, 0)))


def _tensors(network: nn.Module | None) -> list[Tensor]:
    return [] if network is None else [*network.parameters(), *network.buffers()]


def _row(
    role: str, base: Sequence[Tensor], own: Sequence[Tensor], adapted: bool, optimizer: OptimizerConfig | None
) -> MemoryRow:
    weights, adapters = ([*base], [*own]) if adapted else ([*base, *own], [])
    gradient = 0 if optimizer is None else nbytes(own)
    moments = 0 if optimizer is None else sum(moment_bytes(parameter, optimizer) for parameter in own)
    return MemoryRow(
        role,
        sum(num_values(tensor) for tensor in (*weights, *adapters) if isinstance(tensor, nn.Parameter)),
        sum(tensor.numel() for tensor in own) if optimizer else 0,
        nbytes(weights),
        nbytes(adapters),
        gradient,
        *((0, 0, moments + 2 * gradient) if optimizer is not None and optimizer.offload else (moments,)),  # see `Twins`
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, rounded weights included."""
    return sum(map(stored_bytes, tensors))


# What comes and goes


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it, as long as each lives; works on fake tensors as on real ones.

    Storages are counted, so views cost nothing, and what existed before is not counted. What a kernel needs inside is not seen.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation; inputs seen for the first time come from outside, outputs seen for the first time are new."""
        self._see((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, new=True)
        return result

    def _see(self, values: Any, new: bool) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._sizes:
                    size = storage.nbytes() if new else 0
                    self._sizes[storage._cdata] = size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
