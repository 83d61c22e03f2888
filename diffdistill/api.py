"""The Python functions behind the verbs. The command line is a thin shell over these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill import scoring
from diffdistill.config import RunConfig, load_config, parse_config
from diffdistill.doctor import doctor
from diffdistill.errors import UserError
from diffdistill.evaluation.compare import Comparison
from diffdistill.evaluation.result import Evaluation
from diffdistill.evaluation.weights import WeightStore
from diffdistill.export.manifest import Manifest, Verification
from diffdistill.models.conditioning import Asked
from diffdistill.models.loading import load_teacher
from diffdistill.preflight import check
from diffdistill.targets import Target, open_target, steps_of
from diffdistill.training import teachers
from diffdistill.training.loading import LoadedRun, load_run
from diffdistill.training.run import train

__all__ = [
    "WeightStore",
    "check",
    "compare",
    "distill",
    "doctor",
    "evaluate",
    "export",
    "load_config",
    "load_run",
    "load_teacher",
    "sample",
    "train_teacher",
    "verify",
]

Config = RunConfig | Mapping[str, Any] | str | Path


def as_config(config: Config, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a checked config from one, from a mapping as read from YAML, or from the path of a YAML file.

    Raises:
        UserError: mistakes in it, all at once; overrides for something that is not a file.
    """
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if overrides:
        raise UserError("overrides change a YAML file; change the mapping itself, or use config.model_copy(update=...).")
    return config if isinstance(config, RunConfig) else parse_config(config)


def distill(config: Config, overrides: Sequence[str] = (), resume: bool = False, progress: bool = True) -> LoadedRun:
    """Train a student and return it.

    Args:
        config: a RunConfig, a mapping, or the path of a YAML file.
        overrides: for a file, "a.b=c" each.
        resume: go on from the newest checkpoint of the run folder; the config must be the same.
        progress: show a bar on a terminal, lines elsewhere.
    Raises:
        UserError: mistakes in the config, a teacher or data that do not fit, a run folder in use.
    """
    config = as_config(config, overrides)
    train(config, resume=resume, progress=progress)
    return load_run(config.output)


def train_teacher(config: str | Path, output: str | Path, progress: bool = True) -> dict[str, Any]:
    """Train an embedded kind of teacher, autoencoder or classifier from a YAML file; return what it recorded.

    Raises:
        UserError: mistakes in the file, or an output folder that exists.
    """
    settings = teachers.load_teacher_config(config)
    if Path(output).exists():
        raise UserError(f"{output} exists already and is left as it is. Choose another folder with -o, or remove it.")
    return teachers.train_teacher(settings, output, progress=progress)


@dataclass(frozen=True)
class Samples:
    """Images uint8 (N, C, H, W), the labels asked for (N,) or None, and the steps and network evaluations of each."""

    images: Tensor
    labels: Tensor | None
    num_steps: int
    nfe: int

    def save_grid(self, path: str | Path, columns: int = 10, scale: int = 4) -> Path:
        """Write the images as one PNG, `columns` a row, each pixel drawn `scale` wide."""
        from diffdistill.evaluation.figures import image_grid, png
        from diffdistill.files import write_atomic

        return write_atomic(path, png(image_grid(self.images.cpu().numpy(), scale=scale, columns=columns)))


def sample(
    target: str | Path,
    steps: int | None = None,
    num: int = 16,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    guidance: float | None = None,
    solver: str | None = None,
    checkpoint: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    attention: str | None = None,
) -> Samples:
    """Make images; image k has seed + k and label or prompt k, so it is the same whatever the number asked for.

    Args:
        target: a run folder, an export, a pipeline folder, or an embedded teacher.
        steps: network steps; None for what the model is meant for.
        num: images.
        labels: classes, repeated until there are enough; None for 0, 1, 2, ... in turn.
        seed: of the first image.
        guidance: scale counted from 1; None for what the model is meant for.
        solver: of a teacher, one of `targets.SOLVERS`.
        checkpoint: of a run; None for the newest.
        prompts: for a model that reads text, repeated until there are enough.
        attention: the kernel of attention; None for the run's own, or "auto".
    Raises:
        UserError: nothing to sample at target, labels out of range, no prompts, or settings that do not fit it.
    """
    from diffdistill.evaluation.images import to_uint8

    if num < 1:
        raise UserError(f"num must be at least 1; got {num}.")
    opened = open_target(target, solver, checkpoint, attention=attention)
    asked = _asked(opened, num, labels, prompts)
    sampler = opened.sampler(steps, guidance)
    generate, parts = opened.generator(sampler), []
    for start in range(0, num, opened.images_at_once):
        stop = min(num, start + opened.images_at_once)
        parts.append(generate(list(range(seed + start, seed + stop)), None if asked is None else asked[start:stop]))
    chosen = asked if isinstance(asked, torch.Tensor) else None
    return Samples(to_uint8(torch.cat(parts)), chosen, sampler.num_steps, sampler.nfe)


def _asked(opened: Target, num: int, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> Asked:
    """Return what each of `num` images is asked for: labels or prompts over and over, or nothing."""
    classes, reads_text = opened.teacher.num_classes, opened.teacher.family.reads_text
    if prompts and not reads_text:
        raise UserError(f"{opened.name} reads no text; leave the prompts out.")
    if labels and classes is None:
        kind = "reads text; give prompts in place of labels" if reads_text else "is unconditional; leave the labels out"
        raise UserError(f"{opened.name} {kind}.")
    if reads_text:
        if not prompts:
            raise UserError(f"{opened.name} makes images from text; give prompts.")
        return [prompts[k % len(prompts)] for k in range(num)]
    if classes is None:
        return None
    wrong = [label for label in labels or () if not 0 <= label < classes]
    if wrong:
        raise UserError(f"labels of {opened.name} run from 0 to {classes - 1}; got {', '.join(map(str, wrong))}.")
    cycle = list(labels or range(classes))
    return torch.tensor([cycle[k % len(cycle)] for k in range(num)])


def evaluate(
    target: str | Path,
    protocol: str | Path = "digits",
    steps: Sequence[int] = (),
    guidance: float | None = None,
    solver: str | None = None,
    checkpoint: str | Path | None = None,
    progress: scoring.Progress | None = None,
    **settings: Any,
) -> dict[int, Evaluation]:
    """Score what a target makes, at each number of steps.

    Args:
        target: a run folder, an export, a pipeline folder, a hub id, or an embedded teacher.
        protocol: the name of one that comes with the package, or the path of its YAML file.
        steps: numbers of network steps; empty for the one the model is meant for.
        guidance, solver, checkpoint: as for `sample`.
        progress: called with (what, images done, images in all).
        settings: further fields of `scoring.Settings`, e.g. output or metrics.
    Returns:
        The evaluation by number of steps; that of images in files by 0.
    Raises:
        UserError: unknown protocol or target, or a target that does not fit the protocol.
    """
    chosen = scoring.Settings(protocol=protocol, guidance=guidance, **settings)
    found = scoring.evaluate(target, steps, chosen, solver, checkpoint, progress=progress)
    return {evaluation.cost.num_steps or 0: evaluation for evaluation in found.values()}


def compare(reports: Sequence[str | Path] | Mapping[str, Evaluation], force: bool = False) -> Comparison:
    """Put evaluations side by side.

    Args:
        reports: files or folders that `diffdistill eval -o` wrote, or evaluations by name.
        force: also those measured differently; the differences are then part of the result.
    Raises:
        UserError: nothing to compare, unreadable reports, or differences without force.
    """
    from diffdistill.evaluation.compare import compare as side_by_side

    if not isinstance(reports, Mapping):
        reports = {name: report for path in reports for name, report in scoring.load_evaluations(path).items()}
    return side_by_side(reports, force=force)


def export(
    run: str | Path,
    output: str | Path,
    kind: str = "auto",
    steps: Sequence[int] = (),
    checkpoint: str | Path | None = None,
    check_size: int | None = None,
) -> Manifest:
    """Write the student of a run as something stock diffusers loads, and verify it.

    Args:
        run: run folder.
        output: folder to write; must not exist.
        kind: "auto", "lora" or "kohya" (a LoRA file), "peft" (adapter folder) or "merged" (a whole pipeline).
        steps: the numbers of steps it is meant for; empty for the one it is trained for.
        checkpoint: None for the newest.
        check_size: edge in pixels of the images it is verified on, for a text-to-image student; None for the smallest possible.
    Raises:
        UserError: no run there, an output that exists, or a student that stock diffusers cannot carry.
        MachineError: stock diffusers does not reproduce the student; nothing is written.
    """
    from diffdistill.export import export as write

    for count in steps:
        if count < 1:
            raise UserError(f"steps must be at least 1; got {count}.")
    if Path(output).exists():
        raise UserError(f"{output} exists already and is left as it is. Choose another folder with -o, or remove it.")
    loaded = load_run(run, checkpoint=checkpoint, device="cpu")  # where stock diffusers is asked, without TensorFloat-32
    counts = tuple(steps) or (steps_of(loaded),)
    return write(
        loaded.teacher,
        loaded.roles,
        loaded.sampler(counts[0]),
        output,
        kind=kind,
        step_counts=counts,
        method=loaded.distiller.name,
        check_size=check_size,
    )  # type: ignore[arg-type]


def verify(folder: str | Path) -> Verification:
    """Load an export with stock diffusers in a new process, compare tensors and outputs, and return every check.

    Raises:
        UserError: not an export.
    """
    from diffdistill.export import verify as check_export

    return check_export(folder)
