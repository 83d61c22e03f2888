"""Sets of images in one file: written for ADM's evaluator and read back, never held whole."""

import tracemalloc
import weakref
import zipfile

import numpy as np
import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.image_files import read_images, write_images


def numbered_images(count, height=4, width=5):
    """Images whose every byte is its own: channels, rows, columns and order cannot be mixed up unseen."""
    return (torch.arange(count * 3 * height * width) % 251).to(torch.uint8).reshape(count, 3, height, width)


def test_images_are_written_as_one_nhwc_array_and_read_back(tmp_path):
    images = numbered_images(7)
    path = write_images(tmp_path / "samples.npz", images.split([3, 0, 4]), count=7)
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        np.testing.assert_array_equal(stored["arr_0"], images.permute(0, 2, 3, 1).numpy())
    batches = list(read_images(path, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(batches), images)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_images_beside_statistics_are_read(tmp_path):
    np.savez(tmp_path / "set.npz", mu=np.zeros(2), arr_0=np.zeros((5, 4, 2, 3), np.uint8), sigma=np.eye(2))
    assert torch.cat(list(read_images(tmp_path / "set.npz"))).shape == (5, 3, 4, 2)


def test_the_same_images_in_other_batches_are_the_same_file(tmp_path):
    images = numbered_images(6)
    first = write_images(tmp_path / "first.npz", images.split(1), count=6)
    assert first.read_bytes() == write_images(tmp_path / "second.npz", images.split(4), count=6).read_bytes()
    assert zipfile.ZipFile(first).getinfo("arr_0.npy").date_time[0] == 1980  # nor do they depend on the day


def test_images_are_held_one_batch_at_a_time(tmp_path):
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
    for _ in read_images(path, batch_size=4):
        pass
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


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3)),
        np.zeros((2, 48), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8, order="F"),
    ],
    ids=["channels first", "floats", "flat", "columns first"],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array):
    np.savez(tmp_path / "set.npz", array)
    with pytest.raises(UserError, match="arr_0 of .* images are uint8"):
        next(read_images(tmp_path / "set.npz"))


def test_images_that_end_early_are_refused(tmp_path):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (9, 4, 5, 3)})
        member.write(bytes(4 * 4 * 5 * 3))
    images = read_images(path, batch_size=3)
    assert len(next(images)) == 3
    with pytest.raises(UserError, match="9 images are announced"):
        list(images)
    np.savez(path, mu=np.zeros(2))
    with pytest.raises(UserError, match="no item named 'arr_0.npy'"):
        next(read_images(path))
