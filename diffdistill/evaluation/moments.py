"""Streaming mean and covariance in float64: shifted sums per jackknife group, merged by addition."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Moments:
    """Counts, sums and outer products of x - shift for each of G groups of samples of dimension d.

    The shift is the mean of the first batch, so that the subtraction in the covariance loses no digits when the mean is
    large against the spread. Sums of parts add: shards, resumed runs and seed blocks combine without another pass.

    Attributes:
        shift: float64 (d,), or None before the first sample.
        counts: int64 (G,). sums: float64 (G, d). outers: float64 (G, d, d).
    """

    def __init__(self, dim: int, num_groups: int = 1):
        if dim < 1 or num_groups < 1:
            raise ValueError(f"Moments needs dim >= 1 and num_groups >= 1; got {dim} and {num_groups}.")
        self.shift: Tensor | None = None
        self.counts = torch.zeros(num_groups, dtype=torch.int64)
        self.sums = torch.zeros(num_groups, dim, dtype=torch.float64)
        self.outers = torch.zeros(num_groups, dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Length of one sample."""
        return self.sums.shape[1]

    @property
    def num_groups(self) -> int:
        """Number of jackknife groups."""
        return len(self.counts)

    @property
    def count(self) -> int:
        """Number of samples seen, over all groups."""
        return int(self.counts.sum())

    def update(self, features: Tensor, groups: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: (B, d), any floating dtype, taken to float64 before anything else.
            groups: int64 (B,) in [0, G), the group of each sample; None puts all into group 0.
        Raises:
            ValueError: wrong shape, a group outside the range, or a value that is not finite.
        """
        x = features.detach().to("cpu", torch.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"features must be (B, {self.dim}); got {tuple(x.shape)}.")
        if not torch.isfinite(x).all():
            raise ValueError("the features hold NaN or infinity.")
        groups = torch.zeros(len(x), dtype=torch.int64) if groups is None else groups.cpu()
        if groups.shape != (len(x),) or (len(x) and not 0 <= int(groups.min()) <= int(groups.max()) < self.num_groups):
            raise ValueError(f"groups must be ({len(x)},) with values in [0, {self.num_groups}).")
        if not len(x):
            return
        if self.shift is None:
            self.shift = x.mean(0)
        x = x - self.shift
        for group in groups.unique().tolist():
            members = x[groups == group]
            self.counts[group] += len(members)
            self.sums[group] += members.sum(0)
            self.outers[group] += members.T @ members

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together, group by group."""
        if (self.dim, self.num_groups) != (other.dim, other.num_groups):
            raise ValueError(
                f"moments add when (dim, num_groups) agree; got {(self.dim, self.num_groups)} "
                f"and {(other.dim, other.num_groups)}."
            )
        if self.shift is None or other.shift is None:
            return other._copy() if self.shift is None else self._copy()
        total = other._shifted_to(self.shift)
        total.counts += self.counts
        total.sums += self.sums
        total.outers += self.outers
        return total

    def include(self, part: Moments, first_group: int = 0) -> None:
        """Add the samples of `part` in place; its group g is group first_group + g here."""
        if part.shift is None:
            return
        if self.shift is None:
            self.shift = part.shift.clone()
        moved = part._shifted_to(self.shift)
        groups = slice(first_group, first_group + part.num_groups)
        self.counts[groups] += moved.counts
        self.sums[groups] += moved.sums
        self.outers[groups] += moved.outers

    def pooled(self) -> Moments:
        """Return the same samples as one group."""
        return self._select(torch.ones(self.num_groups, dtype=torch.bool))

    def without(self, group: int) -> Moments:
        """Return every group but one, pooled into one group."""
        keep = torch.ones(self.num_groups, dtype=torch.bool)
        keep[group] = False
        return self._select(keep)

    def mean(self) -> Tensor:
        """Return the mean over all groups, float64 (d,)."""
        self._require(1)
        return self.shift + self.sums.sum(0) / self.count

    def covariance(self) -> Tensor:
        """Return the unbiased covariance over all groups, float64 (d, d), exactly symmetric."""
        self._require(2)
        total = self.sums.sum(0)
        covariance = (self.outers.sum(0) - torch.outer(total, total) / self.count) / (self.count - 1)
        return (covariance + covariance.T) / 2

    def state(self) -> dict[str, Tensor]:
        """Return the state as tensors: counts, sums, outers, and shift once a sample was seen."""
        state = {"counts": self.counts, "sums": self.sums, "outers": self.outers}
        return state if self.shift is None else {**state, "shift": self.shift}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """Rebuild from `state()`; the tensors are copied."""
        num_groups, dim = state["sums"].shape
        moments = cls(dim, num_groups)
        moments.counts, moments.sums, moments.outers = (state[key].clone() for key in ("counts", "sums", "outers"))
        moments.shift = state["shift"].clone() if "shift" in state else None
        return moments

    def _copy(self) -> Moments:
        return Moments.from_state(self.state())

    def _select(self, keep: Tensor) -> Moments:
        chosen = Moments(self.dim)
        chosen.shift = self.shift
        chosen.counts = self.counts[keep].sum(0, keepdim=True)
        chosen.sums = self.sums[keep].sum(0, keepdim=True)
        chosen.outers = self.outers[keep].sum(0, keepdim=True)
        return chosen

    def _shifted_to(self, shift: Tensor) -> Moments:
        """Rewrite the sums about another shift: with x - new = (x - old) + delta every term is known."""
        moved = self._copy()
        delta = self.shift - shift
        counts = self.counts.double()
        cross = self.sums[:, :, None] * delta  # (G, d, d)
        moved.sums = self.sums + counts[:, None] * delta
        moved.outers = self.outers + cross + cross.mT + counts[:, None, None] * torch.outer(delta, delta)
        moved.shift = shift.clone()
        return moved

    def _require(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"at least {least} samples are needed; got {self.count}.")
