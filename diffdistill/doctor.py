"""What this machine offers, and whether the installation is whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "peft",
    "transformers",
    "safetensors",
    "open_clip_torch",
    "clean-fid",
    "scikit-learn",
    "pydantic",
    "cyclopts",
    "rich",
    "numpy",
)
OPTIONAL = ("xformers", "torchao", "bitsandbytes", "webdataset", "wandb")
SHIPPED = ("digits-unet", "digits-dit", "digits-classifier")
FREE_GIB_WANTED = 1.0


def doctor() -> dict[str, Any]:
    """Return versions, device, kernels, settings of compute, threads, disk, the state of the shipped files, and a list of problems (empty: fine)."""
    problems: list[str] = []
    versions = {name: _version(name) for name in ("diffdistill", *LIBRARIES)}
    problems += [f"{name} is not installed; pip install {name}" for name, version in versions.items() if version is None]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "extras": {name: version for name in OPTIONAL if (version := _version(name)) is not None},
        **_torch(),
        "disk": _disk(problems),
        "assets": _assets(problems),
    }
    return {**found, "problems": problems}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    import torch

    from diffdistill.device import usual_device
    from diffdistill.models import attention, compute

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps"})
    on_gpu = torch.cuda.is_available()
    return {
        "devices": devices or [{"name": "cpu"}],
        "attention_kernels": attention.usable(usual_device()),
        "compute": compute.usable(usual_device()),
        "bf16": torch.cuda.is_bf16_supported() if on_gpu else True,
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


def _disk(problems: list[str]) -> dict[str, Any]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 2**30
    if not os.access(here, os.W_OK):
        problems.append(f"the folder {here} cannot be written; run from another one")
    if free < FREE_GIB_WANTED:
        problems.append(f"only {free:.2f} GiB are free in {here}; checkpoints need room")
    return {"folder": str(here), "free_gib": round(free, 2)}


def _assets(problems: list[str]) -> dict[str, str]:
    """Return "ok", or what is wrong, for each shipped folder, by the hashes that its record holds."""
    from diffdistill.files import sha256

    folder = Path(__file__).resolve().parent / "assets"
    states = {}
    for record_path in sorted(folder.rglob("diffdistill_teacher.json")):
        name = record_path.parent.relative_to(folder).as_posix()
        recorded = json.loads(record_path.read_text(encoding="utf-8")).get("sha256", {})
        wrong = []
        for file, digest in recorded.items():
            path = record_path.parent / file
            if not path.is_file():
                wrong.append(f"{file} is missing")
            elif sha256(path) != digest:
                wrong.append(f"{file} is not the file that was shipped")
        states[name] = "; ".join(wrong) or "ok"
    states |= {name: "is missing" for name in SHIPPED if name not in states}
    problems += [f"shipped model {name}: {state}; install the package again" for name, state in states.items() if state != "ok"]
    return states
