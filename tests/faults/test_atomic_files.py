"""Atomic files and folders: killed before any of their file operations, the old thing or the new one is there, whole."""

import os
import signal

import pytest
from disks import on_a_small_disk
from kills import SURVIVED, in_child, kills

from diffdistill import files
from diffdistill.errors import MachineError
from diffdistill.files import atomic_folder, remove_leftovers, temporary_folder, write_atomic


def content(folder):
    """Return the files of a folder that have a name of their own, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def test_a_file_is_the_old_or_the_new_one_whenever_its_writer_is_killed(tmp_path):
    path, old, new = tmp_path / "file", "old" * 10_000, "new" * 20_000
    seen = set()
    write_atomic(path, old)
    for _ in kills(lambda: write_atomic(path, new), tmp_path):
        assert path.read_text() in (old, new)
        seen.add(path.read_text())
        write_atomic(path, old)
    assert seen == {old, new} and path.read_text() == new  # killed after the rename it is the new one


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "a").write_text(text)
    (folder / "inner" / "b").write_text(text)


def replace(path, text):
    with atomic_folder(path) as folder:
        fill(folder, text)


def whole(text):
    return {"folder/a": text, "folder/inner/b": text}


def test_a_folder_is_the_old_or_the_new_one_whenever_its_writer_is_killed(tmp_path):
    path, seen = tmp_path / "folder", []
    replace(path, "old")
    for _ in kills(lambda: replace(path, "new"), tmp_path):
        assert content(tmp_path) in (whole("old"), whole("new"))
        seen.append(content(tmp_path)["folder/a"])
        replace(path, "old")
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}  # one moment divides them
    assert content(tmp_path) == whole("new") and list(tmp_path.iterdir()) == [path]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    path, seen = tmp_path / "folder", set()
    for _ in kills(lambda: replace(path, "new"), tmp_path):
        seen.add(path.exists())
        assert content(tmp_path) == (whole("new") if path.exists() else {})
        if path.exists():
            break
    assert seen == {False, True}


def test_without_an_exchange_the_old_folder_comes_back_by_its_other_name(tmp_path, monkeypatch):
    """Where the system cannot exchange two names, a kill in between leaves the old folder under a hidden one: nothing is lost."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: None)
    path = tmp_path / "folder"
    replace(path, "old")
    for _ in kills(lambda: replace(path, "new"), tmp_path):
        kept = [place for place in (path, *tmp_path.glob(".folder*")) if (place / "inner" / "b").is_file()]
        assert kept and (kept[0] / "a").read_text() in ("old", "new")
        replace(path, "old")
    assert content(tmp_path) == whole("new")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    with atomic_folder(tmp_path / "living") as living:  # this process lives
        assert in_child(lambda: replace(tmp_path / "dead", "text"), tmp_path, kill_before=4) != SURVIVED
        (tmp_path / ".elsewhere.another-machine-1.tmp").write_text("another machine's; its processes are not known here")
        assert len(list(tmp_path.glob(".dead.*.tmp"))) == 1
        remove_leftovers(tmp_path)
        assert list(tmp_path.glob(".dead.*.tmp")) == []
        assert living.is_dir() and (tmp_path / ".elsewhere.another-machine-1.tmp").exists()
        fill(living, "text")
    assert (tmp_path / "living" / "a").read_text() == "text"


def test_an_exception_leaves_the_old_folder_and_no_litter(tmp_path):
    replace(tmp_path / "folder", "old")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as folder:
        fill(folder, "new")
        raise KeyError
    assert content(tmp_path) == whole("old") and os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    write_atomic(tmp_path / "file", "old")

    def fill_the_disk():
        full = tmp_path / "file"
        with pytest.raises(MachineError, match=f"no space left while writing {full}; what was there before is untouched"):
            write_atomic(full, "x" * 5_000_000)

    on_a_small_disk(tmp_path, fill_the_disk)


@pytest.fixture
def deaf_to_sigterm():
    """What is not caught by the code under test ends nothing."""

    def deaf(*_):
        pass

    before = signal.signal(signal.SIGTERM, deaf)
    yield deaf
    signal.signal(signal.SIGTERM, before)


def test_a_temporary_folder_is_removed_and_its_program_ended_by_sigterm(deaf_to_sigterm):
    with pytest.raises(SystemExit) as ended, temporary_folder("mine-") as folder:
        (folder / "file").write_text("large")
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert folder.name.startswith("mine-") and not folder.exists()
    assert signal.getsignal(signal.SIGTERM) is deaf_to_sigterm
