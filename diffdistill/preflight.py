"""`diffdistill check`: what a run will do and need: its memory planned before anything is loaded, then a few real steps.

The steps run in a folder that is thrown away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from diffdistill.config import CheckpointConfig, LoggingConfig, RunConfig, load_config, parse_config
from diffdistill.errors import UserError
from diffdistill.export import plan as export_plan
from diffdistill.files import temporary_folder
from diffdistill.listing import columns
from diffdistill.memory import NAMES, MemoryPlan, MemoryRow, readable
from diffdistill.training.loading import LoadedRun, load_run
from diffdistill.training.memory_auto import available, choose
from diffdistill.training.planning import plan_memory
from diffdistill.training.run import train

TRIED_STEPS = 6  # of each stage; the first pays for allocation and is not timed
STEP_COUNTS = (1, 2, 4, 8)  # shown where a method serves any


@dataclass(frozen=True)
class SamplerRow:
    """How the student is sampled in a number of steps.

    Attributes:
        steps, nfe: network steps and evaluations an image.
        rule: the sampler's.
        times: where the network is asked, noisiest first.
        scheduler: the stock scheduler with the same states, or None.
        refused: why there is none, '' where there is one.
        trained: whether the method is trained for this number.
    """

    steps: int
    nfe: int
    rule: str
    times: list[float]
    scheduler: str | None
    refused: str
    trained: bool


@dataclass(frozen=True)
class StageRow:
    """A stage: steps, what it trains, and the time of a step, by which the whole stage is estimated."""

    stage: int
    method: str
    steps: int
    trains: list[str]
    ms_per_step: float
    minutes: float


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; there is one only where the run can start.

    Attributes:
        memory: the plan, of the run with what `memory: auto` picked.
        picked: its settings, and why.
        measured_bytes: the peak of the steps that were run, on a GPU; None on a CPU, which does not count it.
    """

    teacher: dict[str, Any]
    data: dict[str, Any]
    stages: list[StageRow]
    samplers: list[SamplerRow]
    memory: MemoryPlan
    measured_bytes: int | None
    picked: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        peak = self.memory.peak
        return asdict(self) | {"memory": asdict(self.memory) | {"peak": asdict(peak), "peak_bytes": peak.bytes}}

    def text(self) -> str:
        """Return the report for a terminal, with the memory plan in one line; `memory_table` is the whole."""
        planned = self.memory.peak.bytes
        parts = {
            "teacher": columns([self.teacher]),
            "data": columns([self.data]),
            f"stages (time of a step measured over {TRIED_STEPS - 1})": columns([asdict(row) for row in self.stages]),
            "student's sampler": columns([_shown(row) for row in self.samplers]),
            "memory": f"planned {readable(planned)}"
            + (
                ""
                if self.measured_bytes is None
                else f", measured {readable(self.measured_bytes)} ({planned / self.measured_bytes:.2f} of it planned)"
            ),
        }
        return "\n\n".join(f"{title}\n{body}" for title, body in parts.items())


def check(
    config: RunConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    on_plan: Callable[[MemoryPlan, Sequence[str]], None] = lambda plan, picked: None,
) -> CheckReport:
    """Check everything a run needs: settings, memory, teacher, data, samplers, export, and a few real steps.

    The steps run in a temporary folder, which is removed; the run's own folder is only looked at.

    Args:
        config: as for `distill`.
        overrides: for a file, "a.b=c" each.
        on_plan: told the memory plan before any weight is read, and what `memory: auto` picked for it, lines to print.
    Raises:
        UserError: the run could not start, would fail, or its student could not be exported; says why.
    """
    if isinstance(config, str | Path):
        config = load_config(config, overrides)
    elif not isinstance(config, RunConfig):
        config = parse_config(config)
    _check_protocol(config)
    on_gpu = torch.cuda.is_available()
    device_type, picked = "cuda" if on_gpu else "cpu", []
    if config.memory == "auto":
        choice = choose(config, device_type, available(device_type))
        config, plan, picked = choice.of(config), choice.after, choice.lines()
    else:
        plan = plan_memory(config, device_type)
    on_plan(plan, picked)
    with temporary_folder("diffdistill-check-") as folder:
        trial = _trial(config, folder / "run")
        result = train(trial, progress=False)
        measured = torch.cuda.max_memory_allocated() if on_gpu else None
        run = load_run(result.folder)
        seconds = _seconds(result.folder / "metrics.jsonl", len(config.stages))
    return CheckReport(_teacher(run), _data(config), _stages(config, seconds), _samplers(config, run), plan, measured, picked)


def _check_protocol(config: RunConfig) -> None:
    if config.validation is not None:
        from diffdistill.evaluation.protocol import load_protocol

        load_protocol(config.validation.protocol)


def _trial(config: RunConfig, output: Path) -> RunConfig:
    """Return the run with few steps a stage, every turn due from the first on, and nothing shown."""
    stages = tuple(
        stage.model_copy(
            update={
                "steps": min(stage.steps, TRIED_STEPS),
                "method": _with_few_trajectories(_without_warmup(stage.method), config.batch_size),
                "optimizers": {role: _without_warmup(settings) for role, settings in stage.optimizers.items()},
            }
        )
        for stage in config.stages
    )
    pairs = config.pairs
    if pairs is not None and pairs.num is not None:
        pairs = pairs.model_copy(update={"num": min(pairs.num, config.batch_size)})
    return config.model_copy(
        update={
            "output": output,
            "stages": stages,
            "pairs": pairs,
            "samples": None,
            "validation": None,
            "logging": LoggingConfig(every_steps=1, tensorboard=False),
            "checkpoint": CheckpointConfig(every_steps=10**9, keep=1),
        }
    )


def _with_few_trajectories(method: BaseModel, num: int) -> BaseModel:
    spec = getattr(method, "trajectories", None)
    if spec is None or spec.num is None:
        return method
    return method.model_copy(update={"trajectories": spec.model_copy(update={"num": min(spec.num, num)})})


def _without_warmup(settings: BaseModel) -> BaseModel:
    names = [name for name in type(settings).model_fields if name.endswith("warmup_steps")]
    return settings.model_copy(update=dict.fromkeys(names, 0))


def _seconds(metrics: Path, num_stages: int) -> list[float]:
    """Return the mean time of a step of each stage, NaN where only the first was run."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = []
    for stage in range(num_stages):
        clock = [line["seconds"] for line in lines if line.get("stage") == stage and "steps_per_sec" in line]
        found.append((clock[-1] - clock[0]) / (len(clock) - 1) if len(clock) > 1 else math.nan)
    return found


def _teacher(run: LoadedRun) -> dict[str, Any]:
    teacher = run.teacher
    return {
        "path": teacher.path,
        "network": type(teacher.network).__name__,
        "pipeline": teacher.pipeline_class,
        "state": "x".join(map(str, teacher.denoiser.sample_shape)),
        "classes": teacher.num_classes,
        "scheduler": teacher.scheduler_config.get("_class_name"),
        "predicts": teacher.scheduler_config.get("prediction_type", "flow_prediction"),
        "device": str(teacher.device),
    }


def _data(config: RunConfig) -> dict[str, Any]:
    return {key: str(value) for key, value in config.data.model_dump().items()} | {
        "batch": config.batch_size,
        "micro-batch": config.micro_batch_size or config.batch_size,
    }


def _stages(config: RunConfig, seconds: Sequence[float]) -> list[StageRow]:
    return [
        StageRow(
            index + 1,
            stage.method.name,
            stage.steps,
            list(stage.trained),
            round(1000 * each, 1),
            round(stage.steps * each / 60, 1),
        )
        for index, (stage, each) in enumerate(zip(config.stages, seconds, strict=True))
    ]


def _samplers(config: RunConfig, run: LoadedRun) -> list[SamplerRow]:
    """Return a row per number of steps; refuse a student that no stock scheduler carries."""
    wanted = config.stages[-1].method.usual_steps
    asked = () if config.validation is None else config.validation.steps
    rows = []
    for steps in sorted({*STEP_COUNTS, *asked, *(() if wanted is None else (wanted,))}):
        try:
            sampler = run.sampler(steps)
        except ValueError as error:  # a grid that has not so many points
            rows.append(SamplerRow(steps, steps, "", [], None, str(error), steps == wanted))
            continue
        try:
            found = export_plan(run.teacher, sampler, student=run.roles["student"])
            scheduler, refused = found.scheduler["_class_name"], ""
        except UserError as error:
            scheduler, refused = None, str(error)
        rows.append(
            SamplerRow(
                steps,
                sampler.nfe,
                sampler.rule,
                sampler.grid.times[:-1].tolist(),
                scheduler,
                refused,
                wanted is None or steps == wanted,
            )
        )
    needed = [row for row in rows if row.trained]
    if all(row.scheduler is None for row in needed):
        raise UserError(
            "stock diffusers cannot carry this student, so it could not be exported: "
            + " ".join(dict.fromkeys(row.refused for row in needed))
        )
    return rows


# Showing


def _shown(row: SamplerRow) -> dict[str, Any]:
    times = ", ".join(f"{t:g}" for t in row.times[:8]) + (", ..." if len(row.times) > 8 else "")
    return {
        "steps": f"{row.steps}{'' if row.trained else ' (not trained for)'}",
        "nfe": row.nfe,
        "rule": row.rule,
        "times": times,
        "stock scheduler": row.scheduler or f"none: {row.refused}",
    }


def memory_table(plan: MemoryPlan, picked: Sequence[str] = ()) -> str:
    """Return the plan for a terminal: what `memory: auto` picked, a row per role, and the peak."""
    offloads = plan.peak.offloaded_bytes > 0
    stage = f"stage {plan.stage + 1}, its turn of {plan.heaviest.name}"
    above = "".join(f"{line}\n" for line in picked) + ("\n" if picked else "")
    return f"{above}memory of a step at its peak ({stage})\n" + columns(
        [_sizes(row, offloads) for row in (*plan.rows, plan.peak)]
    )


def _sizes(row: MemoryRow, offloads: bool) -> dict[str, Any]:
    shown = {"role": row.role, "parameters": f"{row.parameters:,}", "trained": f"{row.trained:,}"}
    sizes = {title: readable(getattr(row, f"{part}_bytes")) for part, title in NAMES.items()} | {"sum": readable(row.bytes)}
    return shown | sizes | ({"on the CPU": readable(row.offloaded_bytes)} if offloads else {})
