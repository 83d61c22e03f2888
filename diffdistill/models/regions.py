"""What may stand in for the Python of a network: compiled blocks, and recorded passes. And where something looks inside, neither.

Hooks that come and go with a call (taps, rows of one batch in several roles) are seen by neither: a compiled block does not ask for
them again, and a recorded pass runs no Python. `looking_inside` is entered where such hooks are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.models.condition import Condition

_LOOKED_INTO = "_looked_into"
_COMPILED = "_compiled_blocks"
_VARIANTS = 64  # of one block: by role, requires_grad, shapes and strides; torch's own limit is 8
_WARM_UP = 3  # passes before one is recorded, in which libraries choose kernels and take their workspace
_RECORDED = 16  # passes of one role; each keeps what it computes in memory


def is_looked_into(network: nn.Module) -> bool:
    """Return whether a hook that comes and goes is on the network now."""
    return vars(network).get(_LOOKED_INTO, False)


@contextlib.contextmanager
def looking_inside(network: nn.Module) -> Iterator[None]:
    """Run the network's own Python, so that every hook is called."""
    before = is_looked_into(network)
    vars(network)[_LOOKED_INTO] = True
    try:
        with torch.compiler.set_stance("force_eager") if vars(network).get(_COMPILED) else contextlib.nullcontext():
            yield
    finally:
        vars(network)[_LOOKED_INTO] = before


# Compiled blocks


def compile_blocks(network: nn.Module, classes: tuple[str, ...], varying_sizes: bool, backend: str | Callable[..., Any]) -> int:
    """Compile each block of these classes by itself, in place; return how many.

    A block is compiled once for each role, set of trained parameters and kind of shape that it meets, and blocks of one kind share what
    was compiled: which adapter is active, and what requires gradient, are guards. A block that cannot be compiled as a whole, or meets
    more variants than that, is an error and never run otherwise.

    Args:
        network: whose blocks.
        classes: names of their classes.
        varying_sizes: whether images have several sizes, so that one graph serves all.
        backend: of `torch.compile`.
    """
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, _VARIANTS)
    blocks: list[Any] = [module for module in network.modules() if type(module).__name__ in classes]
    for block in blocks:  # `forward`, not the call: hooks on the block itself stay outside, where they are asked for
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True if varying_sizes else None, backend=backend)
    vars(network)[_COMPILED] = True
    return len(blocks)


# Recorded passes

Forward = Callable[[Tensor, Tensor, Condition], Tensor]


class Recorded:
    """Passes of a network without gradient as CUDA graphs, one for each shape of the input, all in one memory pool.

    A graph reads the weights where they lie, so that weights which change in place (an average, a target) are those of now.
    """

    def __init__(self) -> None:
        self._passes: dict[tuple[Any, ...], _Pass] = {}
        self._pool: Any = None

    def __call__(self, forward: Forward, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return forward(x, t, cond): recorded when it is asked for the first time, replayed from then on.

        Raises:
            UserError: the network does something that cannot be recorded.
        """
        kinds = ((name, value.shape, value.dtype) for name, value in cond.values.items())
        key = (x.shape, x.dtype, t.shape, t.dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), *kinds)
        if key not in self._passes:
            if len(self._passes) == _RECORDED:
                warnings.warn(f"{_RECORDED} shapes of passes are recorded; those of others run as they are.", stacklevel=4)
            if len(self._passes) >= _RECORDED:
                return forward(x, t, cond)
            self._passes[key] = _Pass(forward, x, t, cond, self._memory_pool())
        return self._passes[key].replay(x, t, cond)

    def _memory_pool(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class _Pass:
    """One recorded pass: the inputs that it reads, the output that it writes, and the graph in between."""

    def __init__(self, forward: Forward, x: Tensor, t: Tensor, cond: Condition, pool: Any) -> None:
        self.x, self.t, self.cond = x.clone(), t.clone(), cond.with_values(**{k: v.clone() for k, v in cond.values.items()})
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                forward(self.x, self.t, self.cond)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.output = forward(self.x, self.t, self.cond)
        except RuntimeError as error:
            raise UserError(
                f"a pass of this network cannot be recorded as a CUDA graph ({str(error).partition(chr(10))[0]}). Set "
                "compute.cuda_graphs: false."
            ) from error

    def replay(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        for name, value in cond.values.items():
            self.cond.values[name].copy_(value)
        self.graph.replay()
        return self.output.clone()  # the pool's memory is the next pass's, too
