"""Images of several shapes: the shapes (buckets) of about one area, and batches that hold one of them each."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.data.batches import DataSource, MicroBatches, Sample, derive_seed, keyed_generator
from diffdistill.errors import UserError

Bucket = tuple[int, int]


def buckets(size: int, multiple: int, max_ratio: float) -> tuple[Bucket, ...]:
    """Return the shapes (height, width) of about the area size^2, from the tallest to the widest.

    Both edges are multiples of `multiple`. The short edge is the longest with which the area stays within size^2, so
    that no bucket needs more memory than the square.

    Args:
        size: edge of the square bucket in pixels, a multiple of `multiple`.
        multiple: what edges must divide by, 8 for a common autoencoder, 64 for SDXL's own buckets.
        max_ratio: of the long to the short edge, at least 1; 1 gives the square alone.
    Raises:
        UserError: size or max_ratio is out of range.
    Source: Podell et al. 2023 (arXiv:2307.01952), section 2.3; at (1024, 64, 4) all of these are in their appendix I.
    """
    if multiple < 1 or size < multiple or size % multiple:
        raise UserError(f"size must be a positive multiple of {multiple}; got {size}.")
    if not max_ratio >= 1:
        raise UserError(f"max_ratio must be at least 1 (the square alone); got {max_ratio:g}.")
    tall: list[Bucket] = []
    for height in itertools.count(size, multiple):
        width = size * size // height // multiple * multiple
        if width == 0 or height > max_ratio * width:
            break
        tall.append((height, width))
    return (*reversed(tall), *((width, height) for height, width in tall[1:]))


def nearest_bucket(height: int, width: int, choices: Iterable[Bucket]) -> Bucket:
    """Return the bucket of the nearest aspect ratio, by |log(height / width) - log(its height / its width)|."""
    return min(choices, key=lambda bucket: abs(math.log(height * bucket[1] / (width * bucket[0]))))


@functools.lru_cache(maxsize=4)
def _buckets_of_epoch(sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the bucket of each step of an epoch."""
    counts = [(epoch + 1) * size // batch_size - epoch * size // batch_size for size in sizes]
    every = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(counts))
    return tuple(every[torch.randperm(len(every), generator=keyed_generator(seed, "bucket order", epoch))].tolist())


@dataclass(frozen=True)
class BucketBatches:
    """An endless stream of batches that hold one bucket each, as `MicroBatches` a function of (seed, step, micro-batch).

    Each bucket b has its own endless stream of all its n_b samples, so its rest after the last whole batch is the start
    of its next epoch, and a bucket smaller than a batch is not lost. In epoch e bucket b gives the
    floor((e+1) n_b / B) - floor(e n_b / B) next batches of its stream, and the batches of all buckets are shuffled. With
    one bucket this is `MicroBatches`.

    Attributes:
        sizes: n_b, samples of each bucket, at least one; sample i of bucket b has the index n_0 + ... + n_{b-1} + i.
        batch_size: B, samples of one optimiser step over all micro-batches and processes.
        micro_batch_size: samples of one forward pass; divides batch_size.
        seed: the run's seed.
    """

    sizes: tuple[int, ...]
    batch_size: int
    micro_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise UserError(f"every bucket needs at least one sample; got {self.sizes}. Leave empty buckets out.")
        self._stream(0)

    def _stream(self, bucket: int) -> MicroBatches:
        seed = derive_seed(self.seed, "bucket", bucket)
        return MicroBatches(self.sizes[bucket], self.batch_size, self.micro_batch_size, seed)

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * size // self.batch_size for size in self.sizes)

    @property
    def num_samples(self) -> int:
        """Samples of all buckets."""
        return sum(self.sizes)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in one step."""
        return self._stream(0).num_micro_batches

    def indices(self, step: int, micro: int) -> Tensor:
        """Return the samples of micro-batch `micro` of step `step`, (micro_batch_size,) int64, all of one bucket.

        Raises:
            ValueError: step is negative or micro is not in 0..num_micro_batches - 1.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0; got {step}")
        # For K buckets _steps_before(e) > e N / B - K, so the epoch of `step` lies below this.
        end = (step + len(self.sizes)) * self.batch_size // self.num_samples + 1
        epoch = bisect.bisect_right(range(end), step, key=self._steps_before) - 1
        order = _buckets_of_epoch(self.sizes, self.batch_size, self.seed, epoch)
        place = step - self._steps_before(epoch)
        bucket = order[place]
        number = epoch * self.sizes[bucket] // self.batch_size + order[:place].count(bucket)
        return self._stream(bucket).indices(number, micro) + sum(self.sizes[:bucket])


class BucketedSource:
    """Several sources, one per bucket, laid end to end; a micro-batch comes from one of them, as `BucketBatches` asks.

    Args:
        sources: by bucket, at least one.
    """

    def __init__(self, sources: Mapping[Bucket, DataSource]) -> None:
        self.buckets, self.sources = tuple(sources), tuple(sources.values())
        self._ends = torch.tensor(self.sizes).cumsum(0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of `BucketBatches`."""
        return tuple(source.num_samples for source in self.sources)

    def describe(self, batch_size: int) -> str:
        """Return one line: the buckets, how many images each holds, and what becomes of those that fill no whole batch.

        Raises:
            UserError: no bucket fills a batch.
        """
        held = ", ".join(f"{height}x{width}: {size}" for (height, width), size in zip(self.buckets, self.sizes, strict=True))
        if max(self.sizes) < batch_size:
            raise UserError(
                f"no bucket fills a batch of {batch_size}; images by height x width: {held}. Set batch_size to at most "
                f"{max(self.sizes)}, or have fewer buckets: a smaller max_aspect, a larger step."
            )
        small = sum(size < batch_size for size in self.sizes)
        rest = f"; {small} hold less than a batch, whose images recur within one" * (small > 0)
        return f"images by height x width: {held}{rest}. The rest after a bucket's last whole batch begins its next round."

    @property
    def num_samples(self) -> int:
        """Samples of all buckets."""
        return int(self._ends[-1])

    def take(self, indices: Tensor, generator: torch.Generator) -> Sample:
        """Return the samples at `indices`.

        Raises:
            ValueError: the indices are of several buckets.
        """
        found = torch.bucketize(indices, self._ends, right=True).unique()
        if len(found) != 1:
            raise ValueError(f"a micro-batch holds one bucket; got samples of buckets {found.tolist()}")
        bucket = int(found)
        return self.sources[bucket].take(indices - sum(self.sizes[:bucket]), generator)
