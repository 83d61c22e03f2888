"""The Triton kernels against math attention in float64: by the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import F64, draw, gradients_of, halves, mask_of, math_attention, pair, relative
from torch import Tensor

from diffdistill.models import forward_attention
from diffdistill.models.forward_attention import attention

TOLERANCES = {
    "cuda": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "cpu": {torch.float32: 1e-5, torch.bfloat16: 3e-2},  # the interpreter cuts bf16 off instead of rounding it
}
DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytest.importorskip("triton")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which attention goes to the kernels."""
    if request.param == "cpu":
        monkeypatch.setattr(forward_attention, "uses_triton", lambda q, v: True)
    return request.param


def compare(device: str, dtype: torch.dtype, inputs: tuple[Tensor, ...], moving: str = "qkv", **options: Any) -> None:
    """Compare value, tangent along `moving`, and gradients."""
    rounded = [tensor.to(device, dtype) for tensor in inputs]
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    tolerance = TOLERANCES[device][dtype]

    def results(function: Any, tensors: list[Tensor]) -> list[Tensor]:
        primals, tangents = (dict(zip("qkv", half, strict=True)) for half in halves(tuple(tensors)))

        def moved(*some: Tensor) -> Tensor:
            return function(*(primals | dict(zip(moving, some, strict=True))).values(), **options)

        along = pair(moved, tuple(primals[name] for name in moving), tuple(tangents[name] for name in moving))
        do = torch.ones_like(along[0])
        return [*along, *gradients_of(lambda *x: function(*x, **options), tuple(primals.values()), do)]

    expected = results(math_attention, [tensor.to(F64) for tensor in rounded])
    for actual, wanted in zip(results(attention, rounded), expected, strict=True):
        assert actual.dtype == dtype and actual.device.type == device
        assert relative(actual, wanted) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_self_attention_over_several_blocks(device: str, dtype: torch.dtype):
    compare(device, dtype, draw(1, 2, 70, 70, 32))


@pytest.mark.parametrize(
    ("kind", "dtype", "batch", "heads"),
    [
        ("bool", torch.bfloat16, 2, 1),
        ("text", torch.float32, 2, 1),
        ("bias", torch.float32, 1, 4),
        ("causal", torch.bfloat16, 1, 1),
    ],
)
def test_masks(device: str, kind: str, dtype: torch.dtype, batch: int, heads: int):
    compare(device, dtype, draw(batch, heads, 37, 45, 16), **mask_of(kind, 37, 45))


def test_heads_that_share_keys(device: str):
    compare(device, torch.float32, draw(1, 4, 35, 33, 16, key_heads=2, value_size=24), enable_gqa=True, scale=0.4)


@pytest.mark.parametrize("moving", ["q", "k", "v", "kv"])
def test_what_has_no_tangent_stands_still(device: str, moving: str):
    compare(device, torch.float32, draw(1, 1, 33, 21, 16), moving)


@pytest.mark.parametrize("size", [40, 72, 128, 256])
def test_head_sizes(device: str, size: int):
    compare(device, torch.bfloat16, draw(1, 1, 19, 41, size))


def test_rows_that_see_nothing_give_nothing(device: str):
    primals, tangents = (tuple(tensor.to(device).float() for tensor in half) for half in halves(draw(1, 1, 6, 7, 16)))
    mask = torch.ones(6, 7, dtype=torch.bool, device=device)
    mask[2] = False

    def masked(*inputs: Tensor) -> Tensor:
        return attention(*inputs, attn_mask=mask)

    o, to = pair(masked, primals, tangents)
    dq, dk, dv = gradients_of(masked, primals, torch.ones_like(o))
    assert not any(tensor[:, :, 2].any() for tensor in (o, to, dq))
    assert dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_fifty_and_a_common_motion_of_the_keys(device: str, dtype: torch.dtype):
    """Unless tS is less its mean, products in bf16 round the common motion, which is twenty times what is left of it."""
    q, k, v, tq, tk, tv = draw(1, 1, 32, 96, 64)
    compare(device, dtype, (11 * q, k, v, tq, tk, tv))
    common = 20 * torch.randn(64, dtype=F64, generator=torch.Generator().manual_seed(0))
    compare(device, dtype, (q, k, v, tq, tk + common, tv))


def test_any_layout_of_the_inputs(device: str):
    """Heads between batch and width, as projections leave them; a tangent that lies otherwise; a key expanded over the batch."""
    q, k, v, tq, tk, tv = draw(2, 2, 20, 20, 16)
    q, tk = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, tk))
    v = v.mT.contiguous().mT
    compare(device, torch.float32, (q, k[:1].expand_as(k), v, tq, tk, tv))


def test_kernels_compile_for_gpus():
    """Types, which the interpreter does not look at; and shared memory, of which Hopper has 227 KB and the smallest 99 KB."""
    code = """
import torch, triton_without_gpu
for capability in (80, 90):
    print(*(each.shared for each in triton_without_gpu.compiled(capability, torch.bfloat16, 40, "bool")))
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment).stdout
    for line, most in zip(said.splitlines(), (101376, 232448), strict=True):
        shared = [int(number) for number in line.split()]
        assert len(shared) == 3 and max(shared) <= most


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
def test_four_thousand_tokens_in_linear_memory(dtype: torch.dtype, tolerance: float):
    def measured(length: int) -> tuple[tuple[Tensor, Tensor], int, tuple[Tensor, ...]]:
        inputs = tuple(tensor.to("cuda", dtype) for tensor in draw(1, 4, length, length, 64))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = pair(attention, *halves(inputs))
        return result, torch.cuda.max_memory_allocated() - before, inputs

    _, short, _ = measured(2048)
    result, long, inputs = measured(4096)
    assert long <= 2.01 * short
    expected = pair(math_attention, *halves(tuple(tensor.to(F64) for tensor in inputs)))
    for actual, wanted in zip(result, expected, strict=True):
        assert relative(actual, wanted) < tolerance
