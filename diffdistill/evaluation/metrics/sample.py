"""What one pass over the images leaves behind, and the contract of the metrics that read it."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian
from diffdistill.evaluation.moments import Moments

MOMENTS = ("moments", "spatial")
Statistics = Moments | ReferenceGaussian


class Value(typing.NamedTuple):
    """A number, its standard error, None where the estimator offers none, and what two models are compared by.

    Attributes:
        each: float64 (N,), the value of each image where the number is their mean, or None.
        deleted: the value without each of the jackknife groups, or None.
        curve: numbers of images, and the value that so many of them give, or None.
    """

    value: float
    se: float | None = None
    each: Tensor | None = None
    deleted: tuple[float, ...] | None = None
    curve: tuple[tuple[int, float], ...] | None = None

    @property
    def estimate(self) -> tuple[float, float | None]:
        """The number and its standard error."""
        return self.value, self.se


@dataclass(frozen=True)
class Sample:
    """What one pass over N images leaves for the metrics of a view; None is what no metric asked for or nothing could give.

    Attributes:
        moments: of the features, in jackknife groups of neighbouring images; of real images their Gaussian will do.
        features: float32 (N, d).
        logits: float32 (N, K), of an extractor that is a classifier.
        labels: int64 (N,), the classes asked for.
        pixels: float64 (N, 2), see `images.pixel_statistics`.
        texts: float32 (N, d), the vectors of the captions asked for, of an extractor that reads them.
        obeyed: bool (N, 4), the parts of its caption that an image obeys, see `shapes_detector.Obeyed`.
        spatial: the same of the extractor's spatial features, in the same groups.
        scores: float32 (N,), of an extractor that scores images with their captions.
        diversity: float32 (P,), of the images of each of P prompts, of an extractor that compares them.
    """

    moments: Statistics | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    pixels: Tensor | None = None
    texts: Tensor | None = None
    obeyed: Tensor | None = None
    spatial: Statistics | None = None
    scores: Tensor | None = None
    diversity: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is there as tensors by name, moments as NAME.FIELD."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Statistics):
                found |= {f"{field.name}.{key}": part for key, part in value.state().items()}
            elif value is not None:
                found[field.name] = value
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sample:
        """Rebuild from `tensors()`; names of no field are left alone."""
        values: dict[str, typing.Any] = {field.name: tensors.get(field.name) for field in fields(cls)}
        for name in MOMENTS:
            state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            kind = ReferenceGaussian if "factor" in state else Moments
            values[name] = kind.from_state(state) if state else None
        return cls(**values)

    def as_reference(self) -> Sample:
        """Return the same with the Gaussians of the moments in their place, whose factors every comparison would compute anew."""
        gaussians: dict[str, typing.Any] = {
            name: ReferenceGaussian.of(moments) for name in MOMENTS if (moments := getattr(self, name)) is not None
        }
        return replace(self, **gaussians)

    def tensor(self, name: str) -> Tensor:
        """Return a field that a metric has named in its needs and that is a tensor."""
        value = getattr(self, name)
        assert isinstance(value, Tensor), f"{name} is needed"
        return value

    def missing(self, needs: Iterable[str]) -> list[str]:
        """Return which of these fields are not there."""
        return sorted(need for need in needs if getattr(self, need) is None)


class SampleSum:
    """The samples of parts of a set of images, one after the other, as one sample."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.moments: dict[str, Moments] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, part: Sample, first_group: int) -> None:
        """Take the next images, whose group g is group first_group + g of all."""
        for name in MOMENTS:
            if (moments := getattr(part, name)) is not None:
                if name not in self.moments:
                    self.moments[name] = Moments(moments.dim, self.num_groups, moments.device)
                self.moments[name].include(moments, first_group)
        for field in fields(part):
            if isinstance(value := getattr(part, field.name), Tensor):
                self.kept.setdefault(field.name, []).append(value)

    def sample(self) -> Sample:
        """Return the sample of all images so far."""
        return Sample(**self.moments, **{name: torch.cat(parts) for name, parts in self.kept.items()})  # type: ignore[arg-type]


class Metric(typing.Protocol):
    """Named values of a sample against a reference; `needs` lists the fields of `Sample` that must not be None."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Sample`."""
        ...

    @property
    def absolute(self) -> bool:
        """True: the reference is not used, so the same figure of the reference can stand beside it."""
        ...

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the values by name; `seed` fixes every random choice of the metric."""
        ...
