"""The ways in which a run, or a part of it, ends early, and the signals that ask for that."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from diffdistill.errors import MachineError


class Stopped(Exception):
    """A signal asked the run to stop; it finished its step and saved. The message says how to go on; exit status 0."""


class Interrupted(Exception):
    """Samples or an evaluation were left undone, for a signal came while they were made; the run saves, and resumes with them."""


class Diverged(MachineError):
    """Training broke down: values that are not finite. Exit status 1, like a fault of the machine: the input was legal."""


class StopSignals:
    """While entered, SIGTERM and SIGINT only set `requested`; a second SIGINT interrupts at once, as usual.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
