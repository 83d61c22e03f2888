"""Quality against cost of every method, on both families and in both role layouts, beside the teacher's best samplers.

Every cell (family, method, layout) trains the recipe `configs/study/METHOD.yaml`; its scores are one JSON file in
`eval/results/`, so a study that was stopped goes on where it was. A student is scored at the step counts it serves, on the
`digits` protocol: 10,000 images in each of three blocks of seeds.

    python eval/study.py [--families digits-unet] [--methods dmd2-1] [--layouts copies] [--jobs 2]
    python eval/study.py --table        # only write docs/results.md and README.md's table from the results that exist
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
RUNS = ROOT / "runs" / "study"
FAMILIES = ("digits-unet", "digits-dit")
LAYOUTS = ("copies", "shared")
METHODS = ("progressive", "consistency", "dmd2-1", "dmd2-4")
SOLVERS = ("ddim", "heun", "dpmpp_2m", "unipc")
BASELINE_STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 50
LORA = ["roles.layout=shared", "roles.lora={rank: 16, targets: all}"]


class Cell(NamedTuple):
    """One thing to train and score; the method "teacher" is the training-free samplers."""

    family: str
    method: str
    layout: str

    @property
    def file(self) -> Path:
        """Where its scores are."""
        return RESULTS / f"{self.family}.{self.method}.{self.layout}.json"


def cells(families: list[str], methods: list[str], layouts: list[str]) -> Iterator[Cell]:
    """Yield every cell asked for, baselines first."""
    if "teacher" in methods:
        yield from (Cell(family, "teacher", "none") for family in families)
    for layout in layouts:
        for family in families:
            yield from (Cell(family, method, layout) for method in METHODS if method in methods)


def served_steps(method: str, stages: list) -> list[tuple[int, int]]:
    """Return (student steps, run step of the checkpoint that serves them)."""
    if method == "progressive":
        done, served = 0, []
        for stage in stages:
            done += stage.steps
            served.append((stage.method.student_steps, done))
        return [(count, step) for count, step in served if count in BASELINE_STEPS]
    total = sum(stage.steps for stage in stages)
    steps = {"consistency": (1, 2, 4, 8), "dmd2-1": (1,), "dmd2-4": (4,)}[method]
    return [(count, total) for count in steps]


def score_students(cell: Cell, protocol: str) -> dict:
    """Train a cell (or go on with it) and score it at every step count."""
    import diffdistill as dd
    from diffdistill.config import load_config
    from diffdistill.training.checkpoint import name
    from diffdistill.training.run import train

    output = RUNS / f"{cell.family}.{cell.method}.{cell.layout}"
    overrides = [f"teacher={cell.family}", f"output={output}", *(LORA if cell.layout == "shared" else [])]
    config = load_config(ROOT / "configs" / "study" / f"{cell.method}.yaml", overrides)
    train(config, resume=output.exists(), progress=False)
    scores = {}
    for steps, done in served_steps(cell.method, list(config.stages)):
        evaluation = dd.evaluate(output, protocol, steps=(steps,), checkpoint=name(done))[steps]
        scores[str(steps)] = evaluation.to_json()
        print(cell, steps, f"FID {evaluation.mean('fid'):.3f}", flush=True)
    return {"training_steps": config.total_steps, "scores": {"student": scores}}


def score_teacher(cell: Cell, protocol: str) -> dict:
    """Score the training-free samplers at the given NFE, and DDIM at 50 steps."""
    import diffdistill as dd

    scores: dict = {}
    for solver in SOLVERS:
        # Heun at n steps costs 2n - 1; in one step every solver is DDIM
        for steps in {"ddim": BASELINE_STEPS, "heun": (2, 4)}.get(solver, BASELINE_STEPS[1:]):
            evaluation = dd.evaluate(cell.family, protocol, steps=(steps,), solver=solver)[steps]
            scores.setdefault(solver, {})[str(steps)] = evaluation.to_json()
            print(cell, solver, steps, f"FID {evaluation.mean('fid'):.3f}", flush=True)
    evaluation = dd.evaluate(cell.family, protocol, steps=(TEACHER_STEPS,), solver="ddim")[TEACHER_STEPS]
    scores["ddim"][str(TEACHER_STEPS)] = evaluation.to_json()
    return {"scores": scores}


def run_cells(todo: list[Cell], jobs: int, protocol: str) -> int:
    """Run the cells whose result is missing, `jobs` at a time, each in its own process with its share of the threads."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: list[subprocess.Popen] = []
    failed = 0
    queue = [cell for cell in todo if not cell.file.exists()]
    while queue or running:
        while queue and len(running) < jobs:
            command = [sys.executable, __file__, "--protocol", protocol, "--cell", *queue.pop(0)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(1)
        failed += sum(process.poll() not in (None, 0) for process in running)
        running = [process for process in running if process.poll() is None]
    return failed


def results() -> dict[Cell, dict]:
    """Return every stored result by cell."""
    found = {}
    for family in FAMILIES:
        for cell in cells([family], ["teacher", *METHODS], list(LAYOUTS)):
            if cell.file.exists():
                found[cell] = json.loads(cell.file.read_text())
    return found


def fid(evaluation: dict) -> float:
    """Return the mean FID of a stored evaluation."""
    return evaluation["values"]["fid"]["mean"]


def best_baseline(scores: dict, nfe: int) -> tuple[str, dict]:
    """Return the training-free sampler of lowest FID at no more than `nfe` network evaluations."""
    candidates = [(name, e) for name, by_steps in scores.items() for e in by_steps.values() if e["cost"]["nfe"] <= nfe]
    return min(candidates, key=lambda item: fid(item[1]))


def _figure(evaluation: dict) -> str:
    value = evaluation["values"]["fid"]
    return f"{value['mean']:.2f} ± {value['sd']:.2f}" if value["sd"] is not None else f"{value['mean']:.2f}"


def table(family: str, found: dict[Cell, dict]) -> list[str]:
    """Return the Markdown table of one family: FID, spread and class accuracy at each step count."""
    teacher = found[Cell(family, "teacher", "none")]["scores"]
    lines = ["| method | roles | 1 step | 2 steps | 4 steps | 8 steps | training |", "|---|---|---|---|---|---|---|"]
    best = [best_baseline(teacher, nfe) for nfe in BASELINE_STEPS]
    lines.append(
        "| teacher, best of DDIM, Heun, DPM-Solver++(2M), UniPC | | "
        + " | ".join(f"{_figure(e)} ({name})" for name, e in best)
        + " | |"
    )
    for method in METHODS:
        for layout in LAYOUTS:
            result = found.get(Cell(family, method, layout))
            if result is None:
                continue
            scores = result["scores"]["student"]
            texts = [
                f"{_figure(scores[str(n)])}, {scores[str(n)]['values']['accuracy']['mean']:.1%}" if str(n) in scores else ""
                for n in BASELINE_STEPS
            ]
            roles = "copies, full" if layout == "copies" else "shared, LoRA"
            cost = f"{result['training_steps']} steps"
            lines.append(f"| {method} | {roles} | " + " | ".join(texts) + f" | {cost} |")
    reference = teacher["ddim"][str(TEACHER_STEPS)]
    accuracy = reference["values"]["accuracy"]["mean"]
    lines += ["", f"Teacher at {TEACHER_STEPS} DDIM steps: FID {_figure(reference)}, accuracy {accuracy:.1%}."]
    return lines


def write_pages(found: dict[Cell, dict]) -> None:
    """Write docs/results.md, and the tables between README.md's markers."""
    from diffdistill.files import write_atomic

    families = [family for family in FAMILIES if Cell(family, "teacher", "none") in found]
    tables = [line for family in families for line in [f"**{family}**", "", *table(family, found), ""]]
    page = [
        "# Results",
        "",
        "`python eval/study.py`: FID on the digit classifier's features against all 1,797 real digits, 10,000 images, "
        "mean ± standard deviation over three blocks of seeds; then the share of images that the classifier puts in the class "
        "asked for. Baselines are the best at no more network evaluations than the column's. Training steps have batch 64.",
        "",
        *tables,
    ]
    notes = ROOT / "eval" / "results_notes.md"
    if notes.exists():
        page.append(notes.read_text().rstrip())
    write_atomic(ROOT / "docs" / "results.md", "\n".join(page).rstrip() + "\n")
    readme = (ROOT / "README.md").read_text()
    head, rest = readme.split("<!-- results -->")
    _, tail = rest.split("<!-- /results -->")
    write_atomic(ROOT / "README.md", head + "<!-- results -->\n" + "\n".join(tables) + "<!-- /results -->" + tail)


def main() -> int:
    """Run what is missing and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--methods", nargs="*", default=["teacher", *METHODS], choices=["teacher", *METHODS])
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--protocol", default="digits")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        from diffdistill.files import write_json

        cell = Cell(*options.cell)
        write_json(cell.file, (score_teacher if cell.method == "teacher" else score_students)(cell, options.protocol))
        return 0
    failed = 0
    if not options.table:
        failed = run_cells(list(cells(options.families, options.methods, options.layouts)), options.jobs, options.protocol)
    write_pages(results())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
