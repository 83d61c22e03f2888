"""Stored pairs of a teacher, the noise it started from and the sample it reached, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.files import read_tensors, write_atomic

_KEY = "diffdistill_pairs"


@dataclass(frozen=True)
class Pairs:
    """Pairs (noise, x0) of a deterministic teacher sampler.

    Attributes:
        noise: (N, C, H, W) float32, standard normal: the state at the noisy end divided by its sigma.
        x0: (N, C, H, W) float32, where the teacher arrived: pixels, or latents where there is a codec.
        labels: (N,) int64, the class of each, or for a teacher that reads text the place of its text in the run's data; None for
            an unconditional teacher.
        origin: how the pairs were made (teacher, texts, sampler, guidance, seeds), plain JSON values; stored with them.
    Raises:
        UserError: shapes, dtypes or lengths that do not fit together, no pairs, or values that are not finite.
    """

    noise: Tensor
    x0: Tensor
    labels: Tensor | None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.noise.ndim != 4 or self.noise.shape != self.x0.shape or len(self.noise) == 0:
            raise UserError(
                "noise and x0 of stored pairs must be non-empty and of one shape (N, C, H, W); "
                f"got {tuple(self.noise.shape)} and {tuple(self.x0.shape)}."
            )
        for name, value in (("noise", self.noise), ("x0", self.x0)):
            if value.dtype != torch.float32:
                raise UserError(f"{name} of stored pairs must be float32; got {value.dtype}.")
            if not value.isfinite().all():
                raise UserError(f"{name} of stored pairs contains NaN or infinite values. Make the pairs again.")
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != self.noise.shape[:1]):
            raise UserError(
                f"labels of stored pairs must be {len(self.noise)} int64 values; "
                f"got {tuple(self.labels.shape)} of {self.labels.dtype}."
            )

    def __len__(self) -> int:
        return len(self.noise)

    def take(self, indices: Tensor) -> Pairs:
        """Return the pairs at `indices`, (B,) int64."""
        labels = None if self.labels is None else self.labels[indices]
        return Pairs(self.noise[indices], self.x0[indices], labels, self.origin)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name; without labels where there are none."""
        return {"noise": self.noise, "x0": self.x0, **({} if self.labels is None else {"labels": self.labels})}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; `origin` goes into its header."""
        from safetensors.torch import save

        header = {_KEY: json.dumps(dict(self.origin), sort_keys=True)}
        return write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in self.tensors().items()}, header))

    @classmethod
    def load(cls, path: str | Path) -> Pairs:
        """Read a file written by `save` into memory.

        Raises:
            UserError: no such file, a damaged file, or a file of something else.
        """
        header, tensors = read_tensors(path, "stored pairs")
        if _KEY not in header or not {"noise", "x0"} <= tensors.keys() <= {"noise", "x0", "labels"}:
            raise UserError(f"{path} does not hold stored pairs (noise, x0, labels); it holds {', '.join(tensors)}.")
        return cls(tensors["noise"], tensors["x0"], tensors.get("labels"), json.loads(header[_KEY]))
