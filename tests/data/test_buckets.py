import itertools

import pytest
import torch

from diffdistill.data.batches import ImageSource, MicroBatches, derive_seed
from diffdistill.data.buckets import BucketBatches, BucketedSource, buckets, nearest_bucket
from diffdistill.errors import UserError

# Podell et al. 2023 (arXiv:2307.01952), appendix I: height and width of SDXL's buckets, up to the square.
SDXL = """
512 2048 512 1984 512 1920 512 1856 576 1792 576 1728 576 1664 640 1600 640 1536 704 1472 704 1408 704 1344 768 1344 768 1280
832 1216 832 1152 896 1152 896 1088 960 1088 960 1024 1024 1024
"""


def test_buckets_of_1024_by_64_are_among_those_sdxl_was_trained_on():
    numbers = list(map(int, SDXL.split()))
    published = set(zip(numbers[::2], numbers[1::2], strict=True))
    ours = buckets(1024, 64, 4)
    assert {(min(bucket), max(bucket)) for bucket in ours} <= published
    assert len(ours) == 2 * 16 + 1 and {bucket[::-1] for bucket in ours} == set(ours)


@pytest.mark.parametrize(("size", "multiple", "max_ratio"), [(512, 64, 2), (512, 8, 3.5), (32, 8, 2), (256, 32, 1)])
def test_buckets_are_the_largest_multiples_within_the_area_of_the_square_and_the_ratio(size, multiple, max_ratio):
    ours = buckets(size, multiple, max_ratio)
    long_edges = range(size, int(size * max_ratio) + 1, multiple)
    expected = set()
    for edge in long_edges:
        short = max(short for short in range(0, size + 1, multiple) if edge * short <= size**2)
        expected |= {(edge, short), (short, edge)} if edge <= max_ratio * short else set()
    assert set(ours) == expected and len(ours) == len(expected)
    assert list(ours) == sorted(ours, key=lambda bucket: bucket[1] / bucket[0])


def test_buckets_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"^size must be a positive multiple of 64; got 500\.$"):
        buckets(500, 64, 2)
    with pytest.raises(UserError, match=r"^max_ratio must be at least 1 \(the square alone\); got 0\.5\.$"):
        buckets(512, 64, 0.5)


def test_the_nearest_bucket_is_that_of_the_nearest_ratio_whatever_the_size():
    choices = buckets(512, 64, 2)
    assert nearest_bucket(100, 100, choices) == nearest_bucket(4000, 4100, choices) == (512, 512)
    assert nearest_bucket(3000, 2000, choices) == (640, 384)  # 1.67 for 1.5; the next, 576 by 448, is 1.29
    assert nearest_bucket(1, 50, choices) == choices[-1] and nearest_bucket(50, 1, choices) == choices[0]
    for height, width in choices:
        assert nearest_bucket(3 * height, 3 * width, choices) == (height, width)
    # Between 1:1 and 4:1 the border is 2:1, the same for tall and wide.
    assert nearest_bucket(199, 100, [(1, 1), (4, 1)]) == (1, 1) and nearest_bucket(201, 100, [(1, 1), (4, 1)]) == (4, 1)
    assert nearest_bucket(100, 199, [(1, 1), (1, 4)]) == (1, 1) and nearest_bucket(100, 201, [(1, 1), (1, 4)]) == (1, 4)


SIZES = [((7, 20, 3), 4), ((5, 1, 40), 8), ((3, 2), 8), ((64, 64), 16), ((1, 1, 1), 2)]


def bucket_of(indices: torch.Tensor, sizes: tuple[int, ...]) -> int:
    (bucket,) = set(torch.bucketize(indices, torch.tensor(sizes).cumsum(0), right=True).tolist())
    return bucket


@pytest.mark.parametrize(("sizes", "batch_size"), SIZES)
def test_a_batch_holds_one_bucket_and_every_sample_occurs_once_per_epoch_of_its_bucket(sizes, batch_size):
    batches = BucketBatches(sizes, batch_size, batch_size, seed=3)
    seen = torch.zeros(sum(sizes), dtype=torch.int64)
    for step in range(6 * sum(sizes)):
        indices = batches.indices(step, 0)
        assert len(indices) == batch_size and indices.dtype == torch.int64
        bucket_of(indices, sizes)
        seen += torch.bincount(indices, minlength=len(seen))
        for part in seen.split(list(sizes)):
            assert part.max() - part.min() <= 1


@pytest.mark.parametrize(("sizes", "batch_size"), SIZES)
def test_every_bucket_has_its_share_of_the_batches(sizes, batch_size):
    batches = BucketBatches(sizes, batch_size, batch_size, seed=0)
    steps = 5 * sum(sizes)
    samples = [0] * len(sizes)
    for step in range(steps):
        samples[bucket_of(batches.indices(step, 0), sizes)] += batch_size
    # Off by less than a batch for each epoch's rest, and by what the last, partial epoch gave one bucket before another.
    for size, count in zip(sizes, samples, strict=True):
        assert abs(count / size - steps * batch_size / sum(sizes)) * size < 2 * batch_size + size


def test_the_order_of_buckets_is_shuffled_and_depends_on_the_seed():
    def order(seed):
        batches = BucketBatches((32, 32), 4, 4, seed)
        return [bucket_of(batches.indices(step, 0), (32, 32)) for step in range(48)]

    first = order(0)
    assert first[:16] != sorted(first[:16]) and first[:16] != first[16:32] and first != order(1)
    assert sum(first) == 24


@pytest.mark.parametrize("micro_batch_size", [1, 3, 6])
def test_micro_batches_together_are_the_whole_batch_whatever_was_asked_before(micro_batch_size):
    whole, parts = BucketBatches((17, 9, 5), 6, 6, seed=5), BucketBatches((17, 9, 5), 6, micro_batch_size, seed=5)
    for step in (1000, 0, 7, 1000, 3):
        cut = torch.cat([parts.indices(step, micro) for micro in range(parts.num_micro_batches)])
        assert torch.equal(cut, whole.indices(step, 0))
    assert whole.num_samples == 31


@pytest.mark.parametrize("size", [3, 10, 12])
def test_one_bucket_is_the_stream_without_buckets(size):
    ours, plain = BucketBatches((size,), 4, 2, seed=1), MicroBatches(size, 4, 2, derive_seed(1, "bucket", 0))
    for step, micro in itertools.product(range(20), range(2)):
        assert torch.equal(ours.indices(step, micro), plain.indices(step, micro))


def test_sizes_that_do_not_fit_are_refused():
    for sizes in ((), (3, 0)):
        with pytest.raises(UserError, match="^every bucket needs at least one sample; got .* Leave empty buckets out"):
            BucketBatches(sizes, 4, 4, seed=0)
    with pytest.raises(UserError, match="micro_batch_size must divide batch_size"):
        BucketBatches((3, 4), 4, 3, seed=0)
    for step, micro in ((-1, 0), (0, 2)):
        with pytest.raises(ValueError, match="must be"):
            BucketBatches((8, 4), 4, 2, seed=0).indices(step, micro)


def test_sources_laid_end_to_end_hand_out_states_of_one_shape():
    tall, wide = torch.rand(3, 1, 4, 2), torch.rand(5, 1, 2, 4)
    source = BucketedSource({(4, 2): ImageSource(tall), (2, 4): ImageSource(wide, torch.arange(5))})
    assert source.sizes == (3, 5) and source.num_samples == 8
    assert torch.equal(source.take(torch.tensor([2, 0]), torch.Generator()).x0, tall[[2, 0]])
    taken = source.take(torch.tensor([3, 7]), torch.Generator())
    assert torch.equal(taken.x0, wide[[0, 4]]) and taken.values["class_labels"].tolist() == [0, 4]
    with pytest.raises(ValueError, match=r"holds one bucket; got samples of buckets \[0, 1\]"):
        source.take(torch.tensor([2, 3]), torch.Generator())
    batches = BucketBatches(source.sizes, 4, 2, seed=0)
    for step, micro in itertools.product(range(20), range(2)):
        assert source.take(batches.indices(step, micro), torch.Generator()).x0.shape[0] == 2
