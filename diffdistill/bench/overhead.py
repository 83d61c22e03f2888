"""What a run does beside its steps: checkpoints, logging, sample grids and validation, as shares of its time."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from diffdistill.bench.results import OverheadRow
from diffdistill.bench.timing import wall_time
from diffdistill.config import RunConfig, parse_config
from diffdistill.training.engine import Engine, Guard
from diffdistill.training.run import _Run, train

RUN_STEPS = 1000
EVENTS = 2  # of each kind in the run that is measured; the first makes what is kept
STEPS_BETWEEN = 10
PARTS = (
    (Engine, "step", "step"),
    (Guard, "check", "guard"),
    (_Run, "_log", "log"),
    (_Run, "_save", "checkpoint"),
    (_Run, "_show_samples", "sample grid"),
    (_Run, "_validate", "validation"),
)
"""Where each part is done, and what it is called."""


def measure_overhead(folder: Path) -> Iterator[OverheadRow]:
    """Train the digits for a few steps with every event brought close, and put the times of each into a run of 1,000 steps.

    What is made once, such as the teacher's images of the sample grid, counts in full. Time passes on the clock on the wall, since
    a checkpoint waits for the disk; on a GPU the step that ends in a reading of the guard waits for the device.
    """
    config = _config(folder)
    with _timed() as times:
        train(config, progress=False)
    step = sum(times["step"][1:]) / (len(times["step"]) - 1)
    due = _due(config)
    spent = {what: _over_a_run(times[what], num) for what, num in due.items()}
    run = RUN_STEPS * step + sum(spent.values())
    for what, num in due.items():
        yield OverheadRow(what=what, times=num, ms=1000 * spent[what] / num, share=spent[what] / run)
    yield OverheadRow(what="all", times=1, ms=1000 * sum(spent.values()), share=sum(spent.values()) / run)


def _config(folder: Path) -> RunConfig:
    often = {"every_steps": STEPS_BETWEEN}
    return parse_config(
        {
            "teacher": "digits-unet",
            "output": str(folder / "overhead"),
            "data": {"kind": "digits"},
            "stages": [{"steps": EVENTS * STEPS_BETWEEN, "method": {"name": "dmd2", "student_steps": 4}}],
            "checkpoint": often,
            "logging": often,
            "samples": often,
            "validation": often,
        }
    )


def _due(config: RunConfig) -> dict[str, int]:
    """Return how often each is due in a run of 1,000 steps at the default settings, those of validation where it is on."""
    sections = {
        "log": config.logging,
        "checkpoint": config.checkpoint,
        "sample grid": config.samples,
        "validation": config.validation,
    }
    every = {what: type(section).model_fields["every_steps"].default for what, section in sections.items()}
    return {what: RUN_STEPS // steps for what, steps in every.items()} | {"guard": RUN_STEPS}


def _over_a_run(times: list[float], num: int) -> float:
    """Return the time of `num` events: the first as it was, the others as the mean of the later ones."""
    first, *later = times
    return first + (num - 1) * (sum(later) / len(later) if later else first)


@contextlib.contextmanager
def _timed() -> Iterator[dict[str, list[float]]]:
    """Write down how long each part took, each time that it was done."""
    times: dict[str, list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        for owner, method, name in PARTS:
            stack.enter_context(mock.patch.object(owner, method, _observed(getattr(owner, method), times[name])))
        yield times


def _observed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        answers: list[Any] = []
        times.append(wall_time(lambda: answers.append(function(*args, **kwargs))))
        return answers[0]

    return call
