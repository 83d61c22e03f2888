"""The main job on embedded data: a teacher, three methods, one table, a report, and an export that stock diffusers loads.

diffdistill quickstart            about four minutes on two cores
diffdistill quickstart --short    the same path in a few steps each: shows that everything runs, not good images
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffdistill import api
from diffdistill.config import RunConfig, dump_config, load_config
from diffdistill.errors import MachineError, UserError
from diffdistill.evaluation.named import Result
from diffdistill.evaluation.pictures import Pictures
from diffdistill.evaluation.report import ReportData, Tile, readme_picture, write_report
from diffdistill.evaluation.result import Evaluation
from diffdistill.evaluation.table import Row, table
from diffdistill.recipes import recipe_path
from diffdistill.training.checkpoint import name as checkpoint_name
from diffdistill.training.run import train

TEACHER = "digits-unet"
METHODS = ("progressive", "consistency", "dmd2")
STEPS = (1, 2, 4)
SOLVERS = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "unipc": "UniPC"}
REFERENCE_STEPS = 50
PROTOCOL = "digits-short"
NUM_PICTURES = 40
SHORT_STEPS = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A row of the table, and where its images come from.

    Attributes:
        name: as the table and the curves call it.
        target: what `api.sample` makes the images from.
        steps: network steps.
        solver: of the teacher; None for a student.
        checkpoint: of a run; None for the newest.
    """

    name: str
    target: str
    steps: int
    solver: str | None = None
    checkpoint: str | None = None

    @property
    def is_student(self) -> bool:
        """Whether a run made it."""
        return self.solver is None


def run(output: str | Path = "runs/quickstart", short: bool = False, say: Say = print) -> Path:
    """Do the main job; return the path of the report.

    Args:
        output: folder of the runs, the export and the report.
        short: four steps of training each, to see that everything runs.
        say: receives one line per result.
    Raises:
        UserError: the folder holds something else.
        MachineError: the export did not verify.
    """
    output = Path(output)
    _clear(output)
    start = time.perf_counter()
    configs = [_train(method, output, short, say) for method in METHODS]
    entries = [*_teacher_entries(), *(entry for config in configs for entry in student_entries(config))]
    rows, results = [], []
    for entry in entries:
        evaluation = _evaluate(entry)
        results.append(Result(entry.name, evaluation))
        rows.append(Row.from_evaluation(entry.name, evaluation))
        say(f"  {entry.name}, {rows[-1].nfe:g} NFE: FID {rows[-1].fid:.2f}, accuracy {rows[-1].accuracy:.1%}")
    best, best_row = min(((e, r) for e, r in zip(entries, rows, strict=True) if e.is_student), key=lambda pair: pair[1].fid)
    verification = _export(best, output / "student", say)
    data = ReportData(
        title="diffdistill quickstart",
        summary=f"The bundled digits teacher and three students of it. Best student: {best.name}, {best.steps} step(s), FID "
        f"{best_row.fid:.2f}, exported to {output / 'student'} and verified with stock diffusers.",
        results=results,
        tiles=tiles(entries, rows),
        pictures=Pictures(
            {f"{e.name}, {r.nfe:g} NFE": _pictures(e) for e, r in zip(entries, rows, strict=True) if _is_shown(e)}
        ),
        command="diffdistill quickstart" + " --short" * short,
        configs={config.output.name: dump_config(config) for config in configs},
        how_to_load=_loading_code(output / "student"),
        verification=verification,
        facts={"seconds": f"{time.perf_counter() - start:.0f}"},
    )
    page = write_report(data, output)
    readme_picture(replace(data, pictures=Pictures(_few(data.pictures.grids))), output / "report.png")
    say("\n" + table(rows))
    say(f"{page} written after {time.perf_counter() - start:.0f} s")
    return page


def _clear(output: Path) -> None:
    """Empty the folder of an earlier quickstart; anything else there is refused."""
    if not output.exists():
        return
    known = {*METHODS, "student", "report.html", "report.json", "report.png"}
    strangers = sorted(path.name for path in output.iterdir() if path.name not in known)
    if strangers:
        raise UserError(f"{output} holds files that no quickstart wrote ({', '.join(strangers[:3])}); choose another --output.")
    shutil.rmtree(output)


def _train(method: str, output: Path, short: bool, say: Say) -> RunConfig:
    """Train a method by its recipe in `configs/quickstart/`."""
    overrides = [f"output={output / method}"]
    recipe = recipe_path(f"quickstart/{method}")
    if short:
        overrides += [f"stages.{index}.steps={SHORT_STEPS}" for index in range(len(load_config(recipe).stages))]
    config = load_config(recipe, overrides)
    start = time.perf_counter()
    train(config)
    say(f"{method}: {config.total_steps} steps in {time.perf_counter() - start:.0f} s")
    return config


def _teacher_entries() -> Iterator[Entry]:
    """Yield the training-free samplers at the students' steps, and DDIM at 50."""
    for steps in STEPS:
        for solver, title in SOLVERS.items():
            if steps > 2 or solver == "ddim":  # first and last step of the multistep solvers are DDIM
                yield Entry(f"teacher, {title}", TEACHER, steps, solver)
    yield Entry("teacher, DDIM", TEACHER, REFERENCE_STEPS, "ddim")


def student_entries(config: RunConfig) -> Iterator[Entry]:
    """Yield a run's student at the step counts it serves: what each stage was trained for, else all of STEPS."""
    done = 0
    for stage in config.stages:
        done += stage.steps
        fixed = stage.method.fixed_steps
        for steps in STEPS if fixed is None else (fixed,):
            yield Entry(stage.method.name, str(config.output), steps, checkpoint=checkpoint_name(done))


def tiles(entries: Sequence[Entry], rows: Sequence[Row]) -> list[Tile]:
    """Return the FID of the teacher at its full steps, then that of the best student at each step count.

    Never the best of all rows: at one step the teacher's blurred means are classified best of all, and are no digits.
    """
    results = list(zip(entries, rows, strict=True))
    teacher = [row for entry, row in results if not entry.is_student and entry.steps == REFERENCE_STEPS]
    found = [_tile(f"teacher, {REFERENCE_STEPS} steps", teacher)]
    for steps in STEPS:
        students = [row for entry, row in results if entry.is_student and entry.steps == steps]
        found.append(_tile(f"best student, {steps} step{'s' if steps > 1 else ''}", students))
    return found


def _tile(label: str, rows: Sequence[Row]) -> Tile:
    """Return the row of the lowest FID as a tile."""
    best = min(rows, key=lambda row: row.fid)
    return Tile(label, f"FID {best.fid:.2f}", f"{best.method}, {best.nfe:g} NFE, accuracy {best.accuracy:.1%}")


def _evaluate(entry: Entry) -> Evaluation:
    found = api.evaluate(entry.target, PROTOCOL, (entry.steps,), solver=entry.solver, checkpoint=entry.checkpoint)
    return found[entry.steps]


def _pictures(entry: Entry) -> np.ndarray:
    """Return uint8 images (N, C, H, W) of seeds 0..N-1, four of each class: equal noise for every entry."""
    samples = api.sample(entry.target, entry.steps, NUM_PICTURES, solver=entry.solver, checkpoint=entry.checkpoint)
    return samples.images.numpy()


def _is_shown(entry: Entry) -> bool:
    """Return whether an entry has a grid of images in the report: the students, and the teacher by DDIM."""
    return entry.is_student or entry.solver == "ddim"


def _few(shown: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the grids of the picture: the teacher at one step and at 50, and each method at its fewest steps."""
    fewest: dict[str, str] = {}
    for title in shown:
        name = title.rsplit(", ", 1)[0]
        if name in METHODS:
            fewest[name] = min(title, fewest.get(name, title), key=lambda text: int(text.split()[-2]))
    teacher = [title for title in shown if title.startswith("teacher") and title.split()[-2] in ("1", str(REFERENCE_STEPS))]
    return {title: shown[title] for title in (*teacher, *fewest.values())}


def _export(best: Entry, folder: Path, say: Say) -> str:
    """Export and verify a student; return what the check found."""
    api.export(best.target, folder, steps=(best.steps,), checkpoint=best.checkpoint)
    verification = api.verify(folder)
    text = str(verification)
    say(f"\nexported {best.name}, {best.steps} step(s), to {folder}\n{text}")
    if not verification.passed:
        raise MachineError(f"the export in {folder} did not verify:\n{text}")
    return text


def _loading_code(folder: Path) -> str:
    """Return the runnable lines of the export's card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return card.split("```python\n")[1].split("```")[0]
