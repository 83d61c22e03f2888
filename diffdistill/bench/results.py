"""What a benchmark found: the rows of its tables, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from diffdistill.bench.timing import Ratio
from diffdistill.errors import UserError, unknown_name
from diffdistill.files import write_json

FILE = "bench.json"
COMMITTED = Path(__file__).resolve().parents[2] / "eval" / "results" / FILE


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Row):
    """Where and of what it was measured; `load` is that of the last five minutes over the number of its cores, this process's included."""

    device: str
    platform: str
    threads: int
    python: str
    torch: str
    diffusers: str
    revision: str
    load: float | None = None


class PassRow(_Row):
    """How many passes of one kind a step does, in batches: two rows for a sample of a guided teacher count two."""

    role: str
    kind: str
    tap: str
    per_step: float


class StepRow(_Row):
    """A step of a cell beside its passes alone.

    Attributes:
        passes: of a step, averaged over the steps that were measured.
        step_ms, floor_ms: means of a step over the same steps.
        ratio: of the two, by cycles of the method's turns.
        rounds: cycles.
        first_step_s: time of the very first one, with whatever is made or compiled once.
        peak_mib: kept, and the most that a step adds.
        memory: peak over (all that is kept, and one student graph).
        of_plain: in the shared layout, peak over (base, the student's adapter, its optimiser and one student graph): plain
            fine-tuning of an adapter.
    """

    teacher: str
    method: str
    layout: str
    batch: int
    passes: tuple[PassRow, ...]
    step_ms: float
    floor_ms: float
    ratio: Ratio
    rounds: int
    first_step_s: float
    peak_mib: float
    memory: float
    of_plain: float | None

    @property
    def key(self) -> str:
        """Name of the row in messages and comparisons."""
        return f"{self.teacher} {self.method} {self.layout}"


class SampleRow(_Row):
    """Images of the student beside the passes they must do; what is encoded before and decoded after is apart."""

    teacher: str
    layout: str
    rule: str
    steps: int
    batch: int
    passes: int
    image_ms: float
    ratio: Ratio
    rounds: int
    condition_ms: float
    decode_ms: float

    @property
    def key(self) -> str:
        """Name of the row."""
        return f"{self.teacher} {self.layout} {self.rule} {self.steps} steps"


class StartRow(_Row):
    """From the command to the first finished step, in a process of its own: medians."""

    what: str
    seconds: float
    processor_seconds: float
    rounds: int

    @property
    def key(self) -> str:
        """Name of the row."""
        return self.what


class OverheadRow(_Row):
    """What is done beside the steps: time of one, and its share of a run of 1,000 steps at the default settings."""

    what: str
    times: int
    ms: float
    share: float

    @property
    def key(self) -> str:
        """Name of the row."""
        return self.what


class Refused(_Row):
    """A cell that cannot be, and why."""

    teacher: str
    method: str
    layout: str
    reason: str

    @property
    def key(self) -> str:
        """Name of the cell."""
        return f"{self.teacher} {self.method} {self.layout}"


class Results(_Row):
    """All tables of one machine.

    Attributes:
        command: what measures them all, with the settings that decide the numbers.
    """

    machine: Machine
    command: str
    steps: tuple[StepRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    starts: tuple[StartRow, ...] = ()
    overhead: tuple[OverheadRow, ...] = ()
    refused: tuple[Refused, ...] = ()


def machine(device: torch.device) -> Machine:
    """Return the facts of this machine."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} processor",
        platform=platform.platform(),
        threads=torch.get_num_threads(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        diffusers=metadata.version("diffusers"),
        revision=_revision(),
        load=round(os.getloadavg()[1] / (os.cpu_count() or 1), 2),
    )


def _revision() -> str:
    """Return the commit of the source, "" where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


Keyed = TypeVar("Keyed", StepRow, SampleRow, StartRow, OverheadRow, Refused)


def merged(old: Results, new: Results) -> Results:
    """Return the newer results, with the older rows that they have none for."""

    def rows(before: tuple[Keyed, ...], after: tuple[Keyed, ...]) -> tuple[Keyed, ...]:
        fresh = {row.key: row for row in after}
        kept = {row.key: fresh.pop(row.key, row) for row in before}
        return (*kept.values(), *fresh.values())

    measured = {row.key for row in new.steps}
    refused = tuple(row for row in old.refused if row.key not in measured)
    return new.model_copy(
        update={
            "steps": rows(old.steps, new.steps),
            "samples": rows(old.samples, new.samples),
            "starts": rows(old.starts, new.starts),
            "overhead": rows(old.overhead, new.overhead),
            "refused": rows(refused, new.refused),
        }
    )


def read(path: Path) -> dict[str, Results]:
    """Return the results in a file by device, none where there is no file.

    Raises:
        UserError: a file of something else.
    """
    if not path.is_file():
        return {}
    try:
        return {device: Results.model_validate(value) for device, value in json.loads(path.read_bytes()).items()}
    except (ValueError, ValidationError, AttributeError) as error:
        raise UserError(f"{path} does not hold results of `diffdistill bench`: {error}") from error


def read_kept(path: Path) -> dict[str, Results]:
    """Return the results in a file by device.

    Raises:
        UserError: no such file, or one of something else.
    """
    if not path.is_file():
        raise UserError(
            f"there are no kept results at {path}. Make them with `diffdistill bench -o FOLDER`, or name a file by --against."
        )
    return read(path)


def of_kind(found: Mapping[str, Results], like: Machine) -> Results:
    """Return the results of the same device.

    Raises:
        UserError: there are none; lists those that there are.
    """
    if like.device not in found:
        raise unknown_name("device of kept results", like.device, found)
    return found[like.device]


def write(path: Path, results: Results) -> dict[str, Results]:
    """Put results into a file, in the place of those of the same device, and return all that it holds."""
    found = read(path)
    device = results.machine.device
    found[device] = merged(found[device], results) if device in found else results
    write_json(path, {name: each.model_dump(mode="json") for name, each in found.items()})
    return found
