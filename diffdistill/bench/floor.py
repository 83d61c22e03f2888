"""An action beside the passes it must do: both timed in turns, in the same process, on the same kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffdistill.bench.passes import Call, Pass, bare, count, recorded
from diffdistill.bench.session import Session
from diffdistill.bench.timing import Clock, Ratio, paired_ratio

MIN_ROUNDS = 3


@dataclass
class Comparison:
    """Times of an action and of its passes alone.

    Attributes:
        times, floors: seconds of each round, and of its passes.
        calls: of each of the first MIN_ROUNDS rounds, or of one where all are alike; they hold what went into the networks, so no
            more are kept.
        per_round: how often the action was done in one.
    """

    per_round: int
    times: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    @property
    def num(self) -> int:
        """How often the action was done."""
        return self.per_round * len(self.times)

    @property
    def ratio(self) -> Ratio:
        """Time of the action over that of its passes."""
        return paired_ratio(self.times, self.floors)

    @property
    def passes(self) -> dict[Pass, float]:
        """How often an action does each pass: counted over the rounds that are always done, so it is the same in every measurement."""
        counted = count([call for calls in self.calls for call in calls])
        return {what: num / (len(self.calls) * self.per_round) for what, num in counted.items()}

    def goes_on(self, seconds: float) -> bool:
        """Return whether there shall be another round: there are at least MIN_ROUNDS, and then as many as begin in these seconds."""
        return len(self.times) < MIN_ROUNDS or sum(self.times) + sum(self.floors) < seconds


def compare(action: Callable[[], object], session: Session, clock: Clock, seconds: float, per_round: int = 1) -> Comparison:
    """Do an action and then its passes bare, again and again; the first round is not counted, since passes may be compiled in it.

    Args:
        action: what is compared, such as a step.
        session: whose networks it calls.
        clock: of the device.
        seconds: see `Comparison.goes_on`; by this clock.
        per_round: how often the action is done in a round, each time followed by its passes: the period of what it does.
    """
    found = Comparison(per_round)
    gc.collect()
    _round(action, session, clock, per_round)
    while found.goes_on(seconds):
        time, floor, calls = _round(action, session, clock, per_round)
        found.times.append(time)
        found.floors.append(floor)
        if len(found.calls) < MIN_ROUNDS:
            found.calls.append(calls)
    return found


def compare_steady(action: Callable[[], object], session: Session, clock: Clock, seconds: float) -> Comparison:
    """As `compare`, for an action that does the same passes every time: they are written down once, and not while the clock runs."""
    with recorded(session.roles) as calls:
        action()
    found = Comparison(1, calls=[calls])
    gc.collect()
    while found.goes_on(seconds):
        found.times.append(clock(action))
        found.floors.append(_bare(calls, session, clock))
    return found


def _round(action: Callable[[], object], session: Session, clock: Clock, per_round: int) -> tuple[float, float, list[Call]]:
    """Return the time of the actions of a round, that of their passes, and the passes."""
    time, floor, calls_of_round = 0.0, 0.0, list[Call]()
    for _ in range(per_round):
        with recorded(session.roles) as calls:
            time += clock(action)
        floor += _bare(calls, session, clock)
        calls_of_round += calls
    return time, floor, calls_of_round


def _bare(calls: Sequence[Call], session: Session, clock: Clock) -> float:
    """Return the time of passes alone."""
    with session.engine.autocast():
        return sum(bare(call, session.roles, clock) for call in calls)
