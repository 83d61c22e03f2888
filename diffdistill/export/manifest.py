"""`diffdistill.json`: everything one must know about an export to sample from it, and to check it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffdistill.errors import UserError
from diffdistill.files import write_json
from diffdistill.models.quantize import Quantization

MANIFEST = "diffdistill.json"
REFERENCE = "reference.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
SCHEMA_VERSION = 1

Kind = Literal["merged", "peft", "lora", "kohya"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Frozen):
    """The model the student was distilled from."""

    id: str = Field(description="the name it was loaded by: a hub id, a folder, or an embedded teacher's name")
    path: str = Field(description="what from_pretrained takes: a hub id, or an absolute folder")
    component_class: str = Field(description="diffusers class of the network")
    weights_sha256: str = Field(
        description="SHA-256 of the network's tensors as float32: for every name in order, the name, "
        "the shape as text, and the bytes"
    )


class SchedulerRecord(_Frozen):
    """The stock scheduler that makes the student's states."""

    class_name: str
    config: dict[str, Any] = Field(description="every field of the class, none left to a default")


class Adapter(_Frozen):
    """The LoRA of an export that is one."""

    rank: int
    alpha: float = Field(description="alpha of training; the file holds alpha / rank inside lora_B, and lora_alpha = rank")
    targets: tuple[str, ...] = Field(description="full names of the adapted layers")
    num_tensors: int
    scale_folded: bool = True


class TrainedOn(_Frozen):
    """The rounded weights that an adapter was trained on; it leaves for the base's own."""

    weights: Quantization = Field(description="what the linear layers of the blocks were rounded to")
    sample_gap: float = Field(
        description="root mean square difference of the reference samples on rounded and on own weights, over that of the latter"
    )


class Check(_Frozen):
    """One check of an export by stock diffusers."""

    name: str
    status: Literal["passed", "failed", "skipped", "not_run"]
    error: float | None = Field(None, description="largest difference found, relative where the check says so")
    detail: str = ""


class Verification(_Frozen):
    """What stock diffusers, in a process of its own, said about an export."""

    passed: bool
    checks: tuple[Check, ...]
    seconds: float
    versions: dict[str, str]

    @property
    def failure(self) -> Check | None:
        """The check that failed, None when all hold."""
        return next((check for check in self.checks if check.status == "failed"), None)

    def __str__(self) -> str:
        """Return one sentence."""
        if self.failure:
            return f"check {self.failure.name!r} failed: {self.failure.detail}"
        done = [check for check in self.checks if check.status == "passed"]
        worst = max((check.error for check in done if check.error is not None), default=0.0)
        return f"{len(done)} checks passed in stock diffusers {self.versions.get('diffusers', '?')}; largest error {worst:.1e}"


class Manifest(_Frozen):
    """The contents of `diffdistill.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind = Field(
        description="merged: a whole pipeline folder; peft: an adapter folder for peft.PeftModel; lora: a file for the pipeline's "
        "load_lora_weights; kohya: the same in the spelling of other front ends"
    )
    base: Base
    pipeline_class: str = Field(description="stock diffusers class that samples from it")
    pipeline_takes_lora: bool = Field(description="whether that class has load_lora_weights; decided by asking it")
    component: str = Field(description="name of the network in the pipeline, unet or transformer")
    scheduler: SchedulerRecord
    step_counts: tuple[int, ...] = Field(description="numbers of steps the student was checked with")
    timesteps: dict[str, list[float]] = Field(description="number of steps -> the scheduler's timesteps, in order")
    times_call: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="number of steps -> arguments of the pipeline's call by which it is told the times"
    )
    guidance: float = Field(description="counted from 1; 1 is none, as for students with guidance inside")
    guidance_as_input: bool = Field(
        False, description="whether the network takes the scale as an input which the base's does not have"
    )
    prediction_type: str
    sample_shape: tuple[int, ...] = Field(description="(C, H, W) of one state")
    num_classes: int | None = None
    prompts: tuple[str, ...] | None = Field(None, description="of the reference images, for a model that reads text")
    call: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the pipeline's call, beside steps and generators"
    )
    gives_sigmas: bool = Field(False, description="whether the pipeline tells its scheduler sigmas, not a number of steps")
    check_size: int | None = Field(
        None, description="edge of the check's images in pixels; null where the pipeline makes images of one size only"
    )
    dtype: str = Field("float32", description="of the network's weights, in which the reference was made")
    adapter: Adapter | None = None
    trained_on: TrainedOn | None = Field(None, description="null for the base's own weights")
    method: str = ""
    metrics: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict, description="path in the folder -> SHA-256, without this file")
    verification: Verification | None = None

    def write(self, folder: str | Path) -> None:
        """Write `diffdistill.json` into an export folder."""
        write_json(Path(folder) / MANIFEST, self.model_dump(mode="json"))

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read `diffdistill.json` of an export folder.

        Raises:
            UserError: there is none, or it is not one of ours.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} is not an export: it has no {MANIFEST}.")
        try:
            return Manifest.model_validate_json(path.read_text())
        except (ValidationError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
