"""From a config to a folder of weights with a record of how they were made."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffdistill.device import usual_device
from diffdistill.files import atomic_folder, hash_json, sha256, write_json
from diffdistill.training.teachers.parts import RECORD, Trained
from diffdistill.training.teachers.registry import KINDS, TeacherConfig


def train_teacher(
    config: TeacherConfig,
    output: str | Path,
    progress: bool = True,
    device: str | None = None,
    snapshot_every: int | None = None,
) -> dict[str, Any]:
    """Train what the config describes and write it to `output`, a folder of the matching stock class.

    `diffdistill_teacher.json` in the folder records the config, hashes, results, wall time and versions.

    Args:
        config: of one of the kinds in `registry.KINDS`.
        output: folder to write; replaced as a whole if it exists.
        progress: whether to show a bar on a terminal, or a line every few hundred steps elsewhere.
        device: torch device; None for the GPU where there is one, else the CPU.
        snapshot_every: also write the folder every so many steps, in the same format; None for only at the end.
    Returns:
        The record, as written.
    Raises:
        UserError: wrong data, a network that cannot be built, or a loss that is no longer finite.
    """
    begin, chosen = time.perf_counter(), torch.device(device or usual_device())
    record: dict[str, Any] = {}
    for trained in KINDS[config.kind].train(config, chosen, progress, snapshot_every):
        record = _write(config, Path(output), trained, str(chosen), time.perf_counter() - begin)
        if progress:
            print(f"wrote {output} after {trained.steps} steps: {trained.measures}", flush=True)
    return record


def _write(config: TeacherConfig, output: Path, trained: Trained, device: str, seconds: float) -> dict[str, Any]:
    resolved = config.model_dump(mode="json")
    with atomic_folder(output) as folder:
        trained.save(folder)
        weights = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}
        record = {
            "config": resolved,
            "config_hash": hash_json(resolved),
            "sha256": weights,
            "steps": trained.steps,
            "results": trained.measures,
            "wall_time_sec": round(seconds, 1),
            "machine": {"device": device, "threads": torch.get_num_threads(), "processor": platform.machine()},
            "versions": _versions(),
        }
        write_json(folder / RECORD, record)
    return record


def _versions() -> dict[str, str]:
    names = ("diffdistill", "torch", "diffusers", "safetensors", "scikit-learn")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
