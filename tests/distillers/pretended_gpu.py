"""A GPU that is not there: tensors that say they lie on it, and a watch for whatever would make the CPU wait for it."""

import copy
import dataclasses

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Waits(Exception):
    """The CPU would wait for the GPU here."""


class PretendedGPU(TorchDispatchMode):
    """Inside, tensors on `cuda` are fake ones, without numbers, and what only involves the CPU is computed as ever.

    While it watches, it raises Waits for a number or a shape that depends on values on the GPU, and for copies between the two that are
    not asynchronous.
    """

    def __init__(self):
        super().__init__()
        self.watches = False
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        wanted = kwargs.get("device")
        if not on_gpu and (wanted is None or torch.device(wanted).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.watches:
            self._refuse_waiting(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (
            torch._subclasses.fake_tensor.DataDependentOutputException,
            torch._subclasses.fake_tensor.DynamicOutputShapeException,
        ) as error:
            raise Waits(f"{func}: what it returns depends on values on the GPU") from error

    @staticmethod
    def _refuse_waiting(func, args, kwargs):
        if func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device if func is aten.copy_.default else torch.device(kwargs.get("device") or source.device)
            asynchronous = args[2] if func is aten.copy_.default and len(args) > 2 else kwargs.get("non_blocking", False)
            if source.device.type != target.type and (target.type == "cpu" or not asynchronous):
                raise Waits(f"{func}: a copy from {source.device.type} to {target.type}")
        if func in INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                raise Waits(f"{func}: how many a mask chooses is known on the GPU alone")
            if any(not isinstance(index, FakeTensor) for index in indices):
                raise Waits(f"{func}: an index is copied from the CPU")

    # What lies there

    def holding(self, holder, modules):
        """Return a deep copy of `holder` in which the parameters and buffers of its modules lie on this GPU."""
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        with self.fake:
            made = {key: torch.empty_like(tensor, device=GPU) for key, tensor in tensors.items()}
        made = {
            key: nn.Parameter(made[key], tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made[key]
            for key, tensor in tensors.items()
        }
        return copy.deepcopy(holder, made)

    def there(self, value):
        """Return a record of tensors with all of them on this GPU."""
        if isinstance(value, torch.Tensor):
            with self.fake:
                return torch.empty_like(value, device=GPU)
        if dataclasses.is_dataclass(value):
            fields = {field.name: self.there(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return tree_map_only(torch.Tensor, self.there, value)


class Generator(torch.Generator):
    """A generator of the CPU that says it belongs to the GPU; fake tensors draw nothing from it."""

    device = GPU
