"""The processes that share a piece of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Processes(NamedTuple):
    """Which process of how many this is, how to wait for the others and to learn the largest number that any says, and whether to stop."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    max: Callable[[int], int] = lambda number: number
    asked_to_stop: Callable[[], bool] = lambda: False

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.index == 0

    def any(self, yes: bool) -> bool:
        """Return whether any says yes; all of them ask together."""
        return bool(self.max(int(yes)))


ALONE = Processes()
