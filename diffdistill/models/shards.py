"""Parameters split over processes: each holds a range of the rows of every one, as torch's `fully_shard` (FSDP2) splits them.

In the networks they are DTensors; everywhere else (states of roles, averages, moments, checkpoints) they are plain tensors of the
rows that this process holds, `local`. Nothing here imports torch.distributed, which most runs do not need.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_split(tensor: Tensor) -> bool:
    """Return whether this process holds only some rows of a tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds, detached, in the same memory."""
    whole: Any = tensor.detach()
    return whole.to_local() if is_split(whole) else whole


def own_rows(given: Tensor, parameter: Tensor) -> Tensor:
    """Return of a tensor for a parameter the rows that this process holds, copied where the rest is not needed.

    Args:
        given: of the parameter's whole shape, or of the shape of `local(parameter)` already.
        parameter: split or not.
    """
    if not is_split(parameter) or given.shape != parameter.shape:
        return given
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    parts = given.chunk(mesh.size())  # as fully_shard cuts: the last processes may get fewer rows, or none
    index = mesh.get_local_rank()
    return (parts[index] if index < len(parts) else given[:0]).clone()


def has_split_parameters(network: nn.Module) -> bool:
    """Return whether a network is split over processes, so that every one of them has to take part in all of each call."""
    return hasattr(network, "set_requires_gradient_sync")  # an FSDPModule
