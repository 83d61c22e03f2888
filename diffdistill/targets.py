"""What a command is pointed at: a run, an export, a pipeline folder or an embedded teacher, as one thing that makes images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from diffdistill.device import usual_device
from diffdistill.errors import UserError, unknown_name
from diffdistill.export.manifest import LORA_FILE, MANIFEST, Manifest
from diffdistill.files import sha256
from diffdistill.math import grids
from diffdistill.models.attention import Attention
from diffdistill.models.codec import images_at_once
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser, OfNetwork
from diffdistill.models.fingerprint import weights_fingerprint
from diffdistill.models.guidance import guided
from diffdistill.models.loading import INDEX, Teacher, load_teacher
from diffdistill.models.network import FamilyDenoiser
from diffdistill.sampling import stock, stock_runs
from diffdistill.sampling.generate import Generate, Predictions, image_generator, prediction_generator
from diffdistill.sampling.sampler import DrawsNoise, Recording, Sampler, State

RUN_CONFIG = "config.yaml"
DEFAULT_STEPS = 4  # where the model is meant for no number in particular
RULES = ("ddim", "heun", "dpmpp_2m")
FEW_STEPS = {"lcm": "LCMScheduler", "tcd": "TCDScheduler"}
SOLVERS = (*RULES, "unipc", "stock", *FEW_STEPS)
"""Samplers of a pipeline: our own rules on the trailing grid, diffusers' UniPC, the pipeline's own scheduler, and the stock
schedulers that LCM and TCD LoRAs are made for."""


class AnySampler(Protocol):
    """A `Sampler`, or a stock scheduler behind the same names."""

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that, for one model, decide the images."""
        ...

    @property
    def nfe(self) -> int:
        """Network evaluations an image; guidance doubles."""
        ...

    def sample(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> Tensor:
        """Return the final states."""
        ...

    def trajectory(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> tuple[list[State], Tensor]:
        """Return every step's state and clean estimate, and the same final states."""
        ...


@dataclass(frozen=True)
class StockSampler:
    """A stock diffusers scheduler run on our denoiser.

    Attributes:
        config: every field, the class name under "_class_name".
        num_steps: what `set_timesteps` gets.
        guidance: scale counted from 1.
        gives_sigmas: whether the pipeline sets the times by even sigmas.
        guidance_as_input: whether the scale goes into the network, in one evaluation.
    """

    config: Mapping[str, Any]
    num_steps: int
    guidance: float = 1.0
    gives_sigmas: bool = False
    guidance_as_input: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All fields."""
        return {**vars(self), "config": dict(self.config)}

    @property
    def nfe(self) -> int:
        """One evaluation a step, guidance doubles unless it is an input."""
        return self.num_steps * (1 if self.guidance == 1 or self.guidance_as_input else 2)

    def sample(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> Tensor:
        """Return the final states."""
        return self._run(*self._guided(denoiser, cond), noise)

    def trajectory(self, denoiser: Denoiser, noise: DrawsNoise, cond: Condition) -> tuple[list[State], Tensor]:
        """Return every call's state, as the network sees it, and clean estimate, and the final states."""
        net, cond = self._guided(denoiser, cond)
        recording = Recording(net)
        final = self._run(recording, cond, noise)
        return recording.states, final

    def _guided(self, denoiser: Denoiser, cond: Condition) -> tuple[Denoiser, Condition]:
        if not self.guidance_as_input:
            return guided(denoiser, self.guidance), cond
        like = next(iter(cond.values.values()))
        w = torch.full((cond.batch_size,), self.guidance, dtype=torch.float64, device=like.device)
        return denoiser, cond.with_values(guidance=w)

    def _run(self, net: Denoiser, cond: Condition, noise: DrawsNoise) -> Tensor:
        scheduler = stock_runs.build_scheduler(self.config)
        return stock_runs.stock_sample(net, scheduler, self.num_steps, noise, cond, self.gives_sigmas)


@dataclass(frozen=True)
class Target:
    """Something that makes images.

    Attributes:
        name: as the user wrote it.
        kind: "run" (the student of a run), "export" (a student's pipeline) or "pipeline" (a teacher).
        teacher: what the denoiser came from: its codec and classes.
        denoiser: the network that is sampled.
        make_sampler: (number of steps, guidance or None for the model's own) -> the sampler.
        default_steps: the number of steps it is meant for.
        identity: hashes of all that its images depend on, beside the sampler.
    """

    name: str
    kind: Literal["run", "export", "pipeline"]
    teacher: Teacher
    denoiser: Denoiser
    make_sampler: Callable[[int, float | None], AnySampler]
    default_steps: int = DEFAULT_STEPS
    identity: Mapping[str, Any] = field(default_factory=dict)

    def sampler(self, num_steps: int | None = None, guidance: float | None = None) -> AnySampler:
        """Return the sampler of this many steps.

        Args:
            num_steps: network steps; None for what the model is meant for.
            guidance: scale counted from 1; None for what the model is meant for.
        Raises:
            UserError: steps below 1, a negative guidance, or guidance where there are no classes.
        """
        num_steps = self.default_steps if num_steps is None else num_steps
        if num_steps < 1:
            raise UserError(f"steps must be at least 1; got {num_steps}.")
        if guidance is not None and guidance < 0:
            raise UserError(f"guidance is counted from 1 (1 = none, larger is stronger); got {guidance:g}.")
        if guidance not in (None, 1) and self.teacher.conditioner.conditioning == "none":
            raise UserError(f"{self.name} is unconditional, so guidance {guidance:g} has no effect; leave it out.")
        return self.make_sampler(num_steps, guidance)

    def generator(self, sampler: AnySampler) -> Generate:
        """Return (seeds, labels or prompts) -> images; an unconditional model takes no notice of the labels."""
        generate = image_generator(self.teacher, self.denoiser, sampler)
        return generate if self._takes_conditions else lambda seeds, asked: generate(seeds, None)

    def predictions(self, sampler: AnySampler) -> Predictions:
        """Return (seeds, labels or prompts) -> the clean images predicted at each step of the way to those of `generator`."""
        predict = prediction_generator(self.teacher, self.denoiser, sampler)
        return predict if self._takes_conditions else lambda seeds, asked: predict(seeds, None)

    @property
    def images_at_once(self) -> int:
        """How many images it is asked for in one call unless somebody says."""
        _, height, width = self.teacher.image_shape
        return images_at_once(height, width)

    @property
    def _takes_conditions(self) -> bool:
        return self.teacher.conditioner.conditioning != "none"


def is_model(path: Path) -> bool:
    """Tell a folder that `open_target` opens from any other."""
    return any((path / name).is_file() for name in (RUN_CONFIG, MANIFEST, INDEX))


def open_target(
    target: str | Path,
    solver: str | None = None,
    checkpoint: str | Path | None = None,
    lora: str | Path | None = None,
    attention: str | None = None,
) -> Target:
    """Open a run folder, an export folder, a pipeline folder or an embedded teacher.

    Args:
        target: where it is, or the name of an embedded teacher.
        solver: one of SOLVERS for a teacher, "ddim" when None; a student has its own sampler.
        checkpoint: of a run; None for the newest.
        lora: of a pipeline, a file or folder that its `load_lora_weights` takes; merged into the network.
        attention: the kernel of attention; None for the run's own, or "auto".
    Raises:
        UserError: nothing there, a folder of something else, or a solver or checkpoint that does not belong to it.
    """
    opened = _open(target, solver, checkpoint, lora)
    if attention is None:
        return opened
    assert isinstance(opened.denoiser, OfNetwork), "what is opened is a network"
    denoiser, identity = opened.denoiser.with_attention(Attention(attention)), {**opened.identity, "attention": attention}
    return dataclasses.replace(opened, denoiser=denoiser, identity=identity)


def _open(target: str | Path, solver: str | None, checkpoint: str | Path | None, lora: str | Path | None) -> Target:
    path, name = Path(target), str(target)
    is_run, is_export = (path / RUN_CONFIG).is_file(), (path / MANIFEST).is_file()
    if path.is_dir() and not is_model(path):
        raise UserError(
            f"{name} is neither a run ({RUN_CONFIG}), nor an export ({MANIFEST}), nor a diffusers pipeline ({INDEX})."
        )
    if solver is not None and (is_run or is_export):
        raise UserError(f"{name} is a student with a sampler of its own; leave solver {solver!r} out.")
    if checkpoint is not None and not is_run:
        raise UserError(f"{name} is not a run and has no checkpoints; leave checkpoint {str(checkpoint)!r} out.")
    if lora is not None and (is_run or is_export):
        raise UserError(f"{name} is a student; a LoRA goes onto a pipeline. Leave {str(lora)!r} out, or name the pipeline.")
    if is_run:
        return _run(name, path, checkpoint)
    return _export(name, path) if is_export else _pipeline(name, solver or "ddim", lora)


def _run(name: str, path: Path, checkpoint: str | Path | None) -> Target:
    from diffdistill.training import checkpoint as checkpoints
    from diffdistill.training.loading import load_run

    run = load_run(path, checkpoint=checkpoint)

    def make(num_steps: int, guidance: float | None) -> AnySampler:
        sampler = run.sampler(num_steps)
        return sampler if guidance is None else dataclasses.replace(sampler, guidance=guidance)

    identity = {"checkpoint": sha256(run.checkpoint / checkpoints.STATE), "teacher": run.config.teacher}
    return Target(name, "run", run.teacher, run.roles["student"], make, steps_of(run), identity)


def steps_of(run: Any) -> int:
    """Return the number of steps that a loaded run's student is sampled in, DEFAULT_STEPS where its method names none."""
    usual = run.stage.method.usual_steps
    return DEFAULT_STEPS if usual is None else usual


def _export(name: str, path: Path) -> Target:
    manifest = Manifest.read(path)
    config = {"_class_name": manifest.scheduler.class_name, **manifest.scheduler.config}
    size = manifest.call.get("height")
    if manifest.kind == "merged":
        teacher = load_teacher(path, device=usual_device(), size=size)
        denoiser = teacher.denoiser
    else:
        teacher = load_teacher(manifest.base.path, device=usual_device(), size=size)
        denoiser = _with_adapter(teacher, path) if manifest.kind == "peft" else _with_lora(teacher, path, LORA_FILE)

    def make(num_steps: int, guidance: float | None) -> AnySampler:
        scale = manifest.guidance if guidance is None else guidance
        if manifest.scheduler.class_name == stock.SCM:  # walks on another path than the network; verified to be this sampler
            return Sampler(grids.trailing(denoiser.schedule, num_steps), "renoise", guidance=scale)
        return StockSampler(config, num_steps, scale, manifest.gives_sigmas, manifest.guidance_as_input)

    return Target(name, "export", teacher, denoiser, make, manifest.step_counts[0], {"manifest": sha256(path / MANIFEST)})


def _with_adapter(teacher: Teacher, path: Path) -> FamilyDenoiser:
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(teacher.network, str(path)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the adapter in {path}: {error}") from error
    return teacher.denoiser.with_network(merged.eval().requires_grad_(False))


def _with_lora(teacher: Teacher, path: str | Path, weight_name: str | None = None) -> FamilyDenoiser:
    """Return the base with a LoRA file merged in, read as the stock pipeline reads it.

    Raises:
        UserError: no LoRA there, one for another network, or one that also changes the text encoder.
    """
    import diffusers

    network: Any = teacher.network
    component = teacher.family.component
    try:
        found = getattr(diffusers, teacher.pipeline_class).lora_state_dict(str(path), weight_name=weight_name)
        weights = found[0] if isinstance(found, tuple) else found
        if others := sorted({key.partition(".")[0] for key in weights} - {component}):
            raise UserError(f"the LoRA in {path} also changes {', '.join(others)}; only {component} can be evaluated with one.")
        network.load_lora_adapter(weights, prefix=component)
        network.fuse_lora()
        network.unload_lora()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"cannot load the LoRA in {path}: {error}") from error
    return teacher.denoiser.with_network(network.eval().requires_grad_(False))


def _pipeline(name: str, solver: str, lora: str | Path | None) -> Target:
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    teacher = load_teacher(name, device=usual_device())
    identity: dict[str, Any] = teacher.fingerprints()
    denoiser = teacher.denoiser
    if lora is not None:
        denoiser = _with_lora(teacher, lora)
        identity["lora"] = weights_fingerprint(teacher.network)

    def make(num_steps: int, guidance: float | None) -> AnySampler:
        scale = teacher.guidance if guidance is None else guidance
        if solver == "stock":
            return StockSampler(teacher.scheduler_config, num_steps, scale)
        if solver in FEW_STEPS:
            return StockSampler({**teacher.scheduler_config, "_class_name": FEW_STEPS[solver]}, num_steps, scale)
        if solver == "unipc":
            return StockSampler(stock.unipc(teacher.scheduler_config), num_steps, scale)
        return Sampler(grids.trailing(teacher.denoiser.schedule, num_steps), solver, guidance=scale)  # type: ignore[arg-type]

    return Target(name, "pipeline", teacher, denoiser, make, identity=identity)
