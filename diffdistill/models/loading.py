"""`load_teacher`: any diffusers pipeline folder, hub id or embedded name, as a frozen `Denoiser` with what belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.math.schedules import EDMSchedule, schedule_from_diffusers
from diffdistill.models.codec import Codec
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.families import FAMILIES
from diffdistill.models.network import Classes, EDMDenoiser, Family, NetworkDenoiser

EMBEDDED = ("digits-unet", "digits-dit")


@dataclass(frozen=True)
class Teacher:
    """A pretrained model and what belongs to it.

    Attributes:
        denoiser: the frozen network on its schedule.
        family: the network's calling convention.
        network: the diffusers module, in eval mode, without gradients.
        codec: from images to states and back.
        scheduler_config: the pipeline's scheduler, class name under "_class_name".
        pipeline_class: name of the diffusers pipeline class the folder was saved from.
        path: folder or hub id it was loaded from.
        guidance: the guidance this teacher is usually sampled with, counted from 1.
        classes: number of classes and null label; both None for an unconditional model.
    """

    denoiser: Denoiser
    family: Family
    network: nn.Module
    codec: Codec
    scheduler_config: Mapping[str, Any]
    pipeline_class: str
    path: str
    guidance: float
    classes: Classes

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for an unconditional model."""
        return self.classes.num

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the decoded images."""
        state = torch.zeros(1, *self.denoiser.sample_shape, device=self.device)
        channels, height, width = self.codec.decode(state).shape[1:]
        return channels, height, width

    def condition(self, labels: Tensor | None, batch_size: int | None = None) -> Condition:
        """Return the condition of int64 class labels (B,), or of none for an unconditional model of `batch_size` samples.

        Raises:
            UserError: labels for an unconditional model, labels out of range, or none for a conditional one.
        """
        if self.num_classes is None:
            if labels is not None:
                raise UserError(f"{self.path} is unconditional; leave the labels out.")
            return Condition.none(batch_size or 1)
        if labels is None:
            raise UserError(f"{self.path} is class-conditional; give labels 0..{self.num_classes - 1}.")
        top = self.num_classes - 1
        # Checked where labels are made, on the CPU: on a GPU the check would wait for the device.
        if labels.device.type == "cpu" and labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) <= top):
            raise UserError(f"labels must lie in 0..{top} for {self.path}; got {int(labels.min())}..{int(labels.max())}.")
        return Condition.labels(labels.to(self.device), self.classes.null)


def resolve(path: str | Path) -> str:
    """Return the folder of an embedded teacher's name; any other path or hub id as it is."""
    name = str(path)
    return str(files("diffdistill") / "assets" / name) if name in EMBEDDED else name


def read_index(folder: str) -> Mapping[str, Any]:
    """Return model_index.json of a pipeline folder or hub id.

    Raises:
        UserError: not a folder and not a hub id, or a folder that is not a diffusers pipeline.
    """
    from diffusers import DiffusionPipeline

    path = Path(folder)
    if path.exists() and not (path / "model_index.json").is_file():
        raise UserError(
            f"{folder} is not a diffusers pipeline folder: it has no model_index.json. "
            "Save one with pipeline.save_pretrained(folder)."
        )
    if not path.exists() and (folder.startswith((".", "/", "~")) or folder.count("/") != 1):
        raise UserError(
            f"there is no teacher at {folder!r}. Give a pipeline folder, a hub id such as 'owner/name', "
            f"or an embedded name: {', '.join(EMBEDDED)}."
        )
    try:
        config = DiffusionPipeline.load_config(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the pipeline {folder!r}: {error}") from error
    return dict(config[0] if isinstance(config, tuple) else config)


def _network_entry(index: Mapping[str, Any], folder: str) -> tuple[str, str]:
    """Return component name and class name of the pipeline's denoising network."""
    entries = {name: value[1] for name, value in index.items() if isinstance(value, (list, tuple)) and value[1]}
    for name in ("unet", "transformer"):
        if name in entries:
            if entries[name] not in FAMILIES:
                raise UserError(
                    f"{folder}: networks of class {entries[name]} are not supported yet. Supported: "
                    f"{', '.join(sorted(FAMILIES))}. How to add one: docs/families.md."
                )
            return name, entries[name]
    raise UserError(f"{folder}: {index.get('_class_name')} has no component 'unet' or 'transformer' to distil.")


def _load_part(folder: str, component: str, class_name: str, **options: Any) -> Any:
    import diffusers

    try:
        return getattr(diffusers, class_name).from_pretrained(folder, subfolder=component, **options)
    except Exception as error:  # the loaders raise many types; every one means that this folder cannot be used
        raise UserError(f"cannot load {component} ({class_name}) of {folder!r}: {error}") from error


def _notes(folder: str) -> Mapping[str, Any]:
    """Return the settings that `diffdistill teacher` wrote beside the pipeline; empty for a pipeline made elsewhere."""
    path = Path(folder) / "diffdistill_teacher.json"
    return json.loads(path.read_text())["config"] if path.is_file() else {}


def load_teacher(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Teacher:
    """Load a teacher from a diffusers pipeline folder, a hub id, or an embedded name.

    Args:
        path: folder, hub id ("owner/name"), or one of EMBEDDED.
        dtype: weights of the network; the autoencoder stays float32.
        device: where everything is put.
    Returns:
        The frozen teacher, in eval mode.
    Raises:
        UserError: nothing there, not a diffusers folder, or a class that is not supported.
    """
    import diffusers

    folder = resolve(path)
    index = read_index(folder)
    component, class_name = _network_entry(index, folder)
    family = FAMILIES[class_name]
    network = _load_part(folder, component, class_name, torch_dtype=dtype).to(device).eval().requires_grad_(False)
    scheduler_class = index["scheduler"][1]
    scheduler = _load_part(folder, "scheduler", scheduler_class)
    notes = _notes(folder)
    codec = Codec()
    if index.get("vae") and index["vae"][1]:
        codec = Codec(_load_part(folder, "vae", index["vae"][1]).to(device).eval().requires_grad_(False))
    size = network.config.sample_size
    shape = (network.config.in_channels, *((size, size) if isinstance(size, int) else size))
    schedule = schedule_from_diffusers(scheduler)
    if isinstance(schedule, EDMSchedule):
        denoiser: Denoiser = EDMDenoiser(network, family, schedule, shape, getattr(scheduler.config, "sigma_data", 0.5))
    else:
        kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
        denoiser = NetworkDenoiser(network, family, schedule, kind, shape)
    config = dict(scheduler.config) | {"_class_name": scheduler_class, "_diffusers_version": diffusers.__version__}
    return Teacher(
        denoiser,
        family,
        network,
        codec,
        config,
        index["_class_name"],
        str(path),
        float(notes.get("guidance", 1.0)),
        family.classes(network, notes.get("num_classes")),
    )
