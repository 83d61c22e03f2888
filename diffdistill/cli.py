"""The verbs. Each is a thin shell over a function of `diffdistill.api`; heavy modules are imported where a verb needs them."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter

from diffdistill.errors import MachineError, UserError, unknown_name
from diffdistill.files import is_full

if TYPE_CHECKING:
    from diffdistill.evaluation.external.scores import ExternalScores
    from diffdistill.evaluation.result import Evaluation

DEBUG = "DIFFDISTILL_DEBUG"
USER, MACHINE, INTERRUPTED = 2, 1, 130

Output = Annotated[Path, Parameter(alias="-o")]
Json = Annotated[bool, Parameter(name="--json", help="Print machine-readable JSON, and nothing else, on standard output.")]
Numbers = Annotated[tuple[int, ...], Parameter(consume_multiple=True)]
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]

app = App(
    name="diffdistill",
    help="Distil a diffusion or flow model into a few-step generator that stock diffusers loads.\n\n"
    "Start with `diffdistill quickstart`. Exit status: 0 success, 2 a mistake in the input, 1 a failure of the machine. "
    f"`--debug`, or {DEBUG}=1, shows tracebacks.",
    default_parameter=Parameter(negative=(), show_default=True),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # main() answers it
    version_flags=["--version"],
)


@app.command(sort_key=0)
def quickstart(*, short: bool = False, output: Output = Path("runs/quickstart")) -> int:
    """Walk the whole way on the embedded digits: distil with three methods, compare, export, verify.

    Args:
        short: fewer steps and images, to see that everything runs.
        output: folder of the report and the export.
    """
    from diffdistill.quickstart import run

    run(output, short=short)
    return 0


@app.command(sort_key=1)
def init(
    recipe: str | None = None,
    /,
    *,
    output: Output = Path("run.yaml"),
    show: Annotated[bool, Parameter(name="--list", help="List the recipes instead.")] = False,
    json: Json = False,
) -> int:
    """Write a commented config from a recipe.

    Args:
        recipe: name of a recipe.
        output: YAML file to write; an existing one is left as it is.
    """
    from diffdistill import recipes

    if show:
        return list_("recipes", json=json)
    if recipe is None:
        raise UserError(
            "name a recipe: `diffdistill init RECIPE -o run.yaml`. `diffdistill init --list` shows them. Known: "
            f"{', '.join(recipes.recipe_names())}."
        )
    path = recipes.write_recipe(recipe, output)
    verb = f"teacher {path} -o OUT" if recipe.startswith("teachers/") else f"check {path}"
    print(f"wrote {path}. Next: diffdistill {verb}")
    return 0


@app.command(sort_key=2)
def check(config: Path, /, *overrides: str, json: Json = False) -> int:
    """Check a run before it starts: settings, memory, teacher, data, samplers, export, and a few real steps.

    Args:
        config: YAML file of the run.
        overrides: a.b=c each, such as stages.0.steps=100.
    """
    from diffdistill.preflight import check as run
    from diffdistill.preflight import memory_table

    if json:
        _print_json(run(config, overrides).to_json())
    else:
        print(run(config, overrides, lambda plan, picked: print(memory_table(plan, picked) + "\n", flush=True)).text())
    return 0


@app.command(sort_key=3)
def train(config: Path, /, *overrides: str, resume: bool = False) -> int:
    """Run a config. The run folder holds config, log, samples, checkpoints and report.

    Args:
        config: YAML file of the run.
        overrides: a.b=c each, such as output=runs/second.
        resume: go on from the newest checkpoint; the same command again after a stop.
    """
    from diffdistill.config import load_config
    from diffdistill.training.run import train as run

    settings = load_config(config, overrides)
    run(settings, resume=resume)
    return 0


@app.command(sort_key=3)
def watch(
    run: Path,
    /,
    *,
    once: bool = False,
    refresh: float = 5.0,
    html: bool = False,
    port: int | None = None,
    output: Output | None = None,
    json: Json = False,
) -> int:
    """Watch a run, here or on a mounted disk: losses, drift guards, FID, time left, and warnings with what to do about them.

    Ctrl-C ends the watching, not the run.

    Args:
        run: run folder; the run may be going on, stopped, finished or killed.
        once: show it once; so it is where the output is no terminal.
        refresh: seconds between two looks.
        html: show it as a web page with the samples, at an address that only this machine can open.
        port: of the web page; a free one when left out.
        output: write the web page to this file instead, again at every look.
    """
    from diffdistill.watch.run import watch as show

    show(run, once=once, refresh_sec=refresh, html=html, port=port, output=output, as_json=json)
    return 0


@app.command(sort_key=4)
def teacher(config: Path, /, *, output: Output) -> int:
    """Train a small teacher, autoencoder or classifier from a config such as configs/teachers/digits-unet.yaml.

    Args:
        config: YAML file.
        output: folder to write; must not exist.
    """
    from diffdistill.api import train_teacher

    train_teacher(config, output)
    return 0


@app.command(sort_key=5)
def sample(
    target: str,
    /,
    *,
    steps: int | None = None,
    num: int = 16,
    labels: Numbers | None = None,
    seed: int = 0,
    guidance: float | None = None,
    solver: str | None = None,
    checkpoint: str | None = None,
    prompts: Path | None = None,
    attention: str | None = None,
    output: Output = Path("grid.png"),
) -> int:
    """Make images and write them as one PNG grid.

    Args:
        target: a run folder, an export, a pipeline folder, or an embedded teacher.
        steps: network steps; what the model is meant for when left out.
        num: images.
        labels: classes, repeated until there are enough; all in turn when left out.
        seed: of the first image; image k has seed + k.
        guidance: scale counted from 1; what the model is meant for when left out.
        solver: of a teacher: ddim, heun, dpmpp_2m, unipc, or stock for the pipeline's own scheduler.
        checkpoint: of a run; the newest when left out.
        prompts: file of prompts (.txt with one a line, or a table), for a model that reads text.
        attention: the kernel of attention (`doctor` lists them); the run's own, or auto, when left out.
        output: PNG file.
    """
    _png(output)
    from diffdistill import api
    from diffdistill.data.prompts import read_prompts

    texts = None if prompts is None else read_prompts(prompts)
    images = api.sample(target, steps, num, labels, seed, guidance, solver, checkpoint, texts, attention)
    images.save_grid(output)
    print(f"wrote {output}: {num} images, {images.num_steps} steps, {images.nfe} network evaluations each")
    return 0


eval_app = App(name="eval", sort_key=6)
app.command(eval_app)


@eval_app.default
def evaluate(
    target: str,
    /,
    *,
    protocol: str = "digits",
    steps: Numbers = (),
    metrics: Words = (),
    guidance: float | None = None,
    solver: str | None = None,
    checkpoint: str | None = None,
    lora: Path | None = None,
    num_images: int | None = None,
    batch_size: int | None = None,
    weights: str | None = None,
    save_images: Path | None = None,
    scores: Path | None = None,
    attention: str | None = None,
    output: Output | None = None,
    json: Json = False,
) -> int:
    """Score what a target makes, at each number of steps, or images that exist.

    GenEval and DPG-Bench have scorers of their own: --protocol geneval (or dpg) -o FOLDER makes the images in their layout, and
    --scores reads what the scorer wrote.

    With -o the same command goes on after a stop. `accelerate launch -m diffdistill eval ... -o FOLDER` shares it among processes.

    Args:
        target: a run folder, an export, a pipeline folder or hub id, an embedded teacher; or a folder, zip or npz of images.
        protocol: name of a protocol (`list protocols`) or its YAML file.
        steps: numbers of network steps; the one the model is meant for when left out.
        metrics: those wanted of the protocol's; all when left out.
        guidance: scale counted from 1; what the model is meant for when left out.
        solver: of a pipeline: ddim, heun, dpmpp_2m, unipc, lcm, tcd, or stock for its own scheduler.
        checkpoint: of a run; the newest when left out.
        lora: of a pipeline: a file or folder that its load_lora_weights takes.
        num_images: another number of images than the protocol's; the numbers then compare with no others.
        batch_size: images per call of the model; by their size when left out, two of 1024 by 1024 and at most 500.
        weights: of the feature networks: those of `weights list` when left out; random:SEED for a test that measures nothing.
        save_images: folder for the images, as PNG files.
        scores: results of an external scorer.
        attention: the kernel of attention (`doctor` lists them); the run's own, or auto, when left out.
        output: folder for report.html, report.json and one steps-N.json each, which `compare` reads.
    """
    from diffdistill import external, scoring
    from diffdistill.evaluation.table import Row, table

    _folder(output)
    if scores is not None:
        return _print_scores(external.read_scores(protocol, scores), json)
    if protocol in external.RUNNERS:
        if output is None:
            raise UserError(f"{protocol} is scored by a program of its own; write -o FOLDER for the images that it takes.")
        commands = external.write_images(
            protocol, target, output, steps, guidance, solver, checkpoint, lora, batch_size, scoring.processes(), _progress()
        )
        for folder, command in commands.items():
            print(
                f"wrote {folder}. Score it with `{command}`, then `diffdistill eval {target} --protocol {protocol} --scores RESULTS`."
            )
        return 0
    settings = scoring.Settings(
        protocol, tuple(metrics), num_images, guidance, batch_size, weights, output, save_images, attention
    )
    found = scoring.evaluate(target, steps, settings, solver, checkpoint, lora, _progress())
    if output is not None and scoring.processes().is_main:
        pictures = scoring.take_pictures(target, found, settings, solver, checkpoint, lora)
        scoring.write_evaluations(str(target), found, output, pictures, _command_line())
    if not scoring.processes().is_main:
        return 0
    if json:
        _print_json({"target": target, "evaluations": [report.to_json() for report in found.values()]})
    else:
        print(table([Row.from_evaluation(str(target), report) for report in found.values()]))
        _say_warnings(found.values())
        print(f"wrote {output / 'report.html'}" if output is not None else "", end="\n" if output is not None else "")
    return 0


@eval_app.command
def sweep(
    run: Path,
    /,
    *,
    protocol: str = "digits",
    steps: Numbers = (),
    metrics: Words = (),
    checkpoints: Words = (),
    guidance: float | None = None,
    num_images: int | None = None,
    batch_size: int | None = None,
    weights: str | None = None,
    output: Output | None = None,
    json: Json = False,
) -> int:
    """Score the checkpoints of a run; those that were scored before are read, so the same command goes on after a stop.

    Args:
        run: run folder.
        protocol: name of a protocol (`list protocols`) or its YAML file.
        steps: numbers of network steps; the one the student is meant for when left out.
        metrics: those wanted of the protocol's; all when left out.
        checkpoints: their names; all when left out.
        guidance: scale counted from 1; what the student is meant for when left out.
        num_images: another number of images than the protocol's; the numbers then compare with no others.
        batch_size: images per call of the model; by their size when left out, two of 1024 by 1024 and at most 500.
        weights: of the feature networks, as for eval.
        output: folder with a folder for each checkpoint; RUN/evaluations/PROTOCOL when left out.
    """
    from diffdistill import scoring
    from diffdistill.evaluation.table import Row, table

    _folder(output)
    settings = scoring.Settings(protocol, tuple(metrics), num_images, guidance, batch_size, weights, output)
    found = scoring.sweep(run, steps, settings, tuple(checkpoints), _progress())
    if not scoring.processes().is_main:
        return 0
    page = scoring.write_sweep(run, found, output or run / "evaluations" / Path(protocol).stem, _command_line())
    if json:
        _print_json({name: {key: e.to_json() for key, e in by_steps.items()} for name, by_steps in found.items()})
    else:
        print(table([Row.from_evaluation(name, e) for name, by_steps in found.items() for e in by_steps.values()]))
        _say_warnings(e for by_steps in found.values() for e in by_steps.values())
        print(f"wrote {page}")
    return 0


def _print_scores(found: ExternalScores, json: bool) -> int:
    from diffdistill.listing import columns

    if json:
        _print_json(found.to_json())
        return 0
    rows = [
        {"score": name, "value": f"{e.value:.4g}", "95 % interval": f"{e.low:.4g} to {e.high:.4g}"}
        for name, e in found.values.items()
    ]
    print(columns(rows))
    for note in found.notes:
        print(f"note: {note}")
    return 0


def _command_line() -> str:
    return shlex.join(["diffdistill", *sys.argv[1:]])


def _folder(path: Path | None) -> None:
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; -o names a folder.")


def _say_warnings(evaluations: Iterable[Evaluation]) -> None:
    for text in dict.fromkeys(text for evaluation in evaluations for text in evaluation.warnings):
        print(f"note: {text}")


@app.command(sort_key=7)
def stats(
    source: Path,
    /,
    *,
    protocol: str,
    format: str | None = None,
    weights: str | None = None,
    output: Output | None = None,
) -> int:
    """Make the statistics of a protocol's real images, from the images or from another package's file; `eval` then finds them.

    Args:
        source: a folder, zip or npz of the real images; or, with --format, a file of statistics.
        protocol: name of a protocol (`list protocols`) or its YAML file.
        format: edm, edm2, adm, clean-fid, pytorch-fid, cmmd or torch-fidelity.
        weights: of the feature networks, as for eval.
        output: folder; the store of references when left out.
    """
    from diffdistill.references import make_statistics

    show = _progress()
    files = make_statistics(source, protocol, format, weights, output, lambda done, total: show(str(source), done, total))  # type: ignore[arg-type]
    for path in files:
        print(f"wrote {path}")
    return 0


@app.command(sort_key=7)
def compare(*reports: Path, force: bool = False, output: Output | None = None, json: Json = False) -> int:
    """Put evaluations side by side, if they measure the same thing, and say which differences are more than the seeds.

    Args:
        reports: folders or steps-N.json files that `eval -o` wrote.
        force: show them also where they were measured differently, and say so.
        output: folder for report.html.
    """
    from diffdistill import api, scoring

    found = api.compare(reports, force=force)
    _print_json(found.to_json()) if json else print(found.text())
    if output is not None:
        evaluations = {name: each for path in reports for name, each in scoring.load_evaluations(path).items()}
        scoring.write_comparison(evaluations, found.sentences + found.differences, output, _command_line())
    return 0


@app.command(sort_key=8)
def export(
    run: Path,
    /,
    *,
    output: Output,
    kind: str = "auto",
    steps: Numbers = (),
    checkpoint: str | None = None,
    check_size: int | None = None,
) -> int:
    """Write the student of a run as something stock diffusers loads, with manifest, scheduler and card.

    Args:
        run: run folder.
        output: folder to write; must not exist.
        kind: auto, lora (a file for load_lora_weights), kohya (the same in other front ends' spelling), peft (an adapter folder)
            or merged (a whole pipeline).
        steps: numbers of steps it is meant for; the one it is trained for when left out.
        checkpoint: the newest when left out.
        check_size: edge in pixels of the images that a text-to-image student is verified on; the smallest possible when left out.
    """
    from diffdistill import api

    manifest = api.export(run, output, kind, steps, checkpoint, check_size)
    print(
        f"wrote {output} ({manifest.kind}, {manifest.pipeline_class}): {manifest.verification}.\n"
        f"{output / 'README.md'} says how to load it."
    )
    return 0


@app.command(sort_key=9)
def verify(folder: Path, /, *, json: Json = False) -> int:
    """Load an export with stock diffusers in a new process, and compare tensors and outputs with the student.

    Args:
        folder: what `export` wrote.
    """
    from diffdistill import api, listing

    found = api.verify(folder)
    if json:
        _print_json(found.model_dump(mode="json"))
    else:
        checks = [
            {
                "check": check.name,
                "status": check.status,
                "error": "" if check.error is None else f"{check.error:.1e}",
                "detail": check.detail,
            }
            for check in found.checks
        ]
        print(f"{listing.columns(checks)}\n{folder}: {found}")
    return 0 if found.passed else MACHINE


@app.command(name="list", sort_key=10)
def list_(what: Literal["methods", "teachers", "recipes", "protocols", "families"], /, *, json: Json = False) -> int:
    """List what there is: methods, teachers, recipes, protocols or families.

    Args:
        what: one of these five.
    """
    from diffdistill import listing

    rows = listing.rows(what)
    _print_json(rows) if json else print(listing.columns(rows))
    return 0


@app.command(sort_key=10)
def selfcheck(
    *, protocol: str | None = None, images: Path | None = None, weights: str | None = None, json: Json = False
) -> int:
    """Compare what this machine computes for an evaluation with answers that are known. Exit status 1 where one differs.

    Args:
        protocol: also open the weights and the reference of this protocol.
        images: its real images: they must be nearly zero away from the reference.
        weights: of the feature networks, as for eval.
    """
    from diffdistill.listing import columns
    from diffdistill.selfcheck import selfcheck as run

    found = run(protocol, images, weights)
    rows = [{"check": check.name, "status": "ok" if check.passed else "FAILED", "found": check.detail} for check in found]
    _print_json(rows) if json else print(columns(rows))
    return 0 if all(check.passed for check in found) else MACHINE


@app.command(sort_key=11)
def doctor(*, json: Json = False) -> int:
    """Show versions, device, kernels, threads and disk, and check the shipped models."""
    from diffdistill.doctor import doctor as run
    from diffdistill.listing import flat

    found = run()
    if json:
        _print_json(found)
    else:
        found |= {f"compute.{setting}": state for setting, state in found.pop("compute").items()}
        kernels = found.pop("attention_kernels").items()
        one_word = {f"attention {name}": set(runs.values()).pop() for name, runs in kernels if len(set(runs.values())) == 1}
        lines = {**found, **{f"attention {name}": runs for name, runs in kernels}, **one_word}
        print("\n".join(f"{name:<26} {flat(value)}" for name, value in lines.items() if name != "problems"))
        print("\n".join(f"problem: {problem}" for problem in found["problems"]) or "no problems found")
    return MACHINE if found["problems"] else 0


@app.command(sort_key=11)
def bench(
    *words: str,
    parts: Words = (),
    teachers: Words = (),
    methods: Words = (),
    layouts: Words = (),
    seconds: float | None = None,
    resume: bool = False,
    check: bool = False,
    against: Path | None = None,
    output: Output | None = None,
    json: Json = False,
) -> int:
    """Measure steps, sampling, starts and overhead against the network passes they must do, on the GPU where there is one.

    Args:
        words: the definition, which is cpu, gpu or a YAML file and what suits the device when left out; and further settings of the
            runs whose steps and samples are measured, a.b=c each, such as compute.compile=blocks.
        parts: of steps, samples, starts and overhead; the definition's when left out.
        teachers: of the definition; all when left out.
        methods: of the definition; all when left out.
        layouts: of the definition; all when left out.
        seconds: for the timed rounds of each row, in place of the definition's.
        resume: take from the output what this commit has measured with these settings.
        check: exit status 1 if something got worse than the kept results say, by more than their noise.
        against: kept results; those beside the definition when left out.
        output: folder for results, by the definition's name, and performance.md; rows that it holds and that are not measured stay.
    """
    from diffdistill.bench import results
    from diffdistill.bench.check import worse
    from diffdistill.bench.definition import definition_path, read_definition
    from diffdistill.bench.page import page
    from diffdistill.bench.run import bench as run
    from diffdistill.files import write_atomic

    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"one definition is measured at a time; got {', '.join(names)}.")
    path = definition_path(*names)
    definition = read_definition(path).with_options(parts, seconds)
    cells = definition.cells(teachers, methods, layouts)
    _folder(output)
    title = results.title(overrides)
    kept = results.read_kept(against or path.with_suffix(".json"), title) if check else None
    file = None if output is None else output / f"{path.stem}.json"
    if file is None and resume:
        raise UserError("--resume goes on with the results in a folder; name it by --output.")
    known = results.read(file).get(title) if file is not None and resume else None

    def keep(found: results.Results) -> None:
        if file is not None:
            results.write(file, found)
            write_atomic(file.with_name("performance.md"), page(results.read_all(file.parent)))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = run(definition, cells, overrides, known, say, keep)
    _print_json(found.model_dump(mode="json")) if json else print(page({found.title: found}))
    lines = [] if kept is None else worse(kept, found)
    for line in lines:
        print(f"worse: {line}", file=sys.stderr)
    return MACHINE if lines else 0


weights = App(
    name="weights",
    help="Keep the files of feature networks (Inception, DINOv2, CLIP, ...) that measurements need. Nothing is downloaded.\n\n"
    "The store is the folder that DIFFDISTILL_WEIGHTS names, or one in the cache.",
    sort_key=12,
)
app.command(weights)


@weights.command(name="add")
def weights_add(slot: str, /, *files: Path, note: str = "", link: bool = False) -> int:
    """Read the file or files of a slot with the network's own loader and, if they are right, keep them.

    Args:
        slot: name of the slot, see `weights list`.
        files: in the order that `weights list` shows.
        note: where they come from, for the record.
        link: keep links to the files instead of copies.
    """
    from diffdistill.api import WeightStore

    store = WeightStore()
    manifest = store.add(slot, files, note, link)
    print(f"{'linked' if link else 'copied'} to {store.folder / slot}; fingerprint {manifest.fingerprint[:16]}")
    return 0


@weights.command(name="list")
def weights_list(*, json: Json = False) -> int:
    """List the slots: what each is for, which files it takes, and what it holds."""
    from diffdistill import listing
    from diffdistill.api import WeightStore

    rows = WeightStore().table()
    if json:
        _print_json(rows)
    else:
        print(
            listing.columns(
                [{"slot": row["slot"], "state": row["state"], "files": row["files"] or row["takes"]} for row in rows]
            )
        )
    return 0


@weights.command(name="verify")
def weights_verify(*slots: str, json: Json = False) -> int:
    """Hash the files of slots again, load them again, and compare; exit status 1 if one fails.

    Args:
        slots: names; all that hold weights when left out.
    """
    from diffdistill import listing
    from diffdistill.api import WeightStore

    checks = WeightStore().verify(slots)
    rows = [{"slot": check.slot, "status": "ok" if check.passed else "failed", "detail": check.detail} for check in checks]
    _print_json(rows) if json else print(listing.columns(rows))
    return 0 if all(check.passed for check in checks) else MACHINE


# Printing


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _progress() -> Callable[[str, int, int], None]:
    """Return a callback that shows progress on standard error: in place on a terminal, a line every ten seconds elsewhere."""
    last = [time.monotonic()]
    begun: dict[str, tuple[float, int]] = {}

    def show(what: str, done: int, total: int) -> None:
        start, before = begun.setdefault(what, (time.monotonic(), done))  # what the first batch took says little of the rest
        left = (time.monotonic() - start) * (total - done) / (done - before) if done > before else None
        text = f"{what}: {done}/{total} images" + (f", {_duration(left)} left" if left else "")
        if sys.stderr.isatty():
            print(f"\r{text:<79}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    return show


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"images are written as PNG; got {path}. Write -o {path.with_suffix('.png')}.")


# Exit statuses


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit status, after one message on standard error where it is not 0."""
    debug = "--debug" in arguments or os.environ.get(DEBUG, "0") not in ("", "0")
    if not debug:
        for library in ("DIFFUSERS", "TRANSFORMERS"):  # read when they are imported; their warnings speak to programmers
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        result = app([word for word in arguments if word != "--debug"], exit_on_error=False, print_error=False)
        return result if isinstance(result, int) else 0
    except BaseException as error:  # every failure ends here: as one message, or as a traceback when asked
        if debug and not isinstance(error, SystemExit | cyclopts.CycloptsError):
            raise
        return _explain(error)


def _explain(error: BaseException) -> int:
    """Print one message about an error and return the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    if isinstance(error, UserError):
        return _say(f"error: {error}", USER)
    if isinstance(error, cyclopts.CycloptsError):
        return _say(f"error: {_usage(error)}", USER)
    if isinstance(error, MachineError):
        return _say(f"failed: {error}", MACHINE)
    kind = type(error).__name__
    if kind == "Stopped":
        return _say(str(error), 0)
    if kind == "ValidationError":
        return _say(f"error: {error}", USER)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it flushes
        return MACHINE
    if is_full(error):
        place = getattr(error, "filename", None) or "the disk"
        return _say(f"failed: no space left ({place}). Free some and run the same command again.", MACHINE)
    if isinstance(error, OSError) and error.filename is not None:
        return _say(f"failed: {error.strerror}: {error.filename}", MACHINE)
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return _say(
            "failed: out of memory. Fewer images at once (--num) or a smaller model need less; a training run says itself which of its "
            "settings would help.",
            MACHINE,
        )
    if kind == "InductorError":
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return _say(
            f"failed: {str(error).strip().splitlines()[0]}\nWhat torch compiles is kept in {cache_dir()}, where a process that is killed "
            "while it compiles leaves files cut off. Remove that folder and run the command again, or leave out compute.compile.",
            MACHINE,
        )
    return _say(
        f"failed: {kind}: {error}\nThis is a fault of the program, not of the input. Run the command again with "
        "--debug for the traceback, and report it.",
        MACHINE,
    )


def _usage(error: cyclopts.CycloptsError) -> str:
    text = str(error)
    if isinstance(error, cyclopts.UnknownCommandError):
        verbs = sorted(name for name in error.app or app if not name.startswith("-"))
        text = str(unknown_name("verb", text.split('"')[1], verbs))
    return f"{text} `diffdistill --help` and `diffdistill VERB --help` show what there is."


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status
