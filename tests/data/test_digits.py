import torch
from sklearn.datasets import load_digits

from diffdistill.data.digits import digits, digits_split


def test_digits_are_scikit_learns_levels_exactly():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert torch.equal((images[:, 0] + 1) * 8, torch.from_numpy(load_digits().images).float())
    assert torch.equal(labels, torch.from_numpy(load_digits().target).long())
    assert images.min() == -1 and images.max() == 1


def test_a_caller_cannot_change_the_data_of_the_next_one():
    digits().images.zero_()
    assert digits().images.min() == -1


def test_split_is_disjoint_complete_and_fixed():
    train, held_out = digits_split()
    assert (len(train), len(held_out)) == (1438, 359)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(1797))
    assert held_out[:8].tolist() == [10, 11, 19, 21, 23, 24, 25, 28]  # the shipped classifier never saw these
    counts = digits().labels[held_out].bincount(minlength=10)
    assert counts.min() >= 25  # every class is judged: 36 on average
