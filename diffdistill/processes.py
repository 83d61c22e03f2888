"""The processes that share a piece of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Processes(NamedTuple):
    """Which process of how many this is, how to wait for the others and to ask all whether any says yes, and whether it should stop."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    any: Callable[[bool], bool] = lambda yes: yes
    asked_to_stop: Callable[[], bool] = lambda: False

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.index == 0


ALONE = Processes()
