"""Distances in blocks, and directions."""

import pytest
import torch
from metric_cases import F64, normal

from diffdistill.evaluation.metrics.distances import squared_distance_blocks, unit_rows


def test_blocks_together_are_the_squared_distances_from_rows_of_the_first(monkeypatch):
    x, y = normal(11, 3), normal(5, 3, seed=1)
    monkeypatch.setattr("diffdistill.evaluation.metrics.distances.ROWS_PER_BLOCK", 4)
    blocks = list(squared_distance_blocks(x, y))
    assert [block.shape for block in blocks] == [(4, 5), (4, 5), (3, 5)]
    assert torch.allclose(torch.cat(blocks), (x[:, None] - y).square().sum(2), rtol=1e-12, atol=1e-12)


def test_rounding_leaves_no_distance_below_zero():
    x = normal(50, 3) + 1e6
    assert min(float(block.min()) for block in squared_distance_blocks(x, x)) >= 0


def test_unit_rows_keep_the_direction_in_float64():
    found = unit_rows(torch.tensor([[3.0, 4.0], [0.0, -1e-30]]))
    assert found.dtype == F64
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.0, -1.0]], dtype=F64), rtol=1e-12)
    with pytest.raises(ValueError, match="1 of 2 feature vectors are zero"):
        unit_rows(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
