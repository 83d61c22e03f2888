"""Reading a file of JSON lines that another process writes, perhaps on another machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NO_FILE = (-1, -1)  # in place of device and inode


class Tail:
    """The records of a file of JSON lines; each update reads only what is new.

    A line that is not finished yet is left for the next update, one that cannot be read is passed over, and a file that was replaced or
    cut, as a resumed run does, is read anew.

    Attributes:
        lines: the records so far, oldest first; only mappings with a whole number `step`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._file, self._read = NO_FILE, 0

    def update(self) -> None:
        """Read on."""
        try:
            handle = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            self._forget()
            return
        with handle:
            found = os.fstat(handle.fileno())
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._read:
                self._forget()
            self._file = (found.st_dev, found.st_ino)
            handle.seek(self._read)
            whole, newline, _ = handle.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        self.lines += [record for line in whole.splitlines() if (record := _record(line)) is not None]

    def _forget(self) -> None:
        self.lines = []
        self._file, self._read = NO_FILE, 0


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
