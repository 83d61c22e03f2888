"""The time left: steps at their pace and pauses at their price, on a clock that the test turns."""

from __future__ import annotations

import pytest
from tiny_runs import run_config

from diffdistill.training.progress import Progress
from diffdistill.training.run import planned_pauses

PRICES = {"samples": 5.0, "checkpoint": 20.0}
PLANNED = {"samples": list(range(10, 101, 10)), "checkpoint": [25, 50, 75, 100]}


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def trained(total, done, clock, seconds_per_step=2.0, planned=PLANNED):
    """Train, reporting at every fifth step before its pauses; yield the progress at each report."""
    progress = Progress(total, done, enabled=False, planned=planned, clock=clock)
    while progress.done < total:
        clock.now += seconds_per_step
        progress.advance()
        if progress.done % 5 == 0:
            yield progress, progress.report("")
        for kind, steps in planned.items():
            if progress.done in steps:
                with progress.pause(kind):
                    clock.now += PRICES[kind]


def test_the_time_left_is_exact_once_each_pause_was_seen():
    clock = Clock()
    promised = [(progress.done, clock.now + progress.seconds_left, speed) for progress, speed in trained(100, 0, clock)]
    assert {speed for _, _, speed in promised} == {0.5}  # pauses do not slow the steps
    assert clock.now == 1000 + 100 * 2 + 10 * 5 + 4 * 20
    assert {end for done, end, _ in promised if done > 25} == {clock.now}
    assert all(end < clock.now for done, end, _ in promised if done <= 25)


def test_a_resumed_run_counts_only_what_is_ahead():
    clock = Clock()
    ends = [clock.now + progress.seconds_left for progress, _ in trained(100, 60, clock)]
    assert ends[-1] == clock.now == 1000 + 40 * 2 + 4 * 5 + 2 * 20


def test_a_changed_pace_and_a_dearer_pause_replace_the_old_ones():
    clock = Clock()
    progress = Progress(1000, 0, enabled=False, planned={"samples": [400, 500]}, clock=clock)
    for seconds in [1] * 20 + [3] * 20:  # the last 20 reports count
        clock.now += seconds
        progress.advance()
        progress.report("")
    assert progress.seconds_left == 960 * 3
    for seconds in (50, 7):  # the first grid has the teacher's images to make
        with progress.pause("samples"):
            clock.now += seconds
    assert progress.seconds_left == 960 * 3 + 2 * 7


def test_what_is_not_known_yet_is_named(capsys):
    clock = Clock()
    progress = Progress(100, 0, enabled=True, planned={"samples": [50], "checkpoint": [50, 100]}, clock=clock)
    clock.now += 10
    progress.advance(10)
    with progress.pause("samples"):
        pass
    progress.report("stage")
    assert "1m30s left + checkpoint " in capsys.readouterr().out


def test_what_was_there_already_does_not_hasten_the_pace():
    clock = Clock()
    progress = Progress(100, 0, enabled=False, clock=clock)
    assert progress.seconds_left is None
    progress.skip(50)
    clock.now += 20
    progress.advance(10)
    assert progress.report("") == 0.5
    assert progress.seconds_left == 40 * 2


@pytest.mark.parametrize("every", [3, 5])
def test_pauses_are_planned_where_the_run_makes_them(tmp_path, every):
    stages = [{"steps": 7, "method": {"name": "progressive", "student_steps": steps}} for steps in (2, 1)]
    config = run_config(
        tmp_path, tmp_path, stages=stages, checkpoint={"every_steps": every}, samples={"every_steps": every, "num": 1}
    )
    multiples = list(range(every, 15, every))
    assert planned_pauses(config) == {"checkpoint": sorted({*multiples, 7, 14}), "samples": [*multiples, 14]}
