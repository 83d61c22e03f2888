"""The teacher's guidance as a method's setting: a number, or a range from which every sample draws its own.

A student without a guidance input that learns from a range learns the average over the range.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from diffdistill.distillers.base import Rng
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import Interval, guided

Pair = tuple[float, float]


def _scale(value: float | Pair) -> float | Pair:
    low, high = value if isinstance(value, tuple) else (value, value)
    if not 0 <= low <= high:
        raise ValueError(f"guidance is a number >= 0, counted from 1 (1 = none), or a range [low, high]; got {value}")
    return value


def _interval(value: Pair | None) -> Pair | None:
    if value is not None and not 0 <= value[0] < value[1]:
        raise ValueError(f"guidance_interval is [low, high] with 0 <= low < high; got {list(value)}")
    return value


GuidanceScale = Annotated[
    float | Pair,
    AfterValidator(_scale),
    Field(
        description="teacher's guidance w, counted from 1: D_null + w (D_cond - D_null); 1 for none; [low, high] draws w "
        "uniformly for every sample"
    ),
]
GuidanceInterval = Annotated[
    Pair | None,
    AfterValidator(_interval),
    Field(description="noise levels sigma / alpha [low, high] inside which guidance acts; null for all"),
]


def has_guidance(scale: float | Pair) -> bool:
    """Return whether the setting asks for more than the conditional prediction."""
    return scale not in (1, (1, 1))


def guided_teacher(teacher: Denoiser, scale: float | Pair, interval: Pair | None, size: int, rng: Rng) -> Denoiser:
    """Return the teacher under guidance; a range draws one w per sample, (B,), from the micro-batch's generator.

    Both branches run as one batch of 2B; w = 1 is the teacher itself, at one pass.
    """
    limits = None if interval is None else Interval(*interval)
    if not isinstance(scale, tuple):
        return guided(teacher, scale, limits)
    w = rng.uniform(size, *scale) if scale[0] < scale[1] else torch.full((size,), scale[0], dtype=torch.float64)
    return guided(teacher, w, limits)
