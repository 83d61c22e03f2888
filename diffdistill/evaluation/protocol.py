"""What a number means: a frozen, hashable record of everything that decides it, apart from the images themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator
from torch import Tensor

from diffdistill.data.batches import keyed_generator
from diffdistill.data.shapes import draw_scenes
from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.images import Uint8Rule
from diffdistill.evaluation.metrics.captions import ClipScale
from diffdistill.evaluation.metrics.registry import METRICS
from diffdistill.evaluation.precision import Precision
from diffdistill.evaluation.prompt_sets import PromptSet
from diffdistill.evaluation.resize import ResizeKind
from diffdistill.evaluation.transforms import parse_transform
from diffdistill.files import hash_json
from diffdistill.mistakes import checked
from diffdistill.models.conditioning import Asked
from diffdistill.yaml_files import read_yaml

PROTOCOLS_FOLDER = Path(__file__).parent / "protocols"
LABEL_STREAM = 1 << 40  # keeps the generator of an image's label apart from that of its noise


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _known_steps(steps: tuple[str, ...]) -> tuple[str, ...]:
    parse_transform(steps)
    return steps


Steps = Annotated[tuple[str, ...], AfterValidator(_known_steps)]


class View(_Frozen):
    """One way in which the images are seen: what is done to them, the network that sees them, and what is measured by it."""

    extractor: str = Field(description="name of the network, one of extractors.EXTRACTORS or the caller's own")
    metrics: tuple[str, ...] = Field(min_length=1, description="names in metrics.METRICS; each once in a protocol")
    transforms: Steps = Field((), description="steps on the images for this view alone, see transforms.STEPS")
    resize: ResizeKind = Field("identity", description="how images come to the size of the network, see resize.RESIZES")
    precision: Precision = Field("float32", description="arithmetic of the network; float32 is strict, without TF32")

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise unknown_name("metric", name, METRICS)
        return names

    @model_validator(mode="after")
    def _metrics_of_one_network(self) -> View:
        for name in self.metrics:
            network = getattr(METRICS[name], "network", self.extractor)
            if network != self.extractor:
                raise ValueError(
                    f"metric {name!r} is what extractor {network!r} says of images; it cannot be had of {self.extractor!r}."
                )
        return self

    @property
    def seeing(self) -> dict[str, object]:
        """Return the fields that decide the features of an image."""
        return self.model_dump(mode="json", exclude={"metrics"}, exclude_defaults=True)

    def __str__(self) -> str:
        steps = [*self.transforms, *([] if self.resize == "identity" else [self.resize])]
        precision = "" if self.precision == "float32" else f" in {self.precision}"
        return self.extractor + (f" after {', '.join(steps)}" if steps else "") + precision


class Protocol(_Frozen):
    """How images are asked for, turned into features and scored. The batch size is no part: it must change nothing."""

    name: str = Field(description="what the protocol is called; no part of the hash")
    about: str = Field("", description="what it reproduces and how to make its data; no part of the hash")
    dataset: str = Field(description="the data set the images imitate")
    num_images: int = Field(ge=2, description="images in one block of seeds")
    first_seeds: tuple[int, ...] = Field(min_length=1, description="first seed of each block; image i adds i to it")
    label_rule: Literal["balanced", "random", "shapes", "prompts", "none"] = Field(
        description="balanced: class i % num_classes for image i; random: uniform, from the image's own seed; shapes: captions "
        "drawn from the first seed of the block, held-out pairs among them; prompts: those of `prompts` in their order; none"
    )
    num_classes: int = Field(1, ge=1, description="number of classes the labels run over; 1 for an unconditional model")
    prompts: PromptSet | None = Field(None, description="the file of prompts, for label_rule prompts")
    images_per_prompt: int = Field(1, ge=1, description="neighbouring images that share a prompt")
    uint8_rule: Uint8Rule = Field(description="from [-1, 1] to bytes, see images.UINT8_RULES")
    transforms: Steps = Field((), description="steps on the generated images for all views, see transforms.STEPS")
    views: tuple[View, ...] = Field(min_length=1, description="the networks that see the images, and what each measures")
    reference: str = Field(description="name of the set of real images, embedded or in the store of references")
    reference_transforms: Steps = Field((), description="steps on the real images when their statistics are made")
    aggregation: Literal["mean", "best_block"] = Field(
        "mean",
        description="over blocks of seeds: the mean of each value, or the values of the block with the lowest first metric",
    )
    clip_scale: ClipScale = Field("100cos", description="unit of the CLIP score, see metrics.captions")
    jackknife_groups: int = Field(ge=2, description="groups of images for the error of the Frechet distance")
    metric_seed: int = Field(ge=0, description="seed of the random subsets inside metrics")
    numerics: Literal[1] = Field(1, description="raised when the code of a metric starts to give other numbers")

    @model_validator(mode="after")
    def _fits_together(self) -> Protocol:
        for mistake in self._mistakes():
            raise ValueError(mistake)
        return self

    def _mistakes(self) -> Iterator[str]:
        names = [name for view in self.views for name in view.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"views name a metric twice: {', '.join(twice)}."
        if {"kid", "kid_normalised"} <= set(names):
            yield "views name kid and kid_normalised, which share their place in the result; keep one."
        seeing = [view.seeing for view in self.views]
        if any(one in seeing[:index] for index, one in enumerate(seeing)):
            yield "two views see the same; put their metrics into one, so that the network runs once."
        starts = sorted(self.first_seeds)
        if starts[0] < 0 or any(b - a < self.num_images for a, b in zip(starts, starts[1:], strict=False)):
            yield (
                f"first_seeds must be non-negative and at least num_images={self.num_images} apart, or "
                f"blocks share images; got {list(self.first_seeds)}."
            )
        if 2 * self.jackknife_groups > self.num_images:
            yield f"jackknife_groups must be at most num_images / 2; got {self.jackknife_groups} for {self.num_images} images."
        if (self.label_rule == "prompts") != (self.prompts is not None):
            yield f"label_rule prompts goes with a file of prompts and only with one; got {self.label_rule}, prompts {self.prompts}."
        if self.images_per_prompt < 2 and (spread := {"prompt_diversity", "lpips_diversity"} & set(names)):
            yield f"{' and '.join(sorted(spread))} compares the images of a prompt; set images_per_prompt to two or more."
        if self.num_images % self.images_per_prompt:
            yield f"images_per_prompt={self.images_per_prompt} must divide num_images={self.num_images}."

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics of all views, in their order."""
        return tuple(name for view in self.views for name in view.metrics)

    @property
    def hash(self) -> str:
        """Hex sha256 of every field but name and about: two numbers compare when it is equal.

        Fields at their default are left out, so that a field added later, whose default is what was done before, changes no hash.
        """
        return hash_json(self.model_dump(mode="json", exclude={"name", "about"}, exclude_defaults=True))

    def reference_hash(self, view: View) -> str:
        """Hex sha256 of the fields that decide the reference statistics of a view, shared by protocols that differ elsewhere."""
        fields = {"dataset", "reference", "reference_transforms", "numerics"}
        return hash_json({**self.model_dump(mode="json", include=fields, exclude_defaults=True), "view": view.seeing})

    def with_num_images(self, count: int) -> Protocol:
        """Return the protocol of `count` images in one block: another protocol, with another hash.

        Raises:
            UserError: fewer than four, or a number that images_per_prompt does not divide.
        """
        if count < 4 or count % self.images_per_prompt:
            raise UserError(f"the number of images must be 4 or more and a multiple of {self.images_per_prompt}; got {count}.")
        fields = {"name": f"{self.name}@{count}", "num_images": count, "first_seeds": self.first_seeds[:1]}
        return Protocol(**{**self.model_dump(), **fields, "jackknife_groups": min(self.jackknife_groups, count // 2)})

    def pinned(self) -> Protocol:
        """Return the protocol with the hash of its file of prompts.

        Raises:
            UserError: the file is missing or not the one the protocol names.
        """
        return self if self.prompts is None else self.model_copy(update={"prompts": self.prompts.pinned()})

    def asked_of_files(self, count: int) -> Asked:
        """Return what `count` images in files, in the order of their names, were asked for, None where that cannot be known.

        Prompts are as many as the images of a block, and in their order; which class a file is of, nothing says.
        """
        texts = self.texts
        return None if texts is None else texts[:count]

    @property
    def texts(self) -> list[str] | None:
        """Return what the images of all blocks are asked for, in their order; None where it is no text."""
        if self.label_rule not in ("prompts", "shapes"):
            return None
        return [text for block in range(len(self.first_seeds)) for text in self._texts(block)]

    def seeds(self, block: int) -> range:
        """Return the seeds of the images of one block."""
        first = self.first_seeds[block]
        return range(first, first + self.num_images)

    def asked(self, block: int) -> Asked:
        """Return what each image of a block is asked for: its class, its caption, or nothing (None)."""
        if self.label_rule == "none":
            return None
        return self._texts(block) if self.label_rule in ("prompts", "shapes") else self.labels(block)

    def _texts(self, block: int) -> list[str]:
        if self.prompts is None:
            return draw_scenes(self.num_images, keyed_generator("protocol", self.first_seeds[block])).captions()
        texts = self.prompts.read(self.num_images // self.images_per_prompt)
        return [text for text in texts for _ in range(self.images_per_prompt)]

    def labels(self, block: int) -> Tensor:
        """Return the class asked for by each image of one block, int64 (num_images,)."""
        if self.label_rule == "balanced":
            return torch.arange(self.num_images) % self.num_classes
        generator = torch.Generator()
        drawn = [
            torch.randint(self.num_classes, (), generator=generator.manual_seed(LABEL_STREAM + seed))
            for seed in self.seeds(block)
        ]
        return torch.stack(drawn)

    def groups(self) -> Tensor:
        """Return the jackknife group of each image of a block, int64 (num_images,).

        Neighbours share a group, i * G // N: with i % G a group would hold few classes under balanced labels.
        """
        return torch.arange(self.num_images) * self.jackknife_groups // self.num_images


def protocol_names() -> list[str]:
    """Return the names of the protocols that come with the package."""
    return sorted(path.stem for path in PROTOCOLS_FOLDER.glob("*.yaml"))


def load_protocol(name: str | Path) -> Protocol:
    """Read a protocol that comes with the package by its name, or any by the path of its YAML file.

    Raises:
        UserError: no such protocol or file, not a mapping, or fields that are unknown, missing or wrong (all at once).
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in protocol_names():
            raise unknown_name("protocol", str(name), protocol_names())
        path = PROTOCOLS_FOLDER / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no protocol file {path}. Write one, or name one of: {', '.join(protocol_names())}.")
    return checked(TypeAdapter(Protocol), read_yaml(path, example="dataset: digits"), str(path))
