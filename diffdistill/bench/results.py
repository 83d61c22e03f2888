"""What a benchmark found: the rows of its tables, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from diffdistill.bench.definition import Aims
from diffdistill.bench.timing import Ratio
from diffdistill.errors import UserError, unknown_name
from diffdistill.files import write_json


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Row):
    """Where it was measured, and by which versions."""

    device: str
    platform: str
    threads: int
    python: str
    torch: str
    diffusers: str


class _Measured(_Row):
    """A row that was measured.

    Attributes:
        revision: commit of the code, with a plus sign where the code was changed since; "" where it is installed without one.
        settings: hash of the settings that decide the numbers, see `Definition.settings`.
        load: of the machine in the last minute over the number of its cores, this process's included.
    """

    revision: str = ""
    settings: str = ""
    load: float = 0.0


class PassRow(_Row):
    """How many passes of one kind a step does, in batches: two rows for a sample of a guided teacher count two."""

    role: str
    kind: str
    tap: str
    per_step: float


class StepRow(_Measured):
    """A step of a cell beside its passes alone.

    Attributes:
        passes: of a step, averaged over the steps that were measured.
        step_ms, floor_ms: means of a step over the same steps.
        ratio: of the two, by cycles of the method's turns.
        rounds: cycles.
        build_s: time on the wall in which the stage was built: its teacher, roles, optimisers.
        warm_up_s: by how much the first two cycles took longer than two later ones, on the wall: with what is compiled, recorded or
            made once.
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
    build_s: float
    warm_up_s: float
    peak_mib: float
    memory: float
    of_plain: float | None

    @property
    def key(self) -> str:
        """Name of the row in messages and comparisons."""
        return f"{self.teacher} {self.method} {self.layout} {self.batch}"


class SampleRow(_Measured):
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
        return sample_key(self.teacher, self.layout, self.batch, self.rule, self.steps)


def sample_key(teacher: str, layout: str, batch: int, rule: str, steps: int) -> str:
    """Return the name of a row of images."""
    return f"{teacher} {layout} {batch} {rule} {steps} steps"


class StartRow(_Measured):
    """From the command to the first finished step, in a process of its own: medians."""

    what: str
    seconds: float
    processor_seconds: float
    rounds: int

    @property
    def key(self) -> str:
        """Name of the row."""
        return self.what


class OverheadRow(_Measured):
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
    batch: int
    reason: str

    @property
    def key(self) -> str:
        """Name of the cell."""
        return f"{self.teacher} {self.method} {self.layout} {self.batch}"


class Results(_Row):
    """All tables of one device and one set of overrides.

    Attributes:
        overrides: settings of all runs, "a.b=c" each, beside the definition's.
        aims: of the definition.
        num_cells: cells that the definition has.
    """

    machine: Machine
    overrides: tuple[str, ...] = ()
    aims: Aims = Aims()
    num_cells: int
    steps: tuple[StepRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    starts: tuple[StartRow, ...] = ()
    overhead: tuple[OverheadRow, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def title(self) -> str:
        """What they are the results of."""
        return ", ".join((self.machine.device, *self.overrides))

    @property
    def measured(self) -> tuple[StepRow | SampleRow | StartRow | OverheadRow, ...]:
        """The rows of all tables."""
        return (*self.steps, *self.samples, *self.starts, *self.overhead)


def title(overrides: Sequence[str]) -> str:
    """Return what results of this machine are kept under."""
    return ", ".join((_device(), *overrides))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} processor"


def machine() -> Machine:
    """Return the facts of this machine."""
    return Machine(
        device=_device(),
        platform=platform.platform(),
        threads=torch.get_num_threads(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        diffusers=metadata.version("diffusers"),
    )


def revision() -> str:
    """Return the commit of the source as `_Measured` has it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True).returncode
    return f"{commit}{'+' * changed}" if commit else ""


def load() -> float:
    """Return the load of the machine as `_Measured` has it."""
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)


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
    """Return the results in a file by title, none where there is no file.

    Raises:
        UserError: a file of something else.
    """
    if not path.is_file():
        return {}
    try:
        return {title: Results.model_validate(value) for title, value in json.loads(path.read_bytes()).items()}
    except (ValueError, ValidationError, AttributeError) as error:
        raise UserError(f"{path} does not hold results of `diffdistill bench`: {error}") from error


def read_kept(path: Path, title: str) -> Results:
    """Return the results of a title in a file.

    Raises:
        UserError: no such file, one of something else, or no such results in it.
    """
    if not path.is_file():
        raise UserError(
            f"there are no kept results at {path}. Make them with `diffdistill bench -o FOLDER`, or name a file by --against."
        )
    found = read(path)
    if title not in found:
        raise unknown_name("device of kept results", title, found)
    return found[title]


def write(path: Path, results: Results) -> None:
    """Put results into a file, in the place of those of the same title."""
    found = read(path)
    found[results.title] = merged(found[results.title], results) if results.title in found else results
    write_json(path, {title: each.model_dump(mode="json") for title, each in found.items()})


def read_all(folder: Path) -> dict[str, Results]:
    """Return the results of all definitions in a folder, "definition: title"."""
    return {f"{path.stem}: {title}": each for path in sorted(folder.glob("*.json")) for title, each in read(path).items()}
