"""The processes that share a piece of work."""

from __future__ import annotations

import math
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

    def sharing(self, num: int, in_step: bool) -> Processes:
        """Return who shares `num` equal pieces of work: these, or each for itself where all must do as much and it cannot be shared out evenly."""
        return ALONE if in_step and num % self.count else self

    def share(self, num: int) -> int:
        """Return how many of `num` pieces are a process's share; the last ones' may be smaller, or none."""
        return math.ceil(num / self.count)


ALONE = Processes()
