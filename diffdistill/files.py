"""Atomic files and folders: what is on disk is either the whole old thing or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffdistill.errors import MachineError

CACHE = Path.home() / ".cache" / "diffdistill"
"""Where what can be made again is kept, unless told otherwise."""


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"no space left while writing {path}; what was there before is untouched. "
                "Free some space and run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise MachineError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error
        raise


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
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with _explained(path):
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
    """Yield a folder beside `path` to fill; on success flush every file and rename it to `path`, else delete it.

    An existing folder at `path` is replaced only after the new one is complete.

    Raises:
        MachineError: the disk is full or the place cannot be written; the old folder is untouched.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    _fsync(file)
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            if path.exists():
                os.replace(path, old)
            os.replace(aside, path)
            _fsync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


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
