"""`load_run`: the student of a run folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.config import RunConfig, StageConfig, load_config
from diffdistill.device import usual_device
from diffdistill.distillers.base import Distiller
from diffdistill.errors import UserError
from diffdistill.models.loading import Teacher
from diffdistill.models.roles import HEAD, Roles, Shadow
from diffdistill.sampling.sampler import Sampler
from diffdistill.training import checkpoint
from diffdistill.training.building import build_distiller, build_run_roles, open_teacher
from diffdistill.training.checkpoint import Checkpoint
from diffdistill.training.folder import RunFolder
from diffdistill.training.optimizers import RoleOptimizer


@dataclass(frozen=True)
class LoadedRun:
    """The student of a run folder.

    Attributes:
        config: of the run.
        stage: the one that the student was last trained in.
        teacher: the run's teacher.
        roles: with the checkpoint's weights, the student's average in place of the student where asked for.
        distiller: the method of the stage; says how the student is sampled.
        step: optimiser steps done.
        checkpoint: where the weights come from.
    """

    config: RunConfig
    stage: StageConfig
    teacher: Teacher
    roles: Roles
    distiller: Distiller
    step: int
    checkpoint: Path

    def sampler(self, num_steps: int) -> Sampler:
        """Return how the student is sampled in `num_steps` steps."""
        return self.distiller.sampler(num_steps)


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
        UserError: no run or no such checkpoint there, a damaged one, or another teacher than the run's under its path.
    """
    files = RunFolder(Path(folder))
    if not files.config.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml. `diffdistill train` makes one.")
    config = load_config(files.config)
    found = _find(files, checkpoint)
    teacher = open_teacher(config, usual_device() if device is None else device)
    files.check_teacher(teacher.fingerprints())
    roles = build_run_roles(config, teacher)
    load_roles(roles, found)
    stage = config.stages[_stage_of(found)]
    distiller = build_distiller(stage, roles)
    load_roles(roles, found)  # again: building the method may have set some
    if ema and config.ema is not None:
        roles.load_state("student", found.tensors["ema-student"])
    return LoadedRun(config, stage, teacher, roles, distiller, found.step, found.path)


def stored_roles(roles: Roles) -> tuple[str, ...]:
    """Return the roles that a checkpoint holds, the discriminator head among them."""
    return (*roles.names, HEAD) if roles.head is not None else roles.names


def stored_tensors(
    roles: Roles, shadow: Shadow | None, optimizers: Mapping[str, RoleOptimizer]
) -> dict[str, dict[str, Tensor]]:
    """Return what a checkpoint holds, by group: every role, the student's average, and the state of each optimiser."""
    tensors = {f"role-{role}": roles.state(role) for role in stored_roles(roles)}
    if shadow is not None:
        tensors["ema-student"] = shadow.state()
    return tensors | {f"optimizer-{role}": optimizer.state() for role, optimizer in optimizers.items()}


def load_roles(roles: Roles, found: Checkpoint) -> None:
    """Give every role the checkpoint's weights."""
    for role in stored_roles(roles):
        roles.load_state(role, found.tensors[f"role-{role}"])


def _stage_of(found: Checkpoint) -> int:
    """Return the stage the student of a checkpoint was last trained in."""
    stage, step = found.state["stage"], found.state["stage_step"]
    return stage - 1 if step == 0 and stage > 0 else stage


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
    for path in (files.checkpoints / str(wanted), Path(wanted)):
        if path.is_dir():
            return checkpoint.load(path)
    known = ", ".join(path.name for path in checkpoint.available(files.checkpoints))
    raise UserError(f"no checkpoint {str(wanted)!r} in {files.checkpoints}. Known: {known or 'none'}.")
