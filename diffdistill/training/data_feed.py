"""From a run's data settings to its micro-batches: images and texts are encoded once, labels are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.config import RunConfig, TextData
from diffdistill.data.batches import DataSource, ImageSource, LabelSource, MicroBatches, derive_seed, keyed_generator
from diffdistill.data.buckets import BucketBatches, BucketedSource
from diffdistill.data.digits import digits
from diffdistill.data.images import load_image_folder
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.distillers.base import Batch, PairBatch, TrajectoryBatch
from diffdistill.errors import UserError
from diffdistill.models.codec import images_at_once
from diffdistill.models.loading import Teacher
from diffdistill.processes import ALONE, Processes
from diffdistill.training.conditions import Conditions
from diffdistill.training.text_data import text_source


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


def resumed_micro_batch_size(batch_size: int, stored: int, usual: int, num_processes: int) -> int:
    """Return the micro-batch size of a run that goes on: that of its checkpoint, on which every draw depends.

    Args:
        stored: of the checkpoint.
        usual: what this number of processes would start with.
    Raises:
        UserError: these processes cannot share such micro-batches evenly.
    """
    number = batch_size // stored
    if stored != usual and number % num_processes:
        fitting = ", ".join(str(count) for count in range(1, number + 1) if number % count == 0)
        raise UserError(
            f"the run was started with micro-batches of {stored}, on which every draw depends. A step has {number} of them, which "
            f"{num_processes} processes cannot share evenly. Resume with {fitting} processes. (Where micro_batch_size is set in the "
            "config, any number up to batch_size / micro_batch_size will do.)"
        )
    return stored


class DataFeed:
    """Micro-batches of one stage, on the device. A micro-batch is a function of (seed, stage, step, micro) alone.

    Turns of one step see the same micro-batch, so that what one hands on fits the next.

    Args:
        source: images, labels or texts.
        pairs: stored pairs, or None.
        trajectories: stored calls of the guided teacher, or None.
        teacher: whose conditions these are.
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
        self.source, self.pairs, self.trajectories = source, pairs, trajectories
        self.conditions = Conditions(teacher, source)
        self.key = (seed, "stage", stage)
        self.order = _order(source, batch_size, size, derive_seed(*self.key, "order"))
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
        x0 = None if sample.x0 is None else self.conditions.on_device(sample.x0)
        cond = self.conditions.of(sample.values, self.order.micro_batch_size)
        return Batch(cond, x0, pairs=self._pairs(step, micro), trajectories=self._trajectories(step, micro))

    def _pairs(self, step: int, micro: int) -> PairBatch | None:
        if self.pairs is None or self.stored_order is None:
            return None
        taken = self.pairs.take(self.stored_order.indices(step, micro))
        noise, x0 = self.conditions.on_device(taken.noise), self.conditions.on_device(taken.x0)
        return PairBatch(noise, x0, self.conditions.at(taken.labels, len(taken)))

    def _trajectories(self, step: int, micro: int) -> TrajectoryBatch | None:
        if self.trajectories is None or self.stored_order is None:
            return None
        *calls, labels = self.trajectories.take(self.stored_order.indices(step, micro))
        cond = self.conditions.at(labels, self.order.micro_batch_size)
        return TrajectoryBatch(*map(self.conditions.on_device, calls), cond=cond)


def _order(source: DataSource, batch_size: int, size: int, seed: int) -> MicroBatches | BucketBatches:
    if isinstance(source, BucketedSource):
        return BucketBatches(source.sizes, batch_size, size, seed)
    return MicroBatches(source.num_samples, batch_size, size, seed)


def build_source(config: RunConfig, teacher: Teacher, processes: Processes = ALONE, show: bool = False) -> DataSource:
    """Return the run's states and conditions: images and text encoded once, the former kept in memory where they have labels.

    Raises:
        UserError: images, classes or texts that are not what the teacher takes.
    """
    if isinstance(config.data, TextData):
        source = text_source(config.data, teacher, processes, show)
        if isinstance(source, BucketedSource):
            report = source.describe(config.batch_size)
            if processes.index == 0:
                print(report, flush=True)
        return source
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
    states = torch.cat(
        [teacher.codec.encode(part.to(teacher.device)).cpu() for part in images.split(images_at_once(*images.shape[2:]))]
    )
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
