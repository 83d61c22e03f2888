"""Cost of a training step over the network passes it must do, for every method, layout and family.

The floor is counted, not assumed: every call of a network is recorded with its batch size and whether it keeps a graph, over
whole cycles of the method's turns. The same passes are then timed bare, on the same network, in the same process, turn by turn
with the steps: forward without graph, and forward with graph plus backward. Reported is step time / floor. The engine's own
step runs, with optimiser, clipping and EMA.

    python eval/step_cost.py [--batch 128] [--cycles 6] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.config import RunConfig, parse_config
from diffdistill.files import write_atomic, write_json
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.roles import Roles
from diffdistill.training.building import open_stage
from diffdistill.training.engine import Engine

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "progressive": {"name": "progressive", "student_steps": 4},
    "consistency": {"name": "consistency"},
    "dmd2": {"name": "dmd2", "student_steps": 4},
}
"""The settings that are measured: the defaults of each method."""


@dataclass(frozen=True)
class Pass:
    """One network call: number of samples, and whether it keeps a graph."""

    samples: int
    graph: bool


@contextlib.contextmanager
def recorded() -> Iterator[Counter[Pass]]:
    """Count every call of a network while the block runs."""
    calls: Counter[Pass] = Counter()
    original = NetworkDenoiser.__call__

    def call(self: NetworkDenoiser, x_t: Tensor, t: Tensor, cond: object) -> object:
        result = original(self, x_t, t, cond)  # type: ignore[arg-type]
        calls[Pass(len(x_t), result.raw.requires_grad)] += 1
        return result

    NetworkDenoiser.__call__ = call  # type: ignore[method-assign, assignment]
    try:
        yield calls
    finally:
        NetworkDenoiser.__call__ = original  # type: ignore[method-assign]


def run_config(teacher: str, method: dict, layout: str, batch: int, output: Path) -> RunConfig:
    """Return a run whose steps are only timed."""
    lora = {"rank": 16, "targets": "all"} if layout == "shared" else None
    return parse_config(
        {
            "teacher": teacher,
            "output": str(output),
            "data": {"kind": "digits"},
            "roles": {"layout": layout, "lora": lora},
            "stages": [{"steps": 100000, "method": method}],
            "batch_size": batch,
        }
    )


@dataclass
class Session:
    """A stage ready to train: `step` does the next step of the engine."""

    teacher: Teacher
    roles: Roles
    engine: Engine
    done: int = 0

    def step(self) -> None:
        """Train one step."""
        self.engine.step(self.done)
        self.done += 1


def open_session(config: RunConfig) -> Session:
    """Build the first stage of a run as `train` builds it."""
    teacher = load_teacher(config.teacher)
    roles, engine = open_stage(config, teacher)
    return Session(teacher, roles, engine)


def _clock(action: Callable[[], None]) -> float:
    """Return the processor time of an action on one thread, which other work on the machine disturbs least."""
    start = time.process_time()
    action()
    return time.process_time() - start


def bare_passes(session: Session, batch: int) -> dict[bool, Callable[[int], None]]:
    """Return, by whether a graph is kept, a function that does one such pass of the student's network."""
    net: Denoiser = session.roles["student"]
    x = torch.randn(batch, *net.sample_shape)
    t = torch.linspace(1, 998, batch, dtype=torch.float64)
    cond = session.teacher.condition(torch.arange(batch) % session.teacher.num_classes)
    parameters = session.roles.parameters("student")

    def forward(samples: int) -> None:
        repeats = -(-samples // batch)
        with torch.no_grad():
            states, times = x.repeat(repeats, 1, 1, 1)[:samples], t.repeat(repeats)[:samples]
            net(states, times, cond.repeat(repeats).select(slice(0, samples)))

    def with_backward(samples: int) -> None:
        for parameter in parameters:
            parameter.grad = None
        net(x[:samples], t[:samples], cond.select(slice(0, samples))).raw.square().mean().backward()

    return {False: forward, True: with_backward}


def measure(teacher: str, method: str, layout: str, batch: int, cycles: int) -> dict:
    """Return step time, floor and their ratio for one cell: medians over alternating blocks of steps and bare passes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(teacher, METHODS[method], layout, batch, Path(folder) / "run")
        session = open_session(config)
        settings = config.stages[0].method
        cycle = max(1, getattr(settings, "student_every", 1))
        counted_over = cycle * 8  # the rollout's length is random; its mean settles over a few cycles
        with recorded() as calls:
            for _ in range(counted_over):
                session.step()
        passes = {kind: count / counted_over for kind, count in calls.items()}
        session.roles.train_only(("student",))
        bare = bare_passes(session, batch)
        for kind in passes:
            bare[kind.graph](kind.samples)
        step_times, floors = [], []
        for _ in range(cycles):
            with recorded() as calls:
                spent = sum(_clock(session.step) for _ in range(cycle))
            session.roles.train_only(("student",))
            floor = 0.0
            for kind, count in calls.items():
                times = [_clock(lambda kind=kind: bare[kind.graph](kind.samples)) for _ in range(3)]
                floor += count * statistics.median(times)
            step_times.append(spent / cycle)
            floors.append(floor / cycle)
        ratios = [step / floor for step, floor in zip(step_times, floors, strict=True)]
        return {
            "family": teacher,
            "method": method,
            "layout": layout,
            "step_ms": 1000 * statistics.median(step_times),
            "floor_ms": 1000 * statistics.median(floors),
            "ratio": statistics.median(ratios),
            "forward": round(sum(count for kind, count in passes.items() if not kind.graph), 2),
            "forward_backward": round(sum(count for kind, count in passes.items() if kind.graph), 2),
            "peak_mib": _peak_mib(),
        }


def _peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| family | method | layout | forward / step | forward+backward / step | step ms | floor ms | step / floor | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['family']} | {row['method']} | {row['layout']} | {row['forward']:.2f} | {row['forward_backward']:.2f} "
            f"| {row['step_ms']:.0f} | {row['floor_ms']:.0f} | **{row['ratio']:.2f}** | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure every cell, each in its own process so that peak memory is its own; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--teachers", nargs="*", default=["digits-unet", "digits-dit"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--layouts", nargs="*", default=["copies", "shared"])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(*options.cell, options.batch, options.cycles)))
        return 0
    import subprocess

    rows = []
    for cell in [[t, m, l] for t in options.teachers for m in options.methods for l in options.layouts]:
        command = [sys.executable, __file__, "--batch", str(options.batch), "--cycles", str(options.cycles), "--cell", *cell]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(result.stderr, file=sys.stderr)
            return 1
        rows.append(json.loads(result.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
    command = f"python eval/step_cost.py --batch {options.batch} --cycles {options.cycles}"
    page = (
        f"# Cost of a training step\n\n`{command}` on one thread of a {platform.machine()} processor, "
        f"torch {torch.__version__}, float32.\n\n"
        "Times are processor time. Forward and forward+backward count the network calls of one step, averaged over the method's cycle and the random "
        "length of its rollout; a guided pair counts as one call of twice the batch. The floor is the time of exactly those calls, "
        "bare, on the same network in the same process. Peak MiB is the whole process, libraries included. Step / floor is the median of the ratios of single cycles, so it is not the quotient of the two columns before it, which are medians by themselves over rollouts of random length. A ratio below 1 shows the noise: read these as plus or minus a tenth.\n\n"
        + table(rows)
        + "\n"
    )
    write_atomic(options.output, page)
    write_json(ROOT / "eval" / "results" / "step_cost.json", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
