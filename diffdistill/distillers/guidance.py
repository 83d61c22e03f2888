"""The teacher's guidance as a method's setting: a number, or a range from which every sample draws its own.

A student that takes w as an extra input learns every w of the range; one that does not learns the average over the range.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from diffdistill.distillers.base import Rng
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import Interval, guided
from diffdistill.sampling.sampler import Sampler

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


GuidanceInput = Annotated[
    float | None,
    Field(
        ge=0,
        description="makes w an extra input of the student, which then serves every w of the range `guidance`; the value is "
        "the w it is sampled with unless another is asked for. null for no such input",
    ),
]


def has_guidance(scale: float | Pair) -> bool:
    """Return whether the setting asks for more than the conditional prediction."""
    return scale not in (1, (1, 1))


def check_guidance_input(guidance_input: float | None, scale: float | Pair) -> None:
    """Raise ValueError where w is to be an input, but does not vary or is sampled outside the range it was learnt in."""
    if guidance_input is None:
        return
    low, high = scale if isinstance(scale, tuple) else (scale, scale)
    if not low < high:
        raise ValueError(
            f"guidance_input makes w an input of the student, so guidance must be a range [low, high]; got {scale}. "
            "Give a range, or leave guidance_input out"
        )
    if not low <= guidance_input <= high:
        raise ValueError(f"guidance_input must lie in the range guidance, [{low:g}, {high:g}]; got {guidance_input:g}")


def extra_inputs(guidance_input: float | None) -> tuple[str, ...]:
    """Return the extra inputs that the setting gives the roles' networks."""
    return () if guidance_input is None else ("guidance",)


def draw_guidance(scale: float | Pair, size: int, rng: Rng) -> float | Tensor:
    """Return w: the number, or one value per sample, (B,), drawn uniformly from the range by the micro-batch's generator."""
    if not isinstance(scale, tuple):
        return scale
    return rng.uniform(size, *scale) if scale[0] < scale[1] else torch.full((size,), scale[0], dtype=torch.float64)


def guided_by(teacher: Denoiser, w: float | Tensor, interval: Pair | None) -> Denoiser:
    """Return the teacher guided by w; both branches run as one batch of 2B, and the number 1 is the teacher itself."""
    return guided(teacher, w, None if interval is None else Interval(*interval))


def guided_teacher(teacher: Denoiser, scale: float | Pair, interval: Pair | None, size: int, rng: Rng) -> Denoiser:
    """Return the teacher under guidance by w drawn as the setting says."""
    return guided_by(teacher, draw_guidance(scale, size, rng), interval)


def told_guidance(cond: Condition, w: float | Tensor, guidance_input: float | None) -> Condition:
    """Return what the student is conditioned on: w too, where it is an input."""
    if guidance_input is None:
        return cond
    assert isinstance(w, Tensor), "check_guidance_input asks for a range"
    return cond.with_values(guidance=w)


def sampled_with(sampler: Sampler, guidance_input: float | None) -> Sampler:
    """Return the sampler of a student that takes w as an input; the sampler itself where it does not."""
    return sampler if guidance_input is None else replace(sampler, guidance=guidance_input, guidance_as_input=True)
