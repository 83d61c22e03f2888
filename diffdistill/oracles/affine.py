"""A trainable denoiser for tests of methods: a Gaussian teacher's exact answer plus a table of affine corrections.

Any method whose exact solution on Gaussian data is affine in x_t (all of them) can be trained on it in seconds and
compared with the closed form. Role machinery sees an ordinary denoiser around a `network`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import Schedule, expand
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, OfNetwork
from diffdistill.oracles.gaussian import GaussianTeacher, row_of


class AffineTable(nn.Module):
    """slope(t) z + offset(c, t), per coordinate, linear in t between the nodes and constant outside; zero at first.

    Args of the constructor:
        nodes: (K,), times at which the table has entries, in any order; distinct.
        sample_shape: shape of one state.
        num_rows: number of offsets: one per class and one for null, or 1.
    """

    nodes: Tensor

    def __init__(self, nodes: Tensor, sample_shape: tuple[int, ...], num_rows: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("nodes", nodes.double().sort().values)
        self.slope = nn.Parameter(torch.zeros(nodes.numel(), *sample_shape, dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(num_rows, nodes.numel(), *sample_shape, dtype=dtype))

    def forward(self, z: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """Return the correction at z (B, *sample_shape), times t (B,) and rows (B,) of the offset table."""
        if self.nodes.numel() == 1:
            return self.slope[0] * z + self.offset[row, 0]
        nodes = self.nodes.double()  # whatever dtype the module was moved to
        right = torch.searchsorted(nodes, t.contiguous()).clamp(1, nodes.numel() - 1)
        left = right - 1
        place = ((t - nodes[left]) / (nodes[right] - nodes[left])).clamp(0, 1)
        w = expand(place, z)
        slope = (1 - w) * self.slope[left] + w * self.slope[right]
        return slope * z + (1 - w) * self.offset[row, left] + w * self.offset[row, right]


def _num_rows(base: GaussianTeacher) -> int:
    return 1 if base.num_classes is None else base.num_classes + 1


@dataclass(frozen=True)
class AffineDenoiser(OfNetwork):
    """base(x_t, t, c) + table(x_t / sqrt(alpha^2 + sigma^2), t, c), both in the base's output type.

    A fresh one equals its base exactly, at all times; at the nodes it can become any map that is affine per coordinate.
    Make one with `AffineDenoiser.around(base, nodes)`.

    Attributes:
        base: the frozen Gaussian teacher; of the two only the network, an `AffineTable`, trains.
    """

    base: GaussianTeacher

    @staticmethod
    def around(base: GaussianTeacher, nodes: Tensor, dtype: torch.dtype = torch.float32) -> AffineDenoiser:
        """Return a denoiser equal to `base` with entries at the times `nodes`: those at which the method asks the student."""
        return AffineDenoiser(AffineTable(nodes, base.sample_shape, _num_rows(base), dtype), base)

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """The base's path."""
        return self.base.schedule

    @property
    def sample_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The base's shape of one state."""
        return self.base.sample_shape

    @property
    def kind(self) -> str:
        """The base's output type."""
        return self.base.kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Return the prediction at x_t, (B, *sample_shape)."""
        exact = self.base(x_t, t, cond)
        row = row_of(cond, _num_rows(self.base), x_t.device)
        z = x_t * expand((exact.alpha**2 + exact.sigma**2).rsqrt(), x_t)
        with self.role():
            correction = self.network(z, t, row)
        return Prediction(exact.kind, exact.raw + correction, x_t, exact.alpha, exact.sigma)


@torch.no_grad()
def affine_of(denoiser: Denoiser, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """Return (gain, shift), (B, *sample_shape), of a denoiser that is affine per coordinate: D(x, t) = gain x + shift."""
    zero = torch.zeros(cond.batch_size, *denoiser.sample_shape, dtype=torch.float64, device=t.device)
    shift = denoiser(zero, t, cond).x0
    return denoiser(torch.ones_like(zero), t, cond).x0 - shift, shift
