"""Time of an action, and the ratio of two times that were taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

RESAMPLES = 2000


class Clock(Protocol):
    """Runs an action and returns how long it took, in seconds."""

    def __call__(self, action: Callable[[], object]) -> float:
        """Run and time it."""
        ...


def processor_time(action: Callable[[], object]) -> float:
    """Return the time the processor spent on an action: other work on the machine changes it least. For one thread."""
    start = time.process_time()
    action()
    return time.process_time() - start


def wall_time(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the time that passed during an action, and until this device was done with it; all waiting is included."""
    start = time.perf_counter()
    action()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def gpu_time(action: Callable[[], object]) -> float:
    """Return the time between two events of the GPU around an action that begins and ends with an idle GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return gpu_time if device.type == "cuda" else processor_time


class Ratio(NamedTuple):
    """A ratio of times: the median of its pairs, and the interval that holds the median of such pairs with 95 %."""

    median: float
    low: float
    high: float


def paired_ratio(times: Sequence[float], others: Sequence[float], seed: int = 0) -> Ratio:
    """Return the ratio of two series of times of which the k-th were taken right after each other.

    A slow moment of the machine meets both of a pair, so their ratio says more than the ratio of two medians. The interval is
    the bootstrap's: quantiles of the median over pairs drawn with replacement.

    Raises:
        ValueError: series of different lengths, or empty ones.
    """
    if len(times) != len(others) or not times:
        raise ValueError(f"a paired ratio needs as many times as others, at least one; got {len(times)} and {len(others)}.")
    ratios = torch.tensor(times, dtype=torch.float64) / torch.tensor(others, dtype=torch.float64)
    drawn = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=torch.Generator().manual_seed(seed))
    medians = ratios[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(statistics.median(ratios.tolist()), low, high)
