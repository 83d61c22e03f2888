"""From `diffdistill train` to the first finished step, in a process of its own; and the same for `--resume`."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from diffdistill.bench.results import StartRow
from diffdistill.errors import MachineError
from diffdistill.files import write_atomic

CONFIG = """
teacher: digits-unet
output: {folder}
data: {{kind: digits}}
stages: [{{steps: 100000, method: {{name: dmd2, student_steps: 4}}}}]
logging: {{every_steps: 1}}
"""
"""The default settings, but that every step is told."""

LIMIT_S = 300


class Start(NamedTuple):
    """Seconds from the start of a process to its first step: by the clock on the wall, and of its processors."""

    seconds: float
    processor_seconds: float


def measure_starts(folder: Path, rounds: int = 3) -> Iterator[StartRow]:
    """Start a run of the digits and resume it, `rounds` times after one that is not counted, since it fills the file cache."""
    starts: dict[str, list[Start]] = {"start": [], "resume": []}
    for k in range(rounds + 1):
        config = write_atomic(folder / f"run-{k}.yaml", CONFIG.format(folder=folder / f"run-{k}"))
        for what, options in (("start", ()), ("resume", ("--resume",))):
            found = first_step(config, options)
            if k:
                starts[what].append(found)
    for what, each in starts.items():
        yield StartRow(
            what=what,
            seconds=statistics.median(start.seconds for start in each),
            processor_seconds=statistics.median(start.processor_seconds for start in each),
            rounds=rounds,
        )


def first_step(config: Path, options: Sequence[str] = ()) -> Start:
    """Train until the first line that tells of a step, then ask the run to stop, which leaves a checkpoint.

    Raises:
        MachineError: the run ended before a step.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "diffdistill", "train", str(config), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("step "):
                used = psutil.Process(process.pid).cpu_times()
                found = Start(time.perf_counter() - began, used.user + used.system)
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=LIMIT_S)
                return found
        raise MachineError(f"`{' '.join(command)}` ended before its first step: {process.stderr.read().strip()}")
