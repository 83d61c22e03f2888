"""Networks split over the processes, by torch's `fully_shard` (FSDP2): each process keeps a share of every parameter, gradient and moment.

A block of a network is put together for its part of a pass and let go again. `Split` is the counterpart of `Replicated`: the
gradients of the last backward pass of a turn arrive as sums over the processes, each process its own rows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from diffdistill.errors import UserError
from diffdistill.models.shards import local, own_rows

if TYPE_CHECKING:
    from diffdistill.config import RunConfig

Parallel = Literal["ddp", "fsdp"]


def check_parallel(config: RunConfig, micro_batch_size: int, num_processes: int) -> None:
    """Raise UserError where these processes cannot run split networks: they must all do the same passes."""
    number = config.batch_size // micro_batch_size
    if config.parallel == "fsdp" and number % num_processes:
        raise UserError(
            f"parallel: fsdp needs the same number of micro-batches in every process, and {num_processes} processes cannot share the "
            f"{number} of a step evenly (batch_size {config.batch_size}, micro-batches of {micro_batch_size}). Choose another "
            "micro_batch_size or number of processes, or set parallel: ddp."
        )


def splitter(device: torch.device) -> Callable[[nn.Module], None]:
    """Return what splits a network over all processes, in place, block by block; joined by the processes all together.

    The rows of a network that was built on the meta device have room then and no values: `fill` writes them.

    Raises:
        UserError: torch is too old.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(f"parallel: fsdp needs torch 2.9 or newer, and this is {torch.__version__}. Set parallel: ddp.")
    # it warns of in-place changes of what a network returns; nobody here makes any
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return partial(_split, device=device, mesh=init_device_mesh(device.type, (torch.distributed.get_world_size(),)))


def _split(network: nn.Module, device: torch.device, mesh: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in (*blocks(network), network):
        # let go after each forward pass, also of the outermost part: it would keep requires_grad of one turn for the next
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum, as a loss is divided by all micro-batches of the step
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    if next(network.parameters()).is_meta:
        network.to_empty(device=device)


@torch.no_grad()
def fill(network: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Give a split network the values of a whole one, tensor by tensor; all processes call it, the main one with the whole one."""
    values = {} if whole is None else dict(_tensors(whole))
    for name, tensor in _tensors(network):
        value = values[name].to(device) if values else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        assert value.dtype == tensor.dtype and value.shape == tensor.shape, f"{name} is not what the config of its network says"
        torch.distributed.broadcast(value, 0)
        local(tensor).copy_(own_rows(value, tensor))


def from_main(values: Mapping[str, str] | None, device: torch.device) -> dict[str, str]:
    """Return in every process what the main one gives."""
    text = b"" if values is None else json.dumps(dict(values)).encode()
    length = torch.tensor(len(text), device=device)
    torch.distributed.broadcast(length, 0)
    said = torch.tensor(list(text.ljust(int(length))), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(said, 0)
    return json.loads(bytes(said.tolist()))


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a network that are put together one after another: what its module lists hold, and a middle block.

    DiT calls the embedding of its first block a second time outside of it, which is then a part of its own and comes before it.
    """
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            if type(network).__name__ == "DiTTransformer2DModel":
                yield child[0].norm1.emb  # type: ignore[union-attr, misc]
            yield from (block for block in child if any(True for _ in block.parameters()))
        elif name == "mid_block":
            yield child


class Split:
    """The `Reduction` of split networks.

    Args:
        networks: every network and head that is trained.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks: list[Any] = list({id(network): network for network in networks}.values())

    def before_backward(self, parameters: Sequence[Parameter], last: bool) -> None:
        """Keep the gradients of all passes but the last in this process; the last one's are summed with them."""
        for network in self.networks:
            network.set_requires_gradient_sync(last)

    def after_backward(self, parameters: Sequence[Parameter]) -> None:
        """Fill in zeros; the sums are there."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def totals(self, values: Tensor, gradients: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Sum the values and the squares of the rows that this process holds."""
        squares = [torch.stack(torch._foreach_norm(list(rows))).double().square().sum() for rows in gradients]
        sums = torch.cat([values.double(), torch.stack(squares)])
        torch.distributed.all_reduce(sums)
        return sums[: len(values)], list(sums[len(values) :].sqrt().to(gradients[0][0].dtype).unbind())
