"""The ways in which a run, or a part of it, ends early, and the signals that ask for that."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from diffdistill.errors import MachineError
from diffdistill.processes import Processes


class Stopped(Exception):
    """A signal asked the run to stop; it finished its step and saved. The message says how to go on; exit status 0."""


class Interrupted(Exception):
    """Samples or an evaluation were left undone, for a signal came while they were made; the run saves, and resumes with them."""


def stopping_together(processes: Processes) -> Processes:
    """Return the processes at work that a signal to one of them ends in all of them, each at its next call and all at the same one.

    Each calls `asked_to_stop` as often as it likes, where it can stop, and all call `wait` equally often, which raises Interrupted
    where a signal has come. Whoever waits answers with the others meanwhile, so nobody is left alone in a call.
    """
    here, busy, stop = range(3)

    def answer(own: int) -> int:
        return processes.max(stop if processes.asked_to_stop() else own)

    def wait() -> None:
        while (said := answer(here)) == busy:
            pass  # each answer takes as long as the others' work up to their next call
        if said == stop:
            raise Interrupted

    return processes._replace(wait=wait, asked_to_stop=lambda: answer(busy) == stop)


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
