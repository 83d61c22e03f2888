"""From the gradients of each process to those of the whole batch: their sum over the micro-batches of all processes.

`Replicated`: every process holds all weights. Gradients travel in buckets of a fixed order, each as soon as the last backward
pass of the turn has made its last one, so that the network is busy while earlier layers are still computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

BYTES_PER_BUCKET = 25 << 20  # as DistributedDataParallel has it


class Reduction(Protocol):
    """What a step asks of the processes, turn by turn; every process asks the same in the same order."""

    def before_backward(self, parameters: Sequence[Parameter], last: bool) -> None:
        """Prepare a backward pass of the turn that trains `parameters`; `last` for the last one of this process."""
        ...

    def after_backward(self, parameters: Sequence[Parameter]) -> None:
        """Give every parameter the sum of its gradients; one that has none anywhere gets zero."""
        ...

    def totals(self, values: Tensor, gradients: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Return the sums of `values` over the processes, float64 (N,), and the norm of each list of summed gradients, 0-dim."""
        ...


class Replicated:
    """Every process holds all weights and gets all gradients.

    Args:
        num_processes: 1 for no sum at all.
        bytes_per_bucket: of one all-reduce, at most, where it has more than one gradient.
    """

    def __init__(self, num_processes: int, bytes_per_bucket: int = BYTES_PER_BUCKET) -> None:
        self.num_processes, self.bytes_per_bucket = num_processes, bytes_per_bucket
        self._buckets: list[list[Parameter]] = []
        self._missing: list[int] = []  # gradients that a bucket still waits for
        self._under_way: list[Any] = []  # handles of the all-reduces, of the first buckets
        self._hooks: list[Any] = []

    def before_backward(self, parameters: Sequence[Parameter], last: bool) -> None:
        """Watch the gradients of the last pass, to send each bucket when it is full."""
        if not last or self.num_processes == 1:
            return
        self._buckets = buckets(parameters, self.bytes_per_bucket)
        self._missing = [len(bucket) for bucket in self._buckets]
        number_of = {parameter: number for number, bucket in enumerate(self._buckets) for parameter in bucket}

        def arrived(parameter: Parameter) -> None:
            self._missing[number_of[parameter]] -= 1
            # in order, whatever the order of arrival: the processes must send the same bucket at the same time
            while len(self._under_way) < len(self._buckets) and self._missing[len(self._under_way)] == 0:
                self._send()

        self._hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]

    def after_backward(self, parameters: Sequence[Parameter]) -> None:
        """Send the buckets that are not full, because some parameters take no part in this turn, and wait for all."""
        if self.num_processes == 1:
            _fill(parameters)
            return
        for hook in self._hooks:
            hook.remove()
        while len(self._under_way) < len(self._buckets):
            self._send()
        for work in self._under_way:
            work.wait()
        self._under_way = []

    def _send(self) -> None:
        """Start the sum of the next bucket. Its gradients become views of what is summed, so no second copy is kept."""
        bucket = self._buckets[len(self._under_way)]
        _fill(bucket)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in bucket])  # type: ignore[union-attr]
        for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._under_way.append(torch.distributed.all_reduce(flat, async_op=True))

    def totals(self, values: Tensor, gradients: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Sum the values; the gradients are summed already."""
        values = values.double()
        if self.num_processes > 1:
            torch.distributed.all_reduce(values)
        return values, [get_total_norm(list(each)) for each in gradients]


def buckets(parameters: Sequence[Parameter], size: int) -> list[list[Parameter]]:
    """Return the parameters from the last to the first, about the order in which gradients arrive, in lists of up to `size` bytes.

    A list has one dtype, and at least one parameter.
    """
    found: list[list[Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        room -= parameter.nbytes
        if not found or room < 0 or found[-1][0].dtype != parameter.dtype:
            found.append([])
            room = size - parameter.nbytes
        found[-1].append(parameter)
    return found


def _fill(parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
