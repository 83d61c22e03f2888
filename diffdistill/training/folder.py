"""The folder of a run: who may write in it, what lies where, and whether a run may go on there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from diffdistill.config import RunConfig, dump_config, load_config
from diffdistill.errors import UserError
from diffdistill.files import hash_json, remove_leftovers, write_atomic, write_json
from diffdistill.training import checkpoint, layout
from diffdistill.yaml_files import read_yaml

LOCK_WAITS_SEC = (0.02, 0.05, 0.1)
LIBRARIES = ("diffdistill", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")

FREE = ("output", "parallel")
"""Settings that a resumed run may change: where the folder lies, and how its processes share the work."""


class RunFolder:
    """config.yaml, environment.json, metrics.jsonl, tensorboard/, samples/, checkpoints/, stored states and the file `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / layout.CONFIG
        self.environment = path / layout.ENVIRONMENT
        self.metrics = path / layout.METRICS
        self.tensorboard = path / layout.TENSORBOARD
        self.samples = path / layout.SAMPLES
        self.checkpoints = path / layout.CHECKPOINTS
        self.pairs = path / layout.PAIRS
        self.trajectories = path / layout.TRAJECTORIES
        self._lock: IO[str] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a run in this folder got as far as a checkpoint or a logged step; before that nothing can be lost."""
        return bool(checkpoint.available(self.checkpoints)) or (self.metrics.is_file() and self.metrics.stat().st_size > 0)

    def way_on(self) -> str:
        """Return what is left of a run that broke off, and how to go on, in sentences."""
        found = checkpoint.available(self.checkpoints)
        kept = f"The newest checkpoint is {found[-1]}." if found else "No checkpoint had been written yet."
        return f"{kept} Go on with the same launch command and --resume: diffdistill train {self.config} --resume"

    def check(self, config: RunConfig, resume: bool) -> None:
        """Refuse a folder in which this run may not start or go on. Reads only.

        Raises:
            UserError: another run, other files, or a config that differs; names every differing setting. One that the version
                which started the run did not know yet has its default.
        """
        if not self.config.is_file():
            if self.path.is_dir() and any(path.name != layout.LOCK for path in self.path.iterdir()):
                raise UserError(f"{self.path} holds files that are not of a run. Choose another output.")
            return
        if not self.has_begun:
            return
        if not resume:
            raise UserError(f"{self.path} already holds a run. Go on with it by --resume, or choose another output.")
        if changed := differences(comparable(self._started_with()), comparable(config)):
            raise UserError(
                f"the config differs from the one {self.path} was started with:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nResume with the old values, or start a new run in another output."
            )

    def _started_with(self) -> RunConfig:
        """Return the config that the run was started with, what it does not say at its default.

        Raises:
            UserError: a file that is damaged, or says what this version does not know; names the version that wrote it.
        """
        try:
            return load_config(self.config)
        except UserError as error:
            version = next((session["versions"]["diffdistill"] for session in self._sessions()), "of unknown version")
            raise UserError(
                f"{error}\nThe run was started with this config by diffdistill {version}. Put back what was edited in it, go on with "
                "that version, or start a new run in another output."
            ) from error

    @property
    def config_hash(self) -> str:
        """SHA-256 of what config.yaml says, without `FREE`: the same in every version, whatever settings it knows."""
        return hash_json({key: value for key, value in read_yaml(self.config).items() if key not in FREE})

    def check_teacher(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse another teacher than the one the run was started with. Reads only.

        Args:
            fingerprints: of the parts of the teacher that the config names now, see `Teacher.fingerprints`.
        Raises:
            UserError: a part that differs, came or went; names both fingerprints of each.
        """
        started = next((session["teacher"] for session in self._sessions() if "teacher" in session), None)
        if started is None:
            return
        changed = [
            f"  {part}: {started.get(part, 'none')[:12]} -> {fingerprints.get(part, 'none')[:12]}"
            for part in dict.fromkeys([*started, *fingerprints])
            if started.get(part) != fingerprints.get(part)
        ]
        if changed:
            raise UserError(
                f"the teacher is not the one {self.path} was started with; by SHA-256:\n"
                + "\n".join(changed)
                + "\nPut the old one back in its place, or start a new run in another output."
            )

    def lock(self) -> None:
        """Take the folder for this process until it ends or `unlock` is called.

        Raises:
            UserError: another process trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = open(self.path / layout.LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
        try:
            _take(handle)
        except BlockingIOError as error:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            handle.close()
            raise UserError(f"{owner} is training in {self.path}. Wait for it, stop it, or choose another output.") from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}\n")
        handle.flush()
        self._lock = handle

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def picked(self) -> list[str] | None:
        """The settings that `memory: auto` picked when the run was started, as overrides; None where it has not begun."""
        return next((session.get("memory", []) for session in self._sessions()), None)

    def begin(self, config: RunConfig, facts: Mapping[str, Any], remarks: Sequence[str] = ()) -> None:
        """Write config and environment; a resumed run adds its environment to the list. Call with the lock held.

        Args:
            facts: for the environment; "memory" are the settings that `memory: auto` picked.
            remarks: lines that are written above the config.
        """
        checkpoint.remove_leftovers(self.checkpoints)
        for place in (self.path, self.samples):
            remove_leftovers(place)
        for parts in self.path.glob(layout.PARTS_OF_LOOKS):  # of one that was cut off, which begins anew
            shutil.rmtree(parts)
        sessions = self._sessions()
        if not self.has_begun:  # an attempt that failed at once may have left another config
            write_atomic(self.config, "".join(f"# {remark}\n" for remark in remarks) + dump_config(config))
        write_json(self.environment, [*sessions, {**environment(), **facts}])

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Add to the environment of this session what was not known at its beginning. Call with the lock held."""
        *before, session = json.loads(self.environment.read_bytes())
        write_json(self.environment, [*before, {**session, **facts}])

    def _sessions(self) -> list[dict[str, Any]]:
        """Return the environments in which the run was started and resumed so far; none before it has begun."""
        return json.loads(self.environment.read_bytes()) if self.has_begun and self.environment.is_file() else []

    def lines(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, without one cut short by a kill."""
        found = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and one cut short by a kill, so that a resumed run writes none twice."""
        if self.metrics.is_file():
            kept = [line for line in self.lines() if line["step"] <= step]
            write_atomic(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _take(handle: IO[str]) -> None:
    """Lock a file; the system frees it, however the process ends. Tries again for a moment: `watch` may be looking at it."""
    for wait in LOCK_WAITS_SEC:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(wait)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the config as the plain values that its YAML reads back as."""
    return yaml.safe_load(dump_config(config))


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Return "place: old -> new" for every differing value of two configs; those of `FREE` may differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            if place or key not in FREE
            for line in differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for index, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{place}.{index}")
        ]
    return [] if old == new else [f"{place}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def environment() -> dict[str, Any]:
    """Return versions and hardware, as far as they may change a number."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
