"""Attention with forward mode against math attention in float64: values, tangents and gradients; and memory linear in length."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import F64, draw, gradients_of, halves, mask_of, math_attention, pair, relative
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill.memory import LiveBytes
from diffdistill.models import forward_attention
from diffdistill.models.forward_attention import attention


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_attention, "block_size", lambda device: 16)


SHAPES = {
    "self": {"rows": 37, "keys": 37},
    "cross": {"rows": 40, "keys": 21},
    "more keys": {"rows": 9, "keys": 50},
    "grouped": {"rows": 35, "keys": 33, "key_heads": 2},
    "wide values": {"rows": 18, "keys": 33, "value_size": 24},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["none", "bool", "text", "bias", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_tangents_and_gradients_are_those_of_math_attention(shape: str, kind: str):
    size = SHAPES[shape]
    q, k, v, *tangents = draw(2, 4, **size, size=8)
    options = mask_of(kind, size["rows"], size["keys"]) | {"enable_gqa": "key_heads" in size, "scale": 0.4}

    def ours(*inputs: Tensor) -> Tensor:
        return attention(*inputs, **options)

    def theirs(*inputs: Tensor) -> Tensor:
        return math_attention(*inputs, **options)

    (o, to), (expected, expected_tangent) = (pair(function, (q, k, v), tuple(tangents)) for function in (ours, theirs))
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(to, expected_tangent, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(q, k, v), o, rtol=0, atol=0)
    do = torch.randn(o.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    for actual, wanted in zip(gradients_of(ours, (q, k, v), do), gradients_of(theirs, (q, k, v), do), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [32, 40, 64, 72, 80, 128, 160, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_precision_of_every_head_size(size: int, dtype: torch.dtype, tolerance: float):
    """Of the same inputs, rounded to the dtype: float32 to 1e-6, bf16 to the rounding of its output."""
    inputs = [tensor.to(dtype) for tensor in draw(1, 2, 77, 93, size)]
    actual = pair(attention, tuple(inputs[:3]), tuple(inputs[3:]))
    wide = [tensor.to(F64) for tensor in inputs]
    expected = pair(math_attention, tuple(wide[:3]), tuple(wide[3:]))
    do = torch.ones_like(expected[0])
    actual_gradients = gradients_of(attention, tuple(inputs[:3]), do.to(dtype))
    expected_gradients = gradients_of(math_attention, tuple(wide[:3]), do)
    for got, wanted in zip((*actual, *actual_gradients), (*expected, *expected_gradients), strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_logits_of_fifty(dtype: torch.dtype, tolerance: float):
    q, *others = draw(1, 2, 300, 300, 64)
    q = 11 * q
    assert 40 < float((q @ others[0].mT / 8).abs().max()) < 80
    inputs = [tensor.to(dtype) for tensor in (q, *others)]
    wide = [tensor.to(F64) for tensor in inputs]
    actual, expected = (
        pair(function, tuple(tensors[:3]), tuple(tensors[3:]))
        for function, tensors in ((attention, inputs), (math_attention, wide))
    )
    assert relative(actual[0], expected[0]) < tolerance
    assert relative(actual[1], expected[1]) < tolerance


def test_a_common_motion_of_the_keys_costs_no_digits():
    """It moves all logits of a row alike and the output not at all; math attention has five digits left here."""
    q, k, v, tq, tk, tv = (tensor.float() for tensor in draw(1, 2, 200, 200, 64))
    tk = tk + 100 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    expected = pair(math_attention, *halves(tuple(tensor.to(F64) for tensor in (q, k, v, tq, tk, tv))))[1]
    assert relative(pair(attention, (q, k, v), (tq, tk, tv))[1], expected) < 2e-6
    assert relative(pair(math_attention, (q, k, v), (tq, tk, tv))[1], expected) > 5e-6


def test_tangents_of_logits_are_less_their_mean_over_the_keys():
    q, k, _, *tangents = draw(1, 2, 20, 30, 8)
    tq, tk, _ = tangents
    tiles = forward_attention._Tiles.of(q, k, forward_attention.Options(None, False, 0.3))
    block = forward_attention._TangentTiles.of(tiles, k, forward_attention.Tangents(*tangents))
    ts = 0.3 * (tq @ k.mT + q @ tk.mT)
    actual = block._logits(tiles.q, slice(0, 20), slice(0, 30))
    torch.testing.assert_close(actual.flatten(1, 2), ts - ts.mean(-1, keepdim=True), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("moving", ["q", "k", "v", "qk", "qv", "kv"])
def test_what_has_no_tangent_stands_still(moving: str):
    primals, tangents = (dict(zip("qkv", tensors, strict=True)) for tensors in halves(draw(2, 4, 37, 21, 8)))

    def along(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        def moved(*inputs: Tensor) -> Tensor:
            return function(*(primals | dict(zip(moving, inputs, strict=True))).values())

        return pair(moved, tuple(primals[name] for name in moving), tuple(tangents[name] for name in moving))

    for actual, expected in zip(along(attention), along(math_attention), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("moving", "products"), [("", 2), ("q", 4), ("v", 3), ("qkv", 6)])
def test_one_pass_with_one_exponential_and_no_product_too_many(moving: str, products: int):
    """Self-attention has six products, cross-attention to fixed text four; the exponentials of values and tangents are the same."""
    primals, tangents = halves(draw(1, 2, 20, 20, 8))
    with Operations() as operations, torch.no_grad(), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(primal, tangent) if name in moving else primal
            for name, primal, tangent in zip("qkv", primals, tangents, strict=True)
        ]
        attention(*duals)
    assert operations.counts["bmm"] == products
    assert operations.counts["exp_"] == 2  # of the logits, and of the maximum's growth


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_tangents_are_seen_with_and_without_a_graph(mode: Callable[[], Any]):
    primals, tangents = halves(draw(1, 2, 11, 13, 8))
    with mode():
        actual = torch.func.jvp(attention, primals, tangents)
    torch.testing.assert_close(actual, pair(math_attention, primals, tangents), rtol=0, atol=1e-13)


def test_tangents_of_dual_numbers_are_seen():
    primals, tangents = halves(draw(1, 2, 11, 13, 8))
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(attention(*map(forward_ad.make_dual, primals, tangents)))
    torch.testing.assert_close(tuple(actual), pair(math_attention, primals, tangents), rtol=0, atol=1e-13)


def test_a_zero_tangent_moves_nothing():
    primals, _ = halves(draw(1, 2, 11, 13, 8))
    assert not pair(attention, primals, tuple(map(torch.zeros_like, primals)))[1].any()
    assert not pair(attention, primals, tuple(torch._efficientzerotensor(primal.shape, dtype=F64) for primal in primals))[
        1
    ].any()


@pytest.mark.usefixtures("small_blocks")
def test_gradcheck_forward_and_reverse():
    inputs = tuple(tensor.requires_grad_() for tensor in draw(1, 2, 18, 17, 3)[:3])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, is_causal=True), inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.usefixtures("small_blocks")
def test_the_gradient_through_the_value_of_a_pair_is_the_ordinary_one():
    primals, tangents = halves(draw(1, 2, 20, 21, 8))
    do = torch.randn(1, 2, 20, 8, dtype=F64, generator=torch.Generator().manual_seed(2))
    through_pair = gradients_of(lambda *inputs: torch.func.jvp(attention, inputs, tangents)[0], primals, do)
    for actual, expected in zip(through_pair, gradients_of(math_attention, primals, do), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
def test_tangents_hidden_by_another_transform_follow_the_rule_in_two_passes(kind: str):
    """The value handed out by `func.vjp` within a `func.jvp`: the call sees no tangent, the autograd function's rule does."""
    primals, tangents = halves(draw(2, 4, 37, 37, 8))
    options = mask_of(kind, 37, 37)

    def hidden(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: torch.func.vjp(lambda *x: function(*x, **options), *inputs)[0]

    for actual, expected in zip(
        pair(hidden(attention), primals, tangents), pair(hidden(math_attention), primals, tangents), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    query_alone = (
        pair(lambda q, f=f: hidden(f)(q, *primals[1:]), primals[:1], tangents[:1]) for f in (attention, math_attention)
    )
    torch.testing.assert_close(*query_alone, rtol=0, atol=1e-12)


def test_second_derivatives_fail_and_are_not_silently_zero():
    primals, tangents = halves(draw(1, 1, 5, 5, 4))

    def total(q: Tensor) -> Tensor:
        return attention(q, *primals[1:]).square().sum()

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.jvp(torch.func.grad(total), primals[:1], tangents[:1])
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradients_of(lambda *inputs: torch.func.jvp(attention, inputs, tangents)[1], primals, torch.ones_like(primals[0]))
    leaf = primals[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


def test_rows_that_see_nothing_give_nothing():
    primals, tangents = halves(draw(1, 2, 6, 7, 4))
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2] = False
    for options in ({"attn_mask": mask}, {"attn_mask": torch.zeros(6, 7).masked_fill(~mask, -math.inf)}):
        o, to = pair(lambda *x, options=options: attention(*x, **options), primals, tangents)
        assert not o[:, :, 2].any() and not to[:, :, 2].any()
        dq, dk, dv = gradients_of(lambda *x, options=options: attention(*x, **options), primals, torch.ones_like(o))
        assert not dq[:, :, 2].any() and all(gradient.isfinite().all() for gradient in (dq, dk, dv))


def test_autocast_has_inputs_rounded_and_arithmetic_wide():
    inputs = [tensor.float() for tensor in draw(1, 2, 40, 40, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = pair(attention, tuple(inputs[:3]), tuple(inputs[3:]))
    rounded = [tensor.bfloat16() for tensor in inputs]
    expected = pair(attention, tuple(rounded[:3]), tuple(rounded[3:]))
    torch.testing.assert_close(under_autocast, expected, rtol=0, atol=0)


def peak(function: Callable[..., Any], length: int, backward: bool = False) -> int:
    """Return the bytes alive at once beyond the inputs."""
    primals, tangents = halves(draw(1, 1, length, length, 16))
    with LiveBytes() as live:
        if backward:
            gradients_of(function, primals, torch.ones_like(primals[0]))
        else:
            pair(function, primals, tangents)
    return live.peak


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch, backward: bool):
    monkeypatch.setattr(forward_attention, "block_size", lambda device: 128)
    short, long = (peak(attention, length, backward) for length in (512, 1024))
    assert long < 2 * short
    if not backward:  # the inside of math attention's own backward is not seen
        assert peak(math_attention, 1024) > 3.5 * peak(math_attention, 512) > 10 * short


Q, K, V = draw(1, 2, 5, 7, 4)[:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 0.1}, "drops no attention weights"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.bool), "is_causal": True}, "not both"),
        ({"attn_mask": torch.zeros(5, 7, requires_grad=True)}, "as a constant"),
        ({"key": K.float()}, "one dtype"),
        ({"key": K[:, :1], "value": V[:, :1]}, "enable_gqa"),
        ({"value": V[:, :, :-1]}, "Hk, Lk, Dv"),
        ({"query": Q[0]}, "takes query"),
        ({"query": Q[..., :-1]}, "takes query"),
        ({"query": Q.expand(2, -1, -1, -1)}, "takes query"),
        ({"query": Q[:, :1].expand(-1, 3, -1, -1), "enable_gqa": True}, "a multiple of it"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attention(**({"query": Q, "key": K, "value": V} | change))


def test_a_mask_that_moves_is_refused():
    mask = torch.zeros(5, 7, dtype=F64)
    with pytest.raises(ValueError, match="as a constant"):
        torch.func.jvp(lambda mask: attention(Q, K, V, mask), (mask,), (torch.ones_like(mask),))


@pytest.mark.parametrize(
    ("capability", "dtype", "longest"),
    [
        ((7, 5), torch.float16, 0),
        ((8, 0), torch.bfloat16, 256),
        ((8, 9), torch.float32, 64),
        ((9, 0), torch.float32, 128),
        ((10, 0), torch.float32, 128),
        ((12, 0), torch.float32, 64),
        ((9, 0), torch.bfloat16, 256),
        ((9, 0), torch.float64, 0),
    ],
)
def test_triton_is_used_for_heads_that_fit_into_the_registers_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, longest: int
):
    def on(device: str, size: int) -> Any:
        """Return what is asked of a tensor; no GPU is needed to ask it."""
        itemsize = torch.empty(0, dtype=dtype).element_size
        return SimpleNamespace(
            is_cuda=device == "cuda", dtype=dtype, shape=(1, 2, 5, size), device=device, element_size=itemsize
        )

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton")
    for size in (64, 65, 128, 129, 256, 257):
        assert forward_attention.uses_triton(on("cuda", size), on("cuda", 64)) == (size <= longest)
        assert forward_attention.uses_triton(on("cuda", 64), on("cuda", size)) == (size <= longest)
    assert not forward_attention.uses_triton(on("cpu", 64), on("cpu", 64))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not forward_attention.uses_triton(on("cuda", 64), on("cuda", 64))
