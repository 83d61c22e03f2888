"""A process that dies by SIGKILL at a chosen file operation, so that every moment at which a disk can be left can be tried."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

# What Python reports before it does it (sys.addaudithook). Reading is among it, which is harmless: a kill there is one more moment.
OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "os.link",
    "os.truncate",
    "ctypes.dlsym",
}
SURVIVED = 0


class Watch:
    """Counts this process's file operations below a folder, and kills it before the n-th.

    Args:
        folder: where operations count; None for everywhere.
        kill_before: which operation the process does not live to do, from 0; None for a count alone.
    """

    def __init__(self, folder: Path | None, kill_before: int | None = None) -> None:
        self.count, self._folder, self._kill_before = 0, None if folder is None else os.fspath(folder), kill_before
        real = os.fsync
        os.fsync = lambda handle: (self._seen(), real(handle))[1]  # not among what is reported
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and (event == "ctypes.dlsym" or self._is_inside(arguments)):
            self._seen()

    def _is_inside(self, arguments: tuple[Any, ...]) -> bool:
        places = [os.fsdecode(place) for place in arguments[:2] if isinstance(place, str | bytes | os.PathLike)]
        return self._folder is None or any(place.startswith(self._folder) for place in places)

    def _seen(self) -> None:
        if self.count == self._kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def in_child(action: Callable[[], object], folder: Path, kill_before: int | None = None) -> int:
    """Run an action in a fork of this process and return how it ended: SURVIVED, -SIGKILL, or 1 for an exception."""
    child = os.fork()
    if child == 0:
        _end(lambda: (Watch(folder, kill_before), action()))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end(action: Callable[[], object]) -> NoReturn:
    """Do an action and end this process, a fork, with SURVIVED, or with 1 after the traceback of an exception."""
    status = 1
    try:
        torch.set_num_threads(1)  # those of the parent are not in the fork
        action()
        status = SURVIVED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kills(action: Callable[[], object], folder: Path) -> Iterator[int]:
    """Kill the action before its first file operation, its second, and so on until it survives; yield after each kill."""
    for moment in range(10_000):
        if (ended := in_child(action, folder, moment)) == SURVIVED:
            return
        assert ended == -signal.SIGKILL, f"the action failed before operation {moment}"
        yield moment
    raise AssertionError("the action does not end")


def count_operations(action: Callable[[], object], folder: Path) -> int:
    """Return how many file operations an action makes below a folder."""
    reader, writer = os.pipe()

    def counted() -> None:
        watch = Watch(folder)
        action()
        os.write(writer, str(watch.count).encode())

    assert in_child(counted, folder) == SURVIVED
    os.close(writer)
    with open(reader) as pipe:
        return int(pipe.read())


def killed_after(action: Callable[[], object], folder: Path, seconds: float) -> int:
    """Run an action in a fork of this process and kill it after a time; return how it ended, as `in_child`."""
    child = os.fork()
    if child == 0:
        _end(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
