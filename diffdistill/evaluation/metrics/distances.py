"""Distances between feature vectors, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ROWS_PER_BLOCK = 1024


def squared_distance_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield the squared distances of blocks of rows of x, float64 (N, d), to all of y, float64 (M, d), as (rows, M)."""
    y_norms = y.square().sum(1)
    for rows in x.split(ROWS_PER_BLOCK):
        yield (rows.square().sum(1, keepdim=True) + y_norms - 2 * rows @ y.T).clamp(min=0)
