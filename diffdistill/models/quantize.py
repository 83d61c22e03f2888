"""The frozen base in fewer bits, for adapters trained on it: int8 by torchao (weights only), nf4 by bitsandbytes.

The linear layers of attention and feed-forward blocks are rounded: most weights of a transformer are there. Convolutions, norms,
what embeds time, text and patches, and the network's own first and last layers stay as they are. Arithmetic stays in the
network's dtype; gradients flow through to the adapters. Sources: LLM.int8() (arXiv:2208.07339), QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffdistill.errors import UserError
from diffdistill.models.adapters import target_modules
from diffdistill.models.network import Family

Quantization = Literal["int8", "nf4"]

PACKAGES: dict[Quantization, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
_NF4_DEVICES = ("cuda", "xpu")  # on the CPU bitsandbytes packs weights anew inside a forward pass, and not those of every shape


def quantize(network: nn.Module, family: Family, kind: Quantization) -> None:
    """Round the linear layers of the blocks of a plain network, in place; they are frozen for good.

    Args:
        network: on the device it will be used on, without adapters.
        family: names the layers.
        kind: int8: one scale per output channel; nf4: one per 64 weights, four bits each.
    Raises:
        UserError: the package is not installed, or does not work on the network's device.
    """
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise UserError(
            f"teacher_options.quantize: {kind} needs {PACKAGES[kind]}. Install it with "
            f"`pip install 'diffdistill[{PACKAGES[kind]}]'`, or set quantize: null."
        )
    names = block_linears(network, family)
    if kind == "int8":
        _to_int8(network, names)
    else:
        device = next(network.parameters()).device
        if device.type not in _NF4_DEVICES:
            raise UserError(
                f"teacher_options.quantize: nf4 works on a GPU ({', '.join(_NF4_DEVICES)}); this network is on {device.type}. Set int8 or null."
            )
        _to_nf4(network, names)


def block_linears(network: nn.Module, family: Family) -> list[str]:
    """Return the names of the linear layers of attention and feed-forward inside the blocks of a network."""
    presets = family.lora_targets
    names = target_modules(network, "attention+ff" if "attention+ff" in presets else "attention", presets)
    inside_blocks = [name for name in names if "." in name]  # a network's own proj_out ends like that of a block
    return [name for name in inside_blocks if isinstance(network.get_submodule(name), nn.Linear)]


def rounding_saves(network: nn.Module, family: Family, kind: Quantization) -> int:
    """Return the bytes that `quantize` takes off a plain network; codes and scales are counted, biases stay."""
    saved = 0.0
    for name in block_linears(network, family):
        weight: Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
        rounded: float
        if kind == "int8":  # a byte a weight, and a scale and an int8 zero point a channel
            rounded = weight.numel() + weight.shape[0] * (weight.element_size() + 1)
        else:  # half a byte a weight, and a float32 scale for 64 of them
            rounded = weight.numel() / 2 + weight.numel() / 64 * 4
        saved += weight.numel() * weight.element_size() - rounded
    return int(saved)


class FrozenLinear(nn.Linear):
    """A linear layer of rounded, frozen weights, which keeps them for the backward pass as they are.

    Left to itself autograd keeps what they were widened to: the whole base in the network's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return cast(Tensor, _FrozenLinear.apply(x, cast(Any, self.weight).dequantize, self.bias))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, widened: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        return functional.linear(x, widened(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.widened, _ = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient @ ctx.widened().to(gradient.dtype)).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return functional.linear(tangent, ctx.widened().to(tangent.dtype))


def _to_int8(network: nn.Module, names: list[str]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = set(names)
    quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in chosen)
    for name in names:
        linear: nn.Linear = network.get_submodule(name)  # type: ignore[assignment]
        frozen = FrozenLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        frozen.weight, frozen.bias = linear.weight.requires_grad_(False), linear.bias
        network.set_submodule(name, frozen.train(linear.training))


def _to_nf4(network: nn.Module, names: list[str]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in names:
        linear: nn.Linear = network.get_submodule(name)  # type: ignore[assignment]
        rounded = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        rounded.weight = Params4bit(linear.weight.detach().cpu(), requires_grad=False, quant_type="nf4", module=rounded)
        rounded.bias = linear.bias
        network.set_submodule(name, rounded.to(linear.weight.device).requires_grad_(False))  # moving is what rounds


def is_quantized(network: nn.Module) -> bool:
    """Return whether any weight of a network is rounded."""
    return any(type(parameter).__module__.partition(".")[0] in PACKAGES.values() for parameter in network.parameters())


def num_values(tensor: Tensor) -> int:
    """Return how many numbers a tensor stands for, packed or not."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold a weight: itself, or codes and scales of a rounded one."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a shell around them
        return [part for name in tensor.__tensor_flatten__()[0] for part in stored_parts(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)  # bitsandbytes: the codes, and the scales beside them
    return [tensor] if state is None else [tensor, *(part for part in state.as_dict().values() if isinstance(part, Tensor))]


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes a weight keeps in memory, whatever dtype and shape it shows."""
    return sum(part.numel() * part.element_size() for part in stored_parts(tensor))
