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
from diffdistill.bench.results import Refused, Results, SampleRow, StepRow, machine
from diffdistill.bench.sampling import measure_samples
from diffdistill.bench.starts import measure_starts
from diffdistill.bench.steps import measure_step
from diffdistill.device import usual_device
from diffdistill.errors import UserError, unknown_name

PARTS = ("steps", "samples", "starts", "overhead")
Say = Callable[[str], None]


def bench(
    parts: Sequence[str] = (),
    teachers: Sequence[str] = (),
    methods: Sequence[str] = (),
    layouts: Sequence[str] = (),
    batch: int | None = None,
    seconds: float = 10.0,
    overrides: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Results:
    """Measure what is asked for and return the tables.

    Args:
        parts: of PARTS; all when empty. Starts and overhead are those of the digits, whatever the teachers.
        teachers, methods, layouts, batch: as for `matrix.cells`; the embedded teachers when empty, on a GPU Stable Diffusion 1.5's network.
        seconds: for the timed rounds of each row.
        overrides: further settings of the runs whose steps and samples are measured, "a.b=c" each.
        say: told of each row.
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
    device, chosen = usual_device(), parts or PARTS
    asked = matrix.cells(teachers or (matrix.ON_GPU if device.type == "cuda" else matrix.ON_CPU), methods, layouts, batch)
    with _one_thread(device), tempfile.TemporaryDirectory(prefix="diffdistill-bench-") as folder:
        steps, refused = _steps(asked, seconds, overrides, say) if "steps" in chosen else ([], [])
        samples = _samples(asked, seconds, overrides, say) if "samples" in chosen else []
        starts = _told(measure_starts(Path(folder)), say) if "starts" in chosen else []
        overhead = _told(measure_overhead(Path(folder)), say) if "overhead" in chosen else []
        if refused and not steps:
            raise UserError(
                "\n".join(f"{row.teacher} {row.method} {row.layout} cannot be measured: {row.reason}" for row in refused)
            )
        return Results(
            machine=machine(device),
            command=_command(seconds, batch, overrides),
            steps=tuple(steps),
            samples=tuple(samples),
            starts=tuple(starts),
            overhead=tuple(overhead),
            refused=tuple(refused),
        )


def _command(seconds: float, batch: int | None, overrides: Sequence[str]) -> str:
    """Return the command that measures everything with the same settings."""
    size = () if batch is None else ("--batch", str(batch))
    return shlex.join(["diffdistill", "bench", *overrides, "--seconds", f"{seconds:g}", *size])


def _steps(
    asked: Sequence[matrix.Cell], seconds: float, overrides: Sequence[str], say: Say
) -> tuple[list[StepRow], list[Refused]]:
    rows, refused = [], []
    for cell in asked:
        try:
            rows.append(measure_step(cell, seconds, overrides))
            say(f"{cell.key}: step / floor {_text(rows[-1])}")
        except UserError as error:
            refused.append(Refused(teacher=cell.teacher, method=cell.method, layout=cell.layout, reason=str(error)))
            say(f"{cell.key}: {error}")
        _free()
    return rows, refused


def _samples(asked: Sequence[matrix.Cell], seconds: float, overrides: Sequence[str], say: Say) -> list[SampleRow]:
    rows: list[SampleRow] = []
    for teacher, layout, batch in dict.fromkeys((cell.teacher, cell.layout, cell.batch) for cell in asked):
        rows += _told(measure_samples(teacher, layout, batch, seconds, overrides), say)
        _free()
    return rows


def _told(rows: Iterator, say: Say) -> list:  # type: ignore[type-arg]
    found = []
    for row in rows:
        say(f"{row.key}: {_text(row)}")
        found.append(row)
    return found


def _text(row: object) -> str:
    values = {name: value for name, value in vars(row).items() if isinstance(value, float)}
    if hasattr(row, "ratio"):
        values = {"ratio": row.ratio.median, "low": row.ratio.low, "high": row.ratio.high}
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


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
