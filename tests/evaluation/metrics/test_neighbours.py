"""Nearest-neighbour metrics on points whose neighbours can be counted."""

import torch
from metric_cases import normal

from diffdistill.evaluation.metrics.neighbours import precision_recall, seeded_subset


def line(*positions):
    return torch.tensor([[float(p), 0.0] for p in positions])


def test_precision_and_recall_on_a_line_are_known():
    # Real points 0..9: the third nearest neighbour is at most 3 away (ends) and at least 2 (middle).
    real = line(*range(10))
    # 0.5 and 11.5 are inside (9 reaches to 12); 12.5 and 40 are outside every ball.
    fake = line(0.5, 11.5, 12.5, 40.0)
    precision, recall = precision_recall(fake, real, k=3)
    assert precision == 0.5
    # Each fake point's ball reaches its farthest fake neighbour: radii 39.5, 28.5, 27.5, 39.5 cover all of 0..9.
    assert recall == 1.0


def test_far_samples_have_neither():
    real, fake = line(*range(10)), line(*range(1000, 1010))
    assert precision_recall(fake, real) == (0.0, 0.0)


def test_a_collapsed_sample_is_precise_without_recall():
    real = line(*range(0, 100, 10))
    fake = line(50.0, 50.001, 50.002, 50.003)
    precision, recall = precision_recall(fake, real)
    assert precision == 1.0
    assert recall == 0.1  # the one real point in the cluster


def test_identical_sets_have_both():
    x = normal(200, 5)
    assert precision_recall(x, x) == (1.0, 1.0)


def test_blocks_change_nothing(monkeypatch):
    x, y = normal(300, 5), normal(250, 5, seed=1) + 1
    whole = precision_recall(x, y)
    monkeypatch.setattr("diffdistill.evaluation.metrics.neighbours.ROWS_PER_BLOCK", 7)
    assert precision_recall(x, y) == whole
    assert 0 < whole[0] < 1


def test_precision_equals_the_direct_definition():
    x, y = normal(60, 3), normal(70, 3, seed=1) + 0.7
    between = torch.cdist(y, y).sort(1).values[:, 3]
    expected = float((torch.cdist(x, y) <= between).any(1).double().mean())
    assert precision_recall(x, y)[0] == expected


def test_seeded_subset_keeps_order_and_repeats_nothing():
    x = torch.arange(100)
    chosen = seeded_subset(x, 30, seed=1)
    assert len(chosen.unique()) == 30
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, seeded_subset(x, 30, seed=1))
    assert not torch.equal(chosen, seeded_subset(x, 30, seed=2))
    assert seeded_subset(x, 100, seed=1) is x
