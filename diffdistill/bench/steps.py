"""A step of a cell: its passes, its time over theirs, its memory over what must be there."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from diffdistill.bench.definition import Cell
from diffdistill.bench.floor import compare
from diffdistill.bench.passes import Call, bare, recorded
from diffdistill.bench.results import PassRow, StepRow
from diffdistill.bench.session import Session
from diffdistill.bench.timing import clock_of, wall_time
from diffdistill.memory import LiveBytes, memory_rows, total

MIB = 2**20


def measure_step(cell: Cell, build: Callable[[], Session], seconds: float) -> StepRow:
    """Measure the step of a cell.

    Args:
        cell: the cell.
        build: makes its run.
        seconds: for its timed rounds.
    Raises:
        UserError: the cell cannot be; says why.
    """
    began = time.perf_counter()
    session = build()
    build_s, device = time.perf_counter() - began, session.teacher.device
    first = wall_time(session.two_cycles, device)
    memory = footprint(session)
    found = compare(session.step, session, clock_of(device), seconds, per_round=session.cycle_steps)
    return StepRow(
        **cell._asdict(),
        passes=tuple(
            PassRow(role=what.role, kind=what.kind, tap=what.tap, per_step=round(what.rows / cell.batch * num, 3))
            for what, num in found.passes.items()
        ),
        step_ms=1000 * sum(found.times) / found.num,
        floor_ms=1000 * sum(found.floors) / found.num,
        ratio=found.ratio,
        rounds=len(found.times),
        build_s=build_s,
        warm_up_s=max(0.0, first - wall_time(session.two_cycles, device)),
        **memory,
    )


def footprint(session: Session) -> dict[str, float | None]:
    """Return the memory columns of `StepRow`: what is kept by shapes, what comes and goes by counting living tensors."""
    stage, averaged = session.config.stages[0], session.config.ema is not None
    rows = memory_rows(session.roles, {role: stage.optimizer(role) for role in stage.trained}, averaged)
    kept = total(rows).kept_bytes
    with recorded(session.roles) as calls:
        step = added(session.cycle, session.teacher.device)
    graph = added(lambda: _student_pass(calls, session), session.teacher.device)
    plain = sum(row.kept_bytes for row in rows if row.role in ("teacher", "student", "average of student"))
    return {
        "peak_mib": (kept + step) / MIB,
        "memory": (kept + step) / (kept + graph),
        "of_plain": (kept + step) / (plain + graph) if session.roles.layout == "shared" else None,
    }


def _student_pass(calls: list[Call], session: Session) -> None:
    """Do one pass of the student forward and backward, as plain training would."""
    own = next(call for call in calls if call.what.role == "student" and call.what.kind == "weights")
    with session.engine.autocast():
        bare(own, session.roles, _untimed)


def _untimed(action: Callable[[], object]) -> float:
    action()
    return 0.0


def added(action: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that an action had beside what was there before it; on a CPU those of blocks as if none were compiled."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live, torch.compiler.set_stance("force_eager"):  # tensors inside compiled code cannot be counted
        action()
    return live.peak
