"""Making trajectories of a guided teacher: its sampler runs as always, and every j-th call of its network is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from diffdistill.data.batches import derive_seed, keyed_generator
from diffdistill.data.trajectories import Trajectories
from diffdistill.math import grids
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import guided
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import DrawsNoise, Sampler

PER_PASS = 64  # trajectories made at a time; those of image k depend on its own seeds only


class TrajectorySpec(BaseModel):
    """Which trajectories of the guided teacher are stored; exactly one of `path` and `num` is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[
        Path | None, Field(description="trajectories.safetensors of an earlier run; null to make them at the start")
    ] = None
    num: Annotated[int | None, Field(gt=0, description="trajectories to make; null to read them from path")] = 1000
    steps: Annotated[
        int, Field(gt=0, description="steps of the teacher's sampler, on the trailing grid; no effect with path")
    ] = 50
    every: Annotated[
        int,
        Field(
            gt=0,
            description="store every so many steps; divides steps. The first one stored differs from trajectory to trajectory, so "
            "that all steps occur; no effect with path",
        ),
    ] = 1
    rule: Annotated[Literal["ddim", "dpmpp_2m", "sde"], Field(description="the teacher's sampler; no effect with path")] = (
        "ddim"
    )
    eta: Annotated[float, Field(ge=0, description="noise of ddim and sde, 1 for ancestral sampling; no effect with path")] = 0.0
    guidance: Annotated[
        tuple[float, float],
        Field(
            description="w of each trajectory is uniform between these, counted from 1; with path the range it was made with"
        ),
    ] = (1.0, 6.0)
    precision: Annotated[Literal["fp16", "fp32"], Field(description="of the stored states; no effect with path")] = "fp16"

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, values: dict) -> dict:
        return {"num": None, **values} if isinstance(values, dict) and values.get("path") is not None else values

    @model_validator(mode="after")
    def _fits_together(self) -> TrajectorySpec:
        if (self.path is None) == (self.num is None):
            raise ValueError(
                f"give either path (trajectories that exist) or num (to make); got path={self.path} and num={self.num}"
            )
        names = ("steps", "every", "rule", "eta", "precision")
        unused = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if self.path is not None and unused:
            raise ValueError(f"{', '.join(unused)} have no effect on trajectories read from path; leave them out")
        if self.steps % self.every:
            raise ValueError(f"every must divide steps; got {self.every} and {self.steps}")
        if self.eta and self.rule == "dpmpp_2m":
            raise ValueError("dpmpp_2m has no noise, so eta has no effect; leave it out")
        if self.eta > 1 and self.rule == "ddim":
            raise ValueError(f"eta of ddim lies in [0, 1]; got {self.eta:g}")
        if not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance is [low, high] with 0 <= low <= high, counted from 1; got {list(self.guidance)}")
        return self

    def origin(self, seed: int) -> dict[str, Any]:
        """Return what made trajectories note of themselves: these settings and the seed of the run, as plain JSON values."""
        return {"seed": seed, **self.model_dump(mode="json", exclude={"path"})}


class _WritesDown(Denoiser):
    """A denoiser that keeps call number offset + k j of each row, j being `every`: (B, K, ...) on the CPU."""

    def __init__(self, inner: Denoiser, offset: Tensor, every: int, num_calls: int, dtype: torch.dtype) -> None:
        self.inner, self.schedule, self.sample_shape = inner, inner.schedule, inner.sample_shape
        self.offset, self.every, self.calls = offset, every, 0
        shape = (len(offset), num_calls // every)
        self.x_t, self.target = (torch.empty(*shape, *self.sample_shape, dtype=dtype) for _ in range(2))
        self.t = torch.empty(shape, dtype=torch.float64)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the inner prediction."""
        prediction = self.inner(x_t, t, cond)
        rows, k = self.offset == self.calls % self.every, self.calls // self.every
        for kept, value in ((self.x_t, x_t), (self.target, prediction.raw), (self.t, t)):
            kept[rows, k] = value.cpu()[rows].to(kept.dtype)
        self.calls += 1
        return prediction


@torch.no_grad()
def guided_trajectories(
    teacher: Denoiser,
    sampler: Sampler,
    noise: DrawsNoise,
    cond: Condition,
    w: Tensor,
    every: int = 1,
    dtype: torch.dtype = torch.float32,
    labels: Tensor | None = None,
    rows: Tensor | None = None,
) -> Trajectories:
    """Run the teacher's sampler under guidance w and return every j-th state its network was asked at, and what guidance made of it.

    Args:
        teacher: unguided; both branches run as one batch of 2B.
        sampler: without guidance of its own, one call a step.
        noise, cond: of B images.
        w: (B,) float64, counted from 1.
        every: j; divides the number of steps. Row i begins with call i mod j.
        dtype: float16 or float32, of the stored states.
        labels: what `cond` was made of, (B,) int64, stored with the states.
        rows: the numbers i of these images where they are some of many, (B,) int64; None for 0..B-1.
    Source: AGD (arXiv:2503.07274), released code: the states that inference visits, in place of noised data.
    """
    if sampler.nfe != sampler.num_steps or sampler.num_steps % every:
        raise ValueError(
            f"trajectories need a sampler of one call a step and `every` to divide its steps; got nfe {sampler.nfe} in "
            f"{sampler.num_steps} steps and every={every}."
        )
    rows = torch.arange(len(w)) if rows is None else rows
    writer = _WritesDown(guided(teacher, w), rows % every, every, sampler.num_steps, dtype)
    sampler.sample(writer, noise, cond)
    return Trajectories(writer.x_t, writer.target, writer.t, w.double().cpu(), labels)


def make_trajectories(
    teacher: Denoiser,
    spec: TrajectorySpec,
    condition: Callable[[Tensor | None, int], Condition],
    labels: Tensor | None,
    seed: int,
    device: torch.device | str = "cpu",
    per_pass: int = PER_PASS,
    rows: Sequence[int] | None = None,
) -> Trajectories:
    """Return the trajectories of a specification, or some of them: w uniform in its range, noise of each trajectory its own.

    Args:
        teacher: unguided.
        spec: with `num` set.
        condition: (labels (B,) or None, B) -> condition on the device, such as `Teacher.condition`.
        labels: what each trajectory is asked for, (num,) int64 for `condition`; None for an unconditional teacher.
        seed: of the run.
        device: where the teacher is.
        per_pass: trajectories made at a time; changes no trajectory.
        rows: the numbers of those to make, each in 0..num-1; None for all.
    """
    assert spec.num is not None, "trajectories that are read from path are not made"
    sampler = Sampler(grids.trailing(teacher.schedule, spec.steps), spec.rule, eta=spec.eta)
    low, high = spec.guidance
    w = low + (high - low) * torch.rand(spec.num, generator=keyed_generator(seed, "trajectory guidance"), dtype=torch.float64)
    dtype = torch.float16 if spec.precision == "fp16" else torch.float32
    parts = []
    for some in torch.tensor(range(spec.num) if rows is None else rows).split(per_pass):
        noise = Noise([derive_seed(seed, "trajectory", k) for k in some.tolist()], device)
        asked = None if labels is None else labels[some]
        cond, guidance = condition(asked, len(some)), w[some].to(device)
        parts.append(guided_trajectories(teacher, sampler, noise, cond, guidance, spec.every, dtype, asked, some))
    return dataclasses.replace(Trajectories.cat(parts), origin=spec.origin(seed))
