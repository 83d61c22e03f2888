"""The embedded data set: the 1,797 handwritten digits that come with scikit-learn, 8x8, 17 grey levels.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(the part published for testing).
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

NUM_CLASSES = 10
NUM_SAMPLES = 1797
NUM_HELD_OUT = 359  # a fifth


class Digits(NamedTuple):
    """Images and their classes.

    Attributes:
        images: (N, 1, 8, 8) float32 in [-1, 1], multiples of 1/8.
        labels: (N,) int64 in 0..9.
    """

    images: Tensor
    labels: Tensor


@functools.cache
def _load() -> Digits:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images).to(torch.float32)  # (N, 8, 8), 0..16
    return Digits((levels / 8 - 1).unsqueeze(1), torch.from_numpy(bunch.target).to(torch.int64))


def digits() -> Digits:
    """Return the 1,797 digits in scikit-learn's order: pixel level k of 0..16 becomes k / 8 - 1, exact in float32."""
    data = _load()
    return Digits(data.images.clone(), data.labels.clone())


class Split(NamedTuple):
    """Indices into `digits()`, each (n,) int64 ascending; disjoint, together all of it."""

    train: Tensor
    held_out: Tensor


def digits_split() -> Split:
    """Return the fixed split used to train and to judge the classifier: 1,438 to train, 359 held out.

    Sample i is held out when the SHA-256 of the text "digits-split-i" is among the 359 smallest, so the split depends
    on no library's random numbers. It is a random split of images: a writer may have digits on both sides, so held-out
    accuracy is accuracy on new images, not on new writers.
    """
    order = sorted(range(NUM_SAMPLES), key=lambda i: hashlib.sha256(f"digits-split-{i}".encode()).hexdigest())
    return Split(torch.tensor(sorted(order[NUM_HELD_OUT:])), torch.tensor(sorted(order[:NUM_HELD_OUT])))
