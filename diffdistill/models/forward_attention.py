"""Scaled dot product attention with forward-mode derivatives, value and tangent in one pass, in memory linear in length.

Per head, with S = scale q k^T + mask, P = softmax(S), o = P v and tS = scale (tq k^T + q tk^T), the tangent of o is

    to = (P * tS) v + P tv - rowsum(P * tS) o                                      (* elementwise)

A constant added to a row of tS changes nothing, so tS is taken less its mean over the keys: where all keys move alike, as they do with
the time, the first and the last term would cancel. Blocks of rows meet blocks of keys one after another; each row keeps its
maximum m, the sums l of e^(S - m) and r of H = e^(S - m) tS, and the accumulators O and T, which are rescaled as m grows:

    o = O / l,   to = T / l - (r / l) o,   L = m + log l                           (O = sum e^(S - m) v, T = sum H v + e^(S - m) tv)

Terms of a tangent that is not there are not computed: in cross-attention to fixed text, those of tk and tv.

How the tangents come in. `torch.func.jvp` calls a `torch.autograd.Function` on the values first and its `jvp` rule afterwards,
which makes the logits and their exponentials a second time: 7 products of L x L x D where the single pass has 6. So `attention` itself
asks whether its inputs carry tangents, takes them off, computes the pair at once and joins it again. Measured on the CPU (docs/forward_attention.md),
the single pass is the faster one. The rule is there for tangents that cannot be seen at the call, because
another transform lies between, as in `jvp` of `grad`.

Backward passes are the ordinary ones of flash attention, from q, k, v, o and L. They do not reach through a tangent: losses that need
this (Lagrangian and Eulerian distillation) use PyTorch's math attention; here it is refused.

Dropout of attention weights is refused too. A step's passes must drop the same entries, and the networks of diffusers have none
there; dropout elsewhere is repeated by `math.jvp`, which starts each pass from the same random state.

Sources: FlashAttention-2 (arXiv:2307.08691); tangents in one pass: sCM (arXiv:2410.11081), Appendix F.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


def block_size(device: torch.device) -> int:
    """Return the rows, and the keys, of a tile: what stays in a cache, or is worth starting kernels for."""
    return 256 if device.type == "cpu" else 1024


class Tangents(NamedTuple):
    """Tangents of q, k and v; None where there is none."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return any(tangent is not None for tangent in self)


class Options(NamedTuple):
    """What an attention is told besides q, k and v.

    Attributes:
        mask: (B, H, Lq, Lk), expanded; bool (true takes part) or floating (added to the logits); None for no mask.
        causal: whether row i sees keys 0..i only.
        scale: of the logits.
    """

    mask: Tensor | None
    causal: bool
    scale: float


class Attended(NamedTuple):
    """Attention's results.

    Attributes:
        o: values, (B, H, Lq, Dv), dtype of q; 0 in rows whose keys are all masked.
        to: their tangent, like o; None where no input has one.
        lse: log of the sum of the exponentials of each row's logits, (B, H, Lq), float32 or wider; -inf in rows all masked.
    """

    o: Tensor
    to: Tensor | None
    lse: Tensor


# The call ----------------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(scale q k^T + mask) v, with its tangent if an input has one: `F.scaled_dot_product_attention` by signature.

    Args:
        query: (B, H, Lq, D); its tangent and those of key and value are found by themselves, under `func.jvp` and `dual_level`.
        key: (B, Hk, Lk, D).
        value: (B, Hk, Lk, Dv).
        attn_mask: broadcasts to (B, H, Lq, Lk); bool, true takes part, or floating, added to the logits. A constant.
        dropout_p: must be 0.
        is_causal: whether row i sees keys 0..i only; not together with a mask.
        scale: of the logits, 1/sqrt(D) by default.
        enable_gqa: whether H may be a multiple of Hk, head h using keys h // (H / Hk).
    Returns:
        (B, H, Lq, Dv), dtype of the query.
    Raises:
        ValueError: dropout, a mask with a derivative, or shapes that do not fit.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    options = Options(mask, is_causal, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    (q, tq), (k, tk), (v, tv) = (_unpack(tensor) for tensor in (query, key, value))
    with torch.autocast(q.device.type, enabled=False):
        o, to, _ = _Attention.apply(q, k, v, tq, tk, tv, *options)
    return o if to is None else forward_ad.make_dual(o, to)


def _unpack(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def _autocast(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype in which autocast would have attention computed."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool) -> None:
    if dropout_p:
        raise ValueError(f"forward-mode attention drops no attention weights; got dropout_p={dropout_p}. Set it to 0.")
    if mask is not None and is_causal:
        raise ValueError("attention takes a mask or is_causal, not both; put the causal part into the mask.")
    if mask is not None and (mask.requires_grad or forward_ad.unpack_dual(mask).tangent is not None):
        raise ValueError(
            "forward-mode attention takes a mask as a constant; this one has a derivative. Use the math backend of SDPA."
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"query, key and value must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    four = q.ndim == k.ndim == v.ndim == 4
    heads_fit = four and (q.shape[1] == k.shape[1] or (enable_gqa and q.shape[1] % k.shape[1] == 0))
    if not heads_fit or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "attention takes query (B, H, Lq, D), key (B, Hk, Lk, D) and value (B, Hk, Lk, Dv), H = Hk, or with enable_gqa a "
            f"multiple of it; got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )


def uses_triton(q: Tensor, v: Tensor) -> bool:
    """Return whether the Triton kernels compute this, and not plain PyTorch.

    They do on CUDA from compute capability 8, in float32 and narrower, for heads that fit into registers: up to 256 in 16 bits; in
    float32 up to 128 on Hopper and data-centre Blackwell, up to 64 elsewhere.
    """
    if not q.is_cuda or q.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return False
    major = torch.cuda.get_device_capability(q.device)[0]
    longest = 256 if q.element_size() == 2 else 128 if major in LARGE_GPUS else 64
    return major >= 8 and max(q.shape[-1], v.shape[-1]) <= longest


LARGE_GPUS = (9, 10)
"""Major compute capabilities with 228 KB of shared memory, whose tensor cores read it: Hopper and data-centre Blackwell."""


_NO_SECOND = (
    "forward-mode attention has first derivatives only: no gradient or tangent goes through one of its tangents or gradients. "
    "Use SDPA's math backend, torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)


class _Attention(torch.autograd.Function):
    """The pair in one pass, with rules for backward and, for tangents that were not seen at the call, for forward mode."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tangents, options = Tangents(tq, tk, tv), Options(mask, causal, scale)
        if uses_triton(q, v):
            from diffdistill.models import forward_triton

            return forward_triton.attend(q, k, v, tangents, options)
        return attend(q, k, v, tangents, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor]) -> None:
        q, k, v, *_, mask, ctx.causal, ctx.scale = inputs
        o, to, lse = output
        ctx.is_pair = to is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, mask, o, lse)
        ctx.save_for_forward(q, k, v, mask, o, lse)

    @staticmethod
    def jvp(
        ctx: Any, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, *others: Any
    ) -> tuple[Tensor | None, None, None]:
        if ctx.is_pair:
            raise NotImplementedError(_NO_SECOND)
        q, k, v, mask, o, lse = ctx.saved_tensors
        return tangent(q, k, v, Tangents(tq, tk, tv), Options(mask, ctx.causal, ctx.scale), o, lse), None, None

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dto: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dto is not None:
            raise NotImplementedError(_NO_SECOND)
        if do is None:
            return (None,) * 9
        q, k, v, mask, o, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            return *_Gradients.apply(q, k, v, mask, ctx.causal, ctx.scale, o, lse, do), *(None,) * 6


class _Gradients(torch.autograd.Function):
    """The backward pass, as a function of its own that has no derivative: another one over it fails, and is not silently zero."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, o: Tensor, lse: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = Options(mask, causal, scale)
        if uses_triton(q, v):
            from diffdistill.models import forward_triton

            return forward_triton.gradients(q, k, v, options, o, lse, do)
        return gradients(q, k, v, options, o, lse, do)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_SECOND)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(_NO_SECOND)


# In tiles, by plain PyTorch -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """The logits of an attention, block by block, never all of them.

    Attributes:
        q: (B, Hk, G, Lq, D): the G heads that share keys lie side by side; as wide as `wide`.
        k: (B, Hk, 1, Lk, D).
        options: mask (B, Hk, G, Lq, Lk).
        wide: dtype of all arithmetic, float32 or float64.
    """

    q: Tensor
    k: Tensor
    options: Options
    wide: torch.dtype

    @staticmethod
    def of(q: Tensor, k: Tensor, options: Options) -> _Tiles:
        """Return the tiles of q (B, H, Lq, D) and k (B, Hk, Lk, D)."""
        mask = None if options.mask is None else _grouped(options.mask, k)
        return _Tiles(_grouped(q, k), k.unsqueeze(2), options._replace(mask=mask), torch.promote_types(torch.float32, q.dtype))

    def rows(self) -> Iterator[slice]:
        """Return the blocks of rows."""
        return self._blocks(self.q.shape[-2])

    def keys(self, rows: slice) -> Iterator[slice]:
        """Return the blocks of keys that some of these rows see."""
        length = self.k.shape[-2]
        return self._blocks(min(length, rows.stop) if self.options.causal else length)

    def _blocks(self, length: int) -> Iterator[slice]:
        size = block_size(self.q.device)
        return (slice(start, min(start + size, length)) for start in range(0, length, size))

    def take(self, tensor: Tensor, block: slice) -> Tensor:
        """Return a block of a tensor (..., L, D), wide."""
        return tensor[..., block, :].to(self.wide)

    def logits(self, q: Tensor, rows: slice, keys: slice) -> Tensor:
        """Return S of a block, -inf where masked; q is the block of rows already taken."""
        mask, causal, scale = self.options
        s = (scale * q) @ self.take(self.k, keys).mT
        if causal and keys.stop > rows.start + 1:
            row, key = (torch.arange(block.start, block.stop, device=s.device) for block in (rows, keys))
            return s.masked_fill_(key > row[:, None], -math.inf)
        if mask is None:
            return s
        mask = mask[..., rows, keys]
        return s.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else s.add_(mask)


@dataclass(frozen=True)
class _TangentTiles:
    """The tangent of the logits block by block, less its mean over all keys, a constant in each row.

    Attributes:
        tiles: those of the logits.
        tq, tk, tv: shaped as in the tiles; None where there is none.
        k_mean, tk_mean: means over the keys, (B, Hk, 1, 1, D).
    """

    tiles: _Tiles
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    k_mean: Tensor
    tk_mean: Tensor | None

    @staticmethod
    def of(tiles: _Tiles, k: Tensor, tangents: Tangents) -> _TangentTiles:
        """Return the tiles of tangents shaped as q, k and v."""
        tq, tk, tv = tangents
        return _TangentTiles(
            tiles,
            None if tq is None else _grouped(tq, k),
            None if tk is None else tk.unsqueeze(2),
            None if tv is None else tv.unsqueeze(2),
            _mean(tiles.k, tiles.wide),
            None if tk is None else _mean(tk.unsqueeze(2), tiles.wide),
        )

    def sums(self, p: Tensor, q: Tensor, v: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Return what a block adds to r and T: the row sums of H = p * tS, and H v + p tv. q, v: the blocks already taken."""
        ts = self._logits(q, rows, keys)
        tv = None if self.tv is None else p @ self.tiles.take(self.tv, keys)
        if ts is None:
            return p.new_zeros(()), p.new_zeros(()) if tv is None else tv
        h = ts.mul_(p)
        return h.sum(-1, keepdim=True), h @ v if tv is None else (h @ v).add_(tv)

    def _logits(self, q: Tensor, rows: slice, keys: slice) -> Tensor | None:
        """Return tS of a block; None where neither q nor k has a tangent. q: the block of rows already taken."""
        take, scale = self.tiles.take, self.tiles.options.scale
        ts = None
        if self.tq is not None:
            ts = (scale * take(self.tq, rows)) @ (take(self.tiles.k, keys) - self.k_mean).mT
        if self.tk is not None and self.tk_mean is not None:
            of_keys = (scale * q) @ (take(self.tk, keys) - self.tk_mean).mT
            ts = of_keys if ts is None else ts.add_(of_keys)
        return ts


def attend(q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, options: Options) -> Attended:
    """Return values, their tangent and the logs of the sums, in one pass over the tiles."""
    tiles = _Tiles.of(q, k, options)
    directions = _TangentTiles.of(tiles, k, tangents) if tangents else None
    v = v.unsqueeze(2)
    o = q.new_empty(*tiles.q.shape[:-1], v.shape[-1])
    to = None if directions is None else torch.empty_like(o)
    lse = q.new_empty(o.shape[:-1], dtype=tiles.wide)
    for rows in tiles.rows():
        q_rows = tiles.take(tiles.q, rows)
        m = q_rows.new_full((*q_rows.shape[:-1], 1), -math.inf)
        l = r = m.new_zeros(())
        value = change = m.new_zeros(())
        for keys in tiles.keys(rows):
            s = tiles.logits(q_rows, rows, keys)
            top = torch.maximum(m, s.amax(-1, keepdim=True))
            shift = top.masked_fill(top.isneginf(), 0)  # rows that have seen no key yet
            p, shrink = s.sub_(shift).exp_(), (m - shift).exp_()
            m = top
            v_keys = tiles.take(v, keys)
            l = shrink * l + p.sum(-1, keepdim=True)
            value = shrink * value + p @ v_keys
            if directions is not None:
                of_row, of_value = directions.sums(p, q_rows, v_keys, rows, keys)
                r, change = shrink * r + of_row, shrink * change + of_value
        l = l.masked_fill(l == 0, 1)
        o_rows = value / l
        o[..., rows, :] = o_rows
        lse[..., rows] = (m + l.log()).squeeze(-1)
        if to is not None:
            to[..., rows, :] = (change - r * o_rows) / l
    return Attended(o.flatten(1, 2), None if to is None else to.flatten(1, 2), lse.flatten(1, 2))


def tangent(q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, options: Options, o: Tensor, lse: Tensor) -> Tensor:
    """Return the tangent of o where o and L are there: P = e^(S - L) needs no running maximum, and P v is not made again."""
    tiles = _Tiles.of(q, k, options)
    directions = _TangentTiles.of(tiles, k, tangents)
    v, o, lse = v.unsqueeze(2), _grouped(o, k), _finite(_grouped(lse, k))
    to = torch.empty_like(o)
    for rows in tiles.rows():
        q_rows = tiles.take(tiles.q, rows)
        r = change = q_rows.new_zeros(())
        for keys in tiles.keys(rows):
            p = tiles.logits(q_rows, rows, keys).sub_(lse[..., rows, None]).exp_()
            of_row, of_value = directions.sums(p, q_rows, tiles.take(v, keys), rows, keys)
            r, change = r + of_row, change + of_value
        to[..., rows, :] = change - r * tiles.take(o, rows)
    return to.flatten(1, 2)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, options: Options, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv from the gradient of o: with dP = do v^T and dS = P * (dP - rowsum(do * o)),

    dq = scale dS k, dk = scale dS^T q, dv = P^T do. Source: FlashAttention-2 (arXiv:2307.08691), Algorithm 2.
    """
    tiles = _Tiles.of(q, k, options)
    v, o, do, lse = v.unsqueeze(2), _grouped(o, k), _grouped(do, k), _finite(_grouped(lse, k))
    dq = torch.empty_like(tiles.q)
    dk, dv = (torch.zeros_like(tensor, dtype=tiles.wide) for tensor in (tiles.k, v))
    for rows in tiles.rows():
        q_rows, do_rows = (tiles.take(tensor, rows) for tensor in (tiles.q, do))
        delta = (do_rows * tiles.take(o, rows)).sum(-1, keepdim=True)
        dq_rows = torch.zeros_like(q_rows)
        for keys in tiles.keys(rows):
            p = tiles.logits(q_rows, rows, keys).sub_(lse[..., rows, None]).exp_()
            dv[..., keys, :] += (p.mT @ do_rows).sum(2, keepdim=True)
            ds = (do_rows @ tiles.take(v, keys).mT).sub_(delta).mul_(p).mul_(options.scale)
            dq_rows += ds @ tiles.take(tiles.k, keys)
            dk[..., keys, :] += (ds.mT @ q_rows).sum(2, keepdim=True)
        dq[..., rows, :] = dq_rows
    return dq.flatten(1, 2), dk.squeeze(2).to(k.dtype), dv.squeeze(2).to(v.dtype)


def _grouped(tensor: Tensor, k: Tensor) -> Tensor:
    """Return (B, H, ...) as (B, Hk, G, ...): the heads that share a head of k side by side."""
    return tensor.unflatten(1, (k.shape[1], -1))


def _mean(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.mean(-2, keepdim=True, dtype=dtype)


def _finite(lse: Tensor) -> Tensor:
    """Return L with +inf where all keys are masked, so that e^(S - L) is 0 there."""
    return lse.masked_fill(lse.isneginf(), math.inf)
