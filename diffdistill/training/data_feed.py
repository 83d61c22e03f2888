"""From a run's data settings to its micro-batches: images are encoded once, labels are drawn, pairs are made or read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.config import RunConfig, TextData
from diffdistill.data.batches import (
    DataSource,
    ImageSource,
    LabelSource,
    MicroBatches,
    derive_seed,
    keyed_generator,
    uniform_labels,
)
from diffdistill.data.digits import digits
from diffdistill.data.images import load_image_folder
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.distillers.base import Batch, PairBatch, TrajectoryBatch
from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import TrajectorySpec, make_trajectories
from diffdistill.training.text_data import ALONE, Processes, text_source

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
        trajectories: stored calls of the guided teacher, or None.
        teacher: makes conditions from labels.
        size: samples of a micro-batch.
    """

    def __init__(
        self,
        source: DataSource,
        pairs: Pairs | None,
        trajectories: Trajectories | None,
        teacher: Teacher,
        *,
        batch_size: int,
        size: int,
        seed: int,
        stage: int,
    ) -> None:
        self.source, self.pairs, self.trajectories, self.teacher = source, pairs, trajectories, teacher
        self.key = (seed, "stage", stage)
        self.order = MicroBatches(source.num_samples, batch_size, size, derive_seed(*self.key, "order"))
        self._null = teacher.conditioner.null
        stored = pairs if pairs is not None else trajectories  # no method reads both
        self.stored_order = (
            None if stored is None else MicroBatches(len(stored), batch_size, size, derive_seed(*self.key, "pair order"))
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step, over all processes."""
        return self.order.num_micro_batches

    def batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch `micro` of step `step` of the stage."""
        sample = self.source.take(self.order.indices(step, micro), keyed_generator(*self.key, step, "data", micro))
        x0 = None if sample.x0 is None else self._on_device(sample.x0)
        cond = self._condition(sample.values)
        return Batch(cond, x0, pairs=self._pairs(step, micro), trajectories=self._trajectories(step, micro))

    def _condition(self, values: Mapping[str, Tensor]) -> Condition:
        """Return what `teacher.condition` would, without its copies from pageable memory, for which a GPU is waited."""
        moved = {name: self._on_device(value) for name, value in values.items()}
        return Condition(self.order.micro_batch_size, moved, self._null if moved else {})

    def _on_device(self, value: Tensor) -> Tensor:
        device = self.teacher.device
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

    def _pairs(self, step: int, micro: int) -> PairBatch | None:
        if self.pairs is None or self.stored_order is None:
            return None
        index = self.stored_order.indices(step, micro)
        labels = None if self.pairs.labels is None else self.pairs.labels[index]
        noise, x0 = self.pairs.noise[index], self.pairs.x0[index]
        return PairBatch(self._on_device(noise), self._on_device(x0), self._labelled(labels))

    def _trajectories(self, step: int, micro: int) -> TrajectoryBatch | None:
        if self.trajectories is None or self.stored_order is None:
            return None
        *calls, labels = self.trajectories.take(self.stored_order.indices(step, micro))
        return TrajectoryBatch(*(self._on_device(value) for value in calls), cond=self._labelled(labels))

    def _labelled(self, labels: Tensor | None) -> Condition:
        return self._condition({} if labels is None else {"class_labels": labels})


def build_source(config: RunConfig, teacher: Teacher, processes: Processes = ALONE) -> DataSource:
    """Return the run's states and conditions: images and text encoded once, the former kept in memory where they have labels.

    Raises:
        UserError: images, classes or texts that are not what the teacher takes.
    """
    if isinstance(config.data, TextData):
        return text_source(config.data, teacher, processes)
    if teacher.family.reads_text:
        raise UserError(
            f"{teacher.path} makes images from text, and data.kind is {config.data.kind}. Set data: {{kind: prompts, path: ...}}, or "
            "data: {kind: captions, path: ...} for methods that learn from images."
        )
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
    if teacher.family.reads_text:
        raise UserError(
            "pairs of a teacher that reads text are not made yet. Use a method that needs none, such as dmd2 or vsd."
        )
    if config.pairs.path is not None:
        found = config.pairs.path
        return Pairs.load(found / "pairs.safetensors" if found.is_dir() else found)
    if not path.exists():
        make_pairs(teacher, config.pairs.num or 1, config.pairs.steps, config.pairs.guidance, config.seed).save(path)
    return Pairs.load(path)


def build_trajectories(spec: TrajectorySpec, teacher: Teacher, denoiser: Denoiser, path: Path, seed: int) -> Trajectories:
    """Read the stored trajectories of a method, or make them and store them at `path`, where a resumed run finds them.

    `denoiser` is the teacher as the roles see it: its network may hold adapters by now.
    """
    if teacher.family.reads_text:
        raise UserError("trajectories of a teacher that reads text are not made yet. Use method guidance.")
    if spec.path is not None:
        return Trajectories.load(spec.path)
    if not path.exists():
        make_trajectories(denoiser, spec, teacher.condition, teacher.num_classes, seed, teacher.device).save(path)
    return Trajectories.load(path)


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
