"""Threads in the place of processes: what several processes decide together, without starting any."""

import threading
from concurrent.futures import ThreadPoolExecutor

from diffdistill.processes import Processes


def in_threads(count, work, asked_to_stop=lambda index: False):
    """Return what `work(processes)` returns, or the exception it raises, in each of `count` threads that wait for each other."""
    said, barrier = [0] * count, threading.Barrier(count, timeout=20)

    def largest(index, number):
        said[index] = number
        barrier.wait()
        found = max(said)
        barrier.wait()
        return found

    def member(index):
        processes = Processes(
            index, count, lambda: barrier.wait(), lambda number: largest(index, number), lambda: asked_to_stop(index)
        )
        try:
            return work(processes)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(member, range(count)))
