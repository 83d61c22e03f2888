"""The arithmetic of a feature network: stated, whatever the caller or another library has set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch

Precision = Literal["float32", "tf32", "float16", "bfloat16"]
T = TypeVar("T")


@contextlib.contextmanager
def computing(precision: Precision) -> Iterator[None]:
    """No gradients, and the arithmetic of a precision whatever was set before.

    float32 is strict: no autocast, no TF32 and no bfloat16 inside products, which would move a Frechet distance in the third
    digit. float16 and bfloat16 are autocast's; tf32 changes nothing on a CPU without it.
    """
    half = getattr(torch, precision) if precision in ("float16", "bfloat16") else None
    with (
        torch.no_grad(),
        torch.autocast("cuda", dtype=half or torch.float16, enabled=half is not None),
        torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None),
        _products("tf32" if precision == "tf32" else "ieee"),
    ):
        yield


def strict_float32() -> contextlib.AbstractContextManager[None]:
    """No gradients, no autocast, no TF32."""
    return computing("float32")


@contextlib.contextmanager
def _products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set how float32 is multiplied, by the old switches and then by the new ones, which have the last word; restore both.

    The old switches come first and agree: where the two disagree, torch raises on whoever reads an old one.
    """
    cudnn, ops = torch.backends.cudnn, _operations()
    kept = [op.fp32_precision for op in ops]
    old = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)
    flags = cudnn.benchmark, cudnn.deterministic
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32 = precision == "tf32"
    cudnn.benchmark, cudnn.deterministic = False, True
    for op in ops:
        op.fp32_precision = precision
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags
        torch.set_float32_matmul_precision(old[0] or "highest")
        if old[1] is not None:
            cudnn.allow_tf32 = old[1]
        for op, value in zip(ops, kept, strict=True):
            op.fp32_precision = value


def _operations() -> list[Any]:
    """Return the operations whose precision torch sets one by one, from torch 2.9 on."""
    backends: Any = torch.backends
    if not hasattr(backends.mkldnn, "conv"):
        return []
    return [
        backends.cuda.matmul,
        *(getattr(b, op) for b in (backends.cudnn, backends.mkldnn) for op in ("conv", "rnn")),
        backends.mkldnn.matmul,
    ]


def _readable(read: Callable[[], T]) -> T | None:
    """Return None where torch refuses to say, because a new switch has been set otherwise."""
    try:
        return read()
    except RuntimeError:
        return None
