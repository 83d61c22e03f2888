"""Work on images in threads. Pillow and torch let go of Python's lock while they decode, resize and encode, so threads are enough."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def usual_threads() -> int:
    """Return how many threads work on images where nobody says: the cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, ahead: int | None = None
) -> Iterator[Result]:
    """Yield function(item) for each item, in their order, computed by threads while the caller works on what came before.

    Items are taken by the calling thread, no sooner than needed. An exception of the function is raised in its item's turn.

    Args:
        function: called in the threads.
        items: what it is called with.
        num_threads: at least 1.
        ahead: results that may wait or be under way while the caller works, None for twice the threads. Memory is bounded by it.
    """
    ahead = 2 * num_threads if ahead is None else ahead
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
