"""Stored trajectories of a guided teacher: what its network was asked on the way to an image, and what guidance answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.files import read_tensors, write_atomic

_KEY = "diffdistill_trajectories"
_DTYPES = (torch.float16, torch.float32)


class Asked(NamedTuple):
    """Some stored calls, (B, ...): the state and its time, the guidance, the guided answer, the label (or None)."""

    x_t: Tensor
    t: Tensor
    w: Tensor
    target: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Trajectories:
    """K calls of each of N trajectories, every j-th of those that the sampler made.

    Attributes:
        x_t: (N, K, C, H, W), float16 or float32, the network's input.
        target: shape and dtype of x_t, the guided output in the network's own output type.
        t: (N, K) float64, the times.
        w: (N,) float64, the guidance of each trajectory, counted from 1.
        labels: (N,) int64, the class of each, or for a teacher that reads text the place of its text in the run's data; None for
            an unconditional teacher.
        origin: how they were made (teacher, texts, sampler, seeds), plain JSON values; stored with them.
    Raises:
        UserError: shapes, dtypes or lengths that do not fit together, nothing stored, or values that are not finite.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    w: Tensor
    labels: Tensor | None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, calls = self.x_t.shape[:1], self.x_t.shape[:2]
        if self.x_t.ndim != 5 or self.x_t.numel() == 0 or self.target.shape != self.x_t.shape:
            raise UserError(
                "x_t and target of stored trajectories must be non-empty and of one shape (N, K, C, H, W); "
                f"got {tuple(self.x_t.shape)} and {tuple(self.target.shape)}."
            )
        if self.t.shape != calls or self.w.shape != rows or (self.labels is not None and self.labels.shape != rows):
            raise UserError(
                f"{rows[0]} stored trajectories of {calls[1]} calls need t of shape {tuple(calls)}, w and labels of {tuple(rows)}; "
                f"got {tuple(self.t.shape)}, {tuple(self.w.shape)} and {None if self.labels is None else tuple(self.labels.shape)}."
            )
        wanted = {"t": torch.float64, "w": torch.float64, "labels": torch.int64}
        wrong = [name for name, dtype in wanted.items() if (v := getattr(self, name)) is not None and v.dtype != dtype]
        if wrong or self.x_t.dtype not in _DTYPES or self.target.dtype != self.x_t.dtype:
            raise UserError(
                "stored trajectories hold x_t and target of one dtype, float16 or float32, t and w in float64, labels in int64; "
                f"got {self.x_t.dtype}, {self.target.dtype}, {self.t.dtype}, {self.w.dtype} and "
                f"{None if self.labels is None else self.labels.dtype}."
            )
        for name in ("x_t", "target", "t", "w"):
            if not getattr(self, name).isfinite().all():
                raise UserError(
                    f"{name} of stored trajectories contains NaN or infinite values: make them again, in float32 if they are "
                    "float16, which ends at 65504."
                )

    def __len__(self) -> int:
        """Return the number of stored calls, N K: what a sample of training is."""
        return self.x_t.shape[0] * self.x_t.shape[1]

    def take(self, indices: Tensor) -> Asked:
        """Return the calls at `indices`, (B,) int64 in 0..len-1, uniform over trajectories and steps; x_t and target as float32."""
        row, call = indices // self.x_t.shape[1], indices % self.x_t.shape[1]
        return Asked(
            self.x_t[row, call].float(),
            self.t[row, call],
            self.w[row],
            self.target[row, call].float(),
            None if self.labels is None else self.labels[row],
        )

    @staticmethod
    def cat(parts: list[Trajectories]) -> Trajectories:
        """Return several with the same number of calls one after the other; the first one's origin."""
        first = parts[0]
        x_t, target, t, w = (torch.cat([getattr(part, name) for part in parts]) for name in ("x_t", "target", "t", "w"))
        labels = None if first.labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
        return Trajectories(x_t, target, t, w, labels, first.origin)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name; without labels where there are none."""
        named = {name: getattr(self, name) for name in ("x_t", "target", "t", "w", "labels")}
        return {name: value for name, value in named.items() if value is not None}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; `origin` goes into its header."""
        from safetensors.torch import save

        header = {_KEY: json.dumps(dict(self.origin), sort_keys=True)}
        return write_atomic(path, save({k: v.cpu().contiguous() for k, v in self.tensors().items()}, header))

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        """Read a file written by `save` into memory.

        Raises:
            UserError: no such file, a damaged file, or a file of something else.
        """
        header, tensors = read_tensors(path, "stored trajectories")
        needed = {"x_t", "target", "t", "w"}
        if _KEY not in header or not needed <= tensors.keys() <= needed | {"labels"}:
            raise UserError(
                f"{path} does not hold stored trajectories (x_t, target, t, w, labels); it holds {', '.join(tensors)}."
            )
        return cls(**{name: tensors[name] for name in needed}, labels=tensors.get("labels"), origin=json.loads(header[_KEY]))
