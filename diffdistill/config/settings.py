"""What a run's YAML may say: the settings of the engine, put together with those of method, adapter and optimiser.

The latter live beside their code.
"""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from diffdistill.config.combinations import problems
from diffdistill.distillers import registry
from diffdistill.distillers.base import MethodConfig, Needs
from diffdistill.files import CACHE
from diffdistill.mistakes import impossible
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.compute import ComputeConfig
from diffdistill.models.quantize import Quantization
from diffdistill.training.optimizers import OptimizerConfig
from diffdistill.training.sharding import Parallel


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# What to learn from


class DigitsData(_Frozen):
    """The embedded digits: 1,797 images of 8x8 pixels in ten classes."""

    kind: Literal["digits"] = Field(description="digits")


class FolderData(_Frozen):
    """A folder of images, one subfolder per class, or images alone for an unconditional teacher."""

    kind: Literal["folder"] = Field(description="folder")
    path: Path = Field(description="the folder; relative to where the command runs")
    size: int = Field(
        gt=0,
        description="edge in pixels; the largest centred square of each image is resized to it. It is "
        "the size of the teacher's images, not of its latents",
    )


class LabelsData(_Frozen):
    """No images: class labels drawn uniformly, for methods that need no data."""

    kind: Literal["labels"] = Field(description="labels")


class PromptsData(_Frozen):
    """No images: prompts from a file, encoded once, for methods that need no data."""

    kind: Literal["prompts"] = Field(description="prompts")
    path: Path = Field(description=".txt with one prompt a line, or .csv, .tsv, .json, .jsonl, .parquet")
    column: str = Field("prompt", description="where a table has the prompts")
    cache: Path = Field(CACHE, description="folder of encoded prompts; they are found again there by what decides them")


class BucketsConfig(_Frozen):
    """Images of several shapes: each is resized to the shape (bucket) of about one area that is nearest to its own, and cropped.

    A batch holds images of one bucket.
    """

    edge: int | None = Field(
        None, gt=0, description="edge of the square bucket in pixels, a multiple of step; null for that of the teacher's images"
    )
    step: int = Field(64, gt=0, description="the edges of every bucket are multiples of this, in pixels")
    max_aspect: float = Field(2.0, ge=1, description="of the long to the short edge; images beyond it go to the nearest bucket")


class CaptionsData(_Frozen):
    """Images with captions, both encoded once."""

    kind: Literal["captions"] = Field(description="captions")
    path: Path = Field(
        description="a folder with metadata.csv, .jsonl or .parquet, or with a .txt beside each image; webdataset .tar files; or "
        "what datasets.save_to_disk wrote"
    )
    column: str = Field("text", description="where a table has the captions")
    buckets: BucketsConfig | None = Field(
        None, description="sizes by aspect ratio; null for the largest centred square of every image, at the teacher's size"
    )
    cache: Path = Field(CACHE, description="folder of encoded images and captions")


class ShapesData(_Frozen):
    """The embedded shapes: drawn images of 32x32 pixels with captions, both encoded once; methods that need no images use captions."""

    kind: Literal["shapes"] = Field(description="shapes")
    num: int = Field(20_000, gt=0, description="images drawn")
    cache: Path = Field(CACHE, description="folder of encoded images and captions")


TextData = PromptsData | CaptionsData | ShapesData
"""What a teacher that reads text learns from."""

Data = Annotated[DigitsData | FolderData | LabelsData | TextData, Field(discriminator="kind")]


class TeacherOptions(_Frozen):
    """How the teacher is loaded."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of its weights and its text encoders'; adapters are trained in fp32 whatever it is"
    )
    variant: str | None = Field(None, description="of the weight files, such as fp16; null for the plain ones")
    size: int | None = Field(None, gt=0, description="edge of the images in pixels; null for what the network was made for")
    quantize: Quantization | None = Field(
        None,
        description="what the linear layers of the frozen network's blocks are rounded to, for adapters in the shared layout: int8 "
        "(torchao), or nf4 (bitsandbytes, on a GPU); null for as they are",
    )
    trust_remote_code: bool = Field(
        False, description="whether Python code that comes with the pipeline, for its text encoders, may run on this machine"
    )


class PairsConfig(_Frozen):
    """Stored pairs of noise and the teacher's image of it; exactly one of `path` and `num` is given."""

    path: Path | None = Field(
        None,
        description="pairs.safetensors of an earlier run, or the folder it lies in; null to make them at the start of the run",
    )
    num: int | None = Field(None, gt=0, description="pairs to make; null to read them from path")
    steps: int = Field(50, gt=0, description="DDIM steps of the teacher for pairs that are made; no effect with path")
    guidance: float = Field(
        1.0,
        ge=0,
        description="the teacher's guidance scale for pairs that are made, counted from 1; 1 for none; no effect with path",
    )

    @model_validator(mode="after")
    def _one_source(self) -> PairsConfig:
        if (self.path is None) == (self.num is None):
            raise ValueError(
                f"give either path (pairs that exist) or num (pairs to make); got path={self.path} and num={self.num}"
            )
        unused = [name for name in ("steps", "guidance") if getattr(self, name) != type(self).model_fields[name].default]
        if self.path is not None and unused:
            raise ValueError(f"{' and '.join(unused)} have no effect on pairs read from path; leave them out")
        return self


# What is trained


class RolesConfig(_Frozen):
    """How the networks of a run share memory."""

    layout: Literal["copies", "shared"] = Field(
        "copies", description="copies: one network per role; shared: one frozen backbone, an adapter per role"
    )
    lora: LoraSpec | None = Field(
        None,
        description="adapters that are trained in place of whole networks; null to train "
        "whole networks, which the shared layout cannot",
    )
    one_batch_up_to: int = Field(
        16,
        ge=0,
        description="shared layout: largest micro-batch for which distribution matching asks teacher and fake network as one batch, "
        "in place of two; faster for small ones (docs/one_batch.md), equal up to rounding; 0 for never",
    )
    rows_at_once: int | None = Field(
        None,
        ge=1,
        description="shared layout: most rows of a pass in which distribution matching asks teacher (two rows a sample under guidance) and fake network "
        "beside the student's graph; fewer need less memory; null for half of a micro-batch, of one of up to 16 samples for all",
    )
    activation_checkpointing: bool = Field(
        False,
        description="computes activations anew in the backward pass instead of keeping them: less memory, one more pass of what is "
        "trained",
    )


def _named(name: str, config: type[MethodConfig]) -> type[MethodConfig]:
    """Return a method's settings with the tag that chooses them; `method: {name: dmd2, ...}`."""
    tag: Any = (Literal[name], Field(description=name))
    return create_model(config.__name__, __base__=config, __doc__=config.__doc__, __module__=__name__, name=tag)


_METHODS = {name: _named(name, config) for name, config in sorted(registry.configs().items())}
Method = Annotated[functools.reduce(operator.or_, _METHODS.values()), Field(discriminator="name")]


class StageConfig(_Frozen):
    """One method for a number of steps. The next stage starts from the student of this one."""

    steps: int = Field(gt=0, description="optimiser steps")
    method: Method = Field(description="`name` chooses the method, the other keys are its settings")
    optimizers: dict[str, OptimizerConfig] = Field(
        {}, description="settings by trained role (student, fake, head); a role not named has the default settings"
    )

    @property
    def needs(self) -> Needs:
        """The roles and data the method uses under these settings."""
        return registry.get(self.method.name).needs(self.method)

    @property
    def trained(self) -> tuple[str, ...]:
        """Every role with an optimiser, the discriminator head among them."""
        needs = self.needs
        return needs.trained + (("head",) if needs.head and "head" not in needs.trained else ())

    def optimizer(self, role: str) -> OptimizerConfig:
        """Return the settings for a trained role, the defaults where it is not named."""
        return self.optimizers.get(role, OptimizerConfig())


# The engine


class EmaConfig(_Frozen):
    """An average of the student's trained parameters, used for samples, evaluation and export."""

    decay: float = Field(0.999, gt=0, lt=1, description="share of the old average kept at each step")
    offload: bool = Field(False, description="for a GPU: keeps the average in the memory of the CPU")


class CheckpointConfig(_Frozen):
    """What is saved for resuming."""

    every_steps: int = Field(1000, gt=0, description="steps between checkpoints; one is always written at the end")
    keep: int = Field(2, gt=0, description="newest checkpoints kept")


class LoggingConfig(_Frozen):
    """What is written to metrics.jsonl."""

    every_steps: int = Field(50, gt=0, description="steps between two lines; losses are averaged over them")
    tensorboard: bool = Field(True, description="whether to write TensorBoard files as well")


class SamplesConfig(_Frozen):
    """Grids of images of teacher and student from equal noise."""

    every_steps: int = Field(1000, gt=0, description="steps between two grids")
    num: int = Field(40, gt=0, description="images in a grid")


class GuardConfig(_Frozen):
    """What happens when a loss or gradient is not finite: the update is skipped and counted."""

    max_nonfinite_steps: int = Field(
        10, ge=0, description="skipped steps in a row after which the run stops; 0 stops at the first"
    )


class ValidationConfig(_Frozen):
    """Evaluation of the student while it trains."""

    every_steps: int = Field(1000, gt=0, description="steps between two evaluations")
    steps: tuple[Annotated[int, Field(gt=0)], ...] = Field((4,), min_length=1, description="student step counts evaluated")
    protocol: str = Field("digits-short", description="name of a protocol that comes with the package, or its YAML file")


class RunConfig(_Frozen):
    """A distillation run, from teacher to student."""

    teacher: str = Field(
        min_length=1,
        description="an embedded teacher (digits-unet, digits-dit, shapes-sd, shapes-pixart), the folder of a diffusers pipeline, or a hub id",
    )
    teacher_options: TeacherOptions = Field(TeacherOptions(), description="how it is loaded")
    output: Path = Field(description="folder of the run; relative to where the command runs")
    seed: int = Field(0, ge=0, description="every random choice of the run comes from it")
    data: Data = Field(description="where clean states, labels and prompts come from; `kind` chooses")
    pairs: PairsConfig | None = Field(None, description="stored pairs of the teacher; null for methods that read none")
    roles: RolesConfig = Field(RolesConfig(), description="how the networks share memory")
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="what is done, in order")
    batch_size: int = Field(128, gt=0, description="samples of one optimiser step, over all micro-batches and processes")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="samples of one forward pass, divides batch_size; smaller needs less memory; null for the whole batch",
    )
    sampling_batch_size: int | None = Field(
        None,
        gt=0,
        description="rows of a pass, and images decoded at once, where images are made for samples and validation; the images do not "
        "depend on it; null for those of a micro-batch",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the networks' arithmetic; weights stay fp32")
    compute: ComputeConfig = Field(ComputeConfig(), description="how the networks are computed")
    memory: Literal["auto"] | None = Field(
        None,
        description="auto: where the run would not fit into memory by its plan, settings that make it fit are picked, those that cost least "
        "speed first, and written into the run's config.yaml (docs/memory.md); null: as configured",
    )
    parallel: Parallel = Field(
        "ddp",
        description="several processes: ddp, each holds all weights; fsdp, each holds a share of weights, gradients and moments, and "
        "parts of a network are put together as they are needed. One process: no effect",
    )
    clip_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients of a turn are scaled down to this norm; null for no clipping"
    )
    ema: EmaConfig | None = Field(EmaConfig(), description="average of the student's weights; null for none")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is saved for resuming")
    logging: LoggingConfig = Field(LoggingConfig(), description="what is written to metrics.jsonl")
    samples: SamplesConfig | None = Field(SamplesConfig(), description="image grids; null for none")
    guard: GuardConfig = Field(GuardConfig(), description="limits on losses and gradients that are not finite")
    validation: ValidationConfig | None = Field(None, description="evaluation while training; null for none")
    exportable: bool = Field(
        True,
        description="whether to refuse at the start a student that no stock pipeline could carry; "
        "false to train it all the same",
    )

    @property
    def total_steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if found := problems(self):
            raise impossible(found)
        return self
