"""The attention kernel of a network, chosen by one name for every family.

Every network of diffusers that we know asks `torch.nn.functional.scaled_dot_product_attention`, by that name, at each call. While
one is asked through its denoiser, the name stands for `Attention.attend`, which has the same signature and hands the call to a
kernel. A `TorchFunctionMode` would do the same, and answer for every operation of the network beside.

    name               runs on     what it is
    auto               all         torch's fused kernels but cuDNN's; where derivatives run forward, one that has a rule for them
    sdpa               all         torch's own choice, cuDNN's among them
    flash              CPU, CUDA   torch's FlashAttention
    memory_efficient   CUDA        torch's memory-efficient attention
    cudnn              CUDA        cuDNN's, by torch
    math               all         the definition: keeps all scores, queries x keys; the reference
    flex               all         FlexAttention, compiled on CUDA; on a CPU without gradient
    xformers           CUDA        xformers.ops.memory_efficient_attention
    flash_attn         CUDA        the flash-attn package
    forward            all         ours: forward-mode derivatives in memory linear in the number of tokens

`auto` leaves cuDNN out. Its backward pass, which torch prefers on Hopper from 2.11 on, gives NaN for some lengths and masks
(github.com/pytorch/pytorch/issues/196678); and with it the passes of a step with and without gradient would run on two kernels,
whose rounding would stand in the difference of what they say.

What a kernel can run is asked of the kernel itself, at a few tokens, once for each kind of call (`Call`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.errors import UserError, unknown_name
from diffdistill.models.forward_attention import attention as forward_attention

AttentionName = Literal[
    "auto", "sdpa", "flash", "memory_efficient", "cudnn", "math", "flex", "xformers", "flash_attn", "forward"
]
Attend = Callable[..., Tensor]
"""(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> (B, H, L, D), as `scaled_dot_product_attention`."""

_TOKENS = 16  # of the calls by which kernels are asked
_FLEX_KINDS = 64  # of calls that FlexAttention is compiled for; torch's own limit is 8
_torch_attention = functional.scaled_dot_product_attention


class Call(NamedTuple):
    """A kind of call: what decides whether a kernel can run it. There are no lengths in it.

    Attributes:
        device: of the tensors.
        dtype: in which it is computed; under autocast that may not be theirs.
        head_size, value_size: last dimension of queries and keys, and of values.
        mask: "bool", "added" to the scores, or "none".
        dropout, causal, grouped: whether `dropout_p` is above 0, `is_causal`, `enable_gqa`.
        gradient: whether a backward pass may follow.
        tangent: whether it carries a forward-mode derivative, or is under another transform of `torch.func`.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    value_size: int
    mask: Literal["none", "bool", "added"] = "none"
    dropout: bool = False
    causal: bool = False
    grouped: bool = False
    gradient: bool = False
    tangent: bool = False

    def __str__(self) -> str:
        kinds = {
            "a mask": self.mask == "bool",
            "an added mask": self.mask == "added",
            "dropout": self.dropout,
            "is_causal": self.causal,
            "grouped heads": self.grouped,
            "a forward-mode derivative": self.tangent,
        }
        more = " and ".join(name for name, is_so in kinds.items() if is_so)
        return f"{_name(self.dtype)} on {self.device.type}, heads of {self.head_size}" + (f", with {more}" if more else "")


class Choice(NamedTuple):
    """Which kernel runs a kind of call, by its name in `KERNELS`, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class Attention:
    """The kernel of a network, and what was chosen so far.

    Args:
        name: of the kernel, or "auto".
    Raises:
        UserError: no kernel of that name.

    Attributes:
        choices: kind of call -> what runs it.
    """

    def __init__(self, name: str = "auto") -> None:
        if name != "auto" and name not in KERNELS:
            raise unknown_name("attention kernel", name, ("auto", *KERNELS), "compute.attention")
        self.name = name
        self.choices: dict[Call, Choice] = {}
        self._torch_may = _without_cudnn if name == "auto" else KERNELS[name].torch_may

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Hand every call of attention to the kernel, in all threads: a backward pass on a GPU recomputes in one of its own."""
        before = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = self.attend  # type: ignore[assignment]
        try:
            with self._torch_may():
                yield
        finally:
            functional.scaled_dot_product_attention = before

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return what torch's `scaled_dot_product_attention` does, (B, H, L, D), by the kernel.

        Raises:
            UserError: it cannot run such a call.
        """
        if query.is_meta:  # shapes alone, by the definition
            return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        call = _call(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if torch.compiler.is_compiling():
            name = _while_compiling(self, *call)
        else:
            name = (self.choices.get(call) or self.choose(call)).name
        return KERNELS[name].attend(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def choose(self, call: Call) -> Choice:
        """Return what runs a kind of call, and remember it; warns where `auto` has nothing but the definition for it.

        Raises:
            UserError: the kernel cannot run it.
        """
        choice = _auto(call) if self.name == "auto" else _named(self.name, call)
        self.choices[call] = choice
        return choice

    def planned(self) -> Attention:
        """Return a kernel of the CPU whose memory grows with the number of tokens as this one's does: what a plan is made with."""
        return Attention("math" if self.name in ("math", "flex") else "auto")

    @property
    def record(self) -> dict[str, list[str]]:
        """What was chosen, and why -> for which kinds of calls."""
        calls: dict[str, list[str]] = {}
        for call, choice in self.choices.items():
            kinds = calls.setdefault(str(choice), [])
            kinds += [str(call)] if str(call) not in kinds else []
        return calls

    def __str__(self) -> str:
        """Return in one line what was chosen for what, and why."""
        said = [f"{choice} for {'; '.join(kinds)}" for choice, kinds in self.record.items()]
        return f"{self.name}: {'. '.join(said) or 'no call yet'}"


def current_attention() -> Attention | None:
    """Return the innermost `Attention` in use, None outside of all."""
    owner = getattr(functional.scaled_dot_product_attention, "__self__", None)
    return owner if isinstance(owner, Attention) else None


def usable(device: torch.device | str, head_size: int = 64) -> dict[str, dict[str, str]]:
    """Return kernel -> dtype -> "yes", or why not, and first what auto takes, and why: what `doctor` shows.

    Args:
        device: to compute on.
        head_size: of calls without a mask and with gradient.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    calls = {_name(dtype): Call(torch.device(device), dtype, head_size, head_size, gradient=True) for dtype in dtypes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where auto takes the definition, it says so here
        auto = {dtype: str(_auto(call)) for dtype, call in calls.items()}
    able = {name: {dtype: kernel.refuses(call) or "yes" for dtype, call in calls.items()} for name, kernel in KERNELS.items()}
    return {"auto": auto, **able}


# What is chosen


def _named(name: str, call: Call) -> Choice:
    """Return the kernel asked for.

    Raises:
        UserError: it cannot run the call.
    """
    if reason := KERNELS[name].refuses(call):
        able = [other for other, kernel in KERNELS.items() if other != name and kernel.refuses(call) is None]
        raise UserError(
            f"attention kernel {name!r} cannot run what this network asks for ({call}): {reason}. Set compute.attention to auto, or to "
            f"one that can: {', '.join(able)}."
        )
    return Choice(name, "asked for")


def _auto(call: Call) -> Choice:
    if call.tangent:
        reason = "torch's fused kernels have no forward-mode derivative"
        if missing := KERNELS["forward"].refuses(call):
            return Choice("math", f"{reason}, and forward: {missing}")
        return Choice("forward", reason)
    with _without_cudnn():
        found, _ = _asked_of_torch(call)
    chosen = "math" if found is None else _NAMES[found]
    passed_over = _FUSED[: _FUSED.index(chosen)] if chosen in _FUSED else _FUSED
    reason = ", ".join(f"{name}: {KERNELS[name].refuses(call) or 'switched off in torch'}" for name in passed_over)
    if chosen == "math":
        warnings.warn(
            f"no fused kernel runs attention of {call}, so it is computed by its definition and keeps all scores: {reason}",
            stacklevel=4,
        )
    return Choice(chosen, reason or "torch's first choice")


@torch.compiler.assume_constant_result
def _while_compiling(attention: Attention, *call: Any) -> str:
    """Return the name of what runs a call; as a constant of the compiled graph, which is guarded by all that is in a `Call`."""
    kind = Call(*call)
    return (attention.choices.get(kind) or attention.choose(kind)).name


def _call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Call:
    device = query.device
    dtype = query.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):  # as autocast does with this function
        dtype = torch.get_autocast_dtype(device.type)
    return Call(
        device,
        dtype,
        query.shape[-1],
        value.shape[-1],
        "none" if mask is None else "bool" if mask.dtype == torch.bool else "added",
        dropout_p > 0,
        is_causal,
        enable_gqa,
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        not torch.compiler.is_compiling() and _has_tangent(query, key, value),
    )


def _has_tangent(*tensors: Tensor) -> bool:
    if torch._C._functorch.maybe_current_level() is not None:
        return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The kernels


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention.

    Attributes:
        attend: of the signature of `scaled_dot_product_attention`.
        refuses: why it cannot run a kind of call; None where it can.
        torch_may: context in which torch's own function may choose what it may while the kernel is in use.
    """

    attend: Attend
    refuses: Callable[[Call], str | None]
    torch_may: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _tiny(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return query, key, value and mask of a call of that kind, of a few tokens and of zeros."""
    sizes = (call.head_size, call.head_size, call.value_size)
    query, key, value = (
        torch.zeros(2, 2, _TOKENS, size, dtype=call.dtype, device=call.device, requires_grad=call.gradient) for size in sizes
    )
    if call.mask == "none":
        return query, key, value, None
    dtype = torch.bool if call.mask == "bool" else call.dtype
    return query, key, value, torch.ones(2, 1, 1, _TOKENS, dtype=dtype, device=call.device)


def _asked_of_torch(call: Call) -> tuple[SDPBackend | None, str]:
    """Return which of the kernels that it may choose from torch takes for a call; None for none, and why."""
    query, key, value, mask = _tiny(call)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = torch._fused_sdp_choice(
                query, key, value, mask, 0.1 * call.dropout, call.causal, scale=None, enable_gqa=call.grouped
            )
        except RuntimeError:
            sentences = [str(each.message).partition(" (Triggered")[0] for each in said]
            reasons = [text for text in sentences if not text.endswith("not used because:")]
            return None, " ".join(reasons[:1]) or f"torch has no such kernel for {call.device.type}"
    return SDPBackend(found), ""


def _of_torch(backend: SDPBackend) -> Kernel:
    """Return one of torch's own kernels; it is chosen by the flags that are set while the kernel is in use."""

    def refuses(call: Call) -> str | None:
        if call.tangent:
            return "it has no forward-mode derivative"
        if backend == SDPBackend.CUDNN_ATTENTION and call.gradient:
            return (
                "its gradient is NaN for some lengths (github.com/pytorch/pytorch/issues/196678); without gradient it is fine"
            )
        with sdpa_kernel(backend):
            found, why_not = _asked_of_torch(call)
        return None if found == backend else why_not

    return Kernel(_torch_attention, refuses, partial(sdpa_kernel, backend))


def _math(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _torch_attention(query, key, value, **options)


def _refuses_plain(call: Call, takes_mask: bool) -> str | None:
    """Return why a kernel that knows queries, keys, values and perhaps a mask cannot run a call."""
    if call.tangent:
        return "it has no forward-mode derivative"
    for asked, what in ((call.dropout, "dropout"), (call.causal, "is_causal"), (call.grouped, "grouped heads")):
        if asked:
            return f"it is not called with {what} here"
    return "it takes no mask" if call.mask != "none" and not takes_mask else None


def _of_package(package: str, pip: str, attend: Attend, takes_mask: bool) -> Kernel:
    """Return the kernel of a package for CUDA, which is asked by a trial."""

    def refuses(call: Call) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; pip install {pip}"
        if call.device.type != "cuda":
            return f"{package} computes on CUDA only"
        if reason := _refuses_plain(call, takes_mask):
            return reason
        query, key, value, mask = _tiny(call)
        try:
            with torch.autocast(call.device.type, enabled=False), torch.set_grad_enabled(call.gradient):
                output = attend(query, key, value, attn_mask=mask)
                if call.gradient:
                    torch.autograd.grad(output.sum(), (query, key, value))
        except (RuntimeError, ValueError, ImportError, AttributeError) as error:
            return str(error).strip().partition("\n")[0]
        return None

    return Kernel(attend, refuses)


def _lowered(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as autocast would hand them to torch's own kernels."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[0].dtype
    return [tensor.to(dtype) for tensor in tensors]


def _xformers(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    query, key, value = _lowered(query, key, value)
    bias = None if attn_mask is None else _aligned_bias(attn_mask, query, key)
    tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return memory_efficient_attention(*tokens_first, attn_bias=bias, scale=options.get("scale")).transpose(1, 2)


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask as what is added to the scores, (B, H, L, S), in rows whose length in memory is a multiple of 8."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    rows = query.new_zeros(batch, heads, queries, -(-keys // 8) * 8)[..., :keys]
    if mask.dtype == torch.bool:
        return rows.masked_fill_(~mask, float("-inf"))
    return rows.add_(mask)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    from flash_attn import flash_attn_func

    tokens_first = (tensor.transpose(1, 2) for tensor in _lowered(query, key, value))
    return flash_attn_func(*tokens_first, softmax_scale=options.get("scale")).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    query, key, value = _lowered(query, key, value)
    change = None
    if attn_mask is not None:
        mask = attn_mask.expand(*query.shape[:3], key.shape[2])

        def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = mask[b, h, q, k]
            return torch.where(seen, score, float("-inf")) if mask.dtype == torch.bool else score + seen

    return _flex_attention(query.is_cuda)(query, key, value, score_mod=change, scale=options.get("scale"))


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, _FLEX_KINDS)
    return torch.compile(flex_attention, fullgraph=True)  # beyond those kinds an error, and not the definition without a word


def _flex_refuses(call: Call) -> str | None:
    if call.device.type != "cuda" and call.gradient:
        return "FlexAttention has no gradient on a CPU"
    return _refuses_plain(call, takes_mask=True)


def _forward_refuses(call: Call) -> str | None:
    return "it drops no attention weights" if call.dropout else None


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(_torch_attention, lambda call: None),
    "flash": _of_torch(SDPBackend.FLASH_ATTENTION),
    "memory_efficient": _of_torch(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _of_torch(SDPBackend.CUDNN_ATTENTION),
    "math": Kernel(_math, lambda call: None),
    "flex": Kernel(_flex, _flex_refuses),
    "xformers": _of_package("xformers", "xformers", _xformers, takes_mask=True),
    "flash_attn": _of_package("flash_attn", "flash-attn", _flash_attn, takes_mask=False),
    "forward": Kernel(forward_attention, _forward_refuses),
}

_NAMES = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory_efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.MATH: "math",
}
_FUSED = ("flash", "memory_efficient")  # those of `auto`, in torch's order
