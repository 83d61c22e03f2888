"""A disk that is really full, and a folder that really cannot be written: file systems of the test's own, where the system allows it."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

NEWUSER, NEWNS = 0x10000000, 0x00020000  # of linux/sched.h
RDONLY, REMOUNT, BIND, PRIVATE, REC = 1, 32, 4096, 1 << 18, 16384  # of linux/mount.h
CANNOT = 77


def on_a_small_disk(folder: Path, action: Callable[[], object], size: str = "1m") -> None:
    """Run an action in a child that sees a disk of `size` bytes mounted at the folder, with copies of the files there."""

    def mount(libc: ctypes.CDLL) -> None:
        kept = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        _mount(libc, b"tmpfs", folder, b"tmpfs", 0, f"size={size}".encode())
        for path, content in kept.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)

    _in_namespace(mount, action)


def on_a_read_only_disk(folder: Path, action: Callable[[], object]) -> None:
    """Run an action in a child for which the folder's file system is mounted read-only."""

    def mount(libc: ctypes.CDLL) -> None:
        _mount(libc, os.fsencode(folder), folder, b"", BIND, b"")
        _mount(libc, os.fsencode(folder), folder, b"", BIND | REMOUNT | RDONLY, b"")

    _in_namespace(mount, action)


def _in_namespace(mount: Callable[[ctypes.CDLL], None], action: Callable[[], object]) -> None:
    """Run an action in a child with mounts of its own; fail where it raises, skip where the system allows no mounts."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # those of the parent are not in the fork
            libc = ctypes.CDLL(None, use_errno=True)
            try:
                _enter(libc)
                mount(libc)
            except OSError:
                status = CANNOT
                raise
            action()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, errors="replace") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == CANNOT:
        pytest.skip(f"this system gives tests no file system of their own: {said.splitlines()[-1]}")
    assert status == 0, said


def _enter(libc: ctypes.CDLL) -> None:
    """Give this process mounts of its own, as root or in a user namespace."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEWNS):
        _checked(libc.unshare(NEWUSER | NEWNS))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _checked(libc.mount(b"none", b"/", None, PRIVATE | REC, None))


def _mount(libc: ctypes.CDLL, source: bytes, folder: Path, kind: bytes, flags: int, options: bytes) -> None:
    _checked(libc.mount(source, os.fsencode(folder), kind, flags, options))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
