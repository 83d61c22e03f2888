import pytest
import torch

from diffdistill.data.batches import (
    ImageSource,
    LabelSource,
    MicroBatches,
    Sample,
    derive_seed,
    keyed_generator,
)
from diffdistill.errors import UserError


def stream(batches: MicroBatches, num_steps: int) -> torch.Tensor:
    micros = [batches.indices(step, m) for step in range(num_steps) for m in range(batches.num_micro_batches)]
    return torch.cat(micros)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (12, 4), (7, 14), (5, 12), (1, 3)])
def test_every_sample_occurs_once_per_epoch_also_when_batches_cross_its_end(num_samples, batch_size):
    order = stream(MicroBatches(num_samples, batch_size, batch_size, seed=3), 4 * num_samples)
    for epoch in order[: len(order) // num_samples * num_samples].split(num_samples):
        assert torch.equal(epoch.sort().values, torch.arange(num_samples))


def test_epochs_are_shuffled_differently_and_depend_on_the_seed():
    first, second = stream(MicroBatches(100, 100, 100, seed=0), 2).split(100)
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(100))
    assert not torch.equal(first, MicroBatches(100, 100, 100, seed=1).indices(0, 0))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 6, 12])
def test_micro_batches_together_are_the_whole_batch(micro_batch_size):
    whole, parts = MicroBatches(17, 12, 12, seed=5), MicroBatches(17, 12, micro_batch_size, seed=5)
    for step in range(20):
        cut = torch.cat([parts.indices(step, m) for m in range(parts.num_micro_batches)])
        assert torch.equal(cut, whole.indices(step, 0))


def test_indices_do_not_depend_on_what_was_asked_before_and_a_caller_cannot_change_them():
    batches = MicroBatches(50, 10, 5, seed=0)
    late = batches.indices(1234, 1).clone()
    for step in (0, 7, 1233):
        batches.indices(step, 0).zero_()
    again = batches.indices(1234, 1)
    assert torch.equal(late, again) and again.dtype == torch.int64
    again.zero_()
    assert torch.equal(batches.indices(1234, 1), late)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (10, 4, 3), (10, 0, 1), (10, 4, 0), (10, 2, 4)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError):
        MicroBatches(*sizes, seed=0)


def test_a_micro_batch_outside_the_step_is_refused():
    for step, micro in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="micro in"):
            MicroBatches(10, 4, 2, seed=0).indices(step, micro)


def test_seeds_are_63_bit_and_distinguish_keys_by_type_length_and_order():
    keys = [(1, 2), (2, 1), (12,), ("1", "2"), ("12",), ("1", 2), (1, 2, ""), ()]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "epoch", 3) == derive_seed(0, "epoch", 3)
    for key in (1.0, True, None):
        with pytest.raises(TypeError, match="int or str"):
            derive_seed(key)


def test_image_source_hands_out_the_rows_asked_for():
    x0 = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 2)
    taken = ImageSource(x0, torch.arange(5)).take(torch.tensor([4, 0, 4]), torch.Generator())
    assert torch.equal(taken.x0, x0[[4, 0, 4]])
    assert taken.values.keys() == {"class_labels"} and taken.values["class_labels"].tolist() == [4, 0, 4]
    assert ImageSource(x0).take(torch.tensor([1]), torch.Generator()).values == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_data_are_refused_naming_the_image(value):
    x0 = torch.zeros(6, 1, 2, 2)
    x0[3, 0, 1, 1] = value
    with pytest.raises(UserError, match="1 of 6 images.*image 3"):
        ImageSource(x0)


def test_data_out_of_range_wrong_shapes_and_wrong_labels_are_refused():
    images = torch.zeros(4, 1, 2, 2)
    with pytest.raises(UserError, match=r"127\.5"):
        ImageSource(images + 255)
    with pytest.raises(UserError, match=r"\[-1, 1\]"):
        ImageSource(images - 1.01)
    assert ImageSource(images + 3, max_abs=10).num_samples == 4
    for bad in (torch.zeros(4, 2, 2), torch.zeros(0, 1, 2, 2), torch.zeros(4, 1, 2, 2, dtype=torch.uint8)):
        with pytest.raises(UserError, match="floating tensor"):
            ImageSource(bad)
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.tensor([0, 1, -1, 2])):
        with pytest.raises(UserError, match="labels must be 4 integers"):
            ImageSource(images, labels)


def test_label_source_is_uniform_and_determined_by_the_generator():
    source, indices = LabelSource(10), torch.zeros(20_000, dtype=torch.int64)
    taken = source.take(indices, keyed_generator(0, "labels"))
    labels = taken.values["class_labels"]
    assert taken.x0 is None and labels.dtype == torch.int64 and taken.labels is labels
    counts = labels.bincount()
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * 1800**0.5  # five standard deviations of a count
    assert torch.equal(labels, source.take(indices, keyed_generator(0, "labels")).values["class_labels"])
    assert LabelSource(None).take(indices, torch.Generator()) == Sample(None, {})
