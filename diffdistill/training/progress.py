"""What a person sees while a run trains: one bar on a terminal, plain lines elsewhere, nothing in the other processes."""

from __future__ import annotations

import bisect
import contextlib
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

RECENT_REPORTS = 20  # whose mean pace is taken for the steps to come


class Progress:
    """Shows losses, steps per second, time left and memory.

    The time left is that of the steps to come at their recent pace, and of the pauses to come, each as long as the last of its kind.

    Args:
        total: steps of the run, or of something else that is counted.
        done: steps done before this process.
        enabled: whether anything is shown.
        unit: what is counted, in the singular.
        planned: kind of pause -> the steps, ascending, after which there is one.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        total: int,
        done: int,
        enabled: bool,
        unit: str = "step",
        planned: Mapping[str, Sequence[int]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.done, self.enabled, self.unit = total, done, enabled, unit
        self._planned, self._clock = planned or {}, clock
        self._since, self._since_step = clock(), done
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_REPORTS)  # steps of a report, and their seconds
        self._pauses: dict[str, float] = {}  # kind -> seconds of the last one
        self._bar: Any = None
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
            )
            self._task = self._bar.add_task(f"{unit}s", total=total, completed=done, note="")
            self._bar.start()

    def advance(self, num: int = 1) -> None:
        """Count a step, or several; costs nothing that waits for the device."""
        self.done += num
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def skip(self, num: int) -> None:
        """Count what need not be done; the pace stays as it is."""
        self._since_step += num
        self.advance(num)

    def report(self, doing: str, values: Mapping[str, float] | None = None) -> float:
        """Show the losses since the last report and return the steps per second since then.

        Args:
            doing: what is being done, e.g. "stage 1/2 dmd2".
            values: name -> number; the totals of the turns are shown.
        """
        now = self._clock()
        steps, seconds = self.done - self._since_step, max(now - self._since, 1e-9)
        self._since, self._since_step = now, self.done
        if steps:
            self._recent.append((steps, seconds))
        if self.enabled:
            losses = [
                f"{name.removesuffix('/total')} {value:.4g}"
                for name, value in (values or {}).items()
                if name.endswith("/total")
            ]
            note = "  ".join([*losses, f"{steps / seconds:.1f} {self.unit}s/s", self._left(), _memory()])
            if self._bar is not None:
                self._bar.update(self._task, description=doing, note=note)
            else:
                print(f"{self.unit} {self.done}/{self.total}  {doing}  {note}", flush=True)
        return steps / seconds

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take; None before the first report. Pauses of a kind that never came yet count as nothing."""
        if not self._recent:
            return None
        steps, seconds = map(sum, zip(*self._recent, strict=True))
        pauses = sum(self._pauses.get(kind, 0.0) * num for kind, num in self._ahead().items())
        return (self.total - self.done) * seconds / steps + pauses

    def _ahead(self) -> dict[str, int]:
        """Return how many pauses of each kind are still to come, those after this very step among them."""
        return {kind: len(steps) - bisect.bisect_left(steps, self.done) for kind, steps in self._planned.items()}

    def _left(self) -> str:
        """Return the time left in words, and what it leaves out."""
        unknown = [kind for kind, num in self._ahead().items() if num and kind not in self._pauses]
        return " + ".join([f"{duration(self.seconds_left or 0)} left", *unknown])

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Leave the time within out of the steps per second, and remember it for the time left: samples, evaluation, saving."""
        begun = self._clock()
        yield
        self._pauses[kind] = self._clock() - begun
        self._since += self._pauses[kind]

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Return seconds as hours and minutes, or as minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def peak_memory_gib() -> float:
    """Return the peak memory of this process, on the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _memory() -> str:
    import torch

    return f"{peak_memory_gib():.1f} GiB" + (" GPU" if torch.cuda.is_available() else "")
