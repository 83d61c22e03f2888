"""Disks that are really full or read-only: what was saved stays, the message says so, and the run goes on once it can."""

import errno
import os
from pathlib import Path

import pytest
from disks import on_a_read_only_disk, on_a_small_disk
from tiny_runs import final_hashes, run_config, save_teacher

from diffdistill.cli import main
from diffdistill.config import dump_config
from diffdistill.errors import MachineError
from diffdistill.training import checkpoint
from diffdistill.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher and the run that nothing stops."""
    folder = tmp_path_factory.mktemp("disks")
    save_teacher(folder / "teacher")
    train(config(folder, folder / "straight"), progress=False)
    return folder


def config(folder, output, **changes):
    samples = {"every_steps": 5, "num": 4}
    logging = {"every_steps": 1, "tensorboard": True}
    return run_config(folder / "teacher", output, samples=samples, logging=logging, **changes)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill(folder: Path, keep_bytes: int = 0) -> Path:
    """Write a file until the disk is full but for `keep_bytes`."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as handle:
        try:
            while handle.write(b"\0" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.truncate(path, max(0, path.stat().st_size - keep_bytes))
    return path


@pytest.mark.parametrize("room", [0, 10_000, 300_000])
def test_a_disk_that_fills_up_keeps_the_checkpoints_and_the_run_goes_on_when_there_is_room(folder, tmp_path, monkeypatch, room):
    """`room` bytes are left after the first checkpoint: too few for a line of the log, for samples, for a second checkpoint."""
    true = checkpoint.save
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    one = size_of(folder / "straight" / "checkpoints" / "step_0000006")
    assert room < one

    def save(*arguments):
        path = true(*arguments)
        if not (disk / "filler").exists():
            fill(disk, room)
        return path

    def train_on_it():
        monkeypatch.setattr(checkpoint, "save", save)
        with pytest.raises(MachineError, match=r"no space left.* last good checkpoint is .*step_0000003"):
            train(config(folder, run), progress=False)
        assert [path.name for path in checkpoint.available(run / "checkpoints")] == ["step_0000003"]
        assert checkpoint.find_fault(run / "checkpoints" / "step_0000003") is None
        assert not list(run.rglob(".*"))  # nothing half written takes room
        (disk / "filler").unlink()
        monkeypatch.setattr(checkpoint, "save", true)
        train(config(folder, run), resume=True, progress=False)
        assert final_hashes(run) == final_hashes(folder / "straight")

    on_a_small_disk(disk, train_on_it, size=str(8 * one + 2**20))


@pytest.mark.parametrize("room", ["8k", "64k"])
def test_an_export_that_fills_the_disk_leaves_nothing_of_itself(folder, tmp_path, capfd, room):
    """The weights are written by diffusers, whose error is that of safetensors."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def export_to_it():
        assert main(["export", str(folder / "straight"), "-o", str(disk / "export")]) == 1
        assert not list(disk.iterdir())

    on_a_small_disk(disk, export_to_it, size=room)
    message = capfd.readouterr().err
    assert "failed: no space left while writing" in message and str(disk / "export") in message and "Traceback" not in message


def test_a_read_only_folder_is_told_before_the_teacher_is_loaded(folder, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run.yaml").write_text(dump_config(config(folder, disk / "run")))

    def train_on_it():
        assert main(["train", str(tmp_path / "run.yaml")]) == 1

    on_a_read_only_disk(disk, train_on_it)
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and f"{disk}" in message and "Read-only file system" in message


def test_a_run_folder_that_became_read_only_can_still_be_loaded_from(folder, tmp_path):
    from diffdistill.training.loading import load_run

    def load():
        assert load_run(folder / "straight").step == 10

    on_a_read_only_disk(folder, load)
