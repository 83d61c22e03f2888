"""Checkpoints: complete, atomic, verified.

A checkpoint is a folder `step_0000120` of safetensors files (roles, averages, optimisers) and `state.json`, which holds the
SHA-256 of each of them and of itself. It appears under its name only when all of it is on disk. Loading verifies every byte
and never unpickles.

Of networks split over processes each writes its rows: `role-student-0of4.safetensors` and so on. Put together along their first
dimension they are the whole tensors, which is how they are read, in any number of processes; nobody else knows of the parts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.files import atomic_folder, explained, hash_json, sha256, write_json
from diffdistill.processes import ALONE, Processes
from diffdistill.training.stopping import Diverged

STATE = "state.json"
SCHEMA = 1
_FILE = re.compile(r"(?P<group>.+?)(-(?P<index>\d+)of\d+)?\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        path: its folder.
        step: optimiser steps done, over all stages.
        state: plain JSON values, as given to `save`.
        tensors: group ("role-student", "ema-student", "optimizer-student") -> name -> tensor, on the CPU.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    processes: Processes = ALONE,
) -> Path:
    """Write checkpoint `step` into a folder of checkpoints and return its path.

    Args:
        tensors: group -> name -> tensor; each group becomes one file, or one for each process.
        state: plain JSON values; that of the main process is kept.
        processes: several, which all call this, where each has its rows of every tensor (or the same value, of 0 dimensions).
    Raises:
        Diverged: a value is not finite; nothing is written.
        MachineError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    for group, named in tensors.items():
        _refuse_nonfinite(group, named)
    path = folder / name(step)
    if processes.count == 1:
        with atomic_folder(path) as aside:
            _seal(aside, step, state, _write_groups(aside, tensors, ""))
    else:
        _save_parts(path, step, tensors, state, processes)
    return path


def _save_parts(
    path: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], processes: Processes
) -> None:
    """Write this process's files beside the checkpoint; when all are there the main process moves them into it."""
    parts = path.with_name(f".{path.name}.parts")
    if processes.is_main:
        with explained(path):
            for left in path.parent.glob(".step_*.parts"):  # by a run that was killed
                shutil.rmtree(left)
            parts.mkdir(parents=True)
    processes.wait()
    with explained(path):
        digests = _write_groups(parts, tensors, f"-{processes.index}of{processes.count}")
        for file in digests:
            with open(parts / file, "rb") as handle:
                os.fsync(handle.fileno())  # by the machine that wrote it
        write_json(parts / f"{processes.index}.json", digests)
    processes.wait()
    if processes.is_main:
        with atomic_folder(path) as aside:
            listed: dict[str, str] = {}
            for index in range(processes.count):
                listed |= json.loads((parts / f"{index}.json").read_bytes())
            for file in listed:
                os.replace(parts / file, aside / file)
            _seal(aside, step, state, listed)
        shutil.rmtree(parts)
    processes.wait()


def _write_groups(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], ending: str) -> dict[str, str]:
    """Write a file for each group and return file -> SHA-256."""
    from safetensors.torch import save_file

    files = {}
    for group, named in tensors.items():
        path = folder / f"{group}{ending}.safetensors"
        save_file(_on_cpu(named), path)
        files[path.name] = sha256(path)
    return files


def _seal(folder: Path, step: int, state: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write `state.json`, by which a folder is a checkpoint."""
    content = {"schema": SCHEMA, "step": step, "state": dict(state), "files": dict(files)}
    content = json.loads(json.dumps(content))  # as it will be read back, so that the hash is the same
    write_json(folder / STATE, {**content, "sha256": hash_json(content)})


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        UserError: there is none, or a file is missing or damaged; names the file and the newest earlier good checkpoint.
    """
    if fault := find_fault(path):
        others = [other for other in available(path.parent) if other != path and find_fault(other) is None]
        earlier = [other for other in others if other.name < path.name]
        way_out = (
            f"The newest good one before it is {earlier[-1]}."
            if earlier
            else f"There is a good one after it: {others[-1]}."
            if others
            else "There is no other good one in that folder; start the run again in a new folder."
        )
        raise UserError(f"cannot use the checkpoint {path}: {fault}. {way_out}")
    return _read(path)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest good checkpoint, None where there is none at all, and a warning for each damaged one passed over.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    warnings = []
    for path in reversed(available(folder)):
        fault = find_fault(path)
        if fault is None:
            return _read(path), warnings
        warnings.append(f"the checkpoint {path} is damaged and passed over: {fault}.")
    if warnings:
        raise UserError("no checkpoint can be used: " + " ".join(warnings) + " Start the run again in a new folder.")
    return None, []


def available(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, good or not."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step_{step:07d}"


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None when every byte is as it was written."""
    if not (path / STATE).is_file():
        return f"{STATE} is missing" if path.is_dir() else "there is no such folder"
    try:
        content = json.loads((path / STATE).read_bytes())
        written = content.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        return f"{STATE} is cut short or damaged"
    if hash_json(content) != written:
        return f"{STATE} does not match its checksum"
    if content["schema"] != SCHEMA:
        return f"it was written by another version (schema {content['schema']}, this one reads {SCHEMA})"
    for file, digest in content["files"].items():
        if Path(file).name != file:
            return f"{STATE} names {file!r}, which is not a file of this folder"
        if not (path / file).is_file():
            return f"{file} is missing"
        if sha256(path / file) != digest:
            return f"{file} does not match its checksum"
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints and the best one, the lowest "fid" of a state's metrics."""
    paths = available(folder)
    kept = set(paths[-keep:])
    if (top := best(folder)) is not None:
        kept.add(top)
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest FID, None where none was evaluated."""
    scores = {path: score for path in available(folder) if (score := _score(path)) is not None}
    return min(scores, key=lambda path: (scores[path], path.name)) if scores else None


def best_score(folder: Path) -> float | None:
    """Return the lowest FID among the checkpoints, None where none was evaluated."""
    path = best(folder)
    return None if path is None else _score(path)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written. Call only while no other process writes here."""
    for path in folder.glob(".step_*.tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _score(path: Path) -> float | None:
    try:
        return json.loads((path / STATE).read_bytes())["state"].get("metrics", {}).get("fid")
    except (OSError, ValueError, KeyError):
        return None


def _read(path: Path) -> Checkpoint:
    content = json.loads((path / STATE).read_bytes())
    groups: dict[str, dict[int, Path]] = {}
    for file in content["files"]:
        found = _FILE.fullmatch(file)
        assert found is not None, f"{file} is no file of a checkpoint"
        groups.setdefault(found["group"], {})[int(found["index"] or 0)] = path / file
    tensors = {group: StoredTensors([files[index] for index in sorted(files)]) for group, files in groups.items()}
    return Checkpoint(path, content["step"], content["state"], tensors)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a group by name, whole, each read when it is asked for: so a process that keeps some rows never holds all of all.

    Args:
        files: of the group, in the order of their rows. They may be deleted once this is made.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import safe_open

        self._files = [safe_open(file, "pt") for file in files]
        self._names = list(self._files[0].keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        parts = [file.get_tensor(name) for file in self._files]
        return parts[0] if len(parts) == 1 or parts[0].ndim == 0 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _on_cpu(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for key, value in named.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        result[key] = value.clone() if storage in seen and value.numel() else value
        seen.add(storage)
    return result


def _refuse_nonfinite(group: str, named: Mapping[str, Tensor]) -> None:
    floating = [key for key, value in named.items() if value.is_floating_point()]
    finite = torch.stack([named[key].isfinite().all() for key in floating]).tolist() if floating else []
    if bad := [key for key, good in zip(floating, finite, strict=True) if not good]:
        raise Diverged(
            f"{group} holds values that are not finite ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}), so "
            "no checkpoint is written; the earlier ones are untouched. Lower the learning rate, or clip gradients."
        )
