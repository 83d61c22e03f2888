"""Which samples a micro-batch holds, as pure functions of (seed, step, micro-batch): nothing here has a state to save.

Also the two places samples come from: images (or their latents) kept in memory, and labels alone for data-free methods.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diffdistill.errors import UserError


def derive_seed(*keys: int | str) -> int:
    """Return a 63-bit seed from the SHA-256 of the keys; distinct key lists give independent seeds.

    Each key enters with its type and length, so ("1", "2"), (1, 2) and ("12",) all differ.

    Raises:
        TypeError: a key is neither int nor str (a bool or a float would make seeds depend on formatting).
    """
    digest = hashlib.sha256()
    for key in keys:
        if type(key) not in (int, str):
            raise TypeError(f"seed keys are int or str; got {key!r} of type {type(key).__name__}")
        text = str(key).encode()
        digest.update(f"{type(key).__name__}:{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def keyed_generator(*keys: int | str) -> torch.Generator:
    """Return a new CPU generator seeded by `derive_seed(*keys)`."""
    return torch.Generator().manual_seed(derive_seed(*keys))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> Tensor:
    return torch.randperm(num_samples, generator=keyed_generator(seed, "epoch", epoch))


@dataclass(frozen=True)
class MicroBatches:
    """An endless stream of samples, epoch after epoch, cut into batches and these into micro-batches.

    Position p of the stream is entry p mod N of the permutation of epoch p // N. Step k holds positions k*B to
    (k+1)*B - 1, its micro-batch m the m-th slice of these. So the micro-batch size and the number of processes change
    no batch, and every sample occurs exactly once per epoch, also where a batch crosses the end of one.

    Attributes:
        num_samples: N, size of the data set.
        batch_size: B, samples of one optimiser step over all micro-batches and processes; may exceed N.
        micro_batch_size: samples of one forward pass; divides batch_size.
        seed: the run's seed.
    """

    num_samples: int
    batch_size: int
    micro_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError("the data set is empty; it needs at least one sample.")
        if self.micro_batch_size < 1 or self.batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise UserError(
                f"micro_batch_size must divide batch_size, both at least 1; got {self.micro_batch_size} and {self.batch_size}."
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in one step."""
        return self.batch_size // self.micro_batch_size

    def indices(self, step: int, micro: int) -> Tensor:
        """Return the samples of micro-batch `micro` of step `step`, (micro_batch_size,) int64.

        Raises:
            ValueError: step is negative or micro is not in 0..num_micro_batches - 1.
        """
        if step < 0 or not 0 <= micro < self.num_micro_batches:
            raise ValueError(f"step must be >= 0 and micro in 0..{self.num_micro_batches - 1}; got {step} and {micro}")
        position = step * self.batch_size + micro * self.micro_batch_size
        end = position + self.micro_batch_size
        slices = []
        while position < end:
            epoch, start = divmod(position, self.num_samples)
            stop = min(self.num_samples, start + end - position)
            slices.append(_permutation(self.seed, epoch, self.num_samples)[start:stop])
            position += stop - start
        return torch.cat(slices)


def uniform_labels(count: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Draw class labels uniformly from 0..num_classes - 1, (count,) int64 on the generator's device."""
    return torch.randint(num_classes, (count,), generator=generator, device=generator.device)


@dataclass(frozen=True)
class Sample:
    """What a source hands out for one micro-batch.

    Attributes:
        x0: clean states (B, C, H, W) float32, or None from a source without images.
        values: what the network is conditioned on, name -> (B, ...), as in `Condition`; empty where there is nothing.
    """

    x0: Tensor | None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor | None:
        """Class labels, (B,) int64, or None where there are no classes."""
        return self.values.get("class_labels")


def _class_labels(labels: Tensor | None) -> dict[str, Tensor]:
    return {} if labels is None else {"class_labels": labels}


class DataSource(Protocol):
    """Where the samples of a micro-batch come from."""

    @property
    def num_samples(self) -> int:
        """The N of `MicroBatches`."""
        ...

    def take(self, indices: Tensor, generator: torch.Generator) -> Sample:
        """Return the samples at `indices` (B,) int64; whatever is drawn comes from `generator`."""
        ...


class ImageSource:
    """Images, or their latents, kept in memory.

    Args:
        x0: (N, C, H, W), floating; kept as float32.
        labels: (N,) integer, or None.
        max_abs: largest absolute value accepted: 1 for pixels; give the range of the latents for latents.
    Raises:
        UserError: wrong shapes, NaN or infinite values, values beyond max_abs, negative labels.
    """

    def __init__(self, x0: Tensor, labels: Tensor | None = None, max_abs: float = 1.0) -> None:
        _check_states(x0, labels, max_abs)
        self.x0 = x0.detach().to(torch.float32)
        self.labels = None if labels is None else labels.to(torch.int64)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return self.x0.shape[0]

    def take(self, indices: Tensor, generator: torch.Generator) -> Sample:
        """Return images and labels at `indices`; nothing is drawn."""
        return Sample(self.x0[indices], _class_labels(None if self.labels is None else self.labels[indices]))


class LabelSource:
    """Uniform class labels and no images, for methods that need no data; num_classes=None gives no labels either."""

    def __init__(self, num_classes: int | None) -> None:
        if num_classes is not None and num_classes < 1:
            raise UserError(f"num_classes must be at least 1; got {num_classes}. Use null for an unconditional model.")
        self.num_classes = num_classes

    @property
    def num_samples(self) -> int:
        """1: there is nothing to index; only the length of the indices counts."""
        return 1

    def take(self, indices: Tensor, generator: torch.Generator) -> Sample:
        """Return as many uniform labels as there are indices, drawn from `generator`."""
        if self.num_classes is None:
            return Sample(None)
        return Sample(None, _class_labels(uniform_labels(len(indices), self.num_classes, generator)))


def _check_states(x0: Tensor, labels: Tensor | None, max_abs: float) -> None:
    if x0.ndim != 4 or len(x0) == 0 or not x0.is_floating_point():
        raise UserError(
            "images must be a non-empty floating tensor (N, C, H, W); "
            f"got {tuple(x0.shape)} of {x0.dtype}. Bytes become floats by x / 127.5 - 1."
        )
    finite = x0.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise UserError(
            f"{int((~finite).sum())} of {len(x0)} images contain NaN or infinite values "
            f"(first: image {first}). Remove or repair them."
        )
    low, high = float(x0.min()), float(x0.max())
    if max(-low, high) > max_abs * (1 + 1e-5):
        raise UserError(
            f"values must lie in [-{max_abs:g}, {max_abs:g}]; found {low:g} to {high:g}. "
            "Pixels 0..255 become this range by x / 127.5 - 1, pixels 0..1 by 2 * x - 1."
        )
    if labels is not None and (labels.shape != x0.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0):
        raise UserError(f"labels must be {len(x0)} integers >= 0, one per image; got {tuple(labels.shape)} of {labels.dtype}.")
