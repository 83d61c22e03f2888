"""`train`: a run from its config to its folder, stage by stage."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.config import RunConfig, StageConfig, TextData, ValidationConfig, with_overrides
from diffdistill.errors import MachineError, UserError
from diffdistill.export.plan import plan
from diffdistill.files import is_full
from diffdistill.models.loading import Teacher
from diffdistill.processes import ALONE
from diffdistill.training import checkpoint
from diffdistill.training.building import (
    apply_compute,
    build_accelerator,
    build_distiller,
    build_engine,
    build_processes,
    build_run_roles,
    build_shadow,
    build_shapes,
    open_teacher,
    split_roles,
)
from diffdistill.training.checkpoint import Checkpoint
from diffdistill.training.conditions import Conditions
from diffdistill.training.data_feed import build_source, micro_batch_size, resumed_micro_batch_size
from diffdistill.training.detectors import Alarms
from diffdistill.training.engine import Engine
from diffdistill.training.folder import RunFolder, comparable
from diffdistill.training.lifeline import Lifeline
from diffdistill.training.loading import load_roles, stored_roles, stored_tensors
from diffdistill.training.memory_auto import Choice, available, choose, least_room
from diffdistill.training.optimizers import learning_rate, require_package
from diffdistill.training.out_of_memory import is_out_of_memory, out_of_memory
from diffdistill.training.outcome import recorded
from diffdistill.training.preview import Preview, Validation, asked_in_samples, numbers
from diffdistill.training.progress import Progress, peak_memory_gib
from diffdistill.training.sharding import check_parallel, from_main
from diffdistill.training.stopping import Diverged, Interrupted, Stopped, StopSignals, stopping_together
from diffdistill.training.stored import StoredStates, origin_of
from diffdistill.training.text_data import texts, with_encoded
from diffdistill.training.tracking import Tracker

DEFAULT_STEPS = 4  # of the student in previews, where neither the method nor the validation names a number


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: of the run.
        checkpoint: the last one.
        step: optimiser steps done.
        skipped: turns whose update was skipped because something was not finite.
        metrics: the last logged line.
    """

    folder: Path
    checkpoint: Path
    step: int
    skipped: int
    metrics: Mapping[str, float]


def train(config: RunConfig, resume: bool = False, progress: bool = True) -> RunResult:
    """Run a config to its end, or go on with it.

    Args:
        config: the run; its `output` is the run folder.
        resume: go on from the newest good checkpoint in the folder; from the start where there is none yet.
        progress: whether anything is printed.
    Raises:
        UserError: a folder in use, holding another run or other files; a config or a teacher that differs from the one resumed
            (names the fields, the parts); data or roles that do not fit the teacher; no good checkpoint among several.
        Stopped: SIGTERM or SIGINT came; the run is saved. Exit status 0.
        Diverged: losses or gradients were not finite too often; the last good checkpoint stays.
        MachineError: the disk is full or fails, or another process of the run has ended; the last good checkpoint stays.
    """
    accelerator = build_accelerator(config.precision)
    folder = RunFolder(config.output)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lifeline(accelerator.process_index, accelerator.num_processes, accelerator.device, folder.way_on))
        config, choice = _settled(config, folder, accelerator, progress)
        folder.check(config, resume)
        size = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
        check_parallel(config, size, accelerator.num_processes)
        accelerator.wait_for_everyone()  # every process has looked before the first one writes
        if accelerator.is_main_process:
            folder.lock()
            stack.callback(folder.unlock)
            folder.check(config, resume)
            stack.enter_context(recorded(folder))
        signals = stack.enter_context(StopSignals())
        stack.enter_context(torch.random.fork_rng(devices))  # the engine seeds the global generators
        run = _Run(config, folder, accelerator, signals, progress and accelerator.is_main_process, choice)
        try:
            return run.train(resume)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.say("out of memory; finding out which settings would help")
            as_run = config.model_copy(update={"micro_batch_size": run.size})
            raise out_of_memory(as_run, accelerator.device.type, run.standing) from error


def _settled(config: RunConfig, folder: RunFolder, accelerator: Any, progress: bool) -> tuple[RunConfig, Choice | None]:
    """Return the run with what `memory: auto` picks, or picked when the run in the folder was started; then without a choice."""
    if config.memory is None:
        return config, None
    if (picked := folder.picked) is not None:
        return with_overrides(config, ["memory=null", *picked]), None
    if progress and accelerator.is_main_process:
        print("memory: auto: planning a step of the run", flush=True)
    device_type, num_processes = accelerator.device.type, accelerator.num_processes
    room = least_room(available(device_type, num_processes))
    choice = choose(config, device_type, room, num_processes)
    if progress and accelerator.is_main_process:
        print("\n".join(choice.lines()), flush=True)
    return choice.of(config), choice


class _Run:
    """A run in progress: what outlives a stage, and the counters of the whole."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, accelerator: Any, signals: StopSignals, show: bool, choice: Choice | None
    ) -> None:
        self.config, self.folder, self.accelerator, self.signals, self.show = config, folder, accelerator, signals, show
        self.choice = choice
        self.processes = build_processes(accelerator, lambda: signals.requested is not None)
        self.looking = stopping_together(self.processes)
        self.is_main = self.processes.is_main
        self.split = config.parallel == "fsdp" and accelerator.num_processes > 1
        self.on_cpu = accelerator.device.type == "cpu"
        self.size = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
        self.done = 0
        self.skipped_before = 0
        self.whole: Teacher | None = None  # beside a split one, while it is needed
        self.attention_is_new = True  # what was chosen is said after the first step
        self.last: dict[str, float] = {}
        self.saved: Path | None = None
        self.started = time.perf_counter()

    # From beginning to end

    def train(self, resume: bool) -> RunResult:
        found = self._take_up() if resume else None
        if found is not None and found.state["stage"] == len(self.config.stages):
            return RunResult(self.folder.path, found.path, found.step, self.skipped_before, found.state["metrics"])
        self._build()  # refuses what cannot work while the folder is still empty
        self._begin()
        if not self.on_cpu:
            torch.cuda.reset_peak_memory_stats()  # what is reported is the peak of the steps, not of encoding the data
        try:
            first = 0 if found is None else found.state["stage"]
            with self._telling_what_is_left():
                for stage in range(first, len(self.config.stages)):
                    self._stage(stage, found if stage == first else None)
        finally:
            self.progress.close()
            if self.tracker is not None:
                self.tracker.close()
        self.accelerator.wait_for_everyone()
        path = self.folder.checkpoints / checkpoint.name(self.done)
        return RunResult(self.folder.path, path, self.done, self.skipped_before, self.last)

    def _take_up(self) -> Checkpoint | None:
        """Return the newest good checkpoint and set the counters to it; None where there is none yet."""
        found, notes = checkpoint.newest(self.folder.checkpoints)
        for note in notes:
            if self.is_main:
                warnings.warn(note, stacklevel=2)
        if found is None:
            self.say(f"no checkpoint in {self.folder.checkpoints} yet; starting at step 0.")
            return None
        self._refuse_other_run(found)
        self.done, self.saved, self.skipped_before = found.step, found.path, found.state["skipped_before"]
        if found.state["stage"] == len(self.config.stages):
            self.say(f"{self.folder.path} is finished: {found.step} steps, {found.path}.")
        else:
            self.say(f"going on from {found.path}, step {found.step} of {self.config.total_steps}.")
        return found

    def _refuse_other_run(self, found: Checkpoint) -> None:
        if found.state["config"] != self.folder.config_hash:
            raise UserError(
                f"{found.path} was made with another config than {self.folder.config}, which must have been edited "
                "since. Put it back as it was, or start a new run in another output."
            )
        self.size = resumed_micro_batch_size(
            self.config.batch_size, found.state["micro_batch_size"], self.size, self.accelerator.num_processes
        )

    def _build(self) -> None:
        """Build what outlives a stage. Writes nothing."""
        config = self.config
        if isinstance(config.data, TextData):
            texts(config.data)  # what is wrong with them is told before a large teacher is loaded
        for stage in config.stages:
            for role in stage.trained:
                require_package(stage.optimizer(role))
        self.spec = next((s.needs.trajectories for s in config.stages if s.needs.trajectories is not None), None)
        if self.split:
            self._build_split()
        else:
            self.teacher = open_teacher(config, self.accelerator.device)
            self.fingerprints = self.teacher.fingerprints()
            self.folder.check_teacher(self.fingerprints)
            self.roles = build_run_roles(config, self.teacher)
            self._check_export(self.teacher)
        self.source = build_source(config, self.teacher, self.processes, self.show)
        self.teacher.put_aside()
        apply_compute(config, self.roles)
        origin = origin_of(self.teacher, self.fingerprints, self.source)
        self.stored = StoredStates(
            self.roles.teacher if self.whole is None else self.whole.denoiser,
            Conditions(self.teacher, self.source),
            origin,
            config.seed,
            self.size,
            self.processes,
            self.show,
            self._stop_where_asked,
        )
        self.pairs, self.trajectories = None, None
        if config.pairs is not None and config.pairs.path is not None:
            self.pairs = self.stored.pairs(config.pairs, self.folder.pairs)
        if self.spec is not None and self.spec.path is not None:
            self.trajectories = self.stored.trajectories(self.spec, self.folder.trajectories)
        samples, validation = config.samples, config.validation
        rows = config.sampling_batch_size or self.size
        self.preview = None
        if samples is not None:
            asked = asked_in_samples(config, self.teacher, samples.num)
            self.preview = Preview(
                self.teacher, samples.num, config.seed, asked, rows, self.folder.path, self.looking, in_step=self.split
            )
        self.validation = None if validation is None else self._build_validation(validation, rows)
        self.teacher.put_aside()  # what samples and validation ask for is encoded

    def _build_validation(self, settings: ValidationConfig, rows: int) -> Validation:
        """Open the validation, of a teacher that needs no text encoder: they would lie beside the networks whenever it is asked."""
        from diffdistill.evaluation.protocol import load_protocol

        protocol, teacher, data = load_protocol(settings.protocol).pinned(), self.teacher, self.config.data
        if isinstance(data, TextData):
            prompts = protocol.texts
            if prompts is None:
                raise UserError(
                    f"the validation's protocol {protocol.name!r} asks for no prompts, and {teacher.path} makes images from text. "
                    "Name one whose label_rule is prompts or shapes."
                )
            teacher = with_encoded(teacher, prompts, data.cache, self.processes, self.show)
        with self.accelerator.main_process_first():  # which may have to measure the real images, and keeps what it found
            return Validation(teacher, protocol, settings.steps, rows, self.folder.path, self.looking, in_step=self.split)

    def _check_export(self, teacher: Teacher) -> None:
        """Refuse a run whose student cannot leave as it is meant to; it reads no weights."""
        if self.config.exportable:
            last = self.config.stages[-1]
            sampler = build_distiller(last, self.roles).sampler(preview_steps(self.config, last))
            plan(teacher, sampler, student=self.roles["student"])

    def _build_split(self) -> None:
        """Build teacher and roles of which each process holds its rows; where it makes stored states apart, beside the whole teacher."""
        device = self.accelerator.device
        makes = any(each is not None and each.path is None for each in (self.config.pairs, self.spec))
        if makes or self.is_main:
            self.whole = open_teacher(self.config, device if makes else "cpu")
        self.fingerprints = from_main(self.whole.fingerprints() if self.is_main and self.whole else None, device)
        self.folder.check_teacher(self.fingerprints)
        shapes = open_teacher(self.config, "meta")
        self.roles = build_shapes(self.config, shapes)
        self._check_export(shapes)
        split_roles(self.config, self.roles, self.whole if self.is_main else None, device)
        self.teacher = open_teacher(self.config, device, shapes.network)
        self.whole = self.whole if makes else None

    def _begin(self) -> None:
        """Write the folder's first files, make the pairs or trajectories that the config asks for, open the log."""
        if self.is_main:
            facts = {
                "processes": self.accelerator.num_processes,
                "parallel": self.config.parallel,
                "micro_batch_size": self.size,
                "teacher": self.fingerprints,
                "compute": self.config.compute.model_dump(mode="json"),
            }
            if self.choice is not None:
                facts["memory"] = list(self.choice.overrides)
            self.folder.begin(self.config, facts, () if self.choice is None else self.choice.lines())
        self.accelerator.wait_for_everyone()
        pairs, spec = self.config.pairs, self.spec
        if pairs is not None and self.pairs is None:
            self.pairs = self.stored.pairs(pairs, self.folder.pairs)
        if spec is not None and self.trajectories is None:
            self.trajectories = self.stored.trajectories(spec, self.folder.trajectories)
        self.whole = None
        self.shadow = build_shadow(self.config, self.roles)
        if self.is_main:
            self.folder.cut_metrics(self.done)
            self.alarms = Alarms(comparable(self.config), self.folder.lines())
        self.tracker = Tracker(self.folder, self.config.logging.tensorboard, self.done) if self.is_main else None
        self.progress = Progress(self.config.total_steps, self.done, self.show, planned=planned_pauses(self.config))

    def _stage(self, index: int, found: Checkpoint | None) -> None:
        """Train one stage, from where `found` left it."""
        stage, first = self.config.stages[index], 0
        if found is not None:
            first = found.state["stage_step"]
            load_roles(self.roles, found)
            if self.shadow is not None:
                self.shadow.load_state(found.tensors["ema-student"])
        if index > 0:
            for role in stage.needs.frozen:  # they follow the student, and each stage starts from the last one's
                self.roles.assign(role, "student")
        engine = build_engine(
            self.config,
            index,
            self.teacher,
            self.roles,
            source=self.source,
            pairs=self.pairs,
            trajectories=self.trajectories,
            shadow=self.shadow,
            accelerator=self.accelerator,
            size=self.size,
        )
        if found is not None and first > 0:
            load_roles(self.roles, found)  # again: building the method may have set some
            for role, optimizer in engine.optimizers.items():
                optimizer.load_state(found.tensors[f"optimizer-{role}"])
            engine.load_state(found.state["engine"])
        if found is not None and found.state.get("left"):
            looks = found.state["left"]
            self._keep(stage, engine, first - 1, looks, saves=first == stage.steps, stops=False)
        for step in range(first, stage.steps):
            engine.step(step, stop=self.processes.asked_to_stop())
            if self.attention_is_new:
                self._tell_attention()
            self.done += 1
            self.progress.advance()
            self._after_step(stage, engine, step)

    def _tell_attention(self) -> None:
        """Say which kernels the first step took, and write them into the environment."""
        self.attention_is_new, attention = False, self.teacher.denoiser.attention
        self.progress.say(f"attention {attention}")
        if self.is_main:
            self.folder.add_facts({"attention": attention.record})

    def _after_step(self, stage: StageConfig, engine: Engine, step: int) -> None:
        """Do what is due after a step: finish the stage, log, look, save, stop."""
        config, ends = self.config, step + 1 == stage.steps
        logs = ends or self.done % config.logging.every_steps == 0
        saves = ends or self.done % config.checkpoint.every_steps == 0
        looks = [name for name in ("samples", "validation") if self._due(getattr(config, name))]
        stops = self._stops(engine, logs)
        if self.on_cpu or logs or saves or stops or looks:
            skipped = self.skipped_before + engine.guard.check()
        if ends:
            engine.distiller.finish()
        if logs:
            self._log(stage, engine, step, skipped)
        self._keep(stage, engine, step, looks, saves, stops)

    def _keep(self, stage: StageConfig, engine: Engine, step: int, looks: Sequence[str], saves: bool, stops: bool) -> None:
        """Look at the student in the ways named, save, stop; what a signal cuts off is due when the run goes on."""
        metrics, left = self._look(stage, engine, looks)
        stops = stops or bool(left)  # which every process was cut off from
        ended = step + 1 == stage.steps and not left
        if saves or stops or self._is_best(metrics):
            if ended:
                self.skipped_before += engine.guard.check()
            if self.is_main or self.split:
                with self.progress.pause("checkpoint"):
                    self._save(engine, 0 if ended else step + 1, metrics, left)
        if stops and (left or self.done < self.config.total_steps):
            raise self._stopped(f"step {self.done} of {self.config.total_steps}")

    # What is due when

    def _due(self, setting: Any) -> bool:
        return setting is not None and (self.done % setting.every_steps == 0 or self.done == self.config.total_steps)

    def _stops(self, engine: Engine, logs: bool) -> bool:
        """Return whether to stop; every process at the same step. With several GPUs at the next logged step."""
        if self.accelerator.num_processes == 1:
            return self.processes.asked_to_stop()
        return (self.on_cpu or logs) and engine.stop_agreed()

    def _stop_where_asked(self, done: str) -> None:
        """Stop where a signal came to any process; every process calls it at the same place."""
        if self.processes.any(self.processes.asked_to_stop()):
            raise self._stopped(done)

    def _stopped(self, done: str) -> Stopped:
        return Stopped(
            f"stopped by {self.signals.requested or 'a signal'} after {done}; everything is saved in {self.folder.path}. "
            f"Go on with: diffdistill train {self.folder.config} --resume"
        )

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Return whether this is the lowest FID so far, as the main process finds it."""
        if "fid" not in metrics:
            return False
        best = checkpoint.best_score(self.folder.checkpoints)
        is_best = best is None or metrics["fid"] < best
        return self.processes.any(is_best and self.is_main)

    # What is done then

    @contextlib.contextmanager
    def _telling_what_is_left(self) -> Iterator[None]:
        """Add to a breakdown, and to a full disk, which weights are beyond repair and from where the run can go on."""
        try:
            yield
        except Diverged as error:
            broken = [role for role in stored_roles(self.roles) if not _finite([*self.roles.state(role).values()])]
            lost = f" The weights of {', '.join(broken)} are not finite; no step can mend them." if broken else ""
            raise Diverged(f"{error}{lost} {self.standing}") from None
        except MachineError as error:
            raise MachineError(f"{error} {self.standing}") from error
        except OSError as error:
            if not is_full(error):
                raise
            raise MachineError(f"no space left in {self.folder.path}. {self.standing} Free some, and --resume.") from error

    def _log(self, stage: StageConfig, engine: Engine, step: int, skipped: int) -> None:
        means = engine.meter.read()
        rates = {f"lr/{role}": learning_rate(each.config, step, stage.steps) for role, each in engine.optimizers.items()}
        speed = self.progress.report(f"stage {engine.stage + 1}/{len(self.config.stages)} {stage.method.name}", means)
        if self.tracker is not None:
            self.last = {**means, **rates, "skipped": skipped, "stage": engine.stage}
            timed = {
                "steps_per_sec": speed,
                "seconds": time.perf_counter() - self.started,
                "seconds_left": self.progress.seconds_left,
                "peak_memory_gib": peak_memory_gib(),
            }
            found, new = self.alarms.look({"step": self.done, **self.last, **timed})
            self.tracker.log(self.done, {**self.last, **timed, **({"warnings": found} if found else {})})
            for alert in new:
                self.progress.say(f"step {self.done}  warning: {alert.says} {alert.remedy}")

    def _look(self, stage: StageConfig, engine: Engine, looks: Sequence[str]) -> tuple[dict[str, float], list[str]]:
        """Make samples, and scores; return the scores, and what a signal has cut off."""
        metrics: dict[str, float] = {}
        for done, name in enumerate(looks):
            try:
                with self.progress.pause(name):
                    if name == "samples":
                        self._show_samples(stage, engine)
                    else:
                        metrics = self._validate(engine)
            except Interrupted:
                return metrics, list(looks[done:])
        if looks:
            self.teacher.put_aside()
        return metrics, []

    def _show_samples(self, stage: StageConfig, engine: Engine) -> None:
        assert self.preview is not None
        sampler = engine.distiller.sampler(preview_steps(self.config, stage))
        with self._averaged():
            images = self.preview.student_images(self.roles, sampler, self.done)
        figures = self.preview.figures(images)
        if "fake" in stage.needs.trained:
            figures["drift/fake_lag"] = self.preview.fake_lag(self.roles, sampler, self.done)
        if self.tracker is None:
            return
        picture = self.preview.save(self.folder.samples / f"{checkpoint.name(self.done)}.png", images)
        self.tracker.log(self.done, figures)
        self.alarms.add({"step": self.done, **figures})
        self.tracker.image(self.done, "samples: teacher above student", picture[:3])

    def _validate(self, engine: Engine) -> dict[str, float]:
        assert self.validation is not None
        with self._averaged():
            scores = self.validation.scores(self.roles, engine.distiller, self.done)
        if self.tracker is None:
            return scores
        logged = {name: value for name, value in scores.items() if name != "fid"}
        self.tracker.log(self.done, logged)
        self.progress.say(f"step {self.done}  " + numbers({k: v for k, v in logged.items() if "/fid@" in k}))
        return scores

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the student's average in its place for a while, where one is kept."""
        with contextlib.nullcontext() if self.shadow is None else self.roles.using("student", self.shadow.state()):
            yield

    def _save(self, engine: Engine, stage_step: int, metrics: Mapping[str, float], left: Sequence[str]) -> None:
        """Write a checkpoint from which the run goes on with the looks `left` at `stage_step` of the stage; 0 where it has ended."""
        ended = stage_step == 0
        tensors = stored_tensors(self.roles, self.shadow, {} if ended else engine.optimizers)
        state = {
            "stage": engine.stage + 1 if ended else engine.stage,
            "stage_step": stage_step,
            "metrics": dict(metrics),
            "left": list(left),
            "engine": None if ended else engine.state(),
            "skipped_before": self.skipped_before,
            "micro_batch_size": self.size,
            "config": self.folder.config_hash,
        }
        writers = self.processes if self.split else ALONE
        self.saved = checkpoint.save(self.folder.checkpoints, self.done, tensors, state, writers)
        if self.is_main:
            checkpoint.prune(self.folder.checkpoints, self.config.checkpoint.keep)

    @property
    def standing(self) -> str:
        """How far the run came and what is kept of it, as a sentence."""
        kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint had been written yet"
        return f"This was step {self.done}; {kept}."

    def say(self, text: str) -> None:
        """Print a line, in the main process alone."""
        if self.show:
            print(text, flush=True)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def planned_pauses(config: RunConfig) -> dict[str, list[int]]:
    """Return after which steps a run pauses, by kind; a best checkpoint more comes unplanned."""
    total = config.total_steps

    def every(steps: int, *ends: int) -> list[int]:
        return sorted({*range(steps, total + 1, steps), *ends})

    planned = {"checkpoint": every(config.checkpoint.every_steps, *accumulate(stage.steps for stage in config.stages))}
    if config.samples is not None:
        planned["samples"] = every(config.samples.every_steps, total)
    if config.validation is not None:
        planned["validation"] = every(config.validation.every_steps, total)
    return planned


def preview_steps(config: RunConfig, stage: StageConfig) -> int:
    """Return the student's steps in sample grids: those its method names, the first of the validation, or 4."""
    if stage.method.usual_steps is not None:
        return stage.method.usual_steps
    return DEFAULT_STEPS if config.validation is None else config.validation.steps[0]
