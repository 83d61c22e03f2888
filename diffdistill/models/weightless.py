"""Networks that have shapes and no numbers: what a computation keeps in memory is found without the memory.

They are built on the meta device, where a config is enough. A meta tensor meets no tensor of the CPU; a fake one does: it says it
lies there, and what is computed from it is fake too, while times, noise, random draws and whatever branches on them stay real.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)


def on_meta(build: Callable[[], Network], dtype: torch.dtype) -> Network:
    """Return the network that `build` makes, on the meta device: no weight is drawn or read."""
    with torch.device("meta"):
        network = build()
    return nn.Module.to(network, dtype)  # diffusers' own `to` warns of layers kept in float32, also where there are none


def as_fakes(holder: T, modules: Iterable[nn.Module]) -> T:
    """Return a deep copy of `holder` in which the meta tensors of its modules are fake tensors of the CPU.

    A copy, since `Module.to` cannot move fake tensors: everything is put together on the meta device first, roles included.

    Args:
        holder: a module, or an object that holds modules, such as `Roles`.
        modules: those whose parameters and buffers lie on the meta device.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in fakes:
                with mode:
                    fake = torch.empty_like(tensor, device="cpu")
                fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(holder, dict(fakes))


def meta_like(tensor: Tensor) -> Tensor:
    """Return a meta tensor of a tensor's shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
