"""What can be seen of a run from its folder: where it stands, whether it lives, what it recorded, and what is wrong with it.

The run may be going on, stopped, finished or killed, and on another machine, as far as the folder is mounted here.
"""

from __future__ import annotations

import fcntl
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from diffdistill.errors import UserError
from diffdistill.training import layout
from diffdistill.training.detectors import Alert, Line, alerts, stage_of
from diffdistill.training.progress import duration
from diffdistill.watch.tail import Tail
from diffdistill.yaml_files import read_yaml

Status = Literal["preparing", "running", "stalled", "finished", "stopped", "failed", "killed"]

PATIENCE = 5  # times the longest silence so far, after which a run counts as stalled
LEAST_PATIENCE_SEC = 60.0
PATIENCE_AT_START_SEC = 1800.0  # before the first line there may be a data set to encode
RECENT_LINES = 50


class Saved(NamedTuple):
    """Something that a run left at a step."""

    step: int
    path: Path
    age_sec: float


@dataclass(frozen=True)
class RunState:
    """A run at one look.

    Attributes:
        folder: of the run.
        config: plain values; None while the run has not written them yet.
        lines: of metrics.jsonl, oldest first.
        status, says: how it stands, as a word and as a sentence.
        age_sec: since the last line; None before the first.
        checkpoint: the newest one.
        grids: the sample grids, oldest first.
        alerts: what is wrong.
    """

    folder: Path
    config: Mapping[str, Any] | None
    lines: Sequence[Line]
    status: Status
    says: str
    age_sec: float | None
    checkpoint: Saved | None
    grids: Sequence[Saved]
    alerts: Sequence[Alert]

    @property
    def step(self) -> int:
        """Steps done, as far as is logged or saved."""
        return max([line["step"] for line in self.lines[-1:]] + [self.checkpoint.step if self.checkpoint else 0])

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        return None if self.config is None else sum(stage["steps"] for stage in self.config["stages"])

    @property
    def place(self) -> str:
        """Stage and method, as a person writes them."""
        if self.config is None:
            return ""
        index = stage_of(self.lines, self.config).index
        return f"stage {index + 1} of {len(self.config['stages'])}, {self.config['stages'][index]['method']['name']}"

    @property
    def is_alive(self) -> bool:
        """Whether more may come."""
        return self.status in ("preparing", "running", "stalled")

    @property
    def seconds_left(self) -> float | None:
        """What the run itself expected at its last line, less the time since; None where it expects nothing."""
        said = next((line.get("seconds_left") for line in reversed(self.lines) if "steps_per_sec" in line), None)
        return None if said is None or self.status != "running" else max(0.0, said - (self.age_sec or 0.0))

    def latest(self, name: str) -> float | None:
        """Return the last recorded value of a series."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the lines as plain values, of each series the last value."""
        names = dict.fromkeys(name for line in self.lines for name, value in line.items() if isinstance(value, int | float))
        return {
            "folder": str(self.folder),
            "status": self.status,
            "says": self.says,
            "place": self.place,
            "step": self.step,
            "total_steps": self.total_steps,
            "seconds_left": self.seconds_left,
            "seconds_since_last_line": self.age_sec,
            "checkpoint": None if self.checkpoint is None else {**self.checkpoint._asdict(), "path": str(self.checkpoint.path)},
            "samples": [{"step": grid.step, "path": str(grid.path)} for grid in self.grids],
            "warnings": [alert._asdict() for alert in self.alerts],
            "latest": {name: self.latest(name) for name in names if name != "step"},
        }


class Watcher:
    """Looks at a run folder again and again, and reads each time only what is new.

    Args:
        folder: of the run.
    Raises:
        UserError: it is not the folder of a run.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_file() for name in (layout.CONFIG, layout.LOCK)):
            hint = " Name the run's folder, which its YAML calls output." if folder.is_file() else ""
            raise UserError(f"{folder} is not the folder of a run: it holds no {layout.CONFIG}.{hint}")
        self.folder, self.tail = folder, Tail(folder / layout.METRICS)

    def look(self) -> RunState:
        """Return how the run stands now."""
        self.tail.update()
        lines, config = tuple(self.tail.lines), _config(self.folder)
        now = time.time()  # beside the dates of files, which other programs read off the same clock
        saved = _saved(self.folder / layout.CHECKPOINTS, r"step_(\d+)", now)
        grids = _saved(self.folder / layout.SAMPLES, r"step_(\d+)\.png", now)
        age = _age(self.folder / layout.METRICS, now) if lines else None
        silence = min([each.age_sec for each in (*saved[-1:], *grids[-1:])] + ([] if age is None else [age]), default=None)
        status, says = self._status(lines, config, saved, silence)
        found = alerts(lines, config) if config is not None and lines else []
        if status == "stalled":
            found.insert(0, _stalled(lines, silence or 0.0, says))
        return RunState(self.folder, config, lines, status, says, age, saved[-1] if saved else None, grids, found)

    def _status(
        self, lines: Sequence[Line], config: Mapping[str, Any] | None, saved: Sequence[Saved], silence: float | None
    ) -> tuple[Status, str]:
        owner, held = look_at_lock(self.folder / layout.LOCK)
        ended = _outcome(self.folder)
        if held is None and ended is None:  # another machine's: its files must tell
            held, owner = True, f"{owner}, seen by its files alone"
        if held:
            if silence is None:
                return "preparing", f"{owner} is preparing."
            if silence > patience(lines):
                return "stalled", f"{owner} has written nothing for {duration(silence)}."
            return "running", f"{owner} is training."
        if ended is not None:
            return ended
        total = None if config is None else sum(stage["steps"] for stage in config["stages"])
        if saved and saved[-1].step == total:
            return "finished", ""
        how_on = f"Go on with: diffdistill train {self.folder / layout.CONFIG} --resume"
        return "killed", f"its process is gone and said nothing: killed, or the machine went down. {how_on}"


def facts(state: RunState) -> list[str]:
    """Return where the run stands, as short texts."""
    speed, memory = state.latest("steps_per_sec"), state.latest("peak_memory_gib")
    left, saved, total = state.seconds_left, state.checkpoint, state.total_steps or 0
    return [
        state.place,
        f"step {state.step:,} of {total:,} ({state.step / max(1, total):.0%})",
        *([] if left is None else [f"{duration(left)} left"]),
        *([] if speed is None else [f"{speed:.3g} steps/s"]),
        *([] if memory is None else [f"{memory:.1f} GiB"]),
        *([] if state.age_sec is None or not state.is_alive else [f"last line {duration(state.age_sec)} ago"]),
        "no checkpoint yet" if saved is None else f"checkpoint {saved.step:,}, {duration(saved.age_sec)} ago",
    ]


def look_at_lock(path: Path) -> tuple[str, bool | None]:
    """Return who locked a folder last, and whether it is locked; None where another machine did, whose locks may not be seen here."""
    try:
        handle = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return "", False
    except OSError:
        return "a process", None
    with handle:
        owner = handle.read().decode(errors="replace").strip() or "a process"
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file is closed
        except BlockingIOError:
            return owner, True
        except OSError:
            return owner, None
    host = owner.partition(" on ")[2]
    return owner, False if host in ("", platform.node()) else None


def patience(lines: Sequence[Line]) -> float:
    """Return after how many seconds of silence a run counts as stalled: much more than its longest pause between two lines lately."""
    gaps = _gaps(lines)
    return max(LEAST_PATIENCE_SEC, PATIENCE * max(gaps)) if gaps else PATIENCE_AT_START_SEC


def _gaps(lines: Sequence[Line]) -> list[float]:
    """Return the seconds between the latest lines; a resumed run starts at 0 again."""
    seconds = [line["seconds"] for line in lines[-RECENT_LINES:] if "seconds" in line]
    return [after - before for before, after in zip(seconds, seconds[1:], strict=False) if after > before]


def _stalled(lines: Sequence[Line], silence: float, says: str) -> Alert:
    gaps = _gaps(lines)
    usual = f" Usually there is a line every {duration(median(gaps))}." if gaps else ""
    remedy = "Look at its output, at the disk and at the device. SIGTERM lets it save and stop; --resume goes on from the last checkpoint."
    return Alert(
        "stalled", lines[-1]["step"] if lines else 0, silence, patience(lines), f"No sign of life: {says}{usual}", remedy
    )


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / layout.CONFIG
    if not path.is_file():
        return None
    config = read_yaml(path)
    try:
        if all(stage["steps"] > 0 and stage["method"]["name"] for stage in config["stages"]):
            return config
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path} is not the config of a run: every one of its stages has steps and a method with a name.")


def _outcome(folder: Path) -> tuple[Status, str] | None:
    """Return how the run said it ended, None where it said nothing."""
    try:
        found = json.loads((folder / layout.OUTCOME).read_bytes())
        return found["outcome"], str(found["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _saved(folder: Path, form: str, now: float) -> list[Saved]:
    """Return what lies in a folder under names of this form, whose first group is the step, oldest step first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(form, path.name))]
    return [Saved(step, path, _age(path, now) or 0.0) for step, path in sorted(found)]


def _age(path: Path, now: float) -> float | None:
    """Return the seconds since a file was written, never less than 0, as between machines whose clocks differ."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None
