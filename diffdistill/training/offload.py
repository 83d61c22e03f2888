"""Weights of a GPU updated in the memory of the CPU, so that neither moments nor anything else of the optimiser lies on the GPU.

A turn brings gradients down, in buckets; a bucket that has arrived is updated by the CPU's kernels while those after it are on their
way, and its weights go up meanwhile. Source: ZeRO-Offload (arXiv:2101.06840).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

BUCKET_BYTES = 64 * 2**20  # large enough for the full speed of the bus, small enough that most of the work overlaps


class Twins:
    """Copies of parameters in the memory of the CPU, of equal dtypes, which are what an optimiser updates.

    They are taken over when this is built and by `pull`; between the two only `update` may change the parameters.

    Args:
        parameters: of one device; on the CPU itself the copies are plain ones, and all is done in turn.
        bucket_bytes: of the gradients that travel together.
    """

    def __init__(self, parameters: Sequence[Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.parameters = list(parameters)
        on_gpu = self.parameters[0].device.type == "cuda"
        self.twins = [Parameter(_like(parameter, on_gpu)) for parameter in self.parameters]
        self.gradients = [_like(parameter, on_gpu) for parameter in self.parameters]
        self.buckets = _buckets(self.parameters, bucket_bytes)
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.pull()

    @torch.no_grad()
    def pull(self) -> None:
        """Take over the parameters of now. Waits for the device."""
        for twin, parameter in zip(self.twins, self.parameters, strict=True):
            twin.copy_(parameter)

    @torch.no_grad()
    def update(self, step: Callable[[], object]) -> None:
        """Update the parameters by their gradients, which must all be there; `step` updates the twins that have one."""
        with self._beside():
            arrived = [self._fetch(bucket) for bucket in self.buckets]
        for bucket, event in zip(self.buckets, arrived, strict=True):
            if event is not None:
                event.synchronize()
            for index in bucket:
                self.twins[index].grad = self.gradients[index]
            step()
            with self._beside():
                for index in bucket:
                    self.twins[index].grad = None
                    self.parameters[index].copy_(self.twins[index], non_blocking=True)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def _fetch(self, bucket: Sequence[int]) -> torch.cuda.Event | None:
        """Send the gradients of a bucket on their way down, and return what tells when they are there."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        for index in bucket:
            gradient = self.parameters[index].grad
            assert gradient is not None, "the engine fills what is missing with zeros"
            self.gradients[index].copy_(gradient, non_blocking=True)
        return None if self.stream is None else self.stream.record_event()

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def _like(parameter: Tensor, pinned: bool) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pinned)


def _buckets(tensors: Sequence[Tensor], size: int) -> list[list[int]]:
    """Return the indices of tensors in runs of about `size` bytes, none of them empty."""
    buckets: list[list[int]] = []
    room = 0
    for index, tensor in enumerate(tensors):
        if room <= 0:
            buckets.append([])
            room = size
        buckets[-1].append(index)
        room -= tensor.numel() * tensor.element_size()
    return buckets
