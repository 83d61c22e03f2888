"""Atomic files and folders: what is on disk is either the whole old thing or the whole new one.

Both are written under a hidden name beside their place and take it when they are complete. What a killed process leaves under
such a name is nobody's; `remove_leftovers` deletes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdistill.errors import MachineError, UserError

if TYPE_CHECKING:
    from torch import Tensor

CACHE = Path.home() / ".cache" / "diffdistill"
"""Where what can be made again is kept, unless told otherwise."""


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn the system's errors of a full disk and of a place that cannot be written, while `path` is written, into MachineError."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise MachineError(
                f"no space left while writing {path}; what was there before is untouched. "
                "Free some space and run the same command again."
            ) from error
        if (number := _errno(error)) in (errno.EACCES, errno.EROFS):
            raise MachineError(f"cannot write {path}: {os.strerror(number)}. Choose another folder.") from error
        raise


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that a disk, or the share of it that one may use, is full."""
    return _errno(error) in (errno.ENOSPC, errno.EDQUOT)


def _errno(error: BaseException) -> int | None:
    """Return the system's number of an error; safetensors does not raise OSError, but it quotes the number."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | Path, content: str | bytes, durable: bool = True) -> Path:
    """Write a file aside, flush it to disk and rename it into place.

    Args:
        path: the file; its folder is made where there is none.
        content: all of it.
        durable: False leaves the flush to the system, for files that are many and can be made again: whole after a kill of this
            process, perhaps not after a loss of power.
    Raises:
        MachineError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    aside = _aside(path)
    data = content.encode() if isinstance(content, str) else content
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as handle:
                handle.write(data)
                if durable:
                    handle.flush()
                    os.fsync(handle.fileno())
            os.replace(aside, path)
            if durable:
                _fsync(path.parent)
        finally:
            aside.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON, atomically."""
    return write_atomic(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; on success flush every file and let it take the place of `path`, else delete it.

    An existing folder at `path` is replaced only when the new one is complete.

    Raises:
        MachineError: the disk is full or the place cannot be written; the old folder is untouched.
    """
    path = Path(path)
    aside = _aside(path)
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            for inside in (*aside.rglob("*"), aside):
                if not inside.is_symlink():
                    _fsync(inside)
            if path.exists():
                _exchange(aside, path)  # what was at `path` is deleted below
            else:
                os.replace(aside, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a folder of the temporary directory and remove it in the end, also that by SIGTERM, which then ends the program as an exit does.

    Outside the main thread, where Python allows no handlers, SIGTERM leaves the folder behind.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        if threading.current_thread() is not threading.main_thread():
            yield Path(folder)
            return
        previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            yield Path(folder)
        finally:
            signal.signal(signal.SIGTERM, previous)


def remove_leftovers(folder: str | Path) -> None:
    """Delete what killed processes of this machine left half written in a folder; what others may be writing stays."""
    written_here = re.compile(rf"\..+\.{re.escape(platform.node())}-(\d+)\.tmp")
    for path in Path(folder).glob(".*.tmp"):
        if (found := written_here.fullmatch(path.name)) and not _runs(int(found[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """Return the hidden name under which this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(a: Path, b: Path) -> None:
    """Let two folders change names, at once where the system can (Linux); elsewhere there is a moment without `b`."""
    exchange = 2  # RENAME_EXCHANGE, of linux/fs.h
    here = -100  # AT_FDCWD
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    between = a.with_name(f"{a.name}.old")
    os.replace(b, between)
    os.replace(a, b)
    os.replace(between, a)


def inside(folder: str | Path, name: str) -> Path:
    """Return folder / name, of a name that was read from a file.

    Raises:
        UserError: the name is absolute, empty, or leads out of the folder.
    """
    path, root = os.path.normpath(os.path.join(folder, name)), os.path.normpath(folder)
    if os.path.commonpath([os.path.abspath(path), os.path.abspath(root)]) != os.path.abspath(root) or path == root:
        raise UserError(
            f"the name {name!r} leads out of {folder}; names are relative and have no '..'. Nothing is read or written there."
        )
    return Path(path)


def read_tensors(path: str | Path, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file into memory: the notes in its header, and its tensors.

    Raises:
        UserError: no such file, or a damaged one; it says that `what` cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {what} from {path}: {error}") from error


def sha256(path: str | Path) -> str:
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of the canonical JSON (sorted keys, no spaces) of a mapping."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()
