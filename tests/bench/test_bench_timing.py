"""What clocks read, and ratios of times taken in turns, in closed form."""

import itertools
import time

import pytest
import torch

from diffdistill.bench.timing import clock_of, gpu_time, paired_ratio, processor_time, wall_time


@pytest.fixture
def told(monkeypatch):
    """What is done, in order, with clocks that are 3 s later whenever they are read and a GPU's that is 1500 ms later."""
    done = []

    class Event:
        names = iter(("start", "end"))

        def __init__(self, enable_timing):
            self.name = next(Event.names)

        def record(self):
            done.append(self.name)

        def synchronize(self):
            done.append(f"waited for {self.name}")

        def elapsed_time(self, other):
            return 1500.0 if (self.name, other.name) == ("start", "end") else -1500.0

    for clock in ("process_time", "perf_counter"):
        readings = itertools.count(10.0, 3.0)
        monkeypatch.setattr(time, clock, lambda clock=clock, readings=readings: done.append(clock) or next(readings))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: done.append("synchronized"))
    return done


@pytest.mark.parametrize(
    ("clock", "seconds", "order"),
    [
        (processor_time, 3.0, ["process_time", "acted", "process_time"]),
        (wall_time, 3.0, ["perf_counter", "acted", "perf_counter"]),
        (lambda act: wall_time(act, torch.device("cpu")), 3.0, ["perf_counter", "acted", "perf_counter"]),
        (lambda act: wall_time(act, torch.device("cuda")), 3.0, ["perf_counter", "acted", "synchronized", "perf_counter"]),
        (gpu_time, 1.5, ["synchronized", "start", "acted", "end", "waited for end"]),
    ],
)
def test_a_clock_reads_the_time_between_the_beginning_and_the_end_of_what_is_done(told, clock, seconds, order):
    assert clock(lambda: told.append("acted")) == seconds
    assert told == order


def test_a_gpu_has_a_clock_of_its_own():
    assert clock_of(torch.device("cuda")) is gpu_time and clock_of(torch.device("cpu")) is processor_time


def test_a_fixed_factor_is_found_whatever_the_machine_did_meanwhile():
    floors = [1.0, 7.0, 0.2, 3.0, 90.0]
    found = paired_ratio([1.1 * floor for floor in floors], floors)  # 1.1 has no float32, so that a rounded series is seen
    assert found == pytest.approx((1.1, 1.1, 1.1), rel=1e-12)


def test_the_median_is_of_the_ratios_and_not_the_ratio_of_medians():
    assert paired_ratio([1.0, 20.0, 300.0], [1.0, 10.0, 100.0]).median == 2.0
    assert paired_ratio([300.0, 20.0, 1.0], [1.0, 10.0, 100.0]).median == 2.0
    assert paired_ratio([4.0, 5.0, 6.0], [2.0, 1.0, 6.0]).median == 2.0  # of medians: 5 / 2


def test_the_first_series_is_above_the_line():
    assert paired_ratio([2.0], [1.0]).median == 2.0


def test_the_interval_holds_the_median_and_narrows_with_more_pairs():
    few = [1.0 + 0.1 * (k % 5) for k in range(5)]
    many = few * 20
    wide, narrow = (paired_ratio(times, [1.0] * len(times)) for times in (few, many))
    assert wide.low <= wide.median == pytest.approx(1.2) == narrow.median <= wide.high
    assert narrow.high - narrow.low < wide.high - wide.low


def test_the_interval_covers_the_true_median_nineteen_times_in_twenty():
    draws = 1 + 0.1 * torch.randn(200, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = sum(found.low <= 1 <= found.high for found in (paired_ratio(row, [1.0] * 25) for row in draws.tolist()))
    assert 0.90 <= held / 200 <= 0.99


@pytest.mark.parametrize(("times", "others"), [([], []), ([1.0], [1.0, 2.0])])
def test_series_that_are_no_pairs_are_refused(times, others):
    with pytest.raises(ValueError, match="as many times as others"):
        paired_ratio(times, others)
