"""Few-step LoRA students of the embedded text-to-image teachers beside the teachers themselves, on the captioned shapes.

Every recipe of `configs/shapes/` is trained once (a killed run goes on where it was) and scored on protocol `shapes`: 5,000
captions in each of three blocks of seeds. Scores are one JSON file each in `eval/results/`, so a study that was stopped
goes on where it was.

    python eval/shapes_study.py [--rows lcm-2 lcm-4]       # train and score what is missing, then write docs/shapes.md
    python eval/shapes_study.py --table                    # only write docs/shapes.md from the scores that exist
    python eval/shapes_study.py --picture --rows pixart-teacher-25 pixart-dmd2-4   # only draw docs/shapes.png
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
RUNS = ROOT / "runs" / "shapes"
TEACHERS = {"shapes-sd": "The UNet, `shapes-sd`", "shapes-pixart": "The transformer, `shapes-pixart`"}
TEACHER_STEPS = 25
NUM_DRAWN = 8  # images of a row of the picture
NUM_COMPARED = 1000  # images of equal seeds in the comparison with the guided teacher's own


class Row(NamedTuple):
    """One line of the table: a student of a recipe after some of its stages, or the teacher where there is no recipe."""

    what: str
    recipe: str | None
    steps: int
    stages: int | None = None  # trained stages; None for all
    guidance: float | None = None  # of the teacher; None for its own
    teacher: str = "shapes-sd"

    @property
    def guided(self) -> bool:
        """Whether two passes a step are guided."""
        return self.recipe is None and self.guidance != 1


ROWS = {
    "teacher-25": Row("teacher, DDIM, guided", None, TEACHER_STEPS),
    "teacher-25-unguided": Row("teacher, DDIM, not guided", None, TEACHER_STEPS, guidance=1.0),
    "teacher-4": Row("teacher, DDIM, guided", None, 4),
    "teacher-2": Row("teacher, DDIM, guided", None, 2),
    "lcm-4": Row("LCM", "lcm", 4),
    "lcm-2": Row("LCM", "lcm", 2),
    "dmd2-4": Row("DMD2", "dmd2-4", 4),
    "dmd2-2": Row("DMD2", "dmd2-2", 2),
    "vsd-1": Row("VSD", "vsd", 1),
    "guidance-25": Row("guidance distillation, stage 1", "guidance", TEACHER_STEPS, stages=1),
    "guidance-4": Row("guidance distillation, then progressive", "guidance", 4, stages=4),
    "guidance-2": Row("guidance distillation, then progressive", "guidance", 2, stages=5),
    "agd-25": Row("AGD", "agd", TEACHER_STEPS),
    "pixart-teacher-25": Row("teacher, DDIM, guided", None, TEACHER_STEPS, teacher="shapes-pixart"),
    "pixart-teacher-4": Row("teacher, DDIM, guided", None, 4, teacher="shapes-pixart"),
    "pixart-teacher-2": Row("teacher, DDIM, guided", None, 2, teacher="shapes-pixart"),
    "pixart-dmd2-4": Row("DMD2", "pixart-dmd2-4", 4, teacher="shapes-pixart"),
    "pixart-dmd2-2": Row("DMD2", "pixart-dmd2-2", 2, teacher="shapes-pixart"),
}


def target_of(row: Row) -> tuple[str, str | None]:
    """Return what is scored and the checkpoint of the row's last stage, after the recipe has been trained as far as that."""
    from diffdistill.config import load_config
    from diffdistill.training.checkpoint import name
    from diffdistill.training.run import train

    if row.recipe is None:
        return row.teacher, None
    output = RUNS / row.recipe
    config = load_config(ROOT / "configs" / "shapes" / f"{row.recipe}.yaml", [f"output={output}"])
    train(config, resume=output.exists(), progress=False)
    return str(output), name(sum(stage.steps for stage in config.stages[: row.stages]))


def score(row: Row, protocol: str) -> dict:
    """Train what a row needs, score it, and compare its images with the guided teacher's of equal seeds."""
    import diffdistill as dd

    target, checkpoint = target_of(row)
    evaluation = dd.evaluate(target, protocol, (row.steps,), guidance=row.guidance, checkpoint=checkpoint)[row.steps]
    result = {"row": row._asdict(), "evaluation": evaluation.to_json()}
    if row.steps == TEACHER_STEPS and not row.guided:
        result["rmse_to_guided_teacher"] = difference(row, protocol)
    return result


def difference(row: Row, protocol: str) -> float:
    """Return the root mean square difference of pixels, in [-1, 1], from the guided teacher's images of equal seeds and captions."""
    guided = Row("", None, row.steps, teacher=row.teacher)
    ours, theirs = (images(asked, protocol, NUM_COMPARED) for asked in (row, guided))
    return (ours - theirs).square().mean().sqrt().item()


def images(row: Row, protocol: str, num: int) -> Tensor:
    """Return the first `num` images of a row's model with the protocol's seeds and captions, (num, 3, H, W) in [-1, 1]."""
    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.targets import open_target

    target, checkpoint = target_of(row)
    chosen, model = load_protocol(protocol), open_target(target, checkpoint=checkpoint)
    return model.generator(model.sampler(row.steps, row.guidance))(list(chosen.seeds(0))[:num], chosen.asked(0)[:num])


def draw_picture(names: list[str], protocol: str) -> None:
    """Write docs/shapes.png: images of equal seeds and captions, a line for each row of the study."""
    import textwrap

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.files import write_atomic

    captions = load_protocol(protocol).asked(0)[:NUM_DRAWN]
    figure = Figure(figsize=(1.2 * NUM_DRAWN + 1.4, 1.25 * len(names) + 0.6), layout="constrained", facecolor="white")
    axes = figure.subplots(len(names), NUM_DRAWN, squeeze=False)
    for name, line_of_axes in zip(names, axes, strict=True):
        row = ROWS[name]
        label = f"{row.what.split(',')[0]}, {row.steps} steps\n{row.steps * (2 if row.guided else 1)} passes"
        line_of_axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for place, image in zip(line_of_axes, images(row, protocol, NUM_DRAWN), strict=True):
            place.imshow((image.permute(1, 2, 0).cpu().clamp(-1, 1) + 1) / 2, interpolation="nearest")
            place.set(xticks=[], yticks=[])
    for place, caption in zip(axes[0], captions, strict=True):
        place.set_title(textwrap.fill(caption, 20), fontsize=7)
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    write_atomic(ROOT / "docs" / "shapes.png", drawn.getvalue())


def results() -> dict[str, dict]:
    """Return every stored result by the row's name."""
    return {name: json.loads(path.read_text()) for name in ROWS if (path := RESULTS / f"shapes.{name}.json").exists()}


def line(name: str, result: dict, teacher: dict | None) -> str:
    """Return one line of the table; what is compared with the teacher is empty until its row is there."""
    row, evaluation = ROWS[name], result["evaluation"]
    means, sds = ({key: value[part] or 0.0 for key, value in evaluation["values"].items()} for part in ("mean", "sd"))
    apart = {"obeyed": "", "clip_score": "", "fid": ""}
    if teacher is not None:
        best = {key: value["mean"] for key, value in teacher["evaluation"]["values"].items()}
        apart = {
            "obeyed": f"{100 * (means['obeyed'] - best['obeyed']):+.1f}",
            "clip_score": f"{100 * (means['clip_score'] / best['clip_score'] - 1):+.1f} %",
            "fid": f"{means['fid'] / best['fid']:.2f}",
        }
    same = result.get("rmse_to_guided_teacher")
    return (
        f"| {row.what} | {row.steps} | {evaluation['cost']['nfe']:g} | {100 * means['obeyed']:.1f} ± {100 * sds['obeyed']:.1f} | {apart['obeyed']} | "
        f"{means['clip_score']:.2f} ± {sds['clip_score']:.2f} | {apart['clip_score']} | {means['fid']:.2f} ± {sds['fid']:.2f} | "
        f"{apart['fid']} | {'' if same is None else f'{same:.3f}'} |"
    )


def table(teacher: str, found: dict[str, dict]) -> list[str]:
    """Return the rows of a teacher and its students, the best row of the teacher first."""
    names = [name for name in ROWS if name in found and ROWS[name].teacher == teacher]
    best = found.get(next(name for name, row in ROWS.items() if row.teacher == teacher))
    return [
        f"## {TEACHERS[teacher]}",
        "",
        "| | steps | NFE | obeyed, % | difference | CLIP score | difference | FID | ratio | same images |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line(name, found[name], best) for name in names),
        "",
    ]


def write_page(found: dict[str, dict]) -> None:
    """Write docs/shapes.md."""
    from diffdistill.files import write_atomic

    reference = next(iter(found.values()))["evaluation"]["reference_values"]
    notes = ROOT / "eval" / "shapes_notes.md"
    page = [
        "# Few steps from prompts: the captioned shapes",
        "",
        "`python eval/shapes_study.py`: protocol `shapes`, 5,000 captions in each of three blocks of seeds, mean ± standard deviation over "
        "the blocks. `obeyed` is the share of captions of which every part is in the image, read by a detector that is no network; "
        "CLIP score and FID are on the small CLIP's vectors, which no training uses. Differences and ratios are to the teacher's "
        f"{TEACHER_STEPS} guided steps. Every student is a LoRA of rank 32 on one frozen backbone, but for AGD's adapters. The last column is the "
        f"root mean square difference from the guided teacher's images of equal seeds, over {NUM_COMPARED:,} images with pixels in [-1, 1].",
        "",
        *(text for teacher in TEACHERS for text in table(teacher, found)),
        "![Images of equal seeds by the transformer and its students](shapes.png)",
        "",
        f"Drawn images themselves: obeyed {100 * reference['obeyed']:.1f} %, CLIP score {reference['clip_score']:.2f}.",
    ]
    if notes.exists():
        page += ["", notes.read_text().rstrip()]
    write_atomic(ROOT / "docs" / "shapes.md", "\n".join(page) + "\n")


def main() -> int:
    """Run what is missing and write the page."""
    from diffdistill.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--protocol", default="shapes")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    if options.picture:
        draw_picture(options.rows, "shapes-short")
        return 0
    for name in () if options.table else options.rows:
        path = RESULTS / f"{Path(options.protocol).stem}.{name}.json"  # the page is made of those of protocol `shapes`
        if not path.exists():
            write_json(path, score(ROWS[name], options.protocol))
            values = json.loads(path.read_text())["evaluation"]["values"]
            print(name, {key: round(values[key]["mean"], 4) for key in ("obeyed", "clip_score", "fid")}, flush=True)
    write_page(results())
    return 0


if __name__ == "__main__":
    sys.exit(main())
