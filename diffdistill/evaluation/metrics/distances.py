"""Distances and directions of feature vectors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ROWS_PER_BLOCK = 1024


def squared_distance_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield the squared distances of blocks of rows of x, float64 (N, d), to all of y, float64 (M, d), as (rows, M)."""
    y_norms = y.square().sum(1)
    for rows in x.split(ROWS_PER_BLOCK):
        yield (rows.square().sum(1, keepdim=True) + y_norms - 2 * rows @ y.T).clamp(min=0)


def unit_rows(features: Tensor) -> Tensor:
    """Return the rows of features, (N, d), at unit length, float64.

    Raises:
        ValueError: a row is zero and has no direction.
    """
    x = features.double()
    norms = x.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError(f"{int((norms == 0).sum())} of {len(x)} feature vectors are zero and have no direction.")
    return x / norms
