"""`diffdistill bench`: the parts of the benchmark one after another, on the GPU where there is one."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffdistill.bench.definition import Cell, Definition
from diffdistill.bench.overhead import measure_overhead
from diffdistill.bench.results import (
    OverheadRow,
    Refused,
    Results,
    SampleRow,
    StartRow,
    StepRow,
    load,
    machine,
    revision,
    sample_key,
)
from diffdistill.bench.sampling import measure_samples
from diffdistill.bench.session import Session, open_session
from diffdistill.bench.starts import measure_starts
from diffdistill.bench.steps import measure_step
from diffdistill.device import usual_device
from diffdistill.errors import UserError
from diffdistill.files import temporary_folder

Row = StepRow | SampleRow | StartRow | OverheadRow | Refused
Done = dict[tuple[str, str], Any]
"""Rows that need not be measured, by key and hash of their settings."""


def bench(
    definition: Definition,
    cells: Sequence[Cell],
    overrides: Sequence[str] = (),
    known: Results | None = None,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[Results], object] = lambda found: None,
) -> Results:
    """Measure cells of a definition, and its other parts, and return the tables.

    Args:
        definition: what is measured.
        cells: of it; their teachers, layouts and batches are those of the samples, too.
        overrides: further settings of the runs whose steps and samples are measured, "a.b=c" each.
        known: earlier results; rows that this commit measured with the same settings are taken from them.
        say: told of each row that is measured.
        keep: given all tables so far after each row.
    Raises:
        UserError: no cell can be measured.
    """
    device, commit = usual_device(), revision()
    done = {} if known is None else {(row.key, row.settings): row for row in known.measured if row.revision == commit}
    with _one_thread(device), temporary_folder("diffdistill-bench-") as folder:
        aims, num_cells = definition.aims, len(definition.cells())
        found = Results(machine=machine(), overrides=tuple(overrides), aims=aims, num_cells=num_cells)
        for table, settings, row in _rows(definition, cells, overrides, done, folder):
            if not isinstance(row, Refused) and row not in done.values():
                row = row.model_copy(update={"revision": commit, "settings": settings, "load": load()})
                say(_text(row))
            found = found.model_copy(update={table: (*getattr(found, table), row)})
            keep(found)
    if found.refused and not found.measured:
        raise UserError("\n".join(map(_text, found.refused)))
    return found


Found = tuple[str, str, Row]
"""Name of a table, hash of the settings, and the row."""


def _rows(definition: Definition, cells: Sequence[Cell], overrides: Sequence[str], done: Done, folder: Path) -> Iterator[Found]:
    """Measure one row after the other, but for those that are done."""
    if "steps" in definition.parts:
        for cell in cells:
            yield from _or_refused(cell, _step(definition, cell, overrides, done))
    if "samples" in definition.parts:
        for cell in definition.sampled(cells):
            yield from _or_refused(cell, _samples(definition, cell, overrides, done))
    for part, kind, measure in (("starts", StartRow, measure_starts), ("overhead", OverheadRow, measure_overhead)):
        if part in definition.parts:
            had = [row for row in done.values() if isinstance(row, kind)]
            yield from ((part, "", row) for row in had or measure(folder))


def _or_refused(cell: Cell, rows: Iterator[Found]) -> Iterator[Found]:
    """Give the rows of a cell, or why it cannot be, and let go of its networks."""
    try:
        yield from rows
    except UserError as error:
        yield "refused", "", Refused(**cell._asdict(), reason=str(error))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _step(definition: Definition, cell: Cell, overrides: Sequence[str], done: Done) -> Iterator[Found]:
    settings = definition.settings(cell, overrides)
    row = done.get((cell.key, settings))
    yield "steps", settings, row or measure_step(cell, partial(_open, definition, cell, overrides), definition.seconds)


def _samples(definition: Definition, cell: Cell, overrides: Sequence[str], done: Done) -> Iterator[Found]:
    settings = definition.settings(cell, overrides)
    asked = list(itertools.product(definition.samples.rules, definition.samples.steps))
    had = {one: done.get((sample_key(cell.teacher, cell.layout, cell.batch, *one), settings)) for one in asked}
    yield from (("samples", settings, row) for row in had.values() if row is not None)
    if missing := [one for one, row in had.items() if row is None]:
        session = _open(definition, cell, overrides)
        yield from (("samples", settings, row) for row in measure_samples(session, cell, missing, definition.seconds))


def _open(definition: Definition, cell: Cell, overrides: Sequence[str]) -> Session:
    return open_session(definition.run_config(cell, overrides), definition.teachers[cell.teacher].published)


def _text(row: Row) -> str:
    """Return a row in one line."""
    if isinstance(row, Refused):
        return f"{row.key} cannot be measured: {row.reason}"
    if isinstance(row, StepRow | SampleRow):
        return f"{row.key}: over its floor {row.ratio.median:.3f} ({row.ratio.low:.3f} to {row.ratio.high:.3f})"
    return f"{row.key}: " + "  ".join(f"{name} {value:.4g}" for name, value in vars(row).items() if isinstance(value, float))


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one thread of a CPU, whose processor time is the time of the computation."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
