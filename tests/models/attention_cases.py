"""Inputs of attention, math attention as the reference, and how both are differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

F64 = torch.float64


def draw(batch: int, heads: int, rows: int, keys: int, size: int, key_heads: int | None = None, value_size: int | None = None):
    """Return q, k, v and their tangents, float64, with values that float32 has."""
    generator = torch.Generator().manual_seed(rows + keys + size)
    key_heads = key_heads or heads
    shapes = [(batch, heads, rows, size), (batch, key_heads, keys, size), (batch, key_heads, keys, value_size or size)]
    return tuple(torch.randn(shape, generator=generator).to(F64) for shape in shapes * 2)


def mask_of(kind: str, rows: int, keys: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if kind == "bool":
        mask = torch.rand(2, 1, rows, keys, generator=generator) > 0.3
        mask[:, :, 3] = False  # a row that sees nothing
        return {"attn_mask": mask}
    if kind == "text":  # which tokens of a prompt there are, as diffusers hands it on
        return {"attn_mask": torch.where(torch.arange(keys) < keys - 4, 0.0, -10000.0).expand(2, 1, 1, keys)}
    if kind == "bias":
        bias = torch.randn(4, rows, keys, generator=generator)
        return {"attn_mask": bias.masked_fill(bias > 1, -math.inf)}
    return {"is_causal": True} if kind == "causal" else {}


def math_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(q.dtype)}
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v, **options)


def pair(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return torch.func.jvp(function, primals, tangents)


def gradients_of(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], do: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, do)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.to(F64) - expected.to(F64)).norm() / expected.to(F64).norm())


def halves(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return primals and tangents."""
    return tensors[:3], tensors[3:]
