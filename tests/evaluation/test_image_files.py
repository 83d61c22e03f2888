"""Images written: as the file of ADM's evaluator, never held whole, and as PNGs in the background."""

import tracemalloc
import weakref
import zipfile

import numpy as np
import pytest
import torch

from diffdistill.evaluation.image_files import write_images
from diffdistill.evaluation.image_sources import open_images


def numbered_images(count, height=4, width=5):
    """Images whose every byte is its own: channels, rows, columns and order cannot be mixed up unseen."""
    return (torch.arange(count * 3 * height * width) % 251).to(torch.uint8).reshape(count, 3, height, width)


def test_images_are_written_as_one_nhwc_array_and_read_back(tmp_path):
    images = numbered_images(7)
    path = write_images(tmp_path / "samples.npz", images.split([3, 0, 4]), count=7)
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        np.testing.assert_array_equal(stored["arr_0"], images.permute(0, 2, 3, 1).numpy())
    batches = list(open_images(path).batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(batches), images)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_the_same_images_in_other_batches_are_the_same_file(tmp_path):
    images = numbered_images(6)
    first = write_images(tmp_path / "first.npz", images.split(1), count=6)
    assert first.read_bytes() == write_images(tmp_path / "second.npz", images.split(4), count=6).read_bytes()
    assert zipfile.ZipFile(first).getinfo("arr_0.npy").date_time[0] == 1980  # nor do they depend on the day


def test_images_are_written_one_batch_at_a_time(tmp_path):
    megabyte = 1 << 20
    living = weakref.WeakSet()

    def drawn():
        for _ in range(40):
            assert len(living) <= 1
            batch = torch.zeros(4, 3, 256, 256, dtype=torch.uint8)  # 0.75 MB
            living.add(batch)
            yield batch

    tracemalloc.start()  # sees what numpy and Python hold, not torch
    path = write_images(tmp_path / "many.npz", drawn(), count=160)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 30 * megabyte and peak < 6 * megabyte


BAD_BATCHES = {
    "too few": ([numbered_images(2)], "3 images were announced; got 2"),
    "too many": ([numbered_images(4)], "3 images were announced; got 4"),
    "none": ([], "3 images were announced; got 0"),
    "gray": ([numbered_images(3)[:, :1]], r"uint8 \(B, 3, H, W\)"),
    "floats": ([numbered_images(3) / 255], r"uint8 \(B, 3, H, W\)"),
    "two sizes": ([numbered_images(2), numbered_images(1, height=5)], r"one size; got \(4, 5\) and \(5, 5\)"),
}


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_images_that_do_not_fit_leave_what_was_there(tmp_path, batches, message):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write_images(path, batches, count=3)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_a_generator_that_fails_leaves_what_was_there(tmp_path):
    def failing():
        yield numbered_images(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path / "samples.npz", failing(), count=2)
    assert list(tmp_path.iterdir()) == []
