"""`diffdistill bench`: the parts of the benchmark one after another, on the GPU where there is one."""

from __future__ import annotations

import contextlib
import gc
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from diffdistill.bench import matrix
from diffdistill.bench.overhead import measure_overhead
from diffdistill.bench.results import OverheadRow, Refused, Results, SampleRow, StartRow, StepRow, machine
from diffdistill.bench.sampling import measure_samples
from diffdistill.bench.starts import measure_starts
from diffdistill.bench.steps import measure_step
from diffdistill.device import usual_device
from diffdistill.errors import UserError, unknown_name

PARTS = ("steps", "samples", "starts", "overhead")
Row = StepRow | SampleRow | StartRow | OverheadRow | Refused


def bench(
    parts: Sequence[str] = (),
    teachers: Sequence[str] = (),
    methods: Sequence[str] = (),
    layouts: Sequence[str] = (),
    batch: int | None = None,
    seconds: float = 10.0,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[Results], object] = lambda found: None,
) -> Results:
    """Measure what is asked for and return the tables.

    Args:
        parts: of PARTS; all when empty. Starts and overhead are those of the digits, whatever the teachers.
        teachers, methods, layouts, batch: as for `matrix.cells`; the embedded teachers when empty, on a GPU Stable Diffusion 1.5's network.
        seconds: for the timed rounds of each row.
        overrides: further settings of the runs whose steps and samples are measured, "a.b=c" each.
        say: told of each row.
        keep: given all tables so far after each row.
    Raises:
        UserError: a name that is not known, or nothing that can be measured.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part of the benchmark", part, PARTS)
    if batch is not None and batch < 1:
        raise UserError(f"batch must be at least 1; got {batch}.")
    if seconds <= 0:
        raise UserError(f"seconds must be positive; got {seconds:g}.")
    device = usual_device()
    asked = matrix.cells(teachers or (matrix.ON_GPU if device.type == "cuda" else matrix.ON_CPU), methods, layouts, batch)
    with _one_thread(device), tempfile.TemporaryDirectory(prefix="diffdistill-bench-") as folder:
        found = Results(machine=machine(device), command=_command(seconds, batch, overrides))
        for table, row in _rows(parts or PARTS, asked, seconds, overrides, Path(folder)):
            found = found.model_copy(update={table: (*getattr(found, table), row), "machine": machine(device)})
            say(_text(row))
            keep(found)
    if found.refused and not found.steps:
        raise UserError("\n".join(map(_text, found.refused)))
    return found


def _command(seconds: float, batch: int | None, overrides: Sequence[str]) -> str:
    """Return the command that measures everything with the same settings."""
    size = () if batch is None else ("--batch", str(batch))
    return shlex.join(["diffdistill", "bench", *overrides, "--seconds", f"{seconds:g}", *size])


def _rows(
    parts: Sequence[str], asked: Sequence[matrix.Cell], seconds: float, overrides: Sequence[str], folder: Path
) -> Iterator[tuple[str, Row]]:
    """Measure one row after the other; each comes with the name of its table."""
    if "steps" in parts:
        for cell in asked:
            try:
                yield "steps", measure_step(cell, seconds, overrides)
            except UserError as error:
                yield "refused", Refused(teacher=cell.teacher, method=cell.method, layout=cell.layout, reason=str(error))
            _free()
    if "samples" in parts:
        for teacher, layout, batch in dict.fromkeys((cell.teacher, cell.layout, cell.batch) for cell in asked):
            for row in measure_samples(teacher, layout, batch, seconds, overrides):
                yield "samples", row
            _free()
    if "starts" in parts:
        yield from (("starts", row) for row in measure_starts(folder))
    if "overhead" in parts:
        yield from (("overhead", row) for row in measure_overhead(folder))


def _text(row: Row) -> str:
    """Return a row in one line."""
    if isinstance(row, Refused):
        return f"{row.teacher} {row.method} {row.layout} cannot be measured: {row.reason}"
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


def _free() -> None:
    """Let go of the networks of a cell."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
