"""From a run's data settings to its micro-batches: images are encoded once, labels are drawn, pairs are made or read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffdistill.config import RunConfig
from diffdistill.data.batches import (
    DataSource,
    ImageSource,
    LabelSource,
    MicroBatches,
    derive_seed,
    keyed_generator,
    load_image_folder,
    uniform_labels,
)
from diffdistill.data.digits import digits
from diffdistill.data.pairs import Pairs
from diffdistill.distillers.base import Batch, PairBatch
from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.condition import Condition
from diffdistill.models.loading import Teacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler

IMAGES_PER_PASS = 64


def micro_batch_size(batch_size: int, asked: int | None, num_processes: int) -> int:
    """Return the samples of one forward pass: as asked, or an equal share of the batch for each process.

    Raises:
        UserError: the batch does not split into at least one micro-batch per process.
    """
    size = asked or max(1, batch_size // num_processes)
    if batch_size % size or batch_size // size < num_processes or (asked is None and batch_size != size * num_processes):
        raise UserError(
            f"batch_size {batch_size} in micro-batches of {size} does not give each of {num_processes} processes "
            f"one. Set batch_size to a multiple of {num_processes}, and micro_batch_size to a divisor of "
            f"batch_size / {num_processes} or null."
        )
    return size


class DataFeed:
    """Micro-batches of one stage, on the device. A micro-batch is a function of (seed, stage, step, micro) alone.

    Turns of one step see the same micro-batch, so that what one hands on fits the next.

    Args:
        source: images or labels.
        pairs: stored pairs, or None.
        teacher: makes conditions from labels.
        size: samples of a micro-batch.
    """

    def __init__(
        self, source: DataSource, pairs: Pairs | None, teacher: Teacher, *, batch_size: int, size: int, seed: int, stage: int
    ) -> None:
        self.source, self.pairs, self.teacher = source, pairs, teacher
        self.key = (seed, "stage", stage)
        self.order = MicroBatches(source.num_samples, batch_size, size, derive_seed(*self.key, "order"))
        classes = teacher.num_classes
        self._template = teacher.condition(None if classes is None else torch.zeros(1, dtype=torch.int64), 1)
        self.pair_order = (
            None if pairs is None else MicroBatches(len(pairs), batch_size, size, derive_seed(*self.key, "pair order"))
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step, over all processes."""
        return self.order.num_micro_batches

    def batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch `micro` of step `step` of the stage."""
        sample = self.source.take(self.order.indices(step, micro), keyed_generator(*self.key, step, "data", micro))
        x0 = None if sample.x0 is None else self._on_device(sample.x0)
        return Batch(self._condition(sample.labels), x0, self._pairs(step, micro))

    def _condition(self, labels: Tensor | None) -> Condition:
        """Return what `teacher.condition` would, without its copies from pageable memory, for which a GPU is waited."""
        values = {} if labels is None else {name: self._on_device(labels) for name in self._template.values}
        return Condition(self.order.micro_batch_size, values, self._template.null)

    def _on_device(self, value: Tensor) -> Tensor:
        device = self.teacher.device
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

    def _pairs(self, step: int, micro: int) -> PairBatch | None:
        if self.pairs is None or self.pair_order is None:
            return None
        index = self.pair_order.indices(step, micro)
        labels = None if self.pairs.labels is None else self.pairs.labels[index]
        noise, x0 = self.pairs.noise[index], self.pairs.x0[index]
        return PairBatch(self._on_device(noise), self._on_device(x0), self._condition(labels))


def build_source(config: RunConfig, teacher: Teacher) -> DataSource:
    """Return the run's states and labels, images encoded once to the teacher's states and kept in memory.

    Raises:
        UserError: images or classes that are not the teacher's.
    """
    if config.data.kind == "labels":
        return LabelSource(teacher.num_classes)
    images, labels = _images(config, teacher)
    if teacher.num_classes is None:
        labels = None
    elif labels is None:
        raise UserError(
            f"the teacher has {teacher.num_classes} classes and the images have none. Sort them into one folder per class."
        )
    elif int(labels.max()) >= teacher.num_classes:
        raise UserError(
            f"the images have {int(labels.max()) + 1} classes, the teacher {teacher.num_classes}. Use the "
            "teacher's own classes, in the order of its labels."
        )
    states = torch.cat([teacher.codec.encode(part.to(teacher.device)).cpu() for part in images.split(IMAGES_PER_PASS)])
    if tuple(states.shape[1:]) != teacher.denoiser.sample_shape:
        raise UserError(
            f"the data gives states of shape {tuple(states.shape[1:])}, the teacher works on "
            f"{tuple(teacher.denoiser.sample_shape)}: set data.size to the edge of the teacher's images."
        )
    return ImageSource(states, labels, max_abs=max(1.0, float(states.abs().max())))


def _images(config: RunConfig, teacher: Teacher) -> tuple[Tensor, Tensor | None]:
    if config.data.kind == "digits":
        return digits()
    channels, _, _ = teacher.image_shape
    folder = load_image_folder(config.data.path, config.data.size, channels)
    return folder.images, folder.labels


def build_pairs(config: RunConfig, teacher: Teacher, path: Path) -> Pairs:
    """Read the run's stored pairs, or make them and store them at `path`, where a resumed run finds them."""
    assert config.pairs is not None
    if config.pairs.path is not None:
        found = config.pairs.path
        return Pairs.load(found / "pairs.safetensors" if found.is_dir() else found)
    if not path.exists():
        make_pairs(teacher, config.pairs.num or 1, config.pairs.steps, config.pairs.guidance, config.seed).save(path)
    return Pairs.load(path)


@torch.no_grad()
def make_pairs(teacher: Teacher, num: int, num_steps: int, guidance: float, seed: int) -> Pairs:
    """Return pairs (noise, x0) of the teacher's deterministic DDIM sampler on the trailing grid, labels uniform."""
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, num_steps), guidance=guidance)
    shape, classes = teacher.denoiser.sample_shape, teacher.num_classes
    labels = None if classes is None else uniform_labels(num, classes, keyed_generator(seed, "pair labels"))
    noises, samples = [], []
    for start in range(0, num, IMAGES_PER_PASS):
        seeds = [derive_seed(seed, "pair", k) for k in range(start, min(num, start + IMAGES_PER_PASS))]
        cond = teacher.condition(None if labels is None else labels[start : start + len(seeds)], len(seeds))
        noises.append(Noise(seeds).draw(shape))
        samples.append(sampler.sample(teacher.denoiser, Noise(seeds, teacher.device), cond).float().cpu())
    origin = {"teacher": teacher.path, "sampler": "ddim, trailing", "steps": num_steps, "guidance": guidance, "seed": seed}
    return Pairs(torch.cat(noises), torch.cat(samples), labels, origin)
