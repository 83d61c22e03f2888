"""Has anything got worse than an older table says? By counts of passes, which are exact, and by ratios, which hold on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from diffdistill.bench.results import Results, SampleRow, StartRow, StepRow
from diffdistill.bench.timing import Ratio

NOISE = 0.10
"""By how much a ratio of times may be above the older one, beside what its interval allows: what other work on a machine does to it."""
MEMORY_NOISE = 0.03
"""The same for memory, which is counted and not timed, but is in the hands of libraries too."""
START_NOISE = 0.30
"""The same for processor time of a start, which is no ratio: it is spent in many small reads, and shared caches slow these most."""

R = TypeVar("R", StepRow, SampleRow, StartRow)


def worse(old: Results, new: Results) -> list[str]:
    """Return what got worse from the older results to the newer, a line each; rows that only one of them has are left out.

    A start is worse where it is above the older time and above its aim; overhead, which is a share, where it is above its aim.
    """
    aims = new.aims
    return [
        *_paired(old.steps, new.steps, _worse_step),
        *_paired(old.samples, new.samples, _worse_sample),
        *_paired(old.starts, new.starts, partial(_late, aim=aims.start_seconds)),
        *(
            f"overhead: {100 * row.share:.1f} % of a run; at most {100 * aims.overhead:g} %"
            for row in new.overhead
            if row.what == "all" and row.share > aims.overhead
        ),
    ]


def _paired(old: Sequence[R], new: Sequence[R], compare: Callable[[R, R], Iterator[str]]) -> Iterator[str]:
    before = {row.key: row for row in old}
    for row in new:
        if row.key in before:
            yield from (f"{row.key}: {text}" for text in compare(before[row.key], row))


def _worse_step(old: StepRow, new: StepRow) -> Iterator[str]:
    before, now = ({(row.role, row.kind, row.tap): row.per_step for row in each.passes} for each in (old, new))
    for what in sorted(before.keys() | now.keys()):
        if before.get(what) != now.get(what):
            role, kind, tap = what
            name = f"{role} {kind}{f' up to {tap}' if tap else ''}"
            yield f"passes of a step, {name}: {before.get(what, 0):g} -> {now.get(what, 0):g}"
    yield from _larger("step / floor", old.ratio, new.ratio)
    if new.memory > old.memory * (1 + MEMORY_NOISE):
        yield f"memory / floor: {old.memory:.2f} -> {new.memory:.2f}"


def _worse_sample(old: SampleRow, new: SampleRow) -> Iterator[str]:
    if old.passes != new.passes:
        yield f"passes of an image: {old.passes} -> {new.passes}"
    yield from _larger("sampling / floor", old.ratio, new.ratio)


def _larger(what: str, old: Ratio, new: Ratio) -> Iterator[str]:
    """Yield a line where all of the newer interval lies above the older one, and above the older median by more than the noise."""
    if new.low > max(old.high, old.median * (1 + NOISE)):
        yield f"{what}: {old.median:.2f} -> {new.median:.2f} ({new.low:.2f} to {new.high:.2f})"


def _late(old: StartRow, new: StartRow, aim: float) -> Iterator[str]:
    before, now = old.processor_seconds, new.processor_seconds
    if now > max(aim, before * (1 + START_NOISE)):
        yield f"processor time to the first step: {before:.1f} s -> {now:.1f} s"
