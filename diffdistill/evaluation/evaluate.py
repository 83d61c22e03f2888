"""Score a generator, or images that exist, under a protocol: one pass, every metric, values with their errors.

Images touch the disk only where that is asked for. The result depends on the images alone and not on the batch size; a
generator whose image k depends on seed k alone therefore has one number.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from typing import Protocol as Contract

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.collect import Collector
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.metrics.sample import SampleSum, Value
from diffdistill.evaluation.parts import IMAGES_PER_PART, Part, PartFiles, Range, Times, ranges
from diffdistill.evaluation.protocol import Protocol
from diffdistill.evaluation.result import Cost, Evaluation, Summary, stacked, versions
from diffdistill.evaluation.transforms import parse_transform, transform_images
from diffdistill.evaluation.views import OpenView, open_views
from diffdistill.models.conditioning import Asked
from diffdistill.processes import ALONE, Processes
from diffdistill.sampling.generate import Generate

IMAGES_PER_BATCH = 100  # read from files at a time
Progress = Callable[[int, int], None]


class Sink(Contract):
    """Takes what leaves a generator, e.g. `image_files.PngWriter`."""

    def add(self, images: Tensor, first: int) -> None:
        """Take uint8 images (B, C, H, W), numbers first, first + 1, ... over all blocks of seeds."""
        ...

    def flush(self) -> None:
        """Return when all are where they should be."""
        ...


@dataclass(frozen=True)
class Keeping:
    """Where the parts of an evaluation are kept, so that the same command goes on after a stop.

    Attributes:
        folder: of the parts; deleted when all is done.
        target: what makes the images, in words that change when they would.
    """

    folder: Path
    target: Mapping[str, Any] = field(default_factory=dict)


class ImageSource(Contract):
    """Images that exist, in a fixed order, e.g. `image_sources.ImageSource`."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the images [start, stop), uint8 (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Images in memory, uint8 (N, C, H, W), as an `ImageSource`."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the images [start, stop)."""
        yield from self.images[start:stop].split(batch_size)


def evaluate(
    generate: Generate,
    protocol: Protocol,
    progress: Progress | None = None,
    *,
    nfe: float | None = None,
    num_steps: int | None = None,
    batch_size: int = 500,
    views: Sequence[OpenView] | None = None,
    keeping: Keeping | None = None,
    processes: Processes = ALONE,
    sink: Sink | None = None,
    images_per_part: int = IMAGES_PER_PART,
) -> Evaluation:
    """Generate the protocol's images part by part and score them.

    The time per image is time.perf_counter around `generate`, waiting for the device, without a process's first batch (which
    pays for compilation, allocation and caches). Quantising and features are not part of it.

    Args:
        generate: (seeds, labels int64 (B,) on the CPU, B captions, or None) -> images (B, C, H, W), floating, in [-1, 1]. Image
            k may depend on seed k and label k only, else the number depends on batch_size.
        protocol: what to generate and how to score it.
        progress: called with (images done, images in all) after each batch; of this process where there are several.
        nfe, num_steps: network evaluations and steps per image, recorded as given.
        batch_size: images per call of generate.
        views: None opens those of the protocol, on the GPU where there is one.
        keeping: where parts are kept; None keeps them in memory. Several processes need it, on a disk that they share.
        processes: share the parts; each gets the whole result.
        sink: gets the images.
        images_per_part: what is lost at most by a kill; another number changes values by rounding, about 1e-15.
    Raises:
        UserError: extractor or reference do not fit the protocol, or the parts on disk are of another evaluation.
        ValueError: generate returned another number of images, another type, or values that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive; got {batch_size}.")
    scorer = _Scorer(protocol, views)
    blocks = ranges(protocol, range(len(protocol.first_seeds)), images_per_part)
    maker = _PartMaker(_Generated(generate, protocol, batch_size, sink), protocol, scorer.views)
    _run(maker, scorer, blocks, progress, keeping, processes)
    return scorer.finish(num_steps=num_steps, nfe=nfe, batch_size=batch_size)


def evaluate_images(
    images: Tensor | ImageSource,
    asked: Asked,
    protocol: Protocol,
    progress: Progress | None = None,
    *,
    nfe: float | None = None,
    num_steps: int | None = None,
    views: Sequence[OpenView] | None = None,
    keeping: Keeping | None = None,
    processes: Processes = ALONE,
    images_per_part: int = IMAGES_PER_PART,
) -> Evaluation:
    """Score images that exist already, e.g. read from a folder.

    Args:
        images: uint8 (N, C, H, W), or a source of such, in the order of the protocol's seeds, after the protocol's transforms. N is
            num_images for one block or num_images times the number of blocks for all.
        asked: int64 (N,), the classes asked for, or N captions; None skips the metrics that need them and says so in the result.
        protocol, progress, nfe, num_steps, views, keeping, processes, images_per_part: as for `evaluate`.
    Raises:
        UserError: the number of images is not that of the protocol, or extractor or reference do not fit it.
    """
    source: ImageSource = TensorImages(images) if isinstance(images, Tensor) else images
    num_blocks, rest = divmod(len(source), protocol.num_images)
    if rest or num_blocks not in (1, len(protocol.first_seeds)):
        raise UserError(_count_rule(protocol, len(source)))
    if asked is not None and len(asked) != len(source):
        raise UserError(f"one label or caption per image: got {len(asked)} for {len(source)} images.")
    scorer = _Scorer(protocol, views)
    blocks = ranges(protocol, range(num_blocks), images_per_part)
    maker = _PartMaker(_Existing(source, asked, protocol), protocol, scorer.views)
    _run(maker, scorer, blocks, progress, keeping, processes)
    return scorer.finish(num_steps=num_steps, nfe=nfe)


def _count_rule(protocol: Protocol, got: int) -> str:
    count, blocks = protocol.num_images, len(protocol.first_seeds)
    wanted = f"{count}" if blocks == 1 else f"{count} or {blocks} x {count}"
    return (
        f"protocol {protocol.name!r} scores {wanted} images; got {got}. A distance depends on the number: make as many images, or "
        "write a protocol of your own with another num_images."
    )


# --- Where the images come from


class _Generated:
    """Images of a generator, which is timed."""

    def __init__(self, generate: Generate, protocol: Protocol, batch_size: int, sink: Sink | None):
        self.generate, self.protocol, self.batch_size, self.sink = generate, protocol, batch_size, sink
        self.transform = parse_transform(protocol.transforms)
        self.times = Times()
        self._is_first = True  # the first call of a process pays for what later ones find ready
        self._asked: tuple[int, Asked] | None = None

    def batches(self, part: Range) -> Iterator[tuple[Tensor, Asked]]:
        seeds, asked = self.protocol.seeds(part.block), self._asked_of(part.block)
        for start in range(part.start, part.stop, self.batch_size):
            batch = slice(start, min(start + self.batch_size, part.stop))
            wanted = None if asked is None else asked[batch]
            images = to_uint8(self._timed(list(seeds[batch]), wanted), self.protocol.uint8_rule)
            if self.sink is not None:
                self.sink.add(images, part.block * self.protocol.num_images + start)
            yield transform_images(images, self.transform), wanted
        if self.sink is not None:
            self.sink.flush()  # before the part counts as done

    def _asked_of(self, block: int) -> Asked:
        if self._asked is None or self._asked[0] != block:
            self._asked = block, self.protocol.asked(block)
        return self._asked[1]

    def _timed(self, seeds: list[int], asked: Asked) -> Tensor:
        begin = time.perf_counter()
        with torch.no_grad():
            images = self.generate(seeds, asked)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        elapsed = time.perf_counter() - begin
        if len(images) != len(seeds):
            raise ValueError(f"generate must return one image per seed; got {len(images)} for {len(seeds)} seeds.")
        counts = not self._is_first
        self.times += Times(generate=elapsed, counted=elapsed * counts, counted_images=len(seeds) * counts)
        self._is_first = False
        return images


class _Existing:
    """Images that are there."""

    def __init__(self, source: ImageSource, asked: Asked, protocol: Protocol):
        self.source, self.asked, self.protocol = source, asked, protocol
        self.times = Times()

    def batches(self, part: Range) -> Iterator[tuple[Tensor, Asked]]:
        first = part.block * self.protocol.num_images
        place = first + part.start
        for images in self.source.batches(IMAGES_PER_BATCH, place, first + part.stop):
            yield images, None if self.asked is None else self.asked[place : place + len(images)]
            place += len(images)


# --- Parts


class _PartMaker:
    """Makes the parts: images of a range, seen by every view."""

    def __init__(self, source: _Generated | _Existing, protocol: Protocol, views: Sequence[OpenView]):
        self.source, self.groups, self.seen = source, protocol.groups(), [view.seen for view in views]
        self.per_prompt = protocol.images_per_prompt

    def make(self, part: Range, progress: Progress | None) -> Part:
        groups, self.source.times = self.groups[part.start : part.stop], Times()
        first = int(groups[0])
        collector = Collector(self.seen, groups - first, self.per_prompt)
        seeing, device = 0.0, "cpu"
        for images, asked in self.source.batches(part):
            begin = time.perf_counter()
            collector.add(images, asked)
            seeing, device = seeing + time.perf_counter() - begin, _device_name(images.device)
            if progress is not None:
                progress(collector.count, len(groups))
        begin = time.perf_counter()
        samples = collector.finish()
        seeing += time.perf_counter() - begin
        return Part(samples, first, self.source.times + Times(features=seeing), device)


def _run(
    maker: _PartMaker,
    scorer: _Scorer,
    blocks: Sequence[Sequence[Range]],
    progress: Progress | None,
    keeping: Keeping | None,
    processes: Processes,
) -> None:
    """Make every part, or this process's share of them, and give all of them to the scorer."""
    every = [part for block in blocks for part in block]
    if keeping is None:
        if processes.count > 1:
            raise ValueError("several processes put their parts together on disk: give `keeping`.")
        for part, report in _reporting(every, progress):
            scorer.add(part, maker.make(part, report))
        return
    files = PartFiles(keeping.folder, scorer.key(keeping.target, blocks))
    mine = [part for part in every[processes.index :: processes.count] if not files.has(part)]
    processes.wait()  # all have looked before the first one writes
    for part, report in _reporting(mine, progress):
        files.save(part, maker.make(part, report))
    processes.wait()
    for part in every:
        scorer.add(part, files.load(part))
    processes.wait()
    if processes.is_main:
        files.remove()


def _reporting(parts: Sequence[Range], progress: Progress | None) -> Iterator[tuple[Range, Progress | None]]:
    """Yield each part with a callback that counts the images of those before it."""
    total, done = sum(part.num_images for part in parts), 0
    for part in parts:
        yield part, None if progress is None else _after(done, total, progress)
        done += part.num_images


def _after(done: int, total: int, progress: Progress) -> Progress:
    return lambda count, _: progress(done + count, total)


# --- Scores


class _Scorer:
    """Takes parts in order and scores each block of seeds when it is complete."""

    def __init__(self, protocol: Protocol, views: Sequence[OpenView] | None):
        self.protocol = protocol
        self.seconds = dict.fromkeys(("generate", "features", "metrics", "reference"), 0.0)
        with self._timed("reference"):
            self.views = open_views(protocol) if views is None else list(views)
        self.times, self.device = Times(), "unknown"
        self.blocks: list[dict[str, Value]] = []
        asked_for = {name for view in self.views for name in view.metrics}
        self.skipped = {name: "not asked for" for name in protocol.metrics if name not in asked_for}
        self.warnings: list[str] = []
        self._start_block()

    def key(self, target: Mapping[str, Any], blocks: Sequence[Sequence[Range]]) -> dict[str, Any]:
        """Return what decides the parts of this evaluation."""
        return {
            "protocol": self.protocol.hash,
            "target": dict(target),
            "extractors": [[view.extractor.name, view.extractor.fingerprint, sorted(view.seen.needs)] for view in self.views],
            "images_per_part": blocks[0][0].num_images,
        }

    def _start_block(self) -> None:
        self.sums = [SampleSum(self.protocol.jackknife_groups) for _ in self.views]
        self.count = 0

    def add(self, part: Range, content: Part) -> None:
        """Take the next part."""
        for total, sample in zip(self.sums, content.samples, strict=True):
            total.add(sample, content.first_group)
        self.times, self.device = self.times + content.times, content.device
        self.count += part.num_images
        if self.count == self.protocol.num_images:
            with self._timed("metrics"):
                self.blocks.append(self._score())
            self._start_block()

    def _score(self) -> dict[str, Value]:
        seed, values = self.protocol.metric_seed + len(self.blocks), dict[str, Value]()
        for view, total in zip(self.views, self.sums, strict=True):
            sample = total.sample()
            for name, metric in view.metrics.items():
                if missing := sample.missing(metric.needs):
                    self.skipped[name] = f"needs {' and '.join(missing)}"
                elif not metric.absolute and (missing := view.reference.sample.missing(metric.needs)):
                    self.skipped[name] = f"needs {' and '.join(missing)} of the real images"
                else:
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        values |= metric(sample, view.reference.sample, seed)
                    self.warnings += [text for warning in caught if (text := f"{name}: {warning.message}") not in self.warnings]
        return values

    def finish(self, num_steps: int | None, nfe: float | None, batch_size: int | None = None) -> Evaluation:
        """Return the evaluation."""
        seconds = {**self.seconds, "generate": self.times.generate, "features": self.times.features}
        counted = self.times.counted_images
        return Evaluation(
            protocol=self.protocol.model_dump(mode="json"),
            protocol_hash=self.protocol.hash,
            views=[
                {
                    "view": str(view.view),
                    "extractor": view.extractor.name,
                    "fingerprint": view.extractor.fingerprint,
                    "reference": view.reference.provenance,
                }
                for view in self.views
            ],
            num_images=self.protocol.num_images,
            num_blocks=len(self.blocks),
            values={name: Summary.of([block[name] for block in self.blocks]) for name in self.blocks[0]},
            reference_values=self._reference_values(),
            skipped=self.skipped,
            warnings=self.warnings,
            cost=Cost(
                num_steps=num_steps,
                nfe=nfe,
                ms_per_image=1000 * self.times.counted / counted if counted else None,
                batch_size=batch_size,
            ),
            seconds={stage: round(value, 3) for stage, value in seconds.items()},
            device=self.device,
            versions=versions(),
            each=stacked(self.blocks, "each"),
            deleted=stacked(self.blocks, "deleted"),
            curve=stacked(self.blocks, "curve"),
        )

    def _reference_values(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for view in self.views:
            real = view.reference.sample
            metrics = [metric for metric in view.metrics.values() if metric.absolute and not real.missing(metric.needs)]
            for metric in metrics:
                found |= {key: value.value for key, value in metric(real, real, self.protocol.metric_seed).items()}
        return found

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
