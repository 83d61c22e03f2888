"""A run in the terminal: one frame of lines, drawn again as the run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from diffdistill.watch.series import TEACHER, Curve, Panel, sections, thinned
from diffdistill.watch.state import RunState, Watcher, facts

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.-~=+*#"  # where the terminal knows no blocks
NARROW, WIDE = 16, 48  # columns of a sparkline
COLOURS = {"running": "green", "finished": "green", "preparing": "cyan", "stopped": "yellow"}


def show(watcher: Watcher, console: Console, refresh_sec: float) -> None:
    """Draw the run until it has ended."""
    state = watcher.look()
    with Live(frame(state, console), console=console, auto_refresh=False, transient=False) as live:
        while state.is_alive:
            time.sleep(refresh_sec)
            state = watcher.look()
            live.update(frame(state, console), refresh=True)


def frame(state: RunState, console: Console) -> RenderableType:
    """Return everything that is shown of a run."""
    blocks = BLOCKS if console.encoding.startswith("utf") else PLAIN
    width = max(NARROW, min(WIDE, console.width - 44))
    return Group(*_head(state), *_alerts(state), *_charts(state, width, blocks))


def sparkline(values: Sequence[float], blocks: str = BLOCKS, is_log: bool = False) -> str:
    """Return one character per value, the lowest the first block and the highest the last; the middle one where all are equal."""
    if is_log:
        values = [math.log(value) for value in values]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return blocks[len(blocks) // 2 - 1] * len(values)
    return "".join(blocks[min(len(blocks) - 1, int((value - low) / (high - low) * len(blocks)))] for value in values)


def _head(state: RunState) -> Iterator[RenderableType]:
    colour = COLOURS.get(state.status, "red")
    yield Text.assemble((str(state.folder), "bold"), "  ", (state.status, f"bold {colour}"), "  ", state.says, overflow="fold")
    if state.total_steps is not None:
        yield Text("  ".join(facts(state)))


def _alerts(state: RunState) -> Iterator[RenderableType]:
    for alert in state.alerts:
        yield Text.assemble(
            ("warning: ", "bold red"), f"{alert.says} ", (alert.remedy, "italic"), f" [{alert.name}]", overflow="fold"
        )


def _charts(state: RunState, width: int, blocks: str) -> Iterator[RenderableType]:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")  # not by an ellipsis, which plain terminals have not
    for section in sections(state.lines):
        table.add_row(Text(f"\n{section.title}", style="bold"))
        for panel in section.panels:
            for row in _rows(panel, width, blocks):
                table.add_row(*row)
    yield table


def _rows(panel: Panel, width: int, blocks: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, chart and latest value of each curve; the teacher's value stands beside the student's."""
    teacher = panel.curves.get(TEACHER)
    for name, curve in panel.curves.items():
        if name == TEACHER or not curve:
            continue
        label = panel.title if teacher or not name else f"{panel.title}: {name}"
        values = [value for _, value in thinned(curve, width)]
        beside = f"  teacher {_latest(teacher)}" if teacher else ""
        yield escape(label), sparkline(values, blocks, panel.is_log), f"{_latest(curve)}{beside}"


def _latest(curve: Curve) -> str:
    return f"{curve[-1][1]:.4g}"
