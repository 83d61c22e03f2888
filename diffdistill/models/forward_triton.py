"""Triton kernels of `forward_attention`: value and tangent in one pass, and the backward pass of the value.

One program has a block of rows of one head and meets the keys block by block; the derivation, with its letters, is in
`forward_attention`. Logits are in units of log 2, so that exponentials are `exp2`; their tangents are not. Products take their
operands in the dtype of the inputs and sum in float32; m, l, r, O and T are float32. Two measures keep the digits of the tangent in bf16.
tS is less its mean over the keys, scale (tq . mean(k) + q . mean(tk)), or a common motion of the keys, as from the time, would be rounded
before it cancels. And H = P * tS is rounded once, after its product, and r sums what was rounded, so that what all values have in common
cancels in T / l - (r / l) o. float32 inputs are multiplied as three TF32 products, which keeps their precision on tensor cores, or as
one where `torch.backends.cuda.matmul.allow_tf32` says so.

Backward is two kernels, one for dq over blocks of rows and one for dk and dv over blocks of keys, rather than PyTorch's own flash
and memory-efficient ones: those take (o, L) too, but the first no float32 and no mask, both no head of 72 without padded copies, and
neither runs on the CPU, where these are tested by Triton's interpreter (TRITON_INTERPRET=1).

Head sizes that are not powers of two are padded inside the program; nothing is copied.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffdistill.models.forward_attention import LARGE_GPUS, Attended, Options, Tangents

LOG2E = tl.constexpr(math.log2(math.e))


class Launch(NamedTuple):
    """How a kernel is cut and run: rows and keys of a block, warps of a program, blocks of keys in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """How the kernel of values and tangents runs, and those of gradients."""

    forward: Launch
    backward: Launch


LAUNCHES: dict[tuple[bool, int, int], Launches] = {
    (True, 2, 64): Launches(Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)),
    (True, 2, 128): Launches(Launch(128, 32, 8, 2), Launch(64, 64, 8, 2)),
    (True, 2, 256): Launches(Launch(64, 32, 8, 1), Launch(32, 64, 8, 1)),
    (True, 4, 64): Launches(Launch(64, 16, 4, 1), Launch(32, 64, 8, 1)),
    (True, 4, 128): Launches(Launch(64, 16, 8, 1), Launch(32, 32, 8, 1)),
    (False, 2, 64): Launches(Launch(64, 32, 4, 2), Launch(32, 64, 4, 2)),
    (False, 2, 128): Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2)),
    (False, 2, 256): Launches(Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    (False, 4, 64): Launches(Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)),
}
"""By whether the GPU is one of `LARGE_GPUS`, bytes of an element and padded head size: the largest blocks that the assembler for
compute capability 9.0 and 8.0 keeps in registers, or nearly so, and that fit the shared memory, 99 KB elsewhere.
`eval/bench_forward_attention.py --gpu --tune` times others."""


@triton.jit
def _block(pointer, stride, rows, columns, length, width):
    """Load rows x columns of a matrix whose last stride is 1; 0 outside."""
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Return the product of a and b, a rounded to the dtype of b, summed in float32."""
    a = a.to(b.dtype)
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of bf16 as integers
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def _logits(
    q, k, rows, keys, num_rows, num_keys, mask, mask_row, mask_key, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return S of a block over log 2, -inf where masked."""
    s = _dot(q, tl.trans(k), PRECISION) * (scale * LOG2E)
    seen = (keys < num_keys)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    if MASK != "none":
        place = mask + rows[:, None].to(tl.int64) * mask_row + keys[None, :] * mask_key
        inside = (rows < num_rows)[:, None] & (keys < num_keys)[None, :]
        value = tl.load(place, mask=inside, other=0)
        if MASK == "bool":
            seen = seen & (value != 0)
        else:
            s += value.to(tl.float32) * LOG2E
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, tq_ptr, tk_ptr, tv_ptr, k_mean_ptr, tk_mean_ptr, mask_ptr, o_ptr, to_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    mask_batch, mask_head, mask_row, mask_key, heads, group, num_rows, num_keys, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Values, tangents and L of one block of rows of one head. Tangents lie as their primals do."""
    HAS_TS: tl.constexpr = HAS_TQ or HAS_TK
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, columns_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_q = batch * q_batch + head * q_head
    of_k = batch * k_batch + (head // group) * k_head
    of_v = batch * v_batch + (head // group) * v_head
    of_o = batch * o_batch + head * o_head
    if MASK != "none":
        mask_ptr += batch * mask_batch + head * mask_head

    q = _block(q_ptr + of_q, q_row, rows, columns, num_rows, D)
    mean = tl.zeros([ROWS], tl.float32)  # of tS over the keys, before scale
    of_mean = (batch * (heads // group) + head // group) * D + columns
    if HAS_TQ:
        tq = _block(tq_ptr + of_q, q_row, rows, columns, num_rows, D)
        mean += tl.sum(tq.to(tl.float32) * tl.load(k_mean_ptr + of_mean, mask=columns < D, other=0.0)[None, :], 1)
    if HAS_TK:
        mean += tl.sum(q.to(tl.float32) * tl.load(tk_mean_ptr + of_mean, mask=columns < D, other=0.0)[None, :], 1)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, WIDTH_V], tl.float32)
    change = tl.zeros([ROWS, WIDTH_V], tl.float32)
    stop = num_keys
    if CAUSAL:
        stop = min(num_keys, (tl.program_id(0) + 1) * ROWS)
    for start in range(0, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _block(k_ptr + of_k, k_row, keys, columns, num_keys, D)
        s = _logits(q, k, rows, keys, num_rows, num_keys, mask_ptr, mask_row, mask_key, scale, MASK, CAUSAL, PRECISION)
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)  # rows that have seen no key yet
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(m - shift)
        m = top
        l = l * shrink + tl.sum(p, 1)
        v = _block(v_ptr + of_v, v_row, keys, columns_v, num_keys, DV)
        value = value * shrink[:, None] + _dot(p, v, PRECISION)
        if HAS_TS or HAS_TV:
            change = change * shrink[:, None]
        if HAS_TV:
            change += _dot(p, _block(tv_ptr + of_v, v_row, keys, columns_v, num_keys, DV), PRECISION)
        if HAS_TS:
            ts = tl.zeros([ROWS, KEYS], tl.float32)
            if HAS_TQ:
                ts += _dot(tq, tl.trans(k), PRECISION)
            if HAS_TK:
                ts += _dot(q, tl.trans(_block(tk_ptr + of_k, k_row, keys, columns, num_keys, D)), PRECISION)
            h = (p * (ts - mean[:, None])).to(v.dtype)
            r = r * shrink + tl.sum(h.to(tl.float32), 1)  # as rounded, so that what all values share cancels
            change += _dot(h, v, PRECISION) * scale
    l = tl.where(l == 0.0, 1.0, l)
    value = value / l[:, None]
    inside = (rows < num_rows)[:, None] & (columns_v < DV)[None, :]
    place = of_o + rows[:, None].to(tl.int64) * o_row + columns_v[None, :]
    tl.store(o_ptr + place, value.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * num_rows + rows, (m + tl.log2(l)) / LOG2E, mask=rows < num_rows)
    if HAS_TS or HAS_TV:
        change = change / l[:, None]
        if HAS_TS:
            change -= (scale * r / l)[:, None] * value
        tl.store(to_ptr + place, change.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(
    q, k, rows, keys, num_rows, num_keys, mask, mask_row, mask_key, lse, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return P of a block, e^(S - L); lse: L of the rows, +inf where there is nothing."""
    s = _logits(q, k, rows, keys, num_rows, num_keys, mask, mask_row, mask_key, scale, MASK, CAUSAL, PRECISION)
    return tl.exp2(s - lse[:, None] * LOG2E)


@triton.jit
def _gradient_of_rows_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    mask_batch, mask_head, mask_row, mask_key, heads, group, num_rows, num_keys, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows of one head; it lies as q does."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns, columns_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_q = batch * q_batch + head * q_head
    of_k = batch * k_batch + (head // group) * k_head
    of_v = batch * v_batch + (head // group) * v_head
    if MASK != "none":
        mask_ptr += batch * mask_batch + head * mask_head
    q = _block(q_ptr + of_q, q_row, rows, columns, num_rows, D)
    do = _block(do_ptr + batch * o_batch + head * o_head, o_row, rows, columns_v, num_rows, DV)
    of_row = tl.program_id(1).to(tl.int64) * num_rows + rows
    lse = tl.load(lse_ptr + of_row, mask=rows < num_rows, other=float("inf"))
    delta = tl.load(delta_ptr + of_row, mask=rows < num_rows, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    stop = num_keys
    if CAUSAL:
        stop = min(num_keys, (tl.program_id(0) + 1) * ROWS)
    for start in range(0, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _block(k_ptr + of_k, k_row, keys, columns, num_keys, D)
        p = _weights(
            q, k, rows, keys, num_rows, num_keys, mask_ptr, mask_row, mask_key, lse, scale, MASK, CAUSAL, PRECISION
        )  # fmt: skip
        dp = _dot(do, tl.trans(_block(v_ptr + of_v, v_row, keys, columns_v, num_keys, DV)), PRECISION)
        dq += _dot(p * (dp - delta[:, None]), k, PRECISION)
    place = of_q + rows[:, None].to(tl.int64) * q_row + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    tl.store(dq_ptr + place, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    mask_batch, mask_head, mask_row, mask_key, heads, group, num_rows, num_keys, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one head of k, summed over the heads of q that share it; they lie as k and v do."""
    groups = heads // group
    batch, key_head = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    columns, columns_v = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_k = batch * k_batch + key_head * k_head
    of_v = batch * v_batch + key_head * v_head
    k = _block(k_ptr + of_k, k_row, keys, columns, num_keys, D)
    v = _block(v_ptr + of_v, v_row, keys, columns_v, num_keys, DV)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH_V], tl.float32)
    first = 0
    if CAUSAL:
        first = (tl.program_id(0) * KEYS) // ROWS * ROWS
    for member in range(group):
        head = key_head * group + member
        of_q = batch * q_batch + head * q_head
        of_o = batch * o_batch + head * o_head
        of_row = (batch * heads + head) * num_rows
        mask = mask_ptr
        if MASK != "none":
            mask = mask_ptr + batch * mask_batch + head * mask_head
        for start in range(first, num_rows, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = _block(q_ptr + of_q, q_row, rows, columns, num_rows, D)
            do = _block(do_ptr + of_o, o_row, rows, columns_v, num_rows, DV)
            lse = tl.load(lse_ptr + of_row + rows, mask=rows < num_rows, other=float("inf"))
            delta = tl.load(delta_ptr + of_row + rows, mask=rows < num_rows, other=0.0)
            p = _weights(
                q, k, rows, keys, num_rows, num_keys, mask, mask_row, mask_key, lse, scale, MASK, CAUSAL, PRECISION
            )  # fmt: skip
            dv += _dot(tl.trans(p), do, PRECISION)
            dp = _dot(do, tl.trans(v), PRECISION)
            dk += _dot(tl.trans(p * (dp - delta[:, None])), q, PRECISION)
    place = of_k + keys[:, None].to(tl.int64) * k_row + columns[None, :]
    tl.store(dk_ptr + place, (dk * scale).to(dk_ptr.dtype.element_ty), mask=(keys < num_keys)[:, None] & (columns < D)[None, :])
    place = of_v + keys[:, None].to(tl.int64) * v_row + columns_v[None, :]
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=(keys < num_keys)[:, None] & (columns_v < DV)[None, :])


# From Python ------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, options: Options) -> Attended:
    """Return values, their tangent and the logs of the sums in one pass; see `forward_attention.attend`."""
    q, k, v = (_packed(tensor) for tensor in (q, k, v))
    tq, tk, tv = (None if t is None else _lying_as(t, primal) for t, primal in zip(tangents, (q, k, v), strict=True))
    o = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)  # as a projection reads it
    to = torch.empty_like(o) if tangents else None
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    k_mean, tk_mean = (None if t is None else t.mean(2, dtype=torch.float32) for t in (None if tq is None else k, tk))
    launch = launches(q, v).forward
    _attend_kernel[triton.cdiv(q.shape[2], launch.rows), q.shape[0] * q.shape[1]](
        *(q, k, v, tq, tk, tv, k_mean, tk_mean, options.mask, o, to, lse),
        *_sizes(q, k, v, o, options),
        HAS_TQ=tq is not None,
        HAS_TK=tk is not None,
        HAS_TV=tv is not None,
        **_constants(q, v, options, launch),
    )
    return Attended(o, to, lse)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, options: Options, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv from the gradient of o; see `forward_attention.gradients`."""
    q, k, v, o = (_packed(tensor) for tensor in (q, k, v, o))
    do = _lying_as(do, o)
    delta = (do.float() * o.float()).sum(-1)
    lse = lse.masked_fill(lse.isneginf(), math.inf)
    dq, dk, dv = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (q, k, v))
    launch = launches(q, v).backward
    inputs, sizes = (q, k, v, do, options.mask, lse, delta), _sizes(q, k, v, o, options)
    constants = _constants(q, v, options, launch)
    _gradient_of_rows_kernel[triton.cdiv(q.shape[2], launch.rows), q.shape[0] * q.shape[1]](*inputs, dq, *sizes, **constants)
    _gradient_of_keys_kernel[triton.cdiv(k.shape[2], launch.keys), k.shape[0] * k.shape[1]](
        *inputs, dk, dv, *sizes, **constants
    )
    return dq, dk, dv


def launches(q: Tensor, v: Tensor) -> Launches:
    """Return how the kernels run for these inputs."""
    if not q.is_cuda:
        return Launches(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1))  # of the interpreter
    large = torch.cuda.get_device_capability(q.device)[0] in LARGE_GPUS
    return LAUNCHES[large, q.element_size(), max(64, _padded(q.shape[-1]), _padded(v.shape[-1]))]


def _sizes(q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> tuple[Any, ...]:
    """Return the strides, lengths and the scale that all kernels take."""
    mask = (0,) * 4 if options.mask is None else options.mask.stride()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *mask)
    return *strides, q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], options.scale


def _constants(q: Tensor, v: Tensor, options: Options, launch: Launch) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    mask = options.mask
    return {
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "WIDTH": _padded(q.shape[-1]),
        "WIDTH_V": _padded(v.shape[-1]),
        "MASK": "none" if mask is None else "bool" if mask.dtype == torch.bool else "bias",
        "CAUSAL": options.causal,
        "PRECISION": _precision(),
        "ROWS": launch.rows,
        "KEYS": launch.keys,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _precision() -> str:
    if not isinstance(_attend_kernel, triton.JITFunction):
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _packed(tensor: Tensor) -> Tensor:
    """Return the tensor, copied only where its last stride is not 1 or elements overlap."""
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if overlaps or tensor.stride(-1) != 1 else tensor


def _lying_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the tensor with the strides of another one of its shape."""
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    if all(size == 1 or mine == theirs for size, mine, theirs in strides):
        return tensor
    return torch.empty_strided(other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
