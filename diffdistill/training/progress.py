"""What a person sees while a run trains: one bar on a terminal, plain lines elsewhere, nothing in the other processes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch


class Progress:
    """Shows losses, steps per second, time left and memory.

    Args:
        total: steps of the run, or of something else that is counted.
        done: steps done before this process.
        enabled: whether anything is shown.
        unit: what is counted, in the singular.
    """

    def __init__(self, total: int, done: int, enabled: bool, unit: str = "step") -> None:
        self.total, self.done, self.enabled, self.unit = total, done, enabled, unit
        self._since, self._since_step = time.perf_counter(), done
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

    def report(self, doing: str, values: Mapping[str, float] | None = None) -> float:
        """Show the losses since the last report and return the steps per second since then.

        Args:
            doing: what is being done, e.g. "stage 1/2 dmd2".
            values: name -> number; the totals of the turns are shown.
        """
        now = time.perf_counter()
        speed = (self.done - self._since_step) / max(now - self._since, 1e-9)
        self._since, self._since_step = now, self.done
        if self.enabled:
            losses = [
                f"{name.removesuffix('/total')} {value:.4g}"
                for name, value in (values or {}).items()
                if name.endswith("/total")
            ]
            left = _duration((self.total - self.done) / max(speed, 1e-9))
            note = "  ".join([*losses, f"{speed:.1f} {self.unit}s/s", f"{left} left", _memory()])
            if self._bar is not None:
                self._bar.update(self._task, description=doing, note=note)
            else:
                print(f"{self.unit} {self.done}/{self.total}  {doing}  {note}", flush=True)
        return speed

    def pause(self) -> None:
        """Leave out the time since the last report or pause from the steps per second: samples, evaluation, saving."""
        self._since, self._since_step = time.perf_counter(), self.done

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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _memory() -> str:
    """Return the peak memory of this process, on the GPU where there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB"
