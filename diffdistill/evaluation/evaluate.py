"""Score a generator, or images that exist, under a protocol: one pass, every metric, values with their errors.

Images never touch the disk. The result depends on the images alone and not on the batch size; a generator whose image k
depends on seed k alone therefore has one number.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.collect import Collector
from diffdistill.evaluation.features import FeatureExtractor, load_extractor
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.metrics.registry import METRICS
from diffdistill.evaluation.metrics.sample import Sample, Value
from diffdistill.evaluation.protocol import Protocol
from diffdistill.evaluation.reference import Reference, build_reference, check_reference
from diffdistill.models.conditioning import Asked
from diffdistill.sampling.generate import Generate

SCHEMA = 1
LIBRARIES = ("diffdistill", "torch", "numpy", "diffusers")

Progress = Callable[[int, int], None]


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


@dataclass(frozen=True)
class Evaluation:
    """Every number of one evaluation and everything needed to know what it means.

    Attributes:
        protocol, protocol_hash: the fields of the protocol, and its hash.
        extractor, fingerprint: name and hex sha256 of the weights of the feature extractor.
        reference: provenance of the real images' statistics.
        num_images, num_blocks: images in one block, and blocks scored.
        values: by name, e.g. fid, fid_jackknife, precision, accuracy, contrast; the classes in `metrics` say which.
        reference_values: the figures that also exist for the real images, e.g. their accuracy and contrast.
        skipped: metrics that could not run, with the reason.
        num_steps, nfe: steps and network evaluations per image, as the caller says; None when unknown.
        ms_per_image: wall time of generation alone, first batch excluded; None when nothing was generated or there was
            only one batch.
        seconds: wall time by stage: generate, features, metrics, reference.
        device: where the images came from, e.g. "cpu" or the name of the GPU.
        versions: of the libraries.
    """

    protocol: dict[str, Any]
    protocol_hash: str
    extractor: str
    fingerprint: str
    reference: dict[str, Any]
    num_images: int
    num_blocks: int
    values: dict[str, Summary]
    reference_values: dict[str, float]
    skipped: dict[str, str]
    num_steps: int | None
    nfe: float | None
    ms_per_image: float | None
    seconds: dict[str, float]
    device: str
    versions: dict[str, str]

    def mean(self, name: str) -> float | None:
        """Return the mean of a value over the blocks, None when it was not measured."""
        return self.values[name].mean if name in self.values else None

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, with the schema version first; `write_json` takes it as it is."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> Evaluation:
        """Rebuild from `to_json`; raises UserError for another schema or missing fields."""
        fields = {key: value for key, value in report.items() if key != "schema"}
        if report.get("schema") != SCHEMA or set(fields) != set(cls.__dataclass_fields__):
            raise UserError(
                f"not an evaluation of schema {SCHEMA}; got schema {report.get('schema')!r} with fields "
                f"{', '.join(sorted(fields))}. Evaluate again with this version."
            )
        fields["values"] = {
            name: Summary(value["mean"], value["sd"], value["se"], tuple(value["blocks"]))
            for name, value in fields["values"].items()
        }
        return cls(**fields)


def evaluate(
    generate: Generate,
    protocol: Protocol,
    progress: Progress | None = None,
    *,
    nfe: float | None = None,
    num_steps: int | None = None,
    batch_size: int = 500,
    extractor: FeatureExtractor | None = None,
    reference: Reference | None = None,
) -> Evaluation:
    """Generate the protocol's images block by block and score them.

    The time per image is time.perf_counter around `generate`, waiting for the device, without the first batch (which
    pays for compilation, allocation and caches). Quantising and features are not part of it.

    Args:
        generate: (seeds, labels int64 (B,) on the CPU, or B captions) -> images (B, C, H, W), floating, in [-1, 1]. Image k may depend
            on seed k and label k only, else the number depends on batch_size.
        protocol: what to generate and how to score it.
        progress: called with (images done, images in all) after each batch.
        nfe, num_steps: network evaluations and steps per image, recorded as given.
        batch_size: images per call of generate.
        extractor: None loads the one the protocol names, on the GPU where there is one.
        reference: None builds the one the protocol names.
    Raises:
        UserError: extractor or reference do not fit the protocol.
        ValueError: generate returned another number of images, another type, or values that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive; got {batch_size}.")
    run = _Run(protocol, extractor, reference)
    total, done, device = protocol.num_images * len(protocol.first_seeds), 0, "cpu"
    clock = _GenerationClock()
    for block in range(len(protocol.first_seeds)):
        seeds, asked = list(protocol.seeds(block)), protocol.asked(block)
        for start in range(0, protocol.num_images, batch_size):
            part = slice(start, min(start + batch_size, protocol.num_images))
            images = clock.call(generate, seeds[part], asked[part])
            run.add(to_uint8(images), asked[part])
            done, device = done + len(images), _device_name(images.device)
            if progress is not None:
                progress(done, total)
    run.seconds["generate"] = clock.seconds
    return run.finish(num_steps=num_steps, nfe=nfe, ms_per_image=clock.ms_per_image, device=device)


def evaluate_images(
    images: Tensor | Iterable[Tensor],
    labels: Asked,
    protocol: Protocol,
    *,
    nfe: float | None = None,
    num_steps: int | None = None,
    extractor: FeatureExtractor | None = None,
    reference: Reference | None = None,
) -> Evaluation:
    """Score images that exist already, e.g. read from a folder.

    Args:
        images: uint8 (N, C, H, W), or an iterable of such batches, in the order of the protocol's seeds. N is
            num_images for one block or num_images times the number of blocks for all.
        labels: int64 (N,), the classes asked for, or N captions; None skips the metrics that need them and says so in the result.
        protocol, nfe, num_steps, extractor, reference: as for `evaluate`.
    Raises:
        UserError: the number of images is not that of the protocol, or extractor or reference do not fit it.
    """
    run = _Run(protocol, extractor, reference)
    done = 0
    for batch in [images] if isinstance(images, Tensor) else images:
        run.add(batch, None if labels is None else labels[done : done + len(batch)])
        done += len(batch)
    if labels is not None and len(labels) != done:
        raise UserError(f"one label per image: got {len(labels)} labels for {done} images.")
    return run.finish(num_steps=num_steps, nfe=nfe, ms_per_image=None, device="unknown")


class _GenerationClock:
    """Times a generator; the first call is left out of the time per image."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._first: float | None = None
        self._counted = 0

    def call(self, generate: Generate, seeds: list[int], asked: Asked) -> Tensor:
        begin = time.perf_counter()
        with torch.no_grad():
            images = generate(seeds, asked)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        elapsed = time.perf_counter() - begin
        if len(images) != len(seeds):
            raise ValueError(f"generate must return one image per seed; got {len(images)} for {len(seeds)} seeds.")
        self.seconds += elapsed
        if self._first is None:
            self._first = elapsed
        else:
            self._counted += len(seeds)
        return images

    @property
    def ms_per_image(self) -> float | None:
        return 1000 * (self.seconds - self._first) / self._counted if self._counted else None


class _Run:
    """Takes images in order, cuts them into blocks of seeds, and scores each block when it is full."""

    def __init__(self, protocol: Protocol, extractor: FeatureExtractor | None, reference: Reference | None):
        self.protocol = protocol
        self.seconds: dict[str, float] = dict.fromkeys(("generate", "features", "metrics", "reference"), 0.0)
        self.extractor = load_extractor(protocol.extractor) if extractor is None else extractor
        with self._timed("reference"):
            self.reference = build_reference(protocol, self.extractor) if reference is None else reference
            check_reference(self.reference, protocol, self.extractor)
        self.blocks: list[dict[str, Value]] = []
        self.skipped: dict[str, str] = {}
        self._start_block()

    def add(self, images: Tensor, labels: Asked) -> None:
        """Take uint8 images (B, C, H, W) and their labels (B,) or captions."""
        while len(images):
            if len(self.blocks) == len(self.protocol.first_seeds):
                raise UserError(self._count_rule("more"))
            room = self.protocol.num_images - self.collector.count
            with self._timed("features"):
                self.collector.add(images[:room], labels[:room] if isinstance(labels, list) else None)
            if isinstance(labels, Tensor):
                self.labels.append(labels[:room])
            labels = None if labels is None else labels[room:]
            images = images[room:]
            if self.collector.count == self.protocol.num_images:
                self._score_block()

    def finish(self, **facts: Any) -> Evaluation:
        """Return the evaluation; raises UserError for a number of images that is not the protocol's."""
        if self.collector.count or len(self.blocks) not in (1, len(self.protocol.first_seeds)):
            raise UserError(self._count_rule(len(self.blocks) * self.protocol.num_images + self.collector.count))
        return Evaluation(
            protocol=self.protocol.model_dump(mode="json"),
            protocol_hash=self.protocol.hash,
            extractor=self.extractor.name,
            fingerprint=self.extractor.fingerprint,
            reference=self.reference.provenance,
            num_images=self.protocol.num_images,
            num_blocks=len(self.blocks),
            values={name: _summary([block[name] for block in self.blocks]) for name in self.blocks[0]},
            reference_values=self._reference_values(),
            skipped=self.skipped,
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            versions=_versions(),
            **facts,
        )

    def _start_block(self) -> None:
        needs = frozenset().union(*(METRICS[name].needs for name in self.protocol.metrics))
        self.collector = Collector(self.extractor, self.protocol.groups(), needs)
        self.labels: list[Tensor] = []

    def _score_block(self) -> None:
        with self._timed("features"):
            sample = self.collector.finish(torch.cat(self.labels).cpu() if self.labels else None)
        seed = self.protocol.metric_seed + len(self.blocks)
        values: dict[str, Value] = {}
        with self._timed("metrics"):
            for name in self.protocol.metrics:
                if missing := _missing(name, sample):
                    self.skipped[name] = f"needs {missing}"
                else:
                    values |= METRICS[name](sample, self.reference.sample, seed)
        self.blocks.append(values)
        self._start_block()

    def _reference_values(self) -> dict[str, float]:
        real = self.reference.sample
        names = [name for name in self.protocol.metrics if METRICS[name].absolute and not _missing(name, real)]
        results = [METRICS[name](real, real, self.protocol.metric_seed) for name in names]
        return {key: value.value for result in results for key, value in result.items()}

    def _count_rule(self, got: int | str) -> str:
        count, blocks = self.protocol.num_images, len(self.protocol.first_seeds)
        wanted = f"{count}" if blocks == 1 else f"{count} or {blocks} x {count}"
        return f"protocol {self.protocol.name!r} scores {wanted} images; got {got}. The value depends on the number."

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin


def _missing(name: str, sample: Sample) -> str:
    return " and ".join(sorted(need for need in METRICS[name].needs if getattr(sample, need) is None))


def _summary(values: list[Value]) -> Summary:
    numbers = tuple(value.value for value in values)
    errors = [value.se for value in values if value.se is not None]
    return Summary(
        mean=statistics.fmean(numbers),
        sd=statistics.stdev(numbers) if len(numbers) > 1 else None,
        se=math.sqrt(statistics.fmean(error**2 for error in errors)) if errors else None,
        blocks=numbers,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
