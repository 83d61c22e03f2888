"""`train`: a run from its config to its folder, stage by stage, and `load_run`: the student of such a folder."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill.config import RunConfig, StageConfig, load_config
from diffdistill.data.batches import derive_seed
from diffdistill.distillers import registry
from diffdistill.distillers.base import Distiller
from diffdistill.errors import UserError
from diffdistill.export.export import plan
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.roles import HEAD, Roles, Shadow, build_roles
from diffdistill.sampling.sampler import Sampler
from diffdistill.training import checkpoint
from diffdistill.training.checkpoint import Checkpoint
from diffdistill.training.data_feed import DataFeed, build_pairs, build_source, micro_batch_size
from diffdistill.training.engine import Engine, Guard
from diffdistill.training.folder import RunFolder, config_hash
from diffdistill.training.optimizers import RoleOptimizer, learning_rate
from diffdistill.training.preview import Preview, Validation, numbers
from diffdistill.training.progress import Progress
from diffdistill.training.stopping import Diverged, Stopped, StopSignals
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


@dataclass(frozen=True)
class LoadedRun:
    """The student of a run folder.

    Attributes:
        config: of the run.
        teacher: the run's teacher.
        roles: with the checkpoint's weights, the student's average in place of the student where asked for.
        distiller: the method of the checkpoint's stage; says how the student is sampled.
        step: optimiser steps done.
        checkpoint: where the weights come from.
    """

    config: RunConfig
    teacher: Teacher
    roles: Roles
    distiller: Distiller
    step: int
    checkpoint: Path

    def sampler(self, num_steps: int) -> Sampler:
        """Return how the student is sampled in `num_steps` steps."""
        return self.distiller.sampler(num_steps)


def train(config: RunConfig, resume: bool = False, progress: bool = True) -> RunResult:
    """Run a config to its end, or go on with it.

    Args:
        config: the run; its `output` is the run folder.
        resume: go on from the newest good checkpoint in the folder; from the start where there is none yet.
        progress: whether anything is printed.
    Raises:
        UserError: a folder in use, holding another run or other files; a config that differs from the one resumed (names the
            fields); data or roles that do not fit the teacher; no good checkpoint among several.
        Stopped: SIGTERM or SIGINT came; the run is saved. Exit status 0.
        Diverged: losses or gradients were not finite too often; the last good checkpoint stays.
        MachineError: the disk is full or fails; the last good checkpoint stays.
    """
    accelerator = build_accelerator(config.precision)
    folder = RunFolder(config.output)
    folder.check(config, resume)
    micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            folder.lock()
            stack.callback(folder.unlock)
            folder.check(config, resume)
        signals = stack.enter_context(StopSignals())
        stack.enter_context(torch.random.fork_rng(devices))  # the engine seeds the global generators
        return _Run(config, folder, accelerator, signals, progress and accelerator.is_main_process).train(resume)


def load_run(
    folder: str | Path, checkpoint: str | Path | None = None, ema: bool = True, device: torch.device | str | None = None
) -> LoadedRun:
    """Load the student of a run folder.

    Args:
        folder: of the run.
        checkpoint: a folder of `checkpoints/` by name or path, or "best" (lowest FID in validation); None for the newest good
            one.
        ema: whether the student gets its averaged weights, where the run keeps an average.
        device: None for the GPU where there is one.
    Raises:
        UserError: no run or no such checkpoint there, or a damaged one.
    """
    files = RunFolder(Path(folder))
    if not files.config.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml. `diffdistill train` makes one.")
    config = load_config(files.config)
    found = _find(files, checkpoint)
    teacher = load_teacher(config.teacher, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    roles = _build_roles(config, teacher)
    stage = _stage_of(found)
    _load_roles(roles, found)
    distiller = _distiller(config.stages[stage], roles)
    _load_roles(roles, found)
    if ema and config.ema is not None:
        roles.load_state("student", found.tensors["ema-student"])
    return LoadedRun(config, teacher, roles, distiller, found.step, found.path)


def build_accelerator(precision: str) -> Any:
    """Return accelerate's Accelerator at a precision, on the GPU where there is one; joins the processes of a launcher.

    Raises:
        UserError: fp16 without a GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_gpu = torch.cuda.is_available()
    if precision == "fp16" and not on_gpu:
        raise UserError("precision fp16 needs a GPU. On the CPU set precision: bf16 (or fp32).")
    if AcceleratorState._shared_state:  # an earlier run of this process may have had another precision
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not on_gpu)


class _Run:
    """A run in progress: what outlives a stage, and the counters of the whole."""

    def __init__(self, config: RunConfig, folder: RunFolder, accelerator: Any, signals: StopSignals, show: bool) -> None:
        self.config, self.folder, self.accelerator, self.signals, self.show = config, folder, accelerator, signals, show
        self.is_main: bool = accelerator.is_main_process
        self.on_cpu = accelerator.device.type == "cpu"
        self.size = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
        self.done = 0
        self.skipped_before = 0
        self.last: dict[str, float] = {}
        self.saved: Path | None = None
        self.started = time.perf_counter()

    # The run

    def train(self, resume: bool) -> RunResult:
        found, notes = checkpoint.newest(self.folder.checkpoints) if resume else (None, [])
        for note in notes:
            if self.is_main:
                warnings.warn(note, stacklevel=2)
        if found is not None:
            self._refuse_other_run(found)
            self.done, self.saved, self.skipped_before = found.step, found.path, found.state["skipped_before"]
            if found.state["stage"] == len(self.config.stages):
                self._say(self.show, f"{self.folder.path} is finished: {found.step} steps, {found.path}.")
                return RunResult(self.folder.path, found.path, found.step, self.skipped_before, found.state["metrics"])
            self._say(self.show, f"going on from {found.path}, step {found.step} of {self.config.total_steps}.")
        elif resume:
            self._say(self.show, f"no checkpoint in {self.folder.checkpoints} yet; starting at step 0.")
        self._build()  # refuses what cannot work while the folder is still empty
        if self.is_main:
            self.folder.begin(self.config, {"processes": self.accelerator.num_processes, "micro_batch_size": self.size})
        self.accelerator.wait_for_everyone()
        self._make_pairs()
        if self.is_main:
            self.folder.cut_metrics(self.done)
        self.tracker = Tracker(self.folder, self.config.logging.tensorboard, self.done) if self.is_main else None
        self.progress = Progress(self.config.total_steps, self.done, self.show)
        try:
            first = 0 if found is None else found.state["stage"]
            for stage in range(first, len(self.config.stages)):
                self._stage(stage, found if stage == first else None)
        finally:
            self.progress.close()
            if self.tracker is not None:
                self.tracker.close()
        self.accelerator.wait_for_everyone()
        path = self.folder.checkpoints / checkpoint.name(self.done)
        return RunResult(self.folder.path, path, self.done, self.skipped_before, self.last)

    def _build(self) -> None:
        config = self.config
        self.teacher = load_teacher(config.teacher, device=self.accelerator.device)
        self.source = build_source(config, self.teacher)
        stored = config.pairs is not None and config.pairs.path is not None
        self.pairs = build_pairs(config, self.teacher, self.folder.pairs) if stored else None
        self.roles = _build_roles(config, self.teacher)
        self.shadow = None if config.ema is None else Shadow(self.roles, "student", config.ema.decay)
        samples, validation = config.samples, config.validation
        self.preview = Preview(self.teacher, samples.num, config.seed) if samples is not None and self.is_main else None
        self.validation = (
            Validation(self.teacher, validation.protocol, validation.steps) if validation is not None and self.is_main else None
        )
        if config.exportable:
            last = config.stages[-1]
            plan(self.teacher, _distiller(last, self.roles).sampler(preview_steps(config, last)))

    def _make_pairs(self) -> None:
        """Make the teacher's pairs where the config asks for new ones; they are kept in the run folder."""
        if self.config.pairs is None or self.config.pairs.num is None:
            return
        if self.is_main:
            build_pairs(self.config, self.teacher, self.folder.pairs)
        self.accelerator.wait_for_everyone()
        self.pairs = build_pairs(self.config, self.teacher, self.folder.pairs)

    def _stage(self, index: int, found: Checkpoint | None) -> None:
        """Train one stage, from where `found` left it."""
        stage, first = self.config.stages[index], 0
        if found is not None:
            first = found.state["stage_step"]
            _load_roles(self.roles, found)
            if self.shadow is not None:
                self.shadow.load_state(found.tensors["ema-student"])
        if index > 0:
            for role in stage.needs.frozen:  # they follow the student, and each stage starts from the last one's
                self.roles.assign(role, "student")
        engine = _engine(
            self.config, index, self.teacher, self.roles, self.source, self.pairs, self.accelerator, self.size, self.shadow
        )
        distiller, optimizers = engine.distiller, engine.optimizers
        if found is not None and first > 0:
            _load_roles(self.roles, found)  # again: building the method may have set some
            for role, optimizer in optimizers.items():
                optimizer.load_state(found.tensors[f"optimizer-{role}"])
            engine.load_state(found.state["engine"])
        for step in range(first, stage.steps):
            engine.step(step, stop=self.signals.requested is not None)
            self.done += 1
            self.progress.advance()
            self._after_step(index, stage, step, distiller, optimizers, engine)

    def _after_step(
        self,
        index: int,
        stage: StageConfig,
        step: int,
        distiller: Distiller,
        optimizers: Mapping[str, RoleOptimizer],
        engine: Engine,
    ) -> None:
        """Do what is due after a step: finish the stage, log, preview, evaluate, save, stop."""
        config, ends = self.config, step + 1 == stage.steps
        logs = ends or self.done % config.logging.every_steps == 0
        saves = ends or self.done % config.checkpoint.every_steps == 0
        samples = self.preview is not None and self._due(config.samples)
        validates = self.validation is not None and self._due(config.validation)
        stops = self._stops(engine, logs)
        if self.on_cpu or logs or saves or stops or samples or validates:
            skipped = self.skipped_before + self._check(engine)
        if ends:
            distiller.finish()
        if logs:
            self._log(index, stage, step, optimizers, engine, skipped)
        if samples:
            self._show_samples(stage, distiller)
        metrics = self._validate(distiller) if validates else {}
        if saves or stops or self._is_best(metrics):
            if ends:
                self.skipped_before = skipped
            if self.is_main:
                self._save(
                    index + 1 if ends else index,
                    0 if ends else step + 1,
                    {} if ends else optimizers,
                    None if ends else engine.state(),
                    metrics,
                )
        if stops and self.done < config.total_steps:
            raise Stopped(
                f"stopped by {self.signals.requested or 'a signal'} after step {self.done} of {config.total_steps}; "
                f"everything is saved in {self.folder.path}. Go on with: diffdistill train {self.folder.config} "
                "--resume"
            )

    def _due(self, setting: Any) -> bool:
        return setting is not None and (self.done % setting.every_steps == 0 or self.done == self.config.total_steps)

    def _stops(self, engine: Engine, logs: bool) -> bool:
        """Return whether to stop; every process at the same step. With several GPUs at the next logged step."""
        if self.accelerator.num_processes == 1:
            return self.signals.requested is not None
        return (self.on_cpu or logs) and engine.stop_agreed()

    def _check(self, engine: Engine) -> int:
        try:
            return engine.guard.check()
        except Diverged as error:
            kept = f"the last good checkpoint is {self.saved}" if self.saved else "no checkpoint had been written yet"
            raise Diverged(f"{error} This was step {self.done}; {kept}.") from None

    # What is due now and then

    def _log(
        self, index: int, stage: StageConfig, step: int, optimizers: Mapping[str, RoleOptimizer], engine: Engine, skipped: int
    ) -> None:
        means = engine.meter.read()
        rates = {f"lr/{role}": learning_rate(optimizer.config, step, stage.steps) for role, optimizer in optimizers.items()}
        speed = self.progress.report(f"{index + 1}/{len(self.config.stages)} {stage.method.name}", means)
        if self.tracker is not None:
            self.last = {**means, **rates, "skipped": skipped, "stage": index}
            self.tracker.log(self.done, {**self.last, "steps_per_sec": speed, "seconds": time.perf_counter() - self.started})

    def _show_samples(self, stage: StageConfig, distiller: Distiller) -> None:
        assert self.preview is not None and self.tracker is not None
        sampler = distiller.sampler(preview_steps(self.config, stage))
        with self._averaged():
            images = self.preview.student_images(self.roles, sampler)
        figures = self.preview.figures(images)
        if "fake" in stage.needs.trained:
            figures["drift/fake_lag"] = self.preview.fake_lag(self.roles, sampler)
        picture = self.preview.save(self.folder.samples / f"{checkpoint.name(self.done)}.png", images)
        self.tracker.log(self.done, figures)
        self.tracker.image(self.done, "samples: teacher above student", picture[:3])
        self.progress.pause()

    def _validate(self, distiller: Distiller) -> dict[str, float]:
        assert self.validation is not None and self.tracker is not None
        with self._averaged():
            scores = self.validation.scores(self.roles, distiller)
        logged = {name: value for name, value in scores.items() if name != "fid"}
        self.tracker.log(self.done, logged)
        self._say(self.progress.say, f"step {self.done}  " + numbers({k: v for k, v in logged.items() if "/fid@" in k}))
        self.progress.pause()
        return scores

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        """Return whether this is the lowest FID so far. Only the main process knows, and only it saves."""
        if "fid" not in metrics:
            return False
        best = checkpoint.best_score(self.folder.checkpoints)
        return best is None or metrics["fid"] < best

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the student's average in its place for a while, where one is kept."""
        with contextlib.nullcontext() if self.shadow is None else self.roles.using("student", self.shadow.state()):
            yield

    def _save(
        self,
        stage: int,
        stage_step: int,
        optimizers: Mapping[str, RoleOptimizer],
        engine: Mapping[str, Any] | None,
        metrics: Mapping[str, float],
    ) -> None:
        tensors = {f"role-{role}": self.roles.state(role) for role in _stored_roles(self.roles)}
        if self.shadow is not None:
            tensors["ema-student"] = self.shadow.state()
        tensors |= {f"optimizer-{role}": optimizer.state() for role, optimizer in optimizers.items()}
        state = {
            "stage": stage,
            "stage_step": stage_step,
            "metrics": dict(metrics),
            "engine": engine,
            "skipped_before": self.skipped_before,
            "micro_batch_size": self.size,
            "config": config_hash(self.config),
        }
        self.saved = checkpoint.save(self.folder.checkpoints, self.done, tensors, state)
        checkpoint.prune(self.folder.checkpoints, self.config.checkpoint.keep)
        self.progress.pause()

    def _refuse_other_run(self, found: Checkpoint) -> None:
        if found.state["config"] != config_hash(self.config):
            raise UserError(
                f"{found.path} was made with another config than {self.folder.config}, which must have been edited "
                "since. Put it back as it was, or start a new run in another output."
            )
        if found.state["micro_batch_size"] != self.size:
            raise UserError(
                f"the run was started with micro-batches of {found.state['micro_batch_size']}, and "
                f"{self.accelerator.num_processes} processes would make them {self.size}, which changes every "
                "draw. Resume with as many processes as before; with micro_batch_size set, their number is free."
            )

    @staticmethod
    def _say(say: Any, text: str) -> None:
        if callable(say):
            say(text)
        elif say:
            print(text, flush=True)


def preview_steps(config: RunConfig, stage: StageConfig) -> int:
    """Return the student's steps in sample grids: the method's `student_steps`, the first of the validation, or 4."""
    fixed = getattr(stage.method, "student_steps", None)
    if fixed is not None:
        return fixed
    return DEFAULT_STEPS if config.validation is None else config.validation.steps[0]


def _find(files: RunFolder, wanted: str | Path | None) -> Checkpoint:
    if wanted is None:
        found, notes = checkpoint.newest(files.checkpoints)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        if found is None:
            raise UserError(f"{files.path} has no checkpoint yet. Train it on: diffdistill train {files.config} --resume")
        return found
    if str(wanted) == "best":
        path = checkpoint.best(files.checkpoints)
        if path is None:
            raise UserError(f"{files.path} holds no evaluated checkpoint. Set validation in the config, or leave best out.")
        return checkpoint.load(path)
    known = checkpoint.available(files.checkpoints)
    path = files.checkpoints / str(wanted)
    if not path.is_dir():
        path = Path(wanted)
    if not path.is_dir():
        raise UserError(
            f"no checkpoint {str(wanted)!r} in {files.checkpoints}. Known: "
            f"{', '.join(other.name for other in known) or 'none'}."
        )
    return checkpoint.load(path)


def _stage_of(found: Checkpoint) -> int:
    """Return the stage the student of a checkpoint was last trained in."""
    stage, step = found.state["stage"], found.state["stage_step"]
    return stage - 1 if step == 0 and stage > 0 else stage


def _build_roles(config: RunConfig, teacher: Teacher) -> Roles:
    """Build every role that a stage of the run needs; all start at the teacher."""
    needs = [stage.needs for stage in config.stages]
    names = dict.fromkeys(role for need in needs for role in (*need.trained, *need.frozen) if role != HEAD)
    head = None
    if any(need.head for need in needs):
        head = _build_head(config, teacher)
    return build_roles(teacher.denoiser, tuple(names), config.roles.layout, config.roles.lora, head=head)


def _build_head(config: RunConfig, teacher: Teacher) -> torch.nn.Module:
    """Build the discriminator head, equal in every process. A run has one, so its stages must read one tap."""
    from diffdistill.models.heads import build_head

    taps = {getattr(getattr(stage.method, "gan", None), "tap", "mid") for stage in config.stages if stage.needs.head}
    if len(taps) > 1:
        raise UserError(
            f"a run has one discriminator head, and its stages read different taps: {', '.join(sorted(taps))}. Set "
            "one, or make them runs of their own."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "head"))
        return build_head(teacher.denoiser, taps.pop())


def _stored_roles(roles: Roles) -> tuple[str, ...]:
    return (*roles.names, HEAD) if roles.head is not None else roles.names


def _load_roles(roles: Roles, found: Checkpoint) -> None:
    for role in _stored_roles(roles):
        roles.load_state(role, found.tensors[f"role-{role}"])


def open_stage(config: RunConfig, teacher: Teacher, index: int = 0) -> tuple[Roles, Engine]:
    """Build the roles and the engine of one stage without a run folder: what a benchmark of the step needs."""
    accelerator = build_accelerator(config.precision)
    roles = _build_roles(config, teacher)
    size = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
    shadow = None if config.ema is None else Shadow(roles, "student", config.ema.decay)
    return roles, _engine(config, index, teacher, roles, build_source(config, teacher), None, accelerator, size, shadow)


def _engine(
    config: RunConfig,
    index: int,
    teacher: Teacher,
    roles: Roles,
    source: Any,
    pairs: Any,
    accelerator: Any,
    size: int,
    shadow: Shadow | None,
) -> Engine:
    """Put one stage together: method, fresh optimisers, data."""
    stage = config.stages[index]
    optimizers = {
        role: RoleOptimizer(role, roles.parameters(role), stage.optimizer(role), stage.steps) for role in stage.trained
    }
    feed = DataFeed(
        source,
        pairs if stage.needs.pairs else None,
        teacher,
        batch_size=config.batch_size,
        size=size,
        seed=config.seed,
        stage=index,
    )
    return Engine(
        _distiller(stage, roles),
        roles,
        optimizers,
        feed,
        accelerator,
        seed=config.seed,
        stage=index,
        clip_grad_norm=config.clip_grad_norm,
        guard=Guard(config.guard.max_nonfinite_steps),
        averages={} if shadow is None else {"student": shadow},
    )


def _distiller(stage: StageConfig, roles: Roles) -> Distiller:
    return registry.get(stage.method.name)(stage.method, roles.teacher, roles, stage.steps)
