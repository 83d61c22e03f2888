"""Run folders as `train` leaves them, without a run: what is read of one, in any state that is wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DMD2 = {"name": "dmd2", "student_every": 3, "guidance": 4.0, "gan": {"generator_weight": 0.001}}
OPTIMIZERS = {"student": {"lr": 0.0003}, "fake": {"lr": 0.001}}
Line = dict[str, Any]


def config(steps: int = 1000, stages: int = 1, **changes: Any) -> dict[str, Any]:
    """Return the plain values of a run of DMD2 with a discriminator."""
    stage = {"steps": steps, "method": DMD2, "optimizers": OPTIMIZERS}
    values = {"stages": [stage] * stages, "precision": "fp32", "clip_grad_norm": 1.0, "ema": {"decay": 0.999}}
    return {**values, **changes}


def healthy(step: int) -> Line:
    """Return a line of losses in which nothing is wrong."""
    return {
        "step": step,
        "student/total": 0.5,
        "student/grad_norm_student": 1.0,
        "fake/total": 0.1,
        "fake/fake": 0.1,
        "fake/discriminator": 1.3,
        "fake/grad_norm_fake": 2.0,
        "fake/grad_norm_head": 0.3,
        "fake/logit_real": 0.4,
        "fake/logit_fake": -0.4,
        "lr/student": 3e-4,
        "lr/fake": 1e-3,
        "skipped": 0,
        "stage": 0,
        "steps_per_sec": 10.0,
        "seconds": step / 10,
        "seconds_left": 100 - step / 10,
        "peak_memory_gib": 1.5,
    }


def healthy_grid(step: int) -> Line:
    """Return the drift figures of sample grids of a student that goes on learning."""
    teacher = {"drift/saturation_teacher": 0.4, "drift/contrast_teacher": 0.7, "drift/diversity_teacher": 0.5}
    learning = {"drift/saturation": 0.3, "drift/contrast": 0.68 + step / 1e5, "drift/diversity": 0.4 + step / 1e5}
    return {"step": step, **learning, **teacher, "drift/fake_lag": 0.9}


def lines(steps: int = 300, change: Callable[[Line], Line] = lambda line: line) -> list[Line]:
    """Return a line at every tenth step and a grid at every hundredth, each changed in the same way."""
    return [
        change(line)
        for step in range(10, steps + 1, 10)
        for line in [healthy(step), *([healthy_grid(step)] if step % 100 == 0 else [])]
    ]


def write_run(
    folder: Path,
    recorded: Iterable[Line],
    settings: dict[str, Any] | None = None,
    grids: Iterable[int] = (),
    checkpoints: Iterable[int] = (),
    outcome: tuple[str, str] | None = None,
    age_sec: float = 0.0,
    now: float = 1.8e9,
) -> Path:
    """Write a run folder whose files are `age_sec` old at `now`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    for step in checkpoints:
        (folder / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
    for step in grids:
        save_grid(folder / "samples" / f"step_{step:07d}.png", step)
    if outcome is not None:
        (folder / "outcome.json").write_text(json.dumps(dict(zip(("outcome", "message"), outcome, strict=True))))
    for path in folder.rglob("*"):
        os.utime(path, (now - age_sec, now - age_sec))
    return folder


def save_grid(path: Path, seed: int, width: int = 60) -> None:
    """Write a picture of noise."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
