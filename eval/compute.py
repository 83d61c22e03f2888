"""Every setting of compute beside the plain step: time, time to compile, and what it changes of the losses.

Two runs in one process, of which one has the setting, do the same steps in turns.

    python eval/compute.py          # CPU, one thread, minutes: the digits
    python eval/compute.py --gpu    # CUDA, minutes: Stable Diffusion 1.5's network with random weights

Both write eval/results/compute.json, each its own part, and a table of docs/compute.md.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffdistill.bench.definition import Cell, Definition, definition_path, read_definition
from diffdistill.bench.page import fill, ratio_text, table
from diffdistill.bench.results import machine
from diffdistill.bench.session import Session, open_session
from diffdistill.bench.timing import Ratio, clock_of, paired_ratio, wall_time
from diffdistill.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "compute.json"
PAGE = ROOT / "docs" / "compute.md"
STEPS = 20
MOVED = {"copies": 0.002, "shared": 0.02}  # standard deviation of what is added to weights, to those of adapters
FIRST = 2  # cycles in which things are compiled and made


class Case(NamedTuple):
    """A setting on a cell; both runs have `also`."""

    cell: Cell
    setting: str
    also: tuple[str, ...] = ()


def cases(on_gpu: bool) -> list[Case]:
    """Return what is measured."""
    if not on_gpu:
        unet, dit = Cell("digits-unet", "vsd", "copies", 16), Cell("digits-dit", "vsd", "shared", 16)
        return [
            Case(unet, "compute.channels_last=true"),
            Case(unet, "compute.frozen=bf16"),
            Case(dit, "compute.frozen=bf16"),
            Case(unet, "compute.compile=blocks"),
            Case(dit, "compute.compile=blocks"),
        ]
    shared, copies = Cell("sd15", "dmd2", "shared", 8), Cell("sd15", "vsd", "copies", 8)
    return [
        *(Case(shared, f"compute.{each}") for each in ("compile=blocks", "cuda_graphs=true", "channels_last=true")),
        *(Case(copies, f"compute.{each}") for each in ("compile=blocks", "cuda_graphs=true", "frozen=fp8")),
        Case(copies._replace(batch=2), "compute.frozen=bf16", ("precision=fp32", "teacher_options.dtype=fp32")),
    ]


def opened(definition: Definition, cell: Cell, overrides: Sequence[str]) -> Session:
    """Return a run whose roles have moved apart."""
    session = open_session(definition.run_config(cell, overrides), definition.teachers[cell.teacher].published)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in session.roles.names:
            for parameter in session.roles.parameters(name):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                parameter.add_(noise, alpha=MOVED[cell.layout])
    return session


def measure(case: Case, definition: Definition) -> dict[str, Any]:
    """Do the steps of both runs, and return a row of the table."""
    runs = [opened(definition, case.cell, (*case.also, *more)) for more in ((case.setting,), ())]
    device, steps = runs[0].teacher.device, STEPS // runs[0].cycle_steps
    losses: list[list[dict[str, float]]] = []

    def cycles(num: int, clock: Callable[[Callable[[], object]], float]) -> list[list[float]]:
        times = []
        for _ in range(num):
            times.append([clock(run.cycle) for run in runs])
            losses.append([run.engine.meter.read() for run in runs])
        return times

    first = cycles(FIRST, partial(wall_time, device=device))
    times = cycles(steps - 2 * FIRST, clock_of(device))
    later = cycles(FIRST, partial(wall_time, device=device))
    off = [abs(a[name] - b[name]) / abs(b[name]) for a, b in losses for name in b if name.endswith("/total")]
    row = {
        "run": " ".join((*map(str, case.cell), *case.also)),
        "setting": case.setting,
        "plain_ms": 1000 * sum(plain for _, plain in times) / len(times) / runs[0].cycle_steps,
        "ratio": paired_ratio(*zip(*times, strict=True)),
        "warm_up_s": max(0.0, sum(each[0] for each in first) - sum(each[0] for each in later)),
        "difference": max(off),
    }
    print(row, flush=True)
    return row


def optimisers(definition: Definition, cell: Cell) -> list[dict[str, Any]]:
    """Time the update of a student's weights, and of their average, one tensor at a time and at once."""
    session = opened(definition, cell, ())
    clock, weights = clock_of(session.teacher.device), session.roles.parameters("student")
    others = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.randn_like(weight)

    def adamw(**options: bool) -> Callable[[], object]:
        return torch.optim.AdamW(weights, 1e-6, **options).step

    def lerp() -> None:
        for other, weight in zip(others, weights, strict=True):
            other.lerp_(weight.detach(), 1e-3)

    one_by_one = {"AdamW": adamw(foreach=False), "average": lerp}
    ways = {
        ("AdamW", "fused"): adamw(fused=True),
        ("AdamW", "foreach"): adamw(foreach=True),
        ("average", "foreach"): lambda: torch._foreach_lerp_(others, [weight.detach() for weight in weights], 1e-3),
    }
    rows = []
    for (what, way), action in ways.items():
        pairs = [(clock(action), clock(one_by_one[what])) for _ in range(3 + STEPS)][3:]
        ms = 1000 * sum(plain for _, plain in pairs) / len(pairs)
        rows.append({"run": " ".join(map(str, cell)), "tensors": len(weights), "what": what, "way": way, "plain_ms": ms})
        rows[-1]["ratio"] = paired_ratio(*zip(*pairs, strict=True))
    return rows


def page(parts: dict[str, dict[str, Any]]) -> str:
    """Return the tables of all devices."""
    settings: dict[str, Callable[[dict[str, Any]], object]] = {
        "run": lambda row: row["run"],
        "setting": lambda row: row["setting"],
        "plain step ms": lambda row: f"{row['plain_ms']:.1f}",
        "step / plain": lambda row: ratio_text(Ratio(*row["ratio"])),
        "warm-up s": lambda row: f"{row['warm_up_s']:.1f}",
        "difference of losses": lambda row: f"{row['difference']:.0e}",
    }
    at_once: dict[str, Callable[[dict[str, Any]], object]] = {
        "weights": lambda row: f"{row['run']}, {row['tensors']} tensors",
        "update": lambda row: f"{row['what']}, {row['way']}",
        "one by one ms": lambda row: f"{row['plain_ms']:.2f}",
        "at once / one by one": lambda row: ratio_text(Ratio(*row["ratio"])),
    }
    return "\n\n".join(
        f"**{title}**, torch {part['torch']}, {part['threads']} threads.\n\n{table(settings, part['settings'])}\n\n{table(at_once, part['optimisers'])}"
        for title, part in parts.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    on_gpu = parser.parse_args().gpu
    torch.set_num_threads(1)
    definition, facts = read_definition(definition_path("gpu" if on_gpu else "cpu")), machine()
    parts: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    part = parts[facts.device] = {"torch": facts.torch, "threads": facts.threads, "settings": []}
    part["optimisers"] = optimisers(definition, cases(on_gpu)[-1].cell)
    for case in cases(on_gpu):
        part["settings"].append(measure(case, definition))
        write_json(RESULTS, parts)
        fill(PAGE, "settings", page(parts))
        gc.collect()


if __name__ == "__main__":
    main()
