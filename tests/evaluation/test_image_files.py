"""Images written: as the file of ADM's evaluator, never held whole, and as PNGs in the background."""

import errno
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.errors import MachineError, UserError
from diffdistill.evaluation.image_files import PngWriter, write_images
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


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_keep_every_byte_and_are_numbered(tmp_path, channels):
    images = torch.randint(0, 256, (21, channels, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with PngWriter(tmp_path / "out", num_threads=2, most_waiting=4) as writer:
        writer.add(images[:13], 100)
        writer.add(images[13:], 113)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{k:06d}.png" for k in range(100, 121)]
    assert torch.equal(torch.cat(list(open_images(tmp_path / "out").batches(8))), images)
    with Image.open(tmp_path / "out" / "000100.png") as stored:
        assert stored.format == "PNG" and stored.mode == {1: "L", 3: "RGB"}[channels]


def test_the_layout_can_be_another(tmp_path):
    with PngWriter(tmp_path, layout=lambda index: f"{index // 4:05d}/samples/{index % 4:04d}.png") as writer:
        writer.add(numbered_images(6), 0)
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png"))
    assert files == [f"0000{k // 4}/samples/000{k % 4}.png" for k in range(6)]


def test_a_resumed_run_writes_the_same_files(tmp_path):
    def contents(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    images = numbered_images(9)
    with PngWriter(tmp_path / "whole") as writer:
        writer.add(images, 0)
    with PngWriter(tmp_path / "parts") as writer:
        writer.add(images[:6], 0)
    with PngWriter(tmp_path / "parts") as writer:  # goes back to the last record of what is done
        writer.add(images[4:], 4)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_flush_waits_for_every_file(tmp_path):
    writer = PngWriter(tmp_path, num_threads=1)
    writer.add(torch.zeros(20, 3, 64, 64, dtype=torch.uint8), 0)
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 20
    writer.close()


def test_waiting_images_are_bounded(tmp_path, monkeypatch):
    going = threading.Event()
    written = []

    def wait_then_note(path, content, durable):
        going.wait(10)
        written.append(path)

    monkeypatch.setattr("diffdistill.evaluation.image_files.write_atomic", wait_then_note)
    handed = []

    def hand_over():
        with PngWriter(tmp_path, num_threads=2, most_waiting=5) as writer:
            for k in range(12):
                writer.add(numbered_images(1), k)
                handed.append(k)

    thread = threading.Thread(target=hand_over)
    thread.start()
    while len(handed) < 5:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(handed) == 5 and not written
    going.set()
    thread.join(10)
    assert len(written) == len(handed) == 12


@pytest.mark.parametrize("method", ["add", "flush", "close"])
def test_a_full_disk_is_said_by_the_next_call(tmp_path, monkeypatch, method):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffdistill.files.os.replace", full)
    writer = PngWriter(tmp_path, most_waiting=1)
    writer.add(numbered_images(1), 7)
    arguments = (numbered_images(1), 8) if method == "add" else ()
    with pytest.raises(MachineError, match=r"no space left while writing .*000007.png.*Free some space"):
        getattr(writer, method)(*arguments)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    writer.close()


def test_an_error_on_its_way_is_not_hidden_by_one_of_a_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffdistill.files.os.replace", full)
    with pytest.raises(KeyboardInterrupt), PngWriter(tmp_path) as writer:
        writer.add(numbered_images(1), 0)
        raise KeyboardInterrupt
    assert not any(thread.name.startswith("png") for thread in threading.enumerate())


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(UserError, match="out is a file; images are written to a folder"):
        PngWriter(tmp_path / "out")


def test_wrong_images_are_refused(tmp_path):
    with PngWriter(tmp_path) as writer, pytest.raises(ValueError, match="uint8"):
        writer.add(torch.zeros(1, 3, 4, 4), 0)


KILLED = """
import sys, torch
from diffdistill.evaluation.image_files import PngWriter
writer = PngWriter(sys.argv[1], num_threads=2)
images = torch.randint(0, 256, (16, 3, 128, 128), dtype=torch.uint8)
for k in range(1000):
    writer.add(images, 16 * k)
    print(k, flush=True)
"""


def test_a_killed_process_leaves_whole_files(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(10):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    source = open_images(tmp_path)
    assert len(source) > 20
    assert sum(len(batch) for batch in source.batches(32)) == len(source)
