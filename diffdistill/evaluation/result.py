"""What an evaluation found: every number with its spread, and everything needed to know what it means."""

from __future__ import annotations

import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.sample import Value

SCHEMA = 2
LIBRARIES = ("diffdistill", "torch", "numpy", "diffusers")
INVALID = "INVALID"  # in the name of an extractor with random weights


@dataclass(frozen=True)
class Summary:
    """A value over the blocks of seeds.

    Attributes:
        mean: over the blocks.
        sd: standard deviation between blocks (n - 1), None for a single block.
        se: standard error of one block by the metric's own estimate (root mean square over blocks), None without one.
        blocks: the value of each block.
    """

    mean: float
    sd: float | None
    se: float | None
    blocks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[Value]) -> Summary:
        """Sum up the values of the blocks."""
        numbers = tuple(value.value for value in values)
        errors = [value.se for value in values if value.se is not None]
        return cls(
            mean=statistics.fmean(numbers),
            sd=statistics.stdev(numbers) if len(numbers) > 1 else None,
            se=math.sqrt(statistics.fmean(error**2 for error in errors)) if errors else None,
            blocks=numbers,
        )


@dataclass(frozen=True)
class Cost:
    """What the images cost; None where it was not measured.

    Attributes:
        num_steps, nfe: steps and network evaluations per image, as the caller says.
        ms_per_image: wall time of generation alone, first batch excluded; None with nothing generated or only one batch.
        latency_ms: median wall time of one image generated alone.
        batch_size: images per call of the generator.
        peak_memory: bytes of device memory while generating and seeing, of a GPU.
    """

    num_steps: int | None = None
    nfe: float | None = None
    ms_per_image: float | None = None
    latency_ms: float | None = None
    batch_size: int | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Every number of one evaluation and everything needed to know what it means.

    Attributes:
        protocol, protocol_hash: the fields of the protocol, and its hash.
        views: for each view of the protocol the name of its extractor, the fingerprint of the weights, and the provenance of the
            reference.
        num_images, num_blocks: images in one block, and blocks scored.
        values: by name, e.g. fid, fid_jackknife, precision, accuracy, contrast; the classes in `metrics` say which.
        reference_values: the figures that also exist for the real images, e.g. their accuracy and contrast.
        skipped: metrics that could not run or were not asked for, with the reason.
        warnings: what a reader of the values should know, e.g. that there are too few images.
        cost: of the images.
        seconds: wall time by stage: generate, features, metrics, reference.
        device: where the images came from, e.g. "cpu" or the name of the GPU.
        versions: of the libraries.
        each: by name, the values of the single images in the order of their seeds, float64 (blocks, N); no part of the JSON.
        deleted: by name, the value without each jackknife group, float64 (blocks, G); no part of the JSON.
        curve: by name, numbers of images and the value of so many, float64 (blocks, P, 2); no part of the JSON.
    """

    protocol: dict[str, Any]
    protocol_hash: str
    views: list[dict[str, Any]]
    num_images: int
    num_blocks: int
    values: dict[str, Summary]
    reference_values: dict[str, float]
    skipped: dict[str, str]
    warnings: list[str]
    cost: Cost
    seconds: dict[str, float]
    device: str
    versions: dict[str, str]
    each: dict[str, Tensor] = field(default_factory=dict, compare=False)
    deleted: dict[str, Tensor] = field(default_factory=dict, compare=False)
    curve: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def mean(self, name: str) -> float | None:
        """Return the mean of a value over the blocks, None when it was not measured."""
        return self.values[name].mean if name in self.values else None

    def figure(self, name: str) -> float | None:
        """Return a value as the protocol sums up its blocks, None when it was not measured."""
        if name not in self.values:
            return None
        return self.values[name].blocks[self.best_block] if self.best_block is not None else self.values[name].mean

    @property
    def best_block(self) -> int | None:
        """The block whose values stand for all, by the protocol's aggregation; None where the mean does."""
        if self.protocol["aggregation"] == "mean" or not self.values:
            return None
        first = next(iter(self.values.values())).blocks
        return first.index(min(first))

    @property
    def is_invalid(self) -> bool:
        """Whether a network of random weights took part, so that the numbers mean nothing."""
        return any(INVALID in view["extractor"] for view in self.views)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, with the schema version first; `write_json` takes it as it is."""
        plain = {name: value for name, value in vars(self).items() if name not in ARRAYS}
        return {
            "schema": SCHEMA,
            **plain,
            "values": {name: asdict(value) for name, value in self.values.items()},
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_json(cls, report: Mapping[str, Any], arrays: Mapping[str, Tensor] | None = None) -> Evaluation:
        """Rebuild from `to_json`, and from `arrays()` where they were kept.

        Raises:
            UserError: another schema, or missing fields.
        """
        fields = {key: value for key, value in report.items() if key != "schema"}
        if report.get("schema") != SCHEMA or set(fields) != set(cls.__dataclass_fields__) - set(ARRAYS):
            raise UserError(
                f"not an evaluation of schema {SCHEMA}; got schema {report.get('schema')!r} with fields "
                f"{', '.join(sorted(fields))}. Evaluate again with this version."
            )
        fields["values"] = {
            name: Summary(value["mean"], value["sd"], value["se"], tuple(value["blocks"]))
            for name, value in fields["values"].items()
        }
        fields["cost"] = Cost(**fields["cost"])
        for kind in ARRAYS:
            prefix = f"{kind}."
            found = {key.removeprefix(prefix): value for key, value in (arrays or {}).items() if key.startswith(prefix)}
            fields[kind] = found
        return cls(**fields)

    def arrays(self) -> dict[str, Tensor]:
        """Return what is no part of the JSON, by names that `from_json` takes back."""
        return {f"{kind}.{name}": values for kind in ARRAYS for name, values in getattr(self, kind).items()}


ARRAYS = ("each", "deleted", "curve")


def stacked(blocks: Sequence[Mapping[str, Value]], kind: str) -> dict[str, Tensor]:
    """Return the `each`, `deleted` or `curve` of the values that have one, (blocks, ...)."""
    names = [name for name, value in blocks[0].items() if getattr(value, kind) is not None]
    return {
        name: torch.stack([torch.as_tensor(getattr(block[name], kind), dtype=torch.float64) for block in blocks])
        for name in names
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
