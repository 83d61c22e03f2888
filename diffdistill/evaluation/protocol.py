"""What a number means: a frozen, hashable record of everything that decides it, apart from the images themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator
from torch import Tensor

from diffdistill.data.batches import keyed_generator
from diffdistill.data.shapes import draw_scenes
from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.metrics.registry import METRICS
from diffdistill.files import hash_json
from diffdistill.mistakes import checked
from diffdistill.yaml_files import read_yaml

PROTOCOLS_FOLDER = Path(__file__).parent / "protocols"
LABEL_STREAM = 1 << 40  # keeps the generator of an image's label apart from that of its noise


class Protocol(BaseModel):
    """How images are asked for, turned into features and scored. The batch size is no part: it must change nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="what the protocol is called; the only field that is not part of the hash")
    dataset: str = Field(description="the data set the images imitate")
    num_images: int = Field(ge=2, description="images in one block of seeds")
    first_seeds: tuple[int, ...] = Field(min_length=1, description="first seed of each block; image i adds i to it")
    label_rule: Literal["balanced", "random", "shapes"] = Field(
        description="balanced: class i % num_classes for image i; random: uniform, from the image's own seed; shapes: captions "
        "drawn from the first seed of the block, held-out pairs among them"
    )
    num_classes: int = Field(ge=1, description="number of classes the labels run over; 1 for an unconditional model")
    uint8_rule: Literal["round"] = Field(description="round: round((clip(x) + 1) * 127.5), see images.to_uint8")
    extractor: str = Field(description="name of the feature extractor, one of features.EXTRACTORS or the caller's own")
    reference: str = Field(description="name of the set of real images, one of reference.REFERENCES")
    metrics: tuple[str, ...] = Field(min_length=1, description="names in metrics.METRICS")
    jackknife_groups: int = Field(ge=2, description="groups of images for the error of the Frechet distance")
    metric_seed: int = Field(ge=0, description="seed of the random subsets inside metrics")
    numerics: Literal[1] = Field(1, description="raised when the code of a metric starts to give other numbers")

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise unknown_name("metric", name, METRICS)
        if len(set(names)) < len(names):
            raise ValueError(f"metrics names one twice: {', '.join(names)}.")
        if {"kid", "kid_normalised"} <= set(names):
            raise ValueError("metrics names kid and kid_normalised, which share their place in the result; keep one.")
        return names

    @model_validator(mode="after")
    def _sizes_fit(self) -> Protocol:
        starts = sorted(self.first_seeds)
        if starts[0] < 0 or any(b - a < self.num_images for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(
                f"first_seeds must be non-negative and at least num_images={self.num_images} apart, or "
                f"blocks share images; got {list(self.first_seeds)}."
            )
        if 2 * self.jackknife_groups > self.num_images:
            raise ValueError(
                f"jackknife_groups must be at most num_images / 2; got {self.jackknife_groups} for {self.num_images} images."
            )
        return self

    @property
    def hash(self) -> str:
        """Hex sha256 of every field but the name: two numbers compare when it is equal."""
        return hash_json(self.model_dump(mode="json", exclude={"name"}))

    @property
    def reference_hash(self) -> str:
        """Hex sha256 of the fields that decide the reference statistics, shared by protocols that differ elsewhere."""
        fields = {"dataset", "reference", "uint8_rule", "extractor", "numerics"}
        return hash_json(self.model_dump(mode="json", include=fields))

    def seeds(self, block: int) -> range:
        """Return the seeds of the images of one block."""
        first = self.first_seeds[block]
        return range(first, first + self.num_images)

    def asked(self, block: int) -> Tensor | list[str]:
        """Return what each image of a block is asked for: its class, or its caption."""
        if self.label_rule == "shapes":
            return draw_scenes(self.num_images, keyed_generator("protocol", self.first_seeds[block])).captions()
        return self.labels(block)

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
