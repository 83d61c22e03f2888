"""Evaluation of whatever a command is pointed at: runs, exports, pipelines, images in files; and what is written of it."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.result import Evaluation
from diffdistill.files import remove_leftovers, write_atomic, write_json
from diffdistill.processes import ALONE, Processes
from diffdistill.sampling.generate import Generate
from diffdistill.targets import AnySampler, Target, is_model, open_target

IMAGES = "images"  # the name of an evaluation of images that exist
LATENCY_CALLS = 3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        protocol: the name of one that comes with the package, or the path of its YAML file.
        metrics: those wanted of the protocol's; empty for all.
        num_images: another number of images than the protocol's, which makes another protocol; None for the protocol's.
        guidance: scale counted from 1; None for what the model is meant for.
        batch_size: images per call of the model; None for `Target.images_at_once`.
        weights: None for the store of weights, "random:SEED" for a test whose numbers mean nothing.
        output: folder of the results, and of the parts from which the same command goes on after a stop; None for neither.
        save_images: folder for the images as PNG files; None writes none.
        attention: the kernel of attention; None for the run's own, or "auto".
    """

    protocol: str | Path = "digits"
    metrics: tuple[str, ...] = ()
    num_images: int | None = None
    guidance: float | None = None
    batch_size: int | None = None
    weights: str | None = None
    output: Path | None = None
    save_images: Path | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {self.batch_size}. Leave it out for the usual one.")

    def images_at_once(self, opened: Target) -> int:
        """Return how many images a model is asked for in one call."""
        return opened.images_at_once if self.batch_size is None else self.batch_size


def evaluate(
    target: str | Path,
    steps: Sequence[int] = (),
    settings: Settings = Settings(),
    solver: str | None = None,
    checkpoint: str | Path | None = None,
    lora: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Score what a target makes at each number of steps, or images that exist.

    Args:
        target: a run folder, an export, a pipeline folder, a hub id, an embedded teacher; or a folder, zip or npz of images.
        steps: numbers of network steps; empty for the one the model is meant for.
        settings: how.
        solver: of a pipeline, one of `targets.SOLVERS`.
        checkpoint: of a run; None for the newest.
        lora: of a pipeline, a file or folder that its `load_lora_weights` takes.
        progress: called with (what, images done, images in all).
    Returns:
        The evaluation by "steps-N", or by "images".
    Raises:
        UserError: unknown protocol or target, or a target that does not fit the protocol.
    """
    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.evaluation.reference import references_folder
    from diffdistill.evaluation.views import open_views

    protocol = load_protocol(settings.protocol)
    if settings.num_images is not None:
        protocol = protocol.with_num_images(settings.num_images)
    protocol = protocol.pinned()
    views = open_views(protocol, settings.metrics, references_folder(), weights=settings.weights)
    scorer = _Scorer(protocol, views, settings, progress)
    if is_images(target):
        return {IMAGES: scorer.images(target)}
    opened = open_target(target, solver, checkpoint, lora, settings.attention)
    samplers = [opened.sampler(count, settings.guidance) for count in dict.fromkeys(steps or (None,))]
    return {f"steps-{sampler.num_steps}": scorer.generated(opened, sampler) for sampler in samplers}


def sweep(
    run: str | Path,
    steps: Sequence[int] = (),
    settings: Settings = Settings(),
    checkpoints: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, dict[str, Evaluation]]:
    """Score the checkpoints of a run, each into a folder of its own; those that are there already are read.

    Args:
        run: a run folder.
        steps: numbers of network steps; empty for the one the student is meant for.
        settings: how; its output is by default RUN/evaluations/PROTOCOL.
        checkpoints: their names; empty for all, in the order of their steps.
        progress: called with (what, images done, images in all).
    Returns:
        By the name of the checkpoint, what `evaluate` returns.
    Raises:
        UserError: no run or no such checkpoint there, or what `evaluate` refuses.
    """
    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.training.checkpoint import available
    from diffdistill.training.folder import RunFolder

    files = RunFolder(Path(run))
    names = [path.name for path in available(files.checkpoints)]
    if unknown := [name for name in checkpoints if name not in names]:
        raise UserError(f"{run} has no checkpoint {', '.join(unknown)}. It has: {', '.join(names) or 'none yet'}.")
    if not names:
        raise UserError(f"{run} has no checkpoints to evaluate. `diffdistill train` makes a run and its checkpoints.")
    protocol = load_protocol(settings.protocol)
    folder = settings.output or files.path / "evaluations" / protocol.name
    found = {}
    for name in checkpoints or names:
        place = replace(settings, output=folder / name)
        found[name] = _known(place, steps) or evaluate(run, steps, place, checkpoint=name, progress=progress)
        if processes().is_main:
            write_evaluations(f"{run}, {name}", found[name], folder / name)
    return found


def _known(settings: Settings, steps: Sequence[int]) -> dict[str, Evaluation]:
    """Return the evaluations that a folder holds, where they are all of those asked for; of another protocol they are refused."""
    from diffdistill.evaluation.protocol import load_protocol

    assert settings.output is not None
    wanted = {f"steps-{count}" for count in steps}
    there = {path.stem: path for path in settings.output.glob("steps-*.json")}
    if not there or not wanted <= set(there):
        return {}
    found = {name: load_evaluation(path) for name, path in there.items() if not wanted or name in wanted}
    protocol = load_protocol(settings.protocol)
    protocol = protocol if settings.num_images is None else protocol.with_num_images(settings.num_images)
    if any(evaluation.protocol_hash != protocol.pinned().hash for evaluation in found.values()):
        raise UserError(
            f"{settings.output} holds evaluations of another protocol than {protocol.name!r} as it is now. Choose another output folder."
        )
    return found


class _Scorer:
    """Scores targets under one protocol."""

    def __init__(self, protocol: Any, views: Sequence[Any], settings: Settings, progress: Progress | None) -> None:
        self.protocol, self.views, self.settings, self.progress = protocol, views, settings, progress
        self.processes = processes()
        if self.processes.count > 1 and settings.output is None:
            raise UserError("several processes put their parts together in the output folder; write -o FOLDER.")

    def generated(self, opened: Target, sampler: AnySampler) -> Evaluation:
        """Score what a model makes in the steps of a sampler."""
        from diffdistill.evaluation.evaluate import evaluate as score

        generate, name = opened.generator(sampler), f"steps-{sampler.num_steps}"
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with self._sink(name) as sink:
            found = score(
                generate,
                self.protocol,
                self._report(f"{opened.name}, {sampler.num_steps} steps"),
                nfe=sampler.nfe,
                num_steps=sampler.num_steps,
                batch_size=self.settings.images_at_once(opened),
                views=self.views,
                keeping=self._keeping(name, {**opened.identity, "sampler": sampler.settings}),
                processes=self.processes,
                sink=sink,
            )
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        cost = replace(found.cost, latency_ms=latency_ms(generate, self.protocol), peak_memory=peak)
        return replace(found, cost=cost)

    def images(self, target: str | Path) -> Evaluation:
        """Score images in files."""
        from diffdistill.evaluation.evaluate import evaluate_images
        from diffdistill.evaluation.image_sources import open_images

        source = open_images(target, self.protocol.transforms)
        asked = self.protocol.asked_of_files(len(source))
        return evaluate_images(
            source,
            asked,
            self.protocol,
            self._report(str(target)),
            views=self.views,
            keeping=self._keeping(IMAGES, {"images": str(Path(target).resolve()), "files": source.fingerprint}),
            processes=self.processes,
        )

    def _keeping(self, name: str, target: Mapping[str, Any]) -> Any:
        from diffdistill.evaluation.evaluate import Keeping

        return None if self.settings.output is None else Keeping(self.settings.output / f".{name}.parts", target)

    def _sink(self, name: str) -> AbstractContextManager[Any]:
        if self.settings.save_images is None:
            return nullcontext()
        from diffdistill.evaluation.image_files import PngWriter

        return PngWriter(self.settings.save_images / name)

    def _report(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


def is_images(target: str | Path) -> bool:
    """Tell a folder or an archive of images from what makes images."""
    path = Path(target)
    return path.is_file() or (path.is_dir() and not is_model(path))


def processes() -> Processes:
    """Return the processes that a launcher such as `accelerate launch` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)


@torch.no_grad()
def latency_ms(generate: Generate, protocol: Any) -> float:
    """Return the median wall time, in milliseconds, of one image made alone; the first call is left out."""
    asked = protocol.asked(0)
    times = []
    for _ in range(1 + LATENCY_CALLS):
        begin = time.perf_counter()
        images = generate([protocol.first_seeds[0]], None if asked is None else asked[:1])
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[1:])


def take_pictures(
    target: str | Path,
    evaluations: Mapping[str, Evaluation],
    settings: Settings = Settings(),
    solver: str | None = None,
    checkpoint: str | Path | None = None,
    lora: str | Path | None = None,
) -> Any:
    """Make the pictures of a report again from the seeds of the evaluations; arguments as for `evaluate`.

    Returns:
        `evaluation.pictures.Pictures`.
    """
    from diffdistill.evaluation import pictures
    from diffdistill.evaluation.image_sources import open_images
    from diffdistill.evaluation.named import Result
    from diffdistill.evaluation.protocol import Protocol

    protocol = Protocol(**next(iter(evaluations.values())).protocol)
    if is_images(target):
        show = pictures.existing(open_images(target, protocol.transforms))
        return pictures.take_pictures({IMAGES: pictures.Model(evaluations[IMAGES], show)}, protocol)
    opened, models = open_target(target, solver, checkpoint, lora, settings.attention), {}
    for evaluation in evaluations.values():
        sampler = opened.sampler(evaluation.cost.num_steps, settings.guidance)
        show = pictures.generated(opened.generator(sampler), protocol, settings.images_at_once(opened))
        models[Result("", evaluation).steps] = pictures.Model(evaluation, show, opened.predictions(sampler))
    return pictures.take_pictures(models, protocol)


def write_evaluations(
    name: str, evaluations: Mapping[str, Evaluation], folder: str | Path, pictures: Any = None, command: str = ""
) -> Path:
    """Write FOLDER/NAME.json, and NAME.safetensors with the values of single images, of each; and report.json and report.html of all.

    Args:
        name: of the target, for the title.
        evaluations: by the names of their files.
        folder: where.
        pictures: `evaluation.pictures.Pictures` of them, None for a page of numbers.
        command: the line that makes these numbers again.
    Returns:
        The path of the page.
    """
    from safetensors.torch import save

    from diffdistill.evaluation.named import Result
    from diffdistill.evaluation.pictures import Pictures
    from diffdistill.evaluation.report import ReportData, result_tiles, write_report

    remove_leftovers(folder)
    folder = Path(folder)
    for key, evaluation in evaluations.items():
        if arrays := evaluation.arrays():
            write_atomic(folder / f"{key}.safetensors", save({k: v.contiguous() for k, v in arrays.items()}))
        write_json(folder / f"{key}.json", evaluation.to_json())
    results = [Result(name, evaluation) for evaluation in evaluations.values()]
    data = ReportData(
        title=f"Evaluation of {name}",
        size_fits=size_fits(results),
        summary=_summary(next(iter(evaluations.values()))),
        results=results,
        tiles=result_tiles(results),
        pictures=Pictures() if pictures is None else pictures,
        command=command,
        remarks=warned_of(Path(name)),
    )
    return write_report(data, folder)


def warned_of(run: Path) -> list[str]:
    """Return what a run warned of while it trained, as sentences; nothing of what is no run folder."""
    from diffdistill.training import layout
    from diffdistill.training.detectors import said
    from diffdistill.watch.tail import Tail
    from diffdistill.yaml_files import read_yaml

    if not (run / layout.CONFIG).is_file():
        return []
    tail = Tail(run / layout.METRICS)
    tail.update()
    return [
        f"While it trained, at step {alert.step:,}: {alert.says}" for alert in said(tail.lines, read_yaml(run / layout.CONFIG))
    ]


def size_fits(results: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return, for each distance of these `named.Result`s, its value of fewer images and the 1/N line, by the label of the result."""
    from diffdistill.evaluation.bias import count_curve
    from diffdistill.evaluation.charts import Point
    from diffdistill.evaluation.named import labels
    from diffdistill.evaluation.report_charts import SizeFit

    found: dict[str, dict[str, Any]] = {}
    for label, result in zip(labels(results), results, strict=True):
        for name, blocks in result.evaluation.curve.items():
            curve = count_curve(blocks.mean(0).tolist())
            points = [Point(point.num_images, point.value) for point in curve.points]
            found.setdefault(name, {})[label] = SizeFit(points, curve.limit.value, curve.slope.value)
    return found


def write_sweep(run: str | Path, sweep: Mapping[str, Mapping[str, Evaluation]], folder: str | Path, command: str = "") -> Path:
    """Write FOLDER/report.html of the checkpoints of a run: values over the training; return its path."""
    from diffdistill.evaluation.named import Result
    from diffdistill.evaluation.report import ReportData, result_tiles, write_report

    results = [
        Result(str(run), evaluation, int(re.sub(r"\D", "", name) or 0))
        for name, by_steps in sweep.items()
        for evaluation in by_steps.values()
    ]
    title, summary = f"Checkpoints of {run}", _summary(results[0].evaluation)
    tiles, remarks = result_tiles(results[-1:]), warned_of(Path(run))
    return write_report(ReportData(title, results, summary, tiles, command=command, remarks=remarks), folder)


def write_comparison(
    reports: Mapping[str, Evaluation], sentences: Sequence[str], folder: str | Path, command: str = ""
) -> Path:
    """Write FOLDER/report.html of evaluations side by side, and what can be said of their differences; return its path."""
    from diffdistill.evaluation.named import Result
    from diffdistill.evaluation.report import ReportData, result_tiles, write_report

    results = [Result(name, evaluation) for name, evaluation in reports.items()]
    facts = {f"difference {number}": sentence for number, sentence in enumerate(sentences, start=1)}
    return write_report(
        ReportData(
            "Comparison",
            results,
            _summary(results[0].evaluation),
            result_tiles(results),
            size_fits=size_fits(results),
            command=command,
            facts=facts,
        ),
        folder,
    )


def _summary(evaluation: Evaluation) -> str:
    blocks = "" if evaluation.num_blocks == 1 else f" in each of {evaluation.num_blocks} blocks of seeds"
    return f"Protocol {evaluation.protocol['name']}: {evaluation.num_images:,} images{blocks}, on {evaluation.device}."


def load_evaluations(path: str | Path) -> dict[str, Evaluation]:
    """Read evaluations: a JSON file of one, or a folder as `diffdistill eval -o` writes it.

    Returns:
        evaluations by name, "FOLDER" or "FOLDER/FILE" without its ending.
    Raises:
        UserError: no such file, no evaluations in the folder, or a file of something else.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        numbered = sorted(path.glob("steps-*.json"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0))
        files = [*numbered, *path.glob(f"{IMAGES}.json")]
        if not files:
            raise UserError(f"{path} holds no evaluations (steps-*.json); `diffdistill eval TARGET -o {path}` writes them.")
    return {str(path if path.is_dir() and len(files) == 1 else file.with_suffix("")): load_evaluation(file) for file in files}


def load_evaluation(file: Path) -> Evaluation:
    """Read one evaluation, with the values of single images where they lie beside it.

    Raises:
        UserError: no such file, or a file of something else.
    """
    import json

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    arrays = file.with_suffix(".safetensors")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(arrays) if arrays.is_file() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the evaluation {file}: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not an evaluation: it holds a {type(values).__name__}.")
    try:
        return Evaluation.from_json(values, tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
